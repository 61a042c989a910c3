"""The bench: one folder, resuming, tables from predictions, every kind of task, and what it refuses."""

import json
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from bench_data import (
    SECRET,
    SHELVES,
    USERS,
    make_rows,
    make_world,
    predictions,
    quietly,
    save_plug,
    settings_for,
    write_data,
)

from pplug_hf import read_lamp
from pplug_hf.cli import main
from pplug_hf.commands import bench as command
from pplug_hf.commands.evaluate import EvaluateSettings, evaluate
from pplug_hf.errors import ConfigurationError, DataError, MismatchError, MissingFileError
from pplug_hf.evaluation import plots
from pplug_hf.evaluation.attention_profile import weight_profile
from pplug_hf.evaluation.predictions import git_commit
from pplug_hf.evaluation.runner import Runner
from pplug_hf.evaluation.style import Style, own_texts
from pplug_hf.evaluation.user_statistics import bootstrap_mean, paired_bootstrap, user_means
from pplug_hf.methods.label_frequencies import LabelMixture, history_labels
from pplug_hf.methods.likelihood import plug_label_log_probs
from pplug_hf.methods.persona import Plug
from pplug_hf.methods.resources import Resources
from pplug_hf.tasks.task import TASKS, per_example, score


@pytest.fixture(scope="module")
def world(places, tmp_path_factory):
    return make_world(places, tmp_path_factory.mktemp("bench"))


# ---- one folder -----------------------------------------------------------------------------------------------------

ROWS = ("no-persona", "frequencies", "bm25@4", "dense@1", "instruction-only", "mean", "pplug:wrong-user", "pplug")
FILES = {
    "no-persona.json",
    "frequencies.json",
    "bm25@4.json",
    "dense@1.json",
    "instruction-only,0.json",
    "mean,0.json",
    *(f"pplug{row},{run}.json" for row in ("", ",wrong-user") for run in (0, 1)),
}


