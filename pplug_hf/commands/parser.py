"""Parsers made of settings: every field is one option, in groups, with its default; a mistake is one line with a hint."""

from __future__ import annotations

import shutil
from argparse import Action, ArgumentParser, ArgumentTypeError, HelpFormatter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from argparse import _ArgumentGroup


class Parser(ArgumentParser):
    """A parser of the options of one command.

    Args:
        prog: the command, as it is typed.
        kinds: settings, dataclasses whose fields have a `help`. Groups of options are named by their `GROUPS`: name of
            the first field -> title.
    """

    def __init__(self, prog: str, *kinds: type):
        needed = [f.name for kind in kinds for f in fields(kind) if _is_required(f)]
        usage = " ".join([prog, *(f"--{name} {name.upper()}" for name in needed), "[options]"])
        self.help_command = f"{prog} --help"
        super().__init__(prog, usage, kinds[0].__doc__, formatter_class=_Help, allow_abbrev=False)
        groups = {"required": self.add_argument_group("required")} if needed else {}
        for kind in kinds:
            self._add(kind, groups)
        self._action_groups.remove(self._optionals)  # -h and others without a group come last
        self._action_groups.append(self._optionals)

    def _add(self, kind: type, groups: dict[str, _ArgumentGroup]) -> None:
        types, title = get_type_hints(kind), "options"
        for each in fields(kind):
            title = getattr(kind, "GROUPS", {}).get(each.name, title)
            name = "required" if _is_required(each) else title
            if name not in groups:
                groups[name] = self._optionals if name == "options" else self.add_argument_group(name)
            default = each.default if each.default_factory is MISSING else each.default_factory()
            groups[name].add_argument(
                f"--{each.name}",
                required=_is_required(each),
                default=None if default is MISSING else default,
                help=each.metadata["help"],
                **_form(types[each.name]),
            )

    def parse(self, arguments: Iterable[str]) -> dict[str, Any]:
        """Return the value of every option by its name; leave with status 2 and one line on stderr if there is a mistake."""
        values, unknown = self.parse_known_args(list(self._spelled(arguments)))
        if unknown:
            self.error(f"{unknown[0]!r} belongs to no option (a value with spaces needs quotation marks).")
        return vars(values)

    def _spelled(self, arguments: Iterable[str]) -> Iterator[str]:
        """Yield arguments with the options as they are declared: --max-items is --max_items, --no_resume --resume false."""
        for text in arguments:
            given, equals, value = text.partition("=")
            name = "--" + given[2:].replace("-", "_")
            positive = self._option_string_actions.get(f"--{name[5:]}")
            if not given.startswith("--") or len(given) == 2 or any(map(str.isspace, given)):
                yield text
            elif name in self._option_string_actions:
                yield name + equals + value
            elif name.startswith("--no_") and positive is not None and positive.type is _truth:
                yield f"--{name[5:]}=false"
            else:
                near = get_close_matches(name, [n for n in self._option_string_actions if n != "-h"], n=1)
                self.error(f"there is no option {given}{f'; did you mean {near[0]}?' if near else '.'}")

    def error(self, message: str) -> NoReturn:
        end = "" if message.endswith((".", "?", ")")) else "."
        self.exit(2, f"{self.prog}: error: {message}{end} See: {self.help_command}\n")


class _Help(HelpFormatter):
    """Help with one form per option, and defaults where there are any to name."""

    def __init__(self, prog: str):
        width = min(shutil.get_terminal_size().columns, 120)
        super().__init__(prog, max_help_position=32, width=max(width - 2, 40))

    def _expand_help(self, action: Action) -> str:
        text, default = action.help or "", action.default
        if action.required or default in (None, "", "==SUPPRESS==") or "(default" in text:
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        return f"{text} (default: {shown.lower() if isinstance(default, bool) else shown})"


def _is_required(field: Field) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _form(kind: Any) -> dict[str, Any]:
    """Return how argparse reads a type: a text, number, truth value or choice, several of them, or none at all."""
    kinds = [each for each in get_args(kind) if each is not type(None)]
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if get_origin(kind) is list:
        return {**_form(kinds[0]), "nargs": "+"}
    if kinds:
        form = _form(kinds[0])
        return {**form, "type": _or_none(form["type"])} if kinds[0] in (int, float) else form
    if kind is bool:
        return {"type": _truth, "nargs": "?", "const": True, "metavar": "true|false"}
    reader, metavar = {int: (_whole_number, "N"), float: (_number, "X")}.get(kind, (str, "TEXT"))
    return {"type": reader, "metavar": metavar}


def _truth(text: str) -> bool:
    known = {**dict.fromkeys(("true", "yes", "1"), True), **dict.fromkeys(("false", "no", "0"), False)}
    if text.lower() not in known:
        raise ArgumentTypeError(f"{text!r} is neither true nor false")
    return known[text.lower()]


def _or_none(read: Callable[[str], object]) -> Callable[[str], object]:
    return lambda text: None if text.lower() == "none" else read(text)


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a number") from None
