"""The next token of every row of a batch by the row's own settings, whoever else is in the batch. B rows, V tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ..errors import EngineError
from .engine import Sampling
from .running import Running

_GREEDY = 1e-5  # the likeliest token is certain below, and scores over the temperature may be infinite


class RowSampling(LogitsProcessor):
    """Leaves every row one token to choose, so that a greedy `generate` takes it.

    Args:
        rows: of the batch.
        counts_prompt: the repetition penalty is for tokens of the prompt, too.
    """

    def __init__(self, rows: Sequence[Running], counts_prompt: bool):
        self.rows, self.counts_prompt = rows, counts_prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Return scores [B, V].

        Raises:
            EngineError: a row's scores are not numbers. That of one row may come from another's persona: ask each alone.
        """
        if scores.isnan().any():
            raise EngineError("The model computed NaN for this request: its persona or the plug is damaged.")
        active = [(i, row) for i, row in enumerate(self.rows) if not row.ended]
        for i, row in active:
            if _penalises(row.request.sampling):
                scores[i] = self._penalised(scores[i], row)
        drawn = [(i, row) for i, row in active if row.request.sampling.temperature >= _GREEDY]
        if drawn:
            places = [i for i, _ in drawn]
            tokens = draw(
                scores[places], [row.request.sampling for _, row in drawn], [r.draws.random() for _, r in drawn]
            )
            scores[places] = scores[places].scatter(1, tokens[:, None], torch.inf)
        return scores

    def _penalised(self, scores: Tensor, row: Running) -> Tensor:
        """Return the scores [V] of a row with its penalties."""
        chosen = row.request.sampling
        counts = scores.new_zeros(len(scores)).index_add_(
            0, torch.tensor(row.tokens, dtype=torch.long, device=scores.device), scores.new_ones(len(row.tokens))
        )
        scores = scores - chosen.frequency_penalty * counts - chosen.presence_penalty * (counts > 0)
        if chosen.repetition_penalty != 1:
            seen = counts > 0
            if self.counts_prompt:
                seen[row.ids] = True
            factor = torch.where(scores > 0, 1 / chosen.repetition_penalty, chosen.repetition_penalty)
            scores = torch.where(seen, scores * factor, scores)
        return scores


def _penalises(chosen: Sampling) -> bool:
    return (chosen.repetition_penalty, chosen.presence_penalty, chosen.frequency_penalty) != (1, 0, 0)


def draw(scores: Tensor, settings: Sequence[Sampling], numbers: Sequence[float]) -> Tensor:
    """Draw a token for each row: the `top_k` likeliest, of those the likeliest with mass `top_p`, then by chance.

    Args:
        scores: [B, V].
        settings: of each row, with a temperature above 0.
        numbers: B numbers in [0, 1), by which the tokens are drawn.

    Returns:
        [B] ids.
    """

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float, device=scores.device)[:, None]

    V = scores.shape[1]
    temperature = column([one.temperature for one in settings])
    p, order = (scores.float() / temperature).softmax(dim=1).sort(dim=1, descending=True, stable=True)
    p = p * (torch.arange(V, device=p.device) < column([min(one.top_k or V, V) for one in settings]))
    likelier = p.cumsum(dim=1) - p
    p = p * (likelier < column([one.top_p for one in settings]) * p.sum(dim=1, keepdim=True))
    reached = p.cumsum(dim=1) > column(numbers) * p.sum(dim=1, keepdim=True)
    return order.gather(1, reached.int().argmax(dim=1, keepdim=True))[:, 0]
