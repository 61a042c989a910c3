"""Which items speak: the profile against an explicit loop, and what seeds are together."""

import math
import random
from itertools import groupby

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pplug_hf.data.lamp import Example
from pplug_hf.evaluation.attention_profile import mean_profile, weight_profile
from pplug_hf.evaluation.user_statistics import bootstrap_mean


def make(lengths, seed=0, users=3):
    rng = random.Random(seed)
    examples, weights = [], []
    for number, length in enumerate(lengths):
        dates = rng.sample(range(1000, 3000), length)
        history = [{"text": str(i), "date": str(date)} for i, date in enumerate(dates)]
        examples.append(Example(str(number), f"u{number % users}", "p", "q", "a", history))
        weights.append(torch.tensor([rng.random() for _ in history]).softmax(dim=0))
    return weights, examples


def range_of(place):
    """1, 2, 3 to 4, 5 to 8, ... by number."""
    return 0 if place == 1 else math.ceil(math.log2(place))


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=9).filter(lambda lengths: max(lengths) > 1), st.integers(0, 99)
)
@settings(deadline=None, max_examples=15)
def test_the_profile_is_the_slow_loop(lengths, seed):
    weights, examples = make(lengths, seed)
    profile = weight_profile(weights, examples)
    for name in ("by_age", "by_rank"):
        expected = {}
        for w, e in zip(weights, examples, strict=True):
            if len(e.history) < 2:
                continue
            order = {
                "by_age": sorted(range(len(w)), key=lambda i: -int(e.history[i]["date"])),
                "by_rank": sorted(range(len(w)), key=lambda i: -w[i].item()),
            }[name]
            placed = [(range_of(place), w[i].item() * len(w)) for place, i in enumerate(order, 1)]
            for which, group in groupby(placed, key=lambda pair: pair[0]):
                values = [value for _, value in group]
                expected.setdefault(which, []).append((sum(values) / len(values), e.user))
        assert len(profile[name]) == len(expected)
        for which, got in enumerate(profile[name]):
            values, users = zip(*expected[which], strict=True)
            assert (got["examples"], got["users"]) == (len(values), len(set(users)))
            interval = bootstrap_mean(values, users)
            known = [v for v in interval if math.isfinite(v)]  # of a single user there is no interval
            assert [v for v in got["weight"] if v is not None] == pytest.approx(known, rel=1e-5)
            assert range_of(got["from"]) == range_of(got["to"]) == which


def test_uniform_weights_are_one_everywhere():
    _, examples = make([30, 30, 7, 2])
    profile = weight_profile([torch.full((len(e.history),), 1 / len(e.history)) for e in examples], examples)
    assert all(p["weight"] == pytest.approx([1, 1, 1]) for name in ("by_age", "by_rank") for p in profile[name])
    assert profile["effective_share"] == pytest.approx([1, 1, 1])
    assert [(p["from"], p["to"]) for p in profile["by_age"]] == [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 30)]


def test_a_single_item_that_speaks():
    _, examples = make([4, 4])
    weights = [torch.eye(4)[max(range(4), key=lambda i: int(e.history[i]["date"]))] for e in examples]
    profile = weight_profile(weights, examples)
    assert [p["weight"][0] for p in profile["by_age"]] == pytest.approx([4, 0, 0])
    assert profile["effective_share"][0] == pytest.approx(0.25)


class OnApple(torch.Tensor):
    """A tensor on a device without fp64."""

    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_weights_may_lie_on_a_device_without_double_precision():
    weights, examples = make([4, 4])
    assert weight_profile([w.as_subclass(OnApple) for w in weights], examples) == weight_profile(weights, examples)


def test_there_may_be_nothing_to_say():
    weights, examples = make([0, 1])
    assert weight_profile(weights, examples) is None


def test_seeds_together():
    _, examples = make([9, 9], users=2)
    profiles = [weight_profile(make([9, 9], seed, 2)[0], examples) for seed in range(3)]
    merged = mean_profile(profiles)
    for i, place in enumerate(merged["by_rank"]):
        for j in range(3):
            assert place["weight"][j] == pytest.approx(sum(p["by_rank"][i]["weight"][j] for p in profiles) / 3)
    assert mean_profile(profiles[:1]) == profiles[0]
