"""Persona embedding of N cached items at H = 4096, compared with the matrix products it cannot avoid, and how it grows.

    python benchmarks/speed/persona.py

The unavoidable products are the projector's two layers: W1 on every item, W2 on the pooled vector. The package's side
is the public call `model.persona_embedding(persona, query=<vector>)` with all its checks, at a persona's first request;
later ones find the hidden vectors in memory, as "asked again" shows. The plain reference sends every item through both
layers.
"""

import argparse
import math
from dataclasses import replace
from typing import Any

import reference
import shapes
import torch
from harness import difference, figure, ratios, run, spread, take_turns

from pplug_hf import Persona

N = 10_000
GROWTH = (10, 100, 1_000, 10_000, 100_000)


def stranger(persona: Persona) -> Persona:
    """The same vectors, of a user whom the model has not seen."""
    return replace(persona)


@torch.no_grad()
def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    width = 512 if args.small else 4096
    stub = shapes.llama_60m(hidden_size=width, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    model = shapes.personalised(stub)
    plain = reference.PlainPlug(model)
    W1, W2 = model.plug.projector.hidden.weight.T, model.plug.projector.output.weight.T
    query = shapes.items(1, seed=3)
    persona = shapes.persona(model, N)
    items = persona.vectors

    def products() -> Any:
        return items @ W1, items[:1].new_zeros(1, len(W2)) @ W2

    seconds = take_turns(
        {
            "two products": products,
            "package": lambda: model.persona_embedding(stranger(persona), query=query),
            "package, asked again": lambda: model.persona_embedding(persona, query=query),
            "reference": lambda: plain(query, items[None], torch.ones(1, N, dtype=torch.bool)),
        },
        args.repetitions,
    )
    expected = plain(query, items[None], torch.ones(1, N, dtype=torch.bool))[:, 1:]
    got = model.persona_embedding(persona, query=query)
    sides = {side: spread(times) for side, times in seconds.items()}
    figures = [
        figure(
            f"persona embedding, N = {N:,}, H = {width}",
            sides,
            ratios(seconds["package"], seconds["two products"]),
            at_most=1.5,
            checks={"difference": difference(got, expected)},
            faster_than_reference=ratios(seconds["reference"], seconds["package"]),
        )
    ]
    times = {}
    growth = GROWTH[:-1] if args.small else GROWTH
    for n in growth:
        one = shapes.persona(model, n)
        call = {"package": lambda one=one: model.persona_embedding(stranger(one), query=query)}
        times[n] = spread(take_turns(call, max(2, min(args.repetitions, 100_000 // n)))["package"])
    long, short = growth[-1], growth[-2]
    exponent = math.log(times[long]["median"] / times[short]["median"]) / math.log(long / short)
    figures.append(
        figure(
            f"growth of the persona embedding, N = 10 to {long:,}",
            {f"N = {n:,}": t for n, t in times.items()},
            checks={f"exponent from {short:,} to {long:,} (1 is linear)": round(exponent, 3)},
            growth={n: t["median"] for n, t in times.items()},
        )
    )
    return figures


if __name__ == "__main__":
    run(measure, __doc__ or "")