def test_a_bench_goes_through_few_files(places, tmp_path):
    """A reader of a bench of three rows, one with retrieved items, has so many files to open (LaMP's own layout: two more)."""
    root, files = str(Path(command.__file__).parents[1]), set()
    questions, golds = make_rows(SHELVES, 1, users=3)
    rows = [q | {"output": g["output"]} for q, g in zip(questions, golds, strict=True)]
    (tmp_path / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def note(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(root):
            files.add(frame.f_code.co_filename.removeprefix(root))

    for output in ("once", "again"):  # what the first imports is imported
        settings = command.BenchSettings(
            data=str(tmp_path),
            rows=["no-persona", "recency@1", "bm25@1"],
            backbone=str(places / "t5"),
            output=str(tmp_path / output),
        )
        sys.setprofile(note if output == "again" else None)
        try:
            quietly(settings, task=SHELVES)
        finally:
            sys.setprofile(None)
    assert len(files) <= 26, " ".join(sorted(files))


@pytest.fixture(scope="module")
def finished(world):
    output = world / "finished"
    made, printed = quietly(settings_for(world, output, *ROWS, num_beams=2), task=SHELVES)
    return output, made, printed


def test_everything_is_in_one_folder(finished, world):
    output, _, printed = finished
    assert {path.name for path in output.iterdir()} == {
        "predictions",
        "results.json",
        "table.md",
        "rows.png",
        "history-length.png",
        "weights.png",
    }
    saved = predictions(output)
    assert set(saved) == FILES
    ids = [row["id"] for row in json.loads((world / "shelves" / "dev_questions.json").read_text())]
    assert all([gold["id"] for gold in content["golds"]] == ids for content in saved.values())
    assert {content["task"] for content in saved.values()} == {"shelves"}
    assert (output / "table.md").read_text() in printed
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in output.glob("*.png"))


def test_results_say_what_they_come_from(finished, world):
    output, made, _ = finished
    results = json.loads((output / "results.json").read_text(), parse_constant=pytest.fail)
    assert [record["row"] for record in results["rows"]] == list(ROWS) == list(made.predictions)
    assert results["reference"] == "pplug" and (results["examples"], results["users"]) == (2 * USERS, USERS)
    assert results["settings"]["num_beams"] == 2 and results["settings"]["seed"] == 0
    assert results["versions"]["torch"] == torch.__version__ and "git_commit" in results
    assert [len(results["runs"][row]) for row in ROWS] == [1, 1, 1, 1, 1, 1, 2, 2]
    first, second = (run["key"] for run in results["runs"]["pplug"])
    assert first["plug"] != second["plug"] and first["backbone"] == second["backbone"]
    assert results["runs"]["bm25@4"][0]["about"]["prompts"]["prompts_without_items"] == 2
    assert sum(b["examples"] for b in results["by_history_length"]) == 2 * USERS
    assert results["style_of_golds"] is None and "style" not in results["rows"][0]


def test_the_numbers_are_those_of_the_predictions(finished, world):
    """Independent of the table: from the files and the golds alone."""
    output, _, _ = finished
    questions = json.loads((world / "shelves" / "dev_questions.json").read_text())
    golds = {g["id"]: g["output"] for g in json.loads((world / "shelves" / "dev_outputs.json").read_text())["golds"]}
    users = [q["user_id"] for q in questions]
    right, saved = {}, predictions(output)
    for row in ROWS:
        runs = [c for c in saved.values() if c["row"] == row]
        hits = [[float(g["output"].strip() == golds[g["id"]]) for g in run["golds"]] for run in runs]
        right[row] = np.mean(hits, axis=0)
        (record,) = [r for r in json.loads((output / "results.json").read_text())["rows"] if r["row"] == row]
        assert record["accuracy"] == pytest.approx(np.mean(hits)) and record["seeds"] == len(runs)
        if len(runs) > 1:
            assert record["accuracy_sd"] == pytest.approx(statistics.stdev(map(statistics.mean, hits)))
        assert record["interval"] == pytest.approx(bootstrap_mean(right[row], users)[1:])
    for record in json.loads((output / "results.json").read_text())["rows"]:
        if record["row"] == "pplug":
            assert "gain" not in record and "users" not in record
            continue
        assert record["gain"] == pytest.approx(list(paired_bootstrap(right["pplug"], right[record["row"]], users)))
        own = [
            sum((right["pplug"] - right[record["row"]])[[u == user for u in users]]) for user in dict.fromkeys(users)
        ]
        assert record["users"] == {
            "win": sum(v > 1e-9 for v in own),
            "tie": sum(abs(v) <= 1e-9 for v in own),
            "loss": sum(v < -1e-9 for v in own),
        }


def test_which_items_spoke(finished, world):
    """The profile of the plug's own row, from the model's weights; no other row has one."""
    output, made, _ = finished
    results = json.loads((output / "results.json").read_text())
    assert list(results["weights"]) == ["pplug"]
    model = Resources(SHELVES, {"a": [str(world / "plug0")]}, vectors=str(world / "vectors")).plug(
        str(world / "plug0")
    )
    weights = []
    for e in made.examples:
        if not e.history:
            weights.append(torch.zeros(0))
            continue
        query, items = reference.read(model, [f"{item['tag']} {item['text']}" for item in e.history], e.query)
        weights.append(torch.tensor(reference.weights(model.plug, query, items)))
    saved = predictions(output)["pplug,0.json"]["about"]["weights"]
    expected = weight_profile(weights, made.examples)
    for name in ("by_age", "by_rank"):
        for got, want in zip(saved[name], expected[name], strict=True):
            assert got["weight"] == pytest.approx(want["weight"], rel=1e-4)
    assert saved["effective_share"] == pytest.approx(expected["effective_share"], rel=1e-4)


def test_runs_say_what_plug_they_are_of(finished):
    output, _, _ = finished
    saved = predictions(output)
    assert saved["mean,0.json"]["about"]["plug"]["aggregator"] == "mean"
    assert saved["pplug,1.json"]["about"]["plug"]["attention_temperature"] == 0.2
    assert "plug" not in saved["bm25@4.json"]["about"]


def test_what_a_plug_costs(finished, world):
    output, _, _ = finished
    saved = predictions(output)
    questions = json.loads((world / "shelves" / "dev_questions.json").read_text())
    items = sum(len(row["profile"]) for row in questions) / len(questions)
    for name in ("pplug,0.json", "pplug,wrong-user,1.json", "mean,0.json"):
        assert saved[name]["about"]["cost"]["bytes_per_user"] == round(items * 12 * 4)  # fp32, 12 wide
    assert set(saved["instruction-only,0.json"]["about"]["cost"]) == {"trained_weights"}
    assert "| pplug " in (text := (output / "table.md").read_text()) and "bytes per user" in text


def test_one_history_is_drawn_when_asked(world, tmp_path, monkeypatch):
    asked = settings_for(world, tmp_path, "no-persona", "pplug", show_history="241")
    drawn, real = [], command.plot_weights
    monkeypatch.setattr(
        command,
        "plot_weights",
        lambda weights, texts, title, **more: (
            drawn.append((weights, texts, more)) or real(weights, texts, title, **more)
        ),
    )
    made, printed = quietly(asked, task=SHELVES)
    ((weights, texts, more),) = drawn
    (example,) = [e for e in made.examples if e.id == "241"]
    assert more["answer"] == made.predictions["pplug"][0][[e.id for e in made.examples].index("241")]
    assert more["dates"] == [item["date"][:10] for item in example.history]
    assert texts == [f"{item['tag']} {item['text']}" for item in example.history]
    assert len(weights) == len(texts) and weights.sum().item() == pytest.approx(1, abs=1e-5)
    picture = tmp_path / "history-241.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and "Private, with the user's texts" in printed
    assert picture.stat().st_mode & 0o777 == 0o600
    for change, message in (
        ({"show_history": "no such"}, "There is no question with the id 'no such'"),
        ({"show_history": "200"}, "The history of the question '200' is empty: name another"),
        ({"plugs": None, "backbone": "x"}, "show_history needs a plug"),
        ({"tables_only": True}, "show_history needs a plug"),
    ):
        with pytest.raises((ConfigurationError, DataError), match=message):
            quietly(replace(asked, **change), task=SHELVES)


def test_nothing_is_done_twice(finished, world, monkeypatch):
    output, _, _ = finished
    before = {path.name: path.stat().st_mtime_ns for path in (output / "predictions").iterdir()}
    table = (output / "table.md").read_text()
    monkeypatch.setattr(Runner, "_answer", None)
    _, printed = quietly(settings_for(world, output, *ROWS, num_beams=2, batch_size=3), task=SHELVES)
    assert "10 of 10 runs are there already." in printed and (output / "table.md").read_text() == table
    assert {path.name: path.stat().st_mtime_ns for path in (output / "predictions").iterdir()} == before


def test_the_tables_come_back_from_the_predictions_alone(finished, world, tmp_path, monkeypatch):
    output, _, _ = finished
    copy = tmp_path / "copy" / "predictions"
    copy.mkdir(parents=True)
    for path in (output / "predictions").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(Runner, "__init__", None)
    monkeypatch.setattr(Resources, "__init__", None)  # no model is loaded
    asked = settings_for(world, copy.parent, plugs=None, tables_only=True, num_beams=2)
    quietly(asked, task=SHELVES)
    assert (copy.parent / "table.md").read_text() == (output / "table.md").read_text()
    old, new = (json.loads((folder / "results.json").read_text()) for folder in (output, copy.parent))
    assert {k: v for k, v in old.items() if k != "settings"} == {k: v for k, v in new.items() if k != "settings"}
    asked = replace(asked, rows=["mean", "no-persona"], reference="no-persona", num_beams=1, max_length=7)
    quietly(asked, task=SHELVES)
    results = json.loads((copy.parent / "results.json").read_text())
    assert [r["row"] for r in results["rows"]] == ["mean", "no-persona"] and results["reference"] == "no-persona"
    # The decoding is that of the answers, whatever is asked for now: a model card shows it.
    decoding = {name: results["settings"][name] for name in ("num_beams", "max_length", "constrained")}
    assert decoding == {name: old["settings"][name] for name in decoding} and decoding["num_beams"] == 2


def rows_of_table(folder):
    """Names of the rows with their numbers of runs."""
    return {row: len(runs) for row, runs in json.loads((folder / "results.json").read_text())["runs"].items()}


def test_tables_have_the_seeds_that_are_asked_for(world, tmp_path):
    """Fewer seeds than were once answered, and names written otherwise: the table is that of the bench."""
    quietly(settings_for(world, tmp_path, "bm25@4", "pplug"), task=SHELVES)
    asked = settings_for(world, tmp_path, "bm25@04", "pplug", plugs=[f"pplug={world / 'plug0'}"])
    _, printed = quietly(asked, task=SHELVES)
    assert "not in the table, because they were not asked for: pplug,1.json" in printed
    table = (tmp_path / "table.md").read_text()
    _, printed = quietly(replace(asked, tables_only=True), task=SHELVES)
    assert (tmp_path / "table.md").read_text() == table
    assert rows_of_table(tmp_path) == {"bm25@4": 1, "pplug": 1}
    assert "not in the table, because they were not asked for: pplug,1.json" in printed
    quietly(replace(asked, rows=None, tables_only=True), task=SHELVES)  # those that are there
    assert rows_of_table(tmp_path) == {"bm25@4": 1, "pplug": 1}
    quietly(replace(asked, plugs=None, tables_only=True), task=SHELVES)
    assert rows_of_table(tmp_path) == {"bm25@4": 1, "pplug": 2}, "nobody says which seeds"
    asked = replace(asked, rows=None, plugs=[f"mean={world / 'mean'}"], tables_only=True)
    _, printed = quietly(asked, task=SHELVES)
    assert rows_of_table(tmp_path) == {"bm25@4": 1} and "asked for: pplug,0.json, pplug,1.json" in printed
    with pytest.raises(MissingFileError, match=r"no predictions of the row 'pplug' \(run 2\)"):
        three = ",".join(str(world / name) for name in ("plug0", "plug1", "frozen"))
        quietly(replace(asked, rows=["pplug"], plugs=[f"pplug={three}"]), task=SHELVES)


def test_tables_compare_with_a_plug_and_not_with_adapters(world, tmp_path):
    quietly(settings_for(world, tmp_path, "no-persona", "pplug:wrong-user", "pplug"), task=SHELVES)
    content = json.loads((tmp_path / "predictions" / "no-persona.json").read_text())
    for row in ("ftp:wrong-user", "ftp:no-history", "ftp"):  # more variants than the plug has
        made = content | {"row": row, "key": content["key"] | {"row": row, "artefact": "0" * 16}}
        (tmp_path / "predictions" / f"{row.replace(':', ',')},0.json").write_text(json.dumps(made))
    made, _ = quietly(settings_for(world, tmp_path, plugs=None, tables_only=True), task=SHELVES)
    assert made.reference == "pplug" and "ftp:no-history" in made.predictions


def count_answers(monkeypatch, stop_after=None):
    """The rows that are answered from now on; with `stop_after`, an error behind so many."""
    done, real = [], Runner._answer

    def counted(self, row, *rest):
        if stop_after is not None and len(done) == stop_after:
            raise KeyboardInterrupt
        done.append(row)
        return real(self, row, *rest)

    monkeypatch.setattr(Runner, "_answer", counted)
    return done


def test_a_run_that_broke_goes_on(finished, world, tmp_path, monkeypatch):
    output, _, _ = finished
    asked = settings_for(world, tmp_path, *ROWS, num_beams=2)
    with monkeypatch.context() as patch:
        first = count_answers(patch, stop_after=4)
        with pytest.raises(KeyboardInterrupt):
            quietly(asked, task=SHELVES)
    assert len(first) == len(predictions(tmp_path)) == 4 and not (tmp_path / "table.md").exists()
    second = count_answers(monkeypatch)
    _, printed = quietly(asked, task=SHELVES)
    assert "4 of 10 runs are there already." in printed and len(second) == 6
    assert (tmp_path / "table.md").read_text() == (output / "table.md").read_text()


@pytest.mark.parametrize(
    "change, again, says",
    [
        ({"num_beams": 1}, ["no-persona", "pplug", "pplug", "random@2"], "decoding.num_beams"),
        ({"seed": 5}, ["random@2"], "seed"),
        ({"max_items": 2}, ["no-persona", "pplug", "pplug", "random@2"], "data"),
        ({"rows": ["pplug", "bm25@1"]}, ["bm25@1"], None),
    ],
)
def test_what_changed_is_done_again(world, tmp_path, monkeypatch, change, again, says):
    asked = settings_for(world, tmp_path, "no-persona", "pplug", "random@2", num_beams=2)
    quietly(asked, task=SHELVES)
    done = count_answers(monkeypatch)
    _, printed = quietly(replace(asked, **change), task=SHELVES)
    assert sorted(done) == sorted(again)
    assert (f"was made with another {says}." in printed) if says else ("not in the table" in printed)


def test_another_plug_in_the_same_folder_is_another_plug(world, places, tmp_path, monkeypatch):
    plug = save_plug(places, tmp_path / "plug", 7, item_template="{tag} {text}")
    asked = settings_for(world, tmp_path / "out", "no-persona", "a", plugs=[f"a={plug}"])
    quietly(asked, task=SHELVES)
    save_plug(places, plug, 8, item_template="{tag} {text}")
    done = count_answers(monkeypatch)
    _, printed = quietly(asked, task=SHELVES)
    assert done == ["a"] and "Again: a,0.json was made with another plug." in printed


def test_a_damaged_file_is_done_again(world, tmp_path, monkeypatch):
    asked = settings_for(world, tmp_path, "no-persona", "bm25@1")
    quietly(asked, task=SHELVES)
    (tmp_path / "predictions" / "bm25@1.json").write_text('{"task": "shel')
    done = count_answers(monkeypatch)
    _, printed = quietly(asked, task=SHELVES)
    assert done == ["bm25@1"] and "Passed over bm25@1.json" in printed


def test_evaluate_is_a_preset_that_resumes(world, tmp_path, monkeypatch):
    """Its rows have titles; its predictions are a bench's, so they are made once."""
    asked = EvaluateSettings(
        plug=[str(world / "plug0"), str(world / "plug1")],
        instruction_only=[str(world / "plug1")],
        data=str(world / "shelves"),
        vectors=str(world / "vectors"),
        output=str(tmp_path),
    )
    done = count_answers(monkeypatch)
    made, _ = quietly(asked, command=evaluate, task=SHELVES)
    rows = ["no-persona", "instruction-only", "PPlug:wrong-user", "frequencies", "PPlug"]
    assert list(made.predictions) == rows and len(done) == 7
    files = {
        "no-persona",
        "instruction-only,0",
        "frequencies",
        *(f"PPlug{row},{i}" for row in ("", ",wrong-user") for i in (0, 1)),
    }
    assert set(predictions(tmp_path)) == {f"{name}.json" for name in files}
    again, printed = quietly(asked, command=evaluate, task=SHELVES)
    assert len(done) == 7 and "7 of 7 runs are there already." in printed
    assert again.predictions == made.predictions
    in_memory, _ = quietly(replace(asked, output=None), command=evaluate, task=SHELVES)
    assert len(done) == 14 and in_memory.predictions == made.predictions
    with pytest.raises(ConfigurationError, match="is a file: name a folder"):
        quietly(replace(asked, output=str(tmp_path / "results.json")), command=evaluate, task=SHELVES)


# ---- tasks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LaMP-2", "LaMP-3", "LaMP-6", "LaMP-7"])
def test_every_kind_of_task(world, places, tmp_path, name):
    task = TASKS[name]
    data = write_data(tmp_path / "data", task)
    plug = save_plug(places, tmp_path / "plug", item_template=task.item_template)
    asked = settings_for(world, tmp_path / "out", data=str(data), plugs=[f"pplug={plug}"])
    made, _ = quietly(asked)
    names = ["no-persona", *(["frequencies"] if task.labels else [])]
    names += [f"{ranker}@{k}" for ranker in ("recency", "bm25", "dense") for k in (1, 4)]
    names += ["pplug:wrong-user", "pplug:no-history", "pplug:top-4", "pplug+bm25@1", "pplug"]
    assert list(made.predictions) == names
    results = json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=pytest.fail)
    golds = [str(e.target) for e in made.examples]
    for record in results["rows"]:
        (answers,) = made.predictions[record["row"]]
        numbers = score(task, answers, golds)
        assert {k: record[k] for k in numbers} == pytest.approx(numbers)
        if task.metric == "rouge":
            users = [e.user for e in made.examples]
            styles = Style.fit(own_texts(made.examples, task)).score(answers, users)
            assert record["style"] == pytest.approx(list(bootstrap_mean(*user_means(styles, users))))
    for b in results["by_history_length"]:
        inside = [b["from"] <= len(e.history) <= b["to"] for e in made.examples]
        own = per_example(task, made.predictions["pplug"][0], golds)[inside]
        assert b["rows"]["pplug"] == pytest.approx(own.mean()) and b["examples"] == sum(inside)
    table = (tmp_path / "out" / "table.md").read_text()
    assert ("| style [95 %]" in table) == (task.metric == "rouge") == ("Style: the share" in table)
    assert "for users: better, equal, worse" in table


