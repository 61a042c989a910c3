"""Answers that can only be labels: at every step `generate` may choose among the tokens that go on to one.

    batch = processor(text=prompts, persona=histories)
    ids = model.generate(**batch, **only_labels(model, processor, labels, batch["input_ids"]))

Greedy decoding then takes the best token among those, step by step, which need not lead to the most likely label; as
many beams as there are labels find it, the same one as `methods/likelihood.py`: `label_log_probs`.

R rows (batch times beams), L labels, W tokens of the longest label with its end, S tokens answered so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from ..errors import ConfigurationError, DataError

if TYPE_CHECKING:
    from ..processing import PPlugProcessor


def only_labels(
    model: object, processor: PPlugProcessor, labels: Sequence[str], input_ids: Tensor, num_beams: int = 1
) -> dict[str, Any]:
    """Return the options of `generate` for answers that are labels; for one batch.

    Args:
        model: Whose `generate` it is for: a plug, or a bare backbone.
        processor: Of that model.
        labels: L different answers. One may be the beginning of another, and one may start with a space, for a causal
            model whose prompts end without one (answers come back stripped).
        input_ids: [B, T] the prompts.
        num_beams: With more than one, beams are compared by their log-probability alone, whatever their length.

    Returns:
        `logits_processor`, `max_new_tokens` (of the longest label), `num_beams`, and what beams need.

    Raises:
        DataError: There are not labels, or two have the same tokens.
        ConfigurationError: The tokenizer cannot write a label, or does not mark its end.
    """
    ids = label_ids(processor, labels)
    start = 1 if processor.is_encoder_decoder else input_ids.shape[1]  # of a decoder, its own start token
    options: dict[str, Any] = {
        "logits_processor": LogitsProcessorList([LabelsOnly(ids, start)]),
        "max_new_tokens": max(map(len, ids)),
        "num_beams": num_beams,
    }
    if processor.chat:
        options["eos_token_id"] = ids[0][-1]
    # As `label_log_probs`: a label is as likely as its tokens together, and none is given up for being long.
    return options | ({"length_penalty": 0.0, "early_stopping": False} if num_beams > 1 else {})


def label_ids(processor: PPlugProcessor, labels: Sequence[str]) -> list[list[int]]:
    """Return the tokens of each label, with its end and what else the tokenizer adds, as in training and in
    `label_log_probs`.

    Args and errors as in `only_labels`.
    """
    if isinstance(labels, str) or not len(labels) or not all(isinstance(label, str) for label in labels):
        raise DataError(f"labels are {labels!r}; give a list of texts, at least one.")
    ids = processor.answer_ids(labels)
    end = ids[0][-1] if processor.chat else processor.tokenizer.eos_token_id  # a chat has an end of its own
    if any(row[-1:] != [end] for row in ids):
        raise ConfigurationError(
            f"The tokenizer does not end labels with its end-of-sequence token (eos_token_id is {end}), which leaves "
            "the end of a label open: set tokenizer.eos_token, or answer without labels."
        )
    written = [processor.decode_answers(torch.tensor([row]), 0)[0] for row in ids]
    lost = [label for label, text in zip(labels, written, strict=True) if text != label.strip()]
    if lost:
        raise ConfigurationError(
            f"The tokenizer cannot write {len(lost)} of {len(labels)} labels, such as {lost[:5]}: use others, or a "
            "backbone with another vocabulary."
        )
    if len(set(map(tuple, ids))) < len(ids):
        raise DataError(f"Two of the {len(labels)} labels have the same tokens: give each label once.")
    return ids


class LabelsOnly(LogitsProcessor):
    """Keep the scores of tokens that continue to a label, and make all others impossible.

    Args:
        ids: L labels as tokens, each with its end.
        start: Number of ids in front of an answer: what `generate` hands to processors begins with the prompt, or with
            the start of the decoder.
    """

    def __init__(self, ids: Sequence[Sequence[int]], start: int):
        width = max(map(len, ids))
        self.start, self.end = start, ids[0][-1]
        self.labels = torch.tensor([[*row, *[-1] * (width - len(row))] for row in ids])  # [L, W]; -1 is not a token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[R, start + S] and [R, V] to [R, V].

        Raises:
            ConfigurationError: Something else of `generate` forbids every token that is left.
        """
        self.labels = self.labels.to(scores.device)
        said = input_ids[:, self.start :].to(scores.device)  # [R, S]
        S, W = said.shape[1], self.labels.shape[1]
        allowed = torch.zeros_like(scores, dtype=torch.bool)
        open_ = torch.zeros(len(said), dtype=torch.bool, device=scores.device)
        if S < W:
            fits = (said[:, None] == self.labels[None, :, :S]).all(dim=-1) & (self.labels[:, S] >= 0)  # [R, L]
            rows, which = fits.nonzero(as_tuple=True)
            allowed[rows, self.labels[which, S]] = True
            open_ = fits.any(dim=1)
        kept = scores.masked_fill(~allowed, -torch.inf)
        if (open_ & (kept == -torch.inf).all(dim=1)).any():
            raise ConfigurationError(
                "Another option of generate forbids every label (min_new_tokens, no_repeat_ngram_size, bad_words_ids, "
                "forced_bos_token_id, ...; the backbone's generation_config may set it): leave it out, or answer "
                "without labels."
            )
        # A row that has ended, or a beam that was impossible before, says its end again: that adds nothing to a beam's
        # score, and sampling needs something to draw.
        kept[:, self.end] = torch.where(open_, kept[:, self.end], 0)
        return kept
