"""Made-up users: whose labels they have, whose items, and what they must never show."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pplug_hf.data.lamp import Example
from pplug_hf.data.synthetic import synthetic_examples
from pplug_hf.errors import ConfigurationError, DataError
from pplug_hf.tasks.task import TASKS

MOVIES = TASKS["LaMP-2"]
ASK = "Which tag? description: "


def item(id_, text, tag):
    return {"id": str(id_), "description": text, "tag": tag, "date": ""}


def example(user, history, query="a new film"):
    return Example(id=f"q-{user}", user=user, prompt=ASK + query, query=query, target="comedy", history=history)


def library(user, tags, start=0):
    return example(user, [item(f"{user}{i}", f"film {start + i}", tag) for i, tag in enumerate(tags)])


def test_each_follows_one_real_user():
    """One who knows only comedies and one with three action films to a classic: nobody in between is made up."""
    people = [library("a", ["comedy"] * 12), library("b", ["action", "action", "action", "classic"] * 6, start=12)]
    made = synthetic_examples(people, MOVIES, 400)
    assert [e.id for e in made] == [f"synthetic/{i}" for i in range(400)] and len({e.user for e in made}) == 400
    labels = Counter()
    for e in made:
        tags = {e.target, *(each["tag"] for each in e.history)}
        assert tags == {"comedy"} or tags <= {"action", "classic"}
        labels.update(each["tag"] for each in e.history)
    assert labels["action"] / labels["classic"] == pytest.approx(3, rel=0.15)
    assert 0.4 < sum(e.target == "comedy" for e in made) / 400 < 0.6


def test_items_are_everybodys_and_shared():
    people = [library("a", ["comedy", "action"]), library("b", ["comedy", "action"], start=9)]
    owners = {id(each): e.user for e in people for each in e.history}
    made = synthetic_examples(people, MOVIES, 50)
    assert any({owners[id(each)] for each in e.history} == {"a", "b"} for e in made)
    assert all(e.prompt == ASK + e.query and e.query.startswith("film") for e in made)


def test_the_same_film_is_never_question_and_history():
    """Two users may have tagged one film alike: its text and answer would stand in the history."""
    people = [library("a", ["comedy"] * 3), library("b", ["comedy"] * 3)]  # the same three films
    for e in synthetic_examples(people, MOVIES, 200):
        assert e.query not in {each["description"] for each in e.history}


def test_what_dev_asks_its_user_is_not_used():
    people = [library("a", ["comedy", "action", "classic"]), library("b", ["comedy", "action", "romance"])]
    asked = [replace(people[0], query=" film  1 ")]  # film 1 of user a is action, and so is that of user b
    made = synthetic_examples(people, MOVIES, 300, exclude=asked)
    used = {each["id"] for e in made for each in e.history} | {e.target for e in made}
    assert "a1" not in used and "b1" in used


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 30), st.integers(0, 5))
def test_a_seed_draws_the_same(count, seed):
    people = [library("a", ["comedy", "action"] * 4), library("b", ["classic"] * 5, start=4)]
    made = synthetic_examples(people, MOVIES, count, seed)
    assert made == synthetic_examples(people, MOVIES, count, seed) and len(made) == count
    assert synthetic_examples(people, MOVIES, 30, seed) != synthetic_examples(people, MOVIES, 30, seed + 1)


def test_items_without_text_or_a_known_label_are_left_out():
    odd = [item("x", "", "comedy"), item("y", "film y", "no such tag"), item("z", "film z", None)]
    people = [library("a", ["comedy", "action"]), example("b", odd), example("c", [])]
    made = synthetic_examples(people, MOVIES, 100)
    assert {each["id"] for e in made for each in e.history} <= {"a0", "a1"}


def test_errors_of_synthetic_users():
    with pytest.raises(ConfigurationError, match="those of LaMP-4 have none"):
        synthetic_examples([library("a", ["comedy"])], "LaMP-4", 3)
    with pytest.raises(ConfigurationError, match="is -1; give 0 or more"):
        synthetic_examples([library("a", ["comedy"])], MOVIES, -1)
    with pytest.raises(DataError, match="at least two texts"):
        synthetic_examples([library("a", ["comedy"]), library("b", ["action"])], MOVIES, 3)
