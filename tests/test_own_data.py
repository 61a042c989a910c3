"""Data of one's own, from wherever: every command reads the same examples of it, and says what is wrong with it."""

import contextlib
import gzip
import io
import json
import random
import re
from dataclasses import asdict, replace
from types import SimpleNamespace

import accelerate
import pytest
import torch
from safetensors.torch import load_file
from test_cli import BACKBONE, ENCODER

from pplug_hf.cli import main
from pplug_hf.commands.bench import BenchSettings, bench
from pplug_hf.commands.encode import EncodeSettings, encode
from pplug_hf.commands.evaluate import EvaluateSettings, evaluate
from pplug_hf.commands.report import ReportSettings, report
from pplug_hf.commands.train import TrainSettings, choose_examples, train
from pplug_hf.data.examples import has_split, is_one_split, other_splits, read_examples, read_others
from pplug_hf.errors import ConfigurationError, DataError, MissingFileError
from pplug_hf.tasks.task import Task

TASK = Task(
    name="shelves",
    query_marker="book:",
    query_field="text",
    answer_field="tag",
    item_template="{tag}: {text}",
    item_template_unlabelled="{text}",
    labels=("epic", "cosy", "dark"),
    metric="accuracy",
    max_new_tokens=4,
)
SECRET = "my secret diary"


def make_rows(seed, users=8):
    rng = random.Random(seed)
    title = lambda: " ".join(rng.choices(["a", "castle", "letters", "prophet", "sea", "wanda"], k=4))  # noqa: E731
    rows = []
    for user in range(users):
        profile = [{"text": title(), "tag": rng.choice(TASK.labels), "date": f"20{i:02}"} for i in range(user)]
        row = {"id": f"{seed}-{user}", "user": f"u{seed}-{user}", "input": f"Which shelf? book: {title()}"}
        rows.append({**row, "output": rng.choice(TASK.labels), "profile": profile})
    return rows


SPLITS = {"train": make_rows(1), "dev": make_rows(2, users=4)}


