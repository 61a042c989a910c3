"""`pplug-hf score` on files, and the modules for `evaluate`; both against scikit-learn and rouge-score."""

import gzip
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import SpaceCardData
from huggingface_hub.repocard import RepoCard
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, mean_squared_error
from test_cli import fails

import pplug_hf.metrics
from pplug_hf.cli import main
from pplug_hf.errors import ConfigurationError, MismatchError
from pplug_hf.tasks.lamp.lamp_2 import MOVIE_TAGS
from pplug_hf.tasks.lamp_metrics import score_labels, score_ratings, score_texts
from pplug_hf.tasks.task import get_task, score

evaluate = pytest.importorskip("evaluate")

TAGS, STARS = list(MOVIE_TAGS), list("12345")
odd = [
    "",
    " ",
    "Comedy",
    "comedy.",
    "I think comedy",
    "a comedy, or action",
    "dark  comedy",
    "\uff43omedy",
    "комедия",
    "no\n",
]
tags = st.sampled_from([*TAGS, *(f" {tag}\t\n" for tag in TAGS), *odd]) | st.text(max_size=8)
numbers = [
    "3.5",
    "7",
    " 2\n",
    "0",
    "-1",
    "1e0",
    "5.",
    "\uff14",
    "1_0",
    "nan",
    "-inf",
    "1e999",
    "4 stars",
    "five",
    "½",
    "",
    "3,5",
]
ratings = st.sampled_from([*STARS, *numbers]) | st.text("0123456789 .-e五", max_size=4)
titles = st.text("ab cAB1é,.日", max_size=30) | st.text(max_size=20)


def pairs(prediction, gold):
    return st.lists(st.tuples(prediction, gold), min_size=1, max_size=30)


def columns(rows):
    return [list(column) for column in zip(*rows, strict=True)]


# ---- the rules, against the libraries ---------------------------------------------------------------------------


@settings(deadline=None)
@given(pairs(tags, st.sampled_from(TAGS)))
def test_labels(rows):
    predictions, golds = columns(rows)
    y_pred = [TAGS.index(text.strip()) if text.strip() in TAGS else -1 for text in predictions]
    y_true = [TAGS.index(text) for text in golds]
    f1 = f1_score(y_true, y_pred, labels=range(len(TAGS)), average="macro", zero_division=0)
    expected = {"accuracy": accuracy_score(y_true, y_pred), "f1": f1, "unparsed": y_pred.count(-1)}
    assert score_labels(predictions, golds, TAGS) == pytest.approx(expected)
    assert score("LaMP-2", predictions, golds) == pytest.approx(expected)


def first_digit(text):
    return next((float(letter) for letter in text if letter in "0123456789"), 1.0)


@settings(deadline=None)
@given(pairs(ratings, st.sampled_from(STARS)), st.sampled_from(["farthest", "first-digit"]))
def test_ratings(rows, fallback):
    predictions, golds = columns(rows)
    y_pred, unparsed = [], 0
    for prediction, gold in rows:
        try:
            value = float(prediction)
            assert math.isfinite(value)
        except (ValueError, AssertionError):
            farthest = 1.0 if abs(1 - float(gold)) > abs(5 - float(gold)) else 5.0
            value = farthest if fallback == "farthest" else first_digit(prediction)
            unparsed += 1
        y_pred.append(value)
    y_true = [float(gold) for gold in golds]
    expected = {
        "mae": mean_absolute_error(y_true, y_pred),
        "rmse": math.sqrt(mean_squared_error(y_true, y_pred)),
        "unparsed": unparsed,
    }
    assert score_ratings(predictions, golds, STARS, fallback=fallback) == pytest.approx(expected)
    assert score("LaMP-3", predictions, golds, fallback=fallback) == pytest.approx(expected)


@settings(deadline=None)
@given(pairs(titles, titles))
def test_texts(rows):
    predictions, golds = columns(rows)
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    scores = [scorer.score(target=gold, prediction=prediction) for prediction, gold in rows]
    expected = {
        "rouge-1": sum(each["rouge1"].fmeasure for each in scores) / len(rows),
        "rouge-L": sum(each["rougeL"].fmeasure for each in scores) / len(rows),
        "unparsed": sum(not re.search("[a-z0-9]", text.lower()) for text in predictions),
    }
    assert score_texts(predictions, golds) == pytest.approx(expected)
    assert score("LaMP-4", predictions, golds) == pytest.approx(expected)


