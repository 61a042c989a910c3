"""The best, the worst and any of the answers of several rows, beside what chance gives."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
from bench_data import SHELVES, make_world, predictions, quietly, settings_for

from pplug_hf.data.examples import read_examples
from pplug_hf.data.records import Example
from pplug_hf.errors import ConfigurationError, MissingFileError
from pplug_hf.evaluation.compare import Comparison
from pplug_hf.evaluation.pools import Pool, add_pool, parse_pools
from pplug_hf.evaluation.results import read_results
from pplug_hf.methods.base import Retrieval
from pplug_hf.methods.names import name_of
from pplug_hf.methods.resources import Resources
from pplug_hf.tasks.task import TASKS

ROWS = ("no-persona", "bm25@4", "pplug")


def comparison(task, golds, rows):
    examples = [Example(f"{i}", f"u{i // 2}", "", "", gold, []) for i, gold in enumerate(golds)]
    return Comparison(TASKS[task], examples, next(iter(rows)), {row: runs for row, runs in rows.items()})


def scores_of(made):
    return {record["row"]: record["mae" if made.task.metric == "mae" else "accuracy"] for record in made.rows()}


def test_bounds_by_hand():
    made = comparison(
        "LaMP-3",
        ["1", "5", "3", "2"],
        {"a": [["1", "1", "3", "5"]], "b": [["2", "5", "3", "5"]], "c": [["1", "4", "3", "2"]]},
    )
    found = add_pool(made, Pool("p", ("a", "b", "c")), choosers=["absent"])
    assert made.predictions["p:oracle"] == [["1", "5", "3", "2"]]
    assert made.predictions["p:worst"] == [["2", "1", "3", "5"]]
    draws = [random.Random(f"0/{i}").randrange(3) for i in range(4)]
    drawn = [made.predictions["abc"[draw]][0][i] for i, draw in enumerate(draws)]
    assert made.predictions["p:random"] == [drawn]
    assert found["tied"] == 0.25 and found["chance"] is None and "p:chance" not in made.predictions
    assert {row: found["best"][row] for row in "abc"} == {"a": 0.5, "b": 0.5, "c": 0.75}
    assert found["best"]["p:random"] == np.mean([a == b for a, b in zip(drawn, "1532", strict=True)])
    assert found["wins"] == pytest.approx(
        {"a": (0.5 + 0 + 1 / 3 + 0) / 4, "b": (0 + 1 + 1 / 3 + 0) / 4, "c": (0.5 + 0 + 1 / 3 + 1) / 4}
    )
    assert sum(found["wins"].values()) == pytest.approx(1)


def test_a_row_with_fewer_seeds_is_compared_with_the_best_of_every_run():
    rows = {"a": [["sea", "moon"]], "b": [["moon", "moon"], ["moon", "sea"], ["sea", "sea"]]}
    found = add_pool(comparison("demo", ["sea", "sea"], rows), Pool("p", ("a", "b")))
    assert [found["best"][row] for row in "ab"] == pytest.approx([(2 + 1 + 1) / 6, (1 + 1 + 2) / 6])
    assert found["wins"] == pytest.approx({"a": (1.5 + 1 + 0.5) / 6, "b": (0.5 + 1 + 1.5) / 6})


def test_of_equally_good_answers_that_of_the_first_row_counts():
    rows = {"a": [["moon", "sea"]], "b": [["war", "sea"]]}
    made = comparison("demo", ["sea", "sea"], rows)
    add_pool(made, Pool("p", ("b", "a")))
    assert made.predictions["p:oracle"] == made.predictions["p:worst"] == [["war", "sea"]]


def test_no_row_is_better_than_the_best_nor_worse_than_the_worst():
    rng = random.Random(0)
    golds = [rng.choice("12345") for _ in range(60)]
    rows = {f"row{i}": [[rng.choice("12345") for _ in golds] for _ in range(runs)] for i, runs in enumerate((1, 3, 2))}
    made = comparison("LaMP-3", golds, rows)
    add_pool(made, Pool("p", tuple(rows)))
    scores = scores_of(made)
    assert len(made.predictions["p:oracle"]) == 3, "as many runs as the row with most"
    assert all(scores["p:oracle"] <= scores[row] <= scores["p:worst"] for row in rows)
    assert scores["p:oracle"] < scores["p:random"] < scores["p:worst"]
    other = comparison("LaMP-3", golds, rows)
    add_pool(other, Pool("p", tuple(reversed(rows))))
    assert scores_of(other)["p:oracle"] == scores["p:oracle"] and scores_of(other)["p:worst"] == scores["p:worst"]


def test_chance_is_the_best_of_as_many_random_runs():
    rng = random.Random(1)
    golds = [rng.choice("12345") for _ in range(40)]
    draws = [[rng.choice("12345") for _ in golds] for _ in range(4)]
    rows = {"a": [draws[3]], "b": [draws[2]], "c": [draws[1]], "random@4": draws}
    made = comparison("LaMP-3", golds, rows)
    assert add_pool(made, Pool("two", ("a", "b")))["chance"] == 2
    assert add_pool(made, Pool("three", ("a", "b", "c")))["chance"] == 3
    for name, R in (("two", 2), ("three", 3)):
        best = [min(abs(int(run[i]) - int(gold)) for run in draws[:R]) for i, gold in enumerate(golds)]
        assert scores_of(made)[f"{name}:chance"] == pytest.approx(np.mean(best))


def test_bounds_are_in_no_test_over_users():
    rows = {"a": [["sea", "moon"]], "b": [["war", "sea"]], "c": [["sea", "sea"]]}
    made = comparison("demo", ["sea", "sea"], rows)
    before = made.per_user()
    add_pool(made, Pool("p", ("b", "c")))
    assert made.per_user() == before and [record["row"] for record in before] == ["b", "c"]


def test_pools_are_read():
    assert parse_pools(["a, b@4", "x=a,b"]) == [Pool("pool", ("a", "b@4")), Pool("x", ("a", "b"))]
    for texts, message in (
        (["a"], "two or more different rows"),
        (["a,a"], "two or more different rows"),
        (["a,b,"], "two or more different rows"),
        (["=a,b"], "use letters"),
        (["bm25=a,b"], "none of"),
        (["a,b", "c,d"], "two pools named 'pool'"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            parse_pools(texts)
    with pytest.raises(ConfigurationError, match=r"The pool p chooses from c, and there is no such row.*a, b"):
        add_pool(comparison("demo", ["sea"], {"a": [["sea"]], "b": [["sea"]]}), Pool("p", ("a", "c")))


# ---- a bench --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(places, tmp_path_factory):
    return make_world(places, tmp_path_factory.mktemp("pools"))


def test_a_bench_shows_a_pool(world, tmp_path):
    asked = settings_for(world, tmp_path, "pplug", "random@4", oracle=["no-persona,bm25@04,pplug"])
    quietly(asked, task=SHELVES)
    results = json.loads((tmp_path / "results.json").read_text())
    bounds = ["pool:oracle", "pool:worst", "pool:random", "pool:chance"]
    assert [record["row"] for record in results["rows"]] == ["pplug", "random@4", "no-persona", "bm25@4", *bounds]
    assert [record["row"] for record in results["rows"] if record.get("bound")] == bounds
    assert [row["name"] for row in read_results(tmp_path)["rows"]] == ["pplug", "no-persona", "random@4", "bm25@4"]
    (pool,) = results["pools"]
    assert pool["rows"] == list(ROWS) and pool["chance"] == 3 and pool["best"].keys() == {*ROWS, "pool:random"}
    saved = predictions(tmp_path)
    assert {name for name in saved if "random" in name} == {"random@4.json", "random@4,1.json", "random@4,2.json"}
    assert [saved[f"random@4{run}.json"]["key"]["seed"] for run in ("", ",1", ",2")] == [0, 1, 2]
    assert not any("pool" in name for name in saved), "bounds are no predictions"
    scores = {record["row"]: record["accuracy"] for record in results["rows"]}
    assert all(scores["pool:worst"] <= scores[row] <= scores["pool:oracle"] for row in ROWS)
    table = (tmp_path / "table.md").read_text()
    assert "pool chooses between the answers of no-persona, bm25@4, pplug" in table
    assert "pool:chance is the best of 3 draws of random@4" in table
    assert "pool:oracle" not in [record["row"] for record in results["per_user"]["rows"]]

    # From the predictions alone, by another name, and with a row that is not there.
    asked = settings_for(world, tmp_path, plugs=None, tables_only=True, oracle=["gate=no-persona,pplug"])
    again, _ = quietly(asked, task=SHELVES)
    assert again.predictions["gate:chance"] and json.loads((tmp_path / "results.json").read_text())["pools"]
    asked = settings_for(world, tmp_path, "no-persona", plugs=None, tables_only=True, oracle=["no-persona,mean"])
    with pytest.raises(MissingFileError, match="no predictions of the row 'mean'"):
        quietly(asked, task=SHELVES)
    asked = settings_for(world, tmp_path / "none", "no-persona", oracle=["no-persona,ghost"])
    with pytest.raises(ConfigurationError, match="There is no row 'ghost'"):
        quietly(asked, task=SHELVES)


@pytest.mark.parametrize("plugs", [True, False], ids=["named", "not named"])
def test_the_tables_of_a_pool_come_back_from_the_predictions(world, tmp_path, plugs):
    """Its rows that were not asked for otherwise, and the draws of chance, included."""
    asked = settings_for(world, tmp_path, "pplug", "no-persona", oracle=["no-persona,bm25@04,pplug"])
    quietly(asked, task=SHELVES)
    table = (tmp_path / "table.md").read_text()
    (tmp_path / "table.md").unlink()
    quietly(replace(asked, tables_only=True, plugs=asked.plugs if plugs else None), task=SHELVES)
    assert (tmp_path / "table.md").read_text() == table and "pool:chance" in table

    (tmp_path / "predictions" / "random@4,2.json").unlink()  # one draw too few
    made, _ = quietly(replace(asked, tables_only=True, plugs=asked.plugs if plugs else None), task=SHELVES)
    assert list(made.predictions) == ["pplug", "no-persona", "bm25@4", "pool:oracle", "pool:worst", "pool:random"]


def test_draws_of_random_retrieval_find_other_items(world):
    task, examples = read_examples(str(world / "shelves"), "dev", SHELVES)
    resources = Resources(task, vectors=str(world / "vectors"), seed=1)
    first, second = (Retrieval("random", 2, draw=draw).items(examples, resources) for draw in (0, 1))
    assert first != second == Retrieval("random", 2).items(examples, Resources(task, seed=2))
    assert (
        Retrieval("random", 2, draw=1).key(resources) == {"seed": 2} and name_of(Retrieval("random", 2)) == "random@2"
    )
