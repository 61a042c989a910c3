"""Training of selectors (RSPG): the rows of a pool answer questions of the train split, whose rewards teach the choice."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.records import Example
from ..errors import ConfigurationError, DataError
from ..evaluation.runner import Runner
from ..methods.artefacts import Artefact
from ..methods.base import Method
from ..methods.digests import json_digest
from ..methods.fitting import FitJob
from ..methods.label_frequencies import divided
from ..methods.names import Folders, default_rows, parse_plugs, parse_trained
from ..methods.rewards import normalised
from ..methods.selection import (
    SelectionModel,
    SelectionTraining,
    TextForm,
    informative,
    train_selection,
)
from ..methods.selector import KIND, pool_key, pool_methods, texts_of
from ..modeling.encoders import fingerprint
from ..tasks.task import Task, per_example


def train(job: FitJob) -> Artefact:
    """Train a selector on the users kept for that, and stop with the held-out ones.

    Raises:
        ConfigurationError: a pool that cannot be chosen from.
        DataError: no questions of either part, or all answers to them are equally good.
    """
    job, pool = _with_pool(job)
    options, resources = job.options, job.resources
    select, held = _questions(job)
    # Of the whole train split, rows with counts take what their plug has not seen.
    runner = Runner(resources, [*select, *held], job.train)
    runner.check({row: [method] for row, method in pool.items()})
    encoder = resources.encoder(None if resources.retriever else next(iter(resources.plugs.values()))[0])
    form = TextForm(order=options.order, length=options.text_length)
    model = SelectionModel.from_encoder(encoder, form, len(pool) * options.row_heads).to(
        resources.language_model.device
    )
    known = {row: pool_key(method, resources) for row, method in pool.items()}
    draft = job.draft(KIND, pool=known, encoder=fingerprint(encoder)["digest"])
    if draft.finished:
        return draft.finished

    shared = {name: value for name, value in job.run.items() if name not in ("method", "options", "seed")}
    runner.folder = Path(options.answers) / json_digest(shared)
    answers = _answers(runner, pool)  # R lists of n
    reads_answers = job.method == "rspg-post"
    texts = texts_of(model, pool, runner.examples, resources, answers if reads_answers else None)
    rewards, n = rewards_of(job.task, runner.examples, answers), len(select)  # [n, R]
    settings = _settings(job, rewards)
    useful = len(informative(rewards[:n]))
    print(f"{useful} of {n} questions have answers that are not all equally good; the others teach nothing.")
    curve = train_selection(model, texts[:n], rewards[:n], texts[n:], rewards[n:], settings)
    model.save(draft.folder)
    cost = {
        "language_model_passes": len(texts) * len(pool),
        "trained_weights": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    about = {
        "curve": curve,
        "questions": {"select": n, "informative": useful, "held": len(held)},
        "rewards": dict(zip(pool, rewards[:n].mean(dim=0).tolist(), strict=True)),
        "cut_texts": model.count_cut(texts) / (len(texts) * len(pool)),
        "cost": cost,
    }
    keys = {"backbone": resources.backbone_digest, "pool": known, "form": asdict(form)}
    reads = "answers" if reads_answers else "prompts"
    return draft.finish({**job.settings(), **keys, "reads": reads, "training": asdict(settings)}, about)


def _with_pool(job: FitJob) -> tuple[FitJob, dict[str, Method]]:
    """Return the job with what its pool needs besides the language model, and the rows of the pool; nothing is loaded."""
    plugs = parse_plugs(job.options.plugs or ())
    trained = parse_trained(job.options.trained or (), plugs)
    # Random items are drawn alike for all seeds of the training, which share the answers.
    seed = job.split["split_seed"]
    job = replace(job, resources=replace(job.resources, plugs=plugs, trained=trained, seed=seed))
    job.resources.check()
    if not (job.resources.retriever or plugs):
        raise ConfigurationError(
            "A selector starts from a sentence encoder: pass encoder, or plugs, which bring theirs."
        )
    pool = pool_methods(job.options.pool or usual_pool(job, plugs, trained), plugs, trained)
    used = {method.folder for method in pool.values()}
    asked = [folder for folders in plugs.values() for folder in folders if folder in used]
    train = job.read("train") if asked else []
    says = {folder: _check_split(folder, job) for folders in trained.values() for folder in folders}
    says |= {folder: _check_plug(folder, train, job) for folder in asked}
    if unknown := [repr(folder) for folder, known in says.items() if not known]:
        print(
            f"Nothing says which users {', '.join(unknown)} learned from: if they are those of the selector, it learns to trust "
            "answers that are better there than elsewhere."
        )
    return job, pool


def _check_split(folder: str, job: FitJob) -> bool:
    """Return whether an artefact says how its training divided the users.

    Raises:
        ConfigurationError: otherwise than this one.
    """
    split = job.resources.artefact(folder).run.get("split") or {}
    shares = ("leave_out_users", "select_users", "held_users", "split_seed")
    if split and (other := [name for name in shares if split.get(name) != job.split[name]]):
        raise ConfigurationError(
            f"{folder!r} was trained with {', '.join(f'{name}={split.get(name)}' for name in other)}, so it may know the "
            "users that the selector learns from: pass the same here."
        )
    return bool(split)


def _check_plug(folder: str, train: Sequence[Example], job: FitJob) -> bool:
    """Return whether a plug says which users of the train split it was trained on.

    Raises:
        ConfigurationError: on some that the selector learns from.
    """
    if (parts := divided(folder, train)) is None:
        return False
    mine, split = {e.user for part in (job.users.select, job.users.held) for e in part}, job.split
    if known := mine & {e.user for e in parts[0]}:
        raise ConfigurationError(
            f"The plug {folder!r} was trained on {len(known)} of the {len(mine)} users that the selector learns from, so its "
            "answers are better there than elsewhere: train one that holds them out, by `pplug-hf train --validation_users "
            f"{split['select_users'] + split['held_users']} --leave_out_users {split['leave_out_users']} --split_seed "
            f"{split['split_seed']}`."
        )
    return True


def usual_pool(job: FitJob, plugs: Folders, trained: Folders) -> list[str]:
    """Return the rows of a pool that nobody chose: 4 items of each ranker, no items, and the plugs."""
    dense = bool(job.resources.retriever or plugs)
    rows = default_rows(job.task, [], users=1, frequencies=False, dense=dense, trained=trained)
    return [row for row in rows if not row.endswith("@1") and ":" not in row] + list(plugs)


def _questions(job: FitJob) -> tuple[list[Example], list[Example]]:
    """Return the questions to learn to choose from and those to stop with, at most `max_questions` of each."""
    most, parts = job.split["max_questions"], []
    for part in (job.users.select, job.users.held):
        draw = random.Random(job.split["split_seed"]).sample(range(len(part)), min(most or len(part), len(part)))
        parts.append([part[i] for i in sorted(draw)])
    if not all(parts):
        raise DataError(
            f"{len(parts[0])} questions to learn to choose from, and {len(parts[1])} to stop with: raise select_users and "
            "held_users."
        )
    return parts[0], parts[1]


def _settings(job: FitJob, rewards: Tensor) -> SelectionTraining:
    """Return the settings of the training; the temperature of the rewards depends on their kind."""
    temperature = job.options.target_temperature
    if temperature is None:
        temperature = 0.25 if bool(((rewards == 0) | (rewards == 1)).all()) else 1.0
    names = [f.name for f in fields(SelectionTraining) if hasattr(job.options, f.name)]
    own = {name: getattr(job.options, name) for name in names}
    return SelectionTraining(**own, temperature=temperature, seed=job.seed)


def rewards_of(task: Task, examples: Sequence[Example], answers: Sequence[Sequence[str]]) -> Tensor:
    """Return the rewards of R lists of n answers, [n, R] in fp32."""
    golds, extra = [task.label_of(str(e.target)) for e in examples], [e.extra for e in examples]
    scores = [normalised(task, per_example(task, own, golds, extra=extra), golds) for own in answers]
    return torch.from_numpy(np.stack(scores, axis=1)).float()


def _answers(runner: Runner, pool: Mapping[str, Method]) -> list[list[str]]:
    """Return what the rows of a pool answer, R lists of n; what is there already is not answered again."""
    made = runner.run({row: [method] for row, method in pool.items()})
    return [[each.answers[e.id] for e in runner.examples] for each in made]
