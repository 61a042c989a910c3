"""LaMP's official rules.

    accuracy  stripped answers must equal a label; anything else is wrong. F1 is the mean over all labels of the
              task, also those that nobody gave.
    mae       an answer is float(answer); anything else counts as the end of the scale farthest from the gold.
    rouge     F-measure of ROUGE-1 and ROUGE-L (rouge-score, no stemming), mean over examples. Its tokens are made
              of a-z and 0-9, so texts in other scripts score 0, as in the benchmark; `score` warns of it. The
              metric "rouge-unicode" (text_metrics.py) reads them.

The modules in `pplug_hf/metrics` offer `score_labels`, `score_ratings` and `score_texts` to the `evaluate` library.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from types import ModuleType
from typing import Protocol, Unpack, get_args

import numpy as np

from ..errors import ConfigurationError, MismatchError
from ..optional import require
from .metrics import METRICS as METRICS
from .metrics import Fallback, Judged, Metric, Options, Texts, register_metric


def score_labels(predictions: Texts, golds: Texts, labels: Texts = (), *, name: str = "this task") -> dict[str, float]:
    """Return accuracy, and F1 averaged over all labels.

    Args:
        predictions: One answer per question.
        golds: The right answers, in the same order.
        labels: All possible answers; without any, those among the golds.
        name: Of the task, for messages.

    Returns:
        "accuracy", "f1" and "unparsed", the number of answers that are not a label.

    Raises:
        MismatchError: Predictions and golds differ in number, there are none, or a gold is not a label.
    """
    predictions, golds = clean(predictions, golds)
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
    predictions: Texts, golds: Texts, labels: Texts, *, fallback: Fallback = "farthest", name: str = "this task"
) -> dict[str, float]:
    """Return the mean absolute error and the root of the mean squared error.

    Args:
        predictions: One answer per question.
        golds: The right answers, in the same order.
        labels: The scale, as numbers in text.
        fallback: As in `score`.
        name: Of the task, for messages.

    Returns:
        "mae", "rmse" and "unparsed", the number of answers that are not a finite number.

    Raises:
        MismatchError: Predictions and golds differ in number, there are none, or a gold is not a number.
        ConfigurationError: There is no such fallback, or a label is not a number.
    """
    predictions, golds = clean(predictions, golds)
    errors = _errors(predictions, golds, labels, fallback, name)
    return {
        "mae": float(errors.mean()),
        "rmse": math.hypot(*errors) / math.sqrt(len(errors)),  # squares of wild answers would overflow
        "unparsed": sum(_number(prediction) is None for prediction in predictions),
    }


def score_texts(predictions: Texts, golds: Texts) -> dict[str, float]:
    """Return ROUGE-1 and ROUGE-L, and warn of golds that its tokens cannot show.

    Args:
        predictions: One answer per question.
        golds: The right answers, in the same order.

    Returns:
        "rouge-1", "rouge-L" and "unparsed", the number of answers without a token: empty, or in another script.

    Raises:
        MismatchError: Predictions and golds differ in number, or there are none.
    """
    predictions, golds = clean(predictions, golds)
    rouge = Rouge()
    warn_notes(rouge, golds)
    return rouge.means(predictions, golds)


def warn_notes(metric: Metric, golds: Texts) -> None:
    """Warn of what a metric cannot judge; Python shows an equal warning once."""
    for note in metric.notes(golds):
        warnings.warn(note, stacklevel=3)


def clean(predictions: Texts, golds: Texts) -> tuple[list[str], list[str]]:
    """Return both without white space around them; a `MismatchError` if they differ in number or there are none."""
    if len(predictions) != len(golds) or not len(golds):
        raise MismatchError(
            f"There are {len(predictions)} predictions and {len(golds)} golds; give one answer per question."
        )
    return [str(text).strip() for text in predictions], [str(text).strip() for text in golds]


def _labels(labels: Texts, golds: Texts, name: str) -> Texts:
    labels = labels or sorted(set(golds))
    known = set(labels)
    if wrong := [place for place, gold in enumerate(golds) if gold not in known]:
        raise MismatchError(
            f"{len(wrong)} of {len(golds)} golds are not labels of {name} (first at place {wrong[0]}); its labels are "
            f"{', '.join(labels)}."
        )
    return labels


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None  # "nan" is an answer that nobody can judge


def _errors(predictions: Texts, golds: Texts, labels: Texts, fallback: str, name: str) -> np.ndarray:
    """Return the distances between ratings, [n]."""
    if fallback not in get_args(Fallback):
        raise ConfigurationError(f"fallback is {fallback!r}; choose one of {', '.join(get_args(Fallback))}.")
    scale = [number for number in map(_number, labels) if number is not None]
    if not scale or len(scale) < len(labels):
        raise ConfigurationError(f"The labels of {name} are {tuple(labels)}; a scale needs numbers, as in '1', '2'.")
    low, high = min(scale), max(scale)
    errors = []
    for place, (prediction, gold) in enumerate(zip(predictions, golds, strict=True)):
        right, given = _number(gold), _number(prediction)
        if right is None:
            raise MismatchError(
                f"The gold at place {place} of {name} is not a number; give one of {', '.join(labels)}."
            )
        if given is None and fallback == "farthest":
            given = low if right - low > high - right else high
        elif given is None:
            digit = re.search("[0-9]", prediction)
            given = float(digit.group()) if digit else low
        errors.append(abs(given - right))
    return np.array(errors)


class Tokenizer(Protocol):
    """Splitting of texts as rouge-score wants it."""

    def tokenize(self, text: str) -> list[str]: ...


def _rouge_scorer() -> ModuleType:
    return require("rouge_score.rouge_scorer", "eval", "ROUGE")


def rouge_scores(kind: str, predictions: Texts, golds: Texts, tokenizer: Tokenizer | None = None) -> np.ndarray:
    """Return ROUGE of each pair, [n]; its kind is "rouge1" or "rougeL"."""
    scorer = _rouge_scorer().RougeScorer([kind], use_stemmer=False, tokenizer=tokenizer)
    scores = [scorer.score(gold, prediction) for prediction, gold in zip(predictions, golds, strict=True)]
    return np.array([each[kind].fmeasure for each in scores])


class Accuracy(Metric):
    """Exact labels, and macro-F1."""

    name, main = "accuracy", "accuracy"
    titles = (("accuracy", "accuracy", "accuracy"), ("f1", "macro-F1", "f1"))
    is_free_text = False

    def summary(
        self, values: np.ndarray, predictions: Texts, golds: Texts, task: Judged, **options: Unpack[Options]
    ) -> dict[str, float]:
        return score_labels(predictions, golds, task.labels, name=task.name)

    def per_example(self, predictions: Texts, golds: Texts, task: Judged, **options: Unpack[Options]) -> np.ndarray:
        _labels(task.labels, golds, task.name)
        return np.array([p == gold for p, gold in zip(predictions, golds, strict=True)], dtype=np.float64)


class AbsoluteError(Metric):
    """Distances between ratings."""

    name, main = "mae", "mae"
    titles = (("mae", "MAE", "mae"), ("rmse", "RMSE", "rmse"))
    higher_is_better = is_free_text = False
    needs_numbers = True
    fallbacks = get_args(Fallback)

    def summary(
        self, values: np.ndarray, predictions: Texts, golds: Texts, task: Judged, **options: Unpack[Options]
    ) -> dict[str, float]:
        fallback = options.get("fallback", "farthest")
        return score_ratings(predictions, golds, task.labels, fallback=fallback, name=task.name)

    def per_example(self, predictions: Texts, golds: Texts, task: Judged, **options: Unpack[Options]) -> np.ndarray:
        return _errors(predictions, golds, task.labels, options.get("fallback", "farthest"), task.name)

    def best_labels(self, log_probs: np.ndarray, labels: Texts) -> np.ndarray:
        """Return the label with the lowest expected error: a median, often not the most likely label.

        Raises:
            MismatchError: a label is not a number.
        """
        try:
            values = np.array([float(label) for label in labels])
        except ValueError:
            raise MismatchError(
                f"The labels are {', '.join(labels)}; metric 'mae' needs numbers. Leave metric out for others."
            ) from None
        return (np.exp(log_probs) @ np.abs(values[:, None] - values)).argmin(axis=-1)  # [n, L] expected errors


class Rouge(Metric):
    """ROUGE-1 and ROUGE-L."""

    name, main = "rouge", "rouge-1"
    titles = (("rouge-1", "ROUGE-1", "rouge"), ("rouge-L", "ROUGE-L", "rouge"))
    tokenizer: Tokenizer | None = None  # rouge-score's own, which is the benchmark's

    def is_readable(self, text: str) -> bool:
        """Return true if a text has a token."""
        return re.search("[a-z0-9]", text.lower()) is not None

    def check(self) -> None:
        _rouge_scorer()

    def means(self, predictions: Texts, golds: Texts, values: np.ndarray | None = None) -> dict[str, float]:
        """Return both scores, and the number of answers without a token; `values` are ROUGE-1 of each if that is known."""
        if values is None:
            values = rouge_scores("rouge1", predictions, golds, self.tokenizer)
        longest = rouge_scores("rougeL", predictions, golds, self.tokenizer)
        means = {name: float(each.mean()) for (name, _, _), each in zip(self.titles, (values, longest), strict=True)}
        return means | {"unparsed": sum(not self.is_readable(text) for text in predictions)}

    def summary(
        self, values: np.ndarray, predictions: Texts, golds: Texts, task: Judged, **options: Unpack[Options]
    ) -> dict[str, float]:
        return self.means(predictions, golds, values)

    def per_example(self, predictions: Texts, golds: Texts, task: Judged, **options: Unpack[Options]) -> np.ndarray:
        return rouge_scores("rouge1", predictions, golds, self.tokenizer)

    def notes(self, golds: Texts) -> list[str]:
        blind = sum(not self.is_readable(gold) for gold in golds)
        if not blind:
            return []
        advice = "" if self.tokenizer else " For other scripts use a task with the metric 'rouge-unicode'."
        return [
            f"{blind} of {len(golds)} golds ({blind / len(golds):.1%}) have no token that "
            f"{' and '.join(name for name, _, _ in self.titles)} read: every answer to them has a 0 there.{advice}"
        ]


for _metric in (Accuracy(), AbsoluteError(), Rouge()):
    register_metric(_metric)
