"""Equations (3) and (4) for a whole batch, without padding and with the wide half of the projector last.

- Project after pooling. The weights sum to 1, so P = W2 . sum_i w_i gelu(W1 h_i + b1) + b2 exactly, and the wide W2
  runs once per query instead of once per item.
- Histories are ragged: the items of a batch are one [S, D] matrix, a mask says to which row they belong, and rows that
  share a history share its items. Rows go through in groups of `GROUP` and items in chunks of `CHUNK`, so work and
  memory grow with the number of items alone: never with the longest history, nor with B times S.
- `batch_histories` does all that looks at single histories; what follows is tensors in, tensors out, and one graph
  under `torch.compile`, of batches of any length. Lists of histories compile too, but each pattern of lengths anew.

Letters as in plug.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .aggregators import Aggregator, Items

GROUP = 16  # rows whose items are weighted together; the products outside of a row's own items cost about 3 %
CHUNK = 2048  # items projected at a time; where nothing is kept for later, only one chunk's hidden layer is in memory


class Plug(Protocol):
    """The parts of a `PersonaPlug` that pooling needs."""

    aggregator: Aggregator
    unit: Callable[[Tensor], Tensor]
    hidden: Callable[[Tensor], Tensor]


class Group(NamedTuple):
    """The histories of a few rows."""

    items: Items
    hidden: Tensor | None = None  # [S, M], if it is known; the items have gone through `PersonaPlug.project` then


class Weighted(NamedTuple):
    """Items of a group as they are weighted, and their weights."""

    items: Tensor  # [S, D]
    weights: Tensor  # [B, S]


Histories = Sequence[Tensor] | Sequence[Group]


def batch_histories(
    histories: Histories, hidden: Sequence[Tensor] | None = None, ages: Sequence[Tensor | None] | None = None
) -> Sequence[Group]:
    """Return the histories of a batch as the groups of rows that a plug works on; groups come back as they are.

    Args:
        histories: B matrices [N_b, D] of item vectors.
        hidden: their hidden vectors [N_b, M], if both come from `PersonaPlug.project`.
        ages: of their items [N_b], in days; None for a row without. A row's weights must not depend on whether others have
            some, so those with and without are in different groups.
    """
    if isinstance(histories[0], Group):
        return histories  # type: ignore[return-value]
    groups, start = [], 0
    for end in range(1, len(histories) + 1):
        differ = ages is not None and end < len(ages) and (ages[start] is None) != (ages[end] is None)
        if end == len(histories) or end - start == GROUP or differ:
            rows = slice(start, end)
            groups.append(_group(histories[rows], hidden and hidden[rows], ages and ages[rows]))
            start = end
    return groups


def _group(histories: Any, hidden: Any, ages: Any) -> Group:
    users = dict(
        zip(dict.fromkeys(histories), range(len(histories)), strict=False)
    )  # rows that share a history share items
    items = _join(users)  # [S, D]
    lengths = torch.tensor(list(map(len, users)))
    user = torch.arange(len(users)).repeat_interleave(lengths, output_size=len(items))  # [S]
    mask = torch.tensor([users[history] for history in histories])[:, None] == user  # [B, S]
    known = hidden and _join(dict(zip(histories, hidden, strict=True)).values())  # [S, M]
    dated = ages and ages[0] is not None
    days = _join(dict(zip(histories, ages, strict=True)).values()) if dated else None  # [S]
    return Group(Items(items, mask.to(items.device), days), known)


def _join(parts: Iterable[Tensor]) -> Tensor:
    parts = list(parts)
    return parts[0] if len(parts) == 1 else torch.cat(parts)  # the items of one user need no copy


def pair_queries(queries: Tensor | None, histories: Histories) -> list[tuple[Tensor | None, Group]]:
    """Return every group of rows with its queries [B, D]."""
    pairs, start = [], 0
    for group in batch_histories(histories):
        end = start + len(group.items.mask)
        pairs.append((None if queries is None else queries[start:end], group))
        start = end
    return pairs


def weigh(plug: Plug, queries: Tensor | None, group: Group) -> Weighted:
    """Equation (3) for a group of rows."""
    vectors, mask, ages = group.items
    vectors = plug.unit(vectors) if group.hidden is None else vectors
    if queries is None and plug.aggregator.needs_query and not len(vectors):
        return Weighted(vectors, vectors.new_zeros(mask.shape))  # nobody has a history, so no query was encoded
    queries = None if queries is None else plug.unit(queries)
    return Weighted(vectors, plug.aggregator(queries, Items(vectors, mask, ages)))


def pool(plug: Plug, queries: Tensor | None, histories: Histories) -> tuple[Tensor, Tensor]:
    """Return sum_i w_i gelu(W1 h_i + b1) for every row, [B, M], and which rows have items, [B]."""
    pooled, known = [], []
    for of_rows, group in pair_queries(queries, histories):
        pooled.append(_pool_group(plug, of_rows, group))
        known.append(group.items.mask.any(dim=1))
    return torch.cat(pooled), torch.cat(known)


def _pool_group(plug: Plug, queries: Tensor | None, group: Group) -> Tensor:
    items, weights = weigh(plug, queries, group)
    if group.hidden is not None:
        return weights.to(group.hidden.dtype) @ group.hidden  # [B, S] @ [S, M]
    chunk = len(items) if torch.compiler.is_compiling() else CHUNK  # a graph per number of chunks would be many
    pooled: Any = 0
    for h, w in zip(items.split(chunk), weights.split(chunk, dim=1), strict=True):
        hidden = plug.hidden(h)
        pooled = pooled + w.to(hidden.dtype) @ hidden  # [B, C] @ [C, M]
    return pooled
