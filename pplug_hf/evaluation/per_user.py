"""Differences of rows where each user counts once, however many questions that user asked.

A mean over questions is what a service notices; a mean over users is what most of its users notice. They differ where
a few users ask much.

n examples, U users.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .bootstrap import Interval, bootstrap_mean, user_means
from .significance import holm, sign_flip, sign_test, smallest_difference


def per_user(better: Mapping[str, np.ndarray], users: Sequence[str]) -> list[dict[str, Any]]:
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


def pairs(scores: Mapping[str, np.ndarray], users: Sequence[str], seed: int) -> dict[str, dict[str, Any]]:
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
