"""The command line, in this process, on a handful of the demo's readers."""

import contextlib
import gzip
import importlib
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from importlib.resources import files
from types import SimpleNamespace

import pytest

from pplug_hf import PPlugForConditionalGeneration, PPlugModel
from pplug_hf.cli import _COMMANDS, load_command, main
from pplug_hf.commands.generate import read_history
from pplug_hf.commands.options import TrainSettings
from pplug_hf.commands.progress import saved
from pplug_hf.configuration.pplug import choices
from pplug_hf.errors import ConfigurationError, MissingPackageError
from pplug_hf.evaluation import plots
from pplug_hf.optional import require
from pplug_hf.storage.layout import DEFAULT_FOLDER
from pplug_hf.tasks.lamp.lamp_2 import MOVIE_TAGS
from pplug_hf.version import __version__

ASSETS = files("pplug_hf.demo") / "assets"
BACKBONE, ENCODER = str(ASSETS / "backbone"), str(ASSETS / "encoder")
PARTS = ["--backbone", BACKBONE, "--encoder", ENCODER]
SMALL = ["--epochs", "1", "--validation_users", "0.3"]
USERS = 12
SECRET = "my secret diary"


def write_data(folder, task="demo", row=lambda row: row, answer=lambda answer: answer):
    """The first readers of the demo's train and dev splits, in LaMP's format."""
    folder.mkdir()
    for split in ("train", "dev"):
        questions, outputs = (
            json.loads(gzip.decompress((ASSETS / "data" / f"{split}_{kind}.json.gz").read_bytes()))
            for kind in ("questions", "outputs")
        )
        users = list(dict.fromkeys(q["user_id"] for q in questions))[:USERS]
        questions = [row(q) for q in questions if q["user_id"] in users]
        ids = {q["id"] for q in questions}
        golds = [{"id": g["id"], "output": answer(g["output"])} for g in outputs["golds"] if g["id"] in ids]
        (folder / f"{split}_questions.json").write_text(json.dumps(questions))
        (folder / f"{split}_outputs.json").write_text(json.dumps({"task": task, "golds": golds}))


def movie_tag(shelf):
    return MOVIE_TAGS[sum(map(ord, shelf)) % len(MOVIE_TAGS)]


def as_movies(row):
    """A row of the demo as one of LaMP-2."""
    items = [{"id": i["id"], "description": i["text"], "tag": movie_tag(i["tag"])} for i in row["profile"]]
    return {**row, "input": row["input"].replace("book:", "description:"), "profile": items}


def quietly(*arguments):
    """What a command prints, once it has succeeded."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        assert main([str(a) for a in arguments]) == 0
    return out.getvalue()


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A data folder, a vector store, and two plugs trained on them: the real one and the control."""
    root = tmp_path_factory.mktemp("cli")
    made = SimpleNamespace(root=root, data=root / "data", store=root / "vectors", plug=root / "plug", printed={})
    write_data(made.data)
    train = ["train", "--data", made.data, "--vectors", made.store, *PARTS, *SMALL]
    made.printed["plug"] = quietly(*train, "--output", made.plug, "--num_persona_tokens", "2")
    made.control = root / "control"
    made.printed["control"] = quietly(*train, "--output", made.control, "--use_history", "False")
    (root / "history.json").write_text(json.dumps([{"text": "letters about wanda", "tag": "epic saga"}, "a castle"]))
    (root / "history.txt").write_text("epic saga: letters about wanda\n\na castle\n", encoding="utf-8")
    return made


# ---- what works -------------------------------------------------------------------------------------------------


