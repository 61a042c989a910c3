"""`assign_arm`: an arm of an experiment for every user, by a hash, so that nothing has to be stored.

plugs = [assign_arm(user, {"shelves-1": 0.9, "shelves-2": 0.1}, salt="2026-11") for user in users]
model.generate(**batch, persona=personas, plug=plugs)       # each row with the plug of its user
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping

from ..errors import ConfigurationError


def assign_arm(user: str, arms: Mapping[str, float], salt: str) -> str:
    """Return the arm of a user: the same on every machine, at every time, whatever the order of the arms.

    Raising the share of an arm moves users into it from others, and nobody else; so does adding one.

    Args:
        user: id.
        arms: name -> share of the users, of any sum; an arm of share 0 gets nobody.
        salt: name of the experiment; those of other names are independent of it.

    Raises:
        ConfigurationError: no arm, a share that is not a number of at least 0, or none above 0.
    """
    if not all(math.isfinite(share) and share >= 0 for share in arms.values()) or not any(arms.values()):
        raise ConfigurationError(f"The shares of the arms must be at least 0, and one above 0, got {dict(arms)}.")
    # The arm whose exponential clock of rate `share` rings first: each rings first with its share's probability.
    return min(
        (name for name in arms if arms[name]), key=lambda name: (-math.log(_draw(salt, name, user)) / arms[name], name)
    )


def _draw(*names: str) -> float:
    """Return a number above 0 and below 1 that is a hash of the names."""
    digest = hashlib.sha256(json.dumps(names).encode()).digest()
    return (int.from_bytes(digest[:6]) + 0.5) / 2**48
