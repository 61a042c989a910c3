"""The persona plug: the whole idea of PPlug in one module (Liu et al., ACL 2025, arXiv 2409.11901, section 3).

    (1)  h_i = Enc_his(item_i)              frozen, computed once per text, handed to this module as vectors
    (2)  x   = Enc_input(request)           trained
    (3)  w   = softmax_i(x . h_i)           see aggregators.py
    (4)  P   = sum_i w_i Proj(h_i)          Proj = two-layer MLP, trained
    (5)  S   = [I ; P]                      I trained; S goes in front of the backbone's input embeddings

Letters: B batch, N items of one user, S items of all users, D encoder width, M projector width, H backbone width,
K persona tokens.

Choices:
- Project after pooling. The weights sum to 1, so P = W2 . sum_i w_i gelu(W1 h_i + b1) + b2 exactly, and the
  wide W2 runs once per request instead of once per item.
- Histories are ragged: the items of a batch are one [S, D] matrix without padding, a mask says whose they are, and
  rows that share a history share its items. Rows go through in groups of `GROUP` and items in chunks of `CHUNK`, so
  work and memory grow with the number of items alone: never with the longest history, nor with B times S.
- `batch_histories` does all that looks at single histories; what follows is tensors in, tensors out, and one graph under
  `torch.compile`, of batches of any length. Lists of histories compile too, but each pattern of lengths on its own.
- The module computes in units of the root mean square component of a token embedding (`config.scale`) and
  multiplies at the end. The optimiser then sees numbers of order 1 for every backbone.
- A user without history gets `no_persona`, a learned stand-in that starts at zero, because a softmax over
  nothing is not defined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from ..configuration import PPlugConfig
from .aggregators import AGGREGATORS

GROUP = 16  # rows whose items are weighted together; the products outside of a row's own items cost about 3 %
CHUNK = 2048  # items projected at a time; where nothing is kept for later, only one chunk's hidden layer is in memory


class Group(NamedTuple):
    """The histories of a few rows, without padding."""

    items: Tensor  # [S, D], of all their users
    own: Tensor  # [B, S], which of them are a row's own
    hidden: Tensor | None = None  # [S, M], if it is known; the items have gone through `PersonaPlug.project` then


Histories = Sequence[Tensor] | Sequence[Group]


class Projector(nn.Module):
    """Proj of equation (4): W2 gelu(W1 h + b1) + b2, its two halves callable apart.

    Weights are drawn so that unit-length item vectors give hidden units of order 1 and outputs of
    `config.output_init`: a fresh persona is much quieter than a word, and grows as it proves useful.
    """

    def __init__(self, config: PPlugConfig):
        super().__init__()
        D, M, H, K = config.sizes
        self.hidden = nn.Linear(D, M)
        self.output = nn.Linear(M, K * H)
        nn.init.normal_(self.hidden.weight, std=1.0 if config.normalize else D**-0.5)
        nn.init.zeros_(self.hidden.bias)
        nn.init.normal_(self.output.weight, std=config.output_init / M**0.5)
        nn.init.zeros_(self.output.bias)

    def forward(self, items: Tensor) -> Tensor:
        return self.output(F.gelu(self.hidden(items)))  # [N, D] -> [N, K * H]


class PersonaPlug(nn.Module):
    """Everything that is trained. Item vectors come in, a soft prompt comes out.

    Args:
        config: a configuration whose `hidden_size` and `encoder_size` are known.
    """

    def __init__(self, config: PPlugConfig):
        super().__init__()
        self.config = config
        _, _, H, K = config.sizes
        self.instruction = nn.Parameter(torch.randn(H) * config.output_init) if config.instruction else None  # I
        self.no_persona = nn.Parameter(torch.zeros(K, H))
        self.projector = Projector(config)
        self.aggregator = AGGREGATORS[config.aggregator](config)
        self.input_encoder: SentenceTransformer | None = None  # Enc_input, attached once the encoder is loaded
        self.sync_query_encoder = (
            False  # also where nobody has a history: processes that share weights must stay in step
        )

    def _unit(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.config.normalize else vectors

    def project(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """What becomes of items [N, D] whatever the request: the vectors to weigh [N, D], their hidden layer [N, M]."""
        items = self._unit(items)
        return items, self._hidden(items)

    def _hidden(self, items: Tensor) -> Tensor:
        return F.gelu(self.projector.hidden(items))  # [N, D] -> [N, M]

    def weights(self, queries: Tensor | None, histories: Histories) -> list[Tensor]:
        """Equation (3).

        Args:
            queries: [B, D] vectors of the requests; None for an aggregator that does not look at them.
            histories: B matrices [N_b, D] of item vectors, rows may share one; or what `batch_histories` makes of them.

        Returns:
            B vectors [N_b] that sum to 1; an empty one for an empty history.
        """
        weighted = [(self._weighted(asked, group)[1], group.own) for asked, group in _asked(queries, histories)]
        return [row[mine] for weights, own in weighted for row, mine in zip(weights, own, strict=True)]

    def persona_embedding(self, queries: Tensor | None, histories: Histories) -> Tensor:
        """Equation (4), projected after pooling. See `weights` for the arguments.

        Returns:
            [B, K, H], in the size of the backbone's token embeddings.
        """
        asked = _asked(queries, histories)
        pooled = torch.cat([self._pooled(*pair) for pair in asked])  # [B, M]
        known = torch.cat([group.own.any(dim=1) for _, group in asked])  # [B], who has a history
        persona = self.projector.output(pooled).unflatten(-1, self.no_persona.shape)  # [B, M] -> [B, K, H]
        return self.config.scale * torch.where(known[:, None, None], persona, self.no_persona)

    def _weighted(self, queries: Tensor | None, group: Group) -> tuple[Tensor, Tensor]:
        """Items [S, D] of a group of rows as they are weighed, and their weights [B, S]."""
        items = self._unit(group.items) if group.hidden is None else group.items
        if queries is None and self.aggregator.needs_query and not len(items):
            return items, items.new_zeros(group.own.shape)  # nobody has a history, so nobody needed to ask
        return items, self.aggregator(None if queries is None else self._unit(queries), items, group.own)

    def _pooled(self, queries: Tensor | None, group: Group) -> Tensor:
        """sum_i w_i gelu(W1 h_i + b1) for a group of rows, [B, M]."""
        items, weights = self._weighted(queries, group)
        if group.hidden is not None:
            return weights.to(group.hidden.dtype) @ group.hidden  # [B, S] @ [S, M]
        chunk = len(items) if torch.compiler.is_compiling() else CHUNK  # a graph per number of chunks would be many
        pooled: Any = 0
        for h, w in zip(items.split(chunk), weights.split(chunk, dim=1), strict=True):
            hidden = self._hidden(h)
            pooled = pooled + w.to(hidden.dtype) @ hidden  # [B, C] @ [C, M]
        return pooled

    def forward(self, queries: Tensor | None, histories: Histories) -> Tensor:
        """Equation (5): the soft prompt [I ; P] (or [P]), [B, 1 + K, H]."""
        persona = self.persona_embedding(queries, histories)
        if self.instruction is None:
            return persona
        instruction = self.config.scale * self.instruction.to(persona.dtype)
        return torch.cat([instruction.expand(len(persona), 1, -1), persona], dim=1)


def batch_histories(histories: Histories, hidden: Sequence[Tensor] | None = None) -> Sequence[Group]:
    """Histories of a batch as the groups of rows that a plug works on; groups come back as they are.

    Args:
        histories: B matrices [N_b, D] of item vectors.
        hidden: their hidden vectors [N_b, M], if both come from `PersonaPlug.project`.
    """
    if isinstance(histories[0], Group):
        return histories  # type: ignore[return-value]
    starts = [slice(start, start + GROUP) for start in range(0, len(histories), GROUP)]
    return [_group(histories[rows], None if hidden is None else hidden[rows]) for rows in starts]


def _group(histories: Sequence[Any], hidden: Sequence[Tensor] | None) -> Group:
    users = {h: i for i, h in enumerate(dict.fromkeys(histories))}  # rows that share a history share its items
    items = _joined(list(users))  # [S, D]
    lengths = torch.tensor([len(h) for h in users])
    user = torch.arange(len(users)).repeat_interleave(lengths, output_size=len(items))  # [S]
    own = torch.tensor([users[h] for h in histories])[:, None] == user
    known = None if hidden is None else _joined(list(dict(zip(histories, hidden, strict=True)).values()))  # [S, M]
    return Group(items, own.to(items.device), known)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))  # the items of one user need no copy


def _asked(queries: Tensor | None, histories: Histories) -> list[tuple[Tensor | None, Group]]:
    """Every group of rows with its requests [B, D]."""
    groups = batch_histories(histories)
    parts = [None] * len(groups) if queries is None else queries.split([len(group.own) for group in groups])
    return list(zip(parts, groups, strict=True))
