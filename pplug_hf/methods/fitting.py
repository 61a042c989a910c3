"""`FitJob`: what `pplug-hf fit` gives to the function that trains a method.

    def train(job: FitJob) -> Artefact:
        draft = job.draft("ranker", encoder="1f...")         # new, or continued after a kill
        if draft.finished:
            return draft.finished
        ...                                                   # learn from job.users.fit, choose by job.users.held
        return draft.finish({**job.settings(), ...}, about={"curve": [...]})

A method is one line of `FIT` in `fit_options.py`: its name, its options, and the function's place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from ..data.histories import UserSplit
from ..data.records import Example, data_digest
from ..errors import ConfigurationError
from ..tasks.task import Task
from .artefacts import Draft
from .fit_options import PLACES, POSITIVE
from .resources import Resources


@dataclass(frozen=True)
class FitJob:
    """A training.

    Attributes:
        method: its name, one of `FIT`.
        task: what is asked.
        users: the examples of the train split in three parts, of different users.
        train: questions that rows with counts are fitted on, as a bench does: of all users but those left out.
        read: returns the examples of another split, or nothing if there is none; nothing of them may be learned.
        other_splits: names of all splits besides train.
        resources: language model, decoding, encoders and vectors.
        options: of the method.
        output: folder of the artefact.
        seed: of the training.
        split: how the users were divided.
        resume: go on where a killed training stopped.

    Raises:
        ConfigurationError: an option that must be greater than 0 is not.
    """

    method: str
    task: Task
    users: UserSplit
    train: Sequence[Example]
    read: Callable[[str], list[Example]]
    other_splits: Sequence[str]
    resources: Resources
    options: Any
    output: str
    seed: int
    split: Mapping[str, Any]
    resume: bool = True

    def __post_init__(self) -> None:
        for name in POSITIVE:
            value = getattr(self.options, name, None)
            if value is not None and value <= 0:
                raise ConfigurationError(f"{name} is {value}; give more than 0.")

    def settings(self) -> dict[str, object]:
        """Return what every artefact keeps in its settings: the method, and the task that it belongs to."""
        return {"method": self.method, "task": {"name": self.task.name, "digest": self.task.digest}}

    @cached_property
    def run(self) -> dict[str, object]:
        """Everything that determines the training: data, language model, decoding, options and seed, without places."""
        resources, task = self.resources, self.task
        examples = [*self.users.fit, *self.users.select, *self.users.held]
        return {
            "method": self.method,
            "task": task.digest,
            "data": data_digest(task, examples, answers=True),
            "split": dict(self.split),
            "backbone": resources.backbone_digest,
            **resources.asking,
            "options": {name: value for name, value in asdict(self.options).items() if name not in PLACES},
            "seed": self.seed,
        }

    def draft(self, kind: str, **digests: object) -> Draft:
        """Open the output folder.

        Args:
            kind: of the artefact.
            **digests: further things that determine the training, such as the encoder's digest.
        """
        return Draft.open(self.output, kind, self.run | digests, self.resume)
