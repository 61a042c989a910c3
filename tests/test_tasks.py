"""Tasks: where the query stands, prompts for history items, item texts, look-up."""

from dataclasses import fields, replace
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pplug_hf.data.histories import history_examples
from pplug_hf.data.records import Repairs, examples
from pplug_hf.data.report import describe
from pplug_hf.errors import ConfigurationError, DataError
from pplug_hf.methods.label_frequencies import history_labels
from pplug_hf.modeling.encoders import item_texts
from pplug_hf.tasks.items import day_number, newest_first, parse_date, seconds, text_of
from pplug_hf.tasks.task import TASKS, Task, get_task, score

PROMPTS = {  # one input per task, with {} where the query stands
    "LaMP-1": 'For an author who has written the paper with the title "{}", which reference is related? '
    'Just answer with [1] or [2] without explanation. [1]: "One thing" [2]: "Another thing"',
    "LaMP-2": "Which tag does this movie relate to among the following tags? Just answer with the tag name "
    "without further explanation. tags: [sci-fi, comedy] description: {}",
    "LaMP-3": "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, "
    "or 5 without further explanation. review: {}",
    "LaMP-4": "Generate a headline for the following article: {}",
    "LaMP-5": "Generate a title for the following abstract of a paper: {}",
    "LaMP-6": "Generate a subject for the following email: {}",
    "LaMP-7": "Paraphrase the following tweet without any explanation before or after it: {}",
    "demo": "Which shelf does this reader put the book on? book: {}",
    "LongLaMP-abstract": 'Generate an abstract for the title "{}" using the following items: 1. one thing',
    "LongLaMP-review": "Generate the review text written by a reviewer who has a given an overall rating of "
    '"5.0" for a product with description "{}". The summary of the review text is "good".',
    "LongLaMP-topic": "Generate the content for a reddit post {}",
    "LongLaMP-email": "Generate an email with the subject: {}",
    "LaMP-QA": "Answer the question for the person who asks it. question: {}",
}
QUERIES = [
    "a plain text",
    "with its own marker: description: review: article: paper: book: twice",
    'it says "yes", and "no"',
    "naïve café — 日本語 🎬",
    "two\nlines and {braces} and %s",
    "",
]


def test_every_task_has_a_prompt_here():
    assert list(TASKS) == list(PROMPTS)


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("name", PROMPTS)
def test_query_is_what_the_template_was_filled_with(name, query):
    assert get_task(name).query(PROMPTS[name].format(query)) == query


def test_query_ignores_space_around_it():
    assert get_task("LaMP-3").query("... review:\n  Dull.  ") == "Dull."
    assert get_task("LaMP-3").query("... review:Dull.") == "Dull."


@pytest.mark.parametrize("name", PROMPTS)
def test_query_without_marker_is_the_whole_input(name):
    assert get_task(name).query(" A film about nothing. ") == "A film about nothing."


def test_citation_query_without_its_end_runs_to_the_end():
    assert get_task("LaMP-1").query('the title "A study') == "A study"


@pytest.mark.parametrize("name", [name for name in PROMPTS if not get_task(name).history_prompt_template])
@settings(deadline=None, max_examples=50)
@given(query=st.text(), other=st.text())
def test_prompt_for_replaces_the_query_and_nothing_else(name, query, other):
    task = get_task(name)
    query, other = query.strip(), other.strip()
    like = PROMPTS[name].format(other)
    if name == "LaMP-1" and task.query_end in query + other:
        return  # a title that holds the end of its own frame cannot be told apart
    item = {task.query_field: query}
    assert task.prompt_for(item, like) == PROMPTS[name].format(query)
    assert task.query(task.prompt_for(item, like)) == query


def test_prompt_for_does_not_touch_a_query_that_repeats_the_instruction():
    task = get_task("LaMP-4")
    assert task.prompt_for({"text": "B"}, "Generate a headline: article: headline: article: A") == (
        "Generate a headline: article: B"
    )


