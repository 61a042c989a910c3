"""Numbers of rows side by side: the same examples, backbone and decoding, with paired intervals over users."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..data.records import Example, some
from ..errors import DataError
from ..storage.files import write_text
from ..tasks.metrics import get_metric
from ..tasks.task import Task, higher_is_better, main_metric, score_each
from .style import Style, own_texts
from .user_statistics import bootstrap_mean, paired_bootstrap, pairs, per_user, plain, user_means

RESULTS = "results.json"
BINS = 4  # of history lengths, with about as many examples each


@dataclass
class Comparison:
    """Answers of several rows to the same examples.

    Args:
        task: what was asked.
        examples: with golds.
        reference: name of the row the others are compared with.
        predictions: row -> one answer per example. Several seeds of a row are several lists.
        full: also say for how many users the reference wins and loses, how sure the score itself is, what the
            difference is if each user counts once, and, for free text, how close answers are to their users' own
            style, which ROUGE does not see.
        trained_users: users of the train split, whom training may have seen; their scores are told apart from those of
            new users.

    Raises:
        DataError: an example has no gold.
    """

    task: Task
    examples: Sequence[Example]
    reference: str
    predictions: dict[str, list[list[str]]] = field(default_factory=dict)
    full: bool = False
    trained_users: Collection[str] = ()

    def __post_init__(self) -> None:
        self._judged: dict[tuple[str, ...], tuple[dict[str, float], np.ndarray]] = {}
        self.derived: set[str] = set()  # rows that are chosen from others with the right answers at hand
        judge = get_metric(self.task.metric)
        judge.check()
        if judge.needs_golds and (missing := [e.id for e in self.examples if not (e.target or "").strip()]):
            raise DataError(
                f"These questions have no answer to compare with: {some(missing)}. Take a split with answers, or leave "
                "them out."
            )

    def add(self, row: str, answers: list[str]) -> None:
        """Add one run (seed) of a row.

        Args:
            row: name of the row.
            answers: one per example.
        """
        self.predictions.setdefault(row, []).append(answers)

    def rows(self) -> list[dict[str, Any]]:
        """Return one record per row, as JSON takes it.

        Its metrics (mean over seeds, and the standard deviation of the main one), and as `gain` how much better the
        reference row is, with the 95 % interval of a paired bootstrap over users of the mean over seeds; an interval
        of a single user is null. If `full` is asked for: `interval`, the same for the main metric itself; `users`, for
        how many of them the reference row is better (`win`), as good and worse; for free text `style`. `bound` marks a
        row of `pools.py`.
        """
        users, means, records = self._users, self.scores(), []
        for name, runs in self.predictions.items():
            judged = [self.judge(answers) for answers in runs]
            record: dict[str, Any] = {"row": name, "seeds": len(runs)} | (
                {"bound": True} if name in self.derived else {}
            )
            for metric in judged[0][0]:
                values = [scores[metric] for scores, _ in judged]
                record[metric] = float(np.mean(values))
                if len(runs) > 1 and metric == main_metric(self.task):
                    record[f"{metric}_sd"] = float(np.std(values, ddof=1))
            if self.full:
                record["interval"] = plain(bootstrap_mean(means[name], users))[1:]
                if (style := self._style) is not None:
                    mean = np.mean([style.score(answers, users) for answers in runs], axis=0)
                    record["style"] = plain(bootstrap_mean(*user_means(mean, users)))
                    gaps = [style.gaps(answers, users) for answers in runs]
                    apart = {name: float(np.mean([gap[name] for gap in gaps])) for name in gaps[0]}
                    record["style_gaps"] = dict(sorted(apart.items(), key=lambda pair: -abs(pair[1]))[:5])
            records.append(record)
        gains = self._gains()
        for record in records:
            if (better := gains.get(record["row"])) is not None:
                record["gain"] = plain(paired_bootstrap(better, np.zeros(len(better)), users))
                if self.full:
                    # Per user; a rounding error in a mean over seeds must not count as a win.
                    signs = np.sign(user_means(better, users)[0].round(9)).tolist()
                    record["users"] = {"win": signs.count(1), "tie": signs.count(0), "loss": signs.count(-1)}
        return records

    def scores(self) -> dict[str, np.ndarray]:
        """Return row -> the main score of each example, [n]; the mean over seeds."""
        return {
            name: np.mean([self.judge(answers)[1] for answers in runs], axis=0)
            for name, runs in self.predictions.items()
        }

    def _gains(self) -> dict[str, np.ndarray]:
        """Return row -> how much better the reference is on each example, [n]; nothing without the reference."""
        scores, sign = self.scores(), 1 if higher_is_better(self.task) else -1
        others = [name for name in scores if name != self.reference and self.reference in scores]
        return {name: sign * (scores[self.reference] - scores[name]) for name in others}

    def per_user(self) -> list[dict[str, object]]:
        """Return the differences between the reference and each row where each user counts once; see `user_statistics.py`."""
        gains = {row: better for row, better in self._gains().items() if row not in self.derived}
        return per_user(gains, self._users)

    def by_training(self) -> list[dict[str, object]]:
        """Return each row's main metric for users of the train split and for new users; nothing if all are one kind."""
        known = set(self.trained_users)
        seen = np.array([e.named and e.user in known for e in self.examples])
        if seen.all() or not seen.any():
            return []
        return [{"seen": bool(kind), **self._part(seen == kind)} for kind in (True, False)]

    def pairs(self, seed: int) -> dict[str, dict[str, object]]:
        """Return the number of questions and the mean scores of every user, by a hash of seed and name.

        Args:
            seed: of the hashes, without which a name could be looked up.
        """
        return pairs(self.scores(), self._users, seed)

    def by_history_length(self) -> list[dict[str, object]]:
        """Return each row's main metric where histories are short and where they are long: bins of about equal size."""
        lengths = np.array([len(e.history) for e in self.examples])
        edges = np.unique(np.quantile(lengths, np.linspace(0, 1, BINS + 1)[1:], method="higher"))
        bins, low = [], -1
        for high in edges.tolist():
            inside = (lengths > low) & (lengths <= high)
            bins.append({"from": int(lengths[inside].min()), "to": high, **self._part(inside)})
            low = high
        return bins

    def _part(self, inside: np.ndarray) -> dict[str, object]:
        """Return the size of a part of the examples, a mask [n], and each row's main metric in it."""
        rows = {
            name: float(np.mean([self.judge(answers)[1][inside].mean() for answers in runs]))
            for name, runs in self.predictions.items()
        }
        own = {user for user, chosen in zip(self._users, inside, strict=True) if chosen}
        return {"examples": int(inside.sum()), "users": len(own), "rows": rows}

    def style_of_golds(self) -> list[float | None] | None:
        """Return the style score of the users' real answers, which is what can be reached; None for labels."""
        if (style := self._style) is None:
            return None
        return plain(bootstrap_mean(*user_means(style.score(self._golds, self._users), self._users)))

    def results(self) -> dict[str, object]:
        """Return all numbers, as JSON takes them; counts and means only."""
        results: dict[str, object] = {
            "task": self.task.name,
            "examples": len(self.examples),
            "users": len(set(self._users)),
            "reference": self.reference,
            "rows": self.rows(),
        }
        if notes := get_metric(self.task.metric).notes(self._golds):
            results["notes"] = notes
        if self.full:
            results["per_user"] = {"rows": self.per_user(), "groups": self.by_training()}
            results["by_history_length"] = self.by_history_length()
            results["style_of_golds"] = self.style_of_golds()
        return results

    def judge(self, answers: list[str]) -> tuple[dict[str, float], np.ndarray]:
        """Return all metrics of a run, and the main one of each of its examples, [n]; once, because judging may be slow.

        Args:
            answers: n of them, in the order of the examples.
        """
        key = tuple(answers)
        if key not in self._judged:
            extra = [e.extra for e in self.examples]
            self._judged[key] = score_each(self.task, answers, self._golds, extra=extra)
        return self._judged[key]

    @property
    def _users(self) -> list[str]:
        return [e.user for e in self.examples]

    @cached_property
    def _golds(self) -> list[str]:
        return [e.target or "" for e in self.examples]

    @cached_property
    def _style(self) -> Style | None:
        """The users' styles; None for labels, and where users or texts are too few."""
        if self.task.is_free_text and get_metric(self.task.metric).needs_golds:
            with contextlib.suppress(DataError):
                return Style.fit(own_texts(self.examples, self.task))
        return None


def to_json(value: object, indent: int = 2) -> str:
    """Return JSON that every reader takes: no NaN."""
    return json.dumps(value, indent=indent, allow_nan=False) + "\n"


def save_results(results: Mapping[str, Any], table: str, folder: str | os.PathLike) -> None:
    """Write results.json and table.md. No history enters."""
    write_text(Path(folder) / RESULTS, to_json(results))
    write_text(Path(folder) / "table.md", table)