def test_train_says_what_it_learns_from_and_saves_a_plug(place):
    printed = place.printed["plug"]
    assert "questions and" in printed and "history items of" in printed and "other users to validate on" in printed
    assert "trainable params: " in printed and f"Plug saved in {place.plug}" in printed
    model = PPlugModel.from_pretrained(place.plug)
    assert model.config.num_persona_tokens == 2 and model.config.item_template == "{tag}: {text}"
    assert model.config.query_of("Which shelf? book: a castle") == "a castle"  # as the task cuts it
    assert not [p.name for p in place.plug.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
    recorded = json.loads((place.plug / "train_settings.json").read_text())  # what a card says of the training
    assert recorded["task"] == "demo" and str(place.root) not in str(recorded)
    assert recorded["settings"]["validation_users"] == 0.3 and recorded["defaults"]["validation_users"] == 0.1
    assert recorded["settings"]["epochs"] and recorded["settings"].keys() == recorded["defaults"].keys()
    assert not {"data", "output", "backbone", "encoder", "vectors"} & set(recorded["settings"])
    assert recorded["language_model_passes"] == recorded["settings"]["epochs"] * recorded["data"]["examples"]


def test_train_shows_losses_and_the_time_left_and_ends_with_the_next_command(place):
    printed = place.printed["plug"]
    assert re.search(r"^step \d+ of \d+, epoch \d\.\d: loss \d+\.\d{3}, .* left$", printed, re.MULTILINE)
    assert re.search(
        r"^step \d+ of \d+, epoch 1\.0: validation loss \d+\.\d{3}, the best so far$", printed, re.MULTILINE
    )
    assert re.search(
        r"^Trained \d+ steps in .*\. Validation loss: \d+\.\d{3} after \d+, which is", printed, re.MULTILINE
    )
    size = (place.plug / "model.safetensors").stat().st_size / 1e6
    assert re.search(rf"^Plug saved in {place.plug}: [\d,]+ parameters, {size:.1f} MB\.", printed, re.MULTILINE)
    *_, last = printed.splitlines()
    assert last == f"Next: pplug-hf evaluate --plug {place.plug} --data {place.data} --vectors {place.store}"
    assert printed.splitlines().count(last) == 1 and "{'loss'" not in printed
    *_, last = place.printed["control"].splitlines()
    assert last.startswith(f"Next: pplug-hf evaluate --plug PLUG --instruction_only {place.control} --data")


def test_the_next_command_asks_as_the_training_did(place):
    changed = {"max_items": 5, "max_length": 512, "leave_out_users": 0.1, "split_seed": 3, "device": "cpu", "seed": 4}
    settings = TrainSettings(str(place.data), str(place.plug), "b", "e", vectors=DEFAULT_FOLDER, **changed)
    assert saved(settings, True).splitlines()[-1] == (
        f"Next: pplug-hf evaluate --plug {place.plug} --data {place.data} --max_items 5 --leave_out_users 0.1 --split_seed 3 "
        "--max_length 512 --device cpu"
    )


@pytest.mark.parametrize(
    "given, message",
    [
        (["--warmup", "1"], "--warmup 1.0 is no share of the steps"),
        (
            ["--prompt_cache", "4GB", "--placement", "prompt"],
            "leave --prompt_cache out, or make a plug with --placement answer",
        ),
        (
            ["--prompt_cache", "4GB", "--gradient_checkpointing"],
            "With --gradient_checkpointing .* a --prompt_cache has no effect",
        ),
        (["--encoder_learning_rate", "1e-4"], "--encoder_learning_rate 0.0001 has no effect"),
    ],
)
def test_options_that_would_do_nothing_are_refused(given, message, place, capsys):
    output = place.root / "nothing"
    arguments = ["train", "--data", place.data, "--task", "demo", *PARTS, "--output", output, "--vectors", place.store]
    assert main([str(part) for part in (*arguments, *given)]) == 1
    assert re.search(message, capsys.readouterr().err) and not output.exists()


def test_a_training_of_few_steps(place):
    output = place.root / "short"
    data = place.root / "one.jsonl"
    steps = [
        "--max_steps",
        "2",
        "--batch_size",
        "4",
        "--logging_steps",
        "1",
        "--device",
        "cpu",
        "--train_on_histories",
        "False",
    ]
    train = ["train", "--data", data, "--task", "demo", *PARTS, "--output", output]
    rows = json.loads((place.data / "train_questions.json").read_text())
    golds = json.loads((place.data / "train_outputs.json").read_text())["golds"]
    answers = {gold["id"]: gold["output"] for gold in golds}
    lines = [json.dumps({**row, "output": answers[row["id"]], "user": row["user_id"]}) for row in rows]
    data.write_text("\n".join(lines))
    cut = ["--max_target_length", "1"]
    printed = quietly(*train, *steps, *SMALL, *cut, "--vectors", place.store, "--new_users", "0.5")
    assert f"{len(lines)} of {len(lines)} answers have more than max_target_length=1 tokens" in printed
    assert re.findall(r"^step (\d) of 2, .*: loss", printed, re.MULTILINE) == ["1", "2"]
    assert printed.splitlines()[-1].startswith(
        f"Next: pplug-hf generate --plug {output} --prompt"
    )  # it has no dev split
    recorded = json.loads((output / "train_settings.json").read_text())["settings"]
    assert recorded["new_users"] == 0.5 and PPlugModel.from_pretrained(output).config.project_no_persona
    assert recorded["max_steps"] == 2 and not {"device", "logging_steps", "report_to"} & recorded.keys()


def test_the_control_sees_no_history(place):
    assert "Texts: 0 encoded now" in place.printed["control"]
    projected = [
        PPlugModel.from_pretrained(folder).config.project_no_persona for folder in (place.plug, place.control)
    ]
    assert projected == [False, True]


def test_evaluate_prints_and_writes_every_row(place):
    out = place.root / "results"
    arguments = ["--plug", place.plug, "--instruction_only", place.control, "--data", place.data]
    printed = quietly("evaluate", *arguments, "--vectors", place.store, "--output", out)
    rows = ["no-persona", "instruction-only", "PPlug:wrong-user", "PPlug"]
    assert [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("|")][2:] == rows
    assert (out / "table.md").read_text() in printed + "\n"
    results = json.loads((out / "results.json").read_text())
    assert [r["row"] for r in results["rows"]] == rows and results["users"] == USERS
    assert "gain" in results["rows"][0] and "gain" not in results["rows"][-1]
    answers = {p.name: json.loads(p.read_text()) for p in (out / "predictions").iterdir()}
    assert len(answers) == len(rows) and {a["task"] for a in answers.values()} == {"demo"}
    ids = {row["id"] for row in json.loads((place.data / "dev_questions.json").read_text())}
    assert all({gold["id"] for gold in a["golds"]} == ids for a in answers.values())


def test_label_tasks_get_the_rival(place):
    data, plug = place.root / "lamp2", place.root / "lamp2-plug"
    write_data(data, "LaMP_2", as_movies, movie_tag)
    common = ["--data", data, "--vectors", place.store]
    quietly("train", *common, *PARTS, *SMALL, "--output", plug, "--train_on_histories", "False")
    printed = quietly("evaluate", *common, "--plug", plug)
    assert "LaMP-2, dev" in printed and "| frequencies " in printed


def test_two_plugs_are_two_seeds_of_one_row(place):
    arguments = ["--plug", place.plug, place.control, "--data", place.data, "--vectors", place.store]
    assert "PPlug (2 seeds)" in quietly("evaluate", *arguments)


@pytest.mark.parametrize("name", ["history.json", "history.txt", None])
def test_generate_prints_the_answer_alone(place, name):
    history = [] if name is None else ["--history", place.root / name]
    prompt = "Which shelf does this reader put the book on? book: letters from a clumsy prophet"
    printed = quietly("generate", "--plug", place.plug, "--prompt", prompt, *history, "--max_new_tokens", "6")
    assert printed == printed.strip() + "\n" and printed.count("\n") == 1


def test_generate_streams_what_it_would_print(place):
    asked = [
        "generate",
        "--plug",
        place.plug,
        "--prompt",
        "book: a castle",
        "--max_new_tokens",
        "6",
        "--device",
        "cpu",
    ]
    asked += ["--history", place.root / "history.json"]
    assert quietly(*asked, "--stream").strip() == quietly(*asked).strip() != ""


def test_generate_samples(place, monkeypatch):
    given = {}
    original = PPlugForConditionalGeneration.generate

    def spy(self, *args, **kwargs):
        given.update(kwargs)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PPlugForConditionalGeneration, "generate", spy)
    asked = ["generate", "--plug", place.plug, "--prompt", "book: a castle", "--max_new_tokens", "3"]
    quietly(*asked)
    assert given["do_sample"] is False and "temperature" not in given
    quietly(*asked, "--temperature", "0.7", "--top_p", "0.9")
    assert (given["do_sample"], given["temperature"], given["top_p"]) == (True, 0.7, 0.9)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt", ""], "--prompt is empty: write what to answer."),
        (["--prompt", "p", "--top_p", "1.5"], "--top_p is a probability, at most 1, got 1.5."),
        (["--prompt", "p", "--temperature", "0"], "--temperature must be greater than 0, got 0.0."),
        (["--prompt", "p", "--labels", "a", "--stream"], "--labels are chosen by likelihood: leave out --stream"),
        (["--prompt", "p", "--num_beams", "2", "--stream"], "--stream prints every token as it comes"),
        (["--prompt", "p", "--device", "gpu"], "The device is 'gpu'; write it as torch does: cpu, cuda, cuda:1, mps."),
        (["--prompt", "p", "--device", "xpu"], "The device 'xpu' is not there: this machine, and torch"),
    ],
)
def test_what_generate_refuses(place, capsys, arguments, message):
    fails(capsys, 1, message, "generate", "--plug", place.plug, *arguments)


