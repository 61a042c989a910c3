"""The rows of a bench, by name: what is done for each example before the backbone answers.

| name | what the backbone reads |
|---|---|
| `no-persona` | the input alone |
| `frequencies` | the input alone; its label probabilities are mixed with how often the user gave each label |
| `bm25@4` | 4 items that this ranker finds, then the input; also random, recency, bm25s, dense, and any other number |
| `NAME` | [I; P; input], by the plugs that the user calls NAME; several are seeds |
| `NAME:wrong-user` | the same with P of another user's history |
| `NAME:no-history` | the same with P of an empty history |
| `NAME:top-4` | the same with P of the 4 items that speak loudest |
| `NAME:last-8` | the same with P of the 8 newest items |
| `NAME+bm25@1` | [I; P; retrieved; input] |
| `NAME+bm25@1:paper-order` | [retrieved; I; P; input] |

A history shorter than the number is taken whole. What is behind a plug's name changes its persona alone: the items of
`NAME:wrong-user+bm25@1` are the user's own. The name `instruction-only` is kept for plugs that were trained without
histories, and is always asked without.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from ..errors import ConfigurationError
from ..tasks.task import Task
from .retrievers import RANKERS

Shown = Literal["whole", "wrong-user", "no-history", "top", "last"]

NO_PERSONA, FREQUENCIES, INSTRUCTION_ONLY, PAPER_ORDER = "no-persona", "frequencies", "instruction-only", "paper-order"
_COUNTED = ("top", "last")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_SHOWN = ", ".join(name if name not in _COUNTED else f"{name}-N" for name in get_args(Shown)[1:])


@dataclass(frozen=True)
class Row:
    """One row; `str(row)` is its name."""

    plug: str = ""  # name of the plugs; none for the bare backbone
    shown: Shown = "whole"  # which history the persona is made of
    items: int = 0  # of it, for "top" and "last"
    ranker: str = ""  # what finds the items of the prompt; none without retrieval
    k: int = 0  # how many
    paper_order: bool = False  # retrieved items in front of the soft prompt
    frequencies: bool = False  # mix in the user's label frequencies

    def __str__(self) -> str:
        if self.frequencies:
            return FREQUENCIES
        shown = "" if self.shown == "whole" else f":{self.shown}" + (f"-{self.items}" if self.items else "")
        found = f"{self.ranker}@{self.k}" + (f":{PAPER_ORDER}" if self.paper_order else "") if self.ranker else ""
        return f"{self.plug}{shown}" + (f"+{found}" if self.plug and found else found) or NO_PERSONA

    @property
    def ignores_history(self) -> bool:
        """Whether a plug answers without anybody's history."""
        return self.shown == "no-history" or self.plug == INSTRUCTION_ONLY


def parse_row(text: str, plugs: Collection[str] = ()) -> Row:
    """The row of that name.

    Args:
        text: see the table above.
        plugs: the names of plugs there are.

    Raises:
        ConfigurationError: no such row. The message says where reading it failed, and what there is.
    """

    def wrong(at: str, why: str) -> ConfigurationError:
        named = (
            f"; of the plugs {', '.join(plugs)}: NAME, NAME:CHANGE with {_SHOWN}, NAME+RANKER@K and " if plugs else ""
        )
        named += f"NAME+RANKER@K:{PAPER_ORDER}" if plugs else "; of plugs, once they are named"
        return ConfigurationError(
            f"There is no row {text!r}, at {at!r}: {why}. Rows are {NO_PERSONA}, {FREQUENCIES}, and RANKER@K with "
            f"{', '.join(RANKERS)}{named}."
        )

    if text == NO_PERSONA:
        return Row()
    if text == FREQUENCIES:
        return Row(frequencies=True)
    head, plus, tail = text.partition("+")
    if not plus and "@" in head:
        head, tail = "", head
    row = Row()
    if head or plus or not text:
        name, colon, change = head.partition(":")
        if name not in plugs:
            raise wrong(name, f"no plug has this name (--plugs NAME=FOLDER gives one{_ranker_hint(name)})")
        row = Row(plug=name)
        if colon:
            kind, dash, number = change.rpartition("-")
            if kind in _COUNTED and dash:
                row = replace(row, shown=kind, items=_number(number, lambda why: wrong(number, why)))
            elif change in get_args(Shown) and change not in ("whole", *_COUNTED):
                row = replace(row, shown=change)
            else:
                raise wrong(change, f"what changes a persona is one of {_SHOWN}")
        if name == INSTRUCTION_ONLY and row.shown not in ("whole", "no-history"):
            raise wrong(change, "plugs of this name are asked without history")
    if tail or plus:
        found, colon, order = tail.partition(":")
        ranker, at, number = found.partition("@")
        if ranker not in RANKERS:
            raise wrong(ranker, f"rankers are {', '.join(RANKERS)}")
        if not at:
            raise wrong(found, f"say how many items, as in {ranker}@4")
        row = replace(row, ranker=ranker, k=_number(number, lambda why: wrong(number, why)))
        if colon and (order != PAPER_ORDER or not row.plug):
            raise wrong(order, f"only {PAPER_ORDER} may stand here, and only with a plug in front of the +")
        row = replace(row, paper_order=bool(colon))
    return row


