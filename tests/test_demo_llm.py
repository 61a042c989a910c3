"""`make demo-llm`: the synthetic users and the judges of their style, and the program on a tiny random chat model."""

import importlib.util
import os
import re
import subprocess
import sys
from itertools import combinations, product
from pathlib import Path

import pytest
import tiny

from pplug_hf.tasks.metrics import METRICS

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "writing_styles"
CHAT = (
    "{% for m in messages %}<user> {{ m.content }} <eos> {% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
)


@pytest.fixture(scope="module")
def styles():
    """The module with the users and the judges."""
    spec = importlib.util.spec_from_file_location("styles", FOLDER / "styles.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["styles"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["styles"]


# ---- users ------------------------------------------------------------------------------------------------------


def test_a_headline_is_judged_to_have_the_style_it_was_written_in(styles):
    for style in styles.STYLES:
        for _, topics, places in styles.SPLITS.values():
            for topic, place in product(topics, places):
                headline = styles.Event(topic, place, 240, "Monday").headline(style)
                assert styles.style_of(headline) == style, headline


def test_held_out_users_have_new_topics_and_places_and_half_of_them_a_new_combination(styles):
    train, validation, test = (styles.SPLITS[name] for name in ("train", "validation", "test"))
    new = {name: {*found} for name, found in styles.NEW_STYLES.items()}
    assert {*train.styles} | new["validation"] | new["test"] == {*styles.STYLES} and len(train.styles) == 30
    assert not new["validation"] & new["test"]
    for name, other in (("validation", validation), ("test", test)):
        assert not {*train.topics} & {*other.topics} and not {*train.places} & {*other.places}
        assert len(new[name]) == 3 and not new[name] & {*train.styles}
        assert [style in new[name] for style in other.styles].count(True) * 2 == len(other.styles) == 12
        assert {*styles.FORMS} == {style.form for style in other.styles}
        assert {*styles.CASES} | {*styles.ENDS} == {part for style in new[name] for part in style[1:]}
    for i, j in combinations(range(3), 2):
        assert {(s[i], s[j]) for s in train.styles} == {(s[i], s[j]) for s in styles.STYLES}


def test_only_the_history_shows_the_style(styles):
    examples = styles.make_examples("train", 8, 10)
    users = {e.user: e for e in examples}
    assert len(users) == 30 * 8 and len(examples) == 30 * 80 and len({e.id for e in examples}) == len(examples)
    styles_of = {user: {styles.style_of(item["headline"]) for item in e.history} for user, e in users.items()}
    assert {len(found) for found in styles_of.values()} == {0, 1}  # one style each; some have no history
    assert all(not found or {styles.style_of(e.target)} == found for e in examples for found in [styles_of[e.user]])
    asked = {}
    for e in examples:
        asked.setdefault(e.prompt, set()).add(styles.style_of(e.target))
        assert e.target not in [item["headline"] for item in e.history]
    assert len(asked) <= 300 and sum(map(len, asked.values())) > 3 * len(asked)  # a note does not tell who asks
    assert all(3 <= len(e.history) <= 10 for e in styles.make_examples("test", 4, 1))


def test_the_users_follow_from_the_seed(styles):
    assert styles.make_examples("test", 2, 2, seed=1) == styles.make_examples("test", 2, 2, seed=1)
    assert styles.make_examples("test", 2, 2, seed=1) != styles.make_examples("test", 2, 2, seed=2)


# ---- judges -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The Bakery Sells 240 Loaves", ("statement", "title", "plain")),
        ("The bakery in Oakford has been selling bread for many years", ("statement", "sentence", "plain")),
        ("240 loaves 🥖🥖", ("number first", "lower", "emoji")),
        ("WHY 240 LOAVES?!!!", ("question", "capitals", "exclamation")),
        ("Rye loaves in Oakford ☂️", ("terse", "sentence", "emoji")),
        ("", ("other", "sentence", "plain")),
        ("loaves in oakford\nand more", ("other", "lower", "plain")),
        ("bread " * 20, ("other", "lower", "plain")),
    ],
)
def test_any_text_is_judged(styles, text, expected):
    assert styles.style_of(text) == expected


def test_the_metric_gives_the_share_in_style_and_that_of_each_part(styles):
    metric = styles.WritingStyle()
    golds = ["Rye loaves in Oakford", "Rye Loaves in Oakford!!!"]
    answers = ["Red apples in Granby", "red apples in granby!!!"]
    assert metric.per_example(answers, golds, None).tolist() == [1, 0]
    expected = {"style": 0.5, "form": 1, "case": 0.5, "end": 1, "unparsed": 0}
    assert metric.score(answers, golds, None) == expected
    assert metric.name not in METRICS  # the program registers it


# ---- the program ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "backbone"
    tiny.backbone("llama").save_pretrained(folder)
    tokenizer = tiny.tokenizer("llama")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


def test_the_program_runs_from_the_backbone_to_the_reloaded_plug(backbone, tmp_path):
    command = [
        sys.executable,
        str(FOLDER / "demo_llm.py"),
        "--backbone",
        str(backbone),
        "--steps",
        "2",
        "--users",
        "1",
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    for row in ("bare model", "PPlug, no history", "PPlug, another user's history", "PPlug"):
        assert re.search(rf"^\| {row} \| \d\.\d{{3}} \|[^|]*\|( \d+\.\d{{3}} \|){{5}}$", done.stdout, re.MULTILINE), (
            done.stdout
        )
    assert done.stdout.count("\nOn ") == 3  # three notes, each answered by the bare model and for four users
    assert len(re.findall(r"^  test-\d+ ", done.stdout, re.MULTILINE)) == 12
    assert done.stdout.count("\n  bare model") == 3
    assert "it answers the same" in done.stdout
    output = tmp_path / "demo-llm-output"
    assert (output / "styles.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "table.md").read_text(encoding="utf-8") in done.stdout
    assert (output / "plug" / "model.safetensors").is_file()


def test_make_runs_it():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"^demo-llm: setup\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    for script in re.findall(r"\S+\.py", recipe):
        assert (ROOT / script).is_file()
    assert "demo-llm-output" in (ROOT / ".gitignore").read_text(encoding="utf-8")
