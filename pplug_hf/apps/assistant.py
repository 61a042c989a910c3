"""The work behind the page, without a page: answers side by side, weights of items, users in a store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from typing import NamedTuple

from ..data.examples import read_examples
from ..errors import DataError
from ..modeling import Persona, PPlugForConditionalGeneration, PPlugModel
from ..processing import PPlugProcessor
from ..serving.store import PersonaStore

READERS = ("r1002", "r1012", "r1004", "r1007", "r1010", "r1011", "r1019", "r1020")  # of the demo; they differ in taste


class Sample(NamedTuple):
    """A user to try the page with, and something to ask for them."""

    user: str
    items: list[str]
    prompt: str = ""
    query: str = ""


class Answers(NamedTuple):
    """Answers side by side, and the weights of the user's items, heaviest first."""

    bare: str
    own: str
    other: str
    weights: list[tuple[float, str]]


@dataclass
class Assistant:
    """A model with a plug, and the personas of stored users.

    Args:
        model: with its plug.
        store: of users; the vectors of one encoder, and no texts.
        samples: users to choose from.
        max_new_tokens: of an answer.
    """

    model: PPlugForConditionalGeneration
    store: PersonaStore
    samples: Sequence[Sample] = ()
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        self.processor = PPlugProcessor.from_model(self.model)

    def ask(self, prompt: str, query: str, own: Sequence[str] | str, other: Sequence[str], strength: float) -> Answers:
        """Answer a prompt three times in one batch: by the bare model, for a user, and for another user.

        Args:
            prompt: what to answer.
            query: what the items are weighted by; "" is the prompt.
            own: items of the user, or the id of a stored one.
            other: items of another user.
            strength: of both personas.

        Raises:
            DataError: no prompt, or no such user.
        """
        if not prompt.strip():
            raise DataError("The prompt is empty: write what to answer.")
        query = query.strip() or self.model.config.query_of(prompt)
        persona = self.stored(own) if isinstance(own, str) else self.model.encode_persona(list(own))
        personas = [None, persona, self.model.encode_persona(list(other))]
        batch = self.processor(text=[prompt] * 3, persona=personas, query=[query] * 3).to(self.model.device)
        plug = self.model.active_plug
        options = {"do_sample": False, "num_beams": 1, "max_new_tokens": self.max_new_tokens}
        ids = self.model.generate(**batch, plug=[None, plug, plug], persona_strength=strength, **options)
        bare, mine, others = self.processor.decode_answers(ids, prompt_length=batch["input_ids"].shape[1])
        weights = self.model.persona_weights(persona, query=query)[0].tolist() if len(persona) else []
        names = [f"item {id_}" for id_ in persona.item_ids or ()] if isinstance(own, str) else list(own)
        return Answers(bare, mine, others, sorted(zip(weights, names, strict=True), reverse=True))

    def stored(self, user: str) -> Persona:
        """Return the persona of a stored user.

        Raises:
            DataError: nobody is stored under this id.
        """
        persona = self.store.get(user) if user.strip() else None
        if persona is None:
            raise DataError("Nobody is stored under this name: store the user first, or choose the items on the page.")
        return persona

    def keep(self, user: str, items: Sequence[str]) -> str:
        """Store a user's items in the place of what is stored under the id, and return a sentence that says so."""
        persona = self.model.encode_persona(list(items))
        ids = tuple(str(i + 1) for i in range(len(items)))
        self.store.replace(user, replace(persona, item_ids=ids))
        return f"Stored {len(persona)} items as vectors; no text is kept."

    def forget(self, user: str) -> str:
        """Delete a stored user, and return the receipt as a sentence."""
        receipt = self.store.delete_user(user)
        return f"Deleted {receipt.items} items. Receipt: user key {receipt.key}, time {receipt.time:.0f}."


def items_of(text: str) -> list[str]:
    """Return the items of a history that is written with one item per line."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def load_demo() -> tuple[PPlugForConditionalGeneration, list[Sample]]:
    """Load the plug that comes with the package, and some readers with a question each."""
    with as_file(files("pplug_hf.demo") / "assets") as assets:
        parts = {name: str(assets / name) for name in ("backbone", "encoder")}
        model = PPlugModel.from_pretrained(assets / "plug", **parts)
        task, examples = read_examples(str(assets / "data"), "dev", "demo")
    last = {example.user: example for example in examples}
    return model, [
        Sample(user, [task.item_text(item) for item in last[user].history], last[user].prompt, last[user].query)
        for user in READERS
    ]
