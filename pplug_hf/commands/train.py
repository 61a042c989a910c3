"""`pplug-hf train`: a plug from questions and histories."""

from __future__ import annotations

import atexit
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any, TypedDict

import torch
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils.logging import disable_progress_bar

from ..data.dataset import PersonaDataset
from ..data.examples import Source, exclusion_note, has_split, other_splits, read_examples, read_others
from ..data.histories import history_examples, newest, split_users
from ..data.records import Example, Repairs, data_digest, history_notes, label_notes
from ..data.synthetic import synthetic_examples
from ..data.vectors import VectorStore
from ..errors import ConfigurationError, DataError
from ..evaluation.compare import to_json
from ..modeling import PPlugForConditionalGeneration
from ..modeling.device import checked_device
from ..modeling.encoders import item_texts, length_notes
from ..modeling.prompt_cache import PromptCache, size_in_bytes
from ..optional import require
from ..processing import PPlugProcessor
from ..storage.files import read_json_object, write_text
from ..storage.layout import HIDDEN, PROMPTS, TRAIN_RUN, TRAIN_SETTINGS
from ..storage.replace import check_writable
from ..tasks.task import Task
from ..training import PPlugCollator, PPlugTrainer, PPlugTrainingArguments, check_encoder_rate
from .options import TrainSettings
from .progress import TrainingProgress, learned, saved

_FEW_USERS = 10  # to validate on


def train(
    settings: TrainSettings, task: Task | None = None, data: Source | None = None, **plug: Any
) -> PPlugForConditionalGeneration:
    """Train and save a plug. Started by `accelerate launch`, by all its processes together.

    Args:
        settings: see the fields.
        task: instead of `settings.task`, a task of your own.
        data: instead of what `settings.data` names: rows, or a `DatasetDict` or mapping of splits to rows, see
            `data/examples.py`.
        **plug: choices of [`PPlugConfig`].

    Returns:
        The trained model (best checkpoint by the loss on held-out users), also saved in `settings.output`.

    Raises:
        ConfigurationError: settings that cannot be used; nothing is written then.
        PPlugError: data or folders that cannot be used; likewise.
    """
    accelerate = require("accelerate", "train", "Training")
    if (device := checked_device(settings.device)).index is not None:
        raise ConfigurationError(
            f"device is {settings.device!r}: training takes its kind, {device.type}; choose among several in the environment, "
            "as in CUDA_VISIBLE_DEVICES=1."
        )
    check_trackers(settings.report_to or [])
    processes = accelerate.PartialState(cpu=device.type == "cpu")
    if settings.batch_size % processes.num_processes:
        raise ConfigurationError(
            f"batch_size {settings.batch_size} cannot be shared evenly by {processes.num_processes} processes: choose a "
            "multiple of their number."
        )
    with main_process_only(processes.is_main_process):
        model = _train(settings, task, data, plug, processes)
    # A process that ends before the threads of its group do is now and then aborted.
    atexit.register(processes.destroy_process_group)
    return model


@contextmanager
def main_process_only(me: bool) -> Iterator[None]:
    """Let one process of a command print and show progress, and silence the others."""
    if me:
        yield
        return
    disable_progress_bar()
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield


