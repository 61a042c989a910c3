"""Generation compared with the bare backbone on the same prompts, and with retrieval prompts with four items.

    python benchmarks/speed/generation.py

Greedy, EOS forbidden, so all sides write the same number of tokens. Personas are cached and requests are vectors: what
encoding a request costs is in first_token.py. Against the bare backbone: 64 new tokens. Against retrieval, whose prompt
holds four items of the history in front of the question: once a label of 2 tokens, as LaMP-1 to LaMP-3 ask for, and once
16 tokens. The target there, the ratio of prompt lengths to the power of 0.8, can only be met where reading the prompt
is what takes the time; the share of reading is given beside it, and "best possible": the same ratio for the bare
backbone without any persona, for these new tokens and for reading alone.
"""

import argparse
import random
from collections.abc import Callable
from typing import Any

import shapes
import torch
from harness import figure, ratios, run, spread, take_turns

ITEMS, ITEM_TOKENS = 4, 80


class Prompts:
    """Prompts of B users, and the same with four retrieved items in front."""

    def __init__(self, model: Any, batch: int, seed: int = 0):
        rng = random.Random(seed)
        questions = [shapes.text(rng.randint(30, 250) if batch > 1 else 140, rng) for _ in range(batch)]
        retrieved = [
            ", and ".join([*(shapes.text(ITEM_TOKENS, rng) for _ in range(ITEMS)), question]) for question in questions
        ]
        side = "right" if model.config.is_encoder_decoder else "left"
        padded = {"padding": True, "padding_side": side, "return_tensors": "pt"}
        self.bare, self.retrieval = model.tokenizer(questions, **padded), model.tokenizer(retrieved, **padded)
        lengths = shapes.lengths(batch, shapes.np.random.default_rng(seed)) if batch > 1 else [90]
        self.persona = [shapes.persona(model, n, seed + i) for i, n in enumerate(lengths)]
        self.query = shapes.items(batch, seed=9)

    def package(self, model: Any, tokens: int) -> Callable[[], torch.Tensor]:
        given = {"persona": self.persona, "query": self.query}
        return lambda: model.generate(**self.bare, **given, **forced(tokens))

    def alone(self, model: Any, tokens: int, prompts: Any = None) -> Callable[[], torch.Tensor]:
        return lambda: model.backbone.generate(**(prompts or self.bare), **forced(tokens))


def forced(tokens: int) -> dict[str, Any]:
    return {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}


@torch.no_grad()
def equals_by_hand(model: Any, prompts: Prompts, tokens: int = 8) -> bool:
    """The package's tokens are those of the backbone on soft prompt and words put together by hand, row by row."""
    got = prompts.package(model, tokens)()[:, -tokens:]
    soft = model.soft_prompt(prompts.persona, query=prompts.query)
    front = 0 if model.config.is_encoder_decoder else 1
    for row, (ids, mask) in enumerate(zip(prompts.bare["input_ids"], prompts.bare["attention_mask"], strict=True)):
        words = model.backbone.get_input_embeddings()(ids[mask.bool()])
        embeds = torch.cat([words[:front], soft[row], words[front:]])[None]
        by_hand = model.backbone.generate(
            inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), **forced(tokens)
        )
        if not torch.equal(by_hand[0, -tokens:], got[row]):
            return False
    return True


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    figures, tokens = [], 8 if args.small else 64
    for name in shapes.BACKBONES:
        model = shapes.personalised(name)
        for batch in (1, 4) if args.small else (1, 16):
            prompts = Prompts(model, batch)
            sides = {"backbone": prompts.alone(model, tokens), "package": prompts.package(model, tokens)}
            seconds = take_turns(sides, args.repetitions)
            rate = {
                side: spread([batch * tokens / s for s in times]) | {"unit": "tokens/s"}
                for side, times in seconds.items()
            }
            ratio = ratios(seconds["backbone"], seconds["package"])
            checks = {"tokens equal those by hand": equals_by_hand(model, prompts) if batch == 1 else "see batch 1"}
            title = f"generation of {tokens} tokens, {name}, batch {batch}"
            figures.append(figure(title, rate, ratio, at_least=0.97, checks=checks))
        for new in (2, 16):
            prompts = Prompts(model, 4 if args.small else 16)
            sides = {
                "retrieval": prompts.alone(model, new, prompts.retrieval),
                "package": prompts.package(model, new),
                "package, reading alone": prompts.package(model, 1),
                "backbone": prompts.alone(model, new),
                "backbone, reading alone": prompts.alone(model, 1),
                "retrieval, reading alone": prompts.alone(model, 1, prompts.retrieval),
            }
            seconds = take_turns(sides, args.repetitions)
            longer = prompts.retrieval["attention_mask"].sum() / prompts.bare["attention_mask"].sum()
            share = ratios(seconds["package, reading alone"], seconds["package"])
            figures.append(
                figure(
                    f"{new} new tokens compared with a retrieval prompt of {ITEMS} items, {name}",
                    {side: spread(times) for side, times in seconds.items()},
                    ratios(seconds["retrieval"], seconds["package"]),
                    at_least=round(float(longer) ** 0.8, 2),
                    checks={"ratio of prompt lengths": round(float(longer), 2)},
                    share_of_reading=share,
                    best_possible=ratios(seconds["retrieval"], seconds["backbone"]),
                    best_possible_for_reading_alone=ratios(
                        seconds["retrieval, reading alone"], seconds["backbone, reading alone"]
                    ),
                )
            )
    return figures


if __name__ == "__main__":
    run(measure, __doc__ or "")
