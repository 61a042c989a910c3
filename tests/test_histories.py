"""Training on histories: no question of the evaluation enters, nothing of the future is seen."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pplug_hf.data.histories import history_examples, newest, split_users
from pplug_hf.data.lamp import Example, read_lamp
from pplug_hf.errors import ConfigurationError
from pplug_hf.tasks import items as items_module
from pplug_hf.tasks.task import TASKS

REAL = Path(os.environ.get("PPLUG_LAMP") or Path(__file__).resolve().parents[1] / ".." / "shared" / "lamp")
MOVIES, NEWS = TASKS["LaMP-2"], TASKS["LaMP-4"]
ASK = "Which tag? description: "


def item(id_, text=None, tag="comedy"):
    return {"id": str(id_), "description": f"film {id_}" if text is None else text, "tag": tag, "date": ""}


def example(user, history=(), query="a new film", id_="q"):
    return Example(id=id_, user=user, prompt=ASK + query, query=query, target="comedy", history=list(history))


# Users of few names with windows over one list of items each, so that everything collides.
@st.composite
def examples_of_some_users(draw, max_size=6):
    rows = []
    for number in range(draw(st.integers(0, max_size))):
        user = draw(st.sampled_from("ab"))
        start = draw(st.integers(0, 4))
        texts = draw(st.lists(st.sampled_from(["x", "y", "x  z", "x z", "", " y "]), min_size=10, max_size=10))
        items = [item(position, texts[position]) for position in range(start, draw(st.integers(start, 9)))]
        rows.append(example(user, items, draw(st.sampled_from(["x", "y", "x z", "w"])), str(number)))
    return rows


def test_an_item_becomes_a_question_after_what_came_before():
    items = [item(0), item(1, tag="action"), item(2)]
    made = history_examples([example("u", items)], MOVIES)
    assert [each.id for each in made] == ["u/0", "u/1", "u/2"]
    second = made[1]
    assert (second.user, second.prompt, second.query, second.target) == (
        "u",
        ASK + "film 1",
        "film 1",
        "action",
    )
    assert list(second.history) == items[:1] and second.history[0] is items[0]
    assert list(made[0].history) == []


def test_an_item_in_many_profiles_counts_once_with_most_before_it():
    items = [item(number) for number in range(6)]
    rows = [
        example("u", items[:2]),
        example("u", items[:5]),
        example("u", items[3:]),
        example("v", items[:1]),
    ]
    made = {each.id: list(each.history) for each in history_examples(rows, MOVIES)}
    assert made == {**{f"u/{n}": items[:n] for n in range(5)}, "u/5": items[3:5], "v/0": []}


@pytest.mark.parametrize("name", ["LaMP-1", "LaMP-7"])
def test_items_without_answers_give_nothing(name):
    assert history_examples([example("u", [item(0)])], name) == []


@pytest.mark.parametrize("bad", [item(0, text=""), item(0, text="  "), item(0, tag="")])
def test_items_without_query_or_answer_are_left_out_but_stay_in_histories(bad):
    (made,) = history_examples([example("u", [bad, item(1)])], MOVIES)
    assert made.id == "u/1" and list(made.history) == [bad]


def test_white_space_does_not_hide_a_question():
    assert history_examples([example("u", [item(0, " a \n new   film ")])], MOVIES) == []


def test_case_does_not_hide_a_question():
    assert history_examples([example("u", [item(0, "A New FILM")])], MOVIES) == []


def test_the_same_question_of_somebody_else_stays_where_answers_are_personal():
    rows, held = [example("u", [item(0, "dune")])], [example("v", query="dune")]
    assert len(history_examples(rows, MOVIES, exclude=held)) == 1
    assert history_examples(rows, MOVIES, exclude=[replace(held[0], user="u")]) == []


def test_the_same_question_of_somebody_else_goes_where_answers_are_free_text():
    rows = [example("u", [{"id": "0", "text": "dune", "title": "A review"}])]
    assert len(history_examples(rows, NEWS)) == 1
    assert history_examples(rows, NEWS, exclude=iter([example("v", query="dune")])) == []


def test_an_item_twice_in_one_profile_does_not_find_its_own_answer():
    (made,) = history_examples([example("u", [item(0), item(0)])], MOVIES)
    assert list(made.history) == []


def dated(*days):
    return [{**item(i), "date": day} for i, day in enumerate(days)]


def test_an_item_comes_after_what_is_older_in_whatever_order_a_profile_is():
    newest_first = dated("2024-01-01", "2010", "2015-06-01")
    made = history_examples([example("u", newest_first)], MOVIES)
    assert {e.id: [i["date"] for i in e.history] for e in made} == {
        "u/1": [],
        "u/2": ["2010"],
        "u/0": ["2010", "2015-06-01"],
    }
    undated = [*newest_first, item(3)]
    assert [e.history for e in history_examples([example("u", undated)], MOVIES)] == [undated[:i] for i in range(4)]


@given(st.permutations(range(6)), st.permutations(range(6)), st.booleans())
def test_the_next_profile_of_a_user_is_read_as_if_alone(days, ends, undated):
    items = dated(*(f"2001-01-0{day + 1}" for day in days))
    items[3]["date"] = "" if undated else items[3]["date"]
    rows = [example("u", items[: end + 1], id_=str(end)) for end in ends]
    alone: dict[str, list] = {}
    for row in rows:
        for e in history_examples([row], MOVIES):
            alone[e.id] = max(alone.get(e.id, []), e.history, key=len)
    assert {e.id: e.history for e in history_examples(rows, MOVIES)} == alone
    kept = [[row.history[i] for i in sorted(items_module.newest_first(row.history)[:2])] for row in rows]
    assert [row.history for row in newest(rows, 2)] == kept


def test_items_without_ids_are_told_apart_by_what_they_say():
    items = [{"text": text, "tag": "blue", "date": ""} for text in ("one", "two", "one")]
    made = history_examples([example("u", items), example("u", items[:1])], "demo")
    assert [each.query for each in made] == ["one", "two"] and len({each.id for each in made}) == 2


def test_a_prompt_without_instruction_is_no_model():
    lost = Example("q", "u", "A film.", "A film.", "comedy", [item(0)])
    made = history_examples([lost, example("v", [item(1)])], MOVIES)
    assert [each.prompt for each in made] == [ASK + "film 0", ASK + "film 1"]
    assert history_examples([lost], MOVIES)[0].prompt == "film 0"


def test_unicode_is_kept():
    (made,) = history_examples([example("Zoë", [item("é", "café 日本 🎬")])], MOVIES)
    assert (made.id, made.query) == ("Zoë/é", "café 日本 🎬")


@settings(deadline=None, max_examples=60)
@given(examples_of_some_users(), examples_of_some_users())
def test_nothing_leaks(rows, held):
    made = history_examples(rows, MOVIES, exclude=held)
    forbidden = {(each.user, " ".join(each.query.split())) for each in rows + held}
    assert len({each.id for each in made}) == len(made)
    for each in made:
        assert (each.user, " ".join(each.query.split())) not in forbidden
        assert each.query == MOVIES.query(each.prompt)
        item_id = each.id.removeprefix(f"{each.user}/")
        assert item_id not in {entry["id"] for entry in each.history}
        # The history is the start of some profile of this user, and the item comes right after it.
        assert any(
            row.user == each.user
            and list(row.history[: len(each.history)]) == list(each.history)
            and len(row.history) > len(each.history)
            and row.history[len(each.history)]["id"] == item_id
            for row in rows
        )


@settings(deadline=None, max_examples=60)
@given(examples_of_some_users(), examples_of_some_users())
def test_nothing_is_forgotten(rows, held):
    """Against a slow loop that says what must be there."""
    asked = {(each.user, " ".join(each.query.split())) for each in rows + held}
    longest: dict[str, tuple[int, str]] = {}
    for row in rows:
        for position, entry in enumerate(row.history):
            key = f"{row.user}/{entry['id']}"
            if position > longest.get(key, (-1, ""))[0]:
                longest[key] = (position, " ".join(entry["description"].split()))
    expected = {
        key: position for key, (position, text) in longest.items() if text and (key.split("/")[0], text) not in asked
    }
    assert {each.id: len(each.history) for each in history_examples(rows, MOVIES, exclude=held)} == expected


@pytest.mark.parametrize("number", [2, 3, 4, 5])
def test_real_data_does_not_leak(number):
    folder = REAL / f"LaMP_{number}"
    if not folder.is_dir():
        pytest.skip("no real data: set PPLUG_LAMP to a folder with LaMP_1 to LaMP_5")
    task, dev = read_lamp(folder, "dev")
    made = history_examples(dev, task, exclude=read_lamp(folder, "test")[1])
    asked = {(each.user, each.query) for each in dev}
    assert len(made) > len(dev)
    assert not asked & {(each.user, each.query) for each in made}
    for each in made[::50]:
        dates = [entry["date"] for entry in each.history]
        assert dates == sorted(dates) and task.query(each.prompt) == each.query


# Splitting by user

users = st.lists(st.text(max_size=3), max_size=30)
seeds = st.integers(0, 2**32)
fractions = st.floats(0, 1)


def asking(names):
    return [example(name, id_=str(number)) for number, name in enumerate(names)]


@settings(deadline=None, max_examples=60)
@given(users, fractions, seeds, st.randoms())
def test_split_does_not_depend_on_order_or_company(names, fraction, seed, random):
    rows = asking(names)
    held = {each.user for each in split_users(rows, fraction, seed)[1]}
    shuffled = random.sample(rows, len(rows))
    assert {each.user for each in split_users(shuffled, fraction, seed)[1]} == held
    for row in rows:
        assert bool(split_users([row], fraction, seed)[1]) == (row.user in held)


@settings(deadline=None, max_examples=60)
@given(users, fractions, seeds)
def test_split_keeps_everything_in_order_and_users_whole(names, fraction, seed):
    rows = asking(names)
    kept, held = split_users(rows, fraction, seed)
    assert not {each.user for each in kept} & {each.user for each in held}
    assert sorted([*kept, *held], key=lambda each: int(each.id)) == rows
    assert [int(each.id) for each in kept] == sorted(int(each.id) for each in kept)
    assert [int(each.id) for each in held] == sorted(int(each.id) for each in held)


def test_split_is_the_same_forever():
    """A changed draw would silently move users between training and validation of older runs."""
    held = split_users(asking([f"u{number}" for number in range(20)]), 0.25, seed=0)[1]
    assert [each.user for each in held] == ["u4", "u12", "u13", "u16", "u18"]


def test_split_share_and_seed():
    rows = asking([f"u{number}" for number in range(4000)])
    held = [{each.user for each in split_users(rows, 0.2, seed)[1]} for seed in (0, 1)]
    assert all(abs(len(each) / 4000 - 0.2) < 0.02 for each in held)
    assert len(held[0] & held[1]) < 250  # about 160 if the seeds are independent


@pytest.mark.parametrize(("fraction", "sizes"), [(0, (9, 0)), (1, (0, 9))])
def test_split_all_or_nothing(fraction, sizes):
    kept, held = split_users(asking("abcdefghi"), fraction)
    assert (len(kept), len(held)) == sizes


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan"), 20])
def test_split_refuses_other_fractions(fraction):
    with pytest.raises(ConfigurationError, match="between 0 and 1"):
        split_users([], fraction)


def test_the_newest_items_of_many_histories_of_one_user_take_one_look_at_each_date(monkeypatch):
    looks, dates = [], items_module._DATE

    class Looks:
        def fullmatch(self, text):
            looks.append(text)
            return dates.fullmatch(text)

    monkeypatch.setattr(items_module, "_DATE", Looks())
    history = [{**item(i), "date": f"1987-{i // 28 + 1:02}-{i % 28 + 1:02}"} for i in range(0, 80, 2)]
    rows = newest([example("a", history[:i]) for i in range(41)], 3)
    assert [row.history for row in rows] == [history[max(0, i - 3) : i] for i in range(41)]
    assert sorted(looks) == sorted({one["date"] for one in history})
