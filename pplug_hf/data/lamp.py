"""Reads files in the layout of the LaMP benchmark, and says clearly what is wrong with those that are not.

    {split}_questions.json   [{"id", "input", "profile": [{"id", ...}, ...], "user_id"?}, ...]
    {split}_outputs.json     {"task": "LaMP_2", "golds": [{"id", "output"}, ...]}

Both may be gzipped. Messages name files, ids, fields and labels, never a text of a user's history.
"""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pplug_hf.configuration.tasks import TASKS, Task, get_task
from pplug_hf.errors import ConfigurationError, DataError, MissingFileError

_GZIP_MAGIC = b"\x1f\x8b"
_SHOWN = 5  # ids in a message


@dataclass(slots=True)
class Example:
    """One question of one user."""

    id: str
    user: str  # the row's own id where the data does not say who asks
    prompt: str  # the whole input, as the language model reads it
    query: str  # the part of it that is the user's own, as the input encoder reads it
    target: str | None  # None where answers are withheld
    history: Sequence[dict[str, str]]  # the user's earlier items, oldest first


def read_lamp(
    folder: str | Path, split: str, task: Task | str | None = None, *, require_outputs: bool = True
) -> tuple[Task, list[Example]]:
    """Reads one split of a task.

    Args:
        folder: Where `{split}_questions.json[.gz]` and `{split}_outputs.json[.gz]` lie.
        split: "train", "dev", "test", or whatever the files start with.
        task: The task, or its name. By default the outputs file names it. Either way the fields of the
            history items must be that task's: the benchmark's server has another task under LaMP_2 too.
        require_outputs: Whether a missing outputs file is an error. If not, every target is None where it is
            missing (the benchmark withholds the answers of its test split).

    Returns:
        The task and its examples, in the order of the questions file. Equal history items are one shared
        object, so treat them as read-only.

    Raises:
        MissingFileError: A file is not there.
        DataError: A file is no JSON of this layout, or the files do not fit each other or the task.
        ConfigurationError: `task` is not a known task.
    """
    folder = Path(folder)
    questions_path = _find(folder, f"{split}_questions.json")
    rows = _rows(_load(questions_path), {"id", "input", "profile"}, f"{questions_path}")
    try:
        outputs_path = _find(folder, f"{split}_outputs.json")
    except MissingFileError:
        if require_outputs:
            raise
        declared, golds = None, None
    else:
        declared, golds = _golds(_load(outputs_path), outputs_path)
        _check_same_ids([row["id"] for row in rows], golds, questions_path, outputs_path)

    task = _decide_task(task, declared, questions_path)
    _check_fields(rows, task, questions_path)
    if golds is not None:
        _check_labels(golds, task, outputs_path)

    shared: dict[tuple, dict[str, str]] = {}  # one object per distinct item: rows of one user repeat them
    examples = []
    for row in rows:
        items = ({name: _text(value) for name, value in item.items()} for item in row["profile"])
        prompt = _text(row["input"])
        examples.append(
            Example(
                id=row["id"],
                user=row["id"] if row.get("user_id") is None else str(row["user_id"]),
                prompt=prompt,
                query=task.query(prompt),
                target=None if golds is None else golds[row["id"]],
                history=[shared.setdefault(tuple(item.items()), item) for item in items],
            )
        )
    return task, examples


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _some(values: Iterable[Any]) -> str:
    """Up to five of some ids, for a message."""
    values = list(values)
    more = f", ... ({len(values)} in all)" if len(values) > _SHOWN else ""
    return ", ".join(repr(value) for value in values[:_SHOWN]) + more


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    splits = sorted({path.name.split("_questions.json")[0] for path in folder.glob("*_questions.json*")})
    there = f"it has the splits {', '.join(splits)}" if splits else "it has no questions files at all"
    raise MissingFileError(
        f"Neither {name} nor {name}.gz is in {folder}: {there if folder.is_dir() else 'no such folder'}. "
        "Check the folder and the split's name."
    )


def _load(path: Path) -> Any:
    raw = path.read_bytes()
    # `from None` below: these errors carry the document itself.
    if raw.startswith(_GZIP_MAGIC):
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"{path} is a damaged or cut-off gzip file ({error}); fetch it again.") from None
    if raw.lstrip()[:1] == b"<":
        raise DataError(
            f"{path} is a web page, not JSON: a server often answers a wrong address with one. Check the "
            "address it was fetched from."
        )
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); fetch it again.") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} is no JSON, or is cut off ({error.msg}, line {error.lineno}, column {error.colno}, "
            f"{len(raw):,} bytes read); fetch it again."
        ) from None


