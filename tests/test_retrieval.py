"""Rankers: the benchmark's Okapi against a slow loop and against its library, dates, draws, vectors, edge cases."""

import random
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import rank_bm25
import tiny
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import okapi

from pplug_hf.data.lamp import Example
from pplug_hf.data.vectors import VectorStore
from pplug_hf.errors import ConfigurationError
from pplug_hf.methods.retrievers import RANKERS, DenseRanker, Okapi, get_ranker, retrieve
from pplug_hf.tasks.task import TASKS, get_task

TASK = get_task("LaMP-3")


def example(texts, query="the sea", id="1", dates=None, task=TASK):
    items = [{"id": str(i), "text": text, "score": "4", "title": "x"} for i, text in enumerate(texts)]
    for item, date in zip(items, dates or [], strict=False):
        item["date"] = date
    prompt = f"What is the score? review: {query}"
    return Example(id=id, user="u", prompt=prompt, query=task.query(prompt), target=None, history=items)


@pytest.fixture
def store(tmp_path):
    return VectorStore(tiny.shared_encoder(), folder=tmp_path)


def ranker(name, store, **options):
    return get_ranker(name, TASK, **options, **({"store": store} if name == "dense" else {}))


words = st.sampled_from([*"abcdef", "A", "a.", "sea"])
documents = st.lists(st.lists(words, max_size=8), min_size=1, max_size=7)


# ---- every ranker -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RANKERS)
def test_orders_are_whole_and_the_same_again(name, store):
    asked = example(["the sea is cold", "i like rain", "the sea is cold", "", "a dog", "sea"])
    order = ranker(name, store).rank(asked)
    assert sorted(order) == list(range(6)) and all(type(i) is int for i in order)
    assert order == ranker(name, store).rank(asked)


@pytest.mark.parametrize("name", RANKERS)
def test_an_empty_history_and_a_single_item(name, store):
    assert ranker(name, store).rank(example([])) == []
    assert ranker(name, store).rank(example(["a dog"])) == [0]
    assert ranker(name, store).rank(example([""], query="")) == [0]


@pytest.mark.parametrize("name", ["bm25", "bm25s", "dense"])
def test_what_fits_comes_first_and_the_newer_of_equals(name, store):
    asked = example(
        ["cold rain and snow", "the red sea", "a dog and a cat", "the red sea", "a dog and a cat"], "red sea"
    )
    order = ranker(name, store).rank(asked)
    assert order.index(3) == order.index(1) - 1 and order.index(4) == order.index(2) - 1
    if name != "dense":  # whose weights are random
        assert order[:2] == [3, 1]


@pytest.mark.parametrize("name", RANKERS)
@pytest.mark.parametrize("texts", [["", ""], ["海", "🌊 海", "é"], ["a" * 100_000, "b"], ["{x} %s", "{}"]])
@pytest.mark.parametrize("query", ["", "海", "{x}", "unheard of"])
def test_odd_texts(name, texts, query, store):
    assert sorted(ranker(name, store).rank(example(texts, query))) == list(range(len(texts)))


def test_retrieve_gives_items(store):
    examples = [example(["a dog", "the sea", "the moon"]), example([]), example(["the night"])]
    for name in RANKERS:
        found = retrieve(ranker(name, store), examples, k=2)
        assert [len(items) for items in found] == [2, 0, 1]  # all there is, where that is less
        assert all(item in asked.history for items, asked in zip(found, examples, strict=True) for item in items)
        one = retrieve(ranker(name, store), examples, k=1)
        assert [items[:1] for items in found] == one
    assert retrieve(ranker("bm25", store), examples, 2)[0][0] == examples[0].history[1]


@pytest.mark.parametrize("k", [0, -1])
def test_k_is_at_least_one(k):
    with pytest.raises(ConfigurationError, match=f"k is {k}"):
        retrieve(get_ranker("bm25", TASK), [], k)


def test_names_and_options_are_checked(store):
    with pytest.raises(ConfigurationError, match="random, recency, bm25, bm25s, dense"):
        get_ranker("tf-idf", TASK)
    with pytest.raises(ConfigurationError, match=r"\['seed'\]"):
        get_ranker("bm25", TASK, seed=1)
    with pytest.raises(ConfigurationError, match="store"):
        get_ranker("dense", TASK)
    with pytest.raises(ConfigurationError, match="dot, cosine"):
        get_ranker("dense", TASK, store=store, similarity="euclid")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'pplug-hf\[retrieval\]'"):
        get_ranker("bm25s", TASK)
    get_ranker("bm25", TASK)


