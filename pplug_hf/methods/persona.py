"""`Plug`: answers of a plug, with a user's whole history, a part of it, another user's, or none.

n examples, N items of one user, D encoder width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from ..configuration import PPlugConfig
from ..configuration.pplug import choices
from ..data.dataset import PersonaDataset
from ..data.records import Example
from ..errors import DataError
from ..modeling import plug_folder as files
from ..modeling.backbone import digest_of_tensors
from ..modeling.persona import Persona
from ..storage.files import read_json_object
from ..storage.layout import TRAIN_SETTINGS
from .base import Method, Need, Plain, Retrieval
from .decoding import Answers, ModelInputs, check_two_users, nearest_histories, shuffle_histories
from .resources import Resources

HistoryVariant = Literal["whole", "wrong-user", "no-history", "top", "last", "nearest-user"]
INSTRUCTION_ONLY = "instruction-only"  # name of plugs that were trained without histories, and answer without
# Fields that came later: at these values, they do not change the digest of an older plug.
_LATER = {
    "placement": "prompt",
    "chat": False,
    "system": None,
    "project_no_persona": False,
    "query_marker": "",
    "query_end": "",
}
_PLACES = ("backbone", "backbone_revision", "encoder", "encoder_revision", "transformers_version", "name_or_path")


@dataclass(frozen=True)
class Plug(Method):
    """A plug's soft prompt, then the prompt.

    Args:
        name: what the user calls it.
        folder: plug folder or Hub id.
        history: what the persona is made of: the user's whole history, another user's (any, or the most similar one),
            none, the top items by weight, or the last ones.
        items: how many, for "top" and "last".
        strength: of the persona: 0 is nobody, 1 as trained.
        retrieval: also put retrieved items of the user's own history into the prompt.
        paper_order: put them before the soft prompt instead of behind it.
    """

    name: str
    folder: str = ""
    history: HistoryVariant = "whole"
    items: int = 0
    retrieval: Retrieval | None = None
    paper_order: bool = False
    strength: float = 1.0

    @property
    def needs(self) -> frozenset[Need]:
        return self.retrieval.needs if self.retrieval else frozenset()

    @property
    def ignores_history(self) -> bool:
        """True if it answers without any history."""
        return self.history == "no-history" or self.name == INSTRUCTION_ONLY

    @property
    def is_variant(self) -> bool:
        """True unless it answers with the user's whole history alone, as trained."""
        return self.history != "whole" or self.retrieval is not None or self.strength != 1

    def check(self, examples: Sequence[Example], resources: Resources) -> None:
        if self.history in ("wrong-user", "nearest-user"):
            check_two_users(examples, self.history)
        if self.retrieval:
            self.retrieval.check(examples, resources)

    def inputs(self, examples: Sequence[Example], resources: Resources) -> ModelInputs:
        if self.retrieval:
            inputs = self.retrieval.inputs(examples, resources, self.folder, positions=self.paper_order)
        else:
            inputs = Plain().inputs(examples, resources)
        if self.ignores_history:
            return inputs
        personas = self._personas(examples, resources)
        if self.history == "wrong-user":
            personas = [personas[donor] for donor in shuffle_histories(examples, resources.seed)]
        elif self.history == "nearest-user":
            personas = [personas[donor] for donor in nearest_histories(examples, personas)]
        elif self.history == "last":
            personas = [persona.last(self.items) for persona in personas]
        elif self.history == "top":
            score = self.weights if self._needs_query(resources) else self._similarities
            scores = score(examples, resources)
            personas = [persona.top(self.items, each) for persona, each in zip(personas, scores, strict=True)]
        queries = self._queries(examples, resources) if self._needs_query(resources) else None
        strength = None if self.strength == 1 else self.strength
        return inputs._replace(personas=personas, queries=queries, strength=strength)

    def answer(self, examples: Sequence[Example], resources: Resources) -> Answers:
        answers = resources.generate(self.inputs(examples, resources), resources.plug(self.folder))
        if not self.ignores_history:
            sizes = [persona.vectors.nbytes for persona in self._personas(examples, resources)]
            answers = answers._replace(cost={"bytes_per_user": round(sum(sizes) / len(sizes))})
        if self.is_variant or self.ignores_history or not self._needs_query(resources):
            return answers
        return answers._replace(weights=self.weights(examples, resources))

    def weights(self, examples: Sequence[Example], resources: Resources) -> list[Tensor]:
        """Return the weight of each item of each example's whole history, n vectors [N]."""
        model = resources.plug(self.folder)
        personas, queries = self._personas(examples, resources), self._queries(examples, resources)
        found: list[Tensor] = []
        for start in range(0, len(personas), resources.batch_size):
            batch = slice(start, start + resources.batch_size)
            weights = model.persona_weights(personas[batch], query=queries[batch])  # [B, N]
            found += [w[: len(p)] for p, w in zip(personas[batch], weights, strict=True)]
        return found

    def _similarities(self, examples: Sequence[Example], resources: Resources) -> list[Tensor]:
        """Return the cosine of each item with the query, n vectors [N], for plugs that weight all items the same."""
        model = resources.plug(self.folder)
        queries = resources.store(model.history_encoder, model.config.query_prompt, "query")(
            [e.query for e in examples]
        )
        return [
            F.normalize(persona.vectors, dim=-1) @ F.normalize(query, dim=-1)
            for persona, query in zip(self._personas(examples, resources), queries, strict=True)
        ]

    def _personas(self, examples: Sequence[Example], resources: Resources) -> list[Persona]:
        """Return the whole history of each example, as this plug encodes it; shared by plugs that encode alike."""
        model = resources.plug(self.folder)
        config, encoder = model.config, model.history_encoder

        def encode() -> list[Persona]:
            dataset = PersonaDataset(examples, resources.store(encoder, config.history_prompt), config.item_template)
            return [dataset.persona(i) for i in range(len(dataset))]

        return resources.once(("personas", id(encoder), config.history_prompt, config.item_template), encode, examples)

    def _queries(self, examples: Sequence[Example], resources: Resources) -> list[str] | Tensor:
        """Return vectors [n, D] of the frozen encoder, or texts for a plug that trained an encoder of its own."""
        model, texts = resources.plug(self.folder), [e.query for e in examples]
        if model.plug.input_encoder is not None:
            return texts
        return resources.store(model.history_encoder, model.config.query_prompt, "query")(texts)

    def _needs_query(self, resources: Resources) -> bool:
        return resources.plug(self.folder).plug.aggregator.needs_query

    def key(self, resources: Resources) -> dict[str, object]:
        def digest() -> str:
            return plug_digest(self.folder, resources.config(self.folder))

        key: dict[str, object] = {"plug": resources.once(("digest", self.folder), digest)}
        if self.history == "wrong-user":
            key["seed"] = resources.seed
        return key | (self.retrieval.key(resources) if self.retrieval else {})

    def parts(self, resources: Resources) -> Sequence[Method]:
        return [self.retrieval] if self.retrieval else []

    def about(self, resources: Resources) -> dict[str, object]:
        config = resources.config(self.folder)
        weights = sum(map(math.prod, files.weight_shapes(self.folder).values()))
        about: dict[str, object] = {"plug": {name: getattr(config, name) for name in choices()}}
        passes = _kept(self.folder, TRAIN_SETTINGS, "language_model_passes")
        seed = _kept(self.folder, "training_args.json", "seed")
        about["cost"] = {"trained_weights": weights} | ({} if passes is None else {"language_model_passes": passes})
        return about if seed is None else about | {"training_seed": seed}


def plug_digest(place: str, config: PPlugConfig) -> str:
    """Return a fingerprint of a plug: weights and settings, not where anything is."""
    digest = digest_of_tensors(files.load_weights(place))
    known = {k: v for k, v in config.to_dict().items() if k not in _PLACES and (k, v) not in _LATER.items()}
    digest.update(json.dumps(known, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _kept(place: str, file: str, name: str) -> int | None:
    """Return a number of a plug's training, as far as its folder says."""
    with suppress(OSError, DataError):
        return read_json_object(Path(place) / file, f"The {file}").get(name)
    return None
