"""What determines a row's answers, as JSON: equal keys, equal answers. So a bench knows what it need not do again.

Places are no part of a key, but digests of what is there: a plug that was trained again in the same folder is another
one, and a copy of a plug is the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..configuration import PPlugConfig
from ..data.records import Example
from ..methods.names import Row
from ..modeling import encoders
from ..modeling import plug_folder as files
from ..tasks.task import Task
from ..version import __version__

if TYPE_CHECKING:
    from .runner import Bench

_PACKAGES = ("torch", "transformers", "tokenizers", "sentence-transformers")
_PLACES = ("backbone", "backbone_revision", "encoder", "encoder_revision", "transformers_version", "name_or_path")


class Keys:
    """The keys of a bench's rows; each digest is worked out once."""

    def __init__(self, bench: Bench):
        self.bench = bench
        self._digests: dict[str, str] = {}

    def __call__(self, row: Row, run: int) -> dict[str, Any]:
        """Everything that determines the answers of one run of a row. Of the seeds, only what the row draws by."""
        bench = self.bench
        task, decoding = bench.task, bench.decoding
        key: dict[str, Any] = {
            "row": str(row),
            "data": self._once("data", lambda: data_digest(task, bench.examples, answers=False)),
            "backbone": self._once(
                "backbone", lambda: backbone_digest(bench.language_model, bench.processor.tokenizer)
            ),
            "decoding": {**asdict(decoding), "max_new_tokens": decoding.max_new_tokens or task.max_new_tokens},
            "versions": {"pplug-hf": __version__, **versions(_PACKAGES)},
        }
        if row.plug:
            place = bench.plugs[row.plug][run]
            key["plug"] = self._once(f"plug {place}", lambda: plug_digest(place, bench.config(place)))
        if row.ranker == "dense":
            lender, template, items, requests = bench.dense()
            digest = encoders.fingerprint(bench.encoder(lender))["digest"]
            key["retriever"] = {"encoder": digest, "template": template, "prompts": [items, requests]}
        if row.ranker == "random" or row.shown == "wrong-user":
            key["seed"] = bench.seed
        if row.frequencies:
            key["training"] = self._once("training", lambda: data_digest(task, bench.training, answers=True))
        return key

    def _once(self, name: str, digest: Callable[[], str]) -> str:
        if name not in self._digests:
            self._digests[name] = digest()
        return self._digests[name]


def data_digest(task: Task, examples: Sequence[Example], *, answers: bool) -> str:
    """A fingerprint of a task and its examples; with their answers or without."""
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
    """A fingerprint of a language model: weights, settings, those of its generation, and its tokenizer."""
    digest = _digest_of_tensors(model.state_dict())
    for settings in (model.config.to_dict(), model.generation_config.to_dict()):
        known = {k: v for k, v in settings.items() if k not in ("_name_or_path", "transformers_version")}
        digest.update(json.dumps(known, sort_keys=True, default=str).encode())
    words = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    digest.update(str(words).encode())
    return digest.hexdigest()[:16]


def plug_digest(place: str, config: PPlugConfig) -> str:
    """A fingerprint of a plug: weights and settings."""
    digest = _digest_of_tensors(files.load_weights(place))
    known = {k: v for k, v in config.to_dict().items() if k not in _PLACES}
    digest.update(json.dumps(known, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """The installed versions of packages; null for those that are not there."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _digest_of_tensors(tensors: dict[str, Tensor]) -> Any:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        if isinstance(tensor, Tensor) and not tensor.is_meta:  # what is off-loaded to disk counts by its name
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest
