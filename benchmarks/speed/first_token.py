# ruff: noqa: B023  (every closure is called before its loop goes on)
"""Time to the first token with a cached persona: what comes on top of the backbone's own.

    python benchmarks/speed/first_token.py

One prompt of 140 tokens. The bare side is `backbone.generate` of one token. The query encoder (12 layers, 768 wide: more
parameters than these backbones) is timed alone. What the target is about is everything else that the package adds: at most
5 % of the bare time. It is measured with the request as a vector, because the encoder takes more than twice the
backbone's time and varies by more than 5 % of it; beside it stands what is left of the request as text when the encoder's
forward is subtracted.
"""

import argparse
import random
from typing import Any

import shapes
import torch
from harness import difference, figure, run, spread, take_turns


@torch.no_grad()
def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    figures = []
    encoder = shapes.bert_encoder(layers=2 if args.small else 12)
    for name in shapes.BACKBONES:
        model = shapes.personalised(name, encoder)
        text = shapes.text(140, random.Random(0))
        inputs = model.tokenizer([text], return_tensors="pt")
        one = {"max_new_tokens": 1, "min_new_tokens": 1, "do_sample": False}
        features = encoder.preprocess([text])
        for n in (90, 1000):
            persona = shapes.persona(model, n)
            sides = {
                "backbone": lambda: model.backbone.generate(**inputs, **one),
                "query encoder's forward": lambda: encoder(dict(features)),
                "package": lambda: model.generate(**inputs, persona=persona, query=text, **one),
                "package, request as vector": lambda: model.generate(
                    **inputs,
                    persona=persona,
                    query=query,
                    **one,
                ),
            }
            query = encoder.encode([text], convert_to_tensor=True).clone()
            seconds = take_turns(sides, 3 * args.repetitions, warm_up=2)
            rows = list(zip(*seconds.values(), strict=True))
            added = [(vector - bare) / bare for bare, _, _, vector in rows]
            with_text = [(text - forward - bare) / bare for bare, forward, text, _ in rows]
            given = {"max_new_tokens": 1, "output_scores": True, "return_dict_in_generate": True}
            got = model.generate(**inputs, persona=persona, query=text, **given).scores[0]
            expected = model.generate(**inputs, persona=persona, query=query, **given).scores[0]
            figures.append(
                figure(
                    f"added time to the first token, {name}, N = {n}",
                    {side: spread(times) for side, times in seconds.items()},
                    spread(added),
                    at_most=0.05,
                    checks={"difference of scores, text or vector": difference(got, expected)},
                    added_with_request_as_text=spread(with_text),
                )
            )
    return figures


if __name__ == "__main__":
    run(measure, __doc__ or "")
