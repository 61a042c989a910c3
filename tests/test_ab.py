"""Arms by user: stable, even, and independent of what they should not depend on."""

import math
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pplug_hf.errors import ConfigurationError
from pplug_hf.serving.ab import assign_arm

USERS = [f"user-{number}" for number in range(4000)]
SHARES = st.dictionaries(st.text(max_size=5), st.floats(0.01, 100), min_size=1, max_size=4)


@given(st.text(), SHARES, st.text(max_size=5), st.randoms())
def test_the_order_of_the_arms_does_not_matter(user, arms, salt, draw):
    shuffled = list(arms.items())
    draw.shuffle(shuffled)
    assert assign_arm(user, arms, salt) == assign_arm(user, dict(shuffled), salt) in arms


@given(st.text(), SHARES, st.text(max_size=5), st.floats(1, 10), st.text(max_size=5))
def test_a_larger_share_takes_users_and_moves_nobody_else(user, arms, salt, factor, name):
    larger = {**arms, name: arms.get(name, 1.0) * factor}
    assert assign_arm(user, larger, salt) in (assign_arm(user, arms, salt), name)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(0.05, 1), min_size=2, max_size=4), st.text(max_size=5))
def test_arms_get_their_shares(shares, salt):
    arms = {str(number): share for number, share in enumerate(shares)}
    counts = Counter(assign_arm(user, arms, salt) for user in USERS)
    for name, share in arms.items():
        expected = share / sum(shares)
        deviation = math.sqrt(len(USERS) * expected * (1 - expected))
        assert abs(counts[name] - len(USERS) * expected) < 5 * deviation + 1


def test_experiments_are_independent_of_each_other():
    arms = {"a": 0.5, "b": 0.5}
    both = Counter((assign_arm(user, arms, "one"), assign_arm(user, arms, "two")) for user in USERS)
    assert len(both) == 4 and all(abs(count - 1000) < 5 * math.sqrt(750) for count in both.values())


def test_an_assignment_outlives_the_process_and_the_version():
    arms = {"a": 0.5, "b": 0.3, "c": 0.2}
    assert "".join(assign_arm(user, arms, "salt") for user in USERS[:24]) == "bacccabaaababaacbaacabbb"
    code = "from pplug_hf.serving.ab import assign_arm; print(assign_arm('user-7', {'a': 1, 'b': 1}, 's'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == assign_arm("user-7", {"a": 1, "b": 1}, "s")


def test_an_arm_without_a_share_gets_nobody():
    assert {assign_arm(user, {"a": 1, "b": 0}, "") for user in USERS[:100]} == {"a"}


@pytest.mark.parametrize("arms", [{}, {"a": 0}, {"a": -1, "b": 2}, {"a": float("nan")}, {"a": float("inf")}])
def test_shares_that_cannot_be(arms):
    with pytest.raises(ConfigurationError, match="The shares of the arms must be at least 0"):
        assign_arm("user", arms, "")
