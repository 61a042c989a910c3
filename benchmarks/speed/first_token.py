# ruff: noqa: B023  (every closure is called before its loop goes on)
"""Time to the first token with a cached persona: what comes on top of the backbone's own.

    python benchmarks/speed/first_token.py

One prompt of 140 tokens. The bare side is `backbone.generate` of one token. The query encoder (12 layers, 768 wide: more
parameters than these backbones) is timed alone. What the target is about is everything else that the package adds: at most
5 % of the bare time. It is measured with the request as a vector, because the encoder takes more than twice the
backbone's time and varies by more than 5 % of it; beside it stands what is left of the request as text when the encoder's
forward is subtracted.

Two of the backbone's own tokens more are what no soft prompt can avoid: "best possible" is the backbone with a prompt of
142 tokens as embeddings. A persona's first request also computes what later ones find in memory.
"""

import argparse
import random
from dataclasses import replace
from typing import Any

import shapes
import torch
from harness import difference, figure, run, spread, take_turns

from pplug_hf import Persona


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
        query = encoder.encode([text], convert_to_tensor=True).clone()
        longer = model.backbone.get_input_embeddings()(
            torch.cat([inputs["input_ids"], inputs["input_ids"][:, -2:]], dim=1)
        )
        mask = torch.ones(longer.shape[:2], dtype=torch.long)
        for n in (90, 1000):
            persona = shapes.persona(model, n)

            def package(persona: Persona, query: Any) -> Any:
                return model.generate(**inputs, persona=persona, query=query, **one)

            sides = {
                "backbone": lambda: model.backbone.generate(**inputs, **one),
                "backbone, two tokens more": lambda: model.backbone.generate(
                    inputs_embeds=longer, attention_mask=mask, **one
                ),
                "package, request as vector": lambda: package(persona, query),
                "package, a persona's first request": lambda: package(replace(persona), query),
            }
            seconds = take_turns(sides, args.repetitions, warm_up=2)
            asked = take_turns(
                {
                    "backbone": sides["backbone"],
                    "query encoder's forward": lambda: encoder(dict(features)),
                    "package, request as text": lambda: package(persona, text),
                },
                -(-args.repetitions // 3),
                warm_up=2,
            )
            bare, two_more, vector, first = seconds.values()
            given = {"max_new_tokens": 1, "output_scores": True, "return_dict_in_generate": True}
            got = model.generate(**inputs, persona=persona, query=text, **given).scores[0]
            expected = model.generate(**inputs, persona=persona, query=query, **given).scores[0]
            figures.append(
                figure(
                    f"added time to the first token, {name}, N = {n}",
                    {side: spread(times) for side, times in ({**asked, **seconds}).items()},
                    spread(added(vector, bare)),
                    at_most=0.05,
                    checks={"difference of scores, text or vector": difference(got, expected)},
                    best_possible=spread(added(two_more, bare)),
                    added_at_the_first_request=spread(added(first, bare)),
                    added_with_request_as_text=spread(
                        [(text - forward - bare) / bare for bare, forward, text in zip(*asked.values(), strict=True)]
                    ),
                )
            )
    return figures


def added(times: list[float], bare: list[float]) -> list[float]:
    return [(time - alone) / alone for time, alone in zip(times, bare, strict=True)]


if __name__ == "__main__":
    run(measure, __doc__ or "", repetitions=40)
