"""`Method`: a way to answer users' questions with one frozen language model.

    class Shout(Method):
        def inputs(self, examples, resources):
            return ModelInputs([e.prompt.upper() for e in examples])

    register_method("shout", Shout)  # in names.py; then: pplug-hf bench --rows no-persona shout ...

A method that only changes what the language model reads defines `inputs`; one that does more (chooses between the
answers of other methods, changes the model for each example) defines `answer`. The two that need neither a plug nor
training stand here too: `Plain` and `Retrieval`. `Trained` is the base class of methods that come as artefacts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from tqdm import tqdm

from ..data.records import Example
from ..errors import ConfigurationError
from ..processing import PPlugProcessor
from .decoding import Answers, ModelInputs, check_two_users, shuffle_histories
from .prompts import persona_positions, retrieval_prompt, text_budget, turns_of
from .resources import Resources

# "training": examples of the train split, which `fit` gets; "labels": a task whose history items carry one of a list of
# labels; "encoder": a sentence encoder besides those of its own folder.
Need = Literal["training", "labels", "encoder"]


# Name of a cost -> its title in tables.
COSTS = {
    "generations_per_question": "generations per question",
    "language_model_passes": "passes of the language model in training",
    "trained_weights": "trained weights",
    "weights_per_user": "trained weights per user",
    "bytes_per_user": "bytes per user",
    "seconds_per_user": "seconds for a new user",
}


class Method:
    """Base class: override `inputs` or `answer`, and what else differs."""

    folder: str = ""  # where its trained part is, if it has one; several seeds are several methods of one name
    reads_answers: ClassVar[bool] = False  # those of other rows, which are made before it answers

    @property
    def needs(self) -> frozenset[Need]:
        """Name what has to be there before it can answer."""
        return frozenset()

    def check(self, examples: Sequence[Example], resources: Resources) -> None:
        """Raise a `PPlugError` for what would fail later; nothing may be loaded for that.

        Args:
            examples: n of them, with histories.
            resources: shared by all methods.
        """

    def fit(self, train: Sequence[Example], resources: Resources) -> None:
        """Learn from the examples of the train split; called once, before `answer`.

        Args:
            train: examples with answers, of users whom the language model does not know.
            resources: shared by all methods.
        """

    def inputs(self, examples: Sequence[Example], resources: Resources) -> ModelInputs:
        """Return what the language model is given for each example.

        Args:
            examples: n of them, with histories.
            resources: shared by all methods.
        """
        # Abstract: `Runner.check` refuses a method without it before anything is answered.
        raise NotImplementedError(f"{type(self).__name__} has to define inputs or answer.")

    def answer(self, examples: Sequence[Example], resources: Resources) -> Answers:
        """Return an answer to each example, in their order.

        Args:
            examples: n of them, with histories.
            resources: shared by all methods.
        """
        return resources.generate(self.inputs(examples, resources))

    def key(self, resources: Resources) -> dict[str, object]:
        """Return what else than data, language model and decoding determines the answers, as JSON takes it.

        Args:
            resources: shared by all methods.
        """
        return {}

    def about(self, resources: Resources) -> dict[str, object]:
        """Return facts to keep with the answers, as JSON takes them. `cost` holds what a table of costs shows, by COSTS.

        Args:
            resources: shared by all methods.
        """
        return {}

    def parts(self, resources: Resources) -> Sequence[Method]:
        """Return the methods inside this one, whose costs `about` leaves out and `whole_cost` adds.

        Args:
            resources: shared by all methods.
        """
        return ()


def whole_cost(method: Method, resources: Resources, measured: Mapping[str, float]) -> dict[str, float]:
    """Return what a method costs with all its parts, by COSTS; an artefact in several of them counts once.

    Args:
        method: whose answers are there.
        resources: shared by all methods.
        measured: cost of these answers, as far as `about` does not say.
    """
    first = {**measured, **_own_cost(method, resources)}
    costs: dict[object, dict[str, float]] = {method.folder or id(method): first}
    parts = list(method.parts(resources))
    for part in parts:
        parts += part.parts(resources)
        own = costs.setdefault(part.folder or id(part), {})
        # The same artefact may come twice, with different changes: users' own weights, and what all users share.
        for name, value in _own_cost(part, resources).items():
            own[name] = max(value, own.get(name, value))
    names = dict.fromkeys(name for own in costs.values() for name in own)
    whole = {name: sum(own.get(name, 0) for own in costs.values()) for name in names}
    if "generations_per_question" in first:  # it counts those of its parts
        whole["generations_per_question"] = first["generations_per_question"]
    return whole


def _own_cost(method: Method, resources: Resources) -> Mapping[str, float]:
    cost: Any = method.about(resources).get("cost", {})
    return cost


@dataclass(frozen=True)
class Plain(Method):
    """The input alone."""

    def inputs(self, examples: Sequence[Example], resources: Resources) -> ModelInputs:
        return ModelInputs([e.prompt for e in examples])


@dataclass(frozen=True)
class Retrieval(Method):
    """Retrieved history items and the input in one prompt.

    Args:
        retriever: name of a ranker in `retrievers.py`, or what the user calls a trained one.
        k: items per prompt; a shorter history is used whole.
        turns: show them to a chat model as earlier turns, each with the user's own answer.
        wrong_user: take them from another user's history.
        folder: of a trained ranker.
        draw: of random items, which of several draws.
    """

    retriever: str
    k: int
    turns: bool = False
    wrong_user: bool = False
    folder: str = ""
    draw: int = 0

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"encoder"} if self.retriever == "dense" else ())

    def check(self, examples: Sequence[Example], resources: Resources) -> None:
        resources.check_ranker(self.retriever, self.folder)
        if self.wrong_user:
            check_two_users(examples, "wrong-user")
        resources.task.prompt_format  # noqa: B018 - raises if there is none
        if self.turns and resources.task.answer_field is None:
            raise ConfigurationError(
                f"Items of {resources.task.name} carry no answer, so they cannot be turns of a chat: leave out ':turns'."
            )

    def items(self, examples: Sequence[Example], resources: Resources) -> list[list[dict[str, str]]]:
        """Return the retrieved items of each example, best first."""
        if self.wrong_user:
            examples = resources.once("wrong users", lambda: _swapped(examples, resources.seed), examples)
        orders = resources.ranking(self.retriever, examples, self.folder, self.draw)
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
        if self.turns:
            if not processor.chat:
                raise ConfigurationError(
                    "':turns' shows items as turns of a chat, and this language model has no chat template or is asked "
                    "without it (chat='never')."
                )
            turns = [
                turns_of(resources.task, e.prompt, items, processor, budget)
                for e, items in zip(tqdm(examples, desc="Writing turns"), found, strict=True)
            ]
            counts = _counts(found, list(map(len, turns)))
            return ModelInputs([e.prompt for e in examples], turns=turns, counts=counts)
        room = text_budget(processor, budget)
        prompts = [
            retrieval_prompt(resources.task, e.prompt, items, processor.tokenizer, room)
            for e, items in zip(tqdm(examples, desc="Writing prompts"), found, strict=True)
        ]
        counts = _counts(found, [prompt.items for prompt in prompts])
        places = persona_positions(processor, prompts, budget) if positions else None
        return ModelInputs([prompt.text for prompt in prompts], positions=places, counts=counts)

    def about(self, resources: Resources) -> dict[str, object]:
        return {"cost": resources.artefact(self.folder).about.get("cost", {})} if self.folder else {}

    def parts(self, resources: Resources) -> Sequence[Method]:
        fused = resources.fused() if self.retriever == "rrf" else {}
        return [Retrieval(name, self.k, folder=folder) for name, folder in fused.items() if folder]

    def key(self, resources: Resources) -> dict[str, object]:
        key = resources.ranker_key(self.retriever, self.folder)
        return key | {"seed": resources.seed + self.draw} if self.wrong_user or self.draw else key


def _counts(found: Sequence[Sequence[object]], shown: Sequence[int]) -> dict[str, int]:
    """Return how many items were found and shown, and how many prompts show none."""
    return {
        "retrieved_items": sum(map(len, found)),
        "shown_items": sum(shown),
        "prompts_without_items": sum(n == 0 for n in shown),
    }


def _swapped(examples: Sequence[Example], seed: int) -> list[Example]:
    """Return the examples, each with another user's history."""
    donors = shuffle_histories(examples, seed)
    return [replace(e, history=examples[donor].history) for e, donor in zip(examples, donors, strict=True)]


