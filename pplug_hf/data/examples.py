"""Examples of a split, from any source. Every command that reads data reads it here.

    read_examples("lamp/LaMP_2", "dev")                      LaMP's files in a folder
    read_examples("mine", "dev", "my_task.json")             mine/dev.jsonl, and a task of one's own
    read_examples("mine.jsonl", "dev", task)                 one file is one split
    read_examples(dataset_dict, "dev", task)                 a DatasetDict, or a mapping of splits to rows
    read_examples(dataset, "dev", task)                      a Dataset, or any iterable of rows: one split, too

`read_examples` holds all in memory; equal history items are one object. `stream` holds one example at a time, and
`tables.py` writes a stream to disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from ..errors import ConfigurationError, DataError, MissingFileError
from ..tasks.task import Task
from ..tasks.task_files import find_task, read_task
from . import lamp, sources
from . import records as rows
from .events import SPLITS, read_stored
from .records import Example, Repairs, some

Rows: TypeAlias = Iterable[Mapping[str, object]]
Source: TypeAlias = str | os.PathLike | Rows | Mapping[str, Rows]
_ENDINGS = ("_questions.json", ".jsonl")  # behind the name of a split


class Stream(NamedTuple):
    """Examples that are read once, as they are iterated over."""

    task: Task
    examples: Iterator[Example]
    repairs: Repairs  # complete when the examples are read


def read_examples(
    source: Source,
    split: str,
    task: Task | str | None = None,
    *,
    require_outputs: bool = True,
    repairs: Repairs | None = None,
) -> tuple[Task, list[Example]]:
    """Return the task and the examples of a split.

    Args:
        source: see above.
        split: which split of a folder or a mapping.
        task: the task, its name, or a JSON file with one (see `tasks/task_files.py`). LaMP's outputs files name
            it themselves; a folder of lines may hold it as `task.json`.
        require_outputs: whether a question without an answer is an error.
        repairs: takes notes of what was repaired.

    Returns:
        The task; examples in the order of the source. Treat their items as read-only.

    Raises:
        MissingFileError: a file or a split is not there.
        DataError: a file is broken, a row is not a question of this task, ids repeat, answers are missing, have other ids
            or are not labels, an input is empty; or there are no rows.
        ConfigurationError: there is no such task, or its file describes none that works.
    """
    if isinstance(task, str):
        task = find_task(task)
    name = "the data set"
    if isinstance(source, str | os.PathLike):
        name = f"{source}"
    elif isinstance(source, Mapping) and split not in source:
        raise MissingFileError(f"The data set has no split {split!r}; it has {', '.join(map(repr, source))}.")
    elif task is None:
        raise ConfigurationError("Rows do not name their task: pass task, as in task=Task(...) or task='LaMP-2'.")
    if isinstance(source, str | os.PathLike) and _is_lamp(Path(source), split):
        task, examples = lamp.read_lamp(source, split, task, require_outputs=require_outputs, repairs=repairs)
    else:
        task, found, _ = stream(source, split, task, require_outputs=require_outputs, repairs=repairs, share=True)
        examples = list(found)
    if not examples:
        raise DataError(f"The split {split!r} of {name} holds no questions.")
    if empty := [e.id for e in examples if not e.query.strip()]:
        raise DataError(
            f"The split {split!r} of {name} has questions with an empty input: {some(empty)}. Leave them out, or write "
            "what they ask."
        )
    return task, examples


def stream(
    source: Source,
    split: str | None = None,
    task: Task | str | None = None,
    *,
    require_outputs: bool = True,
    unnamed_user: str = "{id}",
    repairs: Repairs | None = None,
    share: bool = False,
) -> Stream:
    """Return examples one at a time; arguments and errors as in `tables.read_table`.

    Errors of single rows come when the row is read, those of the whole (ids, answers) behind the last one. A row that
    does not say whose it is gets the user `unnamed_user`, made from its id. With `share`, equal history items are one
    object.
    """
    repairs = Repairs() if repairs is None else repairs
    raw: Any = source
    read = partial(rows.examples, unnamed_user=unnamed_user, repairs=repairs, share=share)
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if not path.is_dir():
            if not path.is_file():
                raise MissingFileError(f"There is no file or folder {path}; check the path.")
        elif split is None:
            raise ConfigurationError(f"{path} is a folder; say which split of it, as in split='dev'.")
        else:
            path = sources.find(path, f"{split}_questions.json", f"{split}.jsonl")
            if path.name.startswith(f"{split}_questions.json"):
                declared, golds, outputs = lamp.find_golds(path.parent, split, require_outputs)
                task = rows.decide_task(task, declared, f"{path}")
                found = read(
                    sources.stream_array(path),
                    task,
                    f"{path}",
                    keys=lamp.KEYS,
                    golds=golds,
                    golds_where=outputs and f"{outputs}",
                )
                return Stream(task, found, repairs)
        name = path.name.removesuffix(".gz")
        if name.endswith((".csv", ".tsv", ".parquet")):
            raise DataError(
                f"{path} is a table of events: make a data set of it with pplug-hf prepare --source {path}, or with "
                "from_events in Python."
            )
        raw = sources.stream_array(path) if name.endswith(".json") else sources.stream_lines(path)
        where = f"{path}"
        if items := sources.find_packed(path.parent / sources.ITEMS):
            raw = read_stored(raw, items, where)
        if task is None and (path.parent / sources.TASK).is_file():
            task = read_task(path.parent / sources.TASK)
    else:
        if isinstance(raw, Mapping):  # a DatasetDict
            if split not in raw:
                raise ConfigurationError(f"There is no split {split!r}; pass split=, one of {', '.join(raw)}.")
            raw = raw[split]
        if type(raw).__name__ == "DataFrame":  # which would give its columns' names, not its rows
            raise DataError(
                "A data set is a list of rows, got a DataFrame: pass data.to_dict('records'), or .to_dicts() with polars."
            )
        where = "the data set"
    task = rows.decide_task(task, None, where)
    return Stream(task, read(raw, task, where, require_outputs=require_outputs), repairs)


def has_split(source: Source, split: str) -> bool:
    """Return true if a folder or a mapping has this split. A file and bare rows are one split, and have none."""
    if isinstance(source, Mapping):
        return split in source
    if not isinstance(source, str | os.PathLike) or not Path(source).is_dir():
        return False
    return any(sources.find_packed(Path(source) / f"{split}{ending}") for ending in _ENDINGS)


def other_splits(source: Source) -> list[str]:
    """Return the names of all splits besides train, whatever they are; bare rows have none.

    Those of a file lie beside it. Beside train.jsonl they may have any names; a file that is called something else may
    lie among those of other data sets, so only dev and test are taken for its own.
    """
    if isinstance(source, Mapping):
        return [str(name) for name in source if name != "train"]
    if not isinstance(source, str | os.PathLike):
        return []
    folder = _folder_of(source)
    names = [name for name in sources.split_names(folder, *_ENDINGS) if name != "train"]
    if is_one_split(source):
        own = Path(source).name.removesuffix(".gz")
        own = next((own.removesuffix(ending) for ending in _ENDINGS if own.endswith(ending)), own)
        names = [name for name in names if name != own and (own == "train" or name in SPLITS)]
    return [name for name in names if _holds_questions(folder, name)]


def exclusion_note(source: Source) -> str | None:
    """Return a sentence on which other splits were found for a file or bare rows, for what learns from histories."""
    if not is_one_split(source):
        return None
    if not isinstance(source, str | os.PathLike):
        return (
            "The data set is one split, so nothing says what is asked elsewhere, and all items of histories may be trained "
            "on: pass a mapping of all splits if there are more."
        )
    if others := other_splits(source):
        return f"{source}: what {' and '.join(others)} asks is not trained on (files beside it)."
    return (
        f"No dev or test split is beside {source}, so nothing says what is asked elsewhere, and all items of histories may "
        "be trained on: pass the folder of all splits if there are more."
    )


def is_one_split(source: Source) -> bool:
    """Return true for a file or bare rows, which need no name of a split."""
    if isinstance(source, str | os.PathLike):
        return Path(source).is_file()
    return not isinstance(source, Mapping)


def read_others(source: Source, splits: Sequence[str], task: Task) -> list[Example]:
    """Return the examples of further splits, if there are any, with answers or without."""
    if isinstance(source, str | os.PathLike) and is_one_split(source):
        beside = other_splits(source)
        source, splits = _folder_of(source), [split for split in splits if split in beside]
    found: list[Example] = []
    for split in splits:
        if has_split(source, split):
            found += read_examples(source, split, task, require_outputs=False)[1]
    return found


def _folder_of(source: str | os.PathLike) -> Path:
    """Return a folder itself, and for a file the one that it is in."""
    return Path(source).parent if Path(source).is_file() else Path(source)


def _holds_questions(folder: Path, name: str) -> bool:
    """Return false for a file of lines that holds something else, such as a log of events."""
    if sources.find_packed(folder / f"{name}_questions.json"):
        return True
    path = sources.find_packed(folder / f"{name}.jsonl")
    row = path and next(sources.stream_lines(path), None)
    return isinstance(row, Mapping) and not row.keys().isdisjoint(("input", "profile"))


def _is_lamp(path: Path, split: str) -> bool:
    """Return true if a folder has LaMP's files; raise for one without this split."""
    if path.is_file():
        return False
    return sources.find(path, f"{split}_questions.json", f"{split}.jsonl").name.startswith(f"{split}_questions.json")
