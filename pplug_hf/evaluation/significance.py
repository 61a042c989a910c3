"""Tests over users: sign and permutation tests, their correction for several comparisons, and what data can show at all.

n scores, U users.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import ConfigurationError, MismatchError

EXACT = 20  # users of whom all assignments of signs are counted, about a million
POWER = 2.8  # 1.96 + 0.84: standard errors of a difference that a 5 % test finds in four of five studies


def _of_users(values: ArrayLike, users: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Return sum and number of the scores of each user, [U] each."""
    scores = np.asarray(values, dtype=np.float64)
    if scores.shape != (len(users),) or not len(users) or not np.isfinite(scores).all():
        raise MismatchError(f"Give one finite score per user's example: {scores.shape} scores, {len(users)} users.")
    number = {user: i for i, user in enumerate(sorted(set(users), key=str))}
    owner = np.array([number[user] for user in users])
    return np.bincount(owner, weights=scores), np.bincount(owner)


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
    as_extreme = sum(math.comb(n, k) for k in range(min(positive, negative) + 1))
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
    residual: Any = sums - counts * sums.sum() / counts.sum()
    error = np.sqrt(len(sums) / (len(sums) - 1) * (residual**2).sum()) / counts.sum()
    return float(POWER * error)