def test_constrained_answers_are_labels(world, tmp_path):
    asked = settings_for(world, tmp_path, "no-persona", "pplug", "bm25@1", constrained=True)
    made, _ = quietly(asked, task=SHELVES)
    given = {text for runs in made.predictions.values() for run in runs for text in run}
    assert given <= set(SHELVES.labels) and all(record["unparsed"] == 0 for record in made.rows())


def test_a_task_of_ones_own_from_json_lines(world, tmp_path):
    questions, golds = make_rows(SHELVES, 9)
    lines = [{**q, "output": g["output"]} for q, g in zip(questions, golds, strict=True)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dev.jsonl").write_text("\n".join(map(json.dumps, lines)))
    made, _ = quietly(settings_for(world, tmp_path / "out", data=str(tmp_path / "data")), task=SHELVES)
    assert "frequencies" not in made.predictions  # there is no train split to fit them on
    assert made.reference == "pplug" and len(made.examples) == len(lines)


def test_label_frequencies_on_top_of_plugs(world, tmp_path):
    rows = ["frequencies", "instruction-only:frequencies", "pplug:frequencies", "pplug"]
    made, _ = quietly(settings_for(world, tmp_path, *rows), task=SHELVES)
    assert [record["row"] for record in made.rows()] == rows and len(made.predictions["pplug:frequencies"]) == 2
    saved = predictions(tmp_path)
    keys = [saved[f"{row.replace(':', ',')}"]["key"] for row in ("pplug:frequencies,0.json", "pplug,0.json")]
    assert (
        keys[0]["plug"] == keys[1]["plug"] and keys[0]["training"] and "plug" not in saved["frequencies.json"]["key"]
    )
    _, examples = read_lamp(world / "shelves", "dev", SHELVES)
    _, train = read_lamp(world / "shelves", "train", SHELVES)
    resources = Resources(SHELVES, {"pplug": [str(world / "plug1")]}, vectors=str(tmp_path / "vectors"))
    model, plug = resources.plug(str(world / "plug1")), Plug("pplug", str(world / "plug1"))
    parts = [plug.inputs(part, resources) for part in (train, examples)]
    scores = [plug_label_log_probs(model, inputs, SHELVES.labels) for inputs in parts]
    labels = [[history_labels(e, SHELVES) for e in part] for part in (train, examples)]
    mixture = LabelMixture.fit(scores[0], labels[0], [e.target for e in train], SHELVES.labels)
    assert made.predictions["pplug:frequencies"][1] == mixture.predict(scores[1], labels[1])


def test_a_single_user_has_no_interval(world, tmp_path):
    data = write_data(tmp_path / "data", SHELVES, users=1)
    made, printed = quietly(settings_for(world, tmp_path / "out", data=str(data)), task=SHELVES)
    results = json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["rows"][0]["gain"][1:] == [None, None] and results["rows"][0]["interval"] == [None, None]
    assert "[?, ?]" in printed and "pplug:wrong-user" not in made.predictions


def test_no_text_of_a_history_is_written(world, tmp_path):
    data = write_data(tmp_path / "data", SHELVES)
    for path in data.glob("*_questions.json"):
        questions = json.loads(path.read_text())
        for question in questions:
            for item in question["profile"]:
                item["text"] = SECRET
        path.write_text(json.dumps(questions))
    asked = settings_for(world, tmp_path / "out", "bm25@1", "pplug+bm25@1", data=str(data))
    _, printed = quietly(asked, task=SHELVES)
    written = "".join(path.read_text() for path in (tmp_path / "out").rglob("*") if path.suffix in (".json", ".md"))
    assert SECRET not in written + printed


def test_inputs_longer_than_the_budget_are_counted(world, tmp_path):
    asked = settings_for(world, tmp_path, "no-persona", "bm25@4", max_length=6)
    _, printed = quietly(asked, task=SHELVES)
    assert "10 of 10 prompts have more than max_length=6 tokens and lose the middle of their text." in printed
    about = predictions(tmp_path)["bm25@4.json"]["about"]
    assert about["prompts"]["shown_items"] == 0 and about["prompts"]["retrieved_items"] > 0
    assert (
        "without the items that were found, for lack of room: bm25@4 8 of 10." in (tmp_path / "table.md").read_text()
    )


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more, error, message",
    [
        ({"rows": ["pplg"]}, ConfigurationError, "There is no row 'pplg'"),
        (
            {"rows": ["mean"], "reference": "pplug"},
            ConfigurationError,
            "'pplug' is not a row of this bench; it has mean",
        ),
        ({"plugs": ["mean"]}, ConfigurationError, "write NAME=FOLDER"),
        ({"plugs": ["a=nowhere"]}, MissingFileError, "Cannot load config.json of the plug 'nowhere'"),
        ({"plugs": None, "rows": ["no-persona"]}, ConfigurationError, "No backbone: pass backbone"),
        ({"max_items": 0}, ConfigurationError, "max_items is 0"),
        ({"split": "test"}, MissingFileError, "it has the splits dev, train"),
        ({"rows": ["frequencies"], "leave_out_users": 1.0}, ConfigurationError, "fitted on the train split"),
        ({"rows": ["no-persona"], "tables_only": True}, MissingFileError, "no predictions of a bench in"),
        ({"rows": []}, ConfigurationError, "rows is empty"),
        ({"device": "quantum"}, ConfigurationError, "The device is 'quantum'"),
    ],
)
def test_settings_that_cannot_work(world, tmp_path, more, error, message):
    output = tmp_path / "out"
    with pytest.raises(error, match=message):
        quietly(replace(settings_for(world, output), **more), task=SHELVES)
    assert not output.exists()


