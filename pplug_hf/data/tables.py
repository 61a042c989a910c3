"""Reading of data of any size and any of these formats into a `datasets.Dataset` on disk.

    LaMP         a folder with {split}_questions.json and {split}_outputs.json
    JSON lines   a file, or {split}.jsonl in a folder; one {"id"?, "user"?, "input", "output", "profile"} per line;
                 items.jsonl beside it may hold the items (see `events.py`), and task.json the task
    datasets     a Dataset, an IterableDataset, or any iterable of such rows

Files may be gzipped. They are read row by row, by the rules of `records.py`, and written at once: in memory are the rows
of one batch, and the ids (and, for LaMP, the answers) of all other rows.

    task, rows, repairs = read_table("lamp/LaMP_2", "dev")
    task, rows, repairs = read_table("mine.jsonl", task=Task(name="shelves", ...))
    print(repairs)
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NotRequired, TypedDict

import numpy as np

from pplug_hf.data.examples import Rows, Source, stream
from pplug_hf.data.records import Example, Repairs
from pplug_hf.optional import require
from pplug_hf.storage.files import atomic_write
from pplug_hf.tasks.metrics import get_metric
from pplug_hf.tasks.task import Task, get_task

if TYPE_CHECKING:
    from datasets import Dataset, Features

_BATCH = 4_000_000  # characters that are written at once

_temporary: list[tempfile.TemporaryDirectory] = []  # tables without a folder of their own live as long as the process


class Row(TypedDict):
    """One row of a table."""

    id: str
    user: str
    input: str
    query: str
    output: str | None
    profile: list[dict[str, str]]
    extra: NotRequired[str]  # of a metric that reads further fields


class Table(NamedTuple):
    """Result of `read_table`."""

    task: Task
    rows: Dataset
    repairs: Repairs


def read_table(
    source: Source,
    split: str | None = None,
    task: Task | str | None = None,
    *,
    require_outputs: bool = True,
    folder: str | os.PathLike | None = None,
) -> Table:
    """Read one split into an Arrow file, which the data set then maps into memory.

    Args:
        source: A folder, a file (.jsonl, or .json with one array), a `datasets.Dataset`, `IterableDataset` or
            `DatasetDict`, or any iterable of rows.
        split: Which split of a folder or `DatasetDict`.
        task: The task, or its name; LaMP's outputs files name it themselves.
        require_outputs: Whether a question without an answer is an error.
        folder: Where the Arrow file goes, as `{split}.arrow`; it replaces one that is there. By default a temporary
            folder that lives as long as the process.

    Returns:
        The task; a data set with the columns of `features(task)`, in the order of the source; and what was repaired.

    Raises:
        MissingFileError: A file is not there.
        DataError: A file is broken, a row is not a question of this task, ids repeat, answers are missing, have other ids
            or are not labels. Nothing is written then.
        ConfigurationError: There is no such task or split.
        MissingPackageError: datasets or ijson is not installed.
    """
    task, examples, repairs = stream(source, split, task, require_outputs=require_outputs)
    return Table(task, _write(examples, task, repairs, split or "rows", folder), repairs)


def read_splits(
    source: str | os.PathLike | Mapping[str, Rows],
    splits: Sequence[str] = ("train", "dev", "test"),
    task: Task | str | None = None,
    *,
    require_outputs: bool = True,
    folder: str | os.PathLike | None = None,
) -> dict[str, Table]:
    """Read several splits of one source, whose ids may repeat between them: LaMP numbers each split from 0.

    Args and errors are those of `read_table`. A split that is there in no format is an error.

    Returns:
        A table per split. Where the rows do not say whose they are, the user is "{split}/{id}", or two people would
        look like one. Ids that an earlier split has too are among the repairs.
    """
    tables: dict[str, Table] = {}
    seen: set[str] = set()
    for split in splits:
        chosen, examples, repairs = stream(
            source, split, task, require_outputs=require_outputs, unnamed_user=f"{split}/{{id}}"
        )
        ids: list[str] = []
        noted = _note_shared(examples, seen, ids, repairs)
        tables[split] = Table(chosen, _write(noted, chosen, repairs, split, folder), repairs)
        seen.update(ids)
    return tables


def _note_shared(examples: Iterable[Example], seen: set[str], ids: list[str], repairs: Repairs) -> Iterator[Example]:
    for example in examples:
        repairs.add("shared_id", example.id, example.id in seen)
        ids.append(example.id)
        yield example


def features(task: Task | str) -> Features:
    """Return the columns of a table: texts, `output` null where it is withheld, and a `profile` of the task's own fields.

    For a metric that reads further fields of a row also `extra`, those fields as JSON.
    """
    datasets = require("datasets", "train", "A table")
    text = datasets.Value("string")
    item = {name: text for name in _item_fields(get_task(task))}
    extra = ("extra",) if get_metric(get_task(task).metric).fields else ()
    columns = {name: text for name in ("id", "user", "input", "query", "output", *extra)}
    return datasets.Features({**columns, "profile": datasets.List(item)})


def examples(table: Iterable[Row]) -> Iterator[Example]:
    """Yield the rows of a table as examples; `list(...)` of it holds all in memory."""
    for row in table:
        extra = json.loads(row.get("extra") or "{}")
        yield Example(row["id"], row["user"], row["input"], row["query"], row["output"], row["profile"], extra)


def _item_fields(task: Task) -> list[str]:
    return ["id", *sorted(task.fields - {"id", "date"}), "date"]


def _write(
    examples: Iterable[Example], task: Task, repairs: Repairs, name: str, folder: str | os.PathLike | None
) -> Dataset:
    """Write examples to a file, which appears when it is complete, and return it as a data set."""
    datasets = require("datasets", "train", "A table")
    import pyarrow as pa

    if folder is None:
        _temporary.append(tempfile.TemporaryDirectory(prefix="pplug-hf-", ignore_cleanup_errors=True))
        folder = str(_temporary[-1].name)
    path = Path(folder) / f"{name}.arrow"
    schema, fields = features(task).arrow_schema, _item_fields(task)
    with (
        atomic_write(path) as staging,
        pa.OSFile(str(staging), "wb") as file,
        pa.ipc.new_stream(file, schema) as writer,
    ):
        batch: list[Row] = []
        size = 0
        for example in examples:
            row = _row(example, fields, repairs)
            batch.append(row)
            size += len(row["input"]) + sum(len(text) for item in row["profile"] for text in item.values())
            if size >= _BATCH:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
                batch, size = [], 0
        writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
    return datasets.Dataset.from_file(str(path))


def _to_json(values: Mapping[str, object]) -> str:
    """Return further fields of a row as JSON; numbers of a stream or of numpy as Python's."""

    def plain(value: Any) -> object:
        return value.tolist() if isinstance(value, np.ndarray | np.generic) else float(value)

    return json.dumps(dict(values), default=plain)


def _row(example: Example, fields: list[str], repairs: Repairs) -> Row:
    extra = {name: None for item in example.history for name in item if name not in fields}
    repairs.add("extra_fields", example.id, len(extra), extra)
    broken = 0

    def whole(text: str) -> str:
        """Arrow takes UTF-8 alone, and a JSON text may hold half an emoji."""
        nonlocal broken
        if text.isascii():
            return text
        try:
            text.encode()
        except UnicodeEncodeError:
            broken += 1
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text

    row: Row = {
        "id": whole(example.id),
        "user": whole(example.user),
        "input": whole(example.prompt),
        "query": whole(example.query),
        "output": None if example.target is None else whole(example.target),
        "profile": [{name: whole(item.get(name, "")) for name in fields} for item in example.history],
        "extra": _to_json(example.extra),  # a column only if the task's metric reads any
    }
    repairs.add("broken_text", row["id"], broken)
    return row
