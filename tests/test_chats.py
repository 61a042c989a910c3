"""Prompts as turns of a chat: what a language model reads, where the persona stands, what is cut, what is kept."""

import logging
import random
from functools import partial

import bench_data
import pytest
import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from pplug_hf import PPlugModel, PPlugProcessor
from pplug_hf.chats import ChatTemplate
from pplug_hf.commands.bench import BenchSettings
from pplug_hf.commands.generate import GenerateSettings, generate
from pplug_hf.commands.train import TrainSettings, train
from pplug_hf.data.records import Example
from pplug_hf.errors import ConfigurationError, DataError, MismatchError
from pplug_hf.methods.base import Plain, Retrieval
from pplug_hf.methods.prompts import RetrievalPrompt, persona_positions
from pplug_hf.methods.resources import Decoding, Resources
from pplug_hf.methods.selection import SelectionModel, TextForm
from pplug_hf.methods.selector import texts_of
from pplug_hf.modeling import encoders
from pplug_hf.serving.prompts import prompt_row

BOT, USER, SYSTEM = "<bot>", "<user>", "<system>"
PLAIN = (
    "{% for m in messages %}<{{ 'bot' if m.role == 'assistant' else m.role }}> {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<bot> {% endif %}"
)
WRITES_BOS = "{{ bos_token }} " + PLAIN
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<system> good <eos> {% endif %}" + PLAIN
WITHOUT_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + PLAIN
IGNORES_SYSTEM = PLAIN.replace("<{{ 'bot'", "{% if m.role != 'system' %}<{{ 'bot'").replace(
    "<eos> {% endfor %}", "<eos> {% endif %}{% endfor %}"
)
TEXT = "write about the sea and the moon"


def ids(text):
    return [tiny.VOCABULARY.index(word) for word in text.split()]


def made(template=PLAIN, family="llama", **options):
    tokenizer = tiny.tokenizer(family)
    tokenizer.chat_template = template
    return PPlugProcessor(tokenizer, family in ("t5", "bart"), chat=True, **options)


def read(processor, text=TEXT, **options):
    return processor([text], **options)["input_ids"][0].tolist()


@pytest.mark.parametrize("template, bos", [(PLAIN, 0), (WRITES_BOS, 1)])
def test_a_text_is_a_users_turn(template, bos):
    processor = made(template)
    row = read(processor)
    assert row == [tiny.BOS] * bos + ids(f"<user> {TEXT} <eos> <bot>")  # BOS as often as the template writes it
    chat = [{"role": "user", "content": TEXT}]
    assert row == processor.apply_chat_template(chat, add_generation_prompt=True)["input_ids"][0].tolist()


@pytest.mark.parametrize("placement, position", [("prompt", 1), ("answer", 8)])
def test_the_persona_stands_within_the_users_turn(placement, position):
    processor = made(placement=placement)
    assert processor([TEXT])["persona_position"].tolist() == [position]
    past = [{"role": "user", "content": "moon"}, {"role": "assistant", "content": "cold"}]
    talk = [*past, {"role": "user", "content": TEXT}]
    assert processor.apply_chat_template(talk, add_generation_prompt=True)["persona_position"].tolist() == [
        6 + position
    ]


def test_white_space_at_the_ends_of_a_text_changes_no_place():
    for template in (PLAIN, PLAIN.replace("m.content", "m.content | trim")):
        for placement, position in (("prompt", 1), ("answer", 8)):
            processor, text = made(template, placement=placement), f"  {TEXT} \n"
            assert processor([text])["persona_position"].tolist() == [position]
            nothing_found = [RetrievalPrompt(text, 0, 0)]
            assert persona_positions(processor, nothing_found).tolist() == [position]


