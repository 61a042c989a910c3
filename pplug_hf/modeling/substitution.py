"""Soft prompts for backbones that must be given ids: vectors take the place of what the word embeddings give for them.

Some language models do more with ids than look up one vector each: they scale it, route by the id or add further tables
to every layer, and do none of it to `inputs_embeds`. For these, ids stand in the places of the soft prompt while the
module that embeds words gives the vectors of soft prompt and words. All else is the backbone's own.
B batch, L tokens, H backbone width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ConfigurationError
from .prefix import word_embeddings


class _Substitution:
    """Ids [B, L] in the place of `inputs_embeds`, and these in the place of what the ids would be embedded as.

    Hooks see the calls of all threads; it serves the one that made it.
    """

    def __init__(self, ids: Tensor):
        self.ids, self.thread, self.used = ids, get_ident(), False
        self.pending: tuple[Tensor, Tensor] | None = None

    # torch registers a hook in two steps, and a thread that calls the module in between gives it no keyword arguments.

    def give_ids(
        self, reader: nn.Module, args: tuple[object, ...], kwargs: dict[str, Any] | None = None
    ) -> tuple[tuple[object, ...], dict[str, Any]] | None:
        if get_ident() != self.thread or kwargs is None:
            return None
        embeds = kwargs.get("inputs_embeds")
        if embeds is None or embeds.shape[1] > self.ids.shape[1]:
            return None
        ids = self.ids[:, -embeds.shape[1] :]  # all, but for those that a cache has read
        ids = ids.repeat_interleave(len(embeds) // len(self.ids), dim=0)  # beams
        self.pending = ids, embeds
        return args, {**kwargs, "inputs_embeds": None, "input_ids": ids}

    def give_vectors(
        self,
        layer: nn.Module,
        args: tuple[Tensor, ...],
        kwargs: dict[str, Tensor] | Tensor,
        output: Tensor | None = None,
    ) -> Tensor | None:
        if get_ident() != self.thread or isinstance(kwargs, Tensor) or output is None:
            return None
        given = args[0] if args else kwargs.get("input")
        if self.pending is None or given is None:
            return None
        if not torch.equal(given, self.pending[0].to(given)):
            return None
        (_, embeds), self.pending, self.used = self.pending, None, True
        return embeds.to(output)


@contextmanager
def reading_ids(backbone: PreTrainedModel, ids: Tensor | None) -> Iterator[None]:
    """Have a backbone read ids [B, L] where it is given `inputs_embeds` [B, L, H], embedded as these.

    Args:
        backbone: the language model.
        ids: of the prompt, with any in the places of the soft prompt; None for a backbone that takes `inputs_embeds`.

    Raises:
        ConfigurationError: its word embeddings were never asked for these ids.
    """
    if ids is None:
        yield
        return
    substitution, layer = _Substitution(ids), word_embeddings(backbone)
    reader = backbone.get_encoder() if backbone.config.is_encoder_decoder else backbone
    hooks = (
        reader.register_forward_pre_hook(substitution.give_ids, with_kwargs=True),
        layer.register_forward_hook(substitution.give_vectors, with_kwargs=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if not substitution.used:
        raise ConfigurationError(
            f"The backbone {type(backbone).__name__} does not look up its prompt in {type(layer).__name__} as it is given, "
            "so a soft prompt cannot stand among its words."
        )
