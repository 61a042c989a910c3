# ruff: noqa: B023  (every closure is called before its loop goes on)
"""Training examples per second, plug only, vectors precomputed: the package compared with the plain reference.

    python benchmarks/speed/train_step.py

An epoch of made-up examples with LaMP's lengths through the data set, the collator, forward, backward and AdamW. The
learning rate is zero, so every repetition must give the same loss and the same summed gradient. Beside the whole step
stand the plug alone (its forward and backward on the same batches), and the floor: the frozen backbone's forward and
backward on the package's batches, without any plug, which no implementation can avoid.
"""

import argparse
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import reference
import shapes
import torch
from harness import difference, figure, ratios, run, spread, take_turns
from torch.utils.data import DataLoader
from transformers.trainer_pt_utils import LengthGroupedSampler

from pplug_hf import PPlugCollator, PPlugProcessor
from pplug_hf.data.dataset import PersonaDataset
from pplug_hf.data.lamp import Example

EXAMPLES, BATCH = 64, 16


class KnownVectors:
    """Stands in for a store whose texts are all encoded."""

    def __init__(self, model: Any):
        self.fingerprint, self.width = model.config.encoder_fingerprint, model.config.sizes[0]

    def __call__(self, texts: list[str]) -> torch.Tensor:
        return shapes.items(len(texts), seed=1, width=self.width)


def data(model: Any, n: int, batch: int, seed: int = 0) -> PersonaDataset:
    """n examples of as many users, batch by batch in the order of training; items are shared between users as texts are
    in LaMP, a few very often."""
    rng, words = np.random.default_rng(seed), random.Random(seed)
    examples = []
    prompts = [shapes.text(words.randint(30, 250), words) for _ in range(50 * 4 * batch)]
    rows = [i for some in batches_of(list(map(len, prompts)), n, batch) for i in some]
    for i, length in zip(rows, shapes.lengths(n, rng, shapes.MAX_HISTORY), strict=True):
        history = [f"item {j}" for j in (rng.pareto(1.0, length) * 2000).astype(int) % 50_000]
        answer = shapes.text(words.randint(5, 30), words)
        examples.append(Example(str(i), str(i), prompts[i], prompts[i], answer, history))
    queries = shapes.items(n, seed=2, width=model.config.sizes[0])
    return PersonaDataset(examples, KnownVectors(model), queries=queries)


