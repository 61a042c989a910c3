"""Pairs for human judges: blind, in an order that a seed decides, readable by their owner alone, without gold answers."""

import json
import stat
from dataclasses import replace

import pytest
from bench_data import SECRET, SHELVES, make_world, plugs_of, predictions, quietly

from pplug_hf.commands.options import PairsSettings
from pplug_hf.commands.pairs import pairs
from pplug_hf.data.examples import read_examples
from pplug_hf.data.records import Example
from pplug_hf.errors import ConfigurationError, MissingFileError
from pplug_hf.evaluation.pairs import write_pairs


def example(name):
    return Example(name, f"user of {name}", f"prompt {name}", name, None, [{"id": "1", "text": SECRET}])


EXAMPLES = [example(f"q{number}") for number in range(40)]
ANSWERS = {"mine": {e.id: f"own {e.id}" for e in EXAMPLES}, "bare": {e.id: f"plain {e.id}" for e in EXAMPLES}}


def read(folder):
    lines = (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    return list(map(json.loads, lines)), json.loads((folder / "key.json").read_text())


def test_the_key_alone_says_who_answered_what(tmp_path):
    assert write_pairs(tmp_path, EXAMPLES, ANSWERS) == (40, 0)
    written, key = read(tmp_path)
    for pair in written:
        assert pair.keys() == {"pair", "prompt", "left", "right"}
        of = key["pairs"][str(pair["pair"])]
        assert (pair["left"], pair["right"]) == tuple(ANSWERS[of[side]][of["id"]] for side in ("left", "right"))
        assert pair["prompt"] == f"prompt {of['id']}" and {of["left"], of["right"]} == {"mine", "bare"}
    assert 8 < sum(of["left"] == "mine" for of in key["pairs"].values()) < 32
    text = (tmp_path / "pairs.jsonl").read_text()
    assert SECRET not in text and "user of" not in text and "mine" not in text
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}


def test_a_seed_decides_order_and_sides_whatever_the_order_of_the_questions(tmp_path):
    for name, examples, seed in (("a", EXAMPLES, 0), ("b", EXAMPLES[::-1], 0), ("c", EXAMPLES, 1)):
        write_pairs(tmp_path / name, examples, ANSWERS, seed)
    a, b, c = (read(tmp_path / name) for name in "abc")
    assert a == b and a[0] != c[0]
    assert [of["id"] for of in a[1]["pairs"].values()] != [e.id for e in EXAMPLES]


def test_equal_answers_are_not_asked_about(tmp_path):
    answers = {"mine": ANSWERS["mine"], "bare": ANSWERS["bare"] | {"q3": "own q3"}}
    assert write_pairs(tmp_path, EXAMPLES, answers) == (39, 1)
    written, key = read(tmp_path)
    assert key["equal"] == ["q3"] and [pair["pair"] for pair in written] == list(range(1, 40))


@pytest.fixture(scope="module")
def world(places, tmp_path_factory):
    return make_world(places, tmp_path_factory.mktemp("pairs"))


def test_two_rows_answer_questions_without_golds(world, tmp_path):
    _, examples = read_examples(world / "shelves", "dev", SHELVES)
    rows = [
        {"id": e.id, "user": e.user, "input": e.prompt, "output": None, "profile": e.history}
        for e in (replace(e, target=None) for e in examples)
    ]
    given = {
        "data": "unused",
        "plugs": plugs_of(world)[:1],
        "vectors": str(world / "vectors"),
        "output": str(tmp_path),
    }
    settings = PairsSettings(rows=["no-persona", "pplug"], **given)
    _, printed = quietly(settings, pairs, task=SHELVES, data={"dev": rows})
    written, key = read(tmp_path)
    made = predictions(tmp_path)
    assert made.keys() == {"no-persona.json", "pplug,0.json", "pplug,1.json"}
    answers = {g["id"]: g["output"] for g in made["pplug,0.json"]["golds"]}
    assert len(written) + len(key["equal"]) == len(rows) and written
    for pair in written:
        of = key["pairs"][str(pair["pair"])]
        side = "left" if of["left"] == "pplug" else "right"
        assert pair[side] == answers[of["id"]]
    assert f"{len(written)} pairs for the judges in pairs.jsonl" in printed
    assert "are there already" in quietly(settings, pairs, task=SHELVES, data={"dev": rows})[1]
    with pytest.raises(ConfigurationError, match="A pair is of two different rows, got pplug pplug: name two"):
        pairs(replace(settings, rows=["pplug", "pplug"]), task=SHELVES, data={"dev": rows})
    with pytest.raises(ConfigurationError, match="two different rows, got pplug pplug:strength-1: name two"):
        pairs(replace(settings, rows=["pplug", "pplug:strength-1"]), task=SHELVES, data={"dev": rows})
    with pytest.raises(MissingFileError, match="no/where"):
        pairs(replace(settings, trained=["mine=no/where"], rows=["pplug", "mine"]), task=SHELVES, data={"dev": rows})