# ---- BM25 -------------------------------------------------------------------------------------------------------


@given(documents, st.lists(words, max_size=6))
@settings(deadline=None, max_examples=300)
def test_okapi_is_the_slow_loop(corpus, query):
    np.testing.assert_allclose(Okapi(corpus).scores(query), okapi(corpus, query), rtol=1e-10, atol=1e-12)


@given(documents, st.lists(words, max_size=6))
@settings(deadline=None, max_examples=300)
def test_okapi_is_what_the_benchmark_calls(corpus, query):
    assume(any(corpus))  # the library divides by zero
    expected = rank_bm25.BM25Okapi(corpus).get_scores(query)
    np.testing.assert_allclose(Okapi(corpus).scores(query), expected, rtol=1e-12, atol=1e-14)


def test_okapi_by_hand():
    corpus = [["sea", "cold"], ["sea"], ["sea", "sea", "dog", "cat"]]  # mean length 7/3; n: sea 3, all others 1
    rare = np.log(2.5 / 1.5)
    common = 0.25 * (np.log(0.5 / 3.5) + 3 * rare) / 4  # in more than half: a quarter of the mean idf
    length = [1 - 0.75 + 0.75 * n * 3 / 7 for n in (2, 1, 4)]
    expected = [common * f * 2.5 / (f + 1.5 * norm) for f, norm in zip((1, 1, 2), length, strict=True)]
    expected[2] += rare * 2.5 / (1 + 1.5 * length[2])
    np.testing.assert_allclose(Okapi(corpus).scores(["sea", "dog", "unheard"]), expected)
    assert common < 0  # the mean holds negative ones too, so who has the word loses


@given(documents, st.lists(words, max_size=6), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=100)
def test_the_order_of_the_history_does_not_change_scores(corpus, query, rng):
    shuffled = list(range(len(corpus)))
    rng.shuffle(shuffled)
    scores = Okapi(corpus).scores(query)
    assert Okapi([corpus[i] for i in shuffled]).scores(query).tolist() == scores[shuffled].tolist()  # to the last bit


@given(documents, st.lists(words, max_size=6))
@settings(deadline=None, max_examples=100)
def test_more_properties_of_okapi(corpus, query):
    scores = Okapi(corpus).scores(query)
    np.testing.assert_allclose(Okapi(corpus).scores(query * 2), 2 * scores, atol=1e-12)
    np.testing.assert_allclose(Okapi(corpus).scores([*query, "unheard"]), scores)
    assert all(score == 0 for score, document in zip(scores, corpus, strict=True) if not set(document) & set(query))
    for i, j in pairwise(range(len(corpus))):
        assert sorted(corpus[i]) != sorted(corpus[j]) or scores[i] == scores[j]


@given(documents, st.lists(words, min_size=1, max_size=6))
@settings(deadline=None, max_examples=100)
def test_bm25_ranks_by_the_slow_loop(corpus, query):
    asked = example([" ".join(document) for document in corpus], " ".join(query))
    scores = np.round(okapi(corpus, query), 9)  # what differs in rounding only is equal: the newer first
    got = np.round(Okapi(corpus).scores(query), 9)
    assert get_ranker("bm25", TASK).rank(asked) == sorted(
        range(len(corpus)), key=lambda i: (Okapi(corpus).scores(query)[i], i), reverse=True
    )
    assert scores.tolist() == got.tolist()


def test_words_stand_between_white_space_and_keep_their_case():
    rank = get_ranker("bm25", TASK).rank
    texts = ["Sea dog cat", "sea. dog cat", "sea dog\ncat", "moon", "rain", "snow"]
    assert rank(example(texts, "sea"))[0] == 2 and rank(example(texts, "Sea"))[0] == 0
    assert rank(example(texts, "sea."))[0] == 1
    assert get_ranker("bm25s", TASK).rank(example(texts, "SEA"))[:3] == [2, 1, 0]  # all equal


