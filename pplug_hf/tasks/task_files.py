"""A task of one's own as a JSON file: the fields of `Task`, by name; `prompt` holds those of `PromptFormat`.

{"name": "shelves", "query_marker": "book:", "query_field": "text", "answer_field": "tag",
 "item_template": "{tag}: {text}", "item_template_unlabelled": "{text}",
 "labels": ["sea", "moon"], "metric": "accuracy", "max_new_tokens": 4}
"""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import DataError, MissingFileError
from .task import PromptFormat, Task, get_task

T = TypeVar("T", Task, PromptFormat)


def find_task(task: Task | str | None) -> Task | None:
    """Return the task that an option names.

    Args:
        task: a task's name, or the path of a JSON file, which ends in .json; a `Task` and None are handed back.

    Returns:
        The task, if one was named.

    Raises:
        MissingFileError: there is no such file.
        DataError: the file does not hold a task.
        ConfigurationError: there is no task of that name, or the task cannot work.
    """
    if task is None or isinstance(task, Task):
        return task
    return read_task(task) if task.endswith(".json") else get_task(task)


def read_task(path: str | Path) -> Task:
    """Return the task in a JSON file. Errors as in `find_task`."""
    file = Path(path)
    if not file.is_file():
        raise MissingFileError(f"There is no task file {str(path)!r}: check the path.")
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"The task file {str(path)!r} is not UTF-8 text (byte {error.start}).") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"The task file {str(path)!r} is not valid JSON: {error}.") from None
    return _build(Task, content, f"The task file {str(path)!r}")


def _build(kind: type[T], content: object, where: str) -> T:
    """Return a dataclass made of a JSON object, its fields checked by name and type."""
    if not isinstance(content, Mapping):
        raise DataError(f"{where} must hold a JSON object, not {_json_type(content)}.")
    known: dict[str, Field] = {field.name: field for field in fields(kind)}
    for name in content:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise DataError(f"{where} has the unknown field {name!r}{hint}; fields are {', '.join(known)}.")
    if missing := [name for name, field in known.items() if field.default is MISSING and name not in content]:
        needed = "; ".join(f"{name!r}: {known[name].metadata['help']}" for name in missing)
        raise DataError(f"{where} lacks fields. {needed}")
    for name, field in known.items():
        choices = field.metadata.get("choices")
        if choices is not None and name in content and content[name] not in list(choices):
            raise DataError(f"{where}, field {name!r}, is {content[name]!r}; choose one of {', '.join(choices)}.")
    hints = get_type_hints(kind)
    return kind(**{name: _value(hints[name], value, f"{where}, field {name!r},") for name, value in content.items()})


def _value(hint: object, value: object, where: str) -> Any:
    """Return a JSON value as the type of a field; lists become tuples."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        plain = [kind for kind in arguments if kind is not type(None)]
        fitting = [kind for kind in plain if kind is type(value)]
        return _value(fitting[0] if fitting else plain[0], value, where)
    if hint is PromptFormat:
        return _build(PromptFormat, value, where)
    if origin is tuple:
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise DataError(f"{where} must be a list of texts, not {_json_type(value)}.")
        return tuple(value)
    if type(value) is not hint:
        raise DataError(f"{where} must be a {'text' if hint is str else 'whole number'}, not {_json_type(value)}.")
    return value


def _json_type(value: object) -> str:
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number"}
    return names.get(type(value), "null" if value is None else "a number")
