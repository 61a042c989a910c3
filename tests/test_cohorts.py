"""Cohorts: means of users' means, found again by k-means, and lent to users with few items."""

import pytest
import tiny
import torch

from pplug_hf import EncoderSpec, Persona
from pplug_hf.errors import ConfigurationError, DataError, MismatchError
from pplug_hf.serving.cohorts import Cohorts

SPEC = EncoderSpec("digest", 12)


def persona(n, seed=0, centre=0.0):
    return Persona(tiny.vectors(n, seed=seed) + centre, SPEC)


def users(centre, count=8):
    return [persona(1 + seed % 4, seed + int(100 * centre), centre) for seed in range(count)]


def test_a_cohort_is_the_mean_of_its_users_means():
    groups = {"a": [*users(5.0), persona(0)], "b": users(-5.0, 6), "small": users(0.0, 2)}
    cohorts = Cohorts.of_groups(groups, min_users=3)
    assert cohorts.centres.keys() == {"a", "b"}
    for name in ("a", "b"):
        expected = torch.stack([p.vectors.mean(0) for p in groups[name] if len(p)]).mean(0)
        assert torch.allclose(cohorts.centres[name].vectors, expected[None], atol=1e-6)
    every = [p.vectors.mean(0) for name in ("a", "b") for p in groups[name] if len(p)]
    assert torch.allclose(cohorts.all_users.vectors, torch.stack(every).mean(0)[None], atol=1e-6)


def test_few_users_make_no_cohort_by_default():
    assert Cohorts.of_groups({"a": users(1.0, 19), "b": users(2.0, 1)}).centres == {}
    assert Cohorts.of_groups({"a": users(1.0, 20)}).centres.keys() == {"a"}


def test_no_mean_is_of_fewer_users_than_a_cohort_needs():
    """Neither that of all users, nor what is left of it without the cohorts."""
    for few in ([persona(3)], users(1.0, 19)):
        with pytest.raises(DataError, match=f"{len(few)} users of these have items, and a cohort needs 20"):
            Cohorts.of_groups({"de": few})
    with pytest.raises(DataError, match="give more users, or a smaller min_users="):
        Cohorts.cluster(users(1.0, 3), k=1)
    large = Cohorts.of_groups({"de": users(1.0, 20)})
    alone = Cohorts.of_groups({"de": users(1.0, 20), "fr": [persona(3, centre=9.0)]})
    assert torch.equal(alone.all_users.vectors, large.all_users.vectors)
    many = Cohorts.of_groups({"de": users(1.0, 20), "fr": users(9.0, 12), "it": users(8.0, 8)})
    assert many.centres.keys() == {"de"} and many.all_users.vectors.mean() > large.all_users.vectors.mean() + 2


def test_unknown_users_are_left_out():
    known = users(5.0)
    made = Cohorts.of_groups({"a": [None, *known]}, min_users=3)
    assert torch.equal(made.all_users.vectors, Cohorts.of_groups({"a": known}, min_users=3).all_users.vectors)
    assert Cohorts.cluster([None, *known], k=1, min_users=3).centres.keys() == {"0"}


def test_k_means_finds_groups_that_are_far_apart():
    groups = [users(20.0), users(-20.0, 6), users(0.0, 7)]
    mixed = [p for found in zip(*(g + [persona(0)] * (8 - len(g)) for g in groups), strict=True) for p in found]
    for seed in range(3):
        cohorts = Cohorts.cluster(mixed, k=3, min_users=1, seed=seed)
        expected = sorted(torch.stack([p.vectors.mean(0) for p in g]).mean().item() for g in groups)
        assert sorted(c.vectors.mean().item() for c in cohorts.centres.values()) == pytest.approx(expected, abs=1e-5)
    same = Cohorts.cluster([persona(2)] * 5, k=2, min_users=1)
    assert sum(len(c) for c in same.centres.values()) == 1  # equal users are one cluster, however many are asked for


def test_users_with_few_items_get_the_centre_in_front_of_their_own():
    cohorts = Cohorts.of_groups({"a": users(5.0), "b": users(-5.0)}, min_users=3)
    a, b = cohorts.centres["a"], cohorts.centres["b"]
    rich, poor = persona(3, centre=5.0), persona(2, centre=4.0).to(torch.float16)
    assert cohorts.complete(rich) is rich
    made = cohorts.complete(poor)
    assert made.vectors.dtype == torch.float16 and torch.equal(made.vectors[1:], poor.vectors)
    assert torch.equal(made.vectors[:1], a.vectors.half())
    assert torch.equal(cohorts.complete(poor, group="b").vectors[:1], b.vectors.half())
    assert cohorts.complete(None, group="b") is b
    assert cohorts.complete(None) is cohorts.complete(persona(0), group="unknown") is cohorts.all_users
    assert cohorts.complete(persona(2, centre=4.0), min_items=2).vectors.shape == (2, 12)


def test_what_cannot_be():
    with pytest.raises(DataError, match="0 users of these have items, and a cohort needs 1"):
        Cohorts.of_groups({"a": [persona(0), None]}, min_users=0)
    with pytest.raises(ConfigurationError, match=r"k is 3, and 2 users have items: give 1 to 2"):
        Cohorts.cluster([persona(1), persona(1), persona(0)], k=3)
    other = Persona(tiny.vectors(2), EncoderSpec("other", 12))
    with pytest.raises(MismatchError):
        Cohorts.of_groups({"a": [persona(1), other]}, min_users=1)
    with pytest.raises(MismatchError):
        Cohorts.of_groups({"a": [persona(1)]}, min_users=1).complete(other)
