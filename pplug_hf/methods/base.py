"""`Method`: a way to answer users' questions with one frozen language model.

    class Shout(Method):
        def inputs(self, examples, resources):
            return ModelInputs([e.prompt.upper() for e in examples])

    register_method("shout", Shout)  # in names.py; then: pplug-hf bench --rows no-persona shout ...

A method that only changes what the language model reads defines `inputs`; one that does more (chooses between the
answers of other methods, changes the model for each example) defines `answer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from ..data.records import Example
from .decoding import Answers, ModelInputs
from .resources import Resources

# "training": examples of the train split, which `fit` gets; "labels": a task whose history items carry one of a list of
# labels; "encoder": a sentence encoder besides those of its own folder.
Need = Literal["training", "labels", "encoder"]


class Method:
    """Base class: override `inputs` or `answer`, and what else differs."""

    folder: str = ""  # where its trained part is, if it has one; several seeds are several methods of one name

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
        raise NotImplementedError(f"{type(self).__name__} has to define inputs or answer.")

    def answer(self, examples: Sequence[Example], resources: Resources) -> Answers:
        """Return an answer to each example, in their order.

        Args:
            examples: n of them, with histories.
            resources: shared by all methods.
        """
        return resources.generate(self.inputs(examples, resources))

    def key(self, resources: Resources) -> dict[str, Any]:
        """Return what else than data, language model and decoding determines the answers, as JSON takes it.

        Args:
            resources: shared by all methods.
        """
        return {}

    def about(self, resources: Resources) -> dict[str, Any]:
        """Return facts to keep with the answers, as JSON takes them.

        Args:
            resources: shared by all methods.
        """
        return {}
