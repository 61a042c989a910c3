"""Names of methods: the only place where a name becomes a method, and a method a name.

| name | what the language model reads |
|---|---|
| `no-persona` | the input alone |
| `frequencies` | the input alone; its label probabilities are mixed with how often the user gave each label |
| `bm25@4` | 4 items found by this retriever, then the input; also random, recency, bm25s, dense, rrf, and any other number |
| `bm25@4:wrong-user` | the same with items of another user's history |
| `bm25@4:turns` | the 4 items as earlier turns of the chat, each with the user's own answer, then the input |
| `NAME` | [I; P; input], by the plugs that the user calls NAME; several are seeds |
| `NAME:wrong-user` | the same with P of another user's history |
| `NAME:nearest-user` | the same with P of the most similar history of another user |
| `NAME:no-history` | the same with P of an empty history |
| `NAME:top-4` | the same with P of the top 4 items by weight |
| `NAME:last-8` | the same with P of the 8 newest items |
| `NAME:strength-1.5` | the same with 1.5 times as strong a persona |
| `NAME:frequencies` | as `NAME`; its label probabilities are mixed with how often the user gave each label |
| `NAME+bm25@1` | [I; P; retrieved; input] |
| `NAME+bm25@1:paper-order` | [retrieved; I; P; input] |
| `RANKER@4` | as `bm25@4`, by the trained rankers that the user calls RANKER; `NAME+RANKER@1` likewise |
| `METHOD`, `METHOD:CHANGE`, `METHOD+bm25@1` | what another trained method answers; its class says what it takes |

A history shorter than the number is taken whole. The part after a plug's name changes its persona alone: the retrieved
items of `NAME:wrong-user+bm25@1` are the user's own. The name `instruction-only` is reserved for plugs that were trained
without histories, and they always answer without.

A method of one's own gets a name by `register_method`, or in its package by an entry point of the group
`pplug_hf.methods`. What is trained comes as NAME=FOLDER: plugs, and artefacts, whose kind is read from their `method.json`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from typing import TypeAlias, get_args

from ..errors import ConfigurationError
from ..tasks.task import Task
from .artefacts import class_of, read_artefact
from .base import Method, Plain, Retrieval, Trained
from .label_frequencies import LabelFrequencies
from .persona import INSTRUCTION_ONLY, HistoryVariant, Plug
from .retrievers import RANKERS, Ranker

NO_PERSONA, FREQUENCIES, PAPER_ORDER, TURNS = "no-persona", "frequencies", "paper-order", "turns"
WRONG_USER = "wrong-user"
PLUG, RANKER = "plug", "ranker"  # kinds of what is trained; others are those of artefacts
METHODS: dict[str, Callable[[], Method] | EntryPoint] = {NO_PERSONA: Plain, FREQUENCIES: LabelFrequencies}
METHODS |= {entry.name: entry for entry in entry_points(group="pplug_hf.methods")}
_COUNTED = ("top", "last")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_STRENGTH = "strength"
_VARIANTS = ", ".join(name if name not in _COUNTED else f"{name}-N" for name in get_args(HistoryVariant)[1:])
_VARIANTS += f", {_STRENGTH}-NUMBER, {FREQUENCIES}"


def register_method(name: str, factory: Callable[[], Method]) -> None:
    """Give a method of your own a name, which `pplug-hf bench --rows` then takes.

    Args:
        name: letters, digits, '.', '_' and '-'.
        factory: the class, or a function that makes the method.

    Raises:
        ConfigurationError: the name cannot be one, or is taken.
    """
    check_name(name, "register_method")
    METHODS[name] = factory


def check_name(name: str, where: str) -> None:
    if not _NAME.fullmatch(name) or name in (*METHODS, *RANKERS):
        raise ConfigurationError(
            f"{where} got the name {name!r}: use letters, digits, '.', '_' and '-', and none of "
            f"{', '.join((*METHODS, *RANKERS))}."
        )


def name_of(method: Method) -> str:
    """Return the name of a method; `method_of` turns it back."""
    if isinstance(method, Retrieval):
        end = TURNS if method.turns else WRONG_USER
        return f"{method.retriever}@{method.k}" + f":{end}" * (method.turns or method.wrong_user)
    if isinstance(method, Plug):
        variant = f":{method.history}" * (method.history != "whole") + f"-{method.items}" * bool(method.items)
        variant += f":{_STRENGTH}-{method.strength:g}" * (method.strength != 1)
        return f"{method.name}{variant}{_behind(method)}" + f":{PAPER_ORDER}" * method.paper_order
    if isinstance(method, LabelFrequencies) and method.name:
        return f"{method.name}:{FREQUENCIES}"
    if isinstance(method, Trained):
        return f"{method.name}" + f":{method.change}" * bool(method.change) + _behind(method)
    return next((name for name, factory in METHODS.items() if factory is type(method)), type(method).__name__)


def _behind(method: Plug | Trained) -> str:
    return f"+{name_of(method.retrieval)}" if method.retrieval else ""


Folders: TypeAlias = Mapping[str, Sequence[str]]  # name -> where it is, one place per seed


def method_of(name: str, plugs: Folders | None = None, trained: Folders | None = None) -> Method:
    """Return the method of that name.

    Args:
        name: see the table above.
        plugs: name -> plug folders or Hub ids, one per seed; the method has the first.
        trained: name -> folders of artefacts, likewise.

    Raises:
        ConfigurationError: no such method. The message says where reading it failed, and what there is.
    """
    (seeds,) = methods_of([name], plugs, trained).values()
    return seeds[0]


def methods_of(
    names: Iterable[str], plugs: Folders | None = None, trained: Folders | None = None
) -> dict[str, list[Method]]:
    """Return several methods by name, each once and in their order: one per seed. Arguments and errors as in `method_of`."""
    plugs, trained = plugs or {}, trained or {}
    kinds = dict.fromkeys(plugs, PLUG) | {name: read_artefact(places[0]).kind for name, places in trained.items()}
    methods: dict[str, list[Method]] = {}
    for text in names:
        method = _parse(text, kinds)
        name = text if text in METHODS else name_of(method)  # which may have been written as bm25@04
        methods[name] = _seeds(name, method, {**plugs, **trained})
    return methods


def _seeds(row: str, method: Method, places: Folders) -> list[Method]:
    """Return the method with each of its folders: of a plug or artefact, and of the trained ranker that it retrieves by."""
    if isinstance(method, Retrieval):
        return [replace(method, folder=folder) for folder in places.get(method.retriever, [""])]
    if not isinstance(method, Plug | Trained | LabelFrequencies):
        return [method]
    own = [replace(method, folder=folder) for folder in places.get(method.name, [""])]
    if isinstance(method, LabelFrequencies) or method.retrieval is None:
        return list(own)
    retrievals = _seeds(row, method.retrieval, places)
    count = max(len(own), len(retrievals))
    if {len(own), len(retrievals)} - {1, count}:
        raise ConfigurationError(
            f"The row {row} has {len(own)} seeds of {method.name} and {len(retrievals)} of {method.retrieval.retriever}: "
            "give as many of both, or one of either."
        )
    return [replace(own[i % len(own)], retrieval=retrievals[i % len(retrievals)]) for i in range(count)]


def read_name(name: str) -> Method | None:
    """Return the method of a name as files have it, where it is unknown what is trained; None if it means nothing here."""
    head, at, _ = name.partition("@")
    own, _, ranker = head.rpartition("+") if at else (head, "", "")
    found = {own.partition(":")[0]: PLUG, ranker: RANKER}
    with suppress(ConfigurationError):
        return _parse(name, {each: kind for each, kind in found.items() if _NAME.fullmatch(each)})
    return None


def name_in_files(name: str) -> str:
    """Return the name that a row has in files, for one that may have been written as bm25@04; likewise without knowledge."""
    method = None if name in METHODS else read_name(name)
    return name if method is None else name_of(method)


def _is_ranker(kind: str) -> bool:
    return kind == RANKER or (kind != PLUG and issubclass(class_of(kind), Ranker))


def _parse(text: str, kinds: Mapping[str, str]) -> Method:
    """Return the method of a name, given the names of what is trained and their kinds."""
    rankers = [*RANKERS, *(name for name, kind in kinds.items() if name not in RANKERS and _is_ranker(kind))]

    def wrong(at: str, why: str) -> ConfigurationError:
        plugs = [name for name, kind in kinds.items() if kind == PLUG]
        others = [name for name in kinds if name not in plugs and name not in rankers]
        forms = (
            f"NAME, NAME:CHANGE with {_VARIANTS}, NAME+RANKER@K, NAME+RANKER@K:{TURNS} and NAME+RANKER@K:{PAPER_ORDER}"
        )
        known = f"of the plugs {', '.join(plugs)}: {forms}" if plugs else "of plugs, once they are named"
        known += f"; of what else is trained: {', '.join(others)}" if others else ""
        return ConfigurationError(
            f"There is no row {text!r}, at {at!r}: {why}. Rows are {', '.join(METHODS)}, and RANKER@K, RANKER@K:{TURNS} or "
            f"RANKER@K:{WRONG_USER} with {', '.join(rankers)}; {known}."
        )

    if text in METHODS:
        factory = METHODS[text]
        if isinstance(factory, EntryPoint):
            factory = METHODS[text] = factory.load()
        return factory()
    head, plus, tail = text.partition("+")
    if not plus and "@" in head:
        head, tail = "", head
    own = _parse_own(head, kinds, wrong) if head or plus or not text else None
    if not tail and not plus and own:
        return own
    found, colon, end = tail.partition(":")
    retriever, at, number = found.partition("@")
    if retriever not in rankers:
        raise wrong(retriever, f"rankers are {', '.join(rankers)}")
    if not at:
        raise wrong(found, f"say how many items, as in {retriever}@4")
    retrieval = Retrieval(retriever, _number(number, wrong), turns=end == TURNS, wrong_user=end == WRONG_USER)
    if colon and end not in (TURNS, WRONG_USER) and (end != PAPER_ORDER or not isinstance(own, Plug)):
        raise wrong(end, f"{TURNS} may stand here and, with a plug in front of the +, {PAPER_ORDER}; or {WRONG_USER}")
    if isinstance(own, Plug):
        return replace(own, retrieval=retrieval, paper_order=end == PAPER_ORDER)
    if own and not own.takes_retrieval:
        raise wrong(tail, f"{own.name} takes no retrieved items")
    return replace(own, retrieval=retrieval) if own else retrieval


def _parse_own(
    head: str, kinds: Mapping[str, str], wrong: Callable[[str, str], ConfigurationError]
) -> Plug | Trained | LabelFrequencies:
    """Return what stands in front of a +: a plug, or another method that was trained."""
    name, colon, change = head.partition(":")
    kind = kinds.get(name)
    if kind is None or kind == PLUG:
        return _parse_plug(head, [name for name in kinds if kinds[name] == PLUG], wrong)
    if _is_ranker(kind):
        raise wrong(name, f"this is a ranker; write {name}@4")
    made_by = class_of(kind)
    if colon and change not in made_by.changes:
        raise wrong(change, f"a {kind} takes {', '.join(made_by.changes) or 'no change'} here")
    return made_by(name, change=change)


def _parse_plug(
    head: str, plugs: Collection[str], wrong: Callable[[str, str], ConfigurationError]
) -> Plug | LabelFrequencies:
    name, colon, change = head.partition(":")
    if name not in plugs:
        hint = f"; for retrieval write {name}@4" if name in RANKERS else ""
        raise wrong(name, f"no plug has this name (--plugs NAME=FOLDER gives one, --trained what fit made{hint})")
    plug = Plug(name)
    if change == FREQUENCIES:
        return LabelFrequencies(name)
    if colon:
        kind, dash, number = change.rpartition("-")
        if kind in _COUNTED and dash:
            plug = replace(plug, history=kind, items=_number(number, wrong))
        elif kind == _STRENGTH and re.fullmatch(r"\d{1,3}(\.\d{1,3})?", number, re.ASCII):
            plug = replace(plug, strength=float(number))
        elif change in get_args(HistoryVariant) and change not in ("whole", *_COUNTED):
            plug = replace(plug, history=change)
        else:
            raise wrong(change, f"what stands behind a plug is one of {_VARIANTS}")
    if name == INSTRUCTION_ONLY and plug.history not in ("whole", "no-history"):
        raise wrong(change, "plugs of this name are asked without history")
    return plug


def _number(text: str, wrong: Callable[[str, str], ConfigurationError]) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise wrong(text, "a whole number of at least 1 belongs here")
    return int(text)


def parse_plugs(texts: Iterable[str]) -> dict[str, list[str]]:
    """Read `--plugs`: `NAME=FOLDER`, `NAME=FOLDER,FOLDER`; a name that comes again adds to its seeds.

    Raises:
        ConfigurationError: not of this form, an impossible or a taken name, or the same folder twice.
    """
    return _named_folders(texts, "--plugs")


def parse_trained(texts: Iterable[str], plugs: Collection[str] = ()) -> dict[str, list[str]]:
    """Read `--trained`, of the same form; the folders are those of finished artefacts, and their kinds are known.

    Args:
        texts: as typed.
        plugs: names that are taken.

    Raises:
        ConfigurationError: as for `parse_plugs`; or a folder is not an artefact, or of an unknown kind.
        DataError: an artefact is unfinished or damaged.
        MismatchError: the seeds of a name are of different kinds.
    """
    found = _named_folders(texts, "--trained")
    for name, folders in found.items():
        if name in plugs:
            raise ConfigurationError(f"--trained got the name {name!r}, which --plugs has already: choose another.")
        kind = read_artefact(folders[0]).kind
        class_of(kind)  # raises
        for folder in folders[1:]:
            read_artefact(folder, kind)
    return found


def _named_folders(texts: Iterable[str], option: str) -> dict[str, list[str]]:
    named: dict[str, list[str]] = {}
    for text in texts:
        name, equals, places = text.partition("=")
        found = [place.strip() for place in places.split(",")]
        if not equals or not all(found):
            raise ConfigurationError(
                f"{option} got {text!r}: write NAME=FOLDER, or NAME=FOLDER,FOLDER for several seeds of one row."
            )
        check_name(name, option)
        own = named.setdefault(name, [])
        if twice := [place for place in found if place in own or found.count(place) > 1]:
            raise ConfigurationError(f"{option} {name} names {twice[0]!r} twice; a seed counts once.")
        own += found
    return named


# ---- several names --------------------------------------------------------------------------------------------------


def ablations_of(plug: str) -> dict[str, str]:
    """Return the rows that show whether a plug personalises, in the order of a table: name -> what it is."""
    return {
        NO_PERSONA: "the language model alone",
        INSTRUCTION_ONLY: "a plug that was trained without histories",
        f"{plug}:wrong-user": "the plug with another user's history",
        FREQUENCIES: "the language model alone, its label probabilities mixed with the user's label frequencies",
        plug: "the plug with the user's own history",
    }


def default_rows(
    task: Task,
    plugs: Sequence[str],
    *,
    users: int,
    frequencies: bool,
    dense: bool,
    reference: str | None = None,
    trained: Folders | None = None,
) -> list[str]:
    """Return the rows that show whether a persona helps, more than retrieval would, and whether it is the user's own.

    Args:
        task: what is asked.
        plugs: the names of plugs there are.
        users: how many there are; another user's history needs two.
        frequencies: whether there are examples to fit the label frequencies on.
        dense: whether there is an encoder for dense retrieval.
        reference: the name of the plugs that get the ablations (default: of the first ones with histories).
        trained: name -> folders of artefacts.
    """
    names = [NO_PERSONA]
    if frequencies and task.labels and task.answer_field:
        names.append(FREQUENCIES)
    for ranker in ("recency", "bm25", *(["dense"] if dense else [])):
        names += [f"{ranker}@1", f"{ranker}@4"]
    for name, (folder, *_) in (trained or {}).items():
        artefact = read_artefact(folder)
        if _is_ranker(artefact.kind):
            names += [f"{name}@1", f"{name}@4"]
        else:
            changes = [change for change in class_of(artefact.kind).changes if users > 1 or change != WRONG_USER]
            shown = artefact.settings.get("retrieval")  # in the prompts of its training, and so of its rows
            behind = f"+{shown}" if shown else ""
            names += [*(f"{name}:{change}{behind}" for change in changes), f"{name}{behind}"]
    first = reference if reference in plugs else next((name for name in plugs if name != INSTRUCTION_ONLY), None)
    names += [name for name in plugs if name != first]
    if first is not None:
        names += [f"{first}:wrong-user"] if users > 1 else []
        names += [f"{first}:no-history", f"{first}:top-4", f"{first}+bm25@1", first]
    return names


def reference_of(wanted: str | None, names: Sequence[str], plugs: Iterable[str]) -> str:
    """Return the name of the row that the others are compared with.

    Args:
        wanted: its name, if somebody chose it.
        names: of all rows.
        plugs: names of plugs, the more likely first.

    Raises:
        ConfigurationError: there are no rows, or the wanted one is not among them.
    """
    if wanted is not None:
        if wanted not in names:
            raise ConfigurationError(
                f"The reference {wanted!r} is not a row of this bench; it has {', '.join(names)}."
            )
        return wanted
    if not names:
        raise ConfigurationError("rows is empty: name at least one, or leave it out for the usual ones.")
    own = [name for name in plugs if name in names]
    return next((name for name in own if name != INSTRUCTION_ONLY), own[0] if own else names[0])


def canonical(names: Collection[str]) -> list[str]:
    """Sort names of rows as `default_rows` has them, where the order of the request is unknown."""

    def place(name: str) -> tuple[object, ...]:
        method = read_name(name)
        plug = method if isinstance(method, Plug) else None
        retrieval = plug.retrieval if plug else method if isinstance(method, Retrieval) else None
        group = 3 if plug or method is None else 2 if retrieval else int(name != NO_PERSONA)
        ranker = retrieval.retriever if retrieval else ""
        order = [*RANKERS, ranker].index(ranker) if ranker else -1
        number = order, ranker, retrieval.k if retrieval else 0
        variant = plug.history if plug and plug.history != "whole" else ""
        # A plug's own row stands below its variants: it is what they are compared with.
        own = (plug.name, not plug.is_variant, bool(retrieval), variant, plug.items, plug.strength) if plug else ()
        return group, own, number, name

    return sorted(names, key=place)