def parse_rows(texts: Iterable[str], plugs: Collection[str] = ()) -> list[Row]:
    """Several rows, each once, in their order. Errors as in `parse_row`."""
    return list(dict.fromkeys(parse_row(text, plugs) for text in texts))


def parse_plugs(texts: Iterable[str]) -> dict[str, list[str]]:
    """What `--plugs` says: `NAME=FOLDER`, `NAME=FOLDER,FOLDER`; a name that comes again adds to its seeds.

    Raises:
        ConfigurationError: not of this form, a name that is none or is taken by a row, or the same folder twice.
    """
    plugs: dict[str, list[str]] = {}
    for text in texts:
        name, equals, places = text.partition("=")
        found = [place.strip() for place in places.split(",")]
        if not equals or not all(found):
            raise ConfigurationError(
                f"--plugs got {text!r}: write NAME=FOLDER, or NAME=FOLDER,FOLDER for several seeds of one row."
            )
        if not _NAME.fullmatch(name) or name in (NO_PERSONA, FREQUENCIES, *RANKERS):
            raise ConfigurationError(
                f"--plugs got the name {name!r}: use letters, digits, '.', '_' and '-', and none of "
                f"{', '.join((NO_PERSONA, FREQUENCIES, *RANKERS))}."
            )
        own = plugs.setdefault(name, [])
        if twice := [place for place in found if place in own or found.count(place) > 1]:
            raise ConfigurationError(f"--plugs {name} names {twice[0]!r} twice; a seed counts once.")
        own += found
    return plugs


def default_rows(
    task: Task, plugs: Sequence[str], *, users: int, frequencies: bool, dense: bool, reference: str | None = None
) -> list[Row]:
    """Rows that show whether a persona helps, more than retrieval would, and whether it is the user's own.

    Args:
        task: what is asked.
        plugs: the names of plugs there are.
        users: how many there are; another user's history needs two.
        frequencies: whether there are examples to fit the rival on.
        dense: whether there is an encoder for dense retrieval.
        reference: the name of the plugs that get the control rows (default: of the first ones with histories).
    """
    names = [NO_PERSONA]
    if frequencies and task.labels and task.answer_field:
        names.append(FREQUENCIES)
    for ranker in ("recency", "bm25", *(["dense"] if dense else [])):
        names += [f"{ranker}@1", f"{ranker}@4"]
    first = reference if reference in plugs else next((name for name in plugs if name != INSTRUCTION_ONLY), None)
    names += [name for name in plugs if name != first]
    if first is not None:
        names += [f"{first}:wrong-user"] if users > 1 else []
        names += [f"{first}:no-history", f"{first}:top-4", f"{first}+bm25@1", first]
    return parse_rows(names, plugs)


def canonical(names: Iterable[str]) -> list[str]:
    """Names of rows in the order of `default_rows`, where nobody says in which order they were asked for."""

    def place(name: str) -> tuple[Any, ...]:
        plug, _, found = name.partition("+") if "+" in name or "@" not in name else ("", "", name)
        head, _, change = plug.partition(":")
        ranker, _, k = found.partition("@")
        group = 0 if name == NO_PERSONA else 1 if name == FREQUENCIES else 2 if not plug else 3
        order = list(RANKERS).index(ranker) if ranker in RANKERS else -1
        digits = re.sub(r"\D", "", k)
        # A plug's own row stands below its variants: it is what they are compared with.
        return group, head, not change and not found, bool(found), change, order, int(digits or 0), name

    return sorted(names, key=place)


def _number(text: str, wrong: Callable[[str], ConfigurationError]) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise wrong("a whole number of at least 1 belongs here")
    return int(text)


def _ranker_hint(name: str) -> str:
    return f"; for retrieval write {name}@4" if name in RANKERS else ""
