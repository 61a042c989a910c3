"""95 % intervals that resample users.

Answers to one user's questions resemble each other, so examples are not independent draws, but users are.
Drawing examples instead would give intervals that are too narrow, above all if a few users ask many questions.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..errors import ConfigurationError, MismatchError

_DRAWS_AT_ONCE = 2_000_000  # bounds the memory, about 50 MB


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def bootstrap_mean(values: ArrayLike, users: Sequence[Hashable], n_resamples: int = 10_000, seed: int = 0) -> Interval:
    """Return the mean of some scores with its interval.

    Args:
        values: One score per example, [n].
        users: Whose example each one is, [n].
        n_resamples: How often as many users as there are get drawn, with replacement.
        seed: The same seed draws the same users.

    Returns:
        The mean over examples and the 2.5 % and 97.5 % percentiles of the resampled means. With a single
        user nothing is known about others: low and high are NaN.

    Raises:
        MismatchError: The lengths differ, there is no score, or one is not finite.
        ConfigurationError: `n_resamples` is less than 1.
    """
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or len(scores) != len(users) or not len(scores):
        raise MismatchError(
            f"There are scores of shape {scores.shape} and {len(users)} users; give one user per score, "
            "and at least one of them."
        )
    if not np.isfinite(scores).all():
        raise MismatchError(f"{(~np.isfinite(scores)).sum()} of {len(scores)} scores are NaN or infinite.")
    if n_resamples < 1:
        raise ConfigurationError(f"n_resamples is {n_resamples}; give at least 1, better 10000.")

    # Sorted, so that the order of the rows does not change what is drawn.
    number = {user: index for index, user in enumerate(sorted(set(users), key=str))}
    owner = np.array([number[user] for user in users])
    sums, counts = np.bincount(owner, weights=scores), np.bincount(owner)  # [U]: all that a resample needs
    mean = float(scores.mean())
    if len(number) == 1:
        return Interval(mean, float("nan"), float("nan"))

    rng = np.random.default_rng(seed)
    rows = max(1, _DRAWS_AT_ONCE // len(number))
    means = []
    for start in range(0, n_resamples, rows):
        drawn = rng.integers(len(number), size=(min(rows, n_resamples - start), len(number)))  # [rows, U]
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Interval(mean, float(low), float(high))


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, users: Sequence[Hashable], n_resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Return the mean difference of two systems on the same examples, with its interval.

    Args:
        a: Scores of one system, [n].
        b: Scores of the other on the same examples in the same order, [n].
        users: Whose example each one is, [n].
        n_resamples: As in `bootstrap_mean`.
        seed: As in `bootstrap_mean`.

    Returns:
        Mean and interval of `a - b`; an interval that excludes 0 is a difference.

    Raises:
        MismatchError: The lengths differ, there is no score, or one is not finite.
        ConfigurationError: `n_resamples` is less than 1.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise MismatchError(f"Scores of shapes {first.shape} and {second.shape} are not of the same examples.")
    return bootstrap_mean(first - second, users, n_resamples, seed)


def user_means(scores: np.ndarray, users: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Return each user's mean score, and their names, in order of first appearance; users without a score are left out."""
    per_user: dict[str, list[float]] = {}
    for score, user in zip(scores.tolist(), users, strict=True):
        if not np.isnan(score):
            per_user.setdefault(user, []).append(score)
    return np.array([np.mean(own) for own in per_user.values()]), list(per_user)
