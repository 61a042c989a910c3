"""Intervals over users: against a slow loop, known cases, and invariants."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pplug_hf.errors import ConfigurationError, MismatchError
from pplug_hf.evaluation import user_statistics
from pplug_hf.evaluation.user_statistics import Interval, bootstrap_mean, paired_bootstrap

rows = st.lists(st.tuples(st.floats(-5, 5), st.sampled_from("abcdef")), min_size=1, max_size=30)


def slow_bootstrap(values, users, n_resamples, seed):
    """The definition: draw users, take all their examples, average."""
    rng = random.Random(seed)
    names = sorted(set(users))
    by_user = {name: [v for v, u in zip(values, users, strict=True) if u == name] for name in names}
    means = []
    for _ in range(n_resamples):
        drawn = [value for _ in names for value in by_user[rng.choice(names)]]
        means.append(sum(drawn) / len(drawn))
    means.sort()
    return means[int(0.025 * n_resamples)], means[int(0.975 * n_resamples)]


def test_agrees_with_a_slow_loop():
    rng = np.random.default_rng(3)
    users = [f"u{n}" for n in rng.integers(0, 12, size=90) ** 2 // 12]  # users of very different sizes
    values = rng.normal(size=90) + np.array([int(user[1:]) for user in users])  # that differ from each other
    fast = bootstrap_mean(values, users, n_resamples=20_000)
    low, high = slow_bootstrap(list(values), users, 5_000, seed=1)
    width = high - low
    assert fast.mean == pytest.approx(values.mean())
    assert fast.low == pytest.approx(low, abs=0.06 * width)
    assert fast.high == pytest.approx(high, abs=0.06 * width)


def test_users_who_repeat_themselves_widen_the_interval():
    values = np.repeat([0.0, 1.0] * 10, 20)
    by_user = bootstrap_mean(values, np.repeat(np.arange(20), 20).tolist())
    by_example = bootstrap_mean(values, list(range(400)))
    assert by_user.high - by_user.low > 3 * (by_example.high - by_example.low)


def test_covers_the_truth_about_as_often_as_promised():
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(40), 5).tolist()
    hits = 0
    for trial in range(200):
        values = np.repeat(rng.normal(size=40), 5) + rng.normal(size=200)
        _, low, high = bootstrap_mean(values, users, n_resamples=400, seed=trial)
        hits += low <= 0 <= high
    assert 0.88 <= hits / 200 <= 0.99


@given(rows)
@settings(deadline=None, max_examples=50)
def test_interval_holds_between_the_users_means(pairs):
    values, users = map(list, zip(*pairs, strict=True))
    mean, low, high = bootstrap_mean(values, users, n_resamples=200)
    means = [np.mean([v for v, u in pairs if u == user]) for user in set(users)]
    assert mean == pytest.approx(np.mean(values), abs=1e-9)
    if len(means) == 1:
        assert math.isnan(low) and math.isnan(high)
    else:
        assert min(means) - 1e-9 <= low <= high <= max(means) + 1e-9


@given(rows, st.randoms())
@settings(deadline=None, max_examples=50)
def test_order_of_the_rows_does_not_matter(pairs, shuffler):
    shuffled = shuffler.sample(pairs, len(pairs))
    one, other = (bootstrap_mean(*map(list, zip(*each, strict=True)), n_resamples=100) for each in (pairs, shuffled))
    assert one == pytest.approx(other, abs=1e-9, nan_ok=True)


def test_paired_is_the_bootstrap_of_the_difference():
    rng = np.random.default_rng(0)
    a, b, users = rng.normal(size=50), rng.normal(size=50), rng.integers(0, 9, size=50).tolist()
    assert paired_bootstrap(a, b, users) == bootstrap_mean(a - b, users)
    there, back = paired_bootstrap(a, b, users), paired_bootstrap(b, a, users)
    assert there.mean == -back.mean
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))


def test_pairing_removes_what_both_share():
    rng = np.random.default_rng(0)
    hard = rng.normal(scale=10, size=100)
    interval = paired_bootstrap(hard + 1, hard, list(range(100)))
    assert interval == pytest.approx((1, 1, 1))


def test_equal_systems_differ_by_nothing():
    assert paired_bootstrap([1, 0, 1], [1, 0, 1], ["a", "b", "c"]) == Interval(0, 0, 0)


def test_seed_fixes_the_result():
    values, users = np.arange(30.0), [n // 3 for n in range(30)]
    assert bootstrap_mean(values, users, seed=1) == bootstrap_mean(values, users, seed=1)
    assert bootstrap_mean(values**2, users, 500, seed=1) != bootstrap_mean(values**2, users, 500, seed=2)


def test_memory_is_bounded_by_parts(monkeypatch):
    values, users = np.arange(30.0), [n // 3 for n in range(30)]
    whole = bootstrap_mean(values, users, 4_000)
    monkeypatch.setattr(user_statistics, "_DRAWS_AT_ONCE", 70)
    assert bootstrap_mean(values, users, 4_000) == pytest.approx(whole, rel=0.1)


def test_one_user_says_nothing_about_others():
    mean, low, high = bootstrap_mean([1, 0], ["a", "a"])
    assert mean == 0.5 and math.isnan(low) and math.isnan(high)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, float("nan")], [1.0, float("inf")], [[1.0], [2.0]]])
def test_bad_scores_are_refused(values):
    with pytest.raises(MismatchError):
        bootstrap_mean(values, ["a", "b"])


def test_mistakes_are_explained():
    with pytest.raises(MismatchError, match=r"\(2,\) and \(3,\)"):
        paired_bootstrap([1, 2], [1, 2, 3], ["a", "b"])
    with pytest.raises(MismatchError, match="at least one"):
        bootstrap_mean([], [])
    with pytest.raises(ConfigurationError, match="n_resamples is 0"):
        bootstrap_mean([1, 2], ["a", "b"], n_resamples=0)