def test_item_text_with_and_without_the_answer():
    task = get_task("LaMP-2")
    item = {"id": "1", "tag": "sci-fi", "description": "A {clock} stops.", "date": "1999"}
    assert task.item_text(item) == "sci-fi: A {clock} stops."
    assert task.item_text(item, labelled=False) == "A {clock} stops."


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_null_fields_are_empty_and_missing_ones_an_error(task):
    assert isinstance(task.item_text(dict.fromkeys(task.fields)), str)
    assert "None" not in task.item_text(dict.fromkeys(task.fields))
    with pytest.raises(
        DataError,
        match=r"The item has no field '(title|text|tag|score|description|abstract|overall|summary|content|reviewText)'",
    ) as error:
        task.item_text({"id": "secret"})
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("value", [None, float("nan"), "", "sea", 3, Decimal("3.50")], ids=repr)
def test_everybody_reads_the_same_text_of_an_item(value):
    task, item = TASKS["demo"], {"tag": value, "text": "a castle"}
    expected = "" if value is None or value != value else "3.5" if isinstance(value, Decimal) else str(value)
    assert task.item_text(item) == f"{expected}: a castle"
    assert item_texts([item], task.item_template) == [task.item_text(item)]
    assert replace(task, retrieval_template=task.item_template).retrieval_text(item) == task.item_text(item)
    (read,) = examples([{"input": "book: x", "profile": [item]}], task, "the rows")
    assert task.item_text(read.history[0]) == task.item_text(item)


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_labelled_text_shows_the_answer_where_items_have_one(task):
    if task.answer_field is not None:
        assert "ANSWER" in task.item_text(dict.fromkeys(task.fields) | {task.answer_field: "ANSWER"})


def test_tags_and_scores_are_hidden_when_unlabelled():
    for name in ("LaMP-2", "LaMP-3", "demo"):
        task = get_task(name)
        item = dict.fromkeys(task.fields) | {task.answer_field: "ANSWER"}
        assert "ANSWER" not in task.item_text(item, labelled=False)


def test_fields_follow_from_the_templates():
    assert get_task("LaMP-2").fields == {"description", "tag"}
    assert get_task("LaMP-1").fields == {"title", "abstract"}
    assert get_task("LaMP-7").fields == {"text"}


@pytest.mark.parametrize("name", ["LaMP-2", "LaMP_2", "lamp-2", "lamp_2", " LAMP-2 "])
def test_get_task_accepts_the_usual_spellings(name):
    assert get_task(name) is TASKS["LaMP-2"]


def test_get_task_hands_back_a_task():
    task = replace(TASKS["demo"], name="mine")
    assert get_task(task) is task


@pytest.mark.parametrize("name", ["LaMP-8", "", "news"])
def test_unknown_task_lists_the_options(name):
    with pytest.raises(ConfigurationError, match=r"LaMP-1, LaMP-2.*demo") as error:
        get_task(name)
    assert repr(name) in str(error.value)
    assert isinstance(error.value, ValueError)


def test_every_field_has_its_help():
    assert all(field.metadata.get("help", "").endswith(".") for field in fields(Task))


def test_two_rules_of_the_benchmark():
    assert len(TASKS["LaMP-2"].labels) == len(set(TASKS["LaMP-2"].labels)) == 15
    assert [task.name for task in TASKS.values() if task.answer_field is None] == ["LaMP-1", "LaMP-7", "LaMP-QA"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "bleu"}, "bleu.*accuracy, mae, rouge"),
        ({"query_marker": ""}, "query_marker is empty"),
        ({"labels": "comedy"}, "give a list of texts"),
        ({"labels": ("comedy", " action")}, "without white space"),
        ({"labels": ("comedy", "")}, "none of them empty"),
        ({"labels": ("comedy", 1)}, "give a list of texts"),
        ({"labels": ("comedy", "action", "comedy")}, "give each label once"),
        ({"metric": "mae", "labels": ()}, "needs numbers"),
        ({"metric": "mae", "labels": ("good", "bad")}, "needs numbers"),
    ],
)
def test_impossible_tasks_are_refused(change, message):
    with pytest.raises(ConfigurationError, match=message):
        replace(TASKS["LaMP-2"], **change)


