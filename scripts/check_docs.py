"""Check what Sphinx does not: `python scripts/check_docs.py SITE` after `sphinx-build docs SITE`.

- Every public name (`pplug_hf.__all__`, with the methods of its classes) has a docstring that speaks of its arguments, of
  what it returns and of the errors it raises, and is in the reference; so is what guides and examples import.
- Every command has a section.
- Files, names in files, settings and their defaults that the pages mention are as they say, and the errors that they explain
  can happen.
- The site takes nothing from the network.

Prints one line for each defect and exits with 1 if there are any.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import os
import re
import sys
import textwrap
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent / "docs" / "extensions"))

from docstrings import explained_fields, field_names, has_fields, lists_fields

import pplug_hf
from pplug_hf import cli

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pplug_hf"
_SEE = re.compile(r"\b(?:[Ss]ee there|(?:[Ss]ee|[Aa]s in) (?:the )?\[?`)")


def main(arguments: list[str]) -> int:
    site = Path(arguments[0] if arguments else ROOT / "build" / "docs")
    if not (site / "objects.inv").is_file():
        print(f"{site} holds no documentation: build it with make docs.")
        return 1
    pages = sorted((ROOT / "docs").rglob("*.md"))
    defects = [*docstrings(), *reference(site), *commands(site), *network(site), *mentions(pages), *defaults(pages)]
    defects += messages(ROOT / "docs" / "troubleshooting.md")
    print("\n".join(defects) or "The documentation is complete.")
    return bool(defects)


# ---- docstrings -----------------------------------------------------------------------------------------------------


def public() -> Iterator[tuple[str, Any, bool]]:
    """(dotted name, object, whether it overrides another library's) of everything public, methods included."""
    for name in pplug_hf.__all__:
        value = getattr(pplug_hf, name)
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        yield name, value, False
        for member in dir(value) if inspect.isclass(value) else ():
            method = inspect.getattr_static(value, member)
            function = getattr(method, "__func__", getattr(method, "fget", method))
            if not inspect.isfunction(function) or not function.__module__.startswith("pplug_hf."):
                continue
            if not member.startswith("_") or member == "__call__":
                others = [base for base in value.__mro__ if not base.__module__.startswith("pplug_hf.")]
                yield f"{name}.{member}", function, any(member in vars(base) for base in others)


def docstrings() -> Iterator[str]:
    """What the docstrings of public names leave out."""
    for name, value, overrides in public():
        for defect in docstring(value, overrides):
            yield f"{name}: {defect}"


def docstring(value: Any, overrides: bool = False) -> Iterator[str]:
    """What the docstring of a class or function leaves out.

    Arguments of a class are those of its constructor, or its fields. A docstring may send its reader to another one ("See
    `forward`"), and one that overrides a method of another library need not repeat what is said there.
    """
    text = value.__doc__
    if not text or (inspect.isclass(value) and text.startswith(f"{value.__name__}(")):
        if not overrides:
            yield "no docstring"
        return
    if overrides or _SEE.search(text):
        return
    function: Any = value
    explained = set(re.findall(r"\w+", " ".join(re.findall(r"^\s+([\w*]+(?:, [\w*]+)*):", text, re.MULTILINE))))
    if inspect.isclass(value):
        if has_fields(value) and not lists_fields(value):
            said = explained_fields(value)
            yield from (f"says nothing of the field {name}" for name in field_names(value) if name not in said)
            return
        function = vars(value).get("__init__", lambda: None)
    for name in inspect.signature(function).parameters:
        if name not in ("self", "cls", "args", "kwargs", *explained):
            yield f"says nothing of the argument {name}"
    if inspect.isclass(value):
        return
    returns = inspect.signature(function).return_annotation
    says = text.startswith(("Return ", "Equation")) or "Returns:" in text
    if returns not in (None, "None", inspect.Signature.empty) and "Args:" in text and not says:
        yield "does not say what it returns"
    for error in sorted(raised(function)):
        if error not in text:
            yield f"does not say when it raises {error}"


def raised(function: Any) -> set[str]:
    """The errors of this package that a function raises itself."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise)]
    named = {ast.unparse(call.func) for call in calls if isinstance(call, ast.Call)}
    return named & {name for name in dir(pplug_hf.errors) if name.endswith("Error")}


# ---- the built site -------------------------------------------------------------------------------------------------


def reference(site: Path) -> Iterator[str]:
    """Public names that no page of the reference describes, and names that pages and examples import from elsewhere."""
    inventory = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    described = {line.split()[0] for line in inventory.splitlines() if " py:" in line}
    wanted = {f"pplug_hf.{name}" for name in pplug_hf.__all__ if name != "__version__"} | imported()
    for name in sorted(wanted - described):
        yield f"{name} is not in the reference: add it to docs/reference"


def imported() -> set[str]:
    """What the Python of README, guides and examples imports of this package."""
    code = [file.read_text(encoding="utf-8") for file in (ROOT / "examples").glob("*.py")]
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        code += re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    names = set()
    for node in (node for text in code for node in ast.walk(ast.parse(text))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pplug_hf"):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("pplug_hf.")}
    return names


def modules() -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of the package's modules."""
    for file in sorted(PACKAGE.rglob("*.py")):
        yield ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), file


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def commands(site: Path) -> Iterator[str]:
    """Commands without a section."""
    html = (site / "commands.html").read_text(encoding="utf-8")
    for name in cli._COMMANDS:
        if f'<section id="{name}">' not in html:
            yield f"The command {name} has no section in docs/commands.md"