def _train(
    settings: TrainSettings, task: Task | None, data: Source | None, plug: dict[str, Any], processes: Any
) -> PPlugForConditionalGeneration:
    output = Path(settings.output)
    check_output(output)
    if not 0 <= settings.warmup < 1:  # 1 would be one step for the Trainer
        raise ConfigurationError(f"warmup={settings.warmup} is no share of the steps: choose one from 0 to below 1.")
    memory = memory_for_prompts(settings.prompt_cache, processes.device)
    set_seed(settings.seed)
    task, examples, validation = choose_examples(settings, task, data)
    model = PPlugForConditionalGeneration.from_backbone(
        settings.backbone,
        settings.encoder,
        backbone_kwargs={"dtype": settings.backbone_dtype},
        chat=settings.chat,
        system=settings.system,
        query_marker=task.query_marker,
        query_end=task.query_end,
        **{
            "item_template": task.item_template if settings.labelled_items else task.item_template_unlabelled,
            # Whoever is to learn from examples without histories learns faster so.
            "project_no_persona": not settings.use_history or settings.new_users > 0,
            **plug,
        },
    )
    check_encoder_rate(settings.encoder_learning_rate, model.plug.input_encoder is not None)
    if memory and settings.prompt_cache != "auto":
        model.check_prompt_cache()
        if settings.gradient_checkpointing:
            raise ConfigurationError(
                "With gradient_checkpointing=True every prompt is read in every step, so a prompt_cache has no effect: "
                "leave one of them out."
            )
    processor = PPlugProcessor.from_model(model)
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    both = [*examples, *validation]
    run = identity_of_run(settings, task, model, both)
    trained_on = {"name": Path(settings.data).name, "examples": len(examples), "digest": run["data"]}
    trained_on["users"] = len({e.user for e in examples})
    checkpoint = last_checkpoint(output) if output.is_dir() else None
    if checkpoint and settings.resume:
        check_same_run(Path(checkpoint), run)
    elif processes.is_main_process:
        for old in output.glob(
            "checkpoint-*/trainer_state.json"
        ):  # or the Trainer would keep the later steps of that run
            shutil.rmtree(old.parent)
    checkpoint = checkpoint if settings.resume else None
    prompts, answers = [e.prompt for e in both], [e.target for e in both if e.target is not None]
    for note in processor.length_notes(prompts, settings.max_length, answers, settings.max_target_length):
        print(note)
    if processes.device.type != "cpu":
        model.history_encoder.to(processes.device)  # what reads texts now; the Trainer places the rest
    datasets = make_datasets(model, examples, validation, settings)
    model.print_trainable_parameters()

    progress = TrainingProgress()
    with prompts_of_run(settings, model, memory, output / PROMPTS, processes) as cache:
        trainer = PPlugTrainer(
            model=model,
            args=training_arguments(settings, len(datasets[0]), processes.num_processes),
            data_collator=PPlugCollator(processor, settings.max_length, settings.max_target_length),
            train_dataset=datasets[0],
            eval_dataset=datasets[1],
            processing_class=processor,
            callbacks=[EarlyStoppingCallback(settings.patience), _RecordRun(run)],
            prompt_cache=cache,
        )
        for callback in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(progress)
        if checkpoint:
            print(f"Resuming from {checkpoint}")
        trained = trainer.train(resume_from_checkpoint=checkpoint)
    if checkpoint and checkpoint.endswith(f"-{trainer.state.global_step}"):
        print("That training was complete already: nothing was trained now.")
    else:
        print(learned(trainer.state.log_history, trainer.state.global_step, trained.metrics["train_runtime"]))
    trainer.save_model(settings.output)
    if processes.is_main_process:
        facts = {"data": trained_on, "language_model_passes": round((trainer.state.epoch or 0) * len(datasets[0]))}
        write_text(output / TRAIN_SETTINGS, to_json({**recorded_settings(settings, task), **facts}))
        print(saved(settings, data is None and has_split(settings.data, "dev")))
    return model.eval()


def check_trackers(names: Sequence[str]) -> None:
    """Raise a `ConfigurationError` for trackers that are not installed."""
    there = get_available_reporting_integrations()
    if missing := [name for name in names if name not in (*there, "none", "all")]:
        raise ConfigurationError(
            f"report_to got {missing[0]!r}, which is not installed, or no tracker that transformers knows; there are: "
            f"{', '.join(there) or 'none'}."
        )


def memory_for_prompts(size: str, device: torch.device) -> int:
    """Return the bytes of a prompt cache; "auto" has none on an accelerator, where copying may cost more than it saves."""
    if size == "auto":
        size = "4GB" if device.type == "cpu" else "0"
    return size_in_bytes(size)


@contextmanager
def prompts_of_run(
    settings: TrainSettings, model: PPlugForConditionalGeneration, memory: int, folder: Path, processes: Any
) -> Iterator[PromptCache | None]:
    """Yield this process's cache of a training's prompts; None if it has none.

    A run that is killed leaves its files to the next, and whichever run ends removes all that are there.
    """
    cached = model.config.placement == "answer" and memory and not settings.gradient_checkpointing
    yield PromptCache(memory, folder / str(processes.process_index), evict=False) if cached else None
    model.prompt_cache = None
    processes.wait_for_everyone()  # or another process would still read its files
    if processes.is_local_main_process:
        shutil.rmtree(folder, ignore_errors=True)


