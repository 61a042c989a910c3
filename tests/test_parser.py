"""Help that can be read, usage errors of one line, and neither of them waits for a model library."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from pplug_hf.cli import _COMMANDS, as_options, load_command, main
from pplug_hf.commands.options import option, required
from pplug_hf.commands.parser import Parser

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "sentence_transformers")


@dataclass
class Settings:
    """Bake bread."""

    GROUPS: ClassVar = {"flour": "dough", "heat": "oven"}

    flour: str = required("What it is made of.")
    salt: float = option(0.02, "Share of salt.")
    rounds: int | None = option(None, "Times to fold (default: the recipe's).")
    heat: Literal["top", "both"] = option("both", "Where the heat is.")
    steam: bool = option(True, "With steam.")
    seeds: list[str] | None = option(None, "What goes on top.")


def parse(*arguments):
    return Parser("bakery bake", Settings).parse(arguments)


def error_of(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        parse(*arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert left.value.code == 2
    return line


def test_help_comes_in_groups_with_defaults():
    shown = Parser("bakery bake", Settings).format_help()
    assert re.findall(r"^(\w.*):$", shown, re.MULTILINE) == ["required", "dough", "oven", "options"]
    assert shown.startswith("usage: bakery bake --flour FLOUR [options]\n\nBake bread.\n")
    said = " ".join(shown.split())
    assert "--flour TEXT What it is made of. dough:" in said  # no default
    assert "--salt X Share of salt. (default: 0.02)" in said
    assert "--rounds N Times to fold (default: the recipe's). oven:" in said
    assert "--heat {top,both} Where the heat is. (default: both)" in said
    assert "--steam [true|false] With steam. (default: true)" in said


@pytest.mark.parametrize("name", _COMMANDS)
def test_every_option_has_one_form_and_no_empty_default(name):
    kinds, _, parser = load_command(name)
    shown = parser.format_help()
    options = [action for action in parser._actions if action.dest != "help"]
    for action in options:
        assert action.option_strings == [f"--{action.dest}"]
        assert len(re.findall(rf"^  --{action.dest}\b", shown, re.MULTILINE)) == 1
    assert "None" not in shown and "MISSING" not in shown
    assert shown.count("required:") <= 1
    for kind in kinds:
        names = [action.dest for action in options]
        assert set(getattr(kind, "GROUPS", {})) <= set(names)


def test_values_are_read_by_their_types():
    values = parse("--flour", "rye", "--rounds", "3", "--no_steam", "--seeds", "poppy", "sesame")
    expected = {"salt": 0.02, "rounds": 3, "heat": "both", "steam": False, "seeds": ["poppy", "sesame"]}
    assert values == {"flour": "rye", **expected}
    for arguments in (["--no-steam"], ["--steam", "False"], ["--steam=no"]):
        assert parse("--flour", "rye", *arguments)["steam"] is False
    assert parse("--flour=rye", "--steam", "--salt", "-1")["salt"] == -1
    assert parse("--flour", "-- by the sack")["flour"] == "-- by the sack"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required: --flour. See: bakery bake --help"),
        (["--flout", "rye"], "there is no option --flout; did you mean --flour? See: bakery bake --help"),
        (["--zzz"], "there is no option --zzz. See:"),
        (["--flour", "rye", "--rounds", "3.5"], "argument --rounds: '3.5' is not a whole number. See:"),
        (["--flour", "rye", "--salt", "much"], "argument --salt: 'much' is not a number. See:"),
        (["--flour", "rye", "--steam", "maybe"], "argument --steam: 'maybe' is neither true nor false. See:"),
        (["--flour", "rye", "--heat", "low"], "invalid choice: 'low' (choose from"),
        (["--flour", "rye", "bread"], "'bread' belongs to no option (a value with spaces needs quotation marks)"),
        (["--no_flour"], "there is no option --no_flour"),
    ],
)
def test_a_usage_error_is_one_line_with_a_hint(capsys, arguments, message):
    line = error_of(capsys, *arguments)
    assert line.startswith("bakery bake: error: ") and message in line and line.endswith("See: bakery bake --help")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["bench", "--help"],
        ["generate"],
        ["train", "--epoch", "3"],
        ["train", "--data", "x", "--output", "x", "--backbone", "me/x", "--encoder", "me/x", "--epochs", "0"],
        ["train", "--data", "no/where/x", "--output", "x", "--backbone", "me/x", "--encoder", "me/x"],
        ["train", "--data", "tests", "--output", "x", "--backbone", "./none", "--encoder", "me/x"],
        ["train", "--data", "tests", "--output", "x", "--backbone", "me/x", "--encoder", "me/x", "--task", "LaMP-9"],
        ["evaluate", "--plug", "./none", "--data", "tests"],
        ["train", "--recipe", "none"],
    ],
    ids=" ".join,
)
def test_the_first_word_comes_before_a_model_library(arguments):
    code = (
        "import sys\nfrom pplug_hf.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        f"print('loaded', [m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "loaded []"
    assert not done.stderr or done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "said, typed",
    [
        ("query= is missing. Pass query=<text>.", "--query is missing. Pass --query."),
        ("task='LaMP-2' was asked for; pass task='demo'", "--task LaMP-2 was asked for; pass --task demo"),
        ("start again with resume=False.", "start again with --resume False."),
        ("within max_length=4 tokens", "within --max_length 4 tokens"),
        ("choose other values of max_length and '/tmp/max_length'", "choose other values of --max_length and '/tmp/max_length'"),
        ("pass token=, or check revision=", "pass HF_TOKEN, or check revision"),
        ("encoded by digest=abc, width=12, prompt=a film", "encoded by digest=abc, width=12, prompt=a film"),
        ("'a=b' and NAME=FOLDER stay", "'a=b' and NAME=FOLDER stay"),
        ("Cannot load the backbone 'x': no such folder, or pass backbone=<a loaded model>.", "Cannot load the backbone 'x': no such folder."),
        ("Cannot load 'x', or pass encoder=<a loaded SentenceTransformer>.", "Cannot load 'x', or pass --encoder."),
    ],
)  # fmt: skip
def test_keywords_of_python_become_options(said, typed):
    values = {"query": None, "task": None, "max_length": 4, "backbone": "x", "encoder": None, "resume": True}
    assert as_options(said, values) == typed


def test_an_error_of_the_library_names_options(capsys):
    assert (
        main(["train", "--data", "tests", "--output", "x", "--backbone", "a/b", "--encoder", "a/b", "--task", "x"])
        == 1
    )
    said = capsys.readouterr().err
    assert "There is no task 'x'; choose one of LaMP-1" in said and ".json file" in said and said.count("\n") == 1


def test_an_error_that_nobody_foresaw_is_one_line_unless_asked_for(capsys, monkeypatch):
    from pplug_hf.commands import info

    def broken(settings):
        raise RuntimeError("CUDA out of memory.\nTried to allocate 20 GiB")

    monkeypatch.setattr(info, "info", broken)
    monkeypatch.delenv("PPLUG_TRACEBACK", raising=False)
    assert main(["info", "--plug", "me/x"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "pplug-hf info: stopped by an unforeseen RuntimeError: CUDA out of memory. (PPLUG_TRACEBACK=1"
    )
    monkeypatch.setenv("PPLUG_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        main(["info", "--plug", "me/x"])
