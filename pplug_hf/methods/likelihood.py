"""Likelihood of given answers, for a language model.

n examples, L labels, B prompts in a batch, R = B * L pairs, T prompt tokens, W answer tokens, H backbone width, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from ..modeling.prefix import cache_argument, position_ids
from ..modeling.prompt_states import find_states
from ..processing import PPlugProcessor
from .decoding import ModelInputs, batches_by_length, evaluating

if TYPE_CHECKING:
    from ..modeling import PPlugForConditionalGeneration


def label_log_probs(
    backbone: PreTrainedModel,
    processor: PPlugProcessor,
    prompts: Sequence[str],
    labels: Sequence[str],
    batch_size: int = 64,
    max_length: int | None = 256,
) -> Tensor:
    """Return how likely the backbone alone finds each label after each prompt.

    Args:
        backbone: The language model, without a persona.
        processor: Of that model.
        prompts: n of them.
        labels: L answers, each scored whole, its end included.
        batch_size: (prompt, label) pairs per forward pass of the decoder; at least all labels of one prompt.
        max_length: Cut prompts to this many tokens.

    Returns:
        Summed token log-probabilities [n, L], fp32, on the CPU.
    """
    score = _score_encoder_decoder if processor.is_encoder_decoder else _score_causal
    log_probs = torch.zeros(len(prompts), len(labels))
    with evaluating(backbone):
        if score is _score_causal and len(labels) > 1 and _keeps_states(backbone):
            score = _score_behind_states
        for rows in batches_by_length(prompts, max(1, batch_size // max(1, len(labels))), "Scoring labels"):
            batch = [prompts[row] for row in rows]
            nll, _ = score(backbone, processor, batch, list(labels) * len(batch), max_length)  # [B * L]
            log_probs[rows] = -nll.view(len(rows), len(labels)).cpu()
    return log_probs


def plug_label_log_probs(
    model: PPlugForConditionalGeneration,
    inputs: ModelInputs,
    labels: Sequence[str],
    batch_size: int = 64,
    max_length: int | None = 256,
) -> Tensor:
    """Return how likely a plug finds each label after each prompt; labels, sizes and result as of `label_log_probs`.

    Args:
        model: with the plug.
        inputs: n prompts with their personas.
    """
    processor, strength = PPlugProcessor.from_model(model), {}
    if inputs.strength is not None:
        strength = {"persona_strength": inputs.strength}
    log_probs = torch.zeros(len(inputs.prompts), len(labels))
    with evaluating(model):
        for rows in batches_by_length(inputs.prompts, max(1, batch_size // max(1, len(labels))), "Scoring labels"):
            every = [row for row in rows for _ in labels]
            batch = inputs.batch(every, processor, max_length, list(labels) * len(rows)).to(device=model.device)
            logits, targets = model(**batch, **strength).logits, batch["labels"]
            if not processor.is_encoder_decoder:
                # Rows are padded left, so all answers end at the right edge; a cached prompt has no logits.
                kept = int((targets != -100).sum(dim=1).max())
                logits = logits[:, :-1] if logits.shape[1] == targets.shape[1] else logits
                logits, targets = logits[:, -kept:], targets[:, -kept:]
            log_probs[rows] = -_nll(logits, targets)[0].view(len(rows), len(labels)).cpu()
    return log_probs


def target_log_probs(
    backbone: PreTrainedModel,
    processor: PPlugProcessor,
    prompts: Sequence[str],
    targets: Sequence[str],
    max_length: int | None = 256,
) -> tuple[Tensor, Tensor]:
    """Return how likely the backbone alone finds one answer after each of a batch of prompts.

    Args:
        backbone, processor, max_length: as above.
        prompts: B of them.
        targets: an answer to each, scored whole, its end included.

    Returns:
        Summed token log-probabilities [B] and numbers of tokens [B], fp32, on the CPU.
    """
    score = _score_encoder_decoder if processor.is_encoder_decoder else _score_causal
    with evaluating(backbone):
        nll, tokens = score(backbone, processor, list(prompts), list(targets), max_length)
    return -nll.float().cpu(), tokens.float().cpu()


def _score_encoder_decoder(
    backbone: Any, processor: PPlugProcessor, prompts: list[str], answers: list[str], max_length: int | None
) -> tuple[Tensor, Tensor]:
    """NLL and tokens [R] of R / B answers to each of B prompts; each prompt goes through the encoder once."""
    batch, times = (
        processor(text=prompts, max_length=max_length).to(device=backbone.device),
        len(answers) // len(prompts),
    )
    mask = batch["attention_mask"]
    states = backbone.get_encoder()(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state  # [B, T, H]
    targets = processor(text=answers, labels=answers)["labels"].to(backbone.device)  # [R, W]
    logits = backbone(
        encoder_outputs=BaseModelOutput(last_hidden_state=states.repeat_interleave(times, dim=0)),
        attention_mask=mask.repeat_interleave(times, dim=0),
        decoder_input_ids=backbone.prepare_decoder_input_ids_from_labels(labels=targets),
    ).logits
    return _nll(logits, targets)


def _score_causal(
    backbone: Any, processor: PPlugProcessor, prompts: list[str], answers: list[str], max_length: int | None
) -> tuple[Tensor, Tensor]:
    """NLL and tokens [R] of R / B answers to each of B prompts, which is repeated for each."""
    repeated = [prompt for prompt in prompts for _ in range(len(answers) // len(prompts))]
    batch = processor(text=repeated, labels=answers, max_length=max_length).to(device=backbone.device)
    ids, mask, targets = batch["input_ids"], batch["attention_mask"], batch["labels"]
    # Rows are padded left, so all answers end at the right edge: the logits of the prompts, [R, T, V], need not be.
    kept = int((targets != -100).sum(dim=1).max()) + 1
    limit = {"logits_to_keep": kept} if "logits_to_keep" in inspect.signature(backbone.forward).parameters else {}
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    logits = backbone(input_ids=ids, attention_mask=mask, position_ids=positions, **limit).logits[:, -kept:]
    return _nll(logits[:, :-1], targets[:, -kept:][:, 1:])


def _keeps_states(backbone: PreTrainedModel) -> bool:
    """Return whether what a causal model computes of a prompt can be kept and repeated."""
    try:
        find_states(backbone)
    except ValueError:
        return False
    return True


def _score_behind_states(
    backbone: Any, processor: PPlugProcessor, prompts: list[str], answers: list[str], max_length: int | None
) -> tuple[Tensor, Tensor]:
    """As `_score_causal`; each prompt is read once, and its keys and values are repeated for its answers."""
    batch = processor(text=prompts, max_length=max_length).to(device=backbone.device)
    ids, mask = batch["input_ids"], batch["attention_mask"]  # [B, T]
    if ids.shape[1] == 1:
        return _score_causal(backbone, processor, prompts, answers, max_length)
    times = len(answers) // len(prompts)
    repeated = [prompt for prompt in prompts for _ in range(times)]
    rows = [torch.tensor(row.answer) for row in processor.rows(repeated, answers)]
    targets = pad_sequence(rows, batch_first=True, padding_value=-100).to(backbone.device)  # [R, W]
    # Prompts end at the right edge. Their last token is left to the second call, because it predicts the first of an answer.
    cache: Any = DynamicCache()
    options = {cache_argument(backbone): cache, "use_cache": True}
    limit = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(backbone.forward).parameters else {}
    places = position_ids(mask)[:, :-1]
    backbone(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], position_ids=places, **options, **limit)
    cache.batch_repeat_interleave(times)
    given = targets[:, :-1]
    ids = torch.cat([ids[:, -1:].repeat_interleave(times, dim=0), given.clamp(min=0)], dim=1)  # [R, W]
    mask = torch.cat([mask.repeat_interleave(times, dim=0), (given != -100).to(mask)], dim=1)  # [R, T - 1 + W]
    places = position_ids(mask)[:, -ids.shape[1] :]
    return _nll(backbone(input_ids=ids, attention_mask=mask, position_ids=places, **options).logits, targets)


def _nll(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed NLL of each row's targets and their number, [R, W, V] and [R, W] to [R] each."""
    nll = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="none")
    return nll.view(targets.shape).sum(dim=1), (targets != -100).sum(dim=1)
