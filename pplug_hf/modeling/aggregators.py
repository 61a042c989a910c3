"""How the items of a history are weighted. An aggregator is one method; adding one touches this file alone.

B batch, S items of all its users together, D encoder width. Which items are a row's own is said by a mask, so that
a whole batch is one matrix product and two rows may share a history.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..configuration import PPlugConfig
from ..errors import ConfigurationError


class Attention(nn.Module):
    """Equation (3): w = softmax(x . h / temperature). The paper's temperature is 1.

    With unit vectors x . h lies in [-1, 1], so at temperature 1 the weights start almost uniform; a smaller or
    learned temperature lets single items speak. The logarithm is what is trained, so it stays positive.
    """

    needs_query = True

    def __init__(self, config: PPlugConfig):
        super().__init__()
        start = torch.tensor(math.log(config.attention_temperature))
        if config.learn_temperature:
            self.log_temperature = nn.Parameter(start)
        else:
            self.register_buffer("log_temperature", start, persistent=False)

    def forward(self, queries: Tensor | None, items: Tensor, own: Tensor) -> Tensor:
        """[B, D] requests, [S, D] items and [B, S] whose they are to [B, S] weights; rows with items sum to 1."""
        assert queries is not None
        scores = queries @ items.T / self.log_temperature.exp()  # [B, S]
        # The smallest number, not minus infinity: a row without items stays finite, and so do its gradients.
        return scores.masked_fill(~own, torch.finfo(scores.dtype).min).softmax(dim=1)


class Mean(nn.Module):
    """The paper's ablation: every item speaks equally, whatever the request."""

    needs_query = False

    def __init__(self, config: PPlugConfig):
        super().__init__()

    def forward(self, queries: Tensor | None, items: Tensor, own: Tensor) -> Tensor:
        """As `Attention.forward`; the requests are not looked at."""
        return own.to(items.dtype) / own.sum(dim=1, keepdim=True).clamp(min=1)  # [B, S]


AGGREGATORS: dict[str, type[Attention] | type[Mean]] = {"attention": Attention, "mean": Mean}


def get_aggregator(name: str) -> type[Attention] | type[Mean]:
    """Return the aggregator of that name.

    Raises:
        ConfigurationError: none is registered under it.
    """
    if name not in AGGREGATORS:
        raise ConfigurationError(f"aggregator must be one of {', '.join(AGGREGATORS)}; got {name!r}.")
    return AGGREGATORS[name]
