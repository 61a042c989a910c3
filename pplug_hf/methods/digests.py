"""Keys of answers and artefacts, as JSON takes them: their digests, and where two of them differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping


def json_digest(value: object) -> str:
    """Return a fingerprint of anything that JSON takes; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def differences(old: Mapping[str, object], new: Mapping[str, object], inside: str = "") -> list[str]:
    """Return the names of the entries in which two mappings differ, such as "decoding.num_beams"."""
    names = []
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            names += differences(a, b, f"{inside}{name}.")
        elif a != b:
            names.append(f"{inside}{name}")
    return names