def batches_of(lengths: list[int], n: int, batch: int) -> list[list[int]]:
    """n / batch of the batches that training makes of examples with these lengths, evenly spread over the short and the
    long ones.

    Training groups fifty batches' worth of examples by length at a time; to time as many would take hours.
    """
    sampler = LengthGroupedSampler(batch, lengths=lengths, generator=torch.Generator().manual_seed(0))
    order = list(sampler)
    made = sorted(
        (order[i : i + batch] for i in range(0, len(order), batch)), key=lambda rows: max(lengths[i] for i in rows)
    )
    kept = n // batch
    return [made[(2 * i + 1) * len(made) // (2 * kept)] for i in range(kept)]


def plain_rows(dataset: PersonaDataset) -> list[dict[str, Any]]:
    """The same examples, each with a table of vectors of its own."""
    rows = [dataset[i] for i in range(len(dataset))]
    return [row | {"vectors": row["persona"].vectors.clone()} for row in rows]


def ours_loader(model: Any, dataset: PersonaDataset, batch: int) -> DataLoader:
    collator = PPlugCollator(PPlugProcessor.from_model(model), shapes.MAX_PROMPT, shapes.MAX_ANSWER)
    return DataLoader(dataset, batch, collate_fn=collator)  # the examples stand in the order of training


def plain_loader(model: Any, rows: list[dict[str, Any]], batch: int) -> DataLoader:
    collator = reference.PlainCollator(
        model.tokenizer, model.config.is_encoder_decoder, shapes.MAX_PROMPT, shapes.MAX_ANSWER, shapes.MAX_HISTORY
    )
    generator = torch.Generator().manual_seed(0)
    return DataLoader(rows, batch, shuffle=True, generator=generator, collate_fn=collator)


def optimizer_of(module: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.0, weight_decay=1e-4)


def ours(model: Any, loader: DataLoader, answer_tokens: int) -> Callable[[], float]:
    """An epoch; gives the mean loss and leaves the summed gradient."""
    optimizer = optimizer_of(model.plug)

    def epoch() -> float:
        model.train()
        optimizer.zero_grad()
        total = 0.0
        for batch in loader:
            batch = {k: v for k, v in batch.items() if not k.startswith("prompt_")}
            loss = model(**batch, num_items_in_batch=answer_tokens).loss
            loss.backward()
            optimizer.step()
            total += loss.item()
        return total

    return epoch


def plain(model: reference.PlainModel, loader: DataLoader, answer_tokens: int) -> Callable[[], float]:
    optimizer = optimizer_of(model.plug)

    def epoch() -> float:
        optimizer.zero_grad()
        total = 0.0
        for batch in loader:
            loss = model(**batch).loss * ((batch["labels"] >= 0).sum() / answer_tokens)
            loss.backward()
            optimizer.step()
            total += loss.item()
        return total

    return epoch


def floor(model: Any, loader: DataLoader) -> Callable[[], None]:
    """Forward and backward of the frozen backbone on the package's batches; answers only where they are predicted."""
    backbone = model.backbone

    def epoch() -> None:
        for batch in loader:
            words = backbone.get_input_embeddings()(batch["input_ids"]).requires_grad_()
            given: dict[str, Any] = {"inputs_embeds": words, "attention_mask": batch["attention_mask"]}
            labels = batch["labels"]
            if model.config.is_encoder_decoder:
                given["decoder_input_ids"] = backbone.prepare_decoder_input_ids_from_labels(labels=labels)
            else:
                given["logits_to_keep"] = int((labels >= 0).sum(dim=1).max()) + 1
                labels = labels[:, -given["logits_to_keep"] :]
            logits = backbone(**given, use_cache=False).logits
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()

    return epoch


def plug_alone(
    model: Any, plain_model: reference.PlainModel, dataset: PersonaDataset, rows: Any, batch: int
) -> dict[str, Callable]:
    """Forward and backward of the plug alone on batches of vectors."""
    starts = range(0, len(dataset), batch)
    batches = [[dataset[i] for i in range(start, start + batch)] for start in starts]
    inputs = [
        (torch.stack([row["query"] for row in some]), [row["persona"].vectors for row in some]) for some in batches
    ]
    collate = plain_loader(model, rows, batch).collate_fn
    tables = [collate(rows[start : start + batch]) for start in starts]

    def package() -> None:
        for queries, histories in inputs:
            model.plug(queries, histories).sum().backward()

    def reference_() -> None:
        for table in tables:
            plain_model.plug(table["query"], table["items"], table["mask"]).sum().backward()

    return {"reference": reference_, "package": package}


def stages(model: Any, loader: DataLoader, answer_tokens: int) -> dict[str, float]:
    """Share of each stage of the package's step, one epoch."""
    optimizer = optimizer_of(model.plug)
    seconds = dict.fromkeys(("data", "plug forward", "backbone forward and loss", "backward", "optimizer"), 0.0)
    started = [0.0]
    hooks = [
        model.plug.register_forward_pre_hook(lambda *_: started.append(time.perf_counter())),
        model.plug.register_forward_hook(lambda *_: started.append(time.perf_counter())),
    ]
    clock = time.perf_counter()
    for batch in timed(loader, seconds):
        batch = {k: v for k, v in batch.items() if not k.startswith("prompt_")}
        clock = time.perf_counter()
        loss = model(**batch, num_items_in_batch=answer_tokens).loss
        forward = time.perf_counter() - clock
        seconds["plug forward"] += started[-1] - started[-2]
        seconds["backbone forward and loss"] += forward - (started[-1] - started[-2])
        clock = time.perf_counter()
        loss.backward()
        seconds["backward"] += time.perf_counter() - clock
        clock = time.perf_counter()
        optimizer.step()
        seconds["optimizer"] += time.perf_counter() - clock
    for hook in hooks:
        hook.remove()
    total = sum(seconds.values())
    return {name: value / total for name, value in seconds.items()}


def timed(loader: DataLoader, seconds: dict[str, float]) -> Iterator[dict[str, Any]]:
    batches = iter(loader)
    while True:
        clock = time.perf_counter()
        batch = next(batches, None)
        seconds["data"] += time.perf_counter() - clock
        if batch is None:
            return
        yield batch


def gradient(plug: Any) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in (plug.instruction, *plug_layers(plug))])


