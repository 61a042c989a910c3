"""Fitting of private weights: one LoRA per user (`ftp`), one on top of a LoRA of the task (`oppu`), or soft tokens.

| kind | shared by all users | private |
|---|---|---|
| `ftp` | nothing | LoRA |
| `oppu` | a LoRA of the task, trained on other users' questions and added to the language model's weights | LoRA |
| `user-tokens` | a plug's soft prompt for users without history | soft tokens, which start as the plug's for this user |

The folder:

    method.json
    shared/adapter_model.safetensors, adapter_config.json     of `oppu`; prompt.safetensors of `user-tokens`
    users/<hash>/adapter_model.safetensors, adapter_config.json, training.json

Users are named by a hash, items by hashes of their ids; no text is kept. A folder of a user is written beside its place
and renamed, so a killed training goes on with the next user.

n pairs of one user, P soft tokens, H backbone width.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ..data.histories import newest
from ..data.records import Example
from ..errors import ConfigurationError, DataError, MissingFileError
from ..optional import require
from ..storage.files import locked
from ..tasks.items import item_id
from .artefacts import Artefact
from .base import Retrieval
from .digests import backbone_digest, data_digest
from .fitting import FitJob
from .pair_training import PairTraining, TrainingRecord, eager_attention, train_on_pairs
from .private_prompt import PROMPT, PrivatePrompt
from .private_weights import Lora, LoraShape, PrivateWeights, merged
from .prompts import retrieval_prompt
from .resources import Resources
from .retrievers import get_ranker
from .user_pairs import Asked, ItemsRule, Pair, check_pairs, questions_by_user, user_pairs

AdapterKind = Literal["ftp", "oppu", "user-tokens"]
_RANKERS = ("recency", "bm25", "bm25s")
SHARED, USERS, TRAINING = "shared", "users", "training.json"
CONFIG = "adapter_config.json"  # peft's name


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


def user_hash(user: str) -> str:
    """Return the name of a user's folder."""
    return _short(user)


def item_hash(item: Mapping[str, str]) -> str:
    """Return the name of an item in the record of a training."""
    return _short(item_id(item))


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
    draft = job.draft(
        fit.kind,
        asked=data_digest(task, asked, answers=False),
        own=[task.own_prompt, task.own_answer],
        plug=resources.config(plug).to_dict() if plug else None,
    )
    if draft.finished:
        return draft.finished
    known = questions_by_user(asked) if job.options.split == "held" else {}
    fitting = _Fitting(fit, draft.folder, resources, plug, known)
    with eager_attention(resources.language_model):
        fitting.shared(others)
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
    return draft.finish(settings, about=_cost(draft.folder, fit, len(others)))


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

    def shared(self, others: Sequence[Example]) -> None:
        """Write what all users share, unless it is there. Another process that does so is waited for."""
        place, fit, resources = self.folder / SHARED, self.fit, self.resources
        if fit.kind == "ftp":
            return
        with locked(self.folder):
            if place.is_dir():
                return
            if fit.kind == "user-tokens":
                save_folder(place, {PROMPT: self._plug_prompt([[]], [""])[0]}, PrivatePrompt.file)
                return
            pairs = [(self._prompt(e), str(e.target)) for e in tqdm(others, desc="Writing prompts")]
            with Lora(resources.language_model, resources.processor, fit.lora) as weights:
                options = {"seed": fit.seed, "max_length": fit.max_length, "description": "LoRA of the task"}
                start = time.monotonic()
                trained = train_on_pairs(weights, pairs, fit.shared, **options)
                record = _record(trained, len(pairs), start)
                save_folder(place, weights.state(), weights.file, weights.config(), record)

    def users(self, pairs: Mapping[str, Sequence[Pair]]) -> None:
        """Write the weights of users, except for those who are there."""
        left = {u: own for u, own in pairs.items() if not (self.folder / USERS / user_hash(u)).is_dir()}
        if not left:
            return
        with ExitStack() as stack:
            weights = stack.enter_context(open_weights(self.folder, self.fit.kind, self.resources, self.facts()))
            for user, own in tqdm(left.items(), desc="Users", unit="user"):
                start = time.monotonic()
                examples = [(self._prompt(pair.example), str(pair.example.target)) for pair in own]
                trained = train_on_pairs(
                    weights,
                    examples,
                    self.fit.private,
                    seed=int.from_bytes(
                        hashlib.sha256(f"{self.fit.seed}/{user}".encode("utf-8", "surrogatepass")).digest()[:6]
                    ),
                    max_length=self.fit.max_length,
                    start=self._start(own),
                    measure=partial(self._question_loss, weights, self.known[user]) if self.known else None,
                )
                record = _record(trained, len(own), start) | {"items": [item_hash(pair.item) for pair in own]}
                place = self.folder / USERS / user_hash(user)
                save_folder(place, weights.state(), weights.file, weights.config(), record)

    @torch.no_grad()
    def _question_loss(self, weights: PrivateWeights, questions: Sequence[Example]) -> float:
        """Return the loss of the right answers to a user's questions."""
        prompts, answers = [self._prompt(e) for e in questions], [str(e.target) for e in questions]
        return weights.loss(prompts, answers, self.fit.max_length, self.fit.private.max_answer_length).item()

    def facts(self) -> dict[str, Any]:
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

    def _plug_prompt(self, histories: Sequence[Any], queries: Sequence[str]) -> Tensor:
        """Return the plug's soft prompts [n, P, H] on the CPU."""
        model = self.resources.plug(self.plug)
        return model.soft_prompt(list(histories), query=list(queries)).float().cpu()

    def _prompt(self, example: Example) -> str:
        """Return the prompt of an example, with items retrieved from its history if that is wanted."""
        retrieval, task = self.fit.retrieval, self.resources.task
        if retrieval is None or not example.history:
            return example.prompt
        order = get_ranker(retrieval.retriever, task).rank(example)[: retrieval.k]
        items, tokenizer = [example.history[i] for i in order], self.resources.processor.tokenizer
        return retrieval_prompt(task, example.prompt, items, tokenizer, self.fit.max_length).text