def test_bm25s_is_the_library_as_it_is():
    bm25s = pytest.importorskip("bm25s")
    rng = random.Random(0)
    texts = [" ".join(rng.choices(tiny.WORDS, k=rng.randint(1, 30))) for _ in range(40)]
    query = " ".join(rng.choices(tiny.WORDS, k=10))
    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    index.index([[w for w in text.split() if len(w) > 1] for text in texts], show_progress=False)
    scores = index.get_scores([w for w in query.split() if len(w) > 1])
    order = get_ranker("bm25s", TASK).rank(example(texts, query))
    np.testing.assert_allclose(scores[order], np.sort(scores)[::-1], rtol=1e-6)
    assert order != get_ranker("bm25", TASK).rank(example(texts, query))  # another ranking, under its own name


# ---- recency, random --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dates", "expected"),
    [
        (["2001", "2003", "2002"], [1, 2, 0]),
        (["2001-05-01", "2001-04-30", "2001"], [0, 1, 2]),  # a year alone is older than its days, as in the benchmark
        (["2001-10-01", "2001-9-30", "2001-10-01"], [2, 0, 1]),  # numbers, not texts; of one day the last is newer
        (["2001-10-01 10:00", "2001-10-01T11:00:30"], [1, 0]),
        ([2003, 2001], [0, 1]),
        (["2003", "", "2001"], [2, 1, 0]),  # one cannot be read: oldest first, as histories are
        (["2003", "May 2002", "2001"], [2, 1, 0]),
        (["2003", None, "2001"], [2, 1, 0]),
        (None, [2, 1, 0]),
    ],
)
def test_the_newest_come_first(dates, expected):
    assert get_ranker("recency", TASK).rank(example("abc"[: len(expected)], dates=dates)) == expected


def test_draws_depend_on_seed_and_example_alone():
    texts = [str(i) for i in range(30)]
    orders = [
        get_ranker("random", TASK, seed=seed).rank(example(texts, query, id))
        for seed, query, id in [(0, "a", "1"), (0, "b", "1"), (1, "a", "1"), (0, "a", "2")]
    ]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3
    assert orders[0][:5] == [29, 6, 15, 10, 28]  # on every machine, in every process


def test_draws_are_even():
    firsts = [get_ranker("random", TASK).rank(example("abcd", id=str(i)))[0] for i in range(2000)]
    assert np.bincount(firsts) == pytest.approx(500, abs=80)


# ---- dense ------------------------------------------------------------------------------------------------------

TEXTS = ["the sea", "i like rain and snow", "my dog", "the best book of the summer", "cold", "the sea"]


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_dense_is_the_similarity_of_the_encoders_vectors(tmp_path, similarity):
    encoder = tiny.encoder(normalize=False)  # lengths differ, so the two similarities do
    asked = example(TEXTS[:5], "a film about rain")
    vectors, query = torch.tensor(encoder.encode(TEXTS[:5])), torch.tensor(encoder.encode("a film about rain"))
    scores = vectors @ query
    if similarity == "cosine":
        scores = scores / vectors.norm(dim=1)
    dense = DenseRanker(TASK, VectorStore(encoder, folder=tmp_path), similarity=similarity)
    assert dense.rank(asked) == scores.argsort(descending=True).tolist()


def test_nothing_is_encoded_twice(store):
    examples = [example(TEXTS, "the sea"), example(TEXTS[:2], "my cat"), example([])]
    dense = DenseRanker(TASK, store)
    dense.prepare(examples)
    assert store.encoded == 6 and dense.queries is store  # five texts and "my cat"; "the sea" is both
    orders = [dense.rank(asked) for asked in examples]
    assert store.encoded == 6
    again = VectorStore(store.encoder, folder=store.folder.parent)
    assert [DenseRanker(TASK, again).rank(asked) for asked in examples] == orders and again.encoded == 0


def test_what_is_prepared_changes_no_order(store):
    rng = random.Random(1)
    texts = [" ".join(rng.choices(tiny.WORDS, k=3)) for _ in range(12)]
    asked = [example(rng.choices(texts, k=20), rng.choice(texts), id=str(i)) for i in range(6)]
    asked.append(replace(asked[0], id="again", prompt=asked[1].prompt))  # of one user: the very same items
    prepared = DenseRanker(TASK, store)
    prepared.prepare(asked)
    for each in asked:
        assert prepared.rank(each) == DenseRanker(TASK, store).rank(each)
        other = replace(
            each, history=each.history[::-1]
        )  # not prepared; equals stand next to each other, newest first
        assert [other.history[i]["text"] for i in prepared.rank(other)] == [
            each.history[i]["text"] for i in prepared.rank(each)
        ]
        order = prepared.rank(each)
        assert all(i > j for i, j in pairwise(order) if each.history[i]["text"] == each.history[j]["text"])