def test_data_that_cannot_work(world, places, tmp_path):
    plain = write_data(tmp_path / "plain", TASKS["LaMP-4"], users=1)
    asked = settings_for(world, tmp_path / "out", data=str(plain), plugs=[f"pplug={world / 'any'}"])
    for more, error, message in (
        ({"rows": ["pplug:wrong-user"]}, DataError, "needs at least 2 users"),
        ({"constrained": True}, ConfigurationError, "constrained needs a task with a list of labels"),
        ({"rows": ["frequencies"]}, ConfigurationError, "LaMP-4 has none: leave it out"),
        ({"rows": ["dense@1"], "plugs": None, "backbone": str(places / "t5")}, ConfigurationError, "pass retriever"),
    ):
        with pytest.raises(error, match=message):
            quietly(replace(asked, **more))
    (plain / "dev_questions.json").write_text("[]")
    (plain / "dev_outputs.json").write_text('{"task": "LaMP_4", "golds": []}')
    with pytest.raises(DataError, match="holds no questions"):
        quietly(asked)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="is a file: name a folder"):
        quietly(replace(asked, output=str(tmp_path / "file")))
    with pytest.raises(ConfigurationError, match="file' is a file: name a folder"):
        quietly(replace(asked, output=str(tmp_path / "file" / "deep" / "out")))
    assert not (tmp_path / "out").exists()


