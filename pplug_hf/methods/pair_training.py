"""Training of weights on (prompt, answer) pairs: one loop for all users, so nothing of one reaches the next.

Weights, optimiser and random numbers are fresh at the start of every call. What comes out depends on the pairs, the
settings and the seed alone: not on who was trained before, in which order, or in which process.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from .private_weights import PrivateWeights

Schedule = Literal["constant", "linear"]


@dataclass(frozen=True, kw_only=True)
class PairTraining:
    """Settings of the loop.

    Args:
        epochs: passes over the pairs.
        learning_rate: of AdamW.
        schedule: "constant", or "linear" down to zero.
        warmup: share of the steps in which the learning rate rises.
        weight_decay: of AdamW.
        clip: largest norm of a gradient.
        batch_size: pairs per step.
        stop_below: end after a pass whose mean loss is below this; 0 never ends early.
        max_answer_length: cut answers to this many tokens.
    """

    epochs: int = 5
    learning_rate: float = 5e-4
    schedule: Schedule = "constant"
    warmup: float = 0.0
    weight_decay: float = 0.0
    clip: float = 1.0
    batch_size: int = 8
    stop_below: float = 0.0
    max_answer_length: int = 128


class TrainingRecord(NamedTuple):
    """Facts about one training."""

    passes: int
    steps: int
    first_loss: float  # mean of the first pass
    last_loss: float  # mean of the last pass
    curve: list[float]  # of `measure`, before the first pass and after each; empty without it


def train_on_pairs(
    weights: PrivateWeights,
    pairs: Sequence[tuple[str, str]],
    training: PairTraining,
    *,
    seed: int,
    max_length: int,
    start: Mapping[str, Tensor] | None = None,
    measure: Callable[[], float] | None = None,
    description: str = "",
) -> TrainingRecord:
    """Train weights from their start; the loss is that of the answers' tokens.

    Args:
        weights: on their language model.
        pairs: n (prompt, answer) pairs, at least one.
        training: settings.
        seed: of fresh weights, of dropout and of the order of pairs.
        max_length: cut prompts to this many tokens.
        start: values to start from instead of fresh ones.
        measure: called before the first pass and after each, such as the loss of other pairs.
        description: title of a progress bar (default: none).

    Returns:
        Facts about it; the result is in `weights`.
    """
    weights.reset(seed, start)
    optimizer = torch.optim.AdamW(weights.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay)
    batches = -(-len(pairs) // training.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(training, step, batches))
    rng, means, steps = random.Random(seed), [], 0
    with (
        torch.enable_grad(),
        torch.random.fork_rng(),
        tqdm(total=training.epochs * batches, desc=description, disable=not description) as bar,
    ):
        torch.manual_seed(seed)
        curve = [] if measure is None else [measure()]
        weights.training(True)
        for _ in range(training.epochs):
            total = 0.0
            for batch in _batches(pairs, training.batch_size, rng):
                prompts, answers = zip(*batch, strict=True)
                loss = weights.loss(prompts, answers, max_length, training.max_answer_length)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(weights.parameters(), training.clip)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                total += loss.item() * len(batch)
                steps += 1
                bar.update()
            means.append(total / len(pairs))
            if measure is not None:
                weights.training(False)
                curve.append(measure())
                weights.training(True)
            if means[-1] < training.stop_below:
                break
        weights.training(False)
    return TrainingRecord(len(means), steps, means[0], means[-1], curve)


@contextmanager
def eager_attention(language_model: PreTrainedModel) -> Iterator[None]:
    """Compute attention in plain steps within the block, where that is faster.

    On a CPU, the backward pass of torch's fused attention took 300 to 425 ms for an example on which the plain one took
    180 to 240 (135M weights in bfloat16, 100 tokens).
    """
    plain = language_model.device.type == "cpu" and language_model.config._attn_implementation == "sdpa"
    if plain:
        language_model.set_attn_implementation("eager")
    try:
        yield
    finally:
        if plain:
            language_model.set_attn_implementation("sdpa")


def _batches(pairs: Sequence[tuple[str, str]], batch_size: int, rng: random.Random) -> Iterator[list[tuple[str, str]]]:
    """Yield all pairs once, in batches of similar length and in random order."""
    order = rng.sample(range(len(pairs)), len(pairs))
    order.sort(key=lambda row: len(pairs[row][0]) // 64)  # stable: in a group of lengths the order is random
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    rng.shuffle(batches)
    for batch in batches:
        yield [pairs[row] for row in batch]


def _rate(training: PairTraining, step: int, batches: int) -> float:
    """Return the share of the learning rate at a step."""
    total = training.epochs * batches
    warmup = training.warmup * total
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 1.0 if training.schedule == "constant" else max(0.0, (total - step) / max(1.0, total - warmup))
