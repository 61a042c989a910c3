"""Permutation tests over users, their correction, and the smallest difference that can be shown."""

import itertools
import math

import numpy as np
import pytest

from pplug_hf.errors import ConfigurationError, MismatchError
from pplug_hf.evaluation.user_statistics import bootstrap_mean, holm, sign_flip, smallest_difference


def test_the_p_value_is_that_of_all_flips():
    users = [f"u{i // 2}" for i in range(16)]
    values = np.random.default_rng(0).normal(0.4, 1, 16)
    sums = values.reshape(8, 2).sum(axis=1)
    flips = [abs(np.dot(signs, sums)) for signs in itertools.product((-1, 1), repeat=8)]
    exact = np.mean([flip >= abs(sums.sum()) - 1e-12 for flip in flips])
    assert sign_flip(values, users, 50_000) == pytest.approx(exact, abs=0.01)
    assert sign_flip(values, users) == sign_flip(-values, users)


def test_one_user_with_many_examples_shows_nothing():
    assert sign_flip([1.0] * 100, ["a"] * 100) == 1.0
    assert sign_flip([1.0] * 100, range(100)) < 0.001
    assert sign_flip([0.0] * 5, range(5)) == 1.0


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_smallest_difference_is_2_8_standard_errors():
    rng = np.random.default_rng(0)
    users = [f"u{i}" for i in rng.integers(0, 80, 400)]
    values = rng.normal(0, 1, 400)
    low, high = bootstrap_mean(values, users)[1:]
    assert smallest_difference(values, users) == pytest.approx(2.8 * (high - low) / (2 * 1.96), rel=0.05)
    single = [f"v{i}" for i in range(400)]
    assert smallest_difference(values, single) == pytest.approx(2.8 * values.std(ddof=1) / math.sqrt(400))
    assert math.isnan(smallest_difference([1.0, 2.0], ["a", "a"]))


def test_bad_input():
    with pytest.raises(MismatchError):
        sign_flip([1.0, 2.0], ["a"])
    with pytest.raises(MismatchError):
        smallest_difference([math.nan], ["a"])
    with pytest.raises(ConfigurationError):
        sign_flip([1.0], ["a"], 0)