def test_generate_draws_who_speaks_into_a_new_folder(place):
    pytest.importorskip("matplotlib")
    picture = place.root / "new" / "who.png"
    arguments = ["--history", place.root / "history.json", "--picture", picture]
    quietly("generate", "--plug", place.plug, "--prompt", "book: a castle", *arguments)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_encode_a_second_time_encodes_nothing(place):
    arguments = ["encode", "--data", place.data, "--encoder", ENCODER, "--vectors", place.root / "fresh"]
    first, second = quietly(*arguments), quietly(*arguments)
    count = int(first.split()[0])
    assert count > 0 and first == f"{count} distinct items: {count} encoded now, 0 were in the store.\n"
    assert second == f"{count} distinct items: 0 encoded now, {count} were in the store.\n"


def test_a_history_is_encoded_without_a_backbone_and_answered_for(place, tmp_path):
    plug, history = tmp_path / "plug", place.root / "history.json"
    plug.mkdir()
    config = json.loads((place.plug / "config.json").read_text()) | {"backbone": str(tmp_path / "gone")}
    (plug / "config.json").write_text(json.dumps(config))
    printed = quietly("encode", "--plug", plug, "--history", history, "--output", tmp_path / "persona")
    count = len(json.loads(history.read_text()))
    assert printed.startswith(f"{count} items of ") and "their texts are not" in printed
    assert [file.name for file in (tmp_path / "persona").iterdir()] == ["persona.safetensors"]

    asked = ["generate", "--plug", place.plug, "--prompt", "book: a castle", "--max_new_tokens", "6"]
    picture = ["--picture", tmp_path / "who.png"] if importlib.util.find_spec("matplotlib") else []
    answer = quietly(*asked, "--persona", tmp_path / "persona", *picture)
    assert answer == quietly(*asked, "--history", history)
    assert not picture or picture[1].is_file()


