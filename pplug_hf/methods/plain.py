"""Methods without a persona: the input alone, or with retrieved history items in the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from ..data.records import Example
from ..processing import PPlugProcessor
from .base import Method, Need
from .decoding import ModelInputs
from .prompts import persona_positions, retrieval_prompt
from .resources import Resources
from .retrievers import get_ranker


@dataclass(frozen=True)
class Plain(Method):
    """The input alone."""

    def inputs(self, examples: Sequence[Example], resources: Resources) -> ModelInputs:
        return ModelInputs([e.prompt for e in examples])


@dataclass(frozen=True)
class Retrieval(Method):
    """Retrieved history items and the input in one prompt.

    Args:
        retriever: name of a ranker in `retrievers.py`.
        k: items per prompt; a shorter history is used whole.
    """

    retriever: str
    k: int

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"encoder"} if self.retriever == "dense" else ())

    def check(self, examples: Sequence[Example], resources: Resources) -> None:
        if self.retriever != "dense":
            get_ranker(self.retriever, resources.task)
        resources.task.prompt_format  # noqa: B018 - raises if there is none

    def items(self, examples: Sequence[Example], resources: Resources) -> list[list[dict[str, str]]]:
        """Return the retrieved items of each example, best first."""
        orders = resources.ranking(self.retriever, examples)
        return [[e.history[i] for i in order[: self.k]] for e, order in zip(examples, orders, strict=True)]

    def inputs(
        self, examples: Sequence[Example], resources: Resources, plug: str = "", positions: bool = False
    ) -> ModelInputs:
        """Return the prompts with their items.

        Args:
            examples: n of them.
            resources: shared by all methods.
            plug: folder of the plug that reads them (default: the language model without one).
            positions: also say where a soft prompt goes that stands between items and input.
        """
        processor = PPlugProcessor.from_model(resources.plug(plug)) if plug else resources.processor
        found, budget = self.items(examples, resources), resources.decoding.max_length
        prompts = [
            retrieval_prompt(resources.task, e.prompt, items, processor.tokenizer, budget)
            for e, items in zip(tqdm(examples, desc="Writing prompts"), found, strict=True)
        ]
        counts = {
            "retrieved_items": sum(map(len, found)),
            "shown_items": sum(prompt.items for prompt in prompts),
            "prompts_without_items": sum(prompt.items == 0 for prompt in prompts),
        }
        places = persona_positions(processor, prompts, budget) if positions else None
        return ModelInputs([prompt.text for prompt in prompts], positions=places, counts=counts)

    def key(self, resources: Resources) -> dict[str, Any]:
        if self.retriever == "random":
            return {"seed": resources.seed}
        return {"retriever": resources.dense_key()} if self.retriever == "dense" else {}
