"""Attention weights over all users: by the age of an item and by its rank among the weights.

A weight is given in units of the uniform weight of its history: w * N, so 1 is uniform. Numbers only, no text.

n examples, N items of one history.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..data.records import Example
from ..tasks.items import newest_first
from .user_statistics import bootstrap_mean


def weight_profile(weights: Sequence[Tensor], examples: Sequence[Example]) -> dict[str, object] | None:
    """Return mean weights, as JSON takes them.

    Args:
        weights: n vectors [N] that sum to 1.
        examples: whose histories they are of.

    Returns:
        `by_age` (1 is the newest item) and `by_rank` (1 is the heaviest): per range of places the number of examples and
        users that have such items, and `weight`, [mean, low, high] with the 95 % interval of a bootstrap over users;
        `effective_share`, likewise, exp(entropy) / N: the share of items that carry the weight, 1 if it is uniform.
        Histories of fewer than two items are left out; None if there are no others.
    """
    kept = [(w.cpu().double().numpy(), e) for w, e in zip(weights, examples, strict=True) if len(e.history) > 1]
    if not kept:
        return None
    by_age = [w[newest_first(e.history)] * len(w) for w, e in kept]
    by_rank = [np.sort(w)[::-1] * len(w) for w, _ in kept]
    users = [e.user for _, e in kept]
    shares = [math.exp(-float((w * np.log(np.maximum(w, 1e-300))).sum())) / len(w) for w, _ in kept]
    return {
        "by_age": _in_ranges(by_age, users),
        "by_rank": _in_ranges(by_rank, users),
        "effective_share": _interval(shares, users),
    }


def mean_profile(profiles: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    """Merge several seeds: means of means and of bounds. All are of the same examples."""

    def mean(parts: Sequence[Sequence[float | None]]) -> list[float | None]:
        return [None if None in values else float(np.mean(values)) for values in zip(*parts, strict=True)]

    merged = {
        name: [
            {**places[0], "weight": mean([place["weight"] for place in places])}
            for places in zip(*(profile[name] for profile in profiles), strict=True)
        ]
        for name in ("by_age", "by_rank")
    }
    return {**merged, "effective_share": mean([profile["effective_share"] for profile in profiles])}


def _in_ranges(rows: Sequence[NDArray[np.float64]], users: Sequence[str]) -> list[dict[str, object]]:
    """Return means over the places 1, 2, 3 to 4, 5 to 8, ...; first over the items of an example."""
    found, low, high = [], 1, 1
    longest = max(map(len, rows))
    while low <= longest:
        inside = [(row[low - 1 : high].mean(), user) for row, user in zip(rows, users, strict=True) if len(row) >= low]
        values, own = zip(*inside, strict=True)
        place = {"from": low, "to": min(high, longest), "examples": len(values), "users": len(set(own))}
        found.append({**place, "weight": _interval(values, own)})
        low, high = high + 1, 2 * high
    return found


def _interval(values: Sequence[float], users: Sequence[str]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in bootstrap_mean(values, users)]
