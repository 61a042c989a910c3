"""The package's docstrings for Sphinx: what reads well in the source, as the markup that Sphinx knows.

Docstrings have Google's sections, which napoleon reads, and around them text as in Markdown. Before napoleon sees them:

    `code`, [`Name`]     become code, and a link to what has that name; a name that nobody has is a warning
    indented blocks      behind an empty line stay as they are written
    lists and tables     may stand right below their sentence
    fields               of data classes are listed with their `help` sentence, or the comment behind them
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from huggingface_hub.constants import HF_HOME
from sphinx.application import Sphinx
from sphinx.util.typing import stringify_annotation

_SPAN = re.compile(r"(\[?)`([^`]+)`(\]?)(?=(\w)?)")
_OPTION = re.compile(r"(?<!\S)--\w+")
_SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):")
_ITEM = re.compile(r"[-*] ")
_ROW = re.compile(r"\|.*\|$")


def setup(app: Sphinx) -> dict[str, Any]:
    # Napoleon listens with priority 500, and has to see what comes out of here.
    app.connect("autodoc-process-docstring", _process, priority=400)
    app.connect("autodoc-process-signature", _sign)
    app.connect("autodoc-skip-member", _skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    made = [*to_rst(lines)]
    if what == "class" and has_fields(obj) and not lists_fields(obj):
        said, types = explained_fields(obj), vars(obj).get("__annotations__", {})
        entries = [f"    {name} ({_type(types[name])}): {spans(said.get(name, ''))}" for name in field_names(obj)]
        made += ["", "Args:", *entries] if entries else []
    if what == "property" and made:
        made[0] = f": {made[0]}"  # or napoleon takes what stands in front of a colon for a type
    lines[:] = made


def _sign(app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: Any, returned: Any) -> Any:
    """Fields are listed below with what they mean; as a signature they would fill a page."""
    return ("", returned) if what == "class" and has_fields(obj) else None


def _skip(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """What a class inherits from other libraries is theirs to describe; a tuple's fields are described already."""
    home = getattr(getattr(obj, "fget", obj), "__module__", None) or "pplug_hf"
    return None if home.split(".")[0] == "pplug_hf" and type(obj).__name__ != "_tuplegetter" else True


def has_fields(cls: Any) -> bool:
    return dataclasses.is_dataclass(cls) or hasattr(cls, "_fields")  # or a NamedTuple


def lists_fields(cls: Any) -> bool:
    """Whether the docstring of a data class has a list of its own."""
    return re.search(r"^\s*(Args|Attributes):$", cls.__doc__ or "", re.MULTILINE) is not None


def field_names(cls: Any) -> list[str]:
    """A data class's own public fields that its constructor takes."""
    if not dataclasses.is_dataclass(cls):
        return list(cls._fields)
    return [f.name for f in dataclasses.fields(cls) if f.init and f.name in vars(cls).get("__annotations__", {})]


def _type(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else stringify_annotation(annotation, "smart").replace("~", "")


def explained_fields(cls: Any) -> dict[str, str]:
    """Name -> explanation of a data class's fields: their `help`, or the comment behind them."""
    found = comments(cls)
    for field in dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ():
        if "help" in field.metadata:
            default = "" if field.default is dataclasses.MISSING else f" Default: `{field.default!r}`."
            found[field.name] = field.metadata["help"] + default.replace(HF_HOME, "$HF_HOME")
    return found


def comments(cls: type) -> dict[str, str]:
    """Name -> the comment on the line of a field, as in `id: str  # of the row`."""
    source = textwrap.dedent(inspect.getsource(cls))
    said = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and "noqa" not in token.string
    }
    body = ast.parse(source).body[0].body
    return {
        node.target.id: said[node.lineno] for node in body if isinstance(node, ast.AnnAssign) and node.lineno in said
    }


def to_rst(lines: Iterable[str]) -> Iterator[str]:
    """A docstring's text as reStructuredText; its sections are left to napoleon."""
    before, indent = "", 0  # the line above, empty at a new paragraph; and where the last line with text stands
    section = ""
    literal: int | None = None  # where a literal block stands, within one
    for line in tables(lines):
        text, here = line.strip(), len(line) - len(line.lstrip())
        if literal is not None and (not text or here >= literal):
            yield line
            continue
        literal = None
        if not text:
            before = ""
            yield line
            continue
        if _SECTION.fullmatch(text):
            section = text
        elif not before and here == 0:
            section = ""
        elif not before and not section and here >= indent + 4:
            literal = here
            yield from ("::", "", line)
            continue
        if _ITEM.match(text) and before and not _ITEM.match(before) and here <= indent:
            yield ""
        if section in ("Returns:", "Yields:") and before == section:
            line = " " * here + ": " + text  # or napoleon takes what stands in front of a colon for a type
        before, indent = text, here + 2 * bool(_ITEM.match(text))
        yield spans(line)


def tables(lines: Iterable[str]) -> Iterator[str]:
    """Tables of Markdown as list-tables; other lines as they are."""
    for is_table, rows in groupby(lines, lambda line: bool(_ROW.match(line.strip()))):
        if not is_table:
            yield from rows
            continue
        head, _, *body = ([cell.strip() for cell in row.strip().strip("|").split("|")] for row in rows)
        yield from ("", ".. list-table::", "   :header-rows: 1", "")
        for cells in (head, *body):
            yield from ("   * - " * (i == 0) + "     - " * (i > 0) + cell for i, cell in enumerate(cells))
        yield ""


def spans(text: str) -> str:
    """`code`, [`Name`] and --options of one line."""

    def one(found: re.Match) -> str:
        opening, code, closing, letter = found.groups()
        rest = "\\ " if letter else ""  # markup must end where a word does
        if opening and closing:
            return f":py:obj:`.{code}`{rest}"
        return f"{opening}``{code}``{closing}{rest}"

    parts = re.split(r"(\[?`[^`]+`)", text)  # what stands in backticks is code already
    parts[::2] = [_OPTION.sub(r"`\g<0>`", part) for part in parts[::2]]
    return _SPAN.sub(one, "".join(parts))
