"""A metric: how the answers to a task are judged. A metric of your own is one class.

class Length(Metric):
    name, main, titles = "length", "words", (("words", "words", ""),)

    def per_example(self, predictions, golds, task):
        return np.array([len(text.split()) for text in predictions], dtype=np.float64)

register_metric(Length())
task = Task(metric="length", ...)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, TypeAlias, TypedDict, Unpack

import numpy as np

from ..errors import ConfigurationError

Texts: TypeAlias = Sequence[str]
Fallback = Literal["farthest", "first-digit"]


class Judged(Protocol):
    """Part of a task that a metric reads."""

    @property
    def name(self) -> str: ...

    @property
    def labels(self) -> tuple[str, ...]: ...


class Options(TypedDict, total=False):
    """Options of a metric besides answers, golds and their task; see `Metric`."""

    fallback: Fallback
    extra: Sequence[Mapping[str, object]]


class Metric(ABC):
    """One way to judge answers. What a subclass declares:

    Attributes:
        name: what a task calls it.
        main: name of the score that decides, the mean of `per_example`.
        titles: for each of its scores its name, a title for tables, and the metric's id on the Hub ("" for none).
        higher_is_better: the direction of its scores.
        is_free_text: answers are texts, not labels; style and shared questions matter only for texts.
        needs_numbers: the labels of a task must be numbers.
        fallbacks: rules for answers that cannot be read; its methods take one as `fallback`.
        fields: further fields of a row that it reads; its methods take them as `extra`.
        needs_golds: a question must have a right answer.
    """

    name: str
    main: str
    titles: tuple[tuple[str, str, str], ...]
    higher_is_better = True
    is_free_text = True
    needs_numbers = False
    fallbacks: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    needs_golds = True

    def check(self) -> None:  # noqa: B027 - most can always judge
        """Raise a `ConfigurationError` if it cannot judge, before anything is answered."""

    @abstractmethod
    def per_example(self, predictions: Texts, golds: Texts, task: Judged, **options: Unpack[Options]) -> np.ndarray:
        """Return the main score of each answer.

        Args:
            predictions: n answers, without white space around them.
            golds: the n right answers.
            task: their task.
            **options: `fallback` if there are `fallbacks`; `extra`, n mappings with the `fields` that a row has, if
                there are `fields`.

        Returns:
            [n] in fp64.
        """

    def score(self, predictions: Texts, golds: Texts, task: Judged, **options: Unpack[Options]) -> dict[str, float]:
        """Return all scores of a set of answers, and `unparsed`, how many could not be read.

        Args:
            predictions, golds, task: as of `per_example`.
            **options: likewise.
        """
        values = self.per_example(predictions, golds, task, **options)
        return self.summary(values, predictions, golds, task, **options)

    def summary(
        self, values: np.ndarray, predictions: Texts, golds: Texts, task: Judged, **options: Unpack[Options]
    ) -> dict[str, float]:
        """Return what `score` returns, where the answers are judged already; a metric with more scores than one defines it.

        Args:
            values: of `per_example`, [n].
            predictions, golds, task: as of `per_example`.
            **options: likewise.
        """
        return {self.main: float(values.mean()), "unparsed": sum(not text for text in predictions)}

    def score_each(
        self, predictions: Texts, golds: Texts, task: Judged, **options: Unpack[Options]
    ) -> tuple[dict[str, float], np.ndarray]:
        """Return what `score` and what `per_example` return, and judge each answer once.

        Args:
            predictions, golds, task: as of `per_example`.
            **options: likewise.
        """
        values = self.per_example(predictions, golds, task, **options)
        if type(self).score is not Metric.score:  # of its own, which need not agree with `summary`
            return self.score(predictions, golds, task, **options), values
        return self.summary(values, predictions, golds, task, **options), values

    def notes(self, golds: Texts) -> list[str]:
        """Return sentences about what it cannot judge; `score` warns with them, and results have them.

        Args:
            golds: the right answers.
        """
        return []

    def best_labels(self, log_probs: np.ndarray, labels: Texts) -> np.ndarray:
        """Return the label with the best expected score: the most likely one, unless a metric knows better.

        Args:
            log_probs: [n, L] of the labels.
            labels: L labels.

        Returns:
            [n] positions in `labels`; of equally good ones the first.
        """
        return log_probs.argmax(axis=-1)


METRICS: dict[str, Metric] = {}


def register_metric(metric: Metric, exist_ok: bool = False) -> None:
    """Make a metric known by its name.

    Args:
        metric: an instance of its class.
        exist_ok: replace a metric of that name.

    Raises:
        ConfigurationError: the name is taken, unless `exist_ok` says to replace it.
    """
    if metric.name in METRICS and not exist_ok:
        raise ConfigurationError(f"There is a metric {metric.name!r} already: pass exist_ok=True to replace it.")
    METRICS[metric.name] = metric


def get_metric(name: str) -> Metric:
    """Return the metric of that name.

    Raises:
        ConfigurationError: no metric of that name is registered.
    """
    if name not in METRICS:
        raise ConfigurationError(
            f"There is no metric {name!r}; choose one of {', '.join(METRICS)}, or register_metric one of your own."
        )
    return METRICS[name]


def score_titles() -> dict[str, tuple[str, str, bool]]:
    """Return (title, metric id on the Hub or "", higher is better) of every score of every metric, main ones first."""
    metrics = METRICS.values()
    return {name: (title, hub_id, m.higher_is_better) for m in metrics for name, title, hub_id in m.titles}