def _rows(data: Any, keys: set[str], where: str) -> list[dict[str, Any]]:
    """The rows of a file, checked: a list of objects with these keys, and ids that occur once."""
    if not isinstance(data, list):
        raise DataError(f"{where} must hold a list of objects, not {type(data).__name__}.")
    for position, row in enumerate(data):
        if not isinstance(row, dict) or not keys <= row.keys():
            found = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise DataError(f"{where}: row {position} must have the keys {sorted(keys)}; found {found}.")
        row["id"] = str(row["id"])
        if "profile" in keys:
            row["profile"] = row["profile"] or []
            items = row["profile"] if isinstance(row["profile"], list) else [None]
            if not all(isinstance(item, dict) for item in items):
                raise DataError(f"{where}: the profile of id {row['id']!r} must be a list of objects.")
    repeated = [id_ for id_, count in Counter(row["id"] for row in data).items() if count > 1]
    if repeated:
        raise DataError(f"{where}: ids must occur once; these repeat: {_some(repeated)}.")
    return data


def _golds(data: Any, path: Path) -> tuple[str | None, dict[str, str]]:
    """What an outputs file says: the task's name, and the answer of each id."""
    if not isinstance(data, dict) or "golds" not in data:
        found = sorted(data) if isinstance(data, dict) else type(data).__name__
        raise DataError(f"{path} must hold an object with the keys 'task' and 'golds'; found {found}.")
    rows = _rows(data["golds"], {"id", "output"}, f"{path}, golds")
    return data.get("task"), {row["id"]: _text(row["output"]).strip() for row in rows}


def _check_same_ids(ids: list[str], golds: dict[str, str], questions_path: Path, outputs_path: Path) -> None:
    only_questions = [id_ for id_ in ids if id_ not in golds]
    only_golds = list(golds.keys() - set(ids))
    if only_questions or only_golds:
        raise DataError(
            f"{questions_path.name} and {outputs_path.name} must have the same ids. Only in the questions: "
            f"{_some(only_questions) or 'none'}. Only in the outputs: {_some(sorted(only_golds)) or 'none'}."
        )


def _decide_task(task: Task | str | None, declared: str | None, path: Path) -> Task:
    if task is None:
        if declared is None:
            raise DataError(f"No outputs file names the task of {path}; pass task=, one of {', '.join(TASKS)}.")
        return get_task(declared)
    task = get_task(task)
    try:
        known = get_task(declared) if declared is not None else task
    except ConfigurationError:
        known = task  # a name of the user's own; the fields decide
    if known.name != task.name:
        raise DataError(
            f"The outputs beside {path} are of task {declared!r}, but task={task.name!r} was asked for; pass "
            f"task={known.name!r} or no task."
        )
    return task


def _check_fields(rows: list[dict[str, Any]], task: Task, path: Path) -> None:
    fields = task.fields
    for row in rows:
        for item in row["profile"]:
            if fields <= item.keys():
                continue
            found = item.keys() - {"id", "date"}
            if found >= {"text", "title", "category"}:
                hint = "This is the benchmark's news categorisation; the movies of LaMP-2 are under LaMP_2/new."
            else:
                fitting = [other.name for other in TASKS.values() if other.fields <= found]
                hint = f"They fit {', '.join(fitting) or 'no known task'}."
            raise DataError(
                f"{path} does not hold task {task.name}: history items need the fields {sorted(fields)}, but "
                f"one of id {row['id']!r} has {sorted(found)}. {hint}"
            )


def _check_labels(golds: dict[str, str], task: Task, path: Path) -> None:
    if not task.labels:
        return
    wrong = {id_: answer[:60] for id_, answer in golds.items() if answer not in task.labels}
    if wrong:
        more = f", ... ({len(wrong)} in all)" if len(wrong) > _SHOWN else ""
        shown = ", ".join(f"{id_!r} has {wrong[id_]!r}" for id_ in list(wrong)[:_SHOWN]) + more
        raise DataError(f"{path}: answers of task {task.name} must be one of {', '.join(task.labels)}. Id {shown}.")
