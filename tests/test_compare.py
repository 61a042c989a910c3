"""The table of results: numbers against their definitions, files without histories."""

import json
import statistics

import pytest

from pplug_hf.data.lamp import Example
from pplug_hf.errors import MismatchError
from pplug_hf.evaluation.compare import Comparison
from pplug_hf.evaluation.rendering import markdown, save
from pplug_hf.evaluation.user_statistics import paired_bootstrap
from pplug_hf.storage.files import write_text
from pplug_hf.tasks.task import TASKS

USERS = ["u1", "u1", "u2", "u3", "u3", "u3"]
SECRET = "what nobody but the user shall read"
MOVIES = ["comedy", "action", "comedy", "classic", "action", "comedy"]
STARS = ["1", "5", "3", "4", "2", "5"]


def comparison(task, golds, reference="ours", **rows):
    examples = [
        Example(f"{10 + i}", user, f"prompt {i}", f"query {i}", gold, [{"text": SECRET, "title": SECRET}])
        for i, (user, gold) in enumerate(zip(USERS, golds, strict=True))
    ]
    made = Comparison(TASKS[task], examples, reference)
    for name, runs in rows.items():
        for answers in runs:
            made.add(name.replace("_", " "), answers)
    return made


@pytest.fixture
def movies():
    return comparison(
        "LaMP-2",
        MOVIES,
        ours=[["comedy", "action", "comedy", "action", "action", "comedy"], ["comedy"] * 6],
        no_persona=[["comedy", "classic", "action", "classic", "no label", ""]],
    )


@pytest.fixture
def stars():
    ours = [["1", "4", "3", "4", "2", "5"], ["2", "5", "3", "5", "2", "5"]]
    return comparison("LaMP-3", STARS, ours=ours, mean=[["3"] * 6, ["1", "x", "3", "4", "2", "4"]])


def by_name(made):
    return {record["row"]: record for record in made.rows()}


# ---- numbers ----------------------------------------------------------------------------------------------------


def test_metrics_are_means_over_seeds(movies):
    rows = by_name(movies)
    shares = [5 / 6, 3 / 6]
    assert rows["ours"]["seeds"] == 2 and rows["no persona"]["seeds"] == 1
    assert rows["ours"]["accuracy"] == pytest.approx(statistics.mean(shares))
    assert rows["ours"]["accuracy_sd"] == pytest.approx(statistics.stdev(shares))
    assert rows["no persona"]["accuracy"] == pytest.approx(2 / 6) and "accuracy_sd" not in rows["no persona"]
    assert rows["no persona"]["unparsed"] == 2 and rows["ours"]["unparsed"] == 0
    # F1 of comedy, action, classic in both runs by hand; the twelve other labels count as 0.
    assert rows["ours"]["f1"] == pytest.approx(statistics.mean([(1 + 4 / 5 + 0) / 15, (2 * 3 / 9) / 15]))


def test_the_gain_is_how_much_better_the_reference_is(movies):
    rows = by_name(movies)
    ours = [1, 0.5, 1, 0, 0.5, 1]  # mean over both seeds, example by example
    theirs = [1, 0, 0, 1, 0, 0]
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    gain = rows["no persona"]["gain"]
    assert gain[0] == pytest.approx(statistics.mean(differences))
    assert gain == pytest.approx(list(paired_bootstrap(ours, theirs, USERS)))
    by_user = [sum(differences[:2]) / 2, differences[2], sum(differences[3:]) / 3]
    assert min(by_user) <= gain[1] < gain[0] < gain[2] <= max(by_user)  # resampled by user
    assert "gain" not in rows["ours"]


def test_less_error_is_a_gain(stars):
    rows = by_name(stars)
    ours = [[0, 1, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0]]
    theirs = [[2, 2, 0, 1, 1, 2], [0, 4, 0, 0, 0, 1]]  # "x" is as far from the gold as can be
    for name, errors in (("ours", ours), ("mean", theirs)):
        maes = [statistics.mean(run) for run in errors]
        assert rows[name]["mae"] == pytest.approx(statistics.mean(maes))
        assert rows[name]["mae_sd"] == pytest.approx(statistics.stdev(maes))
        rmses = [statistics.mean(e * e for e in run) ** 0.5 for run in errors]
        assert rows[name]["rmse"] == pytest.approx(statistics.mean(rmses))
    assert rows["mean"]["unparsed"] == 0.5
    gain = rows["mean"]["gain"]
    assert gain[0] == pytest.approx(rows["mean"]["mae"] - rows["ours"]["mae"]) and gain[0] > 0
    assert gain[1] <= gain[0] <= gain[2]


def test_texts_are_compared_by_words():
    golds = ["the cat sat", "a b", "x", "y", "z", "w"]
    answers = ["the cat", "a b", "q", "q", "q", "q"]
    rows = by_name(comparison("LaMP-4", golds, ours=[answers], other=[golds]))
    assert rows["ours"]["rouge-1"] == pytest.approx((0.8 + 1) / 6) and rows["other"]["rouge-L"] == 1
    assert rows["other"]["gain"][0] == pytest.approx(1.8 / 6 - 1)


