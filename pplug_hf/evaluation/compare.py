"""Rows side by side: the same examples, backbone and decoding, with paired intervals over users."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..configuration.tasks import Task
from ..data.lamp import Example
from .bootstrap import paired_bootstrap
from .metrics import higher_is_better, main_metric, per_example, score


@dataclass
class Comparison:
    """Answers of several rows to the same examples.

    Args:
        task: what was asked.
        examples: with golds.
        reference: name of the row the others are compared with.
        predictions: row -> one answer per example. Several seeds of a row are several lists.
    """

    task: Task
    examples: Sequence[Example]
    reference: str
    predictions: dict[str, list[list[str]]] = field(default_factory=dict)

    def add(self, row: str, answers: list[str]) -> None:
        """One run (seed) of a row."""
        self.predictions.setdefault(row, []).append(answers)

    def rows(self) -> list[dict[str, Any]]:
        """One record per row: its metrics (mean over seeds, and the standard deviation of the main one), and how much
        better the reference row is, with the 95 % interval of a paired bootstrap over users of the mean over seeds."""
        golds = [str(e.target) for e in self.examples]
        users = [e.user for e in self.examples]
        means = {}
        records = []
        for name, runs in self.predictions.items():
            scores = [score(self.task, answers, golds) for answers in runs]
            means[name] = np.mean([per_example(self.task, answers, golds) for answers in runs], axis=0)
            record: dict[str, Any] = {"row": name, "seeds": len(runs)}
            for metric in scores[0]:
                values = [s[metric] for s in scores]
                record[metric] = float(np.mean(values))
                if len(runs) > 1 and metric == main_metric(self.task):
                    record[f"{metric}_sd"] = float(np.std(values, ddof=1))
            records.append(record)
        sign = 1 if higher_is_better(self.task) else -1
        for record in records:
            if record["row"] != self.reference and self.reference in means:
                interval = paired_bootstrap(sign * means[self.reference], sign * means[record["row"]], users)
                record["gain"] = [interval.mean, interval.low, interval.high]
        return records

    def markdown(self) -> str:
        """The table as people read it."""
        records = self.rows()
        metrics = [key for key in score(self.task, ["x"], [str(self.examples[0].target)])]
        head = ["row", *metrics, f"{self.reference} is better by [95 %]"]
        lines = [head, ["---"] * len(head)]
        for record in records:
            cells = [record["row"] + (f" ({record['seeds']} seeds)" if record["seeds"] > 1 else "")]
            for metric in metrics:
                spread = record.get(f"{metric}_sd")
                value = f"{record[metric]:.0f}" if metric == "unparsed" else f"{record[metric]:.3f}"
                cells.append(value + (f" ± {spread:.3f}" if spread is not None else ""))
            gain = record.get("gain")
            cells.append("" if gain is None else f"{gain[0]:+.3f} [{gain[1]:+.3f}, {gain[2]:+.3f}]")
            lines.append(cells)
        lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        return "\n".join(
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
            for line in lines
        )

    def save(self, folder: str | os.PathLike, **settings: Any) -> None:
        """Write results.json, table.md, and each row's answers in the benchmark's own format. No history enters."""
        users = len({e.user for e in self.examples})
        results = {
            "task": self.task.name,
            "examples": len(self.examples),
            "users": users,
            "reference": self.reference,
            "rows": self.rows(),
            "settings": settings,
        }
        write(Path(folder) / "results.json", json.dumps(results, indent=2) + "\n")
        write(Path(folder) / "table.md", self.markdown() + "\n")
        used = set()
        for name, runs in self.predictions.items():
            for i, answers in enumerate(runs):
                golds = [{"id": e.id, "output": a} for e, a in zip(self.examples, answers, strict=True)]
                file = re.sub(r"[^\w.,=+-]+", "_", name.replace("'", "")) + ("" if len(runs) == 1 else f"-{i}")
                while file in used:  # two names that look alike as file names
                    file += "_"
                used.add(file)
                official = {"task": self.task.name.replace("-", "_"), "golds": golds}
                write(Path(folder) / "predictions" / f"{file}.json", json.dumps(official, indent=1) + "\n")


def write(path: Path, text: str) -> None:
    """Replace a text file as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        staging.write_text(text, encoding="utf-8")
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)
