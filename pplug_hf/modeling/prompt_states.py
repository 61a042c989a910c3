"""The states of a prompt: what a language model computes from the prompt's ids alone.

Of a causal model these are the keys and values of all layers, of an encoder-decoder model the encoder's output. Both are
handled as one matrix per prompt, with a row per token. B prompts, T tokens, F numbers per token, V vocabulary.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import uuid
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutput

from .backbone_check import equal_logits, sample_words, tolerance
from .prefix import cache_argument, position_ids, word_embeddings
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

    def read(self, backbone: Any, ids: Tensor, mask: Tensor, before: Tensor | None) -> Tensor:
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

    def _goes_on(self, backbone: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last logits [B, 3, V] of prompts, computed at once, and from states that were read in two steps."""
        places = position_ids(mask)
        own = backbone(input_ids=ids, attention_mask=mask, position_ids=places).logits[:, -3:]
        first = self.read(backbone, ids[:, :2], mask[:, :2], None)
        states = torch.cat([first, self.read(backbone, ids[:, 2:3], mask[:, :3], first)], dim=1)
        options = {"position_ids": places[:, 3:], "use_cache": True, cache_argument(backbone): self.past(states)}
        return backbone(input_ids=ids[:, 3:], attention_mask=mask, **options).logits, own


class EncoderStates:
    """The encoder's output in an encoder-decoder model. A prompt is read as a whole: every state depends on all tokens."""

    causal = False
    width = 0

    def read(self, backbone: Any, ids: Tensor, mask: Tensor, before: Tensor | None = None) -> Tensor:
        """Return the states [B, T, F] of prompts [B, T], padded on the right; nothing is before them."""
        encoder = backbone.get_encoder()
        states = encoder(input_ids=ids, attention_mask=mask, return_dict=True).last_hidden_state.to(ids.device)
        self.width = states.shape[-1]
        return states

    def past(self, states: Tensor) -> BaseModelOutput:
        """Return states as the encoder's output."""
        return BaseModelOutput(last_hidden_state=states)  # type: ignore[arg-type]

    def _goes_on(self, backbone: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        ids, mask = ids.flip(1), mask.flip(1)
        options = {"attention_mask": mask, "decoder_input_ids": ids[:, :3]}
        own = backbone(input_ids=ids, **options).logits
        return backbone(encoder_outputs=self.past(self.read(backbone, ids, mask)), **options).logits, own


@torch.no_grad()
def find_states(backbone: Any) -> CausalStates | EncoderStates:
    """Find out on a few tokens how the states of a backbone are kept.

    Args:
        backbone: a frozen language model.

    Raises:
        ValueError: they cannot be; the message says why. So it is where layers remember otherwise than by keys and values
            (Mamba, linear attention), or padding changes the answers.
    """
    states = EncoderStates() if backbone.config.is_encoder_decoder else CausalStates()
    ids = sample_words(backbone, word_embeddings(backbone)).to(word_embeddings(backbone).weight.device)  # [B, 6]
    mask = torch.ones_like(ids)
    mask[0, 0] = mask[1, :2] = 0
    try:
        with torch.autocast(ids.device.type, enabled=False):
            got, own = states._goes_on(backbone, ids, mask)
        # The row without padding, and those with it.
        same = [equal_logits(got[rows], own[rows], tolerance(backbone)) for rows in (slice(2), slice(2, None))]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any kind that a backbone may raise for a cache that it does not know
        raise ValueError(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:120]}") from error
    if not all(same):
        raise ValueError("answers differ from those without a cache")
    return states


def digest_of(backbone: Any) -> str:
    """Return a digest of all that determines a backbone's states; another at each call where weights cannot be compared."""
    config = {k: v for k, v in backbone.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    parts = type(backbone).__name__, str(backbone.dtype), json.dumps(config, sort_keys=True, default=str)
    weights = weight_digests(backbone) or uuid.uuid4().hex
    return hashlib.sha256(repr((parts, weights)).encode()).hexdigest()[:16]
