"""Cohorts: a persona for users who have few items or none, made of what users like them have in common.

    cohorts = Cohorts.of_groups({"de": personas_of_de, "fr": personas_of_fr})    # or Cohorts.cluster(personas, k=20)
    persona = cohorts.complete(store.get(user), group="de")                      # of any user, new ones too

A cohort is one vector, the mean over its users of the mean of each user's items, so a user with many items counts as much as
one with few. It is a mean over people: with `min_users` of them it shows little of each, and no cohort has fewer, not even
that of all users.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from ..errors import ConfigurationError, DataError
from ..modeling import Persona
from ..modeling.persona import check_spec

MIN_USERS = 20


@dataclass(frozen=True)
class Cohorts:
    """Centres of groups of users, and of all.

    Args:
        centres: name -> persona of one item, the centre of the cohort.
        all_users: the same of all users. Those who are in no cohort are among them if they are `min_users` themselves;
            otherwise what the cohorts leave of it would be their mean.
    """

    centres: Mapping[str, Persona]
    all_users: Persona

    @classmethod
    def of_groups(cls, groups: Mapping[str, Iterable[Persona | None]], min_users: int = MIN_USERS) -> Cohorts:
        """Return the cohorts of given groups.

        Args:
            groups: name -> personas of its users; those without items, or None, are left out.
            min_users: a smaller group gets no cohort of its own: its mean would say too much of its users.

        Raises:
            DataError: fewer users than that have an item.
            MismatchError: personas of several encoders.
        """
        means = {name: _user_means(personas) for name, personas in groups.items()}
        needed = max(1, min_users)
        large = {name: found for name, found in means.items() if len(found) >= needed}
        others = [mean for name, found in means.items() if name not in large for mean in found]
        every = [*chain(*large.values()), *(others if len(others) >= needed else [])]
        if not every:
            raise DataError(
                f"{len(others)} users of these have items, and a cohort needs {needed}, so that it does not show what one of "
                "them wrote: give more users, or a smaller min_users=."
            )
        return cls({name: _mean(found) for name, found in large.items()}, _mean(every))

    @classmethod
    def cluster(
        cls, personas: Iterable[Persona | None], k: int, min_users: int = MIN_USERS, seed: int = 0, steps: int = 50
    ) -> Cohorts:
        """Return the cohorts that k-means finds among the users' means.

        Args:
            personas: of users; those without items, or None, are left out.
            k: number of cohorts, named "0", "1", ...
            min_users: a smaller cluster is left out.
            seed: of the first centres.
            steps: at most.

        Raises:
            ConfigurationError: more cohorts than users.
            DataError: fewer than `min_users` have an item.
        """
        every = _user_means(personas)
        if not 1 <= k <= len(every):
            raise ConfigurationError(f"k is {k}, and {len(every)} users have items: give 1 to {len(every)}.")
        points = torch.cat([mean.vectors for mean in every])  # [U, D]
        nearest = _k_means(points, k, seed, steps)
        groups = {str(i): [every[u] for u in (nearest == i).nonzero().flatten().tolist()] for i in range(k)}
        return cls.of_groups(groups, min_users)

    def nearest(self, persona: Persona | None) -> Persona:
        """Return the centre that is nearest to the mean of a user's items; that of all users for a user without items.

        Args:
            persona: of the user.
        """
        if persona is None or not len(persona) or not self.centres:
            return self.all_users
        (mean,) = _user_means([persona])
        check_spec(mean, self.all_users.spec)
        return min(self.centres.values(), key=lambda centre: float((centre.vectors - mean.vectors).norm()))

    def complete(self, persona: Persona | None, min_items: int = 3, group: str | None = None) -> Persona:
        """Return the persona of a user, with a cohort's centre as the oldest item while they have few of their own.

        Args:
            persona: of the user; None for a new one.
            min_items: a user with so many needs no cohort.
            group: name of the user's cohort (default: the nearest one; also for a group that was too small).
        """
        if persona is not None and len(persona) >= min_items:
            return persona
        centre = self.centres.get(group or "") or self.nearest(persona)
        if persona is None or not len(persona):
            return centre
        check_spec(persona, centre.spec)
        return Persona(torch.cat([centre.vectors.to(persona.vectors), persona.vectors]), persona.spec)


def _user_means(personas: Iterable[Persona | None]) -> list[Persona]:
    """Return the mean item [1, D] in fp32 of each user who has items."""
    return [Persona(p.vectors.float().mean(0, keepdim=True), p.spec) for p in personas if p is not None and len(p)]


def _mean(means: list[Persona]) -> Persona:
    for other in means:
        check_spec(other, means[0].spec)
    return Persona(torch.cat([mean.vectors for mean in means]).mean(0, keepdim=True), means[0].spec)


def _k_means(points: Tensor, k: int, seed: int, steps: int) -> Tensor:
    """Return the number of the cluster of each point [U]: Lloyd's steps from the first centres of k-means++."""
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    while len(centres) < k:
        distance = torch.cdist(points, centres).amin(1).square()
        chances = distance if distance.sum() > 0 else torch.ones_like(distance)
        centres = torch.cat([centres, points[torch.multinomial(chances, 1, generator=generator)]])
    nearest = torch.cdist(points, centres).argmin(1)
    for _ in range(steps):
        centres = torch.stack([points[nearest == i].mean(0) if (nearest == i).any() else centres[i] for i in range(k)])
        moved = torch.cdist(points, centres).argmin(1)
        if torch.equal(moved, nearest):
            break
        nearest = moved
    return nearest
