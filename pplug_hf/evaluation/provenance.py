"""Keys of answers, as JSON: equal keys, equal answers, which a bench need not make again.

Places are not part of a key, but digests of what is there: a plug that was trained again in the same folder is another
one, and a copy of a plug is the same.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..data.records import Example
from ..methods.persona import digest_of_tensors
from ..methods.resources import Resources
from ..tasks.task import Task
from ..version import __version__

_PACKAGES = ("torch", "transformers", "tokenizers", "sentence-transformers")


def shared_key(resources: Resources, examples: Sequence[Example]) -> dict[str, Any]:
    """Return what determines the answers of every method: data, language model, decoding and versions."""
    task, decoding = resources.task, resources.decoding
    return {
        "data": data_digest(task, examples, answers=False),
        "backbone": backbone_digest(resources.language_model, resources.processor.tokenizer),
        "decoding": {**asdict(decoding), "max_new_tokens": decoding.max_new_tokens or task.max_new_tokens},
        "versions": {"pplug-hf": __version__, **versions(_PACKAGES)},
    }


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


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Return the installed versions of packages; None for those that are missing."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


@cache
def git_commit() -> str | None:
    """Return the commit of this package's own checkout, with a + if files were changed since; None if installed."""
    root = Path(__file__).parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True) if (root / ".git").exists() else None
    except OSError:
        return None
    return done.stdout.strip() or None if done else None
