"""`pplug-hf report`: a description of a data set's histories, before anything is trained on them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..data.examples import Source, stream
from ..data.records import Example
from ..data.report import HistoryReport, describe
from ..errors import DataError
from ..modeling.encoders import length_notes, load_encoder
from ..storage.files import write_text
from ..tasks.task import Task
from ..tasks.task_files import find_task
from .options import ReportSettings


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
    items: dict[str, None] = {}
    if settings.encoder is not None:
        examples = _noting(examples, task, items)
    found = describe(examples, task, repairs, settings.seed)
    if not found.questions:
        raise DataError(f"The split {settings.split!r} of {settings.data} holds no questions.")
    print(found)
    if settings.encoder is not None:
        encoder = load_encoder(settings.encoder)
        for note in length_notes(encoder, items, encoder.prompts.get("document") or ""):
            print(note)
    if settings.output:
        write_text(Path(settings.output), json.dumps(found.to_dict(), indent=2) + "\n")
    return found


def _noting(examples: Iterable[Example], task: Task, items: dict[str, None]) -> Iterator[Example]:
    """Yield examples, and note the texts of their items."""
    for example in examples:
        items.update(dict.fromkeys(map(task.item_text, example.history)))
        yield example