def test_one_long_answer_does_not_fill_the_memory():
    """An array of texts gives each the room of the longest: 40 MB here, times the 20,000 of them."""
    long = "x" * 10_000_000
    predictions = ["comedy"] * 20_000 + [long]
    assert score_labels(predictions, ["comedy"] * 20_001, TAGS)["unparsed"] == 1
    assert score_ratings([long, "1" * 10_000_000], ["1", "1"], STARS) == {"mae": 4, "rmse": 4, "unparsed": 2}


def test_a_number_beyond_all_bounds():
    assert score_ratings(["1e200"], ["1"], STARS) == {"mae": 1e200, "rmse": pytest.approx(1e200), "unparsed": 0}


def test_a_scale_needs_numbers():
    with pytest.raises(ConfigurationError, match="a scale needs numbers"):
        score_ratings(["1"], ["1"], ["1", "many"])
    with pytest.raises(ConfigurationError, match="a scale needs numbers"):
        score_ratings(["1"], ["1"], [])


# ---- modules for evaluate ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("evaluate"))

    def load(name, *config):
        return evaluate.load(pplug_hf.metrics.path(name), *config, cache_dir=cache)

    return load


ODD = {
    "LaMP-2": (["comedy", " action\n", "Comedy", "a comedy", "", "喜剧"], ["comedy", "action", *["comedy"] * 4]),
    "LaMP-3": (["4", "3.5", "7", "", "4 stars", "nan", "\uff15"], list("5431245")),
    "LaMP-4": (["The cat", "", "日本", "cats"], ["the cat!", "a", "日本", "cat"]),
}


@pytest.mark.parametrize(
    "name, config", [("lamp_accuracy", "LaMP-2"), ("lamp_mae", "LaMP-3"), ("lamp_rouge", "LaMP-4")]
)
def test_a_module_is_the_rule(modules, name, config):
    predictions, references = ODD[config]
    module = modules(name, config)
    assert module.compute(predictions=predictions, references=references) == score(config, predictions, references)
    for prediction, reference in zip(predictions, references, strict=True):
        module.add(prediction=prediction, reference=reference)
    assert module.compute() == score(config, predictions, references)
    assert "unparsed" in module.inputs_description and module.features.keys() == {"predictions", "references"}


def test_options_of_the_modules(modules):
    predictions, references = ODD["LaMP-3"]
    given = {"predictions": predictions, "references": references}
    ratings = modules("lamp_mae")
    assert ratings.compute(**given) == score("LaMP-3", *ODD["LaMP-3"])
    assert ratings.compute(**given, fallback="first-digit") == score("LaMP-3", *ODD["LaMP-3"], fallback="first-digit")
    wide = [str(i) for i in range(11)]
    assert ratings.compute(**given, labels=wide) == score_ratings(predictions, references, wide)
    labels = modules("lamp_accuracy")
    assert labels.compute(**given) == score_labels(predictions, references)
    assert labels.compute(**given, labels=wide) == score_labels(predictions, references, wide)
    with pytest.raises(MismatchError, match="are not labels"):
        modules("lamp_accuracy", "LaMP-2").compute(**given)
    with pytest.raises(ConfigurationError, match="choose one of LaMP-1"):
        modules("lamp_mae", "LaMP-33")


def test_modules_combine(modules):
    predictions, references = ODD["LaMP-3"]
    together = evaluate.combine([modules("lamp_accuracy", "LaMP-3"), modules("lamp_mae"), modules("lamp_rouge")])
    numbers = together.compute(predictions=predictions, references=references)
    assert numbers["accuracy"] == score_labels(predictions, references, STARS)["accuracy"]
    assert numbers["mae"] == score("LaMP-3", predictions, references)["mae"]
    assert numbers["lamp_mae_unparsed"] == 3 and numbers["lamp_rouge_unparsed"] == 2  # empty, and without a-z and 0-9


