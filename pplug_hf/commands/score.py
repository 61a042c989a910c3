"""`pplug-hf score`: the official numbers of a predictions file."""

from __future__ import annotations

import json
from pathlib import Path

from ..data import records as rows
from ..data import sources
from ..errors import ConfigurationError, DataError, MismatchError, MissingFileError
from ..storage.files import write_text
from ..tasks.metrics import get_metric
from ..tasks.task import Task, score
from ..tasks.task_files import find_task
from .options import ScoreSettings

_NO_TASK = "{where} does not name its task: pass --task, as in --task LaMP-3."
_OTHER_TASK = (
    "{where} is of task {declared!r}, and the task is {task}: take the files of one task, or pass another --task."
)


def score_files(settings: ScoreSettings) -> dict[str, object]:
    """Print the numbers, and return them.

    Raises:
        MissingFileError: A file is not there.
        DataError: A file has another layout, ids repeat, a gold is missing or not a label, or the files are of
            different tasks or name none.
        MismatchError: The files have different ids.
        ConfigurationError: There is no such task, or the output cannot be a file.
    """
    if settings.output and Path(settings.output).is_dir():
        raise ConfigurationError(f"The output {settings.output!r} is a folder: name a file.")
    declared, golds = read(settings.golds)
    task = rows.decide_task(find_task(settings.task), declared, settings.golds, _NO_TASK, _OTHER_TASK)
    answered, predictions = read(settings.predictions)
    rows.decide_task(task, answered, settings.predictions, _NO_TASK, _OTHER_TASK)
    check(golds, predictions, task, settings)
    numbers = score(
        task,
        [predictions[id_] or "" for id_ in golds],
        [gold or "" for gold in golds.values()],
        fallback=settings.fallback,
    )
    result = {"task": task.name, "examples": len(golds), **numbers}
    if get_metric(task.metric).fallbacks:
        result["fallback"] = settings.fallback
    if notes := get_metric(task.metric).notes([gold or "" for gold in golds.values()]):
        result["notes"] = notes
    text = json.dumps(result, indent=2)
    if settings.output:
        write_text(Path(settings.output), text + "\n")
    print(text)
    return result


def read(path: str) -> tuple[str | None, dict[str, str | None]]:
    """Return the task that a file of answers names, and the answer of each id."""
    if not Path(path).is_file():
        raise MissingFileError(f"There is no file {path!r}: check the path.")
    return rows.read_golds(sources.load(Path(path)), path)


def check(
    golds: dict[str, str | None], predictions: dict[str, str | None], task: Task, settings: ScoreSettings
) -> None:
    """Raise if the files cannot be compared."""
    if not golds:
        raise DataError(f"{settings.golds} holds no golds: the benchmark withholds those of its test split.")
    if missing := [id_ for id_, gold in golds.items() if gold is None]:
        raise DataError(f"{settings.golds}: these ids have no gold: {rows.some(missing)}.")
    if golds.keys() != predictions.keys():
        unanswered = [id_ for id_ in golds if id_ not in predictions]
        unknown = [id_ for id_ in predictions if id_ not in golds]
        raise MismatchError(
            f"{settings.golds} and {settings.predictions} must have the same ids. Only in the golds: "
            f"{rows.some(unanswered) or 'none'}. Only in the predictions: {rows.some(unknown) or 'none'}."
        )
    wrong = [id_ for id_, gold in golds.items() if task.labels and task.label_of(gold) not in task.labels]
    if wrong:
        raise DataError(
            f"{settings.golds}: golds of {task.name} must be one of {', '.join(task.labels)}; those of these ids are not: "
            f"{rows.some(wrong)}."
        )
