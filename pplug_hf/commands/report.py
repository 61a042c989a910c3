"""`pplug-hf report`: what a data set's histories are like, before trusting anything trained on them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from ..data.report import HistoryReport, describe
from ..data.tables import stream
from ..evaluation.compare import write


@dataclass
class ReportSettings:
    """Describe the histories of a data set: sizes, ages, labels, repetitions, near-duplicates of the questions."""

    data: str = field(
        metadata={"help": "Folder with {split}_questions.json[.gz] or {split}.jsonl[.gz], or a .jsonl file."}
    )
    split: str = field(default="dev", metadata={"help": "Which split of a folder."})
    task: str | None = field(default=None, metadata={"help": "Task (default: what the outputs file says)."})
    seed: int = field(default=0, metadata={"help": "Seed of the users that chance makes, for comparison."})
    output: str | None = field(default=None, metadata={"help": "Write the report to this JSON file, too."})


def report(settings: ReportSettings) -> HistoryReport:
    """Print the report, and save it if asked to. It holds counts and ids, no text."""
    task, examples, repairs = stream(settings.data, settings.split, settings.task, require_outputs=False)
    found = describe(examples, task, repairs, settings.seed)
    print(found)
    if settings.output:
        write(Path(settings.output), json.dumps(found.to_dict(), indent=2) + "\n")
    return found