def test_the_folder_of_a_module():
    for name in pplug_hf.metrics.NAMES:
        assert (Path(pplug_hf.metrics.path(name)) / f"{name}.py").is_file()
    with pytest.raises(ConfigurationError, match="lamp_accuracy, lamp_mae, lamp_rouge"):
        pplug_hf.metrics.path("rouge")


@pytest.mark.parametrize("name", pplug_hf.metrics.NAMES)
def test_a_folder_is_a_space(name):
    folder = Path(pplug_hf.metrics.path(name))
    card = RepoCard.load(folder / "README.md")
    data = SpaceCardData(**card.data.to_dict())
    assert data.sdk == "gradio" and data.license == "apache-2.0" and {"evaluate", "metric"} <= set(data.tags)
    assert (folder / data.app_file).is_file() and name in (folder / data.app_file).read_text()
    assert (folder / "requirements.txt").read_text() == "pplug-hf[eval]\n"


@pytest.mark.parametrize("name", pplug_hf.metrics.NAMES)
def test_a_card_shows_what_comes_out(name, modules):
    """The numbers in the comments of a card's example."""
    text = (Path(pplug_hf.metrics.path(name)) / "README.md").read_text(encoding="utf-8")
    lines = text.split("```python\n")[1].split("```")[0].splitlines()
    scope, checked = {}, 0
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("#"):
            continue
        if after.startswith("# "):
            assert eval(line, scope) == pytest.approx(json.loads(after[2:]), abs=1e-4)
            checked += 1
        else:
            exec(line, scope)
    assert checked


