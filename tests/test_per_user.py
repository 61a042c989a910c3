"""Differences where each user counts once: against their definitions, and in the files of a bench."""

import hashlib
import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
from bench_data import SHELVES, USERS, make_rows, make_world, predictions, quietly, settings_for

from pplug_hf.data.records import Example
from pplug_hf.evaluation.compare import Comparison
from pplug_hf.evaluation.user_statistics import pairs, per_user, sign_flip, sign_test
from pplug_hf.tasks.task import TASKS


def comparison(users, reference, row, golds=None, **more):
    """Right and wrong answers of two rows to one question for each entry of `users`."""
    golds = golds or ["sea"] * len(users)
    examples = [
        Example(f"{i}", user, "", "", gold, []) for i, (user, gold) in enumerate(zip(users, golds, strict=True))
    ]
    answers = {"ours": [["sea" if right else "moon" for right in reference]]}
    answers["theirs"] = [["sea" if right else "moon" for right in row]]
    return Comparison(TASKS["demo"], examples, "ours", answers, full=True, **more)


def test_a_user_with_many_questions_counts_once():
    """One question that the reference alone answers, by a user who asks nothing else; nine of another, all right."""
    made = comparison(["few", *["many"] * 9], [1] * 10, [0, *[1] * 9])
    pooled = next(record for record in made.rows() if record["row"] == "theirs")["gain"][0]
    (record,) = made.per_user()
    assert pooled == pytest.approx(0.1) and record["gain"][0] == pytest.approx(0.5)
    assert record["gain"][1:] == [0, 1]


def test_the_sign_test_is_a_binomial_table():
    table = {  # two-sided, from Pascal's triangle
        (0, 5): 2 * Fraction(1, 32),
        (1, 7): 2 * Fraction(1 + 8, 256),
        (2, 8): 2 * Fraction(1 + 10 + 45, 1024),
        (4, 4): Fraction(1),
        (0, 0): Fraction(1),
        (1, 0): Fraction(1),
    }
    for (losses, wins), expected in table.items():
        values = [0.5] * wins + [-2.0] * losses + [0.0, 1e-12, -1e-12]  # ties, and what rounding leaves of ties
        assert sign_test(values) == pytest.approx(float(expected)), (losses, wins)
        assert sign_test([-v for v in values]) == sign_test(values)
    values = [1.0] * 700 + [-1.0] * 600
    assert sign_test(values) == 2 * sum(math.comb(1300, k) for k in range(601)) / 2**1300


def test_all_flips_are_counted_for_few_users():
    values = np.random.default_rng(1).normal(0.3, 1, 9)
    flips = [abs(np.dot(signs, values)) for signs in itertools.product((-1, 1), repeat=9)]
    expected = np.mean([flip >= abs(values.sum()) - 1e-12 for flip in flips])
    assert sign_flip(values, range(9)) == expected == sign_flip(values, range(9), n_flips=1, seed=5)
    assert sign_flip([1.0] * 20, range(20)) == 2 / 2**20
    assert sign_flip([0.1, 0.2, 0.3, -0.6], range(4)) == 1.0, "a mean of zero, whatever rounding says"


def test_differences_of_five_users_by_numpy():
    users = ["a", "a", "b", "c", "d", "d", "d", "e"]
    better = np.array([1.0, 0.0, 1.0, 0.5, 0.0, 0.0, -1.0, 0.0])
    means = np.array([0.5, 1.0, 0.5, -1 / 3, 0.0])
    (record,) = per_user({"row": better}, users)
    assert record["gain"][0] == pytest.approx(means.mean())
    assert record["detectable"] == pytest.approx(2.8 * means.std(ddof=1) / math.sqrt(5))
    drawn = np.random.default_rng(0).integers(5, size=(200_000, 5))
    low, high = np.percentile(means[drawn].mean(axis=1), [2.5, 97.5])
    assert record["gain"][1:] == pytest.approx([low, high], abs=0.02)
    assert record["sign_test"] == 2 * (1 + 4) / 16  # three better, one worse, one equal
    flips = [abs(np.dot(signs, means)) for signs in itertools.product((-1, 1), repeat=5)]
    assert record["p"] == record["p_holm"] == np.mean([flip >= abs(means.sum()) - 1e-12 for flip in flips])


def test_holm_is_over_the_rows_of_the_table():
    users = [f"u{i}" for i in range(8)]
    rows = {"none": np.zeros(8), "all": np.ones(8), "most": np.array([1.0] * 7 + [-0.5])}
    found = {record["row"]: record for record in per_user(rows, users)}
    assert [found[row]["p"] for row in rows] == [1.0, 2 / 256, 4 / 256]
    assert [found[row]["p_holm"] for row in rows] == [1.0, 3 * 2 / 256, 2 * 4 / 256]


def test_equal_answers_differ_in_nothing():
    made = comparison([f"u{i // 2}" for i in range(8)], [1, 0] * 4, [1, 0] * 4)
    (record,) = made.per_user()
    assert record["gain"] == [0, 0, 0] and record["detectable"] == 0
    assert record["sign_test"] == record["p"] == record["p_holm"] == 1
    (record,) = comparison(["one"] * 3, [1, 1, 1], [0, 0, 0]).per_user()
    assert record == {
        "row": "theirs",
        "gain": [1, None, None],
        "sign_test": 1,
        "p": 1,
        "p_holm": 1,
        "detectable": None,
    }


