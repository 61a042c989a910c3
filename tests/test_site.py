"""What makes and checks the documentation does what it says; the site itself is built by `make docs`."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytest.importorskip("sphinx")  # of the extra docs

import check_docs
import docstrings
import generated
import mathml

from pplug_hf import cli

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


def test_the_check_finds_messages_that_nothing_says(tmp_path):
    page = tmp_path / "troubleshooting.md"
    page.write_text(
        "## `DataError`\n\n| message | why |\n|---|---|\n| Got 1 personas for 2 prompts | x |\n"
        "| There is no file ... / The zebra is missing | x |\n\n## Of others\n\n| message | why |\n|---|---|\n| Zebras! | x |\n"
    )
    assert [*check_docs.messages(page)] == [
        "troubleshooting.md explains the message 'The zebra is missing', which nothing says"
    ]


def test_the_check_finds_what_comes_from_the_network(tmp_path):
    (tmp_path / "page.html").write_text('<a href="https://x.org">x</a><script src="https://cdn.org/a.js"></script>')
    (defect,) = check_docs.network(tmp_path)
    assert "cdn.org" in defect
