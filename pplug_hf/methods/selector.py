"""`Selector`: for each question the answer of one row out of a pool, chosen by what was learned in `selection.py`.

A selector that reads prompts alone (pre) asks the language model once per question, one that reads answers too (post)
as often as its pool has rows; answers that the same comparison has made already are not made again.

n questions, R rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from ..data.records import Example
from ..errors import ConfigurationError, MismatchError
from .adapters import UserAdapters
from .artefacts import read_artefact
from .base import Method, Need, Trained
from .decoding import Answers
from .digests import differences
from .names import Folders, methods_of, read_name
from .resources import Resources
from .selection import ENCODER, HEAD, SelectionModel, TextForm, choose

KIND = "selector"


class Selector(Trained):
    """Answers with the row of its pool that a trained model chooses; arguments as of `Trained`."""

    reads_answers = True

    @property
    def needs(self) -> frozenset[Need]:
        members = [read_name(row) for row in _pool(self.folder)]
        return frozenset().union(*(member.needs for member in members if member))

    def check(self, examples: Sequence[Example], resources: Resources) -> None:
        super().check(examples, resources)
        for row, seeds in self._rows(resources).items():
            try:
                seeds[0].check(examples, resources)
            except ConfigurationError as error:
                raise ConfigurationError(f"The selector {self.name} cannot choose the row {row}: {error}") from error

    def fit(self, train: Sequence[Example], resources: Resources) -> None:
        # Members are fitted if they have to answer: their answers may be there already.
        resources.once(("training", self.folder), lambda: train)

    def answer(self, examples: Sequence[Example], resources: Resources) -> Answers:
        members = self.members(resources)
        model, settings = self._model(resources), resources.artefact(self.folder).settings
        answers = None
        if settings["reads"] == "answers":
            answers = [self._answers(row, method, examples, resources) for row, method in members.items()]
        texts = texts_of(model, members, examples, resources, answers)
        choices = choose(model.scores(texts, resources.batch_size))
        chosen = [""] * len(examples)
        for m, (row, method) in enumerate(members.items()):
            places = [i for i, choice in enumerate(choices) if choice == m]
            if answers is not None:
                own = [answers[m][i] for i in places]
            else:
                own = self._answers(row, method, examples, resources, places) if places else []
            for i, text in zip(places, own, strict=True):
                chosen[i] = text
        counts = {f"chosen {row}": n for row, n in Counter(list(members)[m] for m in choices).items()}
        counts |= {"selector_texts": len(members) * len(examples), "cut_selector_texts": model.count_cut(texts)}
        return Answers(chosen, counts)

    def members(self, resources: Resources) -> dict[str, Method]:
        """Return the rows of the pool, those whose answers the selector learned from: name -> method.

        Raises:
            MismatchError: this comparison has others under these names, or another language model.
        """
        return resources.once(("pool", self.folder), lambda: self._members(resources))

    def _members(self, resources: Resources) -> dict[str, Method]:
        artefact, rows = resources.artefact(self.folder), self._rows(resources)
        if artefact.settings["backbone"] != resources.backbone_digest:
            raise MismatchError(
                f"The selector {self.name} has learned from the answers of another language model: train one for this one."
            )
        learned = {name: artefact.run[name] for name in resources.asking if name in artefact.run}
        asking = {name: resources.asking[name] for name in learned}
        if learned != asking:
            raise MismatchError(
                f"The selector {self.name} has learned from answers to prompts of another form, or decoded otherwise; these "
                f"differ: {', '.join(differences(learned, asking))}. Pass the same here, or train one for these."
            )
        members = {}
        for (row, seeds), known in zip(rows.items(), artefact.settings["pool"].values(), strict=True):
            keys = [pool_key(method, resources) for method in seeds]
            if known not in keys:
                raise MismatchError(
                    f"The selector {self.name} has learned from another row {row} than this comparison has; these differ: "
                    f"{', '.join(differences(known, keys[0]))}. Name what it was trained with, or train it again."
                )
            members[row] = seeds[keys.index(known)]
        return members

    def _rows(self, resources: Resources) -> dict[str, list[Method]]:
        """Return the rows of the pool with all their seeds."""
        try:
            return methods_of(_pool(self.folder), resources.plugs, resources.trained)
        except ConfigurationError as error:
            raise ConfigurationError(
                f"The selector {self.name} chooses among {', '.join(_pool(self.folder))}, and this comparison cannot make "
                f"all of them: {error}"
            ) from error

    def _answers(
        self,
        row: str,
        method: Method,
        examples: Sequence[Example],
        resources: Resources,
        chosen: Sequence[int] | None = None,
    ) -> list[str]:
        """Return the answers of a row to all or to chosen examples, by the language model unless they are there."""

        def make(asked: Sequence[Example]) -> list[str]:
            if "training" in method.needs:
                method.fit(resources.once(("training", self.folder), list), resources)
            return method.answer(asked, resources).texts

        return resources.answers(row, method.key(resources), examples, make, chosen)

    def _model(self, resources: Resources) -> SelectionModel:
        def load() -> SelectionModel:
            artefact = resources.artefact(self.folder)
            form, device = TextForm(**artefact.settings["form"]), resources.language_model.device
            return SelectionModel.load(artefact.folder_of(ENCODER), artefact.file(HEAD), form, device)

        return resources.once(("selector", self.folder), load)

    def key(self, resources: Resources) -> dict[str, object]:
        pool = {row: method.key(resources) for row, method in self.members(resources).items()}
        return {**super().key(resources), "pool": pool}

    def parts(self, resources: Resources) -> Sequence[Method]:
        return list(self.members(resources).values())

    def about(self, resources: Resources) -> dict[str, object]:
        artefact, R = resources.artefact(self.folder), len(_pool(self.folder))
        cost = {"generations_per_question": R if artefact.settings["reads"] == "answers" else 1}
        return {
            "cost": cost | artefact.about.get("cost", {}),
            "encoder_passes_per_question": R,
            "training_seed": artefact.run.get("seed"),
        }


def pool_methods(
    names: Sequence[str], plugs: Folders | None = None, trained: Folders | None = None
) -> dict[str, Method]:
    """Return the rows of a pool: name -> method, the first seed of each.

    Args:
        names: of the rows, in the order in which equally good ones are preferred.
        plugs: name -> places, as of `methods_of`.
        trained: likewise.

    Raises:
        ConfigurationError: fewer than two rows, one that depends on who else is asked, one with weights of single users, or a
            selector.
    """
    methods = {row: seeds[0] for row, seeds in methods_of(names, plugs, trained).items()}
    if len(methods) < 2:
        raise ConfigurationError(
            f"A selector chooses among two or more different rows, and the pool has {len(methods)}."
        )
    for row, method in methods.items():
        if "wrong-user" in row or "nearest-user" in row:
            raise ConfigurationError(f"The row {row} depends on who else is asked: leave it out of the pool.")
        if isinstance(method, UserAdapters):
            raise ConfigurationError(
                f"The row {row} answers with weights of the users of one split, and a selector learns from the train split and "
                "answers another: leave it out of the pool."
            )
        if method.reads_answers:
            raise ConfigurationError(f"The row {row} reads answers of other rows itself: leave it out of the pool.")
    return methods


def pool_key(method: Method, resources: Resources) -> dict[str, object]:
    """Return what a row of a pool is known by: its key without the seed of random draws."""
    return {name: value for name, value in method.key(resources).items() if name != "seed"}


def texts_of(
    model: SelectionModel,
    members: Mapping[str, Method],
    examples: Sequence[Example],
    resources: Resources,
    answers: Sequence[Sequence[str]] | None = None,
) -> list[list[str]]:
    """Return what a selection model reads of n questions, n lists of R texts.

    Args:
        model: says which form they have.
        members: R rows of the pool.
        examples: n of them.
        resources: shared by all methods.
        answers: of these rows, R lists of n; None to choose before anything is answered.
    """
    prompts = [_prompts(method, examples, resources) for method in members.values()]
    return model.form.texts(model.separator, [e.query for e in examples], prompts, answers)


def _prompts(method: Method, examples: Sequence[Example], resources: Resources) -> list[str]:
    """Return the prompts of a method with their turns; the inputs alone for one that asks otherwise."""
    if type(method).inputs is Method.inputs:
        return [e.prompt for e in examples]
    inputs = method.inputs(examples, resources)
    turns = inputs.turns or [()] * len(examples)
    return [
        "\n".join([*(text for turn in past for text in turn), prompt])
        for past, prompt in zip(turns, inputs.prompts, strict=True)
    ]


def _pool(folder: str) -> list[str]:
    return list(read_artefact(folder, KIND).settings["pool"]) if folder else []
