"""`pplug-hf report`: a description of a data set's histories, before anything is trained on them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..data.examples import Source, stream
from ..data.report import HistoryReport, describe
from ..errors import DataError
from ..storage.files import write_text
from ..tasks.task import Task
from ..tasks.task_files import find_task
from .options import TASK, option, required


@dataclass
class ReportSettings:
    """Describe the histories of a data set: sizes, ages, labels, repetitions, near-duplicates of the questions."""

    data: str = required("Folder with {split}_questions.json[.gz] or {split}.jsonl[.gz], or a .jsonl file.")
    split: str = option("dev", "Which split of a folder.")
    task: str | None = option(None, TASK)
    seed: int = option(0, "Seed of the random users that real ones are compared with.")
    output: str | None = option(None, "Write the report to this JSON file, too.")


def report(settings: ReportSettings, task: Task | None = None, data: Source | None = None) -> HistoryReport:
    """Print the report, and save it if asked to. It holds counts and ids, no text.

    Args:
        settings: see the fields.
        task: instead of `settings.task`, a task of your own.
        data: instead of what `settings.data` names: rows, or a `DatasetDict` or mapping of splits to rows, see
            `data/examples.py`.

    Raises:
        PPlugError: settings or data that cannot be used; nothing is written then.
    """
    source = settings.data if data is None else data
    task = task or find_task(settings.task)
    task, examples, repairs = stream(source, settings.split, task, require_outputs=False)
    found = describe(examples, task, repairs, settings.seed)
    if not found.questions:
        raise DataError(f"The split {settings.split!r} of {settings.data} holds no questions.")
    print(found)
    if settings.output:
        write_text(Path(settings.output), json.dumps(found.to_dict(), indent=2) + "\n")
    return found
