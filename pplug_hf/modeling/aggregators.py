"""The weights of a history's items. An aggregator is one class; registering it is all that a new one needs.

    @register_aggregator("newest")
    class Newest(Aggregator):
        needs_query = False

        def forward(self, queries, items):
            ...

B batch, S items of all its users together, D encoder width. A mask says which items belong to a row, so that a whole
batch is one matrix product and two rows may share a history.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..configuration import PPlugConfig
from ..errors import ConfigurationError


class Items(NamedTuple):
    """The items that an aggregator weights: those of a few users, without padding."""

    vectors: Tensor  # [S, D]
    mask: Tensor  # [B, S], which of them belong to each row
    ages: Tensor | None = None  # [S] days between each item and the newest of its history; None if dates are missing


class Aggregator(nn.Module, ABC):
    """Weights of items given a query.

    Args:
        config: of the plug.
    """

    needs_query: ClassVar[bool] = True  # False: queries are neither encoded nor handed over
    needs_ages: ClassVar[bool] = False  # True: `items.ages` is there for histories of dated items

    def __init__(self, config: PPlugConfig):
        super().__init__()

    @abstractmethod
    def forward(self, queries: Tensor | None, items: Items) -> Tensor:
        """Weight items.

        Args:
            queries: [B, D]; None unless `needs_query`.
            items: S items of all rows.

        Returns:
            [B, S]; a row with items sums to 1, and items of other rows get 0.
        """


AGGREGATORS: dict[str, type[Aggregator]] = {}

A = TypeVar("A", bound=type[Aggregator])


def register_aggregator(name: str) -> Callable[[A], A]:
    """Return a class decorator that makes an aggregator known.

    Args:
        name: for `PPlugConfig.aggregator`, up to 64 letters, digits, `_` and `-`.
    """

    def register(aggregator: A) -> A:
        AGGREGATORS[name] = aggregator
        return aggregator

    return register


def get_aggregator(name: str) -> type[Aggregator]:
    """Return the aggregator of that name.

    Raises:
        ConfigurationError: none is registered under it.
    """
    if name not in AGGREGATORS:
        raise ConfigurationError(
            f"aggregator must be one of {', '.join(AGGREGATORS)}; got {name!r}. One of your own is known once the module "
            "that calls register_aggregator is imported."
        )
    return AGGREGATORS[name]


@register_aggregator("attention")
class Attention(Aggregator):
    """Equation (3): w = softmax(x . h / temperature). The paper's temperature is 1.

    With unit vectors x . h lies in [-1, 1], so at temperature 1 the weights start almost uniform; a smaller or
    learned temperature lets single items stand out. The logarithm is trained, so the temperature stays positive.
    """

    def __init__(self, config: PPlugConfig):
        super().__init__(config)
        start = torch.tensor(math.log(config.attention_temperature))
        if config.learn_temperature:
            self.log_temperature = nn.Parameter(start)
        else:
            self.register_buffer("log_temperature", start, persistent=False)

    def forward(self, queries: Tensor | None, items: Items) -> Tensor:
        assert queries is not None
        scores = queries @ items.vectors.T / self.log_temperature.exp()  # [B, S]
        # The smallest number, not minus infinity: a row without items stays finite, and so do its gradients.
        return scores.masked_fill(~items.mask, torch.finfo(scores.dtype).min).softmax(dim=1)


@register_aggregator("mean")
class Mean(Aggregator):
    """The paper's ablation: every item counts equally, whatever the query."""

    needs_query = False

    def forward(self, queries: Tensor | None, items: Items) -> Tensor:
        return items.mask.to(items.vectors.dtype) / items.mask.sum(dim=1, keepdim=True).clamp(min=1)  # [B, S]
