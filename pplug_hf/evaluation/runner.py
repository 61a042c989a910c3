"""`Runner`: answers of methods to the same examples, by one language model and one decoding.

    resources = Resources(task, plugs={"pplug": ["runs/a", "runs/b"]})
    runner = Runner(resources, examples, folder=Path("bench/predictions"))
    for made in runner.run(methods_of(["bm25@4", "pplug:top-4"], resources.plugs)):
        print(made.row, made.run, made.answers)

With a folder, every finished run is kept there, and none is answered again as long as its key is the same.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..data.records import Example, data_digest
from ..errors import ConfigurationError, DataError, MismatchError
from ..methods.base import Method, whole_cost
from ..methods.digests import differences
from ..methods.resources import Resources
from .attention_profile import weight_profile
from .predictions import (
    Prediction,
    file_name,
    git_commit,
    note_others,
    read_predictions,
    shared_key,
    write_prediction,
)

_MISSING = {
    "labels": "is for tasks whose items carry one of a list of labels, and {task} has none: leave it out.",
    "training": "is fitted on the train split, and no examples of it are there or left: leave it out, or choose another "
    "leave_out_users.",
    "encoder": "needs a sentence encoder: pass retriever, or a plug, which brings its own.",
}


@dataclass
class Runner:
    """Answers examples with methods.

    Args:
        resources: shared by the methods.
        examples: what is asked.
        training: examples of the train split for methods that are fitted, of users whom the language model does not
            know.
        folder: of the predictions; without one they are not kept.

    Raises:
        DataError: there are no examples.
    """

    resources: Resources
    examples: Sequence[Example]
    training: Sequence[Example] = ()
    folder: Path | None = None

    def __post_init__(self) -> None:
        if not self.examples:
            raise DataError("There are no questions to answer: choose another split.")

    def check(self, methods: Mapping[str, Sequence[Method]]) -> None:
        """Raise for what would fail later, before anything is loaded.

        Args:
            methods: name of a row -> one method per seed.

        Raises:
            PPlugError: a method or the decoding needs something that the task, the data or the settings do not have.
        """
        self.resources.check()
        task, plugs = self.resources.task, self.resources.plugs
        needs = {
            "labels": bool(task.labels and task.answer_field),
            "training": bool(self.training),
            "encoder": bool(self.resources.retriever or plugs),
        }
        for row, method in ((row, method) for row, seeds in methods.items() for method in seeds):
            if missing := [need for need in needs if need in method.needs and not needs[need]]:
                raise ConfigurationError(f"The row {row} {_MISSING[missing[0]].format(task=task.name)}")
            if type(method).inputs is Method.inputs and type(method).answer is Method.answer:
                raise ConfigurationError(
                    f"The row {row} cannot answer: its class {type(method).__name__} has to define inputs or answer."
                )
            method.check(self.examples, self.resources)

    def run(self, methods: Mapping[str, Sequence[Method]]) -> list[Prediction]:
        """Answer what the folder does not have yet.

        Args:
            methods: as in `check`.

        Returns:
            The predictions of all seeds of all rows, in their order.
        """
        runs = {(row, i): method for row, seeds in methods.items() for i, method in enumerate(seeds)}
        keys = {run: self._key(run[0], method) for run, method in runs.items()} if self.folder else {}
        saved = {(made.row, made.run): made for made in read_predictions(self.folder)} if self.folder else {}
        done = {run: saved[run] for run in runs if run in saved and saved[run].key == keys[run]}
        for run in [run for run in runs if run in saved and run not in done]:
            names = ", ".join(differences(saved[run].key, keys[run]))
            print(f"Again: {saved[run].file} was made with another {names}.")
        if done:
            print(f"{len(done)} of {len(runs)} runs are there already.")
        note_others(saved, runs)
        todo = {run: method for run, method in runs.items() if run not in done}
        folders = list(dict.fromkeys(["", *(method.folder for method in todo.values())]))
        with tqdm(total=len(todo), desc="Rows", unit="row", disable=len(todo) < 2) as bar:
            # Each plug is loaded once; what needs none comes first, and what reads the answers of others last.
            order = sorted(todo, key=lambda run: (todo[run].reads_answers, folders.index(todo[run].folder)))
            if reads := any(method.reads_answers for method in todo.values()):
                for run, made in done.items():
                    self._remember(runs[run], made)
            for run in order:
                bar.set_postfix_str(run[0])
                done[run] = self._answer(*run, todo[run], keys.get(run, {}))
                if reads:
                    self._remember(todo[run], done[run])
                if self.folder:
                    write_prediction(self.folder, self.resources.task, done[run])
                bar.update()
        return [done[run] for run in runs]

    def _remember(self, method: Method, made: Prediction) -> None:
        """Keep answers for methods that read them."""
        texts = [made.answers[e.id] for e in self.examples]
        self.resources.answers(made.row, method.key(self.resources), self.examples, lambda _: texts)

    def _answer(self, row: str, number: int, method: Method, key: dict[str, object]) -> Prediction:
        start = time.monotonic()
        if "training" in method.needs:
            method.fit(self.training, self.resources)
        texts, counts, weights, cost = method.answer(self.examples, self.resources)
        if len(texts) != len(self.examples):
            raise MismatchError(
                f"{row} gave {len(texts)} answers to {len(self.examples)} questions: give one to each."
            )
        about: dict[str, Any] = {"seconds": round(time.monotonic() - start, 1)}
        about |= {"device": str(self.resources.language_model.device.type), "git_commit": git_commit()}
        about |= {**({"prompts": counts} if counts else {}), **method.about(self.resources)}
        if whole := whole_cost(method, self.resources, cost):
            about["cost"] = whole
        if weights is not None and (profile := weight_profile(weights, self.examples)) is not None:
            about["weights"] = profile
        answers = {e.id: text for e, text in zip(self.examples, texts, strict=True)}
        return Prediction(
            row, number, key, about, answers, file_name(row, number if method.folder or number else None)
        )

    def _key(self, row: str, method: Method) -> dict[str, object]:
        """Return everything that determines the answers of a method, as JSON takes it."""
        key: dict[str, object] = {"row": row, **self._shared_key, **method.key(self.resources)}
        return key | ({"training": self._training_digest} if "training" in method.needs else {})

    @cached_property
    def _shared_key(self) -> dict[str, object]:
        return shared_key(self.resources, self.examples)

    @cached_property
    def _training_digest(self) -> str:
        return data_digest(self.resources.task, self.training, answers=True)
