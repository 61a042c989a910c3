"""A prompt that comes without a query has the one of training: what stands between two texts of its instruction."""

import json
from pathlib import Path

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from test_chats import PLAIN
from transformers import pipeline

from pplug_hf import PPlugConfig, PPlugModel, PPlugProcessor, demo, get_task
from pplug_hf.configuration.queries import query_of, split_prompt
from pplug_hf.modeling import encoders
from pplug_hf.serving.engine import Request, Sampling
from pplug_hf.serving.transformers_engine import TransformersEngine

PROMPT, QUERY = "write a story about the night sky in the rain", "the night sky"
SHELF = "Which shelf does this reader put the book on? book: "
TASK = "personalized-text-generation"
MARKS = {"query_marker": "about", "query_end": "in the"}


@pytest.mark.parametrize(
    "text, marker, end, expected",
    [
        ("Which tag? book: a war at sea", "book:", "", "a war at sea"),
        ('the title "On "quoted" things", which', 'title "', '", which', 'On "quoted" things'),
        ("a: b a: c", "a:", "", "b a: c"),  # the first marker
        ("x [b] [c] y", "[", "]", "b] [c"),  # the last end
        ("no such text", "book:", "no", "no such text"),  # no marker, so no end either
        ("all of it", "", "", "all of it"),
        ("book: ", "book:", "", "book: "),  # nothing is no query
    ],
)
def test_the_query_in_a_prompt(text, marker, end, expected):
    assert query_of(text, marker, end) == expected


@given(st.text("ab: "), st.text("ab: ", max_size=2), st.text("ab: ", max_size=2))
def test_the_parts_of_a_prompt_joined_are_the_prompt(text, marker, end):
    head, query, rest = split_prompt(text, marker, end)
    assert head + query + rest == text
    assert query == query.strip() and (not marker or head.strip() == "" or marker in head)


def test_a_task_and_its_plug_cut_alike():
    task = get_task("LaMP-1")
    prompt = 'For an author who has written the paper with the title "A "b" c", which reference is related? [1]: "d"'
    config = PPlugConfig(query_marker=task.query_marker, query_end=task.query_end)
    assert config.query_of(prompt) == task.query(prompt) == 'A "b" c'


@pytest.fixture
def asked(monkeypatch):
    """The texts that weighted histories, in their order."""
    texts, plain = [], encoders.embed

    def embed(encoder, queries, *args, task=None, **options):
        texts.extend(queries if task == "query" else [])
        return plain(encoder, queries, *args, task=task, **options)

    monkeypatch.setattr(encoders, "embed", embed)
    return texts


def made(family="llama", **choices):
    return tiny.model(family, train_input_encoder=False, **MARKS, **choices)


@pytest.mark.parametrize("family", ["t5", "gpt2", "llama"])
def test_generate_and_forward(family, asked):
    model = made(family)
    batch = PPlugProcessor.from_model(model)([PROMPT, "a film"], persona=[tiny.HISTORY] * 2, labels=tiny.ANSWERS[:2])
    model(**batch)
    assert asked == [QUERY, "a film"]  # not the answers
    for query in (None, ["sea"]):
        batch = PPlugProcessor.from_model(model)([PROMPT], persona=[tiny.HISTORY], query=query)
        model.generate(**batch, max_new_tokens=2)
    assert asked[2:] == [QUERY, "sea"]


def test_chats(asked):
    model = tiny.model("llama", train_input_encoder=False)
    model.tokenizer.chat_template = PLAIN
    model.config.update(MARKS | {"chat": True})
    processor = PPlugProcessor.from_model(model)
    chat = [{"role": "user", "content": "a film"}, {"role": "assistant", "content": "no"}]
    chat += [{"role": "user", "content": PROMPT}]
    given, later = {"persona": [tiny.HISTORY]}, {"add_generation_prompt": True}
    for batch in (
        processor([PROMPT], **given),
        processor([PROMPT]) | given,
        processor.apply_chat_template([chat], **given, **later),
        processor.apply_chat_template([chat], **later) | given,
    ):
        model(**batch)
    assert asked == [QUERY] * 4
    asked.clear()
    pipeline(TASK, model=model)(chat, **{"persona": tiny.HISTORY, "max_new_tokens": 2})
    assert asked == [QUERY]


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_the_pipeline(family, asked):
    pipe = pipeline(TASK, model=made(family))
    pipe([PROMPT, "a film"], persona=[tiny.HISTORY] * 2, batch_size=2, max_new_tokens=2)
    assert asked == [QUERY, "a film"]


def test_each_plug_takes_its_own_query(asked, tmp_path):
    model, other = made(), tiny.model("llama", train_input_encoder=False)
    other.save_pretrained(tmp_path)
    model.load_plug(tmp_path, "other", encoder=tiny.shared_encoder())
    batch = PPlugProcessor.from_model(model)([PROMPT] * 2)
    model.generate(**batch, persona=[tiny.HISTORY] * 2, plug=["default", "other"], max_new_tokens=2)
    assert asked == [QUERY, PROMPT]
    engine, persona = TransformersEngine(model), model.encode_persona(tiny.HISTORY)
    asked.clear()  # without its trial
    requests = [Request(PROMPT, persona, plug=plug, sampling=Sampling(2)) for plug in ("default", "other")]
    engine.generate([*requests, Request([{"role": "user", "content": PROMPT}], persona, sampling=Sampling(2))])
    assert sorted(asked) == sorted([QUERY, PROMPT, QUERY])
    engine.close()


def test_a_tokenizer_that_spells_texts_differently(asked):
    assets = Path(demo.__file__).parent / "assets"
    model = PPlugModel.from_pretrained(
        assets / "plug", backbone=str(assets / "backbone"), encoder=str(assets / "encoder")
    )
    (prompt, query), processor = (
        (SHELF + (book := "a castle, the wand, and wanda"), book),
        PPlugProcessor.from_model(model),
    )
    spelled = model.tokenizer.decode(model.tokenizer(query, add_special_tokens=False)["input_ids"])
    model.generate(**processor([prompt], persona=[["epic: a sea"]]), max_new_tokens=2)
    model.generate(**processor([prompt]), persona=[["epic: a sea"]], max_new_tokens=2)
    pipeline(TASK, model=model)(prompt, persona=["epic: a sea"], max_new_tokens=2)
    assert asked == [spelled, spelled, query] and spelled != query


def test_it_is_saved_and_older_plugs_have_none(asked, tmp_path):
    model = made("gpt2")
    model.save_pretrained(tmp_path / "plug")
    PPlugProcessor.from_model(model).save_pretrained(tmp_path / "processor")
    assert PPlugProcessor.from_pretrained(tmp_path / "processor").query_of(PROMPT) == QUERY
    settings = json.loads((tmp_path / "plug" / "config.json").read_text())
    assert {name: settings[name] for name in MARKS} == MARKS
    parts = {"backbone": tiny.backbone("gpt2"), "encoder": tiny.shared_encoder()}
    assert PPlugModel.from_pretrained(tmp_path / "plug", **parts).config.query_of(PROMPT) == QUERY
    for name in MARKS:
        del settings[name]
    (tmp_path / "plug" / "config.json").write_text(json.dumps(settings))
    assert PPlugModel.from_pretrained(tmp_path / "plug", **parts).config.query_of(PROMPT) == PROMPT
