"""Pairs of answers for human judges, who do not see which method gave which."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..data.records import Example
from ..storage.files import private_write

PAIRS, KEY = "pairs.jsonl", "key.json"


def write_pairs(
    folder: str | os.PathLike, examples: Sequence[Example], answers: Mapping[str, Mapping[str, str]], seed: int = 0
) -> tuple[int, int]:
    """Write pairs.jsonl for the judges, and key.json, which they must not see. Both are readable by their owner alone.

    A line is {"pair", "prompt", "left", "right"}: no id, no history, and no name of a method. The order of the pairs and their sides
    depend on the seed and the question's id alone. Equal answers are not asked about, and are in the key.

    Args:
        folder: of the files.
        examples: what was asked; golds are not needed.
        answers: of two methods, name -> question's id -> answer.
        seed: of order and sides.

    Returns:
        The number of pairs and of equal answers.
    """
    first, second = answers
    pairs: list[dict[str, object]] = []
    sides: dict[int, dict[str, str]] = {}
    equal: list[str] = []
    for example in sorted(examples, key=lambda example: _hash(seed, "order", example.id)):
        names = [first, second] if _hash(seed, "sides", example.id)[0] % 2 else [second, first]
        left, right = (answers[name][example.id] for name in names)
        if left == right:
            equal.append(example.id)
            continue
        number = len(pairs) + 1
        pairs.append({"pair": number, "prompt": example.prompt, "left": left, "right": right})
        sides[number] = {"id": example.id, "left": names[0], "right": names[1]}
    _write_private(Path(folder) / PAIRS, (json.dumps(pair, ensure_ascii=False) for pair in pairs))
    key = {"methods": [first, second], "seed": seed, "pairs": sides, "equal": equal}
    _write_private(Path(folder) / KEY, [json.dumps(key, indent=1)])
    return len(pairs), len(equal)


def _hash(*parts: object) -> bytes:
    return hashlib.sha256(json.dumps(parts).encode()).digest()


def _write_private(path: Path, lines: Iterable[str]) -> None:
    with private_write(path) as file:
        for line in lines:
            file.write(line.encode("utf-8", "replace") + b"\n")