def test_a_batch_to_train_on():
    processor = made(placement="answer")
    batch = processor(["the sea", TEXT], persona=[tiny.HISTORY] * 2, labels=["moon", "the sea is cold"])
    assert [row[row != -100].tolist() for row in batch["labels"]] == [ids("moon <eos>"), ids("the sea is cold <eos>")]
    assert batch["query"] == ["the sea", TEXT]  # the text alone weights the history
    assert batch["input_ids"][1].tolist() == ids(f"<user> {TEXT} <eos> <bot> the sea is cold <eos>")
    cut = processor([TEXT], labels=["the sea is cold"], max_target_length=3)
    assert cut["labels"][0].tolist()[-3:] == ids("the sea <eos>")  # the end stays
    assert processor.answer_ids(["moon"]) == [ids("moon <eos>")]


def texts_that_weight(monkeypatch, call, **batch):
    """Return what a call of a model asks its query encoder."""
    asked, embed = [], encoders.embed

    def spy(encoder, texts, prompt, **options):
        asked.extend(texts if options.get("task") == "query" else ())
        return embed(encoder, texts, prompt, **options)

    with monkeypatch.context() as patch:
        patch.setattr(encoders, "embed", spy)
        call(**batch)
    return asked


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_persona_that_comes_with_the_call_is_weighted_by_the_users_text(family, monkeypatch):
    model = tiny.model(family, train_input_encoder=False)
    processor = made(family=family, system="good night")
    texts, personas = ["the sea", TEXT], [tiny.HISTORY] * 2
    past = [{"role": "user", "content": "moon"}, {"role": "assistant", "content": "cold"}]
    talks = [[*past, {"role": "user", "content": text}] for text in texts]
    batches = [processor(texts), processor.apply_chat_template(talks, add_generation_prompt=True)]
    lesson, generate = processor(texts, labels=["moon", "cold"]), partial(model.generate, max_new_tokens=1)
    for given, batch in ((model, lesson), *((generate, batch) for batch in batches)):
        assert texts_that_weight(monkeypatch, given, **batch, persona=personas) == texts
        assert texts_that_weight(monkeypatch, given, **batch, persona=personas, query=["rain", "snow"]) == [
            "rain",
            "snow",
        ]
        assert texts_that_weight(monkeypatch, given, **batch) == []  # nobody
    cut = processor([TEXT], max_length=10)
    assert texts_that_weight(monkeypatch, generate, **cut, persona=tiny.HISTORY) == ["write about moon"]


def test_a_persona_that_is_nobody_needs_no_text():
    assert "query_mask" not in made()([TEXT], persona=None) and "query_mask" not in made()([TEXT], query=TEXT)
    assert "query_mask" not in PPlugProcessor(tiny.tokenizer("llama"))([TEXT])


def test_what_is_too_long_loses_the_middle_of_its_text(caplog, monkeypatch):
    logging.Logger.warning_once.cache_clear()
    for name in ("transformers", "pplug_hf"):
        monkeypatch.setattr(transformers_logging.get_logger(name), "propagate", True)
    for placement, position in (("prompt", 1), ("answer", 5)):
        processor = made(placement=placement, system="good")
        batch = processor([TEXT], max_length=7 + 3)
        assert batch["input_ids"][0].tolist() == ids("<system> good <eos> <user> write about the moon <eos> <bot>")
        assert batch["persona_position"].tolist() == [3 + position]
    assert [r.getMessage() for r in caplog.records if "middle" in r.getMessage()] == [
        "A prompt is longer than max_length=10 tokens and loses the middle of its text: raise max_length, or shorten the "
        "prompts."
    ]
    with pytest.raises(DataError, match=r"needs 6 tokens around the user's text.*max_length=6: raise max_length"):
        processor([TEXT], max_length=6)


