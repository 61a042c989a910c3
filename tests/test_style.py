"""The style measure on invented authors who are known, and its fixed points: chance, blandness, emptiness."""

import random
from dataclasses import fields

import numpy as np
import pytest

from pplug_hf.data.records import Example
from pplug_hf.errors import ConfigurationError, DataError, MismatchError
from pplug_hf.evaluation.style import FEATURES, FUNCTION_WORDS, Style, features, own_texts
from pplug_hf.evaluation.user_statistics import user_means

WORDS = [
    "river",
    "stone",
    "copper",
    "window",
    "letter",
    "garden",
    "winter",
    "engine",
    "paper",
    "signal",
    "mountain",
    "bread",
]
MANNERS = {
    "shouts": str.upper,
    "whispers": str.lower,
    "titles": str.title,
    "asks": lambda text: f"why {text}?",
    "exclaims": lambda text: f"{text}!",
    "lists": lambda text: text.replace(" ", ", "),
    "quotes": lambda text: f'"{text}": more',
    "rambles": lambda text: f"and the {text} of the {text} and the {text}",
}


def text(rng):
    return " ".join(rng.choices(WORDS, k=rng.randint(4, 9)))


def written(number, seed=0, manners=MANNERS):
    rng = random.Random(seed)
    return {user: [manner(text(rng)) for _ in range(number)] for user, manner in manners.items()}


def flat(texts):
    return [text for own in texts.values() for text in own], [user for user, own in texts.items() for _ in own]


def column(name, text):
    return features([text])[0, FEATURES.index(name)]


def test_the_author_is_known():
    style = Style.fit(written(20))
    answers, users = flat(written(20, seed=1))
    scores = style.score(answers, users)
    assert scores.mean() > 0.95
    assert (style.closeness(answers).argmax(axis=1) == [style.users[user] for user in users]).mean() > 0.9


def test_upper_case_against_lower_case():
    pair = {"upper": str.upper, "lower": str.lower}
    style = Style.fit(written(10, manners=pair))
    assert style.score(["A NEW STONE", "a new stone"], ["upper", "lower"]).tolist() == [1, 1]
    assert style.score(["A NEW STONE", "a new stone"], ["lower", "upper"]).tolist() == [0, 0]


def test_strangers_texts_are_at_chance():
    texts = written(40)
    answers, users = flat(written(40, seed=1))
    others = [random.Random(i).choice([user for user in texts if user != own]) for i, own in enumerate(users)]
    assert Style.fit(texts).score(answers, others).mean() == pytest.approx(0.5, abs=0.1)


def test_authors_without_a_style_are_at_chance():
    rng = random.Random(0)
    texts = {str(user): [text(rng) for _ in range(10)] for user in range(40)}
    answers, users = flat({user: [text(rng) for _ in range(10)] for user in texts})
    assert Style.fit(texts).score(answers, users).mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("bland", ["the river", "", "!!!", "A STONE. " * 500])
def test_one_answer_for_all_is_exactly_chance(bland):
    style = Style.fit(written(12))
    assert style.score([bland] * len(MANNERS), list(MANNERS)).mean() == pytest.approx(0.5)


def test_means_over_users_count_each_user_once():
    means, names = user_means(np.array([1.0, 0.0, 0.5, np.nan, np.nan]), ["b", "a", "b", "a", "c"])
    assert (means.tolist(), names) == ([0.75, 0.0], ["b", "a"])
    users = [user for number, user in enumerate(MANNERS, 1) for _ in range(number)]
    means, _ = user_means(Style.fit(written(12)).score(["the river"] * len(users), users), users)
    assert means.mean() == pytest.approx(0.5)


def test_nothing_depends_on_order_or_on_the_other_answers():
    texts = written(10)
    style, turned = Style.fit(texts), Style.fit(dict(reversed(texts.items())))
    answers, users = flat(written(3, seed=2))
    scores = style.score(answers, users)
    assert turned.score(answers, users) == pytest.approx(scores)
    assert [style.score([a], [u])[0] for a, u in zip(answers, users, strict=True)] == pytest.approx(scores)


def test_few_texts_are_trusted_little():
    texts = written(40)
    texts["once"] = [texts["shouts"][0]]
    style = Style.fit(texts)
    near = style.closeness(["COPPER RIVER WINDOW BREAD"])[0]
    assert near[style.users["shouts"]] > near[style.users["whispers"]]
    shift = np.abs(style.expected - style.origin).sum(axis=1)
    assert shift[style.users["once"]] < shift[style.users["shouts"]]


