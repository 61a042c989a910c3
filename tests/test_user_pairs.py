"""Pairs that a user's weights are trained on: nothing that a question of the evaluation asks, nothing that came later."""

import random
from dataclasses import replace

import pytest
from bench_data import SHELVES
from hypothesis import given, settings
from hypothesis import strategies as st

from pplug_hf.data.records import Example
from pplug_hf.errors import ConfigurationError
from pplug_hf.methods.user_pairs import Asked, check_pairs, questions_by_user, user_pairs
from pplug_hf.tasks.items import item_id, normalise
from pplug_hf.tasks.task import TASKS

TEXTS = replace(SHELVES, metric="rouge", labels=())


def item(number, text=None, tag="sea"):
    return {"id": f"i{number}", "text": text or f"text {number}", "tag": tag, "date": f"2020-01-{number + 1:02}"}


def question(user, query, history, task=SHELVES):
    return Example(f"{user}-{query}", user, f"what is best for the book: {query}", query, "sea", history)


@st.composite
def evaluations(draw):
    """Questions of a few users, whose histories are windows, nested or not, and may hold what is asked."""
    rng = random.Random(draw(st.integers(0, 10**9)))
    texts = [f"text {n}" for n in range(8)]
    examples = []
    for user in "abc":
        whole = [
            item(n, rng.choice(texts), rng.choice((*SHELVES.labels, "", "other"))) for n in range(rng.randint(0, 9))
        ]
        for _ in range(rng.randint(1, 3)):
            start, end = sorted(rng.choices(range(len(whole) + 1), k=2))
            history = whole[:end] if rng.random() < 0.5 else whole[start:end]
            examples.append(question(user, rng.choice(texts).upper() + " ", history))
    return rng.choice((SHELVES, TEXTS)), examples


@settings(max_examples=300, deadline=None)
@given(evaluations())
def test_nothing_leaks(evaluation):
    task, examples = evaluation
    asked = Asked.of(examples, task)
    for user, own in questions_by_user(examples).items():
        pairs = user_pairs(own, task, asked)
        queries = {normalise(e.query) for e in (examples if task.is_free_text else own)}
        histories = [[item_id(each) for each in e.history] for e in own]
        for pair in pairs:
            name = item_id(pair.item)
            assert all(name in history for history in histories)
            assert normalise(pair.example.query) not in queries
            assert pair.example.target and (not task.labels or pair.example.target in task.labels)
            assert pair.example.user == user and pair.example.prompt.rstrip().endswith(pair.item["text"])
            earliest = min(histories, key=len)
            before = earliest[: earliest.index(name)]
            assert [each for each in map(item_id, pair.example.history) if each not in before] == []
        usable = {
            n for n in set.intersection(*map(set, histories))
            if any(item_id(i) == n and task.item_label(i) and normalise(i["text"]) not in queries for i in own[0].history)
        }  # fmt: skip
        assert {item_id(pair.item) for pair in pairs} == usable  # and nothing else is left out


def test_the_rules_and_the_newest_items():
    old, new = [item(n) for n in range(4)], [item(n) for n in range(6)]
    examples = [question("a", "text 4", old), question("a", "text 9", new)]
    asked = Asked.of(examples, SHELVES)
    names = lambda pairs: [pair.item["id"] for pair in pairs]  # noqa: E731
    assert names(user_pairs(examples, SHELVES, asked)) == ["i0", "i1", "i2", "i3"]
    assert names(user_pairs(examples, SHELVES, asked, max_items=2)) == ["i2", "i3"]
    assert names(user_pairs(examples, SHELVES, asked, "union")) == ["i0", "i1", "i2", "i3", "i4", "i5"]  # 4 is asked
    assert [len(p.example.history) for p in user_pairs(examples, SHELVES, asked, max_items=2)] == [2, 3]
    undated = [{**each, "date": ""} for each in old[::-1]]
    assert names(user_pairs([question("a", "x", undated)], SHELVES, asked, max_items=1)) == ["i0"]  # the last one


def test_what_is_asked_of_others_counts_for_texts_alone():
    examples = [question("a", "text 1", [item(0), item(1), item(2)]), question("b", "text 2", [])]
    for task, left in ((SHELVES, ["i0", "i2"]), (TEXTS, ["i0"])):
        pairs = user_pairs(examples[:1], task, Asked.of(examples, task))
        assert [pair.item["id"] for pair in pairs] == left


def test_items_without_an_answer_of_the_task_have_a_question_of_their_own():
    citing, tweets = TASKS["LaMP-1"], TASKS["LaMP-7"]
    paper = {"id": "1", "title": "on seas", "abstract": "seas are wet"}
    e = Example(
        "q", "u", 'For an author who has written the paper with the title "x", which reference', "x", "[1]", [paper]
    )
    (pair,) = user_pairs([e], citing, Asked())
    assert pair.example.prompt.endswith(": on seas") and pair.example.target == "seas are wet"
    tweet = {"id": "1", "text": " ".join(f"w{n}" for n in range(40))}
    e = Example("q", "u", "Paraphrase the tweet: x", "x", "y", [tweet])
    (pair,) = user_pairs([e], tweets, Asked())
    start, rest = pair.example.prompt.partition(": ")[2], pair.example.target
    assert f"{start} {rest}" == tweet["text"] and 4 <= len(start.split()) <= 10
    assert user_pairs([e], tweets, Asked()) == [pair]
    short = replace(e, history=[{"id": "1", "text": "alone"}])
    assert user_pairs([short], tweets, Asked()) == []  # nothing is left to complete


def test_a_task_whose_items_give_nothing_is_refused():
    with pytest.raises(ConfigurationError, match=r"Items of shelves carry no answer.*own_prompt and own_answer"):
        check_pairs(replace(SHELVES, answer_field=None, labels=(), metric="rouge"))
    for own in ({"own_prompt": "{text}"}, {"own_answer": "{text}"}):
        with pytest.raises(ConfigurationError, match="belong together"):
            replace(SHELVES, **own)
    with pytest.raises(ConfigurationError, match="name half of a field; there is start, and rest"):
        replace(SHELVES, own_prompt="{text:half}", own_answer="{text:rest}")
    own = replace(SHELVES, own_prompt="{other}", own_answer="{text}")
    assert "other" in own.fields and own.identity == SHELVES.identity  # questions and answers are the same
    check_pairs(own)