def plug_layers(plug: Any) -> list[torch.nn.Parameter]:
    projector = getattr(plug, "projector", plug)
    return [*projector.hidden.parameters(), *projector.output.parameters()]


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    figures = []
    n, batch = (8, 4) if args.small else (EXAMPLES, BATCH)
    for name in shapes.BACKBONES:
        model = shapes.personalised(name)
        plain_model = reference.PlainModel(model)
        dataset = data(model, n, batch)
        rows = plain_rows(dataset)
        loader = ours_loader(model, dataset, batch)
        answer_tokens = sum(int((batch["labels"] >= 0).sum()) for batch in loader)
        losses: dict[str, set[float]] = {"reference": set(), "package": set()}
        plain_epoch = plain(plain_model, plain_loader(model, rows, batch), answer_tokens)
        our_epoch = ours(model, loader, answer_tokens)
        seconds = take_turns(
            {
                "reference": lambda run=plain_epoch: losses["reference"].add(run()),
                "package": lambda run=our_epoch: losses["package"].add(run()),
                "backbone alone": floor(model, loader),
            },
            args.repetitions,
        )
        expected, got = max(losses["reference"]), max(losses["package"])
        checks = {
            "loss": got,
            "loss difference": abs(got - expected) / expected,
            "gradient difference": difference(gradient(model.plug), gradient(plain_model.plug)),
        }
        rate = {side: spread([n / s for s in times]) | {"unit": "examples/s"} for side, times in seconds.items()}
        figures.append(
            figure(
                f"training step, {name}",
                rate,
                ratios(seconds["reference"], seconds["package"]),
                at_least=4,
                checks=checks,
                best_possible=ratios(seconds["reference"], seconds["backbone alone"]),
                over_the_floor=ratios(seconds["package"], seconds["backbone alone"]),
                stages=stages(model, loader, answer_tokens),
            )
        )
    for width in (512,) if args.small else (512, 4096):
        model = shapes.personalised("llama", projector_size=width) if width == 512 else wide()
        plain_model, dataset = reference.PlainModel(model), data(model, n, batch)
        seconds = take_turns(plug_alone(model, plain_model, dataset, plain_rows(dataset), batch), args.repetitions)
        checks = {"gradient difference": difference(gradient(model.plug), gradient(plain_model.plug))}
        rate = {side: spread([n / s for s in times]) | {"unit": "examples/s"} for side, times in seconds.items()}
        ratio = ratios(seconds["reference"], seconds["package"])
        figures.append(figure(f"plug alone, H = M = {width}", rate, ratio, at_least=4, checks=checks))
    return figures


def wide() -> Any:
    """A plug of Llama-2-7B's width; the backbone below it is a stub."""
    return shapes.personalised(
        shapes.llama_60m(hidden_size=4096, intermediate_size=64, num_hidden_layers=1, num_attention_heads=32)
    )


if __name__ == "__main__":
    run(measure, __doc__ or "", repetitions=3)