def test_a_question_without_a_gold_is_no_wrong_answer(world, tmp_path):
    data = write_data(tmp_path / "data", TASKS["LaMP-4"])
    outputs = json.loads((data / "dev_outputs.json").read_text())
    outputs["golds"][3]["output"] = None
    (data / "dev_outputs.json").write_text(json.dumps(outputs))
    asked = settings_for(world, tmp_path / "out", "no-persona", data=str(data), plugs=[f"a={world / 'any'}"])
    with pytest.raises(DataError, match=f"no answer to compare with: '{outputs['golds'][3]['id']}'"):
        quietly(asked)
    assert not (tmp_path / "out").exists()


def test_predictions_that_do_not_belong_together(world, finished, tmp_path):
    output, _, _ = finished
    asked = settings_for(world, tmp_path, "no-persona", "bm25@4", plugs=None, tables_only=True)
    folder = tmp_path / "predictions"
    folder.mkdir()
    for name in ("no-persona.json", "bm25@4.json"):
        (folder / name).write_bytes((output / "predictions" / name).read_bytes())
    content = json.loads((folder / "bm25@4.json").read_text())
    content["key"]["decoding"]["num_beams"] = 1
    (folder / "bm25@4.json").write_text(json.dumps(content))
    with pytest.raises(MismatchError, match=r"were made with different .*decoding.num_beams"):
        quietly(asked, task=SHELVES)
    with pytest.raises(MissingFileError, match=r"no predictions of the row 'mean'.*there are no-persona, bm25@4"):
        quietly(replace(asked, rows=["mean"]), task=SHELVES)
    with pytest.raises(MismatchError, match="10 of its ids are unknown, 10 are missing"):
        quietly(replace(asked, split="train"), task=SHELVES)
    with pytest.raises(MismatchError, match="other data under the same ids"):
        quietly(replace(asked, max_items=1), task=SHELVES)
    assert not (tmp_path / "table.md").exists()


