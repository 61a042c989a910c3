"""How answers are judged: LaMP's official rules.

accuracy  stripped answers must equal a label; anything else is wrong. F1 is the mean over all labels of the
          task, also those that nobody gave.
mae       an answer is `float(answer)`; no number counts as the end of the scale farthest from the gold.
rouge     F-measure of ROUGE-1 and ROUGE-L (rouge-score, no stemming), mean over examples. Its tokens are made
          of a-z and 0-9, so texts in other scripts score 0, as in the benchmark.
"""

import re
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from pplug_hf.configuration.tasks import Task, get_task
from pplug_hf.errors import ConfigurationError, MismatchError

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
    predictions, golds = _clean(predictions, golds)
    if task.metric == "accuracy":
        labels = _labels(task, golds)
        unparsed = sum(prediction not in labels for prediction in predictions)
        main = {
            "accuracy": float(per_example(task, predictions, golds).mean()),
            "f1": _macro_f1(labels, predictions, golds),
        }
    elif task.metric == "mae":
        unparsed = sum(_number(prediction) is None for prediction in predictions)
        errors = per_example(task, predictions, golds, fallback=fallback)
        main = {"mae": float(errors.mean()), "rmse": float(np.sqrt((errors**2).mean()))}
    else:
        unparsed = sum(not prediction for prediction in predictions)
        rouge_1, rouge_l = _rouge(predictions, golds).mean(axis=0)
        main = {"rouge-1": float(rouge_1), "rouge-L": float(rouge_l)}
    return {**main, "unparsed": float(unparsed)}


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
    pairs = list(zip(predictions, golds, strict=True))
    if task.metric == "accuracy":
        _labels(task, golds)
        return np.array([prediction == gold for prediction, gold in pairs], dtype=np.float64)
    if task.metric == "mae":
        return np.array([_error(task, prediction, gold, fallback) for prediction, gold in pairs])
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


def _labels(task: Task, golds: list[str]) -> tuple[str, ...]:
    labels = task.labels or tuple(sorted(set(golds)))
    wrong = sorted(set(golds) - set(labels))
    if wrong:
        raise MismatchError(f"Golds {wrong[:5]} are no labels of {task.name}; its labels are {', '.join(labels)}.")
    return labels


def _macro_f1(labels: Sequence[str], predictions: list[str], golds: list[str]) -> float:
    predicted, gold = np.array(predictions), np.array(golds)
    scores = []
    for label in labels:
        hits = ((predicted == label) & (gold == label)).sum()
        total = (predicted == label).sum() + (gold == label).sum()
        scores.append(2 * hits / total if total else 0.0)
    return float(np.mean(scores))


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if np.isfinite(number) else None  # "nan" is an answer that nobody can judge


def _error(task: Task, prediction: str, gold: str, fallback: Fallback) -> float:
    """The distance between two ratings."""
    if fallback not in get_args(Fallback):
        raise ConfigurationError(f"fallback is {fallback!r}; choose one of {', '.join(get_args(Fallback))}.")
    right = _number(gold)
    if right is None:
        raise MismatchError(f"The gold {gold!r} of {task.name} is no number; give one of {', '.join(task.labels)}.")
    scale = [float(label) for label in task.labels]
    low, high = min(scale), max(scale)
    given = _number(prediction)
    if given is None and fallback == "farthest":
        given = low if right - low > high - right else high
    elif given is None:
        digit = re.search("[0-9]", prediction)
        given = float(digit.group()) if digit else low
    return abs(given - right)


def _rouge(predictions: list[str], golds: list[str]) -> np.ndarray:
    """ROUGE-1 and ROUGE-L of each pair, [n, 2]."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("ROUGE needs rouge-score; install it with: pip install 'pplug-hf[eval]'") from error
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    scores = [scorer.score(gold, prediction) for prediction, gold in zip(predictions, golds, strict=True)]
    return np.array([[each["rouge1"].fmeasure, each["rougeL"].fmeasure] for each in scores])