def write_lines(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The same data as JSON lines, as LaMP's files, and its task as a file."""
    root = tmp_path_factory.mktemp("own")
    for split, rows in SPLITS.items():
        write_lines(root / "lines" / f"{split}.jsonl", rows)
        (root / "lamp").mkdir(exist_ok=True)
        golds = [{"id": row["id"], "output": row["output"]} for row in rows]
        (root / "lamp" / f"{split}_questions.json").write_text(json.dumps(rows))
        (root / "lamp" / f"{split}_outputs.json").write_text(json.dumps({"task": "shelves", "golds": golds}))
    (root / "task.json").write_text(json.dumps(asdict(TASK)))
    return root


def sources(place):
    datasets = pytest.importorskip("datasets")
    made = {
        split: datasets.Dataset.from_list([{**r, "profile": r["profile"]} for r in rows])
        for split, rows in SPLITS.items()
    }
    return {
        "folder of lines": str(place / "lines"),
        "LaMP's files": place / "lamp",
        "DatasetDict": datasets.DatasetDict(made),
        "mapping": SPLITS,
        "one file": place / "lines" / "dev.jsonl",
        "Dataset": made["dev"],
        "IterableDataset": made["dev"].to_iterable_dataset(),
        "rows": SPLITS["dev"],
        "generator": (row for row in SPLITS["dev"]),
    }


# ---- one way of reading -----------------------------------------------------------------------------------------


def plain(examples):
    return [
        (e.id, e.user, e.prompt, e.query, e.target, [(i["text"], i["tag"], i["date"]) for i in e.history])
        for e in examples
    ]


def test_every_source_gives_the_same_examples(place):
    expected = [
        (
            row["id"],
            row["user"],
            row["input"],
            row["input"].split("book: ")[1],
            row["output"],
            [(i["text"], i["tag"], i["date"]) for i in row["profile"]],
        )
        for row in SPLITS["dev"]
    ]
    for name, source in sources(place).items():
        one = is_one_split(source)
        assert one == (name in ("one file", "Dataset", "IterableDataset", "rows", "generator")), name
        assert has_split(source, "dev") != one and not has_split(source, "test")
        task, examples = read_examples(source, "dev", str(place / "task.json"))
        assert task == TASK and plain(examples) == expected, name


def test_equal_items_are_one_object(place):
    twice = [{**row, "id": f"{row['id']}-{i}"} for row in SPLITS["dev"] for i in range(2)]
    _, examples = read_examples(twice, "dev", TASK)
    assert all(a is b for a, b in zip(examples[-1].history, examples[-2].history, strict=True))


def test_other_splits_are_those_that_are_there(place):
    assert {e.id for e in read_others(SPLITS, ("dev", "test"), TASK)} == {row["id"] for row in SPLITS["dev"]}
    assert read_others(place / "lines" / "dev.jsonl", ("dev", "test"), TASK) == []  # it would read itself again
    assert len(read_others(place / "lines" / "train.jsonl", ("dev", "test"), TASK)) == 4  # beside it
    withheld = {"test": [{k: v for k, v in row.items() if k != "output"} for row in SPLITS["dev"]]}
    assert len(read_others(withheld, ("dev", "test"), TASK)) == 4


def test_what_cannot_be_read(place):
    pandas = pytest.importorskip("pandas")
    for source, split, task, error, message in (
        (SPLITS, "test", TASK, MissingFileError, r"has no split 'test'; it has 'train', 'dev'"),
        (SPLITS["dev"], "dev", None, ConfigurationError, "Rows do not name their task"),
        ([], "dev", TASK, DataError, "The split 'dev' of the data set holds no questions"),
        (pandas.DataFrame(SPLITS["dev"]), "dev", TASK, DataError, r"got a DataFrame: pass data.to_dict\('records'\)"),
        ({"dev": pandas.DataFrame(SPLITS["dev"])}, "dev", TASK, DataError, "got a DataFrame"),
        (place / "lines", "test", TASK, MissingFileError, "it has the splits dev, train"),
        (place / "none.jsonl", "dev", TASK, MissingFileError, "no such folder"),
        (place / "lines", "dev", None, DataError, "No outputs file names the task"),
    ):
        with pytest.raises(error, match=message):
            read_examples(source, split, task)


def test_training_learns_nothing_of_dev(place):
    """Questions of dev that stand in a history of train are no training examples; the file alone knows no dev."""
    leaked = SPLITS["dev"][-1]
    text = leaked["input"].split("book: ")[1]
    row = {**SPLITS["train"][-1], "user": leaked["user"]}
    row["profile"] = [{"text": text, "tag": "epic", "date": "2000"}, *row["profile"]]
    data = {"train": [*SPLITS["train"][:-1], row], "dev": SPLITS["dev"]}
    settings = TrainSettings(data="mine", output="x", backbone="x", encoder="x", validation_users=0.3)
    for source, asked in ((data, False), (data["train"], True)):
        with contextlib.redirect_stdout(io.StringIO()):
            _, examples, _ = choose_examples(settings, TASK, source)
        assert any(e.query == text for e in examples) == asked


def test_the_other_splits_may_have_any_names(place, tmp_path):
    """A question of dev in a history of train is left out, whatever dev is called."""
    leaked, text = SPLITS["dev"][-1], SPLITS["dev"][-1]["input"].split("book: ")[1]
    row = {**SPLITS["train"][-1], "user": leaked["user"]}
    row["profile"] = [{"text": text, "tag": "epic", "date": "2000"}, *row["profile"]]
    train = [*SPLITS["train"][:-1], row]
    settings = TrainSettings(data="mine", output="x", backbone="x", encoder="x", validation_users=0.3)
    write_lines(tmp_path / "lines" / "train.jsonl", train)
    write_lines(tmp_path / "lines" / "log.jsonl", [{"user": "u", "time": "2000"}])
    packed = write_lines(tmp_path / "lines" / "validation.jsonl", SPLITS["dev"])
    packed.with_suffix(".jsonl.gz").write_bytes(gzip.compress(packed.read_bytes()))
    packed.unlink()
    lamp(tmp_path / "lamp", train, golds_of(train))
    (tmp_path / "lamp" / "val_questions.json").write_text(json.dumps(SPLITS["dev"]))
    chosen = []
    for name, source in (
        ("dev", {"train": train, "dev": SPLITS["dev"]}),
        ("validation", {"train": train, "validation": SPLITS["dev"]}),
        ("validation", tmp_path / "lines"),
        ("validation", tmp_path / "lines" / "train.jsonl"),
        ("val", tmp_path / "lamp"),
    ):
        assert other_splits(source) == [name]
        with contextlib.redirect_stdout(io.StringIO()):
            chosen.append(choose_examples(settings, TASK, source)[1])
    assert all(plain(examples) == plain(chosen[0]) for examples in chosen)
    assert not any(e.query == text for e in chosen[0])
    assert other_splits(train) == []


def test_the_other_splits_of_a_file_are_beside_it(place, tmp_path, capsys):
    """Questions of dev are no training examples of a file either; if nothing says what is asked elsewhere, that is said."""
    row = SPLITS["dev"][-1]
    text = row["input"].split("book: ")[1]
    leaked = {**row, "profile": [{"text": text, "tag": "epic", "date": "2000"}, *row["profile"]]}
    train = [*SPLITS["train"], {**leaked, "id": "leaked", "input": "Which shelf? book: another"}]
    mine = write_lines(tmp_path / "mine.jsonl", train)
    settings = TrainSettings(data=str(mine), output="x", backbone="x", encoder="x", validation_users=0.3)
    asked = lambda path: sum(e.query == text for e in choose_examples(replace(settings, data=str(path)), TASK)[1])  # noqa: E731
    assert other_splits(mine) == [] and asked(mine) == 1
    assert "No dev or test split is beside" in capsys.readouterr().out
    write_lines(tmp_path / "another_task.jsonl", [{"id": "1", "input": "another question", "profile": []}])
    write_lines(tmp_path / "train.jsonl", train)
    write_lines(tmp_path / "dev.jsonl", SPLITS["dev"])
    assert other_splits(mine) == ["dev"] and asked(mine) == 0
    assert "mine.jsonl: what dev asks is not trained on" in capsys.readouterr().out
    assert other_splits(tmp_path / "dev.jsonl") == []
    assert other_splits(tmp_path / "train.jsonl") == other_splits(tmp_path) == ["another_task", "dev", "mine"]
    (tmp_path / "another_task.jsonl").unlink()
    mine.unlink()
    assert asked(tmp_path / "train.jsonl") == 0


def test_the_newest_items_are_kept(place):
    settings = TrainSettings(data="mine", output="x", backbone="x", encoder="x", validation_users=0.3, max_items=3)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        _, examples, validation = choose_examples(settings, TASK, SPLITS)
    assert max(len(e.history) for e in [*examples, *validation]) == 3
    whole = {row["id"]: row["profile"] for row in SPLITS["train"]}
    for e in [*examples, *validation]:
        if e.id in whole:
            assert [i["text"] for i in e.history] == [i["text"] for i in whole[e.id][-3:]]
    assert "histories are empty: these users are answered as new ones" in out.getvalue()


# ---- every command ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plug(place):
    """Trained from a mapping of splits, in Python."""
    settings = TrainSettings(
        data="my shelves",
        output=str(place / "plug"),
        backbone=BACKBONE,
        encoder=ENCODER,
        vectors=str(place / "vectors"),
        epochs=1,
        validation_users=0.3,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train(settings, TASK, SPLITS, num_persona_tokens=2)
    return str(place / "plug")


def test_training_encodes_histories_where_it_trains(tmp_path, monkeypatch):
    class Seen(Exception):
        """Ends the training where histories would be encoded."""

    places = []

    def seen(model, *rest):
        parts = model.history_encoder.device, model.backbone.device, model.plug.no_persona.device
        places.append(tuple(device.type for device in parts))
        raise Seen

    one = SimpleNamespace(device=torch.device("meta"), num_processes=1, is_main_process=True, process_index=0)
    monkeypatch.setattr(accelerate, "PartialState", lambda **options: one)
    monkeypatch.setattr("pplug_hf.commands.train.make_datasets", seen)
    given = {"output": str(tmp_path / "plug"), "vectors": str(tmp_path / "vectors"), "validation_users": 0.3}
    with contextlib.redirect_stdout(io.StringIO()), pytest.raises(Seen):
        train(TrainSettings(data="mine", backbone=BACKBONE, encoder=ENCODER, **given), TASK, SPLITS)
    assert places == [("meta", "cpu", "cpu")]


def run(*arguments):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        assert main([str(a) for a in arguments]) == 0
    return out.getvalue()


def table_of(printed):
    return [line for line in printed.splitlines() if line.startswith("|")]


def test_commands_and_functions_agree_on_data_of_ones_own(place, plug):
    named = ["--task", place / "task.json", "--vectors", place / "vectors"]
    rows = ["no-persona", "frequencies", "bm25@1", "pplug"]
    options = {"task": str(place / "task.json"), "vectors": str(place / "vectors")}
    tables = []
    for i, data in enumerate((place / "lines", place / "lamp")):
        output = place / f"bench{i}"
        arguments = ["--data", data, "--plugs", f"pplug={plug}", "--rows", *rows, "--output", output]
        tables.append(table_of(run("bench", *named, *arguments)))
    settings = BenchSettings(**options, data="mine", output=str(place / "bench2"), plugs=[f"pplug={plug}"], rows=rows)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        comparison = bench(settings, TASK, SPLITS)
    tables.append(table_of(out.getvalue()))
    assert tables[0] == tables[1] == tables[2]
    assert json.loads((place / "bench2" / "results.json").read_text())["settings"]["data"] == "mine"

    printed = run("evaluate", *named, "--plug", plug, "--data", place / "lines")
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        made = evaluate(EvaluateSettings(**options, data="mine", plug=[plug]), TASK, SPLITS)
    assert table_of(printed) == table_of(out.getvalue()) and "| frequencies " in printed
    assert made.predictions["no-persona"] == comparison.predictions["no-persona"]
    assert made.predictions["PPlug"] == comparison.predictions["pplug"]

    # One file is one split: label frequencies have nothing to be fitted on, least of all the questions themselves.
    one = run("evaluate", *named, "--plug", plug, "--data", place / "lines" / "dev.jsonl")
    assert "| frequencies " not in one and "frequencies (no train split to fit it on)" in one and "PPlug" in one


def test_evaluate_with_one_user_leaves_the_control_out_and_says_so(place, plug):
    (one,) = {row["user"] for row in SPLITS["dev"][-1:]}
    data = {"dev": [row for row in SPLITS["dev"] if row["user"] == one]}
    settings = EvaluateSettings(data="mine", plug=[plug], vectors=str(place / "vectors"))
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        made = evaluate(settings, TASK, data)
    assert list(made.predictions) == ["no-persona", "PPlug"]
    assert "PPlug:wrong-user (it needs a second user)" in out.getvalue()
    assert "One user: too few to conclude" in out.getvalue()
    asked = BenchSettings(data="mine", plugs=[f"a={plug}"], vectors=str(place / "vectors"), output=str(place / "one"))
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        made = bench(asked, TASK, data)
    assert "a:wrong-user" not in made.predictions
    assert "Left out: the row with another user's history (it needs a second user)." in out.getvalue()


def test_encoding_what_training_has_encoded(place, plug):
    named = ["--task", place / "task.json", "--vectors", place / "vectors", "--encoder", ENCODER]
    printed = run("encode", *named, "--data", place / "lines", "--splits", "train", "test")
    assert " 0 encoded now" in printed
    with contextlib.redirect_stdout(io.StringIO()) as out:
        encode(EncodeSettings(data="mine", encoder=ENCODER, vectors=str(place / "vectors")), TASK, SPLITS["train"])
    assert out.getvalue() == printed


def test_items_are_encoded_in_advance_as_a_recipe_writes_them(place, tmp_path):
    """Training with a plug's own template and prompt then encodes no item again."""
    shared = ["--item_template", "tag: {tag}. tag: {tag}. {text}", "--history_prompt", "item: ", "--task"]
    shared += [place / "task.json", "--data", place / "lines", "--encoder", ENCODER, "--vectors", tmp_path / "vectors"]
    items = int(run("encode", *shared).split()[0])
    (file,) = (tmp_path / "vectors").rglob("*.safetensors")
    run("train", *shared, "--backbone", BACKBONE, "--output", tmp_path / "plug", "--epochs", "1")
    assert list(file.parent.iterdir()) == [file] and len(load_file(file)["sha256"]) == items > 0


def test_report_and_score_take_the_task(place, capsys):
    named = run("report", "--task", place / "task.json", "--data", place / "lines")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        report(ReportSettings(data="mine"), TASK, SPLITS)
    assert out.getvalue() == named
    golds = str(place / "lamp" / "dev_outputs.json")
    assert (
        json.loads(run("score", "--task", place / "task.json", "--golds", golds, "--predictions", golds))["accuracy"]
        == 1
    )


# ---- bad input --------------------------------------------------------------------------------------------------

ROW = SPLITS["train"][3]
ITEM = ROW["profile"][0]


def lamp(folder, questions, golds, declared="shelves"):
    folder.mkdir()
    (folder / "train_questions.json").write_text(json.dumps(questions))
    (folder / "train_outputs.json").write_text(json.dumps({"task": declared, "golds": golds}))
    return folder


def golds_of(rows):
    return [{"id": row["id"], "output": row["output"]} for row in rows]


BAD = {
    "duplicate ids": (lambda rows: [*rows, rows[0]], golds_of, "shelves", r"ids must occur once; these repeat: '1-0'"),
    "a missing gold": (lambda rows: rows, lambda rows: golds_of(rows)[1:], "shelves", "Only in the questions: '1-0'"),
    "other ids": (
        lambda rows: rows,
        lambda rows: [{**g, "id": "x" + g["id"]} for g in golds_of(rows)],
        "shelves",
        "Only in the outputs: 'x1-0'",
    ),
    "another task": (
        lambda rows: rows,
        golds_of,
        "LaMP_4",
        "are of task 'LaMP_4', but (task='shelves'|--task shelves)",
    ),
    "items of another task": (
        lambda rows: [{**row, "profile": [{"title": SECRET}]} for row in rows],
        golds_of,
        "shelves",
        r"history items need the fields \['tag', 'text'\]",
    ),
    "a gold that is not a label": (
        lambda rows: rows,
        lambda rows: [{**g, "output": "funny"} for g in golds_of(rows)],
        "shelves",
        "answers of task shelves must be one of epic, cosy, dark; those of these ids are not: '1-0'",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("command", ["train", "evaluate", "encode", "bench"])
def test_files_that_cannot_be_right(place, plug, tmp_path, capsys, name, command):
    change, golds, declared, message = BAD[name]
    if command == "encode" and name == "a missing gold":
        pytest.skip("encode needs no answers")
    data = lamp(tmp_path / "data", change(SPLITS["train"]), golds(SPLITS["train"]), declared)
    out = ["--output", tmp_path / "out"]
    more = {
        "train": ["--backbone", BACKBONE, "--encoder", ENCODER, *out],
        "evaluate": ["--plug", plug, "--split", "train", *out],
        "encode": ["--encoder", ENCODER],
        "bench": ["--plugs", f"pplug={plug}", "--split", "train", *out],
    }[command]
    arguments = [command, "--data", data, "--task", place / "task.json", "--vectors", tmp_path / "vectors", *more]
    assert main([str(a) for a in arguments]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"pplug-hf {command}: ") and SECRET not in last
    assert re.search(message, last)
    assert {path.name for path in tmp_path.iterdir()} == {"data"}  # nothing half-written


def test_questions_that_ask_nothing_are_refused_before_anything_is_done(tmp_path):
    rows = make_rows(9)
    rows[1]["input"] = None
    path = write_lines(tmp_path / "dev.jsonl", rows)
    with pytest.raises(DataError, match=f"an empty input: '{rows[1]['id']}'"):
        read_examples(path, "dev", TASK)
    with pytest.raises(DataError, match="holds no questions"):
        report(ReportSettings(data="rows"), task=TASK, data=[])


def test_rows_without_answers(place, plug, tmp_path, capsys):
    rows = [{k: v for k, v in row.items() if k != "output"} for row in SPLITS["dev"]]
    data = write_lines(tmp_path / "dev.jsonl", rows)
    arguments = ["bench", "--data", data, "--task", place / "task.json", "--plugs", f"pplug={plug}"]
    assert main([str(a) for a in [*arguments, "--output", tmp_path / "out"]]) == 1
    assert "every row needs an 'output'; these ids have none: '2-0'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_works_but_not_as_one_might_think_is_said(place, plug, tmp_path):
    """k above every history, empty profiles, an item of 10 MB, a budget smaller than any input."""
    big = {"text": "castle " * 1_500_000, "tag": "dark", "date": "2030"}
    rows = [{**row, "profile": [*row["profile"], big] if row["profile"] else []} for row in SPLITS["dev"]]
    settings = BenchSettings(
        data="mine",
        output=str(tmp_path / "out"),
        plugs=[f"pplug={plug}"],
        rows=["bm25@50", "pplug", "pplug+bm25@1"],
        max_length=4,
        vectors=str(tmp_path / "vectors"),
    )
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        made = bench(settings, TASK, rows)
    printed = out.getvalue()
    assert "1 of 4 histories are empty: these users are answered as new ones." in printed
    assert "3 of 4 histories have fewer than 50 items and are shown whole." in printed
    assert "4 of 4 prompts have more than max_length=4 tokens and lose the middle of their text." in printed
    assert all(len(runs[0]) == 4 for runs in made.predictions.values())


def test_training_says_the_same(place, tmp_path):
    settings = TrainSettings(
        data="mine",
        output=str(tmp_path / "plug"),
        backbone=BACKBONE,
        encoder=ENCODER,
        vectors=str(place / "vectors"),
        epochs=1,
        validation_users=0.3,
        max_length=4,
        train_on_histories=False,
    )
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        train(settings, TASK, SPLITS)
    assert "8 of 8 prompts have more than max_length=4 tokens and lose the middle of their text." in out.getvalue()
    with pytest.raises(ConfigurationError, match="max_items is 0"):
        choose_examples(replace(settings, max_items=0), TASK, SPLITS)


def test_training_says_what_was_repaired_in_reading(place):
    rows = [{**row, "profile": row["profile"][::-1]} for row in SPLITS["train"]]
    settings = TrainSettings(data="mine", output="plug", backbone=BACKBONE, encoder=ENCODER, validation_users=0.3)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        choose_examples(settings, TASK, {"train": rows})
    assert "While reading:\n" in out.getvalue() and "histories that are not oldest first (id " in out.getvalue()
