"""A flat log of events (who, when, a text, the answer) to a data set and its task, and the folder that holds both.

    task.json      the task
    items.jsonl    every event once: the items of each user, oldest first
    train.jsonl    (dev.jsonl, test.jsonl) questions; "profile": 12 stands for the user's first 12 items

So a folder grows with the number of events; a history per question would grow with its square.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from ..errors import ConfigurationError, DataError, kind_of
from ..optional import require
from ..storage.files import write_text
from ..tasks.items import is_rounded, parse_date, seconds, text_of, whole_texts
from ..tasks.task import Task
from . import sources
from .histories import nearest_users
from .records import Beginning

SPLITS = ("train", "dev", "test")
_MAX_LABELS = 50  # more different answers than these are free text,
_TIMES_EACH = 4  # and so are answers that are given less often than this, on average
_LONG = 40  # characters that no label has

Answers: TypeAlias = Literal["auto", "labels", "text"]
Split: TypeAlias = Literal["users", "per-user", "global"]


@dataclass
class StoredRows:
    """Rows of a split whose profiles are numbers: of the items that their user had by then. Reads like any rows."""

    rows: Iterable[object]
    items: Mapping[str, Sequence[Mapping[str, object]]]  # of each user, oldest first
    where: str = "the data set"

    def __iter__(self) -> Iterator[object]:
        for row in self.rows:
            if not isinstance(row, Mapping) or type(count := row.get("profile")) is not int:
                yield row
                continue
            items = self.items.get(str(row.get("user")), ())
            if not 0 <= count <= len(items):
                raise DataError(
                    f"{self.where}: the question {row.get('id')!r} has a history of {count} items, but {sources.ITEMS} has "
                    f"{len(items)} of this user: make the folder again with pplug-hf prepare."
                )
            yield {**row, "profile": Beginning(items, count)}


def read_stored(rows: Iterable[object], path: Path, where: str) -> StoredRows:
    """Return the rows of a file with their histories, whose items are in a file of their own."""
    items: dict[str, list[dict[str, object]]] = {}
    for item in sources.stream_lines(path):
        if not isinstance(item, Mapping) or "user" not in item:
            raise DataError(f"{path}: every line must be an object with the key 'user'.")
        items.setdefault(str(item["user"]), []).append({k: v for k, v in item.items() if k != "user"})
    return StoredRows(rows, items, where)


@dataclass
class EventData:
    """A data set made of events.

    Attributes:
        task: its task.
        splits: rows of "train", "dev" and "test", for the argument `data` of every command.
        notes: what was decided and left out, one sentence each.
    """

    task: Task
    splits: dict[str, StoredRows]
    notes: list[str] = field(default_factory=list)

    def save(self, folder: str | os.PathLike) -> None:
        """Write the data set into a folder, each event once.

        Args:
            folder: a new one, or one that an earlier `save` wrote.

        Raises:
            ConfigurationError: the folder holds something else.
        """
        path = Path(folder)
        # What a killed save leaves half-written has a hidden name.
        others = path.is_dir() and [each for each in path.iterdir() if not each.name.startswith(".")]
        if path.is_file() or (others and not (path / sources.ITEMS).is_file()):
            raise ConfigurationError(f"The output {str(path)!r} exists and holds something else: name a new folder.")
        items = next(iter(self.splits.values())).items
        rows: dict[str, Iterable[object]] = {
            "items": ({"user": user, **item} for user, of_user in items.items() for item in of_user)
        }
        rows |= {split: stored.rows for split, stored in self.splits.items()}
        # Killed at any point, a folder has no questions of one log with items of another, and can be made again.
        for name in (sources.TASK, *(f"{split}.jsonl" for split in SPLITS)):
            (path / name).unlink(missing_ok=True)
        for name, lines in rows.items():
            write_text(path / f"{name}.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in lines))
        write_text(path / sources.TASK, json.dumps(asdict(self.task), indent=1, ensure_ascii=False) + "\n")

    def __str__(self) -> str:
        return "\n".join(self.notes)


def from_events(
    source: object,
    *,
    user: str,
    text: str,
    answer: str,
    time: str | None = None,
    question: str | None = None,
    instruction: str | None = None,
    name: str = "events",
    answers: Answers = "auto",
    metric: str | None = None,
    split: Split = "users",
    dev: float = 0.1,
    test: float = 0.1,
    min_history: int = 1,
    questions_per_user: int | None = None,
    time_format: str | None = None,
    seed: int = 0,
) -> EventData:
    """Make a data set and a task of a log of events, of which each is an item and, later than others, a question.

    The history of a question is what its user did strictly before it; events of the same time are not before each other.

    Args:
        source: a CSV, TSV, Parquet or JSON-lines file (also gzipped), a pandas or `datasets` table, or mappings.
        user, text, answer: names of columns: who, what it was about, what they answered.
        time: column of dates (see `tasks/items.py`; any of ISO 8601, or `time_format`), or of other numbers, which only
            order the events; None if rows are in order already.
        question: column with a question of its own for every event, asked before the text.
        instruction: asked before every text, if there is no such column.
        name: of the task.
        answers: "labels" or "text"; "auto" takes few and repeated answers for labels.
        metric: how answers are judged (default: accuracy, mae for numbers, rouge for texts).
        split: what dev and test hold. "users": the users whom train does not have; "per-user": the newest events of
            every user; "global": the newest events of all.
        dev, test: share of users, or of events, in these splits.
        min_history: items that a question must have before it.
        questions_per_user: keep at most this many of the newest questions of a user in each split.
        time_format: of `time`, as for `strptime`, e.g. "%d/%m/%Y".
        seed: of the choice of users.

    Returns:
        The data set: `train(settings, task=made.task, data=made.splits)`, or `made.save(folder)`.

    Raises:
        DataError: columns or values that cannot be used. Columns are named next to those that exist.
        MissingFileError: there is no such file.
        ConfigurationError: shares that leave nothing, or a task that cannot work.
        MissingPackageError: pandas is not installed.
    """
    if dev < 0 or test < 0 or dev + test >= 1 or min_history < 0:
        raise ConfigurationError(
            f"dev is {dev} and test is {test}: give shares of at least 0 that leave some for train."
        )
    if time is None and time_format is not None:
        raise ConfigurationError(f"time_format is {time_format!r}, and no column holds times: name it as time.")
    frame, notes = _table(source, {"user": user, "text": text, "answer": answer, "time": time, "question": question})
    frame = _in_order(frame, time_format, time, notes)
    task = _task(name, frame, instruction, answers, metric, (text, answer), notes)
    items: dict[str, list[dict[str, str]]] = {}
    earlier: list[int] = []  # items of the user before each event
    for who, events in frame.groupby("user", sort=False):
        rows = events[[c for c in ("id", "text", "answer", "question", "date") if c in events]].to_dict("records")
        items[str(who)] = rows
        # Of the events of one time none is before another.
        earlier += events["time"].rank(method="min").astype(int).sub(1).tolist()
    frame["earlier"] = earlier  # groups come in the order of the frame, which is by user
    asked = frame[frame["earlier"] >= min_history]
    lead = asked["question"] + _QUESTION_END if "question" in asked else task.query_marker + " "
    rows = asked[["id", "user"]].assign(input=lead + asked["text"], output=asked["answer"], profile=asked["earlier"])
    splits = {}
    for chosen, where in zip(SPLITS, _places(asked, split, dev, test, seed), strict=True):
        part = rows[where] if questions_per_user is None else rows[where].groupby("user").tail(questions_per_user)
        if len(part):
            splits[chosen] = StoredRows(part.to_dict("records"), items)
        notes.append(f"{chosen}: {len(part):,} questions of {part['user'].nunique():,} users.")
    if "train" not in splits:
        raise DataError(
            f"No question is left to train on: of {len(frame)} events of {len(items)} users, {len(asked)} have at least "
            f"{min_history} earlier items of their user. Give more events per user, or other values of min_history, dev and test."
        )
    return EventData(task, splits, notes)


_QUESTION_END = "\n\n"  # between a question of its own and the text; questions hold none


def _table(source: object, columns: dict[str, str | None]) -> tuple[Any, list[str]]:
    """Return the columns by their roles, as texts, without the rows that lack one, and notes."""
    frame = _frame(source)
    there = ", ".join(map(repr, frame.columns))
    named = {role: column for role, column in columns.items() if column is not None}
    if missing := [f"{column!r} ({role})" for role, column in named.items() if column not in frame.columns]:
        raise DataError(f"There is no column {', '.join(missing)}; the columns are {there}.")
    if not len(frame):
        raise DataError("The log holds no events.")
    frame = require("pandas", "train", "A log of events").DataFrame({role: frame[c] for role, c in named.items()})
    for role, column in named.items():
        values = frame[role].astype(object)  # of any kind: what is missing is None
        values = frame[role] = values.where(values.notna(), None)
        if values.map(lambda value: isinstance(value, list | dict | np.ndarray)).any():
            raise DataError(f"The column {column!r} holds lists or objects, not texts; the columns are {there}.")
        if role == "time":
            continue
        if values.map(is_rounded).any():
            raise DataError(
                f"The column {column!r} holds whole numbers as floats, which are too large to have all their digits: read "
                "them as texts, or as whole numbers (in pandas dtype='Int64')."
            )
        frame[role] = values.map(_text)
    blank = {c: ((frame[r] == "") | frame[r].isna()).to_numpy(dtype=bool) for r, c in named.items()}
    notes = [
        f"{int(n.sum()):,} of {len(frame):,} events without {c!r} are left out." for c, n in blank.items() if n.any()
    ]
    frame = frame[~np.logical_or.reduce([*blank.values()])].reset_index(drop=True)
    if not len(frame):
        raise DataError(f"Every event lacks one of its fields. {' '.join(notes)}")
    if "question" in frame:
        frame["question"] = frame["question"].str.split().str.join(" ")
    return frame, notes


def _text(value: object) -> str:
    """Return a value as text; a whole number that pandas made a float, because others are missing, is whole again."""
    if value is None or value != value:
        return ""
    (text,) = whole_texts([str(int(value) if isinstance(value, float) and value.is_integer() else value)])
    return text.strip()


def _frame(source: Any) -> Any:
    """Return a log as a pandas table."""
    pandas = require("pandas", "train", "A log of events")
    if isinstance(source, str | os.PathLike):
        return sources.read_frame(Path(source))
    if isinstance(source, pandas.DataFrame):
        return source.reset_index(drop=True)
    # Of datasets, polars and pyarrow; a stream gives its rows.
    if hasattr(source, "__len__") and hasattr(source, "with_format"):
        source = source.with_format("arrow")[:]
    if hasattr(source, "__len__") and hasattr(source, "to_arrow"):
        source = source.to_arrow()
    if hasattr(source, "__len__") and hasattr(source, "to_pandas"):
        return source.to_pandas(types_mapper=pandas.ArrowDtype)
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise DataError(f"A log is a file, a table or a list of mappings, not {kind_of(source)}.")
    rows = list(source)
    if wrong := next((row for row in rows if not isinstance(row, Mapping)), None):
        raise DataError(f"Every event must be a mapping of columns to values, not {kind_of(wrong)}.")
    return sources.frame_of(rows)


def _in_order(frame: Any, time_format: str | None, column: str | None, notes: list[str]) -> Any:
    """Return the events by user, oldest first, with `time` to compare by, and `id` and `date`."""
    if column is None:
        frame["time"] = range(len(frame))
        notes.append("No time column: the rows of a user are taken to be oldest first.")
    else:
        frame["time"], dates = _times(frame["time"], time_format, column, notes)
        if dates:
            frame["date"] = dates
    number = {name: str(n) for n, name in enumerate(frame["user"].unique())}
    frame = frame.sort_values("time", kind="stable")
    frame["user_number"] = frame["user"].map(number)
    frame = frame.sort_values("user_number", kind="stable", key=lambda column: column.astype(int)).reset_index(
        drop=True
    )
    frame["id"] = [str(n) for n in range(len(frame))]
    return frame


def _times(values: Any, time_format: str | None, column: str, notes: list[str]) -> tuple[list[float], list[str]]:
    """Return times to compare by, and how items have them: nothing if they are numbers that only order the events."""
    pandas = require("pandas", "train", "A log of events")
    numbers = pandas.to_numeric(values, errors="coerce")
    numeric = time_format is None and not numbers.isna().any()
    read = [() if time_format else parse_date(value) for value in values]
    if not all(read):
        if numeric:
            notes.append(
                f"The column {column!r} holds numbers: they order the events, and items have no dates. If they are dates, "
                "name their format, as in time_format='%Y%m%d'."
            )
            return numbers.tolist(), []
        texts = values.map(lambda value: text_of(value) if isinstance(value, int | float) else value)
        times = pandas.to_datetime(texts, format=time_format or "ISO8601", utc=True, errors="coerce")
        if (wrong := times.isna()).any():
            raise DataError(
                f"{int(wrong.sum()):,} of {len(values):,} values of the column {column!r} are not dates (first in event "
                f"{int(wrong.idxmax())}): write them as 2024-05-31 or 2024-05-31T18:30:00, or name their format, as in "
                "time_format='%d/%m/%Y'."
            )
        read = list(map(parse_date, times))
    days = not any(part for numbers in read for part in numbers[3:])
    dates = [_date(numbers[:3] if days else numbers) for numbers in read]
    if numeric:
        notes.append(
            f"The column {column!r} holds numbers: taken for years or for times since 1970, from {min(dates)} to {max(dates)}."
        )
    return list(map(seconds, read)), dates


def _date(numbers: tuple[int, ...]) -> str:
    """Return a parsed time as text, without fractions of a second."""
    day = "-".join(f"{part:0{width}}" for part, width in zip(numbers, (4, 2, 2), strict=False))
    time = ":".join(f"{part:02}" for part in (*numbers[3:], 0)[:3])
    return f"{day}T{time}" if len(numbers) > 3 else day


def _task(
    name: str,
    frame: Any,
    instruction: str | None,
    answers: Answers,
    metric: str | None,
    columns: tuple[str, str],
    notes: list[str],
) -> Task:
    """Return the task of a log, and note how its answers are understood."""
    counts = frame["answer"].value_counts()
    few = (
        len(counts) <= _MAX_LABELS
        and len(counts) * _TIMES_EACH <= len(frame)
        and counts.index.str.len().max() <= _LONG
    )
    labels = sorted(counts.index) if answers == "labels" or (answers == "auto" and few) else []
    numeric = (
        len(labels) > 2
        and not require("pandas", "train", "A log of events")
        .to_numeric(counts.index.to_series(), errors="coerce")
        .isna()
        .any()
    )
    labels.sort(key=float if numeric else str)
    metric = metric or ("mae" if numeric else "accuracy" if labels else "rouge")
    if labels:
        shown = ", ".join(map(repr, labels[:8])) + (", ..." if len(labels) > 8 else "")
        notes.append(
            f"The answers are {len(labels)} labels ({shown}), judged by {metric}. If they are free text, set answers to text."
        )
    else:
        notes.append(
            f"The answers are free text ({len(counts):,} different ones), judged by {metric}. If they are labels, set answers to labels."
        )
    if "question" in frame:
        marker, template = _QUESTION_END, "{question}" + _QUESTION_END + "{text}"
    else:
        if not (instruction or "").strip():
            instruction = f"Give the {columns[1]} of this {columns[0]}:"
            notes.append(f"No instruction is given: every input begins with {instruction!r}.")
        marker, template = str(instruction).strip(), ""
    longest = int(frame["answer"].map(_most_tokens).quantile(1.0 if labels else 0.99))
    return Task(
        name=name,
        query_marker=marker,
        query_field="text",
        answer_field="answer",
        item_template="{answer}: {text}",
        item_template_unlabelled="{text}",
        labels=tuple(labels),
        metric=metric,
        max_new_tokens=min(256, longest + 6),
        history_prompt_template=template,
    )


def _most_tokens(answer: str) -> int:
    """Return how many tokens an answer may have: in other scripts than the Latin one up to one for each byte."""
    size = len(answer.encode())
    ascii_size = len(answer.encode("ascii", "ignore"))
    return ascii_size // 3 + size - ascii_size


def _nearest(number: float) -> int:
    return int(number + 0.5)


def _places(asked: Any, split: Split, dev: float, test: float, seed: int) -> tuple[Any, Any, Any]:
    """Return which questions are in train, dev and test."""
    if split == "users":
        users = asked["user"].unique().tolist()
        ordered = nearest_users(users, 1, seed)
        # Two of eight or more at least: comparisons are between users.
        tested, developed = (max(_nearest(len(users) * s), min(2, len(users) // 4)) if s else 0 for s in (test, dev))
        in_test = asked["user"].isin(ordered[:tested])
        in_dev = asked["user"].isin(ordered[tested : tested + developed])
    elif split in ("per-user", "global"):
        # Events of one time stay together, on the later side.
        groups = asked.groupby(asked["user"] if split == "per-user" else asked["user"].isna())["time"]
        events = groups.transform("size")
        newer = events - groups.rank(method="max")
        in_test = newer < (events * test).map(_nearest)
        in_dev = (newer < (events * (dev + test)).map(_nearest)) & ~in_test
    else:
        raise ConfigurationError(f"split is {split!r}; choose one of users, per-user, global.")
    return ~(in_dev | in_test), in_dev, in_test
