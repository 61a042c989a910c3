"""torch.compile: the plug, and the backbone's decode step with a static cache, compiled and not.

    python benchmarks/speed/compile.py

The plug: forward and backward on 16 users with LaMP's history lengths, another batch in every repetition, so a compiled plug
has to take batches of any length; how many graphs it needed is counted. Generation: greedy, one prompt of 140 tokens with a
cached persona, transformers' own compilation of the step that writes a token (`cache_implementation="static"`). The time until
everything is compiled is given apart. There is no target: transformers itself compiles the step on a GPU only.
"""

import argparse
import itertools
import random
import time
from collections.abc import Callable
from typing import Any

import shapes
import torch
from harness import difference, figure, ratios, run, spread, take_turns
from torch._dynamo.utils import counters
from transformers import CompileConfig

from pplug_hf.modeling.plug_batched import batch_histories


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    figures = []
    for name in shapes.BACKBONES:
        model = shapes.personalised(name)
        if not figures:
            figures.append(plug(model, args))
        figures.append(decode_step(name, model, args))
    return figures


def plug(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    counters.clear()
    compiled = torch.compile(model.plug, fullgraph=True)
    rng = shapes.np.random.default_rng(0)
    batches = []
    for seed in range(4):
        histories = [shapes.items(n, seed) for n in shapes.lengths(16, rng, 100 if args.small else shapes.MAX_HISTORY)]
        batches.append((shapes.items(16, seed=9 + seed), batch_histories(histories)))

    def trained(module: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        model.plug.zero_grad()
        prompt = module(*batch)
        prompt.square().sum().backward()
        return prompt.detach(), model.plug.projector.hidden.weight.grad.clone()

    def stepping(module: Any) -> Callable[[], Any]:
        turn = itertools.cycle(batches)
        return lambda: trained(module, next(turn))

    start = time.perf_counter()
    apart = [
        (difference(got, expected), difference(got_gradient, gradient))
        for batch in batches
        for (got, got_gradient), (expected, gradient) in [(trained(compiled, batch), trained(model.plug, batch))]
    ]
    first = time.perf_counter() - start
    seconds = take_turns({"plug": stepping(model.plug), "compiled": stepping(compiled)}, 3 * args.repetitions)
    checks = {"difference": max(a for a, _ in apart), "difference of gradients": max(b for _, b in apart)}
    checks |= {"graphs": counters["stats"]["unique_graphs"], "graph breaks": sum(counters["graph_break"].values())}
    return figure(
        "plug compiled, forward and backward, times faster",
        {side: spread(times) for side, times in seconds.items()},
        ratios(seconds["plug"], seconds["compiled"]),
        checks=checks,
        seconds_until_compiled=first,
    )


def decode_step(name: str, model: Any, args: argparse.Namespace) -> dict[str, Any]:
    tokens = 8 if args.small else 64
    inputs = model.tokenizer([shapes.text(140, random.Random(0))], return_tensors="pt")
    given = {**inputs, "persona": shapes.persona(model, 90), "query": shapes.items(1, seed=9), "do_sample": False}
    given |= {"max_new_tokens": tokens, "min_new_tokens": tokens}
    settings: Any = CompileConfig(fullgraph=True, mode="default")
    settings._compile_all_devices = True  # transformers leaves it out on a CPU
    static = {"cache_implementation": "static"}
    sides = {
        "growing cache": lambda: model.generate(**given),
        "static cache": lambda: model.generate(**given, **static),
        "static cache, compiled": lambda: model.generate(**given, **static, compile_config=settings),
    }
    counters.clear()
    expected = sides["growing cache"]()
    start = time.perf_counter()
    answers = {side: call() for side, call in list(sides.items())[::-1]}
    first = time.perf_counter() - start
    seconds = take_turns(sides, args.repetitions)
    checks: dict[str, Any] = {f"tokens equal, {side}": torch.equal(got, expected) for side, got in answers.items()}
    checks |= {"graphs": counters["stats"]["unique_graphs"], "graph breaks": sum(counters["graph_break"].values())}
    return figure(
        f"generation of {tokens} tokens with a compiled step, {name}, times faster",
        {side: spread([tokens / s for s in times]) | {"unit": "tokens/s"} for side, times in seconds.items()},
        ratios(seconds["growing cache"], seconds["static cache, compiled"]),
        checks=checks,
        static_cache_alone_times_faster=ratios(seconds["growing cache"], seconds["static cache"]),
        seconds_until_compiled=first,
    )


if __name__ == "__main__":
    run(measure, __doc__ or "")