def test_gaps_say_what_differs():
    texts = written(20, manners={"upper": str.upper, "title": str.title, "titles": str.title})
    lowered = [own.lower() for own in texts["title"]]
    gaps = Style.fit(texts).gaps(lowered, ["title"] * len(lowered))
    assert gaps["capitalised words"] < -0.5 and gaps["upper-case letters"] < 0
    assert abs(gaps["comma"]) < 1e-9 and next(iter(gaps)) in (
        "capitalised words",
        "starts lower-case",
        "starts upper-case",
    )
    assert set(gaps) == set(FEATURES)
    same = Style.fit(texts).gaps(texts["title"], ["title"] * 20)
    assert max(map(abs, same.values())) < 1e-9


def test_features_are_what_they_are_called():
    assert column("upper-case letters", "ABcd") == 0.5 and column("all-capital words", "NASA lost a probe") == 1 / 3
    assert column("capitalised words", "The End of it") == 0.5 and column("starts lower-case", '"so" It is') == 1
    assert column("comma", "one, two, three, four") == 0.75 and column("quotation mark", "\u201cyes\u201d") == 2
    assert column("ends with a question mark", 'Who said "why?"') == 1 and column("ends with a period", "No.") == 1
    assert column("negation words", "I don\u2019t know") == 1 / 3 == column("pronoun I words", "I don't know")
    assert column("sentences", "One. Two! Three") == 2 and column("digits", "a1b2") == 0.5
    assert column("log words", "two  words\n") == np.log1p(2) and column("log characters", "two  words\n") == np.log1p(
        9
    )
    assert column("not ASCII", "日本") == 1 and column("letters per word", "ab abcd") == 3


@pytest.mark.parametrize("odd", ["", " \n", "...", "日本語 🎬", "\ud83d", "1 2 3", "a" * 100_000])
def test_any_text_has_finite_features(odd):
    style = Style.fit(written(5))
    assert np.isfinite(features([odd])).all() and 0 <= style.score([odd], ["asks"])[0] <= 1
    assert features([" "]).any() == np.False_


def test_no_function_word_is_in_two_groups():
    words = " ".join(FUNCTION_WORDS.values()).split()
    assert len(words) == len(set(words)) and len(FEATURES) == len(set(FEATURES)) == features([]).shape[1]


def test_users_without_texts_have_no_score():
    style = Style.fit({**written(5), "silent": [], "blank": [" "]})
    scores = style.score(["a", "b", "c"], ["silent", "unknown", "asks"])
    assert np.isnan(scores).tolist() == [True, True, False]
    assert style.gaps(["a"], ["silent"]) == {} and len(style.score([], [])) == 0


@pytest.mark.parametrize("texts", [{}, {"a": ["x", "y"]}, {"a": ["x"], "b": ["y"]}, {"a": ["x", "y"], "b": [""]}])
def test_too_little_to_learn_from(texts):
    with pytest.raises(DataError, match="at least 2 users"):
        Style.fit(texts)


def test_answers_and_users_must_be_as_many():
    with pytest.raises(MismatchError, match="1 answers and 2 users"):
        Style.fit(written(5)).score(["x"], ["asks", "lists"])


def test_users_who_are_all_alike():
    style = Style.fit({"a": ["x"] * 3, "b": ["x"] * 3, "c": ["x"] * 3})
    assert style.score(["x", "Y!"], ["a", "b"]).tolist() == [0.5, 0.5]
    assert all(np.isfinite(getattr(style, f.name)).all() for f in fields(Style) if f.name != "users")


def test_own_texts_leave_out_what_is_asked():
    def example(id_, user, target, *titles):
        history = [{"id": str(i), "text": "t", "title": title} for i, title in enumerate(titles)]
        return Example(id_, user, "article: x", "x", target, history)

    rows = [example("0", "a", "One", "Two", "Two", ""), example("1", "a", "Three", "Two", "One", "Four")]
    assert own_texts([*rows, example("2", "b", "Two", "One")], "LaMP-4") == {"a": ["Two", "Four"], "b": ["One"]}
    assert own_texts(rows, "LaMP-7") == {"a": ["t"]}
    with pytest.raises(ConfigurationError, match="free text only"):
        own_texts(rows, "LaMP-2")
