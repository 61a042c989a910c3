"""Checks that turn raw rows of any file into examples.

Unambiguous problems are fixed and listed in `Repairs`; anything else is a `DataError`. Both name ids, fields and labels,
never a text of a user's history.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from pplug_hf.errors import ConfigurationError, DataError
from pplug_hf.tasks.items import field_text, fields_of, is_null, is_rounded, item_text, parse_date, text_of
from pplug_hf.tasks.metrics import get_metric
from pplug_hf.tasks.task import TASKS, Task, get_task

SHOWN = 5  # ids in a message

# Notes on data that a reader accepts, and what it did.
REPAIRS = {
    "no_id": "rows without an id: numbered from 0",
    "no_user": "rows that do not say whose they are: each is a user of its own",
    "no_marker": "inputs without the text before the query: the whole input is the query",
    "empty_query": "inputs with nothing behind that text: the whole input is the query",
    "null": "null fields: read as empty",
    "null_output": "null answers in the outputs file: read as empty",
    "empty_history": "empty histories: kept",
    "other_number": "answers that are a label written as another number, as 5.0 for 5: read as that label",
    "foreign_label": "history items whose answer is not a label: kept in histories, never a question to train on",
    "undated": "history items without a date: kept",
    "year_only": "history items with a year for a date: kept",
    "odd_date": "history items whose date is not YYYY, YYYY-MM, YYYY-MM-DD with or without a time, or seconds since 1970: "
    "kept as they are",
    "unordered": "histories that are not oldest first: kept in their order; where all items have dates, training on them "
    "goes by these",
    "extra_fields": "fields that are not the task's: left out",
    "broken_text": "texts with half a surrogate pair: the half became U+FFFD",
    "shared_id": "ids that another split has too: they are different questions",
}


@dataclass(slots=True)
class Example:
    """One question of one user."""

    id: str  # unique in its split
    user: str  # the row's own id where the data does not say who asks
    prompt: str  # the whole input, as the language model reads it
    query: str  # the part of it that is the user's own, as the input encoder reads it
    target: str | None  # None where answers are withheld
    history: Sequence[dict[str, str]]  # the user's earlier items, oldest first
    extra: Mapping[str, object] = field(default_factory=dict)  # further fields of the row, those that the metric reads
    named: bool = field(default=True, compare=False)  # false: nobody knows who asks, a stranger to all


@dataclass(slots=True)
class Finding:
    """Count of something, the number of questions that have it, and the ids of the first few of them."""

    count: int = 0
    questions: int = 0
    ids: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  # of fields, where they matter


class Findings(dict[str, Finding]):
    """Kinds of findings, by name. Counts, ids and names of fields only."""

    def add(self, kind: str, id_: str, count: int = 1, names: Iterable[str] = ()) -> None:
        """Count something of a question; `count` may be 0, which adds nothing."""
        if count:
            found = self.setdefault(kind, Finding())
            found.count += count
            found.questions += 1
            if len(found.ids) < SHOWN:
                found.ids.append(id_)
            found.names += [name for name in names if name not in found.names][: SHOWN - len(found.names)]

    def lines(self, sentences: Mapping[str, str]) -> list[str]:
        """One line per kind, in the order of `sentences`."""
        lines = []
        for kind in sorted(self, key=list(sentences).index):
            found = self[kind]
            what, _, done = sentences[kind].partition(": ")
            names = f" ({', '.join(found.names)})" if found.names else ""
            of = "" if found.count == found.questions else f" in {found.questions:,} questions"
            more = ", ..." if found.questions > len(found.ids) else ""
            ids = ", ".join(map(repr, found.ids)) + more
            lines.append(f"{found.count:,} {what}{names}{of} (id {ids})" + (f": {done}" if done else ""))
        return lines


class Repairs(Findings):
    """Changes that a reader made, and oddities that it kept, by kind; the kinds are those of `REPAIRS`."""

    def __str__(self) -> str:
        return "\n".join(self.lines(REPAIRS)) or "nothing to repair"


class Beginning(list[Mapping[str, object]]):
    """The first items of a list; rows share the `whole` list, and `examples` looks at each of its items once."""

    def __init__(self, whole: Sequence[Mapping[str, object]], count: int):
        super().__init__(whole[:count])
        self.whole = whole


def examples(
    raw: Iterable[object],
    task: Task,
    where: str,
    *,
    keys: frozenset[str] = frozenset({"input", "profile"}),
    golds: Mapping[str, str | None] | None = None,
    golds_where: str | None = None,
    require_outputs: bool = False,
    unnamed_user: str = "{id}",
    repairs: Repairs | None = None,
    share: bool = False,
) -> Iterator[Example]:
    """Check raw rows one by one and make examples of them.

    Args:
        raw: Objects with `input`, `profile` and, if known, `id`, `user_id` or `user`, and `output`.
        task: Their task.
        where: Where they come from, for messages.
        keys: What each row must have.
        golds: The answer of each id, where a file of its own has them; else they are the rows' `output`.
        golds_where: Name of that file.
        require_outputs: Whether a row without an answer is an error.
        unnamed_user: The user of a row that does not say whose it is.
        repairs: Takes notes.
        share: Make equal history items one object, because rows of one user repeat them: for who keeps all examples.

    Yields:
        Examples in the order of the rows. History items keep all their fields, as text; of the row's further fields
        those that the task's metric reads are kept as they are.

    Raises:
        DataError: at once, if a row is not an object with those keys, a text is of another type, or its history items
            are not the task's. After the last row, with all ids concerned, if ids repeat or lack an answer, the golds
            have other ids, or an answer is not a label of the task: keep nothing of rows that end with an error.
    """
    repairs = Repairs() if repairs is None else repairs
    known: dict[tuple, dict[str, str]] | None = {} if share else None
    histories: dict[int, _History] = {}  # by the identity of a list that rows share, which is its own while it is here
    seen: set[str] = set()
    repeated: dict[str, None] = {}
    unanswered: dict[str, None] = {}  # not in golds, or without an output
    wrong: dict[str, None] = {}
    metric = get_metric(task.metric)
    if task.input_template:
        keys = keys - {"input"} | fields_of(task.input_template)
    for position, each in enumerate(raw):
        row = _checked_row(each, keys, where, position)
        id_ = _row_id(row, position, keys, where, repairs)
        _check_text(row, ("output", *(sorted(fields_of(task.input_template)) or ("input",))), id_, where)
        if id_ in seen:
            repeated[id_] = None
        seen.add(id_)
        items = _items(row["profile"], id_, where)
        if isinstance(items, Beginning):
            whole = histories.setdefault(id(items.whole), _History(items.whole, task, where, known))
        else:
            whole = _History(items, task, where, known)
        history, notes = whole.first(len(items), id_)
        answer = row.get("output") if golds is None else golds.get(id_)
        if (golds is not None and id_ not in golds) or (golds is None and is_null(answer)):
            unanswered[id_] = None
            target = None
        else:
            target = task.label_of(answer)
            repairs.add("null_output", id_, is_null(answer))
            repairs.add("other_number", id_, target != text_of(answer).strip())
            if task.labels and target not in task.labels:
                wrong[id_] = None  # what they are instead may be private
        named = (row.get(name) for name in (task.user_field, "user_id", "user"))
        user = next((value for value in named if text_of(value).strip()), None)
        if is_rounded(user):
            raise DataError(
                f"{where}: the user of id {id_!r} is a float, and too large to have all its digits; write users as texts."
            )
        repairs.add("no_user", id_, user is None)
        prompt = item_text(row, task.input_template) if task.input_template else text_of(row["input"])
        repairs.add("no_marker", id_, task.query_marker not in prompt)
        query = task.query(prompt)
        if not query.strip():
            query = prompt.strip()
            repairs.add("empty_query", id_, bool(query))
        repairs.add("empty_history", id_, not history)
        notes.add_to(repairs, row, id_)
        yield Example(
            id=id_,
            user=unnamed_user.format(id=id_) if user is None else text_of(user),
            prompt=prompt,
            query=query,
            target=target,
            history=history,
            extra={name: row[name] for name in metric.fields if name in row},
            named=user is not None,
        )
    if repeated:
        raise DataError(f"{where}: ids must occur once; these repeat: {some(repeated)}.")
    if golds is not None:
        only_golds = golds.keys() - seen
        if unanswered or only_golds:
            raise DataError(
                f"{where} and {golds_where} must have the same ids. Only in the questions: "
                f"{some(unanswered) or 'none'}. Only in the outputs: {some(sorted(only_golds)) or 'none'}."
            )
    elif require_outputs and unanswered and metric.needs_golds:
        raise DataError(
            f"{where}: every row needs an 'output'; these ids have none: {some(unanswered)}. Add the answers, or pass "
            "require_outputs=False to read questions alone."
        )
    if wrong:
        raise DataError(
            f"{golds_where or where}: answers of task {task.name} must be one of {', '.join(task.labels)}; those of these ids "
            f"are not: {some(wrong)}."
        )


def read_golds(data: object, where: str) -> tuple[str | None, dict[str, str | None]]:
    """Return the content of an outputs file: the task's name, and the answer of each id.

    Raises:
        DataError: It has another layout, or ids repeat.
    """
    if not isinstance(data, dict) or "golds" not in data:
        found = sorted(data) if isinstance(data, dict) else type(data).__name__
        raise DataError(f"{where} must hold an object with the keys 'task' and 'golds'; found {found}.")
    task = data.get("task")
    if not isinstance(task, str | None):
        raise DataError(f"{where}: 'task' must be a text such as 'LaMP_3', not {type(task).__name__}.")
    golds: dict[str, str | None] = {}
    repeated: dict[str, None] = {}
    for position, each in enumerate(checked_list(data["golds"], f"{where}, golds")):
        row = _checked_row(each, frozenset({"id", "output"}), f"{where}, golds", position)
        id_ = str(row["id"])
        _check_text(row, ("output",), id_, f"{where}, golds")
        if id_ in golds:
            repeated[id_] = None
        golds[id_] = None if is_null(row["output"]) else text_of(row["output"])
    if repeated:
        raise DataError(f"{where}, golds: ids must occur once; these repeat: {some(repeated)}.")
    return task, golds


_NO_TASK = (
    "No outputs file names the task of {where}; pass task=, a .json file with one of your own (pplug-hf prepare makes it, "
    "from a log of events), or one of {tasks}."
)
_OTHER_TASK = "The outputs beside {where} are of task {declared!r}, but task={task!r} was asked for; pass task={known!r} or no task."


def decide_task(
    task: Task | str | None, declared: str | None, where: str, unnamed: str = _NO_TASK, other: str = _OTHER_TASK
) -> Task:
    """Return the task that was asked for, or the one that a file declares; they must be the same.

    Args:
        task: the task, its name, or None.
        declared: the name in the file. A name that is not registered is the user's own: the fields decide.
        where: the file, for messages.
        unnamed, other: the messages for neither of them and for two that differ.

    Raises:
        DataError: neither is there, or they differ.
        ConfigurationError: there is no such task.
    """
    wanted = declared if task is None else task
    if wanted is None:
        raise DataError(unnamed.format(where=where, tasks=", ".join(TASKS)))
    task = known = get_task(wanted)
    if declared is not None:
        with contextlib.suppress(ConfigurationError):
            known = get_task(declared)
    if known.name != task.name:
        raise DataError(other.format(where=where, declared=declared, task=task.name, known=known.name))
    return task


def checked_list(data: object, where: str) -> list[object]:
    """Return a list as it is; raise a `DataError` for anything else."""
    if not isinstance(data, list):
        raise DataError(f"{where} must hold a list of objects, not {type(data).__name__}.")
    return data


def some(values: Iterable[object]) -> str:
    """Return up to five of some ids, for a message."""
    values = list(values)
    more = f", ... ({len(values)} in all)" if len(values) > SHOWN else ""
    return ", ".join(repr(value) for value in values[:SHOWN]) + more


def _checked_row(row: object, keys: frozenset[str], where: str, position: int) -> Mapping[str, object]:
    if not isinstance(row, Mapping) or not keys <= row.keys():
        found = sorted(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise DataError(f"{where}: row {position} must have the keys {sorted(keys)}; found {found}.")
    return row


def _row_id(row: Mapping[str, object], position: int, keys: frozenset[str], where: str, repairs: Repairs) -> str:
    if not is_null(row.get("id")):
        return str(row["id"])
    if "id" in keys:
        raise DataError(f"{where}: row {position} has null for an id; give each row one of its own.")
    repairs.add("no_id", str(position))
    return str(position)


def _items(profile: object, id_: str, where: str) -> list[Mapping[str, object]]:
    """Return the items of a profile: a list, an array (of pandas), or a dict of columns (of `datasets.Sequence`)."""
    if isinstance(profile, Beginning):
        return profile
    if isinstance(profile, np.ndarray):
        profile = profile.tolist()
    if isinstance(profile, Mapping) and all(isinstance(column, list) for column in profile.values()):
        lengths = {len(column) for column in profile.values()}
        if len(lengths) <= 1:
            return [dict(zip(profile, values, strict=True)) for values in zip(*profile.values(), strict=True)]
    items = [] if is_null(profile) else profile or []
    if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in items):
        found = type(profile).__name__ if not isinstance(items, list) else "one of other things"
        raise DataError(f"{where}: the profile of id {id_!r} must be a list of objects, not {found}.")
    return items


def _check_text(row: Mapping[str, object], names: Iterable[str], id_: str, where: str) -> None:
    """Raise for lists and objects (a chat, several tags), which cannot be read as one text; numbers can."""
    for name in names:
        if isinstance(row.get(name), list | Mapping):
            raise DataError(
                f"{where}: {name!r} of id {id_!r} must be a text, not {type(row[name]).__name__}; write it as one."
            )


def _check_fields(item: Mapping[str, object], id_: str, task: Task, where: str) -> None:
    fields = task.fields
    if fields <= item.keys():
        _check_text(item, fields, id_, where)
        return
    found = item.keys() - {"id", "date"}
    if found >= {"text", "title", "category"}:
        hint = "This is the benchmark's news categorisation; the movies of LaMP-2 are under LaMP_2/new."
    else:
        fitting = [other.name for other in TASKS.values() if other.fields <= found]
        hint = f"They fit {', '.join(fitting) or 'no known task'}."
    raise DataError(
        f"{where} does not hold task {task.name}: history items need the fields {sorted(fields)}, but "
        f"one of id {id_!r} has {sorted(found)}. {hint}"
    )


class _Notes(NamedTuple):
    """Notes of the first items of a history."""

    null: int = 0
    null_fields: tuple[str, ...] = ()
    other_number: int = 0
    foreign_label: int = 0
    undated: int = 0
    year_only: int = 0
    odd_date: int = 0
    ordered: bool = True
    last: tuple[int, ...] = ()  # date

    def and_of(self, item: Mapping[str, object], given: str, label: str) -> _Notes:
        """Return these notes and those of the next item, whose answer is `given`, and `label` as the task writes it."""
        null = [name for name, value in item.items() if is_null(value) and name != "date"]
        date = parse_date(item.get("date"))
        odd = not date and bool(text_of(item.get("date")).strip())
        shared = min(len(self.last), len(date))  # a year is compared with years
        return _Notes(
            self.null + len(null),
            (*self.null_fields, *(name for name in null if name not in self.null_fields)),
            self.other_number + bool(label and label != given),
            self.foreign_label + bool(given and not label),
            self.undated + (not date and not odd),
            self.year_only + (len(date) == 1),
            self.odd_date + odd,
            self.ordered and self.last[:shared] <= date[:shared],
            date or self.last,
        )

    def add_to(self, repairs: Repairs, row: Mapping[str, object], id_: str) -> None:
        """Note them of a question."""
        top = [name for name in ("input", "profile") if is_null(row.get(name, ""))]
        repairs.add("null", id_, self.null + len(top), [*top, *self.null_fields])
        for kind in ("other_number", "foreign_label", "undated", "year_only", "odd_date"):
            repairs.add(kind, id_, getattr(self, kind))
        repairs.add("unordered", id_, not self.ordered)


class _History:
    """Items of a profile, checked and made texts, each of them once, with the notes of all before it.

    Args:
        raw: the items.
        task, where: as of `examples`.
        known: items by what they hold, of which equal ones become one object; None if each is its own.
    """

    def __init__(
        self, raw: Sequence[Mapping[str, object]], task: Task, where: str, known: dict[tuple, dict[str, str]] | None
    ):
        self.raw, self.task, self.where, self.known = raw, task, where, known
        self.items: list[dict[str, str]] = []
        self.notes = [_Notes()]

    def first(self, count: int, id_: str) -> tuple[list[dict[str, str]], _Notes]:
        """Return the first items, of which a question with this id is asked, and their notes."""
        labelled = self.task.answer_field if self.task.labels else None
        for each in self.raw[len(self.items) : count]:
            _check_fields(each, id_, self.task, self.where)
            item = {name: text_of(value) for name, value in each.items()}
            given = field_text(item, labelled)
            label = self.task.item_label(item) if labelled else ""
            self.notes.append(self.notes[-1].and_of(each, given, label))
            if labelled and label and label != given:
                item[labelled] = label
            self.items.append(item if self.known is None else self.known.setdefault(tuple(item.items()), item))
        return self.items[:count], self.notes[count]


def history_notes(examples: Sequence[Example], k: int = 1) -> list[str]:
    """Return sentences about histories that are empty, or have fewer than the k items that are asked for."""
    lengths, notes = [len(e.history) for e in examples], []
    if empty := lengths.count(0):
        notes.append(f"{empty} of {len(examples)} histories are empty: these users are answered as new ones.")
    if short := sum(0 < length < k for length in lengths):
        notes.append(f"{short} of {len(examples)} histories have fewer than {k} items and are shown whole.")
    return notes


def label_notes(task: Task, examples: Sequence[Example]) -> list[str]:
    """Return a sentence about history items whose answer is not a label: they are never trained on."""
    items = {id(item): item for e in examples for item in e.history}.values()
    foreign = sum(bool(field_text(item, task.answer_field)) and not task.item_label(item) for item in items)
    if not foreign:
        return []
    return [f"{foreign} of {len(items)} history items have an answer that is not a label of {task.name}."]


def data_digest(task: Task, examples: Sequence[Example], *, answers: bool) -> str:
    """Return a fingerprint of a task and its examples; with their answers or without."""
    items: dict[int, bytes] = {}  # readers share equal items as one object

    def item_digest(item: dict[str, str]) -> bytes:
        if id(item) not in items:
            items[id(item)] = hashlib.sha256(json.dumps(item, sort_keys=True).encode()).digest()
        return items[id(item)]

    digest = hashlib.sha256(task.identity.encode())
    for e in examples:
        digest.update(json.dumps([e.id, e.user, e.prompt, e.query, e.target if answers else None]).encode())
        digest.update(b"".join(map(item_digest, e.history)))
    return digest.hexdigest()[:16]
