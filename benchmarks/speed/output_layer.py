"""The output layer behind `logits_to_keep`: a frozen causal backbone with the contiguous input that freezing gives it.

    python benchmarks/speed/output_layer.py

torch folds a batch into one product with the vocabulary matrix only if the input is contiguous or the weight needs a
gradient; otherwise it multiplies row by row with a copy of the matrix each. The reference is the same model without
the hook on its output layer. A backbone in the shape of SmolLM-135M (vocabulary of 49,152, tied), and six layers of it;
16 rows of 80 tokens, of which 4 to 16 are the answer; generation of two tokens behind 80. Peak: the tensors on top of
the model, as in memory.py.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import memory
import shapes
import torch
from harness import difference, figure, ratios, run, spread, take_turns
from transformers import LlamaConfig, LlamaForCausalLM

SMOLLM_135M = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
SMOLLM_135M |= {"num_hidden_layers": 30, "vocab_size": 49_152, "tie_word_embeddings": True}
SMALL = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3}
SMALL |= {"num_hidden_layers": 1, "vocab_size": 1_000}
BATCH, TOKENS, NEW = 16, 80, 2
PACKAGE, REFERENCE = "package", "without the hook"


def personalised(shape: dict[str, Any], dtype: torch.dtype, device: str = "cpu", **choices: Any) -> Any:
    """A plug on a Llama of this shape."""
    config = LlamaConfig(pad_token_id=shapes.PAD, eos_token_id=shapes.EOS, bos_token_id=shapes.BOS, **shape)
    return shapes.personalised(shapes.built(lambda: LlamaForCausalLM(config).eval(), dtype, device), **choices)


def batch_of(model: Any, rows: int, tokens: int) -> dict[str, Any]:
    """Prompts and answers that fill their rows, random words of users with 90 items."""
    generator, device = torch.Generator().manual_seed(0), model.backbone.device
    ids = torch.randint(len(shapes.SPECIAL), model.backbone.config.vocab_size, (rows, tokens), generator=generator)
    answers = torch.linspace(4, 16, rows).long()[:, None]  # [B, 1] tokens of each answer
    labels = ids.masked_fill(torch.arange(tokens) < tokens - answers, -100)
    persona, query = [shapes.persona(model, 90, i) for i in range(rows)], shapes.items(rows).to(device)
    return {"input_ids": ids.to(device), "labels": labels.to(device), "persona": persona, "query": query}


def without_hook(layer: torch.nn.Module, call: Callable[[], Any]) -> Callable[[], Any]:
    def side() -> Any:
        hooks = dict(layer._forward_pre_hooks)
        layer._forward_pre_hooks.clear()
        try:
            return call()
        finally:
            layer._forward_pre_hooks.update(hooks)

    return side


def calls(model: Any, rows: int, tokens: int) -> dict[str, Callable[[], Any]]:
    """A training step and a short generation; each gives what must not depend on the hook."""
    batch = batch_of(model, rows, tokens)
    prompt = {key: value for key, value in batch.items() if key != "labels"}

    def step() -> torch.Tensor:
        model.train()
        model.plug.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return torch.cat(
            [loss.detach()[None], *(p.grad.flatten() for p in model.plug.parameters() if p.grad is not None)]
        )

    def generation() -> torch.Tensor:
        model.eval()
        forced = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
        return model.generate(**prompt, **forced, return_dict_in_generate=True, output_logits=True).logits[0]

    return {"training step": step, f"generation of {NEW} tokens": generation}


def compared(
    model: Any, title: str, rows: int, tokens: int, measured: Callable[..., tuple[Any, Any]]
) -> Iterator[dict[str, Any]]:
    """Figures of both calls.

    Args:
        model: a plug on a causal backbone.
        title: what it is.
        rows, tokens: of the batch.
        measured: gives the seconds of each side and what else there is to say of them.
    """
    layer = model.get_output_embeddings()
    for name, call in calls(model, rows, tokens).items():
        sides = {REFERENCE: without_hook(layer, call), PACKAGE: call}
        seconds, checks = measured(sides)
        ratio = ratios(seconds[REFERENCE], seconds[PACKAGE]) if sides.keys() <= seconds.keys() else None
        if ratio:
            results = [sides[side]() for side in sides]
            checks["difference"] = difference(results[1], results[0])
        times = {side: spread(took) for side, took in seconds.items()}
        yield figure(f"output layer, {name}, {title}, times faster", times, ratio, checks=checks)


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    rows, tokens = (3, 20) if args.small else (BATCH, TOKENS)

    def measured(sides: dict[str, Callable[[], Any]]) -> tuple[dict[str, list[float]], dict[str, Any]]:
        seconds = take_turns(sides, args.repetitions)
        return seconds, {f"peak, {side}": f"{memory.peak(call) / 1e6:.0f} MB" for side, call in sides.items()}

    for layers in (30, 6):
        for dtype in (torch.bfloat16, torch.float32):
            shape = SMOLLM_135M | {"num_hidden_layers": layers} | (SMALL if args.small else {})
            title = f"{shape['num_hidden_layers']} layers, {str(dtype).removeprefix('torch.')}"
            yield from compared(personalised(shape, dtype), title, rows, tokens, measured)


if __name__ == "__main__":
    run(measure, __doc__ or "", repetitions=3)
