"""`UserAdapters`: answers by weights that were trained for the user who asks, from an artefact of `adapter_fit.py`.

| row | what answers |
|---|---|
| `NAME` | the language model with the user's own weights |
| `NAME:wrong-user` | with another user's: how much of the gain is not the user's own |
| `NAME:no-history` | with what all users share: nothing (`ftp`), the LoRA of the task (`oppu`), a plug's soft prompt (`user-tokens`) |
| `NAME+bm25@1` | with the user's own, if prompts of the training showed one item found by bm25 |

A user without weights is answered as in `NAME:no-history`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from safetensors.torch import load_file
from tqdm import tqdm

from ..data.records import Example, some
from ..errors import DataError, MismatchError
from ..optional import require
from .adapter_folder import SHARED, TRAINING, USERS, item_hash, open_weights, user_hash
from .base import COSTS, Plain, Trained
from .decoding import Answers, ModelInputs, shuffle_histories
from .private_prompt import PrivatePrompt
from .resources import Resources


@dataclass(frozen=True)
class UserAdapters(Trained):
    """Weights of one user at a time on the language model. Arguments as of `Trained`."""

    changes: ClassVar[tuple[str, ...]] = ("wrong-user", "no-history")
    takes_retrieval: ClassVar[bool] = True

    def check(self, examples: Sequence[Example], resources: Resources) -> None:
        super().check(examples, resources)
        artefact = resources.artefact(self.folder)
        if artefact.kind != "user-tokens":
            require("peft", "rivals", f"The row {self.name}")
        trained, found = artefact.settings["retrieval"], self.retrieval
        asked = found and f"{found.retriever}@{found.k}" + ":turns" * found.turns
        if trained != asked:
            row = f"{self.name}+{trained}" if trained else self.name
            another = f"with --retrieval {asked}" if asked else "without --retrieval"
            raise MismatchError(
                f"{str(artefact.folder)!r} was trained with {trained or 'no retrieved items'} in its prompts, and is asked with "
                f"{asked or 'none'}: name the row {row}"
                + ("." if found and found.turns else f", or train another artefact {another}.")
            )
        if artefact.settings["items"] == "common":
            self._check_items(examples, resources)
        if self.change != "no-history" and not any(self._places(examples, resources)):
            raise DataError(
                f"{str(artefact.folder)!r} has weights for none of the {len({e.user for e in examples})} users who are asked: "
                "train weights for the users of this split (--split)."
            )

    def _check_items(self, examples: Sequence[Example], resources: Resources) -> None:
        """Refuse weights that have seen an item which a question's history does not have."""
        artefact, seen = resources.artefact(self.folder), {}
        leaking = []
        for e in examples:
            place = f"{USERS}/{user_hash(e.user)}/{TRAINING}"
            if place not in artefact.files:
                continue
            if place not in seen:
                seen[place] = set(json.loads(artefact.file(place).read_text(encoding="utf-8"))["items"])
            if not seen[place] <= set(map(item_hash, e.history)):
                leaking.append(e.id)
        if leaking:
            raise DataError(
                f"{str(artefact.folder)!r} was trained on items that these questions do not have in their histories: "
                f"{some(leaking)}. The answers may be among them: train weights for these questions (the same data, split "
                "and max_items)."
            )

    def key(self, resources: Resources) -> dict[str, object]:
        self._check_language_model(resources)
        return super().key(resources)

    def _check_language_model(self, resources: Resources) -> None:
        """Refuse a language model, or a form of its prompts, that is not the one of the training."""
        artefact, processor = resources.artefact(self.folder), resources.processor
        if artefact.settings["backbone"] != resources.backbone_digest:
            raise MismatchError(
                f"{str(artefact.folder)!r} was trained on another language model, or in another data type: name that one, or "
                "train weights for this one."
            )
        if artefact.kind == "user-tokens":
            return
        chat = [processor.chat, processor.system]
        if artefact.settings["chat"] != chat:
            raise MismatchError(
                f"{str(artefact.folder)!r} was trained with the chat form and system text {artefact.settings['chat']}, and is "
                f"asked with {chat}: pass the same chat and system."
            )
        trained = artefact.run.get("chat")
        if processor.chat and trained and trained[0] != processor.tokenizer.chat_template:
            raise MismatchError(
                f"{str(artefact.folder)!r} was trained with another chat template than the language model's tokenizer has now: "
                "name the tokenizer's former version, or train weights for this one."
            )

    def inputs(self, examples: Sequence[Example], resources: Resources) -> ModelInputs:
        return (self.retrieval or Plain()).inputs(examples, resources)

    def answer(self, examples: Sequence[Example], resources: Resources) -> Answers:
        self._check_language_model(resources)
        artefact = resources.artefact(self.folder)
        inputs = self.inputs(examples, resources)
        rows_of: dict[str | None, list[int]] = {}
        for row, place in enumerate(self._places(examples, resources)):
            rows_of.setdefault(place, []).append(row)
        if artefact.kind != "ftp":
            artefact.folder_of(SHARED)  # raises if a file is damaged
        start = load_file(artefact.folder / SHARED / PrivatePrompt.file) if artefact.kind == "user-tokens" else None
        texts: dict[int, str] = {}
        with open_weights(artefact.folder, artefact.kind, resources, artefact.settings) as weights:
            for place, rows in tqdm(rows_of.items(), desc=f"Users of {self.name}", unit="user"):
                if place is None:
                    weights.reset(0, start)  # a fresh LoRA changes nothing
                else:
                    weights.load(load_file(artefact.file(f"{place}/{weights.file}")))
                texts |= zip(rows, weights.generate(_of_rows(inputs, rows), resources).texts, strict=True)
        counts = dict(inputs.counts)
        if self.change != "no-history":
            counts["without_own_weights"] = len(rows_of.get(None, ()))
        return Answers([texts[row] for row in range(len(examples))], counts)

    def about(self, resources: Resources) -> dict[str, object]:
        artefact = resources.artefact(self.folder)
        cost, passes = {}, []
        if artefact.kind == "oppu":  # the LoRA of the task has the shape of the private ones
            task = json.loads(artefact.file(f"{SHARED}/{TRAINING}").read_text(encoding="utf-8"))
            cost["trained_weights"] = artefact.about["weights_per_user"]
            passes.append(task["passes"] * task["pairs"])
        if self.change != "no-history":
            cost |= {name: value for name, value in artefact.about.items() if name in COSTS}
            passes.append(artefact.about["trained_examples"])
        if passes:
            cost["language_model_passes"] = sum(passes)
        return {"adapters": {**artefact.about, "items": artefact.settings["items"]}, "cost": cost}

    def _places(self, examples: Sequence[Example], resources: Resources) -> list[str | None]:
        """Return the folder of the weights that answer each example; None for those that all users share."""
        files = resources.artefact(self.folder).files
        place_of = {e.user: f"{USERS}/{user_hash(e.user)}" for e in examples}
        there = {user: place if f"{place}/{TRAINING}" in files else None for user, place in place_of.items()}
        if self.change == "no-history":
            return [None] * len(examples)
        if self.change != "wrong-user":
            return [there[e.user] for e in examples]
        able = [e if there[e.user] else replace(e, history=[]) for e in examples]
        return [there[examples[donor].user] for donor in shuffle_histories(able, resources.seed)]


def _of_rows(inputs: ModelInputs, rows: Sequence[int]) -> ModelInputs:
    """Return the inputs of some rows."""
    turns = None if inputs.turns is None else [inputs.turns[row] for row in rows]
    return ModelInputs([inputs.prompts[row] for row in rows], turns=turns)
