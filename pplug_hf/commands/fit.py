"""`pplug-hf fit`: baselines that have to be trained, each an artefact that `pplug-hf bench --trained` takes."""

from __future__ import annotations

import importlib
import random
from collections.abc import Sequence
from dataclasses import fields

from ..data.examples import Source, exclusion_note, other_splits, read_examples, read_others
from ..data.histories import UserSplit, newest, remaining, split_users, three_way_split
from ..data.records import Example, history_notes
from ..errors import ConfigurationError, DataError
from ..methods.artefacts import Artefact
from ..methods.fit_options import FIT, RspgOptions, options_of
from ..methods.fitting import FitJob
from ..methods.resources import Decoding, Resources
from ..tasks.metrics import get_metric
from ..tasks.task import Task
from .options import FitSettings


def fit(
    settings: FitSettings, task: Task | None = None, data: Source | None = None, **options: object
) -> Artefact | None:
    """Train a method and save what it learned.

    Args:
        settings: see the fields.
        task: instead of `settings.task`, a task of your own.
        data: instead of what `settings.data` names: rows, or a `DatasetDict` or mapping of splits to rows, see
            `data/examples.py`.
        **options: those of the method, see `methods/fit_options.py`.

    Returns:
        The artefact, saved in `settings.output`; None if other processes still work on it.

    Raises:
        PPlugError: settings, options or data that cannot be used.
    """
    try:
        chosen = options_of(settings.method)(**options)
    except TypeError as error:
        raise ConfigurationError(f"{settings.method} cannot be trained with these options: {error}.") from error
    source = settings.data if data is None else data
    task, train = read_examples(source, "train", task or settings.task)
    if isinstance(chosen, RspgOptions) or getattr(chosen, "reward", None) == "metric":
        get_metric(task.metric).check()  # which judges the answers that the method learns from
    users = split(settings, train)
    decoding = Decoding(**{f.name: getattr(settings, f.name) for f in fields(Decoding)})
    shared = ("backbone", "backbone_dtype", "chat", "system", "device", "batch_size", "seed", "vectors")
    given = {name: getattr(settings, name) for name in shared}
    resources = Resources(task, decoding=decoding, retriever=getattr(chosen, "encoder", None), **given)
    resources.check()
    how = ("leave_out_users", "select_users", "held_users", "split_seed", "max_questions", "max_items")
    job = FitJob(
        method=settings.method,
        task=task,
        users=users,
        train=remaining(train, settings.leave_out_users, settings.split_seed, settings.max_items),
        read=lambda name: read_others(source, (name,), task),
        other_splits=other_splits(source),
        resources=resources,
        options=chosen,
        output=settings.output,
        seed=settings.seed,
        split={name: getattr(settings, name) for name in how},
        resume=settings.resume,
    )
    print(f"{task.name}: {', '.join(f'{_counted(part)} to {use}' for part, use in zip(users, _USES, strict=True))}")
    if getattr(chosen, "train_on_histories", False) and (note := exclusion_note(source)):
        print(note)
    for note in history_notes(users.fit):
        print(note)
    function = FIT[settings.method][1]
    if isinstance(function, str):
        module, _, name = function.partition(":")
        function = getattr(importlib.import_module(module), name)
    artefact = function(job)
    if artefact is None:
        return None
    print(f"Saved: {settings.output}. Compare it: pplug-hf bench --trained {settings.method}={settings.output}")
    return artefact


_USES = ("train on", "keep for choosing among methods", "stop in time with")


def split(settings: FitSettings, train: Sequence[Example]) -> UserSplit:
    """Divide the train split by users, as the settings say.

    Raises:
        DataError: nothing is left to train on, or to stop with.
    """
    train, _ = split_users(train, settings.leave_out_users, settings.split_seed)
    users = three_way_split(train, settings.select_users, settings.held_users, settings.split_seed)
    if settings.max_items is not None:
        users = UserSplit(*(newest(part, settings.max_items) for part in users))
    if settings.max_questions is not None and len(users.fit) > settings.max_questions:
        draw = random.Random(settings.split_seed).sample(range(len(users.fit)), settings.max_questions)
        users = users._replace(fit=[users.fit[i] for i in sorted(draw)])
    if not users.fit or (settings.held_users and not users.held):
        raise DataError(
            f"{len(users.fit)} questions to train on and {len(users.held)} of held-out users are left: choose other "
            "values of leave_out_users, select_users and held_users."
        )
    return users


def _counted(examples: Sequence[Example]) -> str:
    return f"{len(examples)} questions of {len({e.user for e in examples})} users"