def recorded_settings(settings: TrainSettings, task: Task) -> dict[str, object]:
    """Return what determines the weights, for the plug's card: values and this command's defaults, no paths."""
    others = {"data", "output", "backbone", "encoder", "task", "vectors", "device"}
    others |= {"resume", "logging_steps", "report_to", "prompt_cache"}
    defaults = {f.name: f.default for f in fields(settings) if f.name not in others}
    return {"task": task.name, "settings": {name: getattr(settings, name) for name in defaults}, "defaults": defaults}


class _Run(TypedDict):
    """Everything that determines a training; a run resumes only if it is the same."""

    settings: dict[str, object]
    plug: dict[str, object]
    task: str
    data: str


class _RecordRun(TrainerCallback):
    """Write into every checkpoint what it was made of."""

    def __init__(self, run: _Run):
        self.run = run

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            write_text(folder / TRAIN_RUN, json.dumps(self.run, indent=2) + "\n")


def identity_of_run(
    settings: TrainSettings, task: Task, model: PPlugForConditionalGeneration, examples: list[Example]
) -> _Run:
    """Return what a run is determined by, as JSON: settings, the plug's configuration, and digests, but no paths."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in _PLACES}
    run = {
        "settings": recorded_settings(settings, task)["settings"],
        "plug": {**config, "backbone": Path(str(model.config.backbone)).name},  # an encoder has a digest
        "task": task.digest,
        "data": data_digest(task, examples, answers=True),
    }
    return json.loads(json.dumps(run, default=str))


_PLACES = ("backbone", "encoder", "dtype", "transformers_version")


def last_checkpoint(output: Path) -> str | None:
    """Return the newest checkpoint that is complete: what it was made of is written last. If none is, return the newest."""
    newest = get_last_checkpoint(str(output))
    found = [path.parent for path in output.glob(f"checkpoint-*/{TRAIN_RUN}")]
    steps = {int(number): path for path in found if (number := path.name.partition("-")[2]).isdecimal()}
    complete = str(steps[max(steps)]) if steps else newest
    if complete != newest:
        print(f"{newest} is not complete, because its writing was interrupted: an earlier checkpoint is used.")
    return complete


def check_same_run(checkpoint: Path, run: _Run) -> None:
    """Raise a `ConfigurationError` that says what differs, unless a checkpoint is of this run."""
    remedy = "Choose a new output folder, or start again in this one with --resume False."
    if not (checkpoint / TRAIN_RUN).is_file():
        raise ConfigurationError(
            f"{str(checkpoint)!r} does not record what it was trained on (an earlier version wrote it, or its writing was "
            f"interrupted), so it cannot be resumed. {remedy}"
        )
    then = read_json_object(checkpoint / TRAIN_RUN, f"The {TRAIN_RUN} of {str(checkpoint)!r}", remedy)
    differing = [part for part in ("task", "data") if then.get(part) != run[part]]
    for part in ("settings", "plug"):
        there = then.get(part) or {}
        names = [name for name in {**there, **run[part]} if there.get(name) != run[part].get(name)]
        differing += [f"{name} (was {there.get(name)!r}, is {run[part].get(name)!r})" for name in names]
    if differing:
        raise ConfigurationError(
            f"{str(checkpoint)!r} is a checkpoint of another training; these differ: {', '.join(differing)}. {remedy}"
        )


def check_output(output: Path) -> None:
    """Raise for a folder that holds something other than a plug or this command's checkpoints."""
    check_writable(output)
    if output.is_dir() and any(not path.name.startswith(HIDDEN) for path in output.iterdir()):
        known = (output / "config.json").is_file() or any(output.glob("checkpoint-*"))
        if not known:
            raise ConfigurationError(
                f"The output folder {str(output)!r} exists, is not empty and holds no plug: choose another one."
            )