# ---- dates and texts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "numbers"),
    [
        ("2018", (2018,)),
        (2018, (2018,)),
        (" 2018-03 ", (2018, 3)),
        ("2018-3-9", (2018, 3, 9)),
        ("2020-02-29T23:59", (2020, 2, 29, 23, 59)),
        ("2020-02-29 00:00:30", (2020, 2, 29, 0, 0, 30)),
        ("2020-02-29T00:30:00+02:00", (2020, 2, 28, 22, 30, 0)),
        ("2020-02-29 00:30 -0930", (2020, 2, 29, 10, 0)),
        ("2020-02-29T00:30:00Z", (2020, 2, 29, 0, 30, 0)),
        ("2020-02-29 00:30:00.250000+00:00", (2020, 2, 29, 0, 30, 0, 250_000)),
        ("2020-02-29T00:30:00.000000000", (2020, 2, 29, 0, 30, 0)),
        (datetime(2020, 2, 29, 1, tzinfo=timezone(timedelta(hours=3))), (2020, 2, 28, 22, 0, 0)),
        (1582936200, (2020, 2, 29, 0, 30, 0)),
        (1582936200.5, (2020, 2, 29, 0, 30, 0, 500_000)),
        (Decimal("1582936200.5"), (2020, 2, 29, 0, 30, 0, 500_000)),
        ("1582936200000", (2020, 2, 29, 0, 30, 0)),
        (1582936200250.0, (2020, 2, 29, 0, 30, 0, 250_000)),
        (1582936200250000, (2020, 2, 29, 0, 30, 0, 250_000)),
        (1582936200250000000, (2020, 2, 29, 0, 30, 0, 250_000)),
        (2018.0, (2018,)),
    ],
)
def test_dates(value, numbers):
    assert parse_date(value) == numbers


@pytest.mark.parametrize(
    "value",
    [
        *(
            None,
            float("nan"),
            "",
            "soon",
            "0000",
            "2018-13",
            "2018-00",
            "2018-02-29",
            "2018-01-01T24:00",
            "2018-01T10:00",
        ),
        *("0001-01-01T00:00+01:00", "2018-01-01T10:00+99:00", "2018-01-01T10:00 CET", "20180101", 12345678),
        *(20240531123000, "20240531123", 20240531123000123),  # dates without marks, not times of 1970
    ],
)
def test_what_is_not_a_date(value):
    assert parse_date(value) == ()


@given(
    st.lists(
        st.tuples(
            st.datetimes(datetime(1975, 1, 1), datetime(2250, 1, 1)), st.sampled_from([-720, -90, 0, 330, 840, None])
        ),
        min_size=2,
        max_size=6,
    )
)
def test_items_are_in_order_of_time_whatever_their_zones_are(moments):
    dates, true = [], []
    for moment, offset in moments:
        moment = moment.replace(tzinfo=UTC)
        true.append(moment.timestamp())
        zone = None if offset is None else timezone(timedelta(minutes=offset))
        dates.append(str(int(moment.timestamp() * 1000)) if zone is None else moment.astimezone(zone).isoformat())
    read = [seconds(parse_date(text)) for text in dates]
    assert read == pytest.approx(true, abs=2e-3)
    order = newest_first([{"date": text} for text in dates])
    assert [read[i] for i in order] == sorted(read, reverse=True)


def test_a_year_and_a_month_count_as_their_middle():
    days = [date.fromordinal(day_number(parse_date(text))).isoformat() for text in ("2018", "2018-03", "2018-03-09")]
    assert days == ["2018-07-01", "2018-03-15", "2018-03-09"]


DATES = [
    "2018",
    "2018-03-09T01:00+02:00",
    "1520553600000",
    "2018-03",
    "2018-3-9",
    "2019-02-30",
    "2018-03-09 10:00",
    "May",
    "",
]


