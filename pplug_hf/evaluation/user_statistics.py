"""Intervals, tests and means over users from paired scores; in some of the means each user counts once.

Answers to one user's questions resemble each other, so examples are not independent draws, but users are. Drawing
examples instead would give intervals that are too narrow, above all if a few users ask many questions. And a mean over
questions is what a service notices; a mean over users is what most of its users notice.

n examples, U users.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..errors import ConfigurationError, MismatchError

_DRAWS_AT_ONCE = 2_000_000  # bounds the memory, about 50 MB
EXACT = 20  # users of whom all assignments of signs are counted, about a million
POWER = 2.8  # 1.96 + 0.84: standard errors of a difference that a 5 % test finds in four of five studies


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
    sums, counts = _of_users(values, users)  # [U]: all that a resample needs
    if n_resamples < 1:
        raise ConfigurationError(f"n_resamples is {n_resamples}; give at least 1, better 10000.")
    mean, U = float(np.asarray(values, dtype=np.float64).mean()), len(sums)
    if U == 1:
        return Interval(mean, float("nan"), float("nan"))

    rng = np.random.default_rng(seed)
    rows = max(1, _DRAWS_AT_ONCE // U)
    means = []
    for start in range(0, n_resamples, rows):
        drawn = rng.integers(U, size=(min(rows, n_resamples - start), U))  # [rows, U]
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


def sign_test(values: ArrayLike) -> float:
    """Return the exact two-sided p-value of the sign test: are more users better off than worse off?

    Args:
        values: one difference per user, [U]; zeros (and what rounding leaves of them) are dropped.

    Returns:
        A number in (0, 1]; 1 if all are zero.
    """
    signs = np.sign(np.round(np.asarray(values, dtype=np.float64), 9))
    positive, negative = int((signs > 0).sum()), int((signs < 0).sum())
    n = positive + negative
    as_extreme, ways = 0, 1  # of choosing k of n users; exact, as Python's integers are
    for k in range(min(positive, negative) + 1):
        as_extreme += ways
        ways = ways * (n - k) // (k + 1)
    return min(1.0, 2 * as_extreme / 2**n)


def sign_flip(values: ArrayLike, users: Sequence[Hashable], n_flips: int = 10_000, seed: int = 0) -> float:
    """Return the two-sided p-value of a mean difference: if nothing differed, each user's could as well have the other sign.

    Args:
        values: differences of two systems, one per example, [n].
        users: whose example each one is, [n].
        n_flips: number of random assignments of signs. With 20 users or fewer, all assignments are counted instead.
        seed: of them.

    Returns:
        A number in (0, 1]; of random assignments at least 1 / (n_flips + 1).

    Raises:
        MismatchError: not one finite difference per user's example.
        ConfigurationError: `n_flips` is less than 1.
    """
    if n_flips < 1:
        raise ConfigurationError(f"n_flips is {n_flips}; give at least 1, better 10000.")
    sums, _ = _of_users(values, users)
    bound = abs(sums.sum()) - 1e-12 * np.abs(sums).sum()  # the same numbers in another order differ in their last bits
    if len(sums) <= EXACT:
        totals = np.zeros(1)
        for each in sums:
            totals = np.concatenate([totals + each, totals - each])
        return float(np.mean(np.abs(totals) >= bound))
    rng, extreme = np.random.default_rng(seed), 0
    for start in range(0, n_flips, 1000):
        signs = rng.choice([-1.0, 1.0], size=(min(1000, n_flips - start), len(sums)))
        extreme += int((np.abs(signs @ sums) >= bound).sum())
    return (extreme + 1) / (n_flips + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for being several, in their order (Holm's step-down procedure)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def smallest_difference(values: ArrayLike, users: Sequence[Hashable]) -> float:
    """Return the smallest mean difference that such users can show: 2.8 of its standard errors, with users as the draws.

    Arguments and errors as of `sign_flip`; NaN for a single user.
    """
    sums, counts = _of_users(values, users)
    if len(sums) == 1:
        return float("nan")
    residual: np.ndarray = sums - counts * sums.sum() / counts.sum()
    error = np.sqrt(len(sums) / (len(sums) - 1) * (residual**2).sum()) / counts.sum()
    return float(POWER * error)


def per_user(better: Mapping[str, np.ndarray], users: Sequence[str]) -> list[dict[str, object]]:
    """Compare the reference with each row, as JSON takes it.

    Args:
        better: row -> how much better the reference is on each example, [n] (mean over seeds).
        users: whose example each one is, n of them.

    Returns:
        Per row `gain`, the mean over users of their mean differences, with the 95 % interval of a bootstrap over
        users; `sign_test`, the exact p-value of the sign test over users; `p`, that of a permutation test (10,000
        random signs, all of them for 20 users or fewer); `p_holm`, that corrected for the number of rows; and
        `detectable`, the smallest difference that these users show in four of five cases. What a single user
        does not tell is null.
    """
    means = {row: user_means(values, users)[0] for row, values in better.items()}  # [U] each
    p_values = [sign_flip(values, range(len(values))) for values in means.values()]
    return [
        {
            "row": row,
            "gain": plain(bootstrap_mean(values, range(len(values)))),
            "sign_test": sign_test(values),
            "p": p,
            "p_holm": corrected,
            "detectable": plain([smallest_difference(values, range(len(values)))])[0],
        }
        for (row, values), p, corrected in zip(means.items(), p_values, holm(p_values), strict=True)
    ]


def pairs(scores: Mapping[str, np.ndarray], users: Sequence[str], seed: int) -> dict[str, dict[str, object]]:
    """Return each user's number of questions and mean score in every row, under a hash instead of a name.

    Args:
        scores: row -> main score of each example, [n] (mean over seeds).
        users: whose example each one is, n of them.
        seed: another seed, other hashes; who knows the seed and a name can find the user.
    """
    table = {row: dict(zip(*reversed(user_means(values, users)), strict=True)) for row, values in scores.items()}
    return {
        hashlib.sha256(f"{seed}{user}".encode("utf-8", "surrogatepass")).hexdigest()[:12]: {
            "questions": questions,
            "rows": {row: float(means[user]) for row, means in table.items()},
        }
        for user, questions in Counter(users).items()
    }


def plain(interval: Interval | Sequence[float]) -> list[float | None]:
    """Return numbers as a list; None for those that are not finite, because JSON has no NaN."""
    return [value if math.isfinite(value) else None for value in interval]


def _of_users(values: ArrayLike, users: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Return sum and number of the scores of each user, [U] each.

    Users are sorted, so that the order of the examples does not change what is drawn.
    """
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or len(scores) != len(users) or not len(scores):
        raise MismatchError(
            f"There are scores of shape {scores.shape} and {len(users)} users; give one user per score, "
            "and at least one of them."
        )
    if not np.isfinite(scores).all():
        raise MismatchError(f"{(~np.isfinite(scores)).sum()} of {len(scores)} scores are NaN or infinite.")
    number = {user: i for i, user in enumerate(sorted(set(users), key=str))}
    owner = np.array([number[user] for user in users])
    return np.bincount(owner, weights=scores), np.bincount(owner)
