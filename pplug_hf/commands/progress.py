"""Losses and the time left while a plug is trained, and a summary at the end."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

from ..modeling.plug_folder import weight_shapes
from ..storage.layout import WEIGHTS
from .options import EvaluateSettings, TrainSettings

# Options that `evaluate` takes as the training did, beside those that the plug knows.
_AS_TRAINED = (
    *("task", "max_items", "leave_out_users", "split_seed"),
    *("backbone_dtype", "max_length", "device", "vectors"),
)


class TrainingProgress(ProgressCallback):
    """A bar, and a line with the losses whenever they are known."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.start, self.first, self.best = time.monotonic(), state.global_step, float("inf")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if self.training_bar is None or not {"loss", "eval_loss"} & logs.keys():
            return
        line = f"step {state.global_step} of {state.max_steps}, epoch {logs.get('epoch', 0):.1f}: "
        if "loss" in logs:
            line += f"loss {float(logs['loss']):.3f}"
        else:
            line += f"validation loss {logs['eval_loss']:.3f}"
            line += ", the best so far" if logs["eval_loss"] < self.best else ""
            self.best = min(self.best, logs["eval_loss"])
        done, left = state.global_step - self.first, state.max_steps - state.global_step
        if done and left:
            line += f", {duration((time.monotonic() - self.start) / done * left)} left"
        self.training_bar.write(line)


def duration(seconds: float) -> str:
    """Return a length of time as people say it."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def learned(history: Sequence[Mapping[str, float]], steps: int, seconds: float) -> str:
    """Return a sentence about a training: its steps, its time, and the loss on the validation users.

    Args:
        history: the Trainer's `log_history`.
        steps: of the optimiser.
        seconds: that they took.
    """
    losses = [(record["eval_loss"], record["step"]) for record in history if "eval_loss" in record]
    text = f"Trained {steps} steps in {duration(seconds)}."
    if not losses:
        return text
    best, step = min(losses)
    first = f"{losses[0][0]:.3f} after {losses[0][1]} steps, " if losses[0] != (best, step) else ""
    return f"{text} Validation loss: {first}{best:.3f} after {step}, which is the checkpoint that is kept."


def saved(settings: TrainSettings, has_dev: bool) -> str:
    """Return what to know of a saved plug: its place, its size, and the next command."""
    output = Path(settings.output)
    numbers = sum(map(math.prod, weight_shapes(settings.output).values()))
    size = (output / WEIGHTS).stat().st_size / 1e6
    plug = (
        ["--plug", settings.output]
        if settings.use_history
        else ["--plug", "PLUG", "--instruction_only", settings.output]
    )
    command = ["pplug-hf", "evaluate", *plug, "--data", str(settings.data)]
    defaults = {f.name: f.default for f in fields(EvaluateSettings)}
    for name in _AS_TRAINED:
        if (value := getattr(settings, name)) != defaults[name]:
            command += [f"--{name}", str(value)]
    if not has_dev:
        command = ["pplug-hf", "generate", "--plug", settings.output, "--prompt", "...", "--history", "history.txt"]
    return (
        f"Plug saved in {settings.output}: {numbers:,} parameters, {size:.1f} MB. The language model is unchanged and not "
        f"part of it.\nNext: {shlex.join(command)}"
    )
