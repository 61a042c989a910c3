"""A metric that is defined here, in one class: a task of one's own names it, and every command uses it."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from test_cli import BACKBONE
from test_own_data import SPLITS, TASK, run, write_lines

from pplug_hf.cli import main
from pplug_hf.commands.fit import FitSettings, fit
from pplug_hf.data.examples import read_examples
from pplug_hf.errors import ConfigurationError
from pplug_hf.evaluation.compare import Comparison
from pplug_hf.evaluation.results import read_results
from pplug_hf.hub.cards import model_index
from pplug_hf.tasks.metrics import METRICS, Metric, get_metric, register_metric, score_titles
from pplug_hf.tasks.task import TASKS, higher_is_better, main_metric, per_example, score


class Meteor(Metric):
    """F of the shared words, less a penalty for each break in their order; weighted by a field of the row."""

    name, main = "meteor", "meteor"
    titles = (("meteor", "METEOR", "meteor"),)
    fields = ("weight",)

    def per_example(self, predictions, golds, task, extra):
        return np.array([w["weight"] * meteor(p, g) for p, g, w in zip(predictions, golds, extra, strict=True)])


def meteor(prediction, gold):
    given, right = prediction.split(), gold.split()
    places = [right.index(word) for word in dict.fromkeys(given) if word in right]
    if not places:
        return 0.0
    precision, recall = len(places) / len(given), len(places) / len(right)
    chunks = 1 + sum(b != a + 1 for a, b in pairwise(places))
    return 10 * precision * recall / (recall + 9 * precision) * (1 - 0.5 * (chunks / len(places)) ** 3)


@pytest.fixture
def task():
    before = METRICS["meteor"]  # the package's own, which has the same name
    register_metric(Meteor(), exist_ok=True)
    yield replace(TASK, name="reviews", metric="meteor", labels=(), answer_field="text", query_field="tag")
    METRICS["meteor"] = before


def rows(split):
    """The shelves' rows with texts for answers, and a field more that the metric reads, and one that nobody does."""
    return [{**row, "output": f"the {row['output']} castle", "weight": 0.5, "secret": "x"} for row in SPLITS[split]]


def test_a_task_knows_what_its_metric_is_like(task):
    assert task.is_free_text and not task.has_labelled_items
    assert (main_metric(task), higher_is_better(task)) == ("meteor", True)
    assert score_titles()["meteor"] == ("METEOR", "meteor", True)
    assert [TASKS[name].is_free_text for name in TASKS] == [False] * 3 + [True] * 4 + [False] + [True] * 5
    assert [TASKS[name].has_labelled_items for name in TASKS] == [False, True, True] + [False] * 4 + [True] + [
        False
    ] * 5


def test_scores_follow_from_one_method(task):
    weights = [{"weight": 1}, {"weight": 0.5}]
    values = per_example(task, [" a b ", ""], ["a b", "c"], extra=weights)
    assert values.tolist() == [pytest.approx(0.9375), 0]
    assert score(task, ["a b", ""], ["a b", "c"], extra=weights) == {"meteor": values.mean(), "unparsed": 1}


def test_only_fields_that_a_metric_names_are_kept(task):
    _, examples = read_examples(rows("dev"), "dev", task)
    assert [e.extra for e in examples] == [{"weight": 0.5}] * 4
    _, plain = read_examples(rows("dev"), "dev", replace(task, metric="rouge"))
    assert [e.extra for e in plain] == [{}] * 4