def choose_examples(
    settings: TrainSettings, task: Task | None = None, data: Source | None = None
) -> tuple[Task, list[Example], list[Example]]:
    """Return task, training examples, and validation examples of other users; other splits are never used."""
    source = settings.data if data is None else data
    repairs = Repairs()
    task, examples = read_examples(source, "train", task or settings.task, repairs=repairs)
    exclude = read_others(source, other_splits(source), task)
    if settings.leave_out_users:
        examples, _ = split_users(examples, settings.leave_out_users, settings.split_seed)
    examples, validation = split_users(examples, settings.validation_users, settings.split_seed + 1, nearest=True)
    if not examples or not validation:
        raise DataError(
            f"{len(examples)} training and {len(validation)} validation examples are left: choose other values of "
            "leave_out_users and validation_users."
        )
    asked = len(examples)
    if settings.train_on_histories:
        examples = examples + history_examples(examples, task, exclude)
    users, own = len({e.user for e in examples}), len(examples)
    if settings.synthetic_users:
        # Of the training users alone: nothing of a validation user may enter.
        examples = examples + synthetic_examples(examples, task, settings.synthetic_users, settings.seed, exclude)
    if settings.max_items is not None:
        examples, validation = newest(examples, settings.max_items), newest(validation, settings.max_items)
    synthetic = f", {len(examples) - own} synthetic users" if settings.synthetic_users else ""
    print(
        f"{task.name}: {asked} questions and {own - asked} history items of {users} users to train on{synthetic}, "
        f"{len(validation)} questions of {len({e.user for e in validation})} other users to validate on."
    )
    if (validating := len({e.user for e in validation})) < _FEW_USERS:
        print(
            f"Only {validating} held-out users choose the best checkpoint, which leaves much to chance: raise "
            f"validation_users (now {settings.validation_users}), or train on more users."
        )
    if (settings.train_on_histories or settings.synthetic_users) and (note := exclusion_note(source)):
        print(note)
    for note in [*label_notes(task, examples), *history_notes(examples)]:
        print(note)
    if repairs:
        print(f"While reading:\n{repairs}")
    return task, examples, validation


def make_datasets(
    model: PPlugForConditionalGeneration, train: list[Example], validation: list[Example], settings: TrainSettings
) -> list[PersonaDataset]:
    """Return training and validation data over one store of vectors."""
    config = model.config
    items = VectorStore(model.history_encoder, config.history_prompt, settings.vectors)
    requests = (
        None
        if config.train_input_encoder
        else VectorStore(model.history_encoder, config.query_prompt, settings.vectors, task="query")
    )
    if requests is not None and requests.folder == items.folder:
        requests = items  # both are encoded in the same way
    if settings.use_history:
        distinct = {id(item): item for example in (*train, *validation) for item in example.history}
        texts = dict.fromkeys(item_texts(list(distinct.values()), config.item_template))
        for note in length_notes(model.history_encoder, texts, config.history_prompt):
            print(note)
    made = [
        PersonaDataset(
            examples,
            items,
            config.item_template,
            history_dropout=dropout,
            use_history=settings.use_history,
            queries=requests([e.query for e in examples]) if requests is not None else None,
            seed=settings.seed,
            repeats=repeats,
            new_users=new_users,
        )
        for examples, dropout, repeats, new_users in (
            (train, settings.history_dropout, settings.history_repeats, settings.new_users),
            (validation, 0.0, 0, 0.0),
        )
    ]
    stores = {store for store in (items, requests) if store is not None}
    print(f"Texts: {sum(s.encoded for s in stores)} encoded now, {sum(map(len, stores))} in the vector store.")
    return made


def training_arguments(settings: TrainSettings, examples: int, processes: int = 1) -> PPlugTrainingArguments:
    """Return the Trainer's arguments, with step counts from the number of examples."""
    steps = max(1, -(-examples // (settings.batch_size * settings.gradient_accumulation)))
    every = max(1, steps // settings.evaluations_per_epoch)
    most = None if settings.max_steps is None else min(settings.max_steps, math.ceil(steps * settings.epochs))
    every = min(every, most or every)
    # Named only where it is wanted: transformers warns about its coming rename.
    checkpointing: dict[str, Any] = {"gradient_checkpointing": True} if settings.gradient_checkpointing else {}
    return PPlugTrainingArguments(
        output_dir=settings.output,
        num_train_epochs=settings.epochs,
        max_steps=most or -1,
        use_cpu=settings.device == "cpu",
        per_device_train_batch_size=settings.batch_size // processes,
        per_device_eval_batch_size=settings.batch_size // processes,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        encoder_learning_rate=settings.encoder_learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup,
        lr_scheduler_type="linear",
        train_sampling_strategy="group_by_length",  # little padding
        **checkpointing,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=every,
        save_steps=every,
        logging_steps=settings.logging_steps or max(1, every // 10),
        save_total_limit=1,
        restore_callback_states_from_checkpoint=True,  # how much patience is used up
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        prediction_loss_only=True,
        report_to=settings.report_to or "none",
        seed=settings.seed,
        dataloader_pin_memory=False,
    )