def test_less_error_is_better():
    examples = [Example(f"{i}", f"u{i}", "", "", "3", []) for i in range(3)]
    made = Comparison(TASKS["LaMP-3"], examples, "ours", {"ours": [["3"] * 3], "theirs": [["4", "5", "3"]]}, full=True)
    (record,) = made.per_user()
    assert record["gain"][0] == pytest.approx(1.0)


def test_new_users_are_told_apart_from_those_of_the_train_split():
    made = comparison(["a", "a", "b", "c"], [1, 1, 0, 0], [0, 1, 0, 1], trained_users={"a", "x"})
    seen, new = made.results()["per_user"]["groups"]
    assert seen == {"seen": True, "examples": 2, "users": 1, "rows": {"ours": 1, "theirs": 0.5}}
    assert new == {"seen": False, "examples": 2, "users": 2, "rows": {"ours": 0, "theirs": 0.5}}
    assert comparison(["a"], [1], [0], trained_users={"a"}).by_training() == []
    assert comparison(["a"], [1], [0]).by_training() == []


def test_pairs_have_no_names():
    found = pairs({"one": np.array([1.0, 0.0, 1.0]), "two": np.array([0.0, 0.5, 1.0])}, ["ann", "ann", "bob"], 7)
    ann, bob = (hashlib.sha256(f"7{user}".encode()).hexdigest()[:12] for user in ("ann", "bob"))
    assert found == {
        ann: {"questions": 2, "rows": {"one": 0.5, "two": 0.25}},
        bob: {"questions": 1, "rows": {"one": 1.0, "two": 1.0}},
    }


# ---- a bench --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(places, tmp_path_factory):
    return make_world(places, tmp_path_factory.mktemp("per-user"))


def test_a_bench_reports_users_and_keeps_pairs_on_request(world, tmp_path):
    asked = settings_for(world, tmp_path, "no-persona", "bm25@4", "pplug")
    _, printed = quietly(asked, task=SHELVES)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [record["row"] for record in results["per_user"]["rows"]] == ["no-persona", "bm25@4"]
    assert not (tmp_path / "pairs.json").exists()
    table = (tmp_path / "table.md").read_text()
    assert "pplug is better by [95 %]" in table and "p (Holm)" in table
    assert f"cannot be seen with {USERS} users" in table
    # Everybody is in both splits of these data, so there are no groups.
    assert results["per_user"]["groups"] == [] and "train split" not in table

    asked = settings_for(world, tmp_path, plugs=None, tables_only=True, pairs=True, seed=3)
    _, printed = quietly(asked, task=SHELVES)
    text = (tmp_path / "pairs.json").read_text()
    assert (tmp_path / "pairs.json").stat().st_mode & 0o777 == 0o600
    found = json.loads(text)
    assert len(found) == USERS and "Private" in printed and not any(f"u{i}" in text for i in range(USERS))
    golds = {g["id"]: g["output"] for g in json.loads((world / "shelves" / "dev_outputs.json").read_text())["golds"]}
    given = {gold["id"]: gold["output"] for gold in predictions(tmp_path)["no-persona.json"]["golds"]}
    own = [given[id_] == golds[id_] for id_ in ("230", "231")]  # of user 3
    assert found[hashlib.sha256(b"3u3").hexdigest()[:12]]["rows"]["no-persona"] == np.mean(own)


def test_users_without_a_name_are_new_whatever_their_ids(world, tmp_path):
    data = {}
    for split, count in (("train", 4), ("dev", 6)):
        questions, golds = make_rows(SHELVES, 1)
        pairs = zip(questions[:count], golds[:count], strict=True)
        data[split] = [{**question, **gold, "id": str(n)} for n, (question, gold) in enumerate(pairs)]
    for row in (*data["train"], *data["dev"]):
        del row["user_id"]
    asked = settings_for(world, tmp_path, "no-persona", "pplug", data="mine")
    made, _ = quietly(asked, task=SHELVES, data=data)
    assert made.by_training() == [] and not made.trained_users
    made.trained_users = {"0"}  # the name of somebody in the train split
    assert made.by_training() == []


def test_groups_are_found_in_the_train_split(world, tmp_path):
    questions = json.loads((world / "shelves" / "train_questions.json").read_text())
    golds = json.loads((world / "shelves" / "train_outputs.json").read_text())
    few = [question for question in questions if question["user_id"] in ("u1", "u2")]
    kept = {question["id"] for question in few}
    data = tmp_path / "data"
    data.mkdir()
    for name in ("dev_questions.json", "dev_outputs.json"):
        (data / name).write_text((world / "shelves" / name).read_text())
    (data / "train_questions.json").write_text(json.dumps(few))
    golds["golds"] = [gold for gold in golds["golds"] if gold["id"] in kept]
    (data / "train_outputs.json").write_text(json.dumps(golds))
    asked = settings_for(world, tmp_path / "bench", "no-persona", "pplug", data=str(data))
    quietly(asked, task=SHELVES)
    seen, new = json.loads((tmp_path / "bench" / "results.json").read_text())["per_user"]["groups"]
    assert (seen["seen"], seen["users"], seen["examples"]) == (True, 2, 4)
    assert (new["seen"], new["users"], new["examples"]) == (False, USERS - 2, 2 * USERS - 4)
    table = (tmp_path / "bench" / "table.md").read_text()
    assert f"users of the train split (2; 4) | new users ({USERS - 2}; {2 * USERS - 4})" in table
    (data / "train_outputs.json").write_text("{")
    quietly(asked, task=SHELVES)
    results = json.loads((tmp_path / "bench" / "results.json").read_text())
    assert results["per_user"]["groups"] == [], "the table is made all the same"
