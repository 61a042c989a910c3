"""The backbone's forward pass on prompts with their soft prompts, and equation (6).

B batch, P prefix tokens, T prompt tokens, L positions that predict a label, V vocabulary.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, Seq2SeqLMOutput

from .prefix import Inserted, cache_argument, encode, position_ids, reorder
from .prompt_cache import AnyPromptCache
from .substitution import reading_ids


def token_loss(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """Equation (6): summed next-token NLL over the number of answer tokens (of the whole accumulated batch)."""
    total = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")
    return total / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def read_encoder_decoder(
    backbone: PreTrainedModel,
    inserted: Inserted,
    labels: Tensor | None,
    num_items: Tensor | int | None,
    cache: AnyPromptCache | None,
    options: dict[str, Any],
) -> Seq2SeqLMOutput:
    """Return the output of an encoder-decoder backbone for a batch.

    Args:
        backbone: the language model.
        inserted: prompts and soft prompts.
        labels: [B, L], for the loss.
        num_items: to divide the summed loss by.
        cache: of prompts.
        options: for the backbone's forward.
    """
    mask, ids = inserted.mask, inserted.ids
    if labels is not None and options.get("decoder_input_ids") is None:
        if shift := getattr(backbone, "prepare_decoder_input_ids_from_labels", None):
            options["decoder_input_ids"] = shift(labels=labels)
        else:  # M2M100: it shifts the labels itself, and its loss is not used
            options["labels"] = labels.contiguous()
    known = None if cache is None else cache.of_batch(backbone, inserted)
    with nullcontext() if ids is None or known else reading_ids(backbone, ids):
        read = {"inputs_embeds": inserted.embeddings}
        if inserted.behind is not None or known is not None:
            encoded, mask = encode(backbone, inserted.embeddings, mask, inserted.behind, options, known)
            read = {"encoder_outputs": encoded}
        output = backbone(**read, attention_mask=mask, **options)
    if labels is not None:
        output["loss"] = token_loss(output.logits, labels, num_items)
    return output


def read_causal(
    backbone: PreTrainedModel,
    inserted: Inserted,
    labels: Tensor | None,
    num_items: Tensor | int | None,
    cache: AnyPromptCache | None,
    options: dict[str, Any],
    training: bool,
) -> CausalLMOutputWithPast:
    """Return the output of a causal backbone for a batch. See `read_encoder_decoder`; `training`: only the loss counts."""
    embeds, mask, ids = inserted.embeddings, inserted.mask, inserted.ids
    targets, first, end = None, 0, embeds.shape[1]
    if labels is not None:
        P = embeds.shape[1] - labels.shape[1]
        targets = reorder(inserted.order, labels.new_full((len(labels), P), -100), labels)
        targets = targets[:, 1:].masked_fill(mask[:, :-1] == 0, -100)  # nothing stands in front of a first token
        targets = F.pad(targets, (0, 1), value=-100)  # [B, P + T], what each position has to predict
        if labelled := (targets != -100).any(dim=0).nonzero().flatten().tolist():
            first, end = labelled[0], labelled[-1] + 1
    learning = targets is not None and training and torch.is_grad_enabled()
    if learning:
        # Padding is in front, so answers end together: what follows them is in no loss, and only the L = end - first
        # positions between the first label and the last need logits, the widest layer.
        embeds, mask, ids = embeds[:, :end].contiguous(), mask[:, :end], None if ids is None else ids[:, :end]
        if "logits_to_keep" in inspect.signature(backbone.forward).parameters:
            options["logits_to_keep"] = end - first
    start = 0  # of what is read here, behind what a cache has of all rows
    known = None if cache is None else cache.of_batch(backbone, inserted, first)
    if known is not None:
        start = known.mask.shape[1]
        options |= {cache_argument(backbone): known.states, "use_cache": True}
    options["position_ids"] = position_ids(mask)[:, start:]
    with nullcontext() if ids is None else reading_ids(backbone, ids):
        output = backbone(inputs_embeds=embeds[:, start:], attention_mask=mask, **options)
    if targets is not None:
        logits = output.logits[:, : end - start][:, first - end :]  # [B, L, V]
        output["loss"] = token_loss(logits, targets[:, first:end], num_items)
        if learning or start:
            output["logits"] = logits
            return output
    places = inserted.next_token[..., None]  # [B, T, 1]
    output["logits"] = output.logits.gather(1, places.expand(-1, -1, output.logits.shape[-1]))
    return output
