"""Scores of a task's answers, by the metric that the task names. The rules of LaMP are in `lamp_metrics.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from ..errors import ConfigurationError
from .lamp_metrics import Fallback, clean, warn_notes
from .metric import METRICS, Texts, get_metric
from .task import Task, get_task

Extra: TypeAlias = Sequence[Mapping[str, Any]] | None


def score(
    task: Task | str, predictions: Texts, golds: Texts, *, fallback: Fallback = "farthest", extra: Extra = None
) -> dict[str, float]:
    """Return all scores of the answers to a set of questions.

    Args:
        task: their task.
        predictions: one answer per question.
        golds: the right answers, in the same order.
        fallback: for ratings that are not a number: "farthest" is LaMP's rule; "first-digit" is the one of the
            paper's authors, the first digit in the answer, else the low end of the scale.
        extra: `Example.extra` of each question, for a metric that reads further fields of a row.

    Returns:
        For LaMP "accuracy" and "f1", "mae" and "rmse", or "rouge-1" and "rouge-L"; and "unparsed", the number of
        answers that are not a label, not a number, or have no word that the metric reads.

    Raises:
        MismatchError: predictions and golds differ in number, there are none, or a gold is impossible.
        ConfigurationError: no such task or fallback, or the metric needs `extra`.
    """
    return _judge("score", task, predictions, golds, fallback, extra)


def per_example(
    task: Task | str, predictions: Texts, golds: Texts, *, fallback: Fallback = "farthest", extra: Extra = None
) -> np.ndarray:
    """Return the main score of each answer, for a bootstrap. Arguments and errors as in `score`.

    Returns:
        For LaMP correctness (0 or 1), absolute error, or ROUGE-1, [n]. Its mean is `score(...)[main_metric(task)]`.
    """
    return _judge("per_example", task, predictions, golds, fallback, extra)


def main_metric(task: Task | str) -> str:
    """Return the name of the score that decides: for LaMP "accuracy", "mae" or "rouge-1"."""
    return get_metric(get_task(task).metric).main


def higher_is_better(task: Task | str) -> bool:
    """Return true unless the task is judged by errors."""
    return get_metric(get_task(task).metric).higher_is_better


def score_titles() -> dict[str, tuple[str, str, bool]]:
    """Return (title, metric id on the Hub or "", higher is better) of every score of every metric, main ones first."""
    metrics = METRICS.values()
    return {name: (title, hub_id, m.higher_is_better) for m in metrics for name, title, hub_id in m.titles}


def _judge(method: str, task: Task | str, predictions: Texts, golds: Texts, fallback: str, extra: Extra) -> Any:
    task = get_task(task)
    metric = get_metric(task.metric)
    options: dict[str, Any] = {"fallback": fallback} if metric.fallbacks else {}
    if metric.fields:
        if extra is None:
            raise ConfigurationError(
                f"The metric {metric.name!r} needs the fields {', '.join(metric.fields)} of the rows, and answers alone "
                "do not have them: use `pplug-hf bench`, or pass extra."
            )
        options["extra"] = extra
    predictions, golds = clean(predictions, golds)
    golds = [task.label_of(gold) for gold in golds]
    if method == "score":
        warn_notes(metric, golds)
    return getattr(metric, method)(predictions, golds, task, **options)