def test_a_module_loads_from_elsewhere_in_a_new_process(tmp_path):
    """As from an installed package or a Space: not from the working tree, and with an empty cache."""
    shutil.copytree(pplug_hf.metrics.path("lamp_mae"), tmp_path / "lamp_mae")
    code = "import evaluate; print(evaluate.load('lamp_mae').compute(predictions=['x'], references=['5']))"
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(tmp_path)}
    environment["PYTHONPATH"] = str(Path(pplug_hf.__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "{'mae': 4.0, 'rmse': 4.0, 'unparsed': 1}\n", done.stderr[-2000:]


# ---- files ------------------------------------------------------------------------------------------------------


def official(path, answers, task="LaMP_3", packed=False):
    text = json.dumps({"task": task, "golds": [{"id": id_, "output": output} for id_, output in answers]})
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    return path


@pytest.fixture
def files(tmp_path):
    golds = official(tmp_path / "golds.json", [("10", "4"), ("11", "1"), ("12", "5")])
    return golds, official(tmp_path / "predictions.json", [(12, "5.0"), ("11", "3 stars"), ("10", 2)])


def scored(capsys, *arguments):
    capsys.readouterr()
    assert main(["score", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)  # and nothing else


def test_the_official_numbers(files, capsys, tmp_path):
    golds, predictions = files
    arguments = ["--task", "LaMP-3", "--golds", golds, "--predictions", predictions]
    numbers = scored(capsys, *arguments)
    assert list(numbers) == ["task", "examples", "mae", "rmse", "unparsed", "fallback"]
    assert numbers["mae"] == 2 and numbers["rmse"] == pytest.approx(math.sqrt(20 / 3)) and numbers["unparsed"] == 1
    out = tmp_path / "new" / "scores.json"
    theirs = scored(capsys, *arguments, "--fallback", "first-digit", "--output", out)
    assert theirs["mae"] == pytest.approx(4 / 3) and theirs["fallback"] == "first-digit"
    assert json.loads(out.read_text()) == theirs and [p.name for p in out.parent.iterdir()] == [out.name]
    assert scored(capsys, *arguments[2:]) == numbers  # the file says the task


@pytest.mark.parametrize("name", [f"LaMP-{i}" for i in range(1, 8)])
def test_every_task_also_gzipped(name, tmp_path, capsys):
    right = list(get_task(name).labels) or ["A title of things", "Another one"]
    given = [*right[1:], ""]
    task = name.replace("-", "_")
    golds = official(tmp_path / "golds.json.gz", enumerate(right), task, packed=True)
    predictions = official(tmp_path / "predictions.json", list(enumerate(given))[::-1], task)
    numbers = scored(capsys, "--task", name, "--golds", golds, "--predictions", predictions)
    assert numbers.items() >= score(name, given, right).items() and numbers["examples"] == len(right)
    assert ("fallback" in numbers) == (name == "LaMP-3")


def test_a_null_answer_is_an_empty_one_and_a_new_task_name_is_its_owners(tmp_path, capsys):
    golds = official(tmp_path / "golds.json", [("1", "A title")], task="our headlines")
    predictions = official(tmp_path / "predictions.json", [("1", None)], task="our headlines")
    arguments = ["--task", "LaMP-4", "--golds", golds, "--predictions", predictions]
    assert scored(capsys, *arguments)["unparsed"] == 1


MANY = [(str(i), "3") for i in range(20)]


@pytest.mark.parametrize(
    "golds, predictions, more, message",
    [
        (MANY, MANY[:-8], [], "Only in the golds: '12', '13', '14', '15', '16', ... (8 in all). Only in the pred"),
        (MANY[2:], MANY, [], "Only in the golds: none. Only in the predictions: '0', '1'."),
        ([*MANY, MANY[4]], MANY, [], "golds.json, golds: ids must occur once; these repeat: '4'"),
        (MANY, [*MANY, (7, "1")], [], "predictions.json, golds: ids must occur once; these repeat: '7'"),
        (MANY, MANY, ["--task", "LaMP-2"], "golds.json is of task 'LaMP_3', and the task is LaMP-2"),
        (MANY, MANY, ["--task", "LaMP-9"], "There is no task 'LaMP-9'; choose one of LaMP-1"),
        ([], MANY, [], "golds.json holds no golds"),
        (MANY, [], [], "Only in the golds: '0'"),
        ([*MANY, ("x", None)], [*MANY, ("x", "1")], [], "these ids have no gold: 'x'"),
        (
            [*MANY, ("x", "7")],
            [*MANY, ("x", "1")],
            [],
            "must be one of 1, 2, 3, 4, 5; those of these ids are not: 'x'",
        ),
    ],
)
def test_files_that_do_not_fit(tmp_path, capsys, golds, predictions, more, message):
    golds, predictions = official(tmp_path / "golds.json", golds), official(tmp_path / "predictions.json", predictions)
    out = tmp_path / "scores.json"
    arguments = ["--golds", golds, "--predictions", predictions, "--output", out, *more]
    fails(capsys, 1, message, "score", *arguments)
    assert capsys.readouterr().out == "" and not out.exists()


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "There is no file"),
        (b"<!DOCTYPE html>", "is a web page, not JSON"),
        (b'{"task": "LaMP_3", "golds": [', "is not valid JSON, or is cut off"),
        (gzip.compress(b'{"golds": []}', mtime=0)[:-6], "damaged or cut-off gzip"),
        (b'[{"id": "1", "output": "3"}]', "must hold an object with the keys 'task' and 'golds'; found list"),
        (b'{"task": "LaMP_3", "golds": [{"id": "1"}]}', "golds: row 0 must have the keys ['id', 'output']"),
        (b'{"task": ["LaMP_3"], "golds": []}', "'task' must be a text such as 'LaMP_3', not list"),
        (b'{"task": "LaMP_2", "golds": []}', "predictions.json is of task 'LaMP_2', and the task is LaMP-3"),
    ],
)
def test_what_is_no_predictions_file(files, capsys, content, message):
    golds, predictions = files
    predictions.unlink() if content is None else predictions.write_bytes(content)
    fails(capsys, 1, message, "score", "--golds", golds, "--predictions", predictions)


def test_no_task_and_no_place(files, tmp_path, capsys):
    golds, predictions = files
    fails(
        capsys,
        1,
        "is a folder: name a file",
        "score",
        "--golds",
        golds,
        "--predictions",
        predictions,
        "--output",
        tmp_path,
    )
    golds = official(tmp_path / "golds.json", [("10", "4")], task=None)
    fails(capsys, 1, "does not name its task: pass --task", "score", "--golds", golds, "--predictions", predictions)
