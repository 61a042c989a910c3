"""`Runner`: answers of methods to the same examples, by one language model and one decoding.

    resources = Resources(task, plugs={"pplug": ["runs/a", "runs/b"]})
    runner = Runner(resources, examples, folder=Path("bench/predictions"))
    for made in runner.run(methods_of(["bm25@4", "pplug:top-4"], resources.plugs)):
        print(made.row, made.run, made.answers)

With a folder, every finished run is kept there, and none is answered again as long as its key is the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from ..data.records import Example
from ..errors import ConfigurationError, DataError
from ..methods.base import Method
from ..methods.resources import Resources
from .attention_profile import weight_profile
from .predictions import Prediction, differences, file_name, read_predictions, write_prediction
from .provenance import data_digest, git_commit, shared_key


class Run(NamedTuple):
    """One seed of a row."""

    row: str
    number: int
    method: Method


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
        task = self.resources.task
        for row, (method, *_) in methods.items():
            if "labels" in method.needs and not (task.labels and task.answer_field):
                raise ConfigurationError(
                    f"The row {row} is for tasks whose items carry one of a list of labels, and {task.name} has "
                    "none: leave it out."
                )
            if "training" in method.needs and not self.training:
                raise ConfigurationError(
                    f"The row {row} is fitted on the train split, and no examples of it are there or left: leave it "
                    "out, or choose another leave_out_users."
                )
            if "encoder" in method.needs and not self.resources.retriever and not self.resources.plugs:
                raise ConfigurationError(
                    f"The row {row} needs a sentence encoder: pass retriever, or a plug, which brings its own."
                )
            method.check(self.examples, self.resources)

    def run(self, methods: Mapping[str, Sequence[Method]]) -> list[Prediction]:
        """Answer what the folder does not have yet.

        Args:
            methods: as in `check`.

        Returns:
            The predictions of all seeds of all rows, in their order.
        """
        runs = [Run(row, i, method) for row, seeds in methods.items() for i, method in enumerate(seeds)]
        keys = {run[:2]: self._key(run) for run in runs} if self.folder else {}
        saved = {(made.row, made.run): made for made in read_predictions(self.folder)} if self.folder else {}
        done: dict[tuple[str, int], Prediction] = {}
        for run in runs:
            made = saved.pop(run[:2], None)
            if made and made.key == keys[run[:2]]:
                done[run[:2]] = made
            elif made:
                print(f"Again: {made.file} was made with another {', '.join(differences(made.key, keys[run[:2]]))}.")
        if done:
            print(f"{len(done)} of {len(runs)} runs are there already.")
        if saved:
            files = ", ".join(sorted(made.file for made in saved.values()))
            print(f"In the folder and not in the table, because they were not asked for: {files}.")
        todo = [run for run in runs if run[:2] not in done]
        with tqdm(total=len(todo), desc="Rows", unit="row", disable=len(todo) < 2) as bar:
            for run in _by_folder(todo):
                done[run[:2]] = made = self._answer(run, keys.get(run[:2], {}))
                if self.folder:
                    write_prediction(self.folder, self.resources.task, made)
                bar.update()
        return [done[run[:2]] for run in runs]

    def _answer(self, run: Run, key: dict[str, Any]) -> Prediction:
        row, number, method = run
        start = time.monotonic()
        if "training" in method.needs:
            method.fit(self.training, self.resources)
        texts, counts, weights = method.answer(self.examples, self.resources)
        about: dict[str, Any] = {"seconds": round(time.monotonic() - start, 1)}
        about |= {"device": str(self.resources.language_model.device.type), "git_commit": self._commit}
        about |= {**({"prompts": counts} if counts else {}), **method.about(self.resources)}
        if weights is not None and (profile := weight_profile(weights, self.examples)) is not None:
            about["weights"] = profile
        answers = {e.id: text for e, text in zip(self.examples, texts, strict=True)}
        return Prediction(row, number, key, about, answers, file_name(row, number if method.folder else None))

    def _key(self, run: Run) -> dict[str, Any]:
        """Return everything that determines the answers of a run, as JSON takes it."""
        key = {"row": run.row, **self._shared_key, **run.method.key(self.resources)}
        return key | ({"training": self._training_digest} if "training" in run.method.needs else {})

    @cached_property
    def _shared_key(self) -> dict[str, Any]:
        return shared_key(self.resources, self.examples)

    @cached_property
    def _training_digest(self) -> str:
        return data_digest(self.resources.task, self.training, answers=True)

    @cached_property
    def _commit(self) -> str | None:
        return git_commit()


def _by_folder(runs: Iterable[Run]) -> list[Run]:
    """Sort runs so that each plug is loaded once; what needs none comes first."""
    folders = list(dict.fromkeys(["", *(run.method.folder for run in runs)]))
    return sorted(runs, key=lambda run: folders.index(run.method.folder))
