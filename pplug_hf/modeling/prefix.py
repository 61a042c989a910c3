"""A soft prompt among the tokens of a prompt, and the backbone's own `generate` from there.

The prefix enters as `inputs_embeds`; everything else (beams, sampling, caches, constraints) is the backbone's.
B batch, P prefix tokens, T prompt tokens, H backbone width.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from ..errors import ConfigurationError

# Each would silently ignore the persona, or fail deep inside generate.
_REFUSED = {
    "assistant_model": "the assistant would draft without the persona",
    "prompt_lookup_num_tokens": "drafting from the prompt does not see the persona",
}
_REFUSED_CAUSAL = {
    "guidance_scale": "its unconditional pass needs the prompt as ids",
    "prefill_chunk_size": "chunked prefill needs the prompt as ids",
}


def word_embeddings(backbone: PreTrainedModel) -> Any:
    """The module that embeds a prompt, scaling included: the encoder's own, which untied weights set apart from the
    model's (BART with tie_word_embeddings=False)."""
    reader = backbone.get_encoder() if backbone.config.is_encoder_decoder else backbone
    return reader.get_input_embeddings()


def default_position(backbone: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """[B]: how many real tokens stay in front of the prefix: a causal model's BOS, else none (equation 5)."""
    if backbone.config.is_encoder_decoder:
        return attention_mask.new_zeros(len(input_ids))
    bos = backbone.config.get_text_config().bos_token_id
    first = input_ids.gather(1, attention_mask.argmax(dim=1, keepdim=True)).squeeze(1)
    starts_with_bos = torch.isin(first, torch.as_tensor([] if bos is None else bos, device=first.device).to(first))
    return (starts_with_bos & attention_mask.any(dim=1)).long()


def prefix_order(attention_mask: Tensor, position: Tensor, prefix_mask: Tensor, pad_left: bool) -> Tensor:
    """Where everything goes when a prefix is put among the real tokens and padding moves to one side.

    Args:
        attention_mask: [B, T], ones at real tokens, padding anywhere.
        position: [B], number of real tokens in front of the prefix.
        prefix_mask: [B, P], ones at what is there of each row's prefix; the rest becomes padding.
        pad_left: padding in front (causal models) or behind (encoder-decoder models).

    Returns:
        [B, P + T] indices into the concatenation of prefix and text along the tokens, to `gather` with.
    """
    mask, shown = attention_mask.bool(), prefix_mask.bool()
    rank = mask.cumsum(dim=1) - 1  # [B, T], number of a token among the row's real ones
    rank = rank + shown.sum(dim=1, keepdim=True) * (rank >= position[:, None])
    prefix = position[:, None] + shown.cumsum(dim=1) - 1  # [B, P]
    padding = -1 if pad_left else mask.shape[1] + shown.shape[1]
    key = torch.cat([prefix.masked_fill(~shown, padding), rank.masked_fill(~mask, padding)], dim=1)
    return key.argsort(dim=1, stable=True)


def reorder(order: Tensor, prefix: Tensor, text: Tensor) -> Tensor:
    """Concatenate [B, P, ...] and [B, T, ...] along the tokens and bring them in `order` ([B, P + T])."""
    both = torch.cat([prefix, text], dim=1)
    return both.gather(1, order[(...,) + (None,) * (both.ndim - 2)].expand_as(both))


def make_contiguous(layer: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copy a slice of the hidden states, [B, L, H] of `logits_to_keep`, before the output layer multiplies it.

    torch folds a batch into one matrix product only if the input is contiguous or the weight needs a gradient. Otherwise
    it copies the frozen weight, the whole vocabulary, once per row.
    """
    return tuple(map(Tensor.contiguous, inputs))


def generate_with_prefix(
    backbone: Any,
    inputs_embeds: Tensor,
    attention_mask: Tensor,
    input_ids: Tensor,
    text_mask: Tensor,
    generation_config: GenerationConfig,
    **kwargs: Any,
) -> Tensor | ModelOutput:
    """`backbone.generate` on a prompt that already holds its prefix.

    Args:
        backbone: the frozen language model.
        inputs_embeds: [B, P + T, H] prefix and prompt.
        attention_mask: [B, P + T] its mask.
        input_ids: [B, T] the prompt alone, as the user gave it.
        text_mask: [B, T] the prompt's mask.
        generation_config: defaults, which `kwargs` override.
        **kwargs: whatever `backbone.generate` takes.

    Returns:
        What `backbone.generate` returns for the prompt without a prefix: token ids or a `ModelOutput`. Causal models
        give the prompt as it came, followed by the new tokens.

    Raises:
        ConfigurationError: an option that cannot see the persona.
    """
    causal = not backbone.config.is_encoder_decoder
    for name, why in (_REFUSED | _REFUSED_CAUSAL if causal else _REFUSED).items():
        value = kwargs.get(name, getattr(generation_config, name, None))
        if value is not None and value is not False and (name, value) != ("guidance_scale", 1):
            raise ConfigurationError(f"generate({name}=...) does not work with a persona: {why}. Leave it out.")
    config = copy.deepcopy(generation_config)
    if kwargs.get("max_new_tokens") is not None and kwargs.get("max_length") is None:
        config.max_length = None  # a default, which the caller overrides
    kwargs = config.update(**kwargs)  # what is left is no generation setting
    if not causal:
        return backbone.generate(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, generation_config=config, **kwargs
        )

    P, T = inputs_embeds.shape[1] - input_ids.shape[1], input_ids.shape[1]
    # Repetition penalties and n-gram rules work on ids, and should see the prompt and nothing new: the row's own first
    # token fills the prefix positions, all of them in front, wherever the prefix stands, so that no n-gram is cut.
    first = input_ids.gather(1, text_mask.argmax(dim=1, keepdim=True))
    front = prefix_order(
        text_mask, text_mask.new_zeros(len(input_ids)), text_mask.new_ones(len(input_ids), P), pad_left=True
    )
    ids = reorder(front, first.expand(-1, P), input_ids)
    for name in ("max_length", "min_length", "max_cache_len"):  # counted by the user without the prefix
        value = getattr(config, name, None)
        setattr(config, name, value + P if value else value)
    if kwargs.get("streamer") is not None:
        kwargs["streamer"] = _PromptStreamer(kwargs["streamer"], input_ids)

    output = backbone.generate(
        ids,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        generation_config=config,
        **kwargs,
    )
    sequences = output if isinstance(output, Tensor) else output.sequences
    prompts = input_ids.repeat_interleave(len(sequences) // len(input_ids), dim=0).to(sequences.device)
    sequences = torch.cat([prompts, sequences[:, P + T :]], dim=1)
    if isinstance(output, Tensor):
        return sequences
    output.sequences = sequences
    return output


class _PromptStreamer(BaseStreamer):
    """Shows a streamer the user's prompt in place of the one with prefix positions, then the new tokens."""

    def __init__(self, streamer: BaseStreamer, prompt: Tensor):
        self.streamer, self.prompt = streamer, prompt.cpu()

    def put(self, value: Tensor) -> None:
        if self.prompt is not None:
            value, self.prompt = self.prompt, None
        self.streamer.put(value)

    def end(self) -> None:
        self.streamer.end()