def test_rows_of_other_chats_do_not_belong_together(world, finished, tmp_path):
    output, _, _ = finished
    asked = settings_for(world, tmp_path, "no-persona", "bm25@4", plugs=None, tables_only=True)
    (tmp_path / "predictions").mkdir()

    def write(row, system):
        content = json.loads((output / "predictions" / f"{row}.json").read_text())
        content["key"] |= {} if system is None else {"chat": {"template": "{{ messages }}", "system": system}}
        (tmp_path / "predictions" / f"{row}.json").write_text(json.dumps(content))

    for one, other, differs in (("", "Be brief.", "chat.system"), (None, "", "chat"), ("", "", None)):
        write("no-persona", one)
        write("bm25@4", other)
        if differs is None:
            quietly(asked, task=SHELVES)
            continue
        with pytest.raises(MismatchError, match=rf"bm25@4.json and no-persona.json were .*different .*{differs}[,:]"):
            quietly(asked, task=SHELVES)


def test_dense_retrieval_with_an_encoder_of_its_own(world, places, tmp_path):
    asked = settings_for(
        world,
        tmp_path,
        "no-persona",
        "dense@2",
        plugs=None,
        backbone=str(places / "gpt2"),
        retriever=str(places / "encoder"),
    )
    made, _ = quietly(asked, task=SHELVES)
    assert made.reference == "no-persona"
    (template, prompts) = (
        predictions(tmp_path)["dense@2.json"]["key"]["retriever"][k] for k in ("template", "prompts")
    )
    assert template is None and prompts == ["", ""]


def test_on_the_command_line(world, tmp_path, capsys):
    data = write_data(tmp_path / "data", TASKS["LaMP-4"])
    arguments = ["bench", "--data", data, "--output", tmp_path / "out", "--plugs", f"a={world / 'any'}"]
    arguments = [str(a) for a in [*arguments, "--vectors", tmp_path / "vectors"]]
    assert main([*arguments, "--rows", "no-persona", "a:last-2", "a"]) == 0
    assert "| a:last-2 " in capsys.readouterr().out
    assert main([*arguments, "--rows", "b"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("pplug-hf bench: There is no row 'b'")


def test_without_matplotlib_there_are_no_pictures(world, tmp_path, monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plots._matplotlib.cache_clear()
    _, printed = quietly(settings_for(world, tmp_path, "no-persona"), task=SHELVES)
    assert "Drawing needs matplotlib" in printed and (tmp_path / "table.md").is_file()


def test_the_commit_is_that_of_the_checkout():
    root = Path(__file__).parent.parent
    done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    expected = done.stdout.strip() if done.returncode == 0 and (root / ".git").exists() else None
    assert (git_commit() or "").rstrip("+") == (expected or "")