def network(site: Path) -> Iterator[str]:
    """What a page would load from elsewhere."""
    for page in sorted(site.rglob("*.html")):
        for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page.read_text(encoding="utf-8")):
            if re.search(r"""(?:src|href)=["'](?:https?:)?//""", tag):
                yield f"{page.relative_to(site)} loads something from the network: {tag}"


# ---- what the pages say ---------------------------------------------------------------------------------------------


def mentions(pages: list[Path]) -> Iterator[str]:
    """Files, and names in files, that are not there: `folder/file.py`, `file.py`: `name`."""
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for file, name in re.findall(r"`([\w./-]+\.(?:py|md|cfg|toml)|[\w-]+(?:/[\w-]+)*/)`(?:: `([\w.]+)`)?", text):
            found = next((base / file for base in (PACKAGE, ROOT, page.parent) if (base / file).exists()), None)
            if found is None:
                if "/" in file.rstrip("/") or file.endswith(".py"):  # others are what a command writes
                    yield f"{page.name} mentions {file}, which is not there"
            elif name and not set(name.split(".")) <= defined(found):
                yield f"{page.name} mentions {name} of {file}, which has none"


def defined(file: Path) -> set[str]:
    """Names of classes, functions and module variables of a source file."""
    names = set()
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            names |= {ast.unparse(target) for target in getattr(node, "targets", [getattr(node, "target", None)])}
    return names


def defaults(pages: list[Path]) -> Iterator[str]:
    """Settings whose default is another one than a page says, as in `TrainSettings.epochs` (10)."""
    homes = {}
    for module, file in modules():
        homes |= {node.name: module for node in parsed(file).body if isinstance(node, ast.ClassDef)}
    for page in pages:
        for kind, name, said in re.findall(r"`(\w+)\.(\w+)` \(([^)]*)\)", page.read_text(encoding="utf-8")):
            settings = getattr(importlib.import_module(homes[kind]), kind) if kind in homes else None
            if not dataclasses.is_dataclass(settings):
                continue
            found = {field.name: field.default for field in dataclasses.fields(settings)}
            if name not in found:
                yield f"{page.name} mentions {kind}.{name}, which is not there"
            elif said != str(found[name]):
                yield f"{page.name} says that {kind}.{name} is {said}; it is {found[name]}"


def messages(page: Path) -> Iterator[str]:
    """Messages of troubleshooting.md that nothing in the package says: each part of one must have its words in one file."""
    said = [set().union(*map(words, strings(file))) for _, file in modules()]
    for section in re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
        ours = re.match(r"`\w+Error`", section)  # others are of other libraries, or no errors
        for message in re.findall(r"^\| (.+?) \| ", section, re.MULTILINE)[1:] if ours else ():
            for part in re.split(r" / |; ", message):
                if not any(words(part) <= known for known in said):
                    yield f"{page.name} explains the message {part!r}, which nothing says"


def strings(file: Path) -> list[str]:
    return [n.value for n in ast.walk(parsed(file)) if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]{3,}", text.lower()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
