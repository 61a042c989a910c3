"""How answers are judged: LaMP's official rules.

    accuracy  stripped answers must equal a label; anything else is wrong. F1 is the mean over all labels of the
              task, also those that nobody gave.
    mae       an answer is float(answer); no number counts as the end of the scale farthest from the gold.
    rouge     F-measure of ROUGE-1 and ROUGE-L (rouge-score, no stemming), mean over examples. Its tokens are made
              of a-z and 0-9, so texts in other scripts score 0, as in the benchmark.

`score` knows the tasks; `score_labels`, `score_ratings` and `score_texts` are the rules themselves, which the modules
in `pplug_hf/metrics` offer to the `evaluate` library.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from ..errors import ConfigurationError, MismatchError
from ..optional import require
from .task import Task, get_task

Fallback = Literal["farthest", "first-digit"]


def score(
    task: Task | str, predictions: Sequence[str], golds: Sequence[str], *, fallback: Fallback = "farthest"
) -> dict[str, float]:
    """Judges the answers to a set of questions.

    Args:
        task: Their task.
        predictions: One answer per question.
        golds: The right answers, in the same order.
        fallback: For ratings that are no number: "farthest" is LaMP's rule; "first-digit" is the one of the
            paper's authors, the first digit in the answer, else the low end of the scale.

    Returns:
        "accuracy" and "f1", "mae" and "rmse", or "rouge-1" and "rouge-L"; and "unparsed", the number of
        answers that are no label, no number, or empty.

    Raises:
        MismatchError: Predictions and golds differ in number, there are none, or a gold is impossible.
        ConfigurationError: There is no such task or fallback.
    """
    task = get_task(task)
    if task.metric == "accuracy":
        return score_labels(predictions, golds, task.labels, name=task.name)
    if task.metric == "mae":
        return score_ratings(predictions, golds, task.labels, fallback=fallback, name=task.name)
    return score_texts(predictions, golds)


def score_labels(
    predictions: Sequence[str], golds: Sequence[str], labels: Sequence[str] = (), *, name: str = "this task"
) -> dict[str, float]:
    """Accuracy, and F1 averaged over all labels.

    Args:
        predictions: One answer per question.
        golds: The right answers, in the same order.
        labels: All possible answers; without any, those among the golds.
        name: Of the task, for messages.

    Returns:
        "accuracy", "f1" and "unparsed", the number of answers that are no label.

    Raises:
        MismatchError: Predictions and golds differ in number, there are none, or a gold is no label.
    """
    predictions, golds = _clean(predictions, golds)
    labels = _labels(labels, golds, name)
    given, right = Counter(predictions), Counter(golds)
    hits = Counter(gold for prediction, gold in zip(predictions, golds, strict=True) if prediction == gold)
    totals = {label: given[label] + right[label] for label in labels}
    return {
        "accuracy": sum(hits.values()) / len(golds),
        "f1": float(np.mean([2 * hits[label] / total if total else 0.0 for label, total in totals.items()])),
        "unparsed": len(predictions) - sum(given[label] for label in totals),
    }


def score_ratings(
    predictions: Sequence[str],
    golds: Sequence[str],
    labels: Sequence[str],
    *,
    fallback: Fallback = "farthest",
    name: str = "this task",
) -> dict[str, float]:
    """Mean absolute error and root of the mean squared error.

    Args:
        predictions: One answer per question.
        golds: The right answers, in the same order.
        labels: The scale, as numbers in text.
        fallback: As in `score`.
        name: Of the task, for messages.

    Returns:
        "mae", "rmse" and "unparsed", the number of answers that are no finite number.

    Raises:
        MismatchError: Predictions and golds differ in number, there are none, or a gold is no number.
        ConfigurationError: There is no such fallback, or a label is no number.
    """
    predictions, golds = _clean(predictions, golds)
    errors = _errors(predictions, golds, labels, fallback, name)
    return {
        "mae": float(errors.mean()),
        "rmse": math.hypot(*errors) / math.sqrt(len(errors)),  # squares of wild answers would overflow
        "unparsed": sum(_number(prediction) is None for prediction in predictions),
    }


def score_texts(predictions: Sequence[str], golds: Sequence[str]) -> dict[str, float]:
    """ROUGE-1 and ROUGE-L.

    Args:
        predictions: One answer per question.
        golds: The right answers, in the same order.

    Returns:
        "rouge-1", "rouge-L" and "unparsed", the number of empty answers.

    Raises:
        MismatchError: Predictions and golds differ in number, or there are none.
    """
    predictions, golds = _clean(predictions, golds)
    rouge_1, rouge_l = _rouge(predictions, golds).mean(axis=0)
    unparsed = sum(not prediction for prediction in predictions)
    return {"rouge-1": float(rouge_1), "rouge-L": float(rouge_l), "unparsed": unparsed}


def per_example(
    task: Task | str, predictions: Sequence[str], golds: Sequence[str], *, fallback: Fallback = "farthest"
) -> np.ndarray:
    """The main score of each answer, for a bootstrap.

    Args:
        task: Their task.
        predictions: One answer per question.
        golds: The right answers, in the same order.
        fallback: As in `score`.

    Returns:
        Correctness (0 or 1), absolute error, or ROUGE-1, [n]. Its mean is `score(...)[main_metric(task)]`.

    Raises:
        MismatchError: Predictions and golds differ in number, there are none, or a gold is impossible.
        ConfigurationError: There is no such task or fallback.
    """
    task = get_task(task)
    predictions, golds = _clean(predictions, golds)
    if task.metric == "accuracy":
        _labels(task.labels, golds, task.name)
        pairs = zip(predictions, golds, strict=True)
        return np.array([prediction == gold for prediction, gold in pairs], dtype=np.float64)
    if task.metric == "mae":
        return _errors(predictions, golds, task.labels, fallback, task.name)
    return _rouge(predictions, golds)[:, 0]


def main_metric(task: Task | str) -> str:
    """The score of a task that decides: "accuracy", "mae" or "rouge-1"."""
    return {"accuracy": "accuracy", "mae": "mae", "rouge": "rouge-1"}[get_task(task).metric]


def higher_is_better(task: Task | str) -> bool:
    """Whether more of `main_metric` is better: true but for errors."""
    return get_task(task).metric != "mae"


def _clean(predictions: Sequence[str], golds: Sequence[str]) -> tuple[list[str], list[str]]:
    if len(predictions) != len(golds) or not len(golds):
        raise MismatchError(
            f"There are {len(predictions)} predictions and {len(golds)} golds; give one answer per question."
        )
    return [str(text).strip() for text in predictions], [str(text).strip() for text in golds]


def _labels(labels: Sequence[str], golds: list[str], name: str) -> Sequence[str]:
    labels = labels or sorted(set(golds))
    wrong = sorted(set(golds) - set(labels))
    if wrong:
        shown = [text[:60] for text in wrong[:5]]
        raise MismatchError(f"Golds {shown} are no labels of {name}; its labels are {', '.join(labels)}.")
    return labels


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None  # "nan" is an answer that nobody can judge


def _errors(
    predictions: list[str], golds: list[str], labels: Sequence[str], fallback: Fallback, name: str
) -> np.ndarray:
    """The distances between ratings, [n]."""
    if fallback not in get_args(Fallback):
        raise ConfigurationError(f"fallback is {fallback!r}; choose one of {', '.join(get_args(Fallback))}.")
    scale = [number for number in map(_number, labels) if number is not None]
    if not scale or len(scale) < len(labels):
        raise ConfigurationError(f"The labels of {name} are {tuple(labels)}; a scale needs numbers, as in '1', '2'.")
    low, high = min(scale), max(scale)
    errors = []
    for prediction, gold in zip(predictions, golds, strict=True):
        right, given = _number(gold), _number(prediction)
        if right is None:
            raise MismatchError(f"The gold {gold[:60]!r} of {name} is no number; give one of {', '.join(labels)}.")
        if given is None and fallback == "farthest":
            given = low if right - low > high - right else high
        elif given is None:
            digit = re.search("[0-9]", prediction)
            given = float(digit.group()) if digit else low
        errors.append(abs(given - right))
    return np.array(errors)


def _rouge(predictions: list[str], golds: list[str]) -> np.ndarray:
    """ROUGE-1 and ROUGE-L of each pair, [n, 2]."""
    scorer = require("rouge_score.rouge_scorer", "eval", "ROUGE").RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    scores = [scorer.score(gold, prediction) for prediction, gold in zip(predictions, golds, strict=True)]
    return np.array([[each["rouge1"].fmeasure, each["rougeL"].fmeasure] for each in scores])
