"""Fingerprints: short digests of weights, language models and data, which say if two things are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..data.records import Example
from ..tasks.task import Task


def digest_of_tensors(tensors: dict[str, Tensor]) -> Any:
    """Return a hash over names, types, shapes and values, to which more can be added."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        if isinstance(tensor, Tensor) and not tensor.is_meta:  # what is off-loaded to disk counts by its name
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest


def json_digest(value: object) -> str:
    """Return a fingerprint of anything that JSON takes; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def task_digest(task: Task) -> str:
    """Return a fingerprint of a task."""
    return hashlib.sha256(task.identity.encode()).hexdigest()[:16]


def data_digest(task: Task, examples: Sequence[Example], *, answers: bool) -> str:
    """Return a fingerprint of a task and its examples; with their answers or without."""
    items: dict[int, bytes] = {}  # readers share equal items as one object

    def item_digest(item: dict[str, str]) -> bytes:
        if id(item) not in items:
            items[id(item)] = hashlib.sha256(json.dumps(item, sort_keys=True).encode()).digest()
        return items[id(item)]

    digest = hashlib.sha256(task.identity.encode())
    for e in examples:
        digest.update(json.dumps([e.id, e.user, e.prompt, e.query, e.target if answers else None]).encode())
        digest.update(b"".join(map(item_digest, e.history)))
    return digest.hexdigest()[:16]


def backbone_digest(model: Any, tokenizer: Any) -> str:
    """Return a fingerprint of a language model: weights, settings, those of its generation, and its tokenizer."""
    digest = digest_of_tensors(model.state_dict())
    for settings in (model.config.to_dict(), model.generation_config.to_dict()):
        known = {k: v for k, v in settings.items() if k not in ("_name_or_path", "transformers_version")}
        digest.update(json.dumps(known, sort_keys=True, default=str).encode())
    digest.update(_tokenizer_state(tokenizer).encode())
    return digest.hexdigest()[:16]


def _tokenizer_state(tokenizer: Any) -> str:
    """Return all that determines the tokens of a text.

    Not the padding and truncation of the last call, which a fast tokenizer keeps. The text is that of a tokenizer which
    was never called, so keys that were made at the start of a bench stay the same.
    """
    if not tokenizer.is_fast:
        return str(sorted(tokenizer.get_vocab().items()))
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy.to_str()


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