class _Merged:
    """Private weights on a language model with the LoRA of the task, both within one block."""

    def __init__(self, folder: Path, resources: Resources, shape: LoraShape):
        self.folder, self.resources, self.shape, self.stack = folder, resources, shape, ExitStack()

    def __enter__(self) -> PrivateWeights:
        model, processor = self.resources.language_model, self.resources.processor
        task = load_file(self.folder / SHARED / Lora.file)
        self.stack.enter_context(merged(model, processor, self.shape, task))
        return self.stack.enter_context(Lora(model, processor, self.shape))

    def __exit__(self, *error: object) -> None:
        self.stack.close()


def open_weights(folder: Path, kind: str, resources: Resources, facts: Mapping[str, Any]) -> Any:
    """Return the weights of an artefact, to be used in a `with` block, in which the shared ones are in place.

    Args:
        folder: of the artefact.
        kind: of the artefact.
        resources: language model.
        facts: of `_Fitting.facts`; a finished artefact has them in its settings.
    """
    if kind == "user-tokens":
        shape = load_file(folder / SHARED / PrivatePrompt.file)[PROMPT].shape
        return PrivatePrompt(resources.language_model, resources.processor.tokenizer, facts["plug"], shape)
    shape = LoraShape(**facts["lora"])
    if kind == "oppu":
        return _Merged(folder, resources, shape)
    return Lora(resources.language_model, resources.processor, shape)


def save_folder(
    place: Path,
    state: Mapping[str, Tensor],
    file: str,
    config: Mapping[str, Any] | None = None,
    record: Mapping[str, Any] | None = None,
) -> None:
    """Write weights with their settings and the record of their training; the folder appears as a whole."""
    place.parent.mkdir(parents=True, exist_ok=True)
    staging = place.with_name(f".{place.name}-{uuid.uuid4().hex}")
    staging.mkdir()
    try:
        save_file(dict(state), staging / file)
        for name, content in ((CONFIG, config), (TRAINING, record)):
            if content is not None:
                (staging / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(staging, place)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


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
    own: dict[str, Any] = {}
    if job.method != "user-tokens":
        own["lora"] = LoraShape(rank=o.rank, alpha=o.alpha, dropout=o.dropout, modules=o.modules)
    if job.method == "oppu":
        task = {"epochs": o.task_epochs, "learning_rate": o.task_learning_rate, "batch_size": o.task_pairs_per_step}
        own["shared"] = replace(private, **task, stop_below=0.0)
    return AdapterFit(
        kind=job.method,  # type: ignore[arg-type]
        items=o.items,
        max_items=o.items_per_user,
        retrieval=None if o.retrieval is None else _retrieval(o.retrieval),
        private=private,
        max_length=job.resources.decoding.max_length,
        seed=job.seed,
        **own,
    )


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
    users = {e.user for e in asked}
    found = [e for e in train if e.user not in users and not questions.includes(e.user, e.query)]
    if not found:
        raise DataError(
            "No question is left for the LoRA of the task: all users of the train split are asked something in the split "
            "that is answered. Use ftp, which needs none."
        )
    return found


def _record(trained: TrainingRecord, pairs: int, start: float) -> dict[str, Any]:
    return {"pairs": pairs, **trained._asdict(), "seconds": round(time.monotonic() - start, 3)}


def _cost(folder: Path, fit: AdapterFit, others: int) -> dict[str, Any]:
    """Return what the weights cost: in memory, in time, and in passes of the language model."""
    paths = sorted(folder.glob(f"{USERS}/[!.]*/{TRAINING}"))
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    first = paths[0].with_name(PrivatePrompt.file if fit.kind == "user-tokens" else Lora.file)
    curves = [r["curve"] for r in records]
    passes = max(map(len, curves))
    curve = [sum(each[min(i, len(each) - 1)] for each in curves) / len(curves) for i in range(passes)]
    pairs, seconds = sum(r["pairs"] for r in records), sum(r["seconds"] for r in records)
    return {
        "users": len(records),
        "pairs": pairs,
        "questions_of_others": others,
        "weights_per_user": sum(value.numel() for value in load_file(first).values()),
        "bytes_per_user": first.stat().st_size,
        "trained_examples": sum(r["passes"] * r["pairs"] for r in records),
        "seconds_per_user": round(seconds / len(records), 3),
        "first_loss": sum(r["first_loss"] for r in records) / len(records),
        "last_loss": sum(r["last_loss"] for r in records) / len(records),
        **({"held_loss_by_pass": curve} if curve else {}),
    }


def _short(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
