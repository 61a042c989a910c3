"""What the guides show works: their Python runs on local stand-ins, and their commands are ones that exist. What makes and
checks the site does what it says; the site itself is built by `make docs`."""

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import check_docs
import docstrings
import generated
import mathml
import pytest
import tiny
from hub_server import Hub
from test_cli import as_movies, movie_tag, write_data

from pplug_hf import cli

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
ASSETS = files("pplug_hf.demo") / "assets"
CHAT = "{% for m in messages %}<user> {{ m.content }} {% endfor %}<bot>"


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Names on the Hub -> folders of models small enough for a test."""
    chat = tmp_path_factory.mktemp("chat")
    tiny.backbone("qwen3").save_pretrained(chat)
    tokenizer = tiny.tokenizer("qwen3")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(chat)
    return {
        "google/flan-t5-base": str(ASSETS / "backbone"),
        "BAAI/bge-base-en-v1.5": str(ASSETS / "encoder"),
        "Qwen/Qwen3-0.6B": str(chat),
    }


def blocks(page, language):
    """The code of a page, block by block."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page):
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


SHARE = ROOT / "docs" / "share.md"
PYTHON = [page for page in PAGES if blocks(page, "python") and page != SHARE]


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.stem)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, stand_ins, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "LaMP_2", "LaMP_2", as_movies, movie_tag)
    names = {}
    for code in blocks(page, "python"):
        for name, place in stand_ins.items():
            code = code.replace(f'"{name}"', repr(place))
        exec(compile(code, str(page), "exec"), names)


def test_the_python_about_the_hub_runs_against_one(stand_ins, tmp_path):
    """As it stands, in a process that takes a server on this machine for the Hub."""
    with Hub({"hf_mine": "me"}) as hub:
        for name, place in stand_ins.items():
            hub.repo(name).add(Path(place))
        code = "\n".join(blocks(SHARE, "python"))
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=hub.environment("hf_mine", tmp_path / "home"),
        )
        assert done.returncode == 0, done.stderr[-3000:]
        made = hub.repos["me/pplug-flan-t5-base-lamp2"]
        assert made.private and {"config.json", "model.safetensors", "README.md"} <= {*made.files()}, done.stderr


COMMANDS = [(page, words) for page in PAGES for words in commands(page) if words[0] == "pplug-hf"]


@pytest.mark.parametrize("page, words", COMMANDS, ids=lambda part: getattr(part, "stem", None) or part[1])
def test_the_commands_of_a_page_parse(page, words, monkeypatch):
    """The command is parsed and its function is not run."""
    module, _, function, _ = cli._COMMANDS[words[1]]
    ran = []
    monkeypatch.setattr(f"pplug_hf.commands.{module}.{function}", lambda *args, **kwargs: ran.append(args))
    assert cli.main(words[1:]) == 0 and ran


# ---- what makes the site ----------------------------------------------------------------------------------------


def rst(text):
    return "\n".join(docstrings.to_rst(text.splitlines()))


@pytest.mark.parametrize(
    "written, markup",
    [
        ("`x` and `y`s, not [`z`].", "``x`` and ``y``\\ s, not :py:obj:`.z`."),
        ("[`Persona`]s of `[B, N]`", ":py:obj:`.Persona`\\ s of ``[B, N]``"),
        ("see --rows, `--plugs x` and a -- dash", "see ``--rows``, ``--plugs x`` and a -- dash"),
        ("A list:\n- one\n  of two lines\n- two", "A list:\n\n- one\n  of two lines\n\n- two"),
        ("As\n\n    `it` is\n\nSo `it` is.", "As\n\n::\n\n    `it` is\n\nSo ``it`` is."),
        ("Returns:\n    `a` (b: c)", "Returns:\n    : ``a`` (b: c)"),
        ("Args:\n    a: one\n        and more", "Args:\n    a: one\n        and more"),
    ],
)
def test_docstrings_become_markup(written, markup):
    assert rst(written) == markup


def test_tables_of_docstrings_become_tables():
    assert rst("| a | b |\n|---|---|\n| `c` | d |").split() == (
        ["..", "list-table::", ":header-rows:", "1", "*", "-", "a", "-", "b", "*", "-", "``c``", "-", "d"]
    )


@dataclass
class Explained:
    first: int  # what it is
    second: str = field(default="x", metadata={"help": "Another one."})


def test_fields_are_explained_by_their_comment_or_their_help():
    assert docstrings.field_names(Explained) == ["first", "second"]
    assert docstrings.explained_fields(Explained) == {"first": "what it is", "second": "Another one. Default: `'x'`."}


@pytest.mark.parametrize("name", cli._COMMANDS)
def test_the_reference_has_every_option_once(name):
    _, _, parser = cli.load_command(name)
    text = generated.section(name)
    options = {action.option_strings[0] for action in parser._actions if action.dest != "help"}
    shown = re.findall(r"^\| `(--\w+)` \|", text, re.MULTILINE)
    assert len(shown) == len(set(shown)) and set(shown) == {o for o in options if not o.startswith("--no_")}
    assert str(Path.home()) not in text  # a default folder is this machine's


def test_formulas_become_mathml():
    assert "<mfrac>" in mathml.mathml(r"\frac{a}{b}") and 'display="block"' in mathml.mathml("a", block=True)
    with pytest.raises(Exception, match="cannot be written as MathML"):
        mathml.mathml(r"\nonsense{a}")


# ---- what checks it ---------------------------------------------------------------------------------------------


def whole(a, b):
    """Sums.

    Args:
        a, b: numbers.

    Returns:
        Their sum.
    """
    return a + b


def lacking(a, b) -> int:
    """Sums.

    Args:
        a: a number.
    """
    raise check_docs.pplug_hf.errors.DataError("no")


def test_the_check_finds_what_a_docstring_leaves_out():
    assert [*check_docs.docstring(whole)] == []
    found = [*check_docs.docstring(lacking)]
    assert found[:2] == ["says nothing of the argument b", "does not say what it returns"]
    assert [*check_docs.docstring(lambda: None)] == ["no docstring"]


def test_the_check_finds_what_a_page_says_wrongly(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "`modeling/plug.py`: `PersonaPlug.forward`, `table.md`, `TrainSettings.epochs` (10); but `modeling/plug.py`: `Plug`, "
        "`modeling/gone.py`, `TrainSettings.epochs` (11), `TrainSettings.gone` (1)"
    )
    assert [*check_docs.mentions([page])] == [
        "page.md mentions Plug of modeling/plug.py, which has none",
        "page.md mentions modeling/gone.py, which is not there",
    ]
    assert [*check_docs.defaults([page])] == [
        "page.md says that TrainSettings.epochs is 11; it is 10",
        "page.md mentions TrainSettings.gone, which is not there",
    ]


def test_the_check_finds_what_comes_from_the_network(tmp_path):
    (tmp_path / "page.html").write_text('<a href="https://x.org">x</a><script src="https://cdn.org/a.js"></script>')
    (defect,) = check_docs.network(tmp_path)
    assert "cdn.org" in defect
