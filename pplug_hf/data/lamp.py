"""Reading of files in the layout of the LaMP benchmark.

    {split}_questions.json   [{"id", "input", "profile": [{"id", ...}, ...], "user_id"?}, ...]
    {split}_outputs.json     {"task": "LaMP_2", "golds": [{"id", "output"}, ...]}

Both may be gzipped. Messages name files, ids, fields and labels, never a text of a user's history. `read_lamp` holds
everything in memory; for files too large for that, and for other formats, see `tables.py`.
"""

from __future__ import annotations

import os
from pathlib import Path

from pplug_hf.data import records as rows
from pplug_hf.data import sources
from pplug_hf.data.records import Example, Repairs
from pplug_hf.errors import MissingFileError
from pplug_hf.tasks.task import Task

__all__ = ["Example", "read_lamp"]

KEYS = frozenset({"id", "input", "profile"})


def read_lamp(
    folder: str | os.PathLike,
    split: str,
    task: Task | str | None = None,
    *,
    require_outputs: bool = True,
    repairs: Repairs | None = None,
) -> tuple[Task, list[Example]]:
    """Read one split of a task.

    Args:
        folder: Where `{split}_questions.json[.gz]` and `{split}_outputs.json[.gz]` lie.
        split: "train", "dev", "test", or whatever the files start with.
        task: The task, or its name. By default the outputs file names it. Either way the fields of the
            history items must be that task's: the benchmark's server has another task under LaMP_2 too.
        require_outputs: Whether a missing outputs file is an error. If not, every target is None where it is
            missing (the benchmark withholds the answers of its test split).
        repairs: Takes notes of what was repaired.

    Returns:
        The task and its examples, in the order of the questions file. Equal history items are one shared
        object, so treat them as read-only.

    Raises:
        MissingFileError: A file is not there.
        DataError: A file has another layout, or the files do not fit each other or the task.
        ConfigurationError: `task` is not a known task.
    """
    folder = Path(folder)
    questions = sources.find(folder, f"{split}_questions.json")
    data = rows.checked_list(sources.load(questions), f"{questions}")
    declared, golds, outputs = find_golds(folder, split, require_outputs)
    task = rows.decide_task(task, declared, f"{questions}")

    found = rows.examples(
        *(data, task, f"{questions}"),
        keys=KEYS,
        golds=golds,
        golds_where=outputs and f"{outputs}",
        repairs=repairs,
        share=True,
    )
    return task, list(found)


def find_golds(
    folder: Path, split: str, required: bool
) -> tuple[str | None, dict[str, str | None] | None, Path | None]:
    """Return the task's name, the answers and the path of the outputs file; Nones if it may be missing and is."""
    try:
        path = sources.find(folder, f"{split}_outputs.json")
    except MissingFileError:
        if required:
            raise
        return None, None, None
    return *rows.read_golds(sources.load(path), f"{path}"), path
