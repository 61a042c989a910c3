"""Fitting of private weights: one LoRA per user (`ftp`), one on top of a LoRA of the task (`oppu`), or soft tokens.

| kind | shared by all users | private |
|---|---|---|
| `ftp` | nothing | LoRA |
| `oppu` | a LoRA of the task, trained on other users' questions and added to the language model's weights | LoRA |
| `user-tokens` | a plug's soft prompt for users without history | soft tokens, which start as the plug's for this user |

n pairs of one user, P soft tokens, H backbone width.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from ..data.histories import newest
from ..data.records import Example, data_digest
from ..errors import ConfigurationError, DataError, MissingFileError
from ..modeling.backbone import backbone_digest
from ..modeling.encoders import History
from ..optional import require
from ..storage.files import atomic_write, locked, new_folder
from .adapter_folder import SHARED, USERS, cost, item_hash, open_weights, save_folder, short_hash, user_hash
from .artefacts import Artefact
from .base import Retrieval
from .digests import json_digest
from .fitting import FitJob
from .pair_training import PairTraining, eager_attention, train_on_pairs
from .persona import plug_digest
from .private_prompt import PROMPT, PrivatePrompt
from .private_weights import Lora, LoraShape, PrivateWeights, check_modules
from .prompts import retrieval_prompt, text_budget
from .resources import Resources
from .retrievers import get_ranker
from .user_pairs import Asked, ItemsRule, Pair, check_pairs, questions_by_user, user_pairs

AdapterKind = Literal["ftp", "oppu", "user-tokens"]
_RANKERS = ("recency", "bm25", "bm25s")


@dataclass(frozen=True, kw_only=True)
class AdapterFit:
    """Everything that determines private weights besides data and language model.

    Args:
        kind: see above.
        items: which items of a user with several questions are used.
        max_items: use only this many of a user's newest items.
        retrieval: put retrieved items into every prompt, in training and later.
        lora: shape of every LoRA.
        private: training of a user's weights.
        shared: training of the LoRA of the task.
        max_length: cut prompts to this many tokens.
        seed: of everything that is drawn.
    """

    kind: AdapterKind
    items: ItemsRule = "common"
    max_items: int | None = None
    retrieval: Retrieval | None = None
    lora: LoraShape = field(default_factory=LoraShape)
    private: PairTraining = field(default_factory=PairTraining)
    shared: PairTraining = field(default_factory=PairTraining)
    max_length: int = 256
    seed: int = 0


def train(job: FitJob) -> Artefact | None:
    """Train the weights of every user who is asked something and has an item to train on.

    Args:
        job: of one of the methods above. The LoRA of the task learns from `job.users.fit`, without the users who are asked,
            and without questions that are asked.

    Returns:
        The artefact; None as long as other shards have users left.

    Raises:
        ConfigurationError: the options do not fit the task or the folder.
        DataError: nobody has an item to train on, or no question is left for the LoRA of the task.
        MissingPackageError: peft is not installed.
    """
    fit, task, resources, plug = _settings(job), job.task, job.resources, getattr(job.options, "plug", "")
    first, shards = _shard(job.options.shard)
    if fit.kind != "user-tokens":
        require("peft", "rivals", f"The method {fit.kind}")
    check_pairs(task)
    asked = list(job.users.held) if job.options.split == "held" else _asked(job)
    questions = Asked.of(asked, task)
    pairs = {
        user: found
        for user, own in questions_by_user(asked).items()
        if (found := user_pairs(own, task, questions, fit.items, fit.max_items))
    }
    if not pairs:
        raise DataError("No user has an item to train on: they lack an answer, or the questions ask for them.")
    others = _other_questions(job.users.fit, asked, questions) if fit.kind == "oppu" else []
    if fit.kind != "user-tokens":
        check_modules(resources.language_model, fit.lora.modules)
    draft = job.draft(
        fit.kind,
        asked=data_digest(task, asked, answers=False),
        own=[task.own_prompt, task.own_answer],
        plug=plug_digest(plug, resources.config(plug)) if plug else None,
    )
    if draft.finished:
        return draft.finished
    known = questions_by_user(asked) if job.options.split == "held" else {}
    fitting = _Fitting(fit, draft.folder, resources, plug, known)
    with eager_attention(resources.language_model):
        fitting.shared(others, getattr(job.options, "task_loras", ""))
        fitting.users({user: pairs[user] for user in sorted(pairs, key=user_hash)[first::shards]})
    if backbone_digest(resources.language_model, resources.processor.tokenizer) != resources.backbone_digest:
        raise DataError("The language model is not what it was before the training: its weights must stay frozen.")
    if missing := [user for user in pairs if not (draft.folder / USERS / user_hash(user)).is_dir()]:
        print(f"{len(missing)} of {len(pairs)} users are left to other shards.")
        return None
    settings = {
        **job.settings(),
        "backbone": resources.backbone_digest,
        "chat": [resources.processor.chat, resources.processor.system],
        "items": fit.items,
        "retrieval": None if fit.retrieval is None else f"{fit.retrieval.retriever}@{fit.retrieval.k}",
        **fitting.facts(),
    }
    return draft.finish(settings, about=cost(draft.folder) | {"questions_of_others": len(others)})


class _Fitting:
    """One training of an artefact's parts.

    Args:
        fit, folder, resources, plug: as above.
        known: questions of users whose answers may be used: the loss on them is measured after every pass.
    """

    def __init__(
        self, fit: AdapterFit, folder: Path, resources: Resources, plug: str, known: Mapping[str, Sequence[Example]]
    ):
        self.fit, self.folder, self.resources, self.plug, self.known = fit, folder, resources, plug, known

    def shared(self, others: Sequence[Example], loras: str = "") -> None:
        """Write what all users share, unless it is there. Another process that does so is waited for.

        Args:
            others: questions for the LoRA of the task.
            loras: folder of LoRAs of tasks.
        """
        place = self.folder / SHARED
        if self.fit.kind == "ftp":
            return
        with locked(self.folder):
            if any((place / file).is_file() for file in (Lora.file, PrivatePrompt.file)):
                return
            if self.fit.kind == "user-tokens":
                with atomic_write(place / PrivatePrompt.file) as file:
                    save_file({PROMPT: self._plug_prompt([[]], [""])[0]}, file)
                return
            known = self._task_lora(others, Path(loras))
            with new_folder(place) as staging:
                shutil.copytree(known, staging, dirs_exist_ok=True)

    def _task_lora(self, others: Sequence[Example], folder: Path) -> Path:
        """Return the folder of the LoRA that these questions, settings and language model give; train it if there is none."""
        fit, resources, processor = self.fit, self.resources, self.resources.processor
        pairs = [(self._prompt(e), str(e.target)) for e in tqdm(others, desc="Writing prompts")]
        settings = {
            "lora": asdict(fit.lora),
            "training": asdict(fit.shared),
            "seed": fit.seed,
            "max_length": fit.max_length,
        }
        model = {"backbone": resources.backbone_digest, "dtype": str(resources.language_model.dtype)}
        model |= {"chat": resources.asking["chat"]}
        folder = folder / json_digest({"pairs": pairs, **settings, **model})
        folder.mkdir(parents=True, exist_ok=True)
        place = folder / SHARED
        with locked(folder):
            if place.is_dir():
                print(f"The LoRA of the task is in {str(place)!r} already.")
                return place
            with Lora(resources.language_model, processor, fit.lora) as weights:
                options = {"seed": fit.seed, "max_length": fit.max_length, "description": "LoRA of the task"}
                start = time.monotonic()
                trained = train_on_pairs(weights, pairs, fit.shared, **options)
                record = {"pairs": len(pairs), **trained._asdict()}
                save_folder(place, weights, record, time.monotonic() - start)
        return place

    def users(self, pairs: Mapping[str, Sequence[Pair]]) -> None:
        """Write the weights of users, except for those who are there."""
        left = {u: own for u, own in pairs.items() if not (self.folder / USERS / user_hash(u)).is_dir()}
        if not left:
            return
        with open_weights(self.folder, self.fit.kind, self.resources, self.facts()) as weights:
            for user, own in tqdm(left.items(), desc="Users", unit="user"):
                start = time.monotonic()
                examples = [(self._prompt(pair.example), str(pair.example.target)) for pair in own]
                trained = train_on_pairs(
                    weights,
                    examples,
                    self.fit.private,
                    seed=int(short_hash(f"{self.fit.seed}/{user}")[:12], 16),
                    max_length=self.fit.max_length,
                    start=self._start(own),
                    measure=partial(self._question_loss, weights, self.known[user]) if self.known else None,
                )
                items = [item_hash(pair.item) for pair in own]
                record = {"pairs": len(own), **trained._asdict(), "items": items}
                save_folder(self.folder / USERS / user_hash(user), weights, record, time.monotonic() - start)

    @torch.no_grad()
    def _question_loss(self, weights: PrivateWeights, questions: Sequence[Example]) -> float:
        """Return the loss of the right answers to a user's questions, each counted once."""
        training, total = self.fit.private, 0.0
        for start in range(0, len(questions), training.batch_size):
            batch = questions[start : start + training.batch_size]
            prompts, answers = [self._prompt(e) for e in batch], [str(e.target) for e in batch]
            loss = weights.loss(prompts, answers, self.fit.max_length, training.max_answer_length)
            total += loss.item() * len(batch)
        return total / len(questions)

    def facts(self) -> dict[str, object]:
        """Return what has to be known to answer with the weights, besides their files."""
        if self.fit.kind != "user-tokens":
            return {"lora": asdict(self.fit.lora)}
        return {"plug": PrivatePrompt.of_plug(self.resources.config(self.plug))}

    def _start(self, pairs: Sequence[Pair]) -> dict[str, Tensor] | None:
        """Return the start of a user's soft tokens: the plug's, for each of the items as a query, on the average."""
        if self.fit.kind != "user-tokens":
            return None
        items = [pair.item for pair in pairs]
        return {PROMPT: self._plug_prompt([items] * len(pairs), [pair.example.query for pair in pairs]).mean(dim=0)}

    def _plug_prompt(self, histories: Sequence[History], queries: Sequence[str]) -> Tensor:
        """Return the plug's soft prompts [n, P, H] on the CPU."""
        model = self.resources.plug(self.plug)
        return model.soft_prompt(list(histories), query=list(queries)).float().cpu()

    def _prompt(self, example: Example) -> str:
        """Return the prompt of an example, with items retrieved from its history if that is wanted."""
        retrieval, task = self.fit.retrieval, self.resources.task
        if retrieval is None or not example.history:
            return example.prompt
        order = get_ranker(retrieval.retriever, task).rank(example)[: retrieval.k]
        items, processor = [example.history[i] for i in order], self.resources.processor
        room = text_budget(processor, self.fit.max_length)
        return retrieval_prompt(task, example.prompt, items, processor.tokenizer, room).text