ONE_HISTORY = ["encode", "--plug", "x", "--history", "y", "--output", "z"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["encode"], "Give --data and --encoder, or --plug, --history and --output"),
        (["encode", "--plug", "x", "--history", "y"], "give all three"),
        (["encode", "--source", "x", "--store", "y"], "give all three (--plug missing)"),
        (["encode", "--plug", "x", "--store", "y"], "give all three (--source missing)"),
        (
            ["encode", "--data", ".", "--encoder", "y", "--output", "z"],
            "leave out --output, which another use",
        ),
        (["encode", "--data", ".", "--plug", "y", "--history", "h", "--output", "z"], "leave out --data"),
        (
            ["encode", "--data", ".", "--encoder", "y", "--workers", "7", "--user", "u", "--bad_rows", "skip"],
            "leave out --user and --bad_rows and --workers, which another use",
        ),
        (
            [*ONE_HISTORY, "--history_prompt=: ", "--labelled_items=false", "--vectors=v", "--splits=train"],
            "leave out --splits and --labelled_items and --history_prompt and --vectors, which",
        ),
        (
            ["encode", "--source", "x", "--store", "y", "--plug", "z", "--task", "LaMP-2"],
            "leave out --task, which another use",
        ),
        (
            ["encode", "--data", ".", "--encoder", "y", "--item_template", "{text}", "--labelled_items", "false"],
            "--item_template says which fields are read: leave out --labelled_items",
        ),
        (
            ["encode", "--data", ".", "--encoder", "y", "--item_template", "{text!r}"],
            "item_template",
        ),
        (["generate", "--plug", "x", "--prompt", "p", "--picture", "p.png"], "--picture draws the items of a user"),
        (["generate", "--plug", "x", "--prompt", "p", "--history", "y", "--persona", "z"], "give one of them"),
        (["generate", "--plug", "x", "--prompt", "p", "--persona", "no/where"], "persona"),
    ],
)
def test_what_a_persona_needs(capsys, arguments, message):
    assert main(arguments) == 1
    assert message in capsys.readouterr().err