def test_a_plugs_vectors_are_shared(store):
    """With the plug's template, retrieval encodes nothing but requests, and those in a store of their own prompt."""
    template = "rated {score}: {text}"
    store([template.format(text=text, score=4) for text in TEXTS], show_progress=False)
    assert store.encoded == 5
    dense = DenseRanker(TASK, store, item_template=template, query_prompt="i like ")
    dense.prepare([example(TEXTS)])
    dense.rank(example(TEXTS))
    assert store.encoded == 5 and dense.queries.encoded == 1
    assert dense.queries.folder.parent == store.folder.parent and dense.queries.prompt == "i like "


def test_the_order_of_the_history_does_not_change_dense_scores(store):
    dense, rng = DenseRanker(TASK, store), random.Random(0)
    distinct = [" ".join(rng.choices(tiny.WORDS, k=6)) for _ in range(33)]
    expected = [distinct[i] for i in dense.rank(example(distinct))]
    for _ in range(5):
        rng.shuffle(distinct)
        assert [distinct[i] for i in dense.rank(example(distinct))] == expected


# ---- what is read of an item and of an input --------------------------------------------------------------------

ITEM = {"id": "7", "title": "TITLE", "abstract": "ABSTRACT", "text": "TEXT", "description": "DESCRIPTION"}
ITEM |= {"tag": "TAG", "score": "5", "date": "2001"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("LaMP-1", "TITLE ABSTRACT"),
        ("LaMP-2", "DESCRIPTION"),
        ("LaMP-3", "TEXT"),
        ("LaMP-4", "TITLE TEXT"),
        ("LaMP-5", "TITLE ABSTRACT"),
        ("LaMP-6", "TEXT"),
        ("LaMP-7", "TEXT"),
        ("demo", "TEXT"),
    ],
)
def test_rankers_read_what_the_benchmark_lets_them(name, expected):
    assert get_task(name).retrieval_text(ITEM) == expected
    assert "None" not in get_task(name).retrieval_text(dict.fromkeys(ITEM))


def test_every_task_is_checked_above():
    assert len(TASKS) == 13  # test_long_tasks.py has five of them


def test_citations_are_looked_for_by_the_two_candidates():
    task = get_task("LaMP-1")
    prompt = 'the title "Mine", which reference is related? Just answer with [1] or [2]. [1]: "One {}" [2]: "Two"'
    assert task.retrieval_query(prompt.format("thing")) == "One thing Two"
    assert task.retrieval_query(prompt.format('"big"\nthing')) == 'One "big"\nthing Two'
    assert task.retrieval_query('the title "Mine", which reference is related?') == "Mine"  # no candidates: the query
    items = [{"title": "on sea", "abstract": "x"}, {"title": "One thing", "abstract": "Two"}]
    items.append({"title": "y", "abstract": ""})
    asked = Example("1", "u", prompt.format("thing"), "Mine", None, items)
    assert get_ranker("bm25", task).rank(asked)[0] == 1


def test_other_tasks_are_looked_for_by_the_query():
    for task in (*TASKS.values(), replace(TASKS["demo"], name="mine")):
        if task.name not in ("LaMP-1", "LongLaMP-review"):
            assert task.retrieval_query(f"bla {task.query_marker} the sea ") == "the sea"


@pytest.mark.parametrize(("pattern", "message"), [("(", "not a valid regular expression"), ("abc", "no group")])
def test_patterns_are_checked(pattern, message):
    with pytest.raises(ConfigurationError, match=message):
        replace(TASKS["demo"], retrieval_query_pattern=pattern)


def test_a_template_of_its_own_counts_as_fields():
    task = replace(TASKS["demo"], retrieval_template="{place} {text}")
    assert task.fields == {"place", "tag", "text"}
    assert task.retrieval_text({"place": "north", "text": "sea"}) == "north sea"