@given(st.lists(st.sampled_from(DATES), min_size=1, max_size=5))
def test_readers_rankers_and_reports_agree_on_dates(dates):
    task = TASKS["demo"]
    items = [{"text": "x", "tag": "t", "date": text} for text in dates]
    repairs = Repairs()
    (read,) = examples([{"input": "book: y", "profile": items}], task, "the rows", repairs=repairs)
    dated = sum(bool(parse_date(text)) for text in dates)
    unread = sum(repairs[kind].count for kind in ("odd_date", "undated") if kind in repairs)
    assert unread == len(dates) - dated
    if dated == len(dates):
        order = [parse_date(dates[i]) for i in newest_first(read.history)]
        assert order == sorted(order, reverse=True)
    else:
        assert newest_first(read.history) == list(range(len(dates)))[::-1]
    described = describe([replace(read, history=[item]) for item in read.history], task)
    assert bool(described.first_date) == bool(dated)


# ---- labels as numbers ----------------------------------------------------------------------------------------------

STARS = Task(
    name="stars",
    query_marker="review:",
    query_field="text",
    answer_field="rating",
    item_template="{rating} stars: {text}",
    item_template_unlabelled="{text}",
    labels=("1", "2", "3", "4", "5"),
    metric="mae",
    max_new_tokens=4,
)


@pytest.mark.parametrize("given", [5, 5.0, "5", "5.0", "05", "5.00", Decimal("5.0"), np.float32(5), np.int64(5)])
def test_a_number_equal_to_a_label_is_that_label(given):
    for labels, label in ((STARS.labels, "5"), (("1.0", "3.0", "5.0"), "5.0")):
        task, repairs = replace(STARS, labels=labels), Repairs()
        rows = [{"input": "review: it cuts", "output": given, "profile": [{"rating": given, "text": "sharp"}]}]
        (read,) = examples(rows, task, "the rows", repairs=repairs)
        assert read.target == read.history[0]["rating"] == label
        assert task.item_text(read.history[0]) == f"{label} stars: sharp"
        assert history_labels(read, task) == [label]
        (made,) = history_examples([read], task)
        assert made.target == label
        by_hand = replace(read, history=[{"rating": str(given), "text": "sharp"}])
        assert history_labels(by_hand, task) == [label] == [e.target for e in history_examples([by_hand], task)]
        assert describe([by_hand], task).labels.everybody == {label: 1.0}
        assert score(task, ["3"], [str(given)])["mae"] == 2
        assert "foreign_label" not in repairs


@pytest.mark.parametrize("given", ["4.5", "five", "6", "nan", True, "5 stars", "1e400"])
def test_what_is_not_a_label_is_reported_and_never_a_question(given):
    repairs = Repairs()
    items = [{"rating": given, "text": "sharp"}, {"rating": 2.0, "text": "blunt"}, {"rating": None, "text": "new"}]
    (read,) = examples([{"input": "review: x", "output": 1, "profile": items}], STARS, "the rows", repairs=repairs)
    assert repairs["foreign_label"].count == 1 and repairs["foreign_label"].ids == ["0"]
    assert read.history[0]["rating"] == str(given), "the history itself is kept"
    assert [e.target for e in history_examples([read], STARS)] == history_labels(read, STARS) == ["2"]
    assert describe([read], STARS).findings["foreign_labels"].count == 1
    with pytest.raises(DataError, match="must be one of 1, 2, 3, 4, 5"):
        list(examples([{"input": "review: x", "output": given, "profile": []}], STARS, "the rows"))


def test_labels_that_are_the_same_number_stay_apart():
    task = replace(STARS, labels=("1", "1.0", "2"), metric="accuracy")
    assert [task.label_of(text) for text in ("1", "1.0", "1.00", "2.0", "x")] == ["1", "1.0", "1.00", "2", "x"]
    assert replace(STARS, labels=(), metric="accuracy").label_of("5.0") == "5.0"


def test_a_whole_number_reads_the_same_as_integer_and_float():
    assert [text_of(value) for value in (5, 5.0, Decimal("5.00"), np.float64(5), -3.0)] == ["5"] * 4 + ["-3"]
    assert [text_of(value) for value in (5.25, Decimal("5.250"), 1e300, float("inf"))] == [
        "5.25",
        "5.25",
        "1e+300",
        "inf",
    ]
    assert text_of(np.float32("nan")) == text_of(float("nan")) == ""
