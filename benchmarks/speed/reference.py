"""PPlug as one would write it first: everything padded to its maximum, every item through both layers.

The numbers are those of the package; only the way is plain. Prompts are padded to the maximum length, histories to
512 items; a batch's histories are copied from one table of vectors per example; the backbone computes its own loss
from logits of every position. The frozen backbone has no gradients of its weights here either.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pplug_hf import PPlugForConditionalGeneration


class PlainPlug(nn.Module):
    """Equations 3 to 5 on padded histories, with the weights of a plug of the package."""

    def __init__(self, model: PPlugForConditionalGeneration):
        super().__init__()
        plug = model.plug
        self.scale, self.temperature = model.config.scale, model.config.attention_temperature
        self.instruction = nn.Parameter(plug.instruction.detach().clone())
        self.hidden = nn.Linear(*reversed(plug.projector.hidden.weight.shape))
        self.output = nn.Linear(*reversed(plug.projector.output.weight.shape))
        self.hidden.load_state_dict(plug.projector.hidden.state_dict())
        self.output.load_state_dict(plug.projector.output.state_dict())

    def forward(self, query: Tensor, items: Tensor, mask: Tensor) -> Tensor:
        """[B, D] requests, [B, N, D] padded items and their [B, N] mask to soft prompts [B, 2, H]."""
        query, items = F.normalize(query, dim=-1), F.normalize(items, dim=-1)
        scores = torch.einsum("bd,bnd->bn", query, items) / self.temperature
        weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
        projected = self.output(F.gelu(self.hidden(items)))  # [B, N, H]
        persona = (weights[..., None] * projected).sum(dim=1)  # [B, H]
        instruction = self.instruction.expand(len(persona), -1)
        return self.scale * torch.stack([instruction, persona], dim=1)


class PlainModel(nn.Module):
    """The plug in front of a frozen backbone."""

    def __init__(self, model: PPlugForConditionalGeneration):
        super().__init__()
        self.plug = PlainPlug(model)
        self.backbone = model.backbone

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **history: Tensor) -> Any:
        """`input_ids` [B, T] padded right; of a causal model they start with BOS, which stays first."""
        words = self.backbone.get_input_embeddings()(input_ids)
        prefix = self.plug(**history).to(words)
        front = 0 if self.backbone.config.is_encoder_decoder else 1
        embeds = torch.cat([words[:, :front], prefix, words[:, front:]], dim=1)
        mask = torch.cat([attention_mask.new_ones(prefix.shape[:2]), attention_mask], dim=1)
        if not self.backbone.config.is_encoder_decoder:
            nothing = labels.new_full(prefix.shape[:2], -100)
            labels = torch.cat([labels[:, :front], nothing, labels[:, front:]], dim=1)
        return self.backbone(inputs_embeds=embeds, attention_mask=mask, labels=labels, use_cache=False)


def pad(rows: list[list[int]], value: int, length: int | None = None) -> Tensor:
    """Rows of numbers, padded behind to `length`, or to the longest."""
    length = length or max(map(len, rows))
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


class PlainCollator:
    """Batches of examples `text`, `target`, `query` [D], `vectors` [N, D], padded to the maxima.

    Args:
        tokenizer: of the backbone.
        is_encoder_decoder: its kind.
        max_length, max_target_length, max_history: what is padded to.
    """

    def __init__(
        self, tokenizer: Any, is_encoder_decoder: bool, max_length: int, max_target_length: int, max_history: int
    ):
        self.tokenizer, self.is_encoder_decoder = tokenizer, is_encoder_decoder
        self.max_length, self.max_target_length, self.max_history = max_length, max_target_length, max_history

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        prompts = self.tokenizer([r["text"] for r in rows], truncation=True, max_length=self.max_length)["input_ids"]
        answers = self.tokenizer([r["target"] for r in rows], add_special_tokens=self.is_encoder_decoder)["input_ids"]
        pad_id = self.tokenizer.pad_token_id
        if self.is_encoder_decoder:
            labels = pad(answers, -100, self.max_target_length)
            length = self.max_length
        else:
            answers = [[*answer, self.tokenizer.eos_token_id] for answer in answers]
            length = self.max_length + self.max_target_length
            labels = pad([[-100] * len(p) + a for p, a in zip(prompts, answers, strict=True)], -100, length)
            prompts = [p + a for p, a in zip(prompts, answers, strict=True)]
        items = torch.zeros(len(rows), self.max_history, len(rows[0]["query"]))
        mask = torch.zeros(len(rows), self.max_history, dtype=torch.bool)
        for b, row in enumerate(rows):
            items[b, : len(row["vectors"])] = row["vectors"]
            mask[b, : len(row["vectors"])] = True
        return {
            "input_ids": pad(prompts, pad_id, length),
            "attention_mask": pad([[1] * len(p) for p in prompts], 0, length),
            "labels": labels,
            "query": torch.stack([row["query"] for row in rows]),
            "items": items,
            "mask": mask,
        }