@dataclass(frozen=True)
class Trained(Method):
    """A method that was trained and comes as an artefact, see `artefacts.py`. A subclass defines `answer` or `inputs`.

    Args:
        name: what the user calls it.
        folder: of the artefact.
        change: what is changed for a comparison, one of `changes`; "" for nothing.
        retrieval: also put retrieved items into the prompt.
    """

    changes: ClassVar[tuple[str, ...]] = ()  # what may stand behind the colon, as in NAME:wrong-user
    takes_retrieval: ClassVar[bool] = False  # NAME+RANKER@K is a method

    name: str
    folder: str = ""
    change: str = ""
    retrieval: Retrieval | None = None

    @property
    def needs(self) -> frozenset[Need]:
        return self.retrieval.needs if self.retrieval else frozenset()

    def check(self, examples: Sequence[Example], resources: Resources) -> None:
        resources.artefact(self.folder).check_task(resources.task.name, resources.task.digest)
        if self.change == "wrong-user":
            check_two_users(examples, "wrong-user")
        if self.retrieval:
            self.retrieval.check(examples, resources)

    def parts(self, resources: Resources) -> Sequence[Method]:
        return [self.retrieval] if self.retrieval else []

    def key(self, resources: Resources) -> dict[str, object]:
        key: dict[str, object] = {"artefact": resources.artefact(self.folder).digest}
        if self.change == "wrong-user":
            key["seed"] = resources.seed
        return key | (self.retrieval.key(resources) if self.retrieval else {})
