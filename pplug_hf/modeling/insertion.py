"""Soft prompts among the tokens of a batch of prompts, or behind what an encoder has read.

| placement | causal model | encoder-decoder model |
|---|---|---|
| `prompt` (equation 5) | in front of the prompt, behind its BOS | in front of the prompt |
| `answer` | behind the prompt, in front of the answer | appended to the encoder's output, which the decoder attends to |

B batch, P prefix tokens, T prompt tokens, H backbone width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigurationError, DataError, MismatchError
from .backbone_check import Reading
from .plug import SoftPrompt
from .prefix import check_positions, default_position, placeholders, prefix_order, reorder, word_embeddings

_PLAIN = Reading()


class Inserted(NamedTuple):
    """A batch of prompts with their soft prompts."""

    embeddings: Tensor  # [B, P + T, H] of soft prompt and prompt
    mask: Tensor  # [B, P + T]
    order: Tensor  # [B, P + T], of `prefix_order`
    input_ids: Tensor  # [B, T], as they were given
    text_mask: Tensor  # [B, T]
    position: Tensor  # [B], number of prompt tokens in front of the soft prompt
    next_token: Tensor  # [B, T], the place that predicts the token behind each token of the prompt
    ids: Tensor | None  # [B, P + T], for a backbone that is given ids, whose embeddings are replaced
    behind: tuple[Tensor, Tensor] | None  # [B, P, H] and its mask, to append to the encoder's output


def insert(
    backbone: Any,
    soft_prompt: SoftPrompt,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    labels: Tensor | None = None,
    position: Any = None,
    reading: Reading = _PLAIN,
    limit: int | None = None,
) -> Inserted:
    """Put the soft prompts of a batch where they belong.

    Args:
        backbone: the language model.
        soft_prompt: of each row, with its placement.
        input_ids, attention_mask: [B, T] of the prompts; a causal model's may be followed by answers.
        labels: of the answers.
        position: [B], number of prompt tokens in front of each soft prompt, where that is not its usual place.
        reading: the way in which the backbone takes soft prompts.
        limit: of `position_limit`.

    Raises:
        ConfigurationError: rows of different lengths, and a backbone that cannot have padding.
        DataError: a position outside of its prompt, or a prompt that is too long.
        MismatchError: not one position per prompt.
    """
    mask, causal = attention_mask, not backbone.config.is_encoder_decoder
    words = word_embeddings(backbone)(input_ids)  # [B, T, H]
    prefix, shown = soft_prompt.embeddings.to(words), soft_prompt.mask.to(mask)  # [B, P, H], [B, P]
    last = soft_prompt.at_answer.to(mask.device)  # [B]
    behind = None
    if not causal and last.any():
        behind = prefix, shown * last[:, None]
        shown = shown * ~last[:, None]
        if last.all():
            prefix, shown = prefix[:, :0], shown[:, :0]
    if position is None:
        position = default_position(backbone, input_ids, mask)
        behind_text = last | ~shown.any(dim=1)  # of a row without a soft prompt, too, which stands nowhere
        position = torch.where(behind_text, _prompt_lengths(mask, labels), position) if causal else position
    else:
        position = _checked_position(torch.as_tensor(position, device=mask.device), mask)
    order = prefix_order(mask, position, shown, pad_left=causal)
    both = reorder(order, shown, mask)  # [B, P + T]
    P = shown.shape[1]
    check_positions(limit, both, P, causal=causal)
    if not reading.padding and not both.all():
        raise ConfigurationError(
            f"Padding changes the answers of the backbone {type(backbone).__name__}, which has no attention mask or counts "
            "positions with the padding. Pass rows of one length, or one row at a time "
            "(per_device_train_batch_size=1 in training)."
        )
    ids = placeholders(order, input_ids, mask) if reading.by_ids else None
    where = order.argsort(dim=1)[:, P:]  # [B, T], where each prompt token went
    before = (mask.cumsum(dim=1) == position[:, None]) & mask.bool()  # the token in front of the soft prompt
    next_token = where + before * shown.sum(dim=1, keepdim=True)
    return Inserted(reorder(order, prefix, words), both, order, input_ids, mask, position, next_token, ids, behind)


def check_batch(input_ids: Any, attention_mask: Any, labels: Any, aligned: bool) -> None:
    """Refuse what is not a batch of token ids with a mask of its shape, and labels that it has no rows or places for."""
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        got = type(input_ids).__name__
        if isinstance(input_ids, Tensor):
            got = f"{list(input_ids.shape)} of {input_ids.dtype}"
        raise DataError(
            f"input_ids must be [batch, tokens], got {got}: pass a processor's batch as **batch, and texts "
            "through the processor."
        )
    shape = list(input_ids.shape)
    if attention_mask is not None and list(attention_mask.shape) != shape:
        raise DataError(f"attention_mask must be {shape}, as input_ids are, got {list(attention_mask.shape)}.")
    if labels is not None and aligned and list(labels.shape) != shape:
        raise DataError(
            f"labels must be {shape}, as input_ids are, got {list(labels.shape)}: a causal backbone is given prompt and "
            "answer as one row, with -100 where there is nothing to learn; processor(..., labels=answers) makes both."
        )
    if labels is not None and (labels.ndim != 2 or len(labels) != len(input_ids)):
        raise DataError(f"labels must be [{len(input_ids)}, tokens], got {list(labels.shape)}: one answer per prompt.")


def _prompt_lengths(mask: Tensor, labels: Tensor | None) -> Tensor:
    """Return [B], the number of real tokens in front of the answers."""
    return (mask if labels is None else mask * ((labels != -100).cumsum(dim=1) == 0)).sum(dim=1)


def _checked_position(position: Tensor, mask: Tensor) -> Tensor:
    if position.shape != mask.shape[:1]:
        raise MismatchError(
            f"persona_position must hold one number per prompt, [{len(mask)}], got {list(position.shape)}."
        )
    if ((position < 0) | (position > mask.sum(dim=1))).any():
        raise DataError("persona_position must lie between 0 and the number of tokens of its prompt.")
    return position