def test_the_bench_uses_it(task, tmp_path, capsys):
    for split in ("train", "dev"):
        write_lines(tmp_path / "data" / f"{split}.jsonl", rows(split))
    content = {"name": "reviews", "metric": "meteor", "query_marker": "book:", "query_field": "tag"}
    content |= {"answer_field": "text", "item_template": "{tag}: {text}", "item_template_unlabelled": "{text}"}
    (tmp_path / "task.json").write_text(json.dumps({**content, "max_new_tokens": 4}))
    options = ["--rows", "no-persona", "recency@1", "--vectors", tmp_path / "vectors", "--output", tmp_path / "out"]
    named = ["--task", tmp_path / "task.json", "--data", tmp_path / "data"]
    printed = run("bench", *named, "--backbone", BACKBONE, *options)
    assert "| meteor |" in " ".join(printed.split()) and "for meteor." in printed
    found = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    answers = json.loads((tmp_path / "out" / "predictions" / "no-persona.json").read_text())["golds"]
    expected = [
        0.5 * meteor(each["output"].strip(), row["output"]) for each, row in zip(answers, rows("dev"), strict=True)
    ]
    assert found[0]["row"] == "no-persona" and found[0]["meteor"] == pytest.approx(np.mean(expected))

    results = {**json.loads((tmp_path / "out" / "results.json").read_text()), "reference": "mine"}
    results |= {"rows": [{**found[0], "row": "mine"}], "settings": {**results["settings"], "plugs": ["mine=x"]}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    shown = read_results(tmp_path)
    assert shown["metrics"] == {"meteor": "METEOR"} and shown["rows"][0]["meteor"] == found[0]["meteor"]
    assert model_index(shown, "plug", None)[0]["results"][0]["metrics"][0]["type"] == "meteor"

    golds = tmp_path / "golds.json"
    golds.write_text(json.dumps({"task": "reviews", "golds": [{"id": "1", "output": "x"}]}))
    arguments = ["score", "--golds", golds, "--predictions", golds, "--task", tmp_path / "task.json"]
    assert main([str(a) for a in arguments]) == 1
    assert "The metric 'meteor' needs the fields weight of the rows" in capsys.readouterr().err


def test_a_comparison_is_in_its_direction(task):
    class Distance(Meteor):
        name, main, titles, fields = "distance", "distance", (("distance", "distance", ""),), ()
        higher_is_better = False

        def per_example(self, predictions, golds, task):
            return np.array([float(p != g) for p, g in zip(predictions, golds, strict=True)])

    register_metric(Distance())
    try:
        task = replace(task, metric="distance")
        _, examples = read_examples(rows("dev"), "dev", task)
        right = [str(e.target) for e in examples]
        made = Comparison(task, examples, "good", {"good": [right], "bad": [["no"] * 4]})
        assert made.rows()[1]["gain"][0] == 1
    finally:
        del METRICS["distance"]


def test_scores_of_its_own_hold_wherever_it_judges(task):
    class Two(Meteor):
        fields = ()

        def per_example(self, predictions, golds, task):
            return np.array([float(p == g) for p, g in zip(predictions, golds, strict=True)])

        def score(self, predictions, golds, task):
            return super().score(predictions, golds, task) | {"words": 7.0}

    register_metric(Two(), exist_ok=True)
    _, examples = read_examples(rows("dev"), "dev", task)
    made = Comparison(task, examples, "good", {"good": [[str(e.target) for e in examples]]})
    assert {name: made.rows()[0][name] for name in ("meteor", "words")} == {"meteor": 1, "words": 7}


@pytest.mark.parametrize("method, options", [("rspg-pre", {}), ("ropg-rl", {"encoder": "e", "reward": "metric"})])
def test_nothing_is_trained_for_a_judge_that_cannot_judge(task, tmp_path, method, options):
    class Broken(Meteor):
        fields = ()

        def check(self):
            raise ConfigurationError("no judge here")

    register_metric(Broken(), exist_ok=True)
    settings = FitSettings(method=method, data="mine", output=str(tmp_path / "out"), backbone=BACKBONE)
    with pytest.raises(ConfigurationError, match="no judge here"):
        fit(settings, task, {"train": rows("train")}, **options)
    assert not (tmp_path / "out").exists()


def test_names_are_taken_once(task):
    with pytest.raises(ConfigurationError, match="There is a metric 'meteor' already: pass exist_ok=True"):
        register_metric(Meteor())
    register_metric(own := Meteor(), exist_ok=True)
    assert get_metric("meteor") is own
    with pytest.raises(
        ConfigurationError, match=r"There is no metric 'bleu'; choose one of accuracy, mae, rouge.*meteor"
    ):
        get_metric("bleu")
