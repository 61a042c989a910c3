"""How the items of one history are weighted. An aggregator is one method; adding one touches this file alone.

B batch, N items of one user, D encoder width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..configuration import PPlugConfig


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

    def forward(self, query: Tensor | None, items: Tensor) -> Tensor:
        assert query is not None
        return (items @ query / self.log_temperature.exp()).softmax(dim=0)  # [N, D] @ [D] -> [N]


class Mean(nn.Module):
    """The paper's ablation: every item speaks equally, whatever the request."""

    needs_query = False

    def __init__(self, config: PPlugConfig):
        super().__init__()

    def forward(self, query: Tensor | None, items: Tensor) -> Tensor:
        return items.new_full((len(items),), 1 / len(items))  # [N]


AGGREGATORS: dict[str, type[Attention] | type[Mean]] = {"attention": Attention, "mean": Mean}
