"""The states of a prompt: what a language model computes from the prompt's ids alone.

Of a causal model these are the keys and values of all layers, of an encoder-decoder model the encoder's output. Both are
handled as one matrix per prompt, with a row per token. B prompts, T tokens, F numbers per token, V vocabulary.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import uuid
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutput

from .backbone_check import equal_logits, sample_words, tolerance
from .prefix import Known, cache_argument, generate_with_prefix, position_ids, word_embeddings
from .substitution import reading_ids
from .weight_sample import weight_digests


class CausalStates:
    """Keys and values of a causal model.

    Attributes:
        layers: for every layer that has its own, the number, the shapes (heads, width) of keys and values, and the device
            of a model on several.
    """

    causal = True
    width = 0  # F

    def __init__(self) -> None:
        self.layers: list[tuple[int, list[tuple[int, int]], torch.device | None]] = []

    def read(self, backbone: PreTrainedModel, ids: Tensor, mask: Tensor, before: Tensor | None) -> Tensor:
        """Return the states of tokens.

        Args:
            backbone: the language model.
            ids: [B, T] of the tokens, padded on the left.
            mask: [B, T0 + T], also of the tokens before them.
            before: [B, T0, F], the states of those.
        """
        past: Any = DynamicCache() if before is None else self.past(before)
        options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(backbone.forward).parameters else {}
        places = position_ids(mask)[:, -ids.shape[1] :]
        options |= {"position_ids": places, "use_cache": True, cache_argument(backbone): past}
        backbone(input_ids=ids, attention_mask=mask, **options)
        if not self.layers:
            self._measure(past)
        rows = [
            t for i, *_ in self.layers for t in (past.layers[i].keys, past.layers[i].values)
        ]  # [B, heads, T0 + T, d]
        # Under autocast, rotated keys come in single precision, and are used in that of the values.
        rows = [t[:, :, -ids.shape[1] :].transpose(1, 2).flatten(2).to(ids.device, rows[-1].dtype) for t in rows]
        self.width = sum(t.shape[-1] for t in rows)
        return torch.cat(rows, dim=-1)

    def _measure(self, past: Any) -> None:
        """Note the shapes of a cache that the backbone has filled."""
        own = [
            (i, layer) for i, layer in enumerate(past.layers) if isinstance(layer.keys, Tensor)
        ]  # others share one's
        several = len({layer.keys.device for _, layer in own}) > 1
        for i, layer in own:
            shapes = [(t.shape[1], t.shape[3]) for t in (layer.keys, layer.values)]
            self.layers.append((i, shapes, layer.keys.device if several else None))

    def past(self, states: Tensor) -> DynamicCache:
        """Return states [B, T, F] as the cache that the backbone takes; the states are not changed by its growth."""
        past: Any = DynamicCache()
        parts = iter(states.split([h * d for _, shapes, _ in self.layers for h, d in shapes], dim=-1))
        for i, shapes, device in self.layers:
            keys, values = (
                next(parts).unflatten(-1, s).transpose(1, 2).to(device) for s in shapes
            )  # [B, heads, T, d]
            while len(past.layers) <= i:
                past.layers.append(DynamicLayer())
            past.layers[i].lazy_initialization(keys, values)
            past.layers[i].keys, past.layers[i].values = keys, values
        return past

    def answers(self, backbone: PreTrainedModel, ids: Tensor, mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield logits [B, L, V] behind prompts [B, 6] from states that were read in two steps, and those without states.

        The states are read with more padding than there is here, as other prompts of a batch may need.
        """
        more, places = partial(functional.pad, pad=(1, 0), value=0), position_ids(mask)
        first = self.read(backbone, more(ids[:, :2]), more(mask[:, :2]), None)
        states = torch.cat([first, self.read(backbone, ids[:, 2:3], more(mask[:, :3]), first)], dim=1)[:, 1:]
        options = {"position_ids": places[:, 3:], "use_cache": True, cache_argument(backbone): self.past(states)}
        got = backbone(input_ids=ids[:, 3:], attention_mask=mask, **options).logits
        yield got, backbone(input_ids=ids, attention_mask=mask, position_ids=places).logits[:, 3:]

        embeds, length = word_embeddings(backbone)(ids), {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
        config = GenerationConfig(**length, num_beams=1, return_dict_in_generate=True, output_logits=True)
        made: list[Any] = []
        for known in (Known(self.past(states), mask[:, :3]), None):
            with reading_ids(backbone, ids):
                made.append(generate_with_prefix(backbone, embeds, mask, ids, mask, config, {}, known=known))
        got, own = (torch.stack(one.logits, dim=1) for one in made)
        yield got, own


class EncoderStates:
    """The encoder's output in an encoder-decoder model. A prompt is read as a whole: every state depends on all tokens."""

    causal = False
    width = 0

    def read(self, backbone: PreTrainedModel, ids: Tensor, mask: Tensor, before: Tensor | None = None) -> Tensor:
        """Return the states [B, T, F] of prompts [B, T], padded on the right; nothing is before them."""
        encoder = backbone.get_encoder()
        states = encoder(input_ids=ids, attention_mask=mask, return_dict=True).last_hidden_state.to(ids.device)
        self.width = states.shape[-1]
        return states

    def past(self, states: Tensor) -> BaseModelOutput:
        """Return states as the encoder's output."""
        return BaseModelOutput(last_hidden_state=states)  # type: ignore[arg-type]

    def answers(self, backbone: PreTrainedModel, ids: Tensor, mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield logits [B, L, V] behind prompts [B, 6] from states, and those without."""
        ids, mask = ids.flip(1), mask.flip(1)
        states = self.read(backbone, functional.pad(ids, (0, 1)), functional.pad(mask, (0, 1)))[:, :-1]
        options = {"attention_mask": mask, "decoder_input_ids": ids[:, :3]}
        got = backbone(encoder_outputs=self.past(states), **options).logits
        yield got, backbone(input_ids=ids, **options).logits


def _rope_types(settings: Mapping[str, Any], of_rope: bool = False) -> Iterator[str]:
    """Yield the kinds of rotary positions in a configuration, those of layer types and of nested models, too."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _rope_types(value, of_rope or name in ("rope_parameters", "rope_scaling"))
        elif of_rope and name in ("rope_type", "type") and isinstance(value, str):
            yield value


def _depends_on_length(rope_type: str) -> bool:
    """Return True for kinds that change all angles once a text is longer than some length; a few tokens do not show it."""
    return rope_type in ("longrope", "su") or "dynamic" in rope_type  # as transformers' `dynamic_rope_update`


@torch.no_grad()
def find_states(backbone: PreTrainedModel) -> CausalStates | EncoderStates:
    """Find out on a few tokens how the states of a backbone are kept.

    Args:
        backbone: a frozen language model.

    Raises:
        ValueError: they cannot be; the message says why. So it is where layers remember otherwise than by keys and values
            (Mamba, linear attention), padding changes the answers, or the states of a text change as it grows.
    """
    if grows := sorted(filter(_depends_on_length, _rope_types(backbone.config.to_dict()))):
        raise ValueError(f"its rotary positions depend on the length of the whole text: rope_type {grows[0]!r}")
    states = EncoderStates() if backbone.config.is_encoder_decoder else CausalStates()
    ids = sample_words(backbone, word_embeddings(backbone)).to(word_embeddings(backbone).weight.device)  # [B, 6]
    mask = torch.ones_like(ids)
    mask[0, 0] = mask[1, :2] = 0
    with_padding, without = slice(2), slice(2, None)  # rows
    try:
        with torch.autocast(ids.device.type, enabled=False):
            same = [
                equal_logits(got[rows], own[rows], tolerance(backbone))
                for got, own in states.answers(backbone, ids, mask)
                for rows in (with_padding, without)
            ]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any kind that a backbone may raise for a cache that it does not know
        raise ValueError(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:120]}") from error
    if not all(same):
        raise ValueError("answers differ from those without a cache")
    return states


def digest_of(backbone: PreTrainedModel) -> str:
    """Return a digest of all that determines a backbone's states; another at each call where weights cannot be compared."""
    config = {k: v for k, v in backbone.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    parts = type(backbone).__name__, str(backbone.dtype), json.dumps(config, sort_keys=True, default=str)
    weights = weight_digests(backbone) or uuid.uuid4().hex
    return hashlib.sha256(repr((parts, weights)).encode()).hexdigest()[:16]
