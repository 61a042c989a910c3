"""A log of items (user, item id, time, fields) in files of any size, read in parts of a fixed number of rows.

    for part in read_parts(Path("items.parquet"), template="{tag}: {text}"):
        part.rows        # ItemRow(user, id, time, text, fault), in the order of the file
        part.digest      # of the rows: what a job that continues knows a finished part by

One part is in memory at a time. A row that cannot be used stays in its place, with its fault.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..errors import DataError, MissingFileError
from ..tasks.items import (
    fields_of,
    history_text,
    is_null,
    is_rounded,
    item_id,
    parse_date,
    seconds,
    text_of,
    whole_texts,
)
from . import sources

PART = 4096  # rows
_KINDS = (".jsonl", ".ndjson", ".parquet", ".csv", ".tsv")
_MAX_ID = 256  # characters


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a log.

    Args:
        user: whose item it is.
        item: id of the item (default: the column "id" if there is one, else a fingerprint of the row's fields as texts).
        time: a date or a time, see `tasks/items.py` (default: the column "date" if there is one, else items have none).
        fields: field of the item template -> column, for those of another name. Where the plug has no template, the
            field is called "text".
    """

    user: str = "user"
    item: str | None = None
    time: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)


class ItemRow(NamedTuple):
    """One row: either its `fault` is set, or everything else may be used."""

    user: str
    id: str
    time: float | None
    text: str
    fault: str | None = None


class Part(NamedTuple):
    """Consecutive rows of a file."""

    digest: str
    file: str
    first: int  # number of the first row, from 1 on; the header of a CSV file and empty lines are not counted
    rows: list[ItemRow]
    done: int = 0  # rows that are left out, because an earlier job has finished them

    @property
    def texts(self) -> list[str]:
        """Texts of the rows without a fault."""
        return [row.text for row in self.rows if row.fault is None]


def find_files(places: Iterable[str | os.PathLike]) -> list[Path]:
    """Return the files of a log in order: files as they are named, and those of folders by name.

    Raises:
        MissingFileError: a place is not there, or a folder holds no table.
    """
    found: list[Path] = []
    for place in map(Path, places):
        inside = (
            [p for p in sorted(place.iterdir()) if p.name.removesuffix(".gz").endswith(_KINDS)]
            if place.is_dir()
            else [place]
        )
        if not inside:
            raise MissingFileError(f"The folder {str(place)!r} holds no .parquet, .jsonl, .csv or .tsv file.")
        for path in inside:
            sources.table_kind(path)  # raises
        found += inside
    return found


def read_parts(
    path: Path,
    template: str | None,
    columns: Columns | None = None,
    identity: str = "",
    done: Collection[str] = (),
    refuse: bool = False,
    size: int = PART,
) -> Iterator[Part]:
    """Yield the parts of a file.

    Args:
        path: of a .parquet, .jsonl, .csv or .tsv file, also gzipped.
        template: format string that makes an item's text of its fields; None for the field "text" as it is.
        columns: names of the columns.
        identity: whatever else decides what becomes of a part; it is in the digests.
        done: digests of finished parts, which come without their rows.
        refuse: whether a row with a fault, in a part that is not done, is an error.
        size: rows of a part.

    Raises:
        MissingFileError: there is no such file.
        DataError: it cannot be read, or lacks a column; or a bad row, by its number.
    """
    reader = None
    first, rows = 1, []
    for values in sources.stream_rows(path):
        reader = reader or _Reader(path, template, columns or Columns(), values)
        rows.append(reader.read(values))
        if len(rows) == size:
            yield _part(path, first, rows, identity, done, refuse)
            first, rows = first + size, []
    if rows:
        yield _part(path, first, rows, identity, done, refuse)


def _part(path: Path, first: int, rows: list[ItemRow], identity: str, done: Collection[str], refuse: bool) -> Part:
    digest = hashlib.sha256(json.dumps([identity, rows]).encode()).hexdigest()[:32]
    if digest in done:
        return Part(digest, str(path), first, [], len(rows))
    for number, row in enumerate(rows, first):
        if refuse and row.fault is not None:
            raise DataError(
                f"{path}, row {number}: {row.fault}. Mend the row, or leave such rows out with bad_rows='skip'."
            )
    return Part(digest, str(path), first, rows)


class _Reader:
    """Makes rows of one file, whose columns are known from its first row."""

    def __init__(self, path: Path, template: str | None, columns: Columns, first: Mapping[str, object]):
        self.template = "{text}" if template is None else template
        names = {name: name for name in sorted(fields_of(self.template))}
        if unknown := sorted(columns.fields.keys() - names):
            raise DataError(f"Items of this plug have no field {unknown[0]!r}; their fields are {', '.join(names)}.")
        self.fields = {**names, **columns.fields}
        self.user = columns.user
        self.item = columns.item or ("id" if "id" in first else None)
        self.time = columns.time or ("date" if "date" in first else None)
        self.unread = {n for n, column in (("id", self.item), ("date", self.time)) if column is None}
        roles = {"user": self.user, "item": self.item, "time": self.time}
        roles |= {f"field {name}": column for name, column in self.fields.items()}
        if missing := [f"{name!r} ({role})" for role, name in roles.items() if name not in (None, *first)]:
            raise DataError(
                f"{path} has no column {', '.join(missing)}; its columns are {', '.join(map(repr, first))}. Name them by "
                "user=, item=, time= and fields=."
            )

    def read(self, values: Mapping[str, object]) -> ItemRow:
        try:
            return self._read(values)
        except DataError as error:
            return ItemRow("", "", None, "", str(error))

    def _read(self, values: Mapping[str, object]) -> ItemRow:
        user = _id(values.get(self.user), "user")
        if missing := [column for column in self.fields.values() if column not in values]:
            raise DataError(f"no column {missing[0]!r}")
        for name in sorted(self.unread):  # exporters leave null fields out, and a row without its id cannot be deleted
            if not is_null(values.get(name)):
                raise DataError(
                    f"{name!r} is not in the file's first row, which says what is read: write it there, too"
                )
        item = {name: values[column] for name, column in self.fields.items()}
        text = history_text(item, self.template)
        date = values.get(self.time) if self.time else None
        time = parse_date(date)
        if self.time and not time:
            raise DataError("no date" if is_null(date) or not text_of(date).strip() else "not a date")
        if self.item is None:  # of the texts: a CSV file's "5" and "" are a Parquet file's 5 and null
            name = item_id({field: text_of(value) or None for field, value in {**item, "date": date}.items()})
        else:
            name = _id(values.get(self.item), "item id")
        return ItemRow(user, name, seconds(time) if time else None, text)


def _id(value: object, name: str) -> str:
    """Return the id of a user or an item as text."""
    text = "" if isinstance(value, list | dict) else text_of(value)
    if not text.strip():
        raise DataError(f"no {name}")
    if is_rounded(value):
        raise DataError(f"the {name} is a float, and too large to have all its digits")
    if len(text) > _MAX_ID:
        raise DataError(f"the {name} has more than {_MAX_ID} characters")
    if whole_texts([text]) != [text]:
        raise DataError(f"the {name} is not a valid text")
    return text