def _settings(job: FitJob) -> AdapterFit:
    """Return the settings that the options of a method say."""
    o = job.options
    private = PairTraining(
        epochs=o.epochs,
        learning_rate=o.learning_rate,
        schedule=o.schedule,
        warmup=o.warmup,
        weight_decay=o.weight_decay,
        clip=o.clip,
        batch_size=o.pairs_per_step,
        stop_below=o.stop_below,
        max_answer_length=o.max_answer_length,
    )
    fit = AdapterFit(
        kind=job.method,  # type: ignore[arg-type]
        items=o.items,
        max_items=o.items_per_user,
        retrieval=None if o.retrieval is None else _retrieval(o.retrieval),
        private=private,
        max_length=job.resources.decoding.max_length,
        seed=job.seed,
    )
    if job.method != "user-tokens":
        fit = replace(fit, lora=LoraShape(rank=o.rank, alpha=o.alpha, dropout=o.dropout, modules=o.modules))
    if job.method == "oppu":
        task = {"epochs": o.task_epochs, "learning_rate": o.task_learning_rate, "batch_size": o.task_pairs_per_step}
        fit = replace(fit, shared=replace(private, **task, stop_below=0.0))
    return fit


def _retrieval(name: str) -> Retrieval:
    """Return the retrieval of training prompts; only rankers that need nothing but the items."""
    ranker, _, number = name.partition("@")
    if ranker not in _RANKERS or not (number.isdecimal() and int(number)):
        raise ConfigurationError(
            f"retrieval is {name!r}; write RANKER@K with {', '.join(_RANKERS)}, as in bm25@1. Other rankers need more than the "
            "user's own items."
        )
    return Retrieval(ranker, int(number))


def _shard(text: str) -> tuple[int, int]:
    """Return which part of the users to train, of how many."""
    first, _, shards = text.partition("/")
    if not (first.isdecimal() and shards.isdecimal() and int(first) < int(shards)):
        raise ConfigurationError(f"shard is {text!r}; write I/N with I from 0 to N - 1, as in 0/2 and 1/2.")
    return int(first), int(shards)


def _asked(job: FitJob) -> list[Example]:
    """Return the questions of the split whose users get weights."""
    asked, most = job.read(job.options.split), job.split.get("max_items")
    if not asked:
        raise MissingFileError(
            f"There is no split {job.options.split!r}, whose users get weights: choose another split."
        )
    return asked if most is None else newest(asked, most)


def _other_questions(train: Sequence[Example], asked: Sequence[Example], questions: Asked) -> list[Example]:
    """Return the questions for the LoRA of the task: those of users who are not asked anything."""
    users = {e.user for e in asked if e.named}
    found = [e for e in train if not (e.named and e.user in users) and not questions.includes(e.user, e.query)]
    if not found:
        raise DataError(
            "No question is left for the LoRA of the task: all users of the train split are asked something in the split "
            "that is answered. Use ftp, which needs none."
        )
    return found
