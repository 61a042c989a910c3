"""A prompt cache: training steps and answers with a soft prompt behind the prompt, with and without it.

    python benchmarks/speed/prompt_cache.py

A backbone in the shape of SmolLM2-135M, in float32 and in bfloat16; 8 prompts of 18 to 150 tokens that begin with the same
20 tokens, a header of 5 tokens behind the soft prompt, answers of 4 to 16 tokens. Seconds are processor seconds, which other work
on the machine changes least.

Without a cache a step reads prompt, soft prompt, header and answer; with it the last three. "Not kept" is a cache without room,
which reads every prompt without gradient: the cost of a step beyond all limits. "Plain attention" is the kind that the Trainer
takes for a bfloat16 backbone on a CPU whose prompts are kept. A known prompt is one of 150 tokens that
another user has asked before; the next turn of a conversation comes with 30 new tokens behind these 150.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import output_layer
import shapes
import torch
from harness import difference, figure, ratios, run, spread, take_turns

from pplug_hf import PromptCache
from pplug_hf.modeling.backbone import training_attention

ROWS, LONGEST, STEM, HEADER, NEW = 8, 150, 20, 5, 2


def heads_of(model: Any, rows: int, longest: int) -> list[list[int]]:
    """Random words of prompts whose lengths are evenly spread."""
    generator = torch.Generator().manual_seed(0)
    size = model.backbone.config.vocab_size
    words = torch.randint(len(shapes.SPECIAL), size, (rows, longest), generator=generator).tolist()
    lengths = torch.linspace(longest * 0.12, longest, rows).long().tolist()
    return [words[0][:STEM] + row[STEM:length] for row, length in zip(words, lengths, strict=True)]


def batch_of(model: Any, heads: list[list[int]], answers: int = 0) -> dict[str, Any]:
    """Prompts with their header, for users with 90 items; with answers of up to so many tokens, to train on."""
    lengths = torch.linspace(answers / 4, answers, len(heads)).long().tolist()
    tails = [[7] * n for n in lengths]
    rows = [head + [6] * HEADER + tail for head, tail in zip(heads, tails, strict=True)]
    width = max(map(len, rows))
    batch = {
        "input_ids": torch.tensor([[shapes.PAD] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
        "persona_position": torch.tensor(list(map(len, heads))),
        "persona": [shapes.persona(model, 90, i) for i in range(len(rows))],
        "query": shapes.items(len(rows)),
    }
    if answers:
        batch["labels"] = torch.tensor([[-100] * (width - len(tail)) + tail for tail in tails])
    return batch


def step_with(model: Any, cache: PromptCache | None, batch: dict[str, Any]) -> Callable[[], torch.Tensor]:
    def step() -> torch.Tensor:
        """The loss and the gradient."""
        model.train()
        model.prompt_cache = cache
        model.plug.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        model.prompt_cache = None
        return torch.cat([loss.detach()[None], *(p.grad.flatten() for p in model.plug.parameters())])

    return step


def answer_with(model: Any, cache: PromptCache | None, batch: dict[str, Any]) -> Callable[[], torch.Tensor]:
    def answer() -> torch.Tensor:
        """The logits of the first token."""
        forced = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
        wanted = {"return_dict_in_generate": True, "output_logits": True}
        return model.eval().generate(**batch, **forced, **wanted, prompt_cache=cache).logits[0]

    return answer


def next_turn(model: Any, cache: PromptCache, turns: list[dict[str, Any]]) -> Callable[[], torch.Tensor]:
    """One of the turns each time, so that each is new to the cache."""
    later = iter(turns)
    return lambda: answer_with(model, cache, next(later))()


def compared(name: str, sides: dict[str, Callable[[], Any]], repetitions: int, **more: Any) -> dict[str, Any]:
    """A figure whose ratio is how many times faster the second side is than the first."""
    results = {side: call() for side, call in sides.items()}
    first, second, *_ = sides
    seconds = take_turns(sides, repetitions, clock=time.process_time)
    return figure(
        name,
        {side: spread(values) for side, values in seconds.items()},
        ratios(seconds[first], seconds[second]),
        checks={f"difference, {side}": difference(results[side], results[first]) for side in list(sides)[1:]},
        **more,
    )


def with_plain_attention(model: Any, step: Callable[[], Any]) -> Callable[[], Any]:
    """The same step with the attention of training."""

    def run_step() -> Any:
        with training_attention(model.backbone):
            return step()

    return run_step


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    rows, longest = (4, 60) if args.small else (ROWS, LONGEST)
    shape = output_layer.SMALL if args.small else output_layer.SMOLLM_135M
    for dtype in (torch.float32, torch.bfloat16):
        model = output_layer.personalised(shape | {"max_position_embeddings": 2048}, dtype, placement="answer")
        precision = str(dtype).removeprefix("torch.")
        heads = heads_of(model, rows, longest)
        known, none = PromptCache(evict=False), PromptCache(0)
        known.share(heads)
        batch = batch_of(model, heads, answers=16)
        sides = {
            "read anew": step_with(model, None, batch),
            "cached": step_with(model, known, batch),
            "not kept": step_with(model, none, batch),
        }
        if dtype == torch.bfloat16:  # as in the Trainer
            sides["cached, plain attention"] = with_plain_attention(model, sides["cached"])
        one = compared(f"prompt cache, training step, {precision}, times faster", sides, args.repetitions)
        tokens = {"tokens of prompts": sum(map(len, heads)), "tokens kept": known.computed}
        yield {**one, **tokens, "kB per token": known.used / known.computed / 1000}

        prompt = batch_of(model, heads[-1:])
        sides = {"read anew": answer_with(model, None, prompt), "cached": answer_with(model, known, prompt)}
        yield compared(
            f"prompt cache, {NEW} tokens behind a known prompt, {precision}, times faster", sides, args.repetitions
        )

        turns = [batch_of(model, [heads[-1] + [8] * 20 + [i] * 10]) for i in range(10, 20 + args.repetitions)]
        sides = {"read anew": answer_with(model, None, turns[0]), "cached": next_turn(model, known, turns)}
        yield compared(f"prompt cache, next turn, {precision}, times faster", sides, args.repetitions)


if __name__ == "__main__":
    run(measure, __doc__)
