"""Files of predictions: each run of a row in the benchmark's own format, together with the key that determines its answers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..data.records import Example
from ..errors import MismatchError
from ..storage.files import write_text
from ..tasks.task import Task
from .compare import to_json


class Prediction(NamedTuple):
    """The answers of one run (seed) of a row."""

    row: str
    run: int
    key: dict[str, Any]  # determines the answers
    about: dict[str, Any]  # does not: counts, seconds, commit
    answers: dict[str, str]  # id -> answer
    file: str = ""


def official(task: Task, answers: Iterable[tuple[str, str]], **more: Any) -> str:
    """Return (id, answer) pairs in the benchmark's format; its scorers ignore the further keys."""
    golds = [{"id": id_, "output": answer} for id_, answer in answers]
    return to_json({"task": task.name.replace("-", "_"), "golds": golds, **more}, indent=1)


def file_name(row: str, run: int | None) -> str:
    """Return a row's file; the comma stands for the colon, which not every file system takes, and in no other name."""
    return row.replace(":", ",") + ("" if run is None else f",{run}") + ".json"


def write_prediction(folder: Path, task: Task, made: Prediction) -> None:
    """Write a prediction to its file."""
    content = {"row": made.row, "run": made.run, "key": made.key, "about": made.about}
    write_text(folder / made.file, official(task, made.answers.items(), **content))


def read_predictions(folder: Path) -> Iterator[Prediction]:
    """Read the predictions of a bench in a folder; damaged and other files are skipped, with a printed line."""
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            answers = {str(gold["id"]): str(gold["output"]) for gold in content["golds"]}
            yield Prediction(content["row"], content["run"], content["key"], content["about"], answers, path.name)
        except (ValueError, KeyError, TypeError):
            print(f"Passed over {path.name}: it does not hold predictions of a bench.")


def differences(old: dict[str, Any], new: dict[str, Any], inside: str = "") -> list[str]:
    """Return the names of the entries in which two keys differ."""
    names = []
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            names += differences(a, b, f"{inside}{name}.")
        elif a != b:
            names.append(f"{inside}{name}")
    return names


def check_together(chosen: Sequence[Prediction], digest: str, examples: Sequence[Example]) -> None:
    """Raise a `MismatchError` unless all predictions belong to these examples and were made the same way."""
    ids = {e.id for e in examples}
    for made in chosen:
        if made.answers.keys() != ids:
            raise MismatchError(
                f"{made.file} answers other questions than the data asks: {len(made.answers.keys() - ids)} of its ids "
                f"are unknown, {len(ids - made.answers.keys())} are missing. Use the data and the split it was made for."
            )
        if made.key.get("data") != digest:
            raise MismatchError(
                f"{made.file} was made for other data under the same ids: use the data, the split and max_items of "
                "that run."
            )
        for part in ("backbone", "decoding"):
            if made.key.get(part) != chosen[0].key.get(part):
                raise MismatchError(
                    f"{made.file} and {chosen[0].file} were made with different "
                    f"{', '.join(differences(made.key, chosen[0].key))}: name rows that belong together, or run them "
                    "again."
                )
