"""Files of predictions: each run of a row in the benchmark's own format, together with the key that determines its answers.

Equal keys, equal answers, which a bench need not make again. Places are not part of a key, but digests of what is there:
a plug that was trained again in the same folder is another one, and a copy of a plug is the same.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from ..data.records import Example, data_digest
from ..errors import MismatchError
from ..methods.digests import differences
from ..methods.resources import Resources
from ..storage.files import write_text
from ..tasks.task import Task
from ..version import __version__
from .compare import to_json

_PACKAGES = ("torch", "transformers", "tokenizers", "sentence-transformers")


class Prediction(NamedTuple):
    """The answers of one run (seed) of a row."""

    row: str
    run: int
    key: dict[str, Any]  # determines the answers
    about: dict[str, Any]  # does not: counts, seconds, commit
    answers: dict[str, str]  # id -> answer
    file: str = ""


def official(task: Task, answers: Iterable[tuple[str, str]], **more: object) -> str:
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


def note_others(saved: Mapping[tuple[str, int], Prediction], wanted: Iterable[tuple[str, int]]) -> None:
    """Print which predictions are there and not in a table; both are known by row and run."""
    if others := sorted(saved[run].file for run in saved.keys() - set(wanted)):
        print(f"In the folder and not in the table, because they were not asked for: {', '.join(others)}.")


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
        for part in ("backbone", "decoding", "chat"):  # without a chat template there is no "chat"
            if made.key.get(part) != chosen[0].key.get(part):
                raise MismatchError(
                    f"{made.file} and {chosen[0].file} were made with different "
                    f"{', '.join(differences(made.key, chosen[0].key))}: name rows that belong together, or run them "
                    "again."
                )


def shared_key(resources: Resources, examples: Sequence[Example]) -> dict[str, object]:
    """Return what determines the answers of every method: data, language model, decoding and versions."""
    task, decoding, processor = resources.task, resources.decoding, resources.processor
    chat = {"chat": {"template": processor.tokenizer.chat_template, "system": processor.system}}
    return {
        "data": data_digest(task, examples, answers=False),
        "backbone": resources.backbone_digest,
        "decoding": {**asdict(decoding), "max_new_tokens": decoding.max_new_tokens or task.max_new_tokens},
        "versions": {"pplug-hf": __version__, **versions(_PACKAGES)},
        **(chat if processor.chat else {}),
    }


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Return the installed versions of packages; None for those that are missing."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


@cache
def git_commit() -> str | None:
    """Return the commit of this package's own checkout, with a + if files were changed since; None if installed."""
    root = Path(__file__).parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True) if (root / ".git").exists() else None
    except OSError:
        return None
    return done.stdout.strip() or None if done else None
