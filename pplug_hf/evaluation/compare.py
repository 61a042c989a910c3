"""Rows side by side: the same examples, backbone and decoding, with paired intervals over users."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..data.records import Example, some
from ..errors import DataError
from ..storage.files import write_text
from ..tasks.metrics import higher_is_better, main_metric, per_example, score
from ..tasks.task import Task
from .bootstrap import Interval, bootstrap_mean, paired_bootstrap
from .style import Style, own_texts, user_means

BINS = 4  # of history lengths, with about as many examples each


@dataclass
class Comparison:
    """Answers of several rows to the same examples.

    Args:
        task: what was asked.
        examples: with golds.
        reference: name of the row the others are compared with.
        predictions: row -> one answer per example. Several seeds of a row are several lists.
        full: also say for how many users the reference wins and loses, how sure the score itself is, and, for free
            text, how close answers are to their users' own style, which ROUGE does not see.

    Raises:
        DataError: an example has no gold.
    """

    task: Task
    examples: Sequence[Example]
    reference: str
    predictions: dict[str, list[list[str]]] = field(default_factory=dict)
    full: bool = False
    _judged: dict[tuple[str, ...], tuple[dict[str, float], np.ndarray]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _style: Any = field(default=None, init=False, repr=False, compare=False)  # a Style; False if there is none

    def __post_init__(self) -> None:
        if missing := [e.id for e in self.examples if not (e.target or "").strip()]:
            raise DataError(
                f"These questions have no answer to compare with: {some(missing)}. Take a split with answers, or leave "
                "them out."
            )

    def add(self, row: str, answers: list[str]) -> None:
        """One run (seed) of a row."""
        self.predictions.setdefault(row, []).append(answers)

    def rows(self) -> list[dict[str, Any]]:
        """One record per row, as JSON takes it.

        Its metrics (mean over seeds, and the standard deviation of the main one), and as `gain` how much better the
        reference row is, with the 95 % interval of a paired bootstrap over users of the mean over seeds; an interval
        of a single user is null. If `full` is asked for: `interval`, the same for the main metric itself; `users`, for
        how many of them the reference row is better (`win`), as good and worse; for free text `style`.
        """
        users = [e.user for e in self.examples]
        means, records = {}, []
        for name, runs in self.predictions.items():
            judged = [self._judge(answers) for answers in runs]
            means[name] = np.mean([each for _, each in judged], axis=0)
            record: dict[str, Any] = {"row": name, "seeds": len(runs)}
            for metric in judged[0][0]:
                values = [scores[metric] for scores, _ in judged]
                record[metric] = float(np.mean(values))
                if len(runs) > 1 and metric == main_metric(self.task):
                    record[f"{metric}_sd"] = float(np.std(values, ddof=1))
            if self.full:
                record["interval"] = _plain(bootstrap_mean(means[name], users))[1:]
                if (style := self._styles()) is not None:
                    mean = np.mean([style.score(answers, users) for answers in runs], axis=0)
                    record["style"] = _plain(bootstrap_mean(*user_means(mean, users)))
                    gaps = [style.gaps(answers, users) for answers in runs]
                    apart = {name: float(np.mean([gap[name] for gap in gaps])) for name in gaps[0]}
                    record["style_gaps"] = dict(sorted(apart.items(), key=lambda pair: -abs(pair[1]))[:5])
            records.append(record)
        sign = 1 if higher_is_better(self.task) else -1
        for record in records:
            if record["row"] != self.reference and self.reference in means:
                better = sign * (means[self.reference] - means[record["row"]])
                record["gain"] = _plain(paired_bootstrap(better, np.zeros(len(better)), users))
                if self.full:
                    # Of a user's answers; a rounding error of a mean over seeds is no win.
                    own = [round(value, 9) for value in user_means(better, users)[0].tolist()]
                    record["users"] = {
                        "win": sum(value > 0 for value in own),
                        "tie": sum(value == 0 for value in own),
                        "loss": sum(value < 0 for value in own),
                    }
        return records

    def by_history_length(self) -> list[dict[str, Any]]:
        """Each row's main metric where histories are short and where they are long: bins of about equal size."""
        lengths = np.array([len(e.history) for e in self.examples])
        edges = np.unique(np.quantile(lengths, np.linspace(0, 1, BINS + 1)[1:], method="higher"))
        bins, low = [], -1
        for high in edges.tolist():
            inside = (lengths > low) & (lengths <= high)
            rows = {
                name: float(np.mean([self._judge(answers)[1][inside].mean() for answers in runs]))
                for name, runs in self.predictions.items()
            }
            own = {e.user for e, chosen in zip(self.examples, inside, strict=True) if chosen}
            shortest = int(lengths[inside].min())
            bins.append({"from": shortest, "to": high, "examples": int(inside.sum()), "users": len(own), "rows": rows})
            low = high
        return bins

    def style_of_golds(self) -> list[float | None] | None:
        """What the users' real answers get as style, which is what can be reached; none for labels."""
        style = self._styles()
        if style is None:
            return None
        users = [e.user for e in self.examples]
        return _plain(bootstrap_mean(*user_means(style.score([str(e.target) for e in self.examples], users), users)))

    def markdown(self) -> str:
        """The table as people read it."""
        records = self.rows()
        first = self.examples[0]
        metrics = list(score(self.task, ["x"], [str(first.target)], extra=[first.extra]))
        styled = self.full and self._styles() is not None
        head = ["row", *metrics, *(["style [95 %]"] if styled else []), f"{self.reference} is better by [95 %]"]
        head += ["for users: better, equal, worse"] if self.full else []
        lines = [head, ["---"] * len(head)]
        for record in records:
            cells = [record["row"] + (f" ({record['seeds']} seeds)" if record["seeds"] > 1 else "")]
            for metric in metrics:
                spread = record.get(f"{metric}_sd")
                value = f"{record[metric]:.0f}" if metric == "unparsed" else f"{record[metric]:.3f}"
                cells.append(value + (f" ± {spread:.3f}" if spread is not None else ""))
            cells += [_cell(record["style"], "")] if styled else []
            cells.append("" if "gain" not in record else _cell(record["gain"], "+"))
            if self.full:
                users = record.get("users")
                cells.append("" if users is None else f"{users['win']}, {users['tie']}, {users['loss']}")
            lines.append(cells)
        lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        return "\n".join(
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
            for line in lines
        )

    def results(self) -> dict[str, Any]:
        """Everything there is to know, as JSON takes it; counts and means only."""
        results: dict[str, Any] = {
            "task": self.task.name,
            "examples": len(self.examples),
            "users": len({e.user for e in self.examples}),
            "reference": self.reference,
            "rows": self.rows(),
        }
        if self.full:
            results["by_history_length"] = self.by_history_length()
            results["style_of_golds"] = self.style_of_golds()
        return results

    def save(self, folder: str | os.PathLike, **settings: Any) -> None:
        """Write results.json, table.md, and each row's answers in the benchmark's own format. No history enters."""
        write_text(Path(folder) / "results.json", to_json({**self.results(), "settings": settings}))
        write_text(Path(folder) / "table.md", self.markdown() + "\n")
        used = set()
        for name, runs in self.predictions.items():
            for i, answers in enumerate(runs):
                file = re.sub(r"[^\w.,=+@-]+", "_", name.replace("'", "")) + ("" if len(runs) == 1 else f"-{i}")
                while file in used:  # two names that look alike as file names
                    file += "_"
                used.add(file)
                write_text(Path(folder) / "predictions" / f"{file}.json", self.official(answers))

    def official(self, answers: Sequence[str], **more: Any) -> str:
        """A predictions file in the benchmark's format; `more` are further keys, which its scorers do not look at."""
        golds = [{"id": e.id, "output": a} for e, a in zip(self.examples, answers, strict=True)]
        return to_json({"task": self.task.name.replace("-", "_"), "golds": golds, **more}, indent=1)

    def _judge(self, answers: list[str]) -> tuple[dict[str, float], np.ndarray]:
        """All metrics of a run, and the main one of each of its examples; worked out once, because ROUGE is slow."""
        key = tuple(answers)
        if key not in self._judged:
            golds = [str(e.target) for e in self.examples]
            extra = [e.extra for e in self.examples]
            scores = score(self.task, answers, golds, extra=extra)
            self._judged[key] = scores, per_example(self.task, answers, golds, extra=extra)
        return self._judged[key]

    def _styles(self) -> Style | None:
        if self._style is None:
            self._style = False
            if self.task.is_free_text:
                with contextlib.suppress(DataError):  # too few users or texts: no style to compare with
                    self._style = Style.fit(own_texts(self.examples, self.task))
        return self._style or None


def to_json(value: Any, indent: int = 2) -> str:
    """JSON that every reader takes: no NaN."""
    return json.dumps(value, indent=indent, allow_nan=False) + "\n"


def _plain(interval: Interval) -> list[float | None]:
    """[mean, low, high]; null where nothing is known, for JSON has no NaN."""
    return [value if math.isfinite(value) else None for value in interval]


def _cell(interval: Sequence[float | None], sign: str) -> str:
    mean, *bounds = (f"{value:{sign}.3f}" if value is not None else "?" for value in interval)
    return f"{mean} [{', '.join(bounds)}]"