def test_a_row_without_its_reference_has_no_gain():
    assert "gain" not in by_name(comparison("LaMP-2", MOVIES, reference="absent", ours=[MOVIES]))["ours"]


def test_answers_that_are_too_few_are_refused(tmp_path):
    made = comparison("LaMP-2", MOVIES, ours=[MOVIES[:5]])
    with pytest.raises(MismatchError, match="5"):
        save(made, tmp_path)
    assert not list(tmp_path.rglob("*.json"))


# ---- table and files --------------------------------------------------------------------------------------------


def cells(markdown):
    """A Markdown table as rows of cells, by the rules of GitHub."""
    lines = [line.replace("\\|", "\0") for line in markdown.splitlines()]
    lines = [line for line in lines if line][:-1]  # without the note below, for these users are few
    assert all(line.startswith("| ") and line.endswith(" |") for line in lines)
    rows = [[cell.strip().replace("\0", "|") for cell in line[1:-1].split("|")] for line in lines]
    assert len({len(row) for row in rows}) == 1
    assert set("".join(rows[1])) == {"-"} and all(len(cell) >= 3 for cell in rows[1])
    return [rows[0], *rows[2:]]


def test_the_table_shows_the_numbers(stars):
    head, ours, mean = cells(markdown(stars))
    assert head == ["row", "mae", "rmse", "unparsed", "ours is better by [95 %]"]
    assert ours[0] == "ours (2 seeds)" and ours[1] == f"{0.25:.3f} ± {0.1178511:.3f}" and ours[-1] == ""
    record = by_name(stars)["mean"]
    assert mean[-1] == "{:+.3f} [{:+.3f}, {:+.3f}]".format(*record["gain"])
    assert mean[2] == f"{record['rmse']:.3f}"


def test_the_table_survives_odd_names():
    made = comparison("LaMP-2", MOVIES, reference="a|b")
    made.add("a|b", MOVIES)
    made.add("ours, k ≤ 4", MOVIES)
    assert [row[0] for row in cells(markdown(made))] == ["row", "a|b", "ours, k ≤ 4"]


def test_saved_files_are_the_benchmarks(movies, tmp_path):
    movies.add("another's history", ["über 海 🌊", *MOVIES[1:]])
    save(movies, tmp_path / "new" / "results", beams=4)
    folder = tmp_path / "new" / "results"
    results = json.loads((folder / "results.json").read_text("utf-8"))
    assert results["rows"] == movies.rows() and results["settings"] == {"beams": 4}
    assert (results["task"], results["examples"], results["users"], results["reference"]) == ("LaMP-2", 6, 3, "ours")
    assert (folder / "table.md").read_text("utf-8") == markdown(movies) + "\n"
    saved = {path.name: json.loads(path.read_text("utf-8")) for path in (folder / "predictions").iterdir()}
    answers = dict(zip(["ours-0.json", "ours-1.json"], movies.predictions["ours"], strict=True))
    answers["no_persona.json"] = movies.predictions["no persona"][0]
    answers["anothers_history.json"] = movies.predictions["another's history"][0]
    assert set(saved) == set(answers)
    for name, content in saved.items():
        assert content["task"] == "LaMP_2"
        expected = [{"id": f"{10 + i}", "output": text} for i, text in enumerate(answers[name])]
        assert content["golds"] == expected


def test_no_history_is_saved(movies, stars, tmp_path):
    save(movies, tmp_path / "movies")
    save(stars, tmp_path / "stars")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 8
    assert not any(SECRET in path.read_text("utf-8") for path in files)


def test_rows_of_similar_names_do_not_overwrite_each_other(tmp_path):
    made = comparison("LaMP-2", MOVIES)
    names = ["k 1", "k_1", "k'1", "k/1", "../k1"]
    for number, name in enumerate(names):
        made.add(name, [f"{number}"] * 6)
    save(made, tmp_path / "results")
    files = list((tmp_path / "results" / "predictions").iterdir())
    assert sorted(json.loads(path.read_text())["golds"][0]["output"] for path in files) == list("01234")
    assert {path.name for path in tmp_path.iterdir()} == {"results"}


def test_saving_again_replaces(movies, tmp_path):
    save(movies, tmp_path)
    save(movies, tmp_path, again=True)
    assert json.loads((tmp_path / "results.json").read_text())["settings"] == {"again": True}
    assert len([path for path in tmp_path.iterdir()]) == 3  # nothing temporary stays


def test_files_can_be_read_by_others(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("")
    write_text(tmp_path / "ours", "é")
    assert (tmp_path / "ours").stat().st_mode == plain.stat().st_mode


def test_a_table_of_few_users_says_what_it_cannot_show():
    def table(users):
        examples = [Example(f"{i}", f"u{i}", "", "", "sea", []) for i in range(users)]
        made = Comparison(TASKS["demo"], examples, "a")
        made.add("a", ["sea"] * users)
        return markdown(made)

    assert table(20).endswith("|") and "too few" not in table(20)
    assert table(19).endswith(
        "\n\n19 users: too few to conclude that a row is better than another, or that it is not, for anybody else. "
        "Intervals over fewer than 20 users are too narrow."
    )
    assert "\n\nOne user: too few to conclude" in table(1)
