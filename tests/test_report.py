"""The report on histories: every number on data small enough to count by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest
from test_lamp import SECRET, gold, item, question, write

from pplug_hf.cli import main
from pplug_hf.data.records import Example
from pplug_hf.data.report import FINDINGS, OTHER, Spread, describe, jaccard
from pplug_hf.tasks.task import TASKS

TASK = TASKS["LaMP-2"]


def example(id_, user, tags, target="comedy", query="an unlike query", **more):
    history = [item(f"{user}{i}", tag, f"film {user} {i}") for i, tag in enumerate(tags)]
    return Example(id_, user, f"description: {query}", query, target, more.get("history", history))


def test_spread():
    spread = Spread.of([4, 1, 3, 2, 10])
    assert (spread.count, spread.min, spread.median, spread.mean, spread.max) == (5, 1, 3, 4, 10)
    assert spread.p90 == pytest.approx(np.percentile([1, 2, 3, 4, 10], 90)) and Spread.of([]) is None


def test_items_are_counted_once_per_user_and_histories_as_they_are():
    report = describe(
        [example("0", "a", ["comedy"] * 3), example("1", "a", ["comedy"] * 5), example("2", "b", [])], TASK
    )
    assert (report.questions, report.users) == (3, 2)
    assert report.history_items == Spread.of([3, 5, 0]) and report.items_per_user == Spread.of([5, 0])
    assert report.questions_per_user == Spread.of([2, 1]) and report.words_per_item == Spread.of([3] * 5)


def test_labels_per_user_against_all():
    rows = [example("0", "a", ["comedy"] * 4, "comedy"), example("1", "b", ["action"] * 3 + ["comedy"], "comedy")]
    labels = describe(rows, TASK).labels
    assert labels.everybody == {"comedy": 5 / 8, "action": 3 / 8} and labels.top_share == 5 / 8
    assert labels.user_top_share == (1 + 0.75) / 2 and labels.total_variation == 3 / 8 and labels.users == 2
    assert (labels.favourite_is_gold, labels.global_favourite_is_gold) == (0.5, 1.0)


def test_chance_is_told_from_taste():
    rng = np.random.default_rng(0)
    alike = [example(str(u), str(u), rng.choice(TASK.labels, 6)) for u in range(200)]
    apart = [example(str(u), str(u), [TASK.labels[u % 15]] * 6) for u in range(200)]
    alike, apart = describe(alike, TASK).labels, describe(apart, TASK).labels
    assert (
        alike.total_variation == pytest.approx(alike.total_variation_by_chance, abs=0.02)
        and alike.total_variation > 0.5
    )
    assert apart.total_variation > 0.9 > apart.total_variation_by_chance
    assert apart.user_top_share == 1 and alike.user_top_share == pytest.approx(alike.user_top_share_by_chance, abs=0.1)


def test_ties_are_broken_by_what_everybody_gives():
    rows = [example("0", "a", ["action", "comedy"], "comedy"), example("1", "b", ["comedy"] * 3)]
    assert describe(rows, TASK).labels.favourite_is_gold == 1


def test_a_label_of_a_repeated_id_alone_is_no_favourite():
    history = [item("1", "action", "a film"), item("1", "comedy", "another film")]
    labels = describe([example("0", "a", [], "action", history=history)], TASK).labels
    assert labels.everybody == {"action": 1.0} and labels.favourite_is_gold == 1.0


def test_what_is_no_label_is_not_shown():
    report = describe([example("0", "a", ["comedy", SECRET])], TASK)
    assert report.labels.everybody == {"comedy": 0.5, OTHER: 0.5} and report.findings["foreign_labels"].count == 1
    own = replace(TASK, labels=())
    rows = [example("0", "a", ["x", SECRET]), example("1", "b", ["x"])]
    assert describe(rows, own).labels.everybody == {"x": 2 / 3, OTHER: 1 / 3}


def test_free_text_and_items_without_answers_have_no_label_balance():
    row = Example("0", "a", "article: x", "x", "y", [{"id": "1", "text": "t", "title": "u", "date": "2001"}])
    assert describe([row], "LaMP-4").labels is None
    assert describe([replace_history(row, [{"id": "1", "text": "t"}])], "LaMP-7").findings.keys() == set()


def replace_history(row, history):
    return Example(row.id, row.user, row.prompt, row.query, row.target, history)


def test_ages():
    dates = ["2001-01-01", "2003-01-01", "2002", "", "2001-02-30", "soon"]
    history = [item(str(i), date=date) for i, date in enumerate(dates)]
    report = describe([example("0", "a", [], history=history)], TASK)
    assert (report.first_date, report.last_date, report.dated_share) == ("2001-01-01", "2003-01-01", 0.5)
    assert report.years_per_history.max == pytest.approx(2, abs=0.01)
    assert [report.age_of_items.min, report.age_of_items.median] == pytest.approx([0, 0.5], abs=0.01)
    undated = describe([example("0", "a", [], history=[item(date="")])], TASK)
    assert undated.dated_share == 0 and undated.age_of_items is None and "no item has one" in str(undated)


def test_findings_by_id():
    query = "one two three four five six seven eight nine"
    history = [
        item("1", "comedy", query.upper().replace(" ", "  ")),
        item("2", "action", query + " ten"),
        item("3", "action", "one two three"),
        item("3", None, "ONE two three"),
        item("4", "action", None),
    ]
    rows = [example("q", "a", [], query=query, history=history), example("e", "b", [], None, query=" ")]
    findings = describe(rows, TASK).findings
    assert {kind: (found.count, found.ids) for kind, found in findings.items()} == {
        "unanswered": (1, ["e"]),
        "empty_query": (1, ["e"]),
        "empty_history": (1, ["e"]),
        "empty_items": (1, ["q"]),
        "unlabelled_items": (1, ["q"]),
        "repeated_ids": (1, ["q"]),
        "repeated_texts": (1, ["q"]),
        "question_in_history": (1, ["q"]),
        "near_question_in_history": (1, ["q"]),
        "answer_in_history": (1, ["q"]),
    }
    assert set(findings) <= set(FINDINGS)


def test_jaccard():
    words = frozenset("abcdefghij")
    assert (
        jaccard(words, words) == 1
        and jaccard(words, words - {"a"}) == 0.9
        and jaccard(words, words | {"k"}) == 10 / 11
    )
    assert (
        jaccard(words, frozenset("abc"))
        == jaccard(frozenset(), frozenset())
        == jaccard(words, frozenset("klmnopqrst"))
        == 0
    )


def test_no_questions():
    report = describe([], TASK)
    assert report.questions == 0 and report.labels is None and "0 questions of 0 users" in str(report)


def test_the_command(tmp_path, capsys):
    write(tmp_path, [question("110", input=SECRET), question("1", user_id="u")], [gold("110"), gold("1")])
    output = tmp_path / "new" / "report.json"
    assert main(["report", "--data", str(tmp_path), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert (
        "LaMP-2: 2 questions of 2 users" in printed
        and "inputs without the text before the query (id '110')" in printed
    )
    saved = json.loads(output.read_text())
    assert saved["questions"] == 2 and saved["repairs"]["no_marker"]["ids"] == ["110"]
    assert saved["labels"]["everybody"] == {"comedy": 1.0} and saved["history_items"]["median"] == 1
    assert SECRET not in printed and SECRET not in output.read_text()


def test_the_command_reads_json_lines_and_questions_alone(tmp_path, capsys):
    (tmp_path / "mine.jsonl").write_text(json.dumps(question(output="comedy")) + "\n" + json.dumps(question("1")))
    assert main(["report", "--data", str(tmp_path / "mine.jsonl"), "--task", "LaMP-2"]) == 0
    assert "1 questions without an answer (id '1')" in capsys.readouterr().out
    assert main(["report", "--data", str(tmp_path / "mine.jsonl")]) == 1
    assert "pass --task" in capsys.readouterr().err
    assert main(["report", "--data", str(tmp_path / "nowhere")]) == 1