def test_info_reads_the_folder_alone(place):
    printed = quietly("info", "--plug", place.plug)
    assert BACKBONE in printed and ENCODER in printed and "3 tokens of width 96, attention" in printed
    assert "{tag}: {text}" in printed and "parameters" in printed


def test_an_encoders_own_prompts_are_used_unless_told_otherwise(place, monkeypatch):
    from pplug_hf.commands import train

    given = {}
    monkeypatch.setattr(train, "train", lambda settings, **plug: given.update(plug))
    arguments = ["train", "--data", place.data, *PARTS, "--output", place.root / "unused"]
    quietly(*arguments)
    assert given == {}
    quietly(*arguments, "--query_prompt", "", "--aggregator", "mean")
    assert given == {"query_prompt": "", "aggregator": "mean"}


def test_the_demo(tmp_path):
    pytest.importorskip("matplotlib")
    printed = quietly("demo", "--epochs", "0.05", "--output", tmp_path / "demo")
    assert "identical" in printed and "Of 100 held-out questions" in printed
    assert (tmp_path / "demo" / "weights.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((tmp_path / "demo" / "results" / "results.json").read_text())["rows"]
    assert [r["row"] for r in rows] == ["no-persona", "instruction-only", "PPlug:wrong-user", "PPlug"]
    assert (tmp_path / "demo" / "plug" / "model.safetensors").is_file()


# ---- help -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", _COMMANDS)
def test_help_is_what_the_settings_say(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    shown = "".join(capsys.readouterr().out.split())
    module, settings, _, _ = _COMMANDS[command]
    options = list(fields(getattr(importlib.import_module(f"pplug_hf.commands.{module}"), settings)))
    for option in options + (list(choices().values()) if command == "train" else []):
        assert f"--{option.name}" in shown
        assert "".join(option.metadata["help"].split()) in shown


def test_help_lists_the_commands(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert main([]) == 2 and capsys.readouterr().out == shown
    assert all(f"  {name}" in shown and line in shown for name, (_, _, _, line) in _COMMANDS.items())


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


# ---- what does not work -----------------------------------------------------------------------------------------


def fails(capsys, status, message, *arguments):
    """One clear line on stderr, nothing like a traceback, and nothing of a user's texts."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == status
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    ours = [line for line in lines if line.startswith("pplug-hf")]
    assert len(ours) == 1 and ours[0] == lines[-1] and message in ours[0]
    assert "Traceback" not in "".join(lines) and SECRET not in "".join(lines)


def test_an_unknown_command(capsys):
    fails(capsys, 2, "no command 'trian'; options are demo, train, ", "trian")


def test_an_unknown_option_and_a_missing_one(capsys):
    for arguments in (["info", "--plug", "x", "--colour", "red"], ["info"], ["demo", "--epochs", "many"]):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"pplug-hf {arguments[0]}: error:")


@pytest.mark.parametrize("command", ["train", "evaluate", "encode"])
def test_a_missing_data_folder(place, capsys, command):
    folder = place.root / "nowhere"
    arguments = {
        "train": [*PARTS, "--output", place.root / "unused"],
        "evaluate": ["--plug", place.plug],
        "encode": ["--encoder", ENCODER],
    }
    fails(capsys, 1, f"{folder}: no such folder", command, "--data", folder, *arguments[command])


def test_a_missing_split(place, capsys):
    arguments = ["--plug", place.plug, "--data", place.data, "--split", "test"]
    fails(capsys, 1, "it has the splits dev, train", "evaluate", *arguments)


def train_arguments(place, *more, output="unused"):
    data = [] if "--data" in more else ["--data", place.data]
    parts = [a for pair in (PARTS[:2], PARTS[2:]) if pair[0] not in more for a in pair]
    vectors = ["--vectors", place.store]
    return ["train", *data, *parts, *vectors, *SMALL, "--output", place.root / output, *more]


@pytest.mark.parametrize(
    "more, message",
    [
        (["--task", "LaMP-2"], "are of task 'demo', but --task LaMP-2 was asked for; pass --task demo"),
        (["--task", "LaMP-9"], "There is no task 'LaMP-9'; choose one of LaMP-1"),
        (["--backbone", "no/such-model"], "Cannot load the backbone 'no/such-model'"),
        (["--encoder", "no/such-encoder"], "Cannot load the sentence encoder 'no/such-encoder'"),
        (["--validation_users", "0"], "choose other values of --leave_out_users and --validation_users"),
        (["--batch_size", "0"], "batch_size must be greater than 0, got 0."),
        (["--epochs", "-1"], "epochs must be greater than 0, got -1.0."),
        (["--aggregator", "sum"], "aggregator must be one of attention, mean; got 'sum'"),
        (["--item_template", "{plot}"], "has no field 'plot'"),
        (["--device", "cpu:0"], "training takes its kind, cpu; choose among several in the environment"),
        (["--report_to", "dairy"], "--report_to got 'dairy', which is not installed, or no tracker"),
    ],
)
def test_training_that_cannot_start(place, capsys, more, message):
    fails(capsys, 1, message, *train_arguments(place, *more))
    assert not (place.root / "unused").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ("prepare --questions_per_user -3", "--questions_per_user must be greater than 0, got -3."),
        ("prepare --min_history -1", "--min_history must be at least 0, got -1."),
        ("prepare --dev nan", "--dev must be finite and at least 0 and at most 1, got nan."),
        ("prepare --test 1.5", "--test must be at least 0 and at most 1, got 1.5."),
        ("train --history_dropout nan", "--history_dropout must be finite and at least 0 and at most 1, got nan."),
        ("train --validation_users inf", "--validation_users must be finite and at least 0 and at most 1"),
        ("train --synthetic_users -1", "--synthetic_users must be at least 0, got -1."),
        ("train --encoder_learning_rate nan", "--encoder_learning_rate must be finite and at least 0, got nan."),
        ("train --seed -1", "--seed must be at least 0 and at most 4294967295, got -1."),
        ("bench --leave_out_users nan", "--leave_out_users must be finite and at least 0 and at most 1, got nan."),
        ("fit --method ftp --clip nan", "--clip must be finite, got nan."),
        ("fit --method oppu --dropout 2", "--dropout must be at least 0 and at most 1, got 2.0."),
        ("serve --port 65536", "--port must be at least 0 and at most 65535, got 65536."),
    ],
)
def test_numbers_that_cannot_be_meant(options, message, capsys):
    """They are refused before any file is looked for; what is required is named, as files that are not there."""
    command, *given = options.split()
    _, _, parser = load_command(command, given[1] if command == "fit" else None)
    needed = [text for action in parser._actions if action.required for text in (action.option_strings[0], "x")]
    assert main([command, *needed, *given]) == 1
    assert message in capsys.readouterr().err


MISSING = [
    ("rouge_score", "ROUGE needs rouge-score; install it with: pip install 'pplug-hf[eval]'"),
    ("ijson", "Reading a JSON file row by row needs ijson; install it with: pip install 'pplug-hf[train]'"),
    ("accelerate", "Training needs accelerate; install it with: pip install 'pplug-hf[train]'"),
    ("bm25s", "The ranker 'bm25s' needs bm25s; install it with: pip install 'pplug-hf[retrieval]', or choose 'bm25'"),
    ("matplotlib", "Drawing needs matplotlib; install it with: pip install 'pplug-hf[viz]'"),
]


@pytest.mark.parametrize("package, message", MISSING, ids=[package for package, _ in MISSING])
def test_a_missing_package(place, tmp_path, capsys, monkeypatch, package, message):
    (tmp_path / "golds.json").write_text(json.dumps({"task": "LaMP_4", "golds": [{"id": "1", "output": "a storm"}]}))
    data = ["--data", place.data, "--vectors", place.store]
    history = ["--history", place.root / "history.json", "--picture", tmp_path / "who.png"]
    arguments = {
        "rouge_score": ["score", "--predictions", tmp_path / "golds.json", "--golds", tmp_path / "golds.json"],
        "ijson": ["report", "--data", place.data / "dev_questions.json", "--task", "demo"],
        "accelerate": train_arguments(place),
        "bm25s": ["bench", *data, "--plugs", f"a={place.plug}", "--rows", "bm25s@2", "--output", tmp_path / "bench"],
        "matplotlib": ["generate", "--plug", place.plug, "--prompt", "book: a castle", *history],
    }
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    plots._matplotlib.cache_clear()
    fails(capsys, 1, message, *arguments[package])


def test_a_missing_package_is_an_import_error_too(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)  # another test may have imported it
    with pytest.raises(ImportError, match="rouge-score") as error:
        require("rouge_score.rouge_scorer", "eval", "ROUGE")
    assert isinstance(error.value, MissingPackageError) and isinstance(error.value, ConfigurationError)


def test_items_of_another_task(place, capsys):
    data = place.root / "renamed"
    write_data(data, task="LaMP_2")
    fails(capsys, 1, "does not hold task LaMP-2", *train_arguments(place, "--data", data))


def test_questions_without_answers(place, capsys):
    data = place.root / "withheld"
    write_data(data)
    (data / "train_outputs.json").unlink()
    fails(capsys, 1, "Neither train_outputs.json nor", *train_arguments(place, "--data", data))


def test_a_folder_with_something_else_in_it_is_left_alone(place, capsys):
    folder = place.root / "thesis"
    folder.mkdir()
    (folder / "chapter.txt").write_text("one")
    fails(capsys, 1, "exists, is not empty and holds no plug", *train_arguments(place, output="thesis"))
    assert [p.name for p in folder.iterdir()] == ["chapter.txt"]
    fails(capsys, 1, "Not a directory", *train_arguments(place, output="thesis/chapter.txt/plug"))


@pytest.mark.parametrize("command", ["generate", "evaluate", "info"])
def test_what_is_no_plug(place, capsys, command):
    arguments = {"generate": ["--prompt", "x"], "evaluate": ["--data", place.data], "info": []}[command]
    fails(capsys, 1, "is a model of type 't5', not a plug", command, "--plug", BACKBONE, *arguments)
    fails(capsys, 1, "Cannot load config.json of the plug", command, "--plug", place.root / "none", *arguments)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("object.json", json.dumps({"items": [SECRET]}).encode(), "holds a JSON dict, not a list of items"),
        ("cut.json", f'["{SECRET}", '.encode(), "is not valid JSON"),
        ("latin.txt", f"{SECRET} é".encode("latin-1"), "is not UTF-8 text"),
        ("numbers.json", json.dumps([SECRET, 3]).encode(), "History item 1 is an int, not a text"),
        ("fields.json", json.dumps([{"title": SECRET}]).encode(), "History item 0 has no field"),
        ("cut.jsonl", f'{{"text": "{SECRET}", '.encode(), "is not valid JSON Lines"),
        ("log.csv", f"text\n{SECRET}".encode(), "is of an unknown kind: give .json, .jsonl (both also .gz) or .txt"),
        (None, b"", "There is no history file"),
    ],
)
def test_a_history_that_is_none(place, capsys, name, content, message):
    file = place.root / (name or "missing.json")
    if name:
        file.write_bytes(content)
    arguments = ["generate", "--plug", place.plug, "--prompt", "book: a castle", "--history", file]
    fails(capsys, 1, message, *arguments)


def test_a_history_holds_the_same_items_in_any_kind_of_file(tmp_path):
    items = [{"text": "a wand", "tag": "epic"}, {"text": "two\u2028lines", "tag": "dark"}]
    lines = "\n".join(json.dumps(item, ensure_ascii=False) for item in items).encode()
    for name, content in (
        ("h.json", json.dumps(items).encode()),
        ("h.JSON.gz", gzip.compress(json.dumps(items).encode())),
        ("h.jsonl", lines),
        ("h.jsonl.gz", gzip.compress(lines)),
        ("h.ndjson", b"\xef\xbb\xbf" + lines + b"\n\n"),
    ):
        (tmp_path / name).write_bytes(content)
        assert read_history(str(tmp_path / name)) == items, name
    for name in ("h.txt", "h"):  # a line ends where editors end it, and nowhere else
        (tmp_path / name).write_bytes("a wand\r\n\n<b>two\u2028lines\x0cof text</b>\n".encode())
        assert read_history(str(tmp_path / name)) == ["a wand", "<b>two\u2028lines\x0cof text</b>"]


def test_an_interrupt_is_no_error(monkeypatch, capsys):
    from pplug_hf.commands import info

    def interrupted(settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "info", interrupted)
    assert main(["info", "--plug", "x"]) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("arguments", [["--help"], ["recipes"]])
def test_a_reader_that_has_seen_enough_is_no_error(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "pplug_hf", *arguments]
    with os.fdopen(writing) as closed:
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "")


def test_an_output_of_fit_is_not_taken_for_a_plug(tmp_path, capsys):
    (tmp_path / "method.json").write_text("{}")
    assert main(["info", "--plug", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "not a plug but an output of `pplug-hf fit`" in said and "--trained NAME=FOLDER" in said


def test_another_model_than_a_plug_is_refused_without_advice_in_python(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    assert main(["info", "--plug", str(tmp_path)]) == 1
    assert capsys.readouterr().err.endswith("not a plug. `pplug-hf train` puts a plug on it.\n")
