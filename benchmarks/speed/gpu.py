"""Large backbones in bf16 on a GPU: training and generation compared with the plain reference and the bare backbone.

    python benchmarks/speed/gpu.py --json figures.json
    python benchmarks/speed/gpu.py --small     # on a CPU, a few small layers, whether it runs

Random weights in the shapes of FlanT5-XXL (11B: needs 24 GB and the activations) and Llama-2-7B; for the output layer
(see output_layer.py) those of SmolLM-135M and Llama-3.2-1B. Absolute times and the peak of allocated memory, weights
included. A side that the memory is too small for is reported as such. The figures are written as they come and printed
as JSON in the last line; no figure begins after five minutes.
"""

import argparse
import gc
import json
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import output_layer
import reference
import shapes
import torch
import train_step
from harness import difference, figure, ratios, run, spread
from transformers import PreTrainedModel

FLAN_T5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
FLAN_T5_XXL |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
LLAMA_2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_32_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
LLAMA_32_1B |= {"num_hidden_layers": 16, "vocab_size": 128_256, "tie_word_embeddings": True}
SECONDS = 300  # after which no figure begins
SMALL_T5 = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4}
SMALL_LLAMA = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}


def backbone(name: str, device: str, small: bool) -> PreTrainedModel:
    make, shape = {
        "t5": (shapes.t5_small, SMALL_T5 if small else FLAN_T5_XXL),
        "llama": (shapes.llama_60m, SMALL_LLAMA if small else LLAMA_2_7B),
    }[name]
    return shapes.built(lambda: make(**shape), torch.bfloat16, device)


def timed(call: Callable[[], Any], device: str) -> tuple[float, float]:
    """Seconds, and GB of GPU memory at the peak."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0


def compare(
    sides: dict[str, Callable[[], Any]], repetitions: int, device: str
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of the sides that the memory is enough for, and what to say about the memory of all."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    memory: dict[str, Any] = {}
    for repetition in range(-1, repetitions):
        for name in list(seconds):
            try:
                took, peak = timed(sides[name], device)
            except torch.OutOfMemoryError:
                del seconds[name]
                memory[f"peak GB, {name}"] = "more than there is"
            else:
                memory[f"peak GB, {name}"] = round(peak, 2)
                if repetition >= 0:
                    seconds[name].append(took)
            free(device)
    return seconds, memory


def free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def rates(seconds: dict[str, list[float]], amount: int, unit: str) -> dict[str, Any]:
    return {side: spread([amount / s for s in times]) | {"unit": unit} for side, times in seconds.items()}


def ratio_of(seconds: dict[str, list[float]], above: str) -> dict[str, Any] | None:
    return ratios(seconds[above], seconds["package"]) if {above, "package"} <= seconds.keys() else None


def training(model: Any, title: str, n: int, batch: int, repetitions: int, device: str) -> dict[str, Any]:
    """An epoch through the plug compared with the plain reference and with the bare backbone's forward and backward."""
    plain = reference.PlainModel(model).to(device)
    dataset = train_step.data(model, n, batch)
    # The batches are on the device already: what is compared is computing.
    moved = [
        {k: v.to(device) for k, v in given.items()}
        for given in train_step.plain_loader(model, train_step.plain_rows(dataset), batch)
    ]
    ours: Any = [
        {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        for given in train_step.ours_loader(model, dataset, batch)
    ]
    answer_tokens = sum(int((given["labels"] >= 0).sum()) for given in ours)
    losses: dict[str, float] = {}
    epochs = {
        "reference": train_step.plain(plain, moved, answer_tokens),  # type: ignore[arg-type]
        "package": train_step.ours(model, ours, answer_tokens),
    }
    sides: dict[str, Callable[[], Any]] = {
        side: lambda side=side, epoch=epoch: losses.update({side: epoch()}) for side, epoch in epochs.items()
    }
    seconds, checks = compare(sides | {"backbone alone": train_step.floor(model, ours)}, repetitions, device)
    if "reference" in losses and "package" in losses:
        checks["loss"] = losses["package"]
        checks["loss difference"] = abs(losses["package"] - losses["reference"]) / losses["reference"]
        got, expected = train_step.gradient(model.plug), train_step.gradient(plain.plug)
        checks["gradient difference"] = difference(got, expected)
    return figure(
        f"training step, {title}, bf16",
        rates(seconds, n, "examples/s"),
        ratio_of(seconds, "reference"),
        at_least=4,
        checks=checks,
    )


@torch.no_grad()
def generation(model: Any, title: str, size: int, tokens: int, repetitions: int, device: str) -> dict[str, Any]:
    words = random.Random(0)
    texts = [shapes.text(140, words) for _ in range(size)]
    side = "right" if model.config.is_encoder_decoder else "left"
    prompts = model.tokenizer(texts, return_tensors="pt", padding=True, padding_side=side).to(device)
    persona, query = [shapes.persona(model, 90, i) for i in range(size)], shapes.items(size).to(device)
    forced = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    calls = {
        "backbone": lambda: model.backbone.generate(**prompts, **forced),
        "package": lambda: model.generate(**prompts, persona=persona, query=query, **forced),
    }
    seconds, memory = compare(calls, repetitions, device)
    return figure(
        f"generation, {title}, batch {size}",
        rates(seconds, size * tokens, "tokens/s"),
        ratio_of(seconds, "backbone"),
        at_least=0.97,
        checks=memory,
    )


def output_layers(small: bool, repetitions: int, device: str) -> Iterator[dict[str, Any]]:
    """Each layer with the contiguous input that freezing gives it and without."""
    rows, tokens = (3, 20) if small else (output_layer.BATCH, output_layer.TOKENS)
    for title, shape in (("SmolLM-135M's shape", output_layer.SMOLLM_135M), ("Llama-3.2-1B's shape", LLAMA_32_1B)):
        shape = shape | (output_layer.SMALL if small else {})
        for dtype in (torch.bfloat16, torch.float32):
            model = output_layer.personalised(shape, dtype, device)
            name = f"{title}, {str(dtype).removeprefix('torch.')}"
            yield from output_layer.compared(
                model, name, rows, tokens, lambda sides: compare(sides, repetitions, device)
            )
            del model
            free(device)


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.small:
        raise SystemExit("No GPU here. On a CPU: --small, which shows whether the script runs and nothing else.")
    started = time.perf_counter()
    for one in every_figure(args, device):
        yield one
        if time.perf_counter() - started > SECONDS:
            return


def every_figure(args: argparse.Namespace, device: str) -> Iterator[dict[str, Any]]:
    yield from output_layers(args.small, args.repetitions, device)
    n, batch, tokens = (2, 1, 2) if args.small else (32, 8, 64)
    for name, title in (("llama", "Llama-2-7B's shape"), ("t5", "FlanT5-XXL's shape")):
        model = shapes.personalised(backbone(name, device, args.small))
        yield training(model, title, n, batch, args.repetitions, device)
        model.eval()
        for size in (1, 2) if args.small else (1, 16):
            yield generation(model, title, size, tokens, args.repetitions, device)
        del model  # two such backbones do not fit
        free(device)


if __name__ == "__main__":
    print(json.dumps(run(measure, __doc__ or "", repetitions=3)))