@pytest.mark.parametrize("border", ["bot: ", "bot:", "bot:\n"])
def test_the_prompt_of_a_lesson_is_that_of_an_answer(border):
    """A token of this vocabulary may begin in the template and end in the answer."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.train_from_iterator(["bot: the sea\n\n the moon"] * 3, trainers.BpeTrainer(special_tokens=["<eos>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}user: {{ m.content }}\n{% else %}BORDER{{ m.content }}"
        "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}BORDER{% endif %}"
    ).replace("BORDER", border)
    processor = PPlugProcessor(tokenizer, chat=True)
    for answer in ("the sea", " the moon", "\n the"):
        lesson, prompt = processor(["the moon"], labels=[answer]), processor(["the moon"])
        learnt = lesson["labels"][0] != -100
        assert lesson["input_ids"][0][~learnt].tolist() == prompt["input_ids"][0].tolist()
        assert tokenizer.decode(lesson["input_ids"][0][learnt]) == answer + "<eos>"
        assert lesson["persona_position"].tolist() == prompt["persona_position"].tolist()


@pytest.mark.parametrize(
    "template, expected",
    [
        (PLAIN, "<system> cold <eos> <user> the sea <eos> <bot>"),
        (DEFAULT_SYSTEM, "<system> cold <eos> <user> the sea <eos> <bot>"),
        (WITHOUT_SYSTEM, "<user> cold the sea <eos> <bot>"),
        (IGNORES_SYSTEM, "<user> cold the sea <eos> <bot>"),
    ],
    ids=["plain", "default", "raises", "ignores"],
)
def test_a_system_text_arrives_in_every_template(template, expected):
    assert read(made(template, system="cold"), "the sea") == ids(expected)


def test_a_system_text_arrives_although_the_user_says_the_same():
    chat = "<user> cold the sea is cold <eos> <bot>"
    assert read(made(IGNORES_SYSTEM, system="cold"), "the sea is cold") == ids(chat)


@pytest.mark.parametrize("system", [None, "", "cold"])
@pytest.mark.parametrize("template", [PLAIN, DEFAULT_SYSTEM, WITHOUT_SYSTEM, IGNORES_SYSTEM])
def test_a_served_chat_begins_as_a_text_does(template, system):
    processor, config = made(template, system=system, placement="answer"), tiny.backbone("llama").config
    chat = [{"role": "user", "content": "the sea"}]
    served, text = prompt_row(processor, config, chat), prompt_row(processor, config, "the sea")
    assert (served.ids, served.position) == (text.ids, text.position)


PARTS = PLAIN.replace(
    "m.content", "m.content if m.content is string else m.content | map(attribute='text') | join('-')"
)


@pytest.mark.parametrize(
    "template, between",
    [
        *[(template, "") for template in (PLAIN, DEFAULT_SYSTEM, WITHOUT_SYSTEM, IGNORES_SYSTEM)],
        (PLAIN.replace("{{ m.content }}", "{{ 'say ' + m.content }}"), ""),
        (PARTS, "-"),
    ],
    ids=["plain", "default", "raises", "ignores", "adds", "reads parts"],
)
def test_text_parts_arrive_in_every_template(template, between):
    """A template that reads texts alone gets them joined; one that reads parts joins them itself."""

    def talk(write):
        return [
            {"role": "user", "content": write("the ", "sea")},
            {"role": "assistant", "content": write("is ", "cold")},
            {"role": "user", "content": write("and the ", "moon")},
        ]

    texts = talk(lambda a, b: a + between + b)
    parts = talk(lambda a, b: [{"type": "text", "text": text} for text in (a, b)])
    processor, config = made(template, system="cold", placement="answer"), tiny.backbone("llama").config
    assert prompt_row(processor, config, parts) == prompt_row(processor, config, texts)
    a, b = (processor.apply_chat_template(chat[:2], labels=True) for chat in (parts, texts))
    assert all(a[name].equal(b[name]) for name in ("input_ids", "labels", "persona_position"))


def test_a_served_chat_keeps_a_system_text_of_its_own():
    processor, config = made(system="cold"), tiny.backbone("llama").config
    chat = [{"role": "system", "content": "warm"}, {"role": "user", "content": "the sea"}]
    assert prompt_row(processor, config, chat).ids == ids("<system> warm <eos> <user> the sea <eos> <bot>")
    with pytest.raises(DataError, match="a list that is empty"):
        prompt_row(processor, config, [])


def test_without_a_system_text_the_templates_own_stays():
    assert read(made(DEFAULT_SYSTEM), "the sea") == ids("<system> good <eos> <user> the sea <eos> <bot>")


def test_a_template_that_refuses_says_so():
    processor = made("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"refuses the chat of the roles user \(roles must alternate\).*chat='never'"):
        processor([TEXT])


def test_an_encoder_decoder_model_chats():
    batch = made(family="t5")(["the sea"], labels=["moon"])
    assert batch["input_ids"].tolist() == [ids("<user> the sea <eos> <bot>")]
    assert batch["labels"].tolist() == [ids("moon <eos>")]


def test_earlier_turns():
    row = read(made(system="good"), "the sea", turns=[[("moon", "cold"), ("sun", "warm")]])
    assert row == ids(
        "<system> good <eos> <user> moon <eos> <bot> cold <eos> <user> sun <eos> <bot> warm <eos> <user> the sea <eos> <bot>"
    )
    with pytest.raises(MismatchError, match="Got 1 of turns for 2 prompts"):
        made()(["a", "b"], turns=[[]])
    with pytest.raises(ConfigurationError, match="this processor writes none"):
        PPlugProcessor(tiny.tokenizer("llama"))(["a"], turns=[[("moon", "cold")]])


@pytest.mark.parametrize("chat, expected", [("auto", True), ("always", True), ("never", False)])
def test_the_form_is_kept_with_the_plug(chat, expected, tmp_path):
    tokenizer = tiny.tokenizer("llama")
    tokenizer.chat_template = PLAIN
    backbone, encoder = tiny.backbone("llama"), tiny.shared_encoder()
    model = tiny.from_backbone(backbone, encoder, tokenizer=tokenizer, chat=chat, system="good", placement="answer")
    assert model.config.chat is expected
    model.save_pretrained(tmp_path)
    loaded = PPlugModel.from_pretrained(tmp_path, backbone=backbone, encoder=encoder)
    for processor in (PPlugProcessor.from_model(loaded), PPlugProcessor.from_pretrained(tmp_path)):
        assert (processor.chat, processor.system, processor.placement) == (expected, "good", "answer")
        assert (ids("<bot>")[0] in read(processor)) is expected


def test_what_cannot_chat():
    with pytest.raises(ConfigurationError, match=r"no chat template.*chat='auto'"):
        tiny.model("llama", chat="always")
    with pytest.raises(ConfigurationError, match="chat must be one of auto, always, never, got 'perhaps'"):
        tiny.model("llama", chat="perhaps")
    assert tiny.model("llama").config.chat is False


def test_raw_text_for_a_chat_model_is_said_once(caplog, monkeypatch):
    logging.Logger.warning_once.cache_clear()
    for name in ("transformers", "pplug_hf"):
        monkeypatch.setattr(transformers_logging.get_logger(name), "propagate", True)
    processor = made()
    processor.chat = False
    processor(["the sea"]), processor(["the moon"])
    assert (
        len([r for r in caplog.records if "has a chat template and is given texts without it" in r.getMessage()]) == 1
    )


def test_a_turn_ends_where_the_model_stops():
    template = ChatTemplate(made(PLAIN.replace("<eos> {% endfor %}", "<eos>\n{% endfor %}")).tokenizer)
    chat = [{"role": "user", "content": "sea"}, {"role": "assistant", "content": "moon"}]
    assert template.lesson(chat).text.endswith("moon <eos>")


# ---- the commands --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat_backbone(places, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "llama"
    tokenizer = tiny.tokenizer("llama")
    tokenizer.chat_template = PLAIN
    tiny.backbone("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("chat", ["auto", "never"])
def test_every_command_asks_as_training_did(chat, chat_backbone, places, tmp_path, monkeypatch):
    data = bench_data.write_data(tmp_path / "data", bench_data.SHELVES, users=4)
    task = bench_data.SHELVES
    settings = TrainSettings(
        data=str(data),
        output=str(tmp_path / "plug"),
        backbone=str(chat_backbone),
        encoder=str(places / "encoder"),
        chat=chat,
        system="good",
        epochs=1,
        batch_size=4,
        vectors=str(tmp_path / "vectors"),
    )
    train(settings, task, placement="answer", num_persona_tokens=2)
    rows = ["no-persona", "bm25@2", "pplug", "pplug+bm25@1", *(["bm25@2:turns"] if chat == "auto" else [])]
    seen = {}
    own = PPlugProcessor.rows

    def rows_of(self, prompts, *args, **kwargs):
        made_rows = own(self, prompts, *args, **kwargs)
        seen.setdefault(self.placement, []).extend(self.tokenizer.decode(row.ids) for row in made_rows)
        return made_rows

    monkeypatch.setattr(PPlugProcessor, "rows", rows_of)
    options = {
        "data": str(data),
        "plugs": [f"pplug={tmp_path / 'plug'}"],
        "output": str(tmp_path / "bench"),
        "chat": chat,
    }
    result, _ = bench_data.quietly(
        BenchSettings(**options, rows=rows, vectors=settings.vectors, constrained=True), task=task
    )
    assert [row["row"] for row in result.rows()] == rows
    for texts in seen.values():  # the bare language model's rows and the plug's
        assert all(
            text.startswith("<system> good <eos> <user>") == (chat == "auto") for text in texts if "book:" in text
        )
    if chat == "auto":
        assert any(text.count("<user>") == 3 for text in seen["prompt"])  # two items as turns, then the question
    asked = GenerateSettings(
        plug=str(tmp_path / "plug"), prompt="what is best for the book: the sea", max_new_tokens=3
    )
    seen.clear()
    generate(asked)
    assert all(("<bot>" in text) == (chat == "auto") for text in seen["answer"])


@pytest.mark.parametrize("template", [PLAIN, DEFAULT_SYSTEM])
@pytest.mark.parametrize("length", [40, 60])
def test_a_prompt_with_retrieved_items_fits_into_the_template(chat_backbone, length, template):
    """Nothing of it is cut by the processor."""
    task, rng = bench_data.SHELVES, random.Random(0)
    history = [{"id": str(i), "tag": "sea", "text": bench_data.words(rng, 60), "date": ""} for i in range(2)]
    asked = [Example("1", "u", "what is best for the book: moon", "moon", "sea", history)]
    resources = Resources(task, backbone=str(chat_backbone), decoding=Decoding(max_length=length), system=None)
    resources.processor.tokenizer.chat_template = resources.processor.chat_template = template
    for k in (1, 2):  # one item, as the rewards of a retriever are asked for
        inputs = Retrieval("recency", k).inputs(asked, resources)
        assert inputs.counts["shown_items"] == k
        (row,) = resources.processor.rows(inputs.prompts, max_length=length)
        words = resources.processor.tokenizer(inputs.prompts[0], add_special_tokens=False)["input_ids"]
        assert words == row.ids[row.ids.index(ids("<user>")[0]) + 1 : -2]


def test_what_a_selector_learned_from_has_the_system_text_of_the_first_plug(chat_backbone, tmp_path):
    tokenizer = tiny.tokenizer("llama")
    tokenizer.chat_template = PLAIN
    model = tiny.from_backbone(tiny.backbone("llama"), tiny.shared_encoder(), tokenizer=tokenizer, system="good")
    model.save_pretrained(tmp_path)
    given = {"plugs": {"pplug": [str(tmp_path)]}, "backbone": str(chat_backbone)}
    for system, used in ((None, "good"), ("cold", "cold")):
        resources = Resources(bench_data.SHELVES, **given, system=system)
        assert resources.asking["chat"] == [PLAIN, used] == [PLAIN, resources.processor.system]
    assert Resources(bench_data.SHELVES, backbone=str(chat_backbone)).asking["chat"] == [PLAIN, None]


def test_a_selector_reads_earlier_turns(chat_backbone, places):
    examples = [Example("1", "u", "the book: moon", "moon", "sea", [{"tag": "sea", "text": "the sun"}])]
    resources = Resources(bench_data.SHELVES, backbone=str(chat_backbone), system=None)
    model = SelectionModel.from_encoder(tiny.encoder(), TextForm(), 2)
    rows = {"no-persona": Plain(), "recency@1:turns": Retrieval("recency", 1, turns=True)}
    ((plain, turns),) = texts_of(model, rows, examples, resources)
    assert "the sun" in turns and "the sun" not in plain
