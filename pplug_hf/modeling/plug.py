"""The persona plug: the whole idea of PPlug in one module (Liu et al., ACL 2025, arXiv 2409.11901, section 3).

    (1)  h_i = Enc_his(item_i)              frozen, computed once per text, handed to this module as vectors
    (2)  x   = Enc_input(query)             trained
    (3)  w   = softmax_i(x . h_i)           see aggregators.py
    (4)  P   = sum_i w_i Proj(h_i)          Proj = two-layer MLP, trained
    (5)  S   = [I ; P]                      I trained; S goes among the backbone's input embeddings

`PersonaPlug.of_one_user` is these equations as the paper writes them; `forward` gives the same for a batch, faster
(plug_batched.py).

Letters: B batch, N items of one user, S items of all users, D encoder width, M projector width, H backbone width,
K persona tokens.

Choices:
- The module computes in units of the root mean square component of a token embedding (`config.scale`) and
  multiplies at the end. The optimiser then sees numbers of order 1 for every backbone.
- A user without history gets P_0, a learned stand-in that starts at zero, because a softmax over nothing is not defined.
  A plug that is to learn more than that for everybody, without histories, learns P_0 through the projector.
- A persona has a strength a: P moves along the line from P_0 through the user's, P_a = P_0 + a (P - P_0).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from ..configuration import PPlugConfig
from .aggregators import Items, get_aggregator
from .plug_batched import Histories, batch_histories, pair_queries, pool, weigh


class SoftPrompt(NamedTuple):
    """Equation (5) for a batch: P = 1 + K soft tokens per row, or K without an instruction."""

    embeddings: Tensor  # [B, P, H]
    mask: Tensor  # [B, P], ones at soft tokens that are there
    at_answer: Tensor  # [B], true where it stands behind the prompt
    confidence: Tensor | None = None  # [B], where the plug estimates how much a persona will help


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

    Raises:
        ConfigurationError: the sizes are not known, or there is no such aggregator.
    """

    def __init__(self, config: PPlugConfig):
        super().__init__()
        self.config, self.scale = config, config.scale
        _, _, H, K = config.sizes
        self.instruction = nn.Parameter(torch.randn(H) * config.output_init) if config.instruction else None  # I
        self.no_persona = nn.Parameter(torch.zeros(K, H))
        self.projector = Projector(config)
        self.aggregator = get_aggregator(config.aggregator)(config)
        self.input_encoder: SentenceTransformer | None = None  # Enc_input, attached once the encoder is loaded
        # Encode queries also where nobody has a history: processes that share weights must stay in step.
        self.sync_query_encoder = False

    def unit(self, vectors: Tensor) -> Tensor:
        """Return vectors [..., D] of length 1, or as they are if the plug does not normalise."""
        return F.normalize(vectors, dim=-1) if self.config.normalize else vectors

    def of_one_user(self, query: Tensor, items: Tensor) -> Tensor:
        """Equations (3) to (5) in plain form: a query [D] and items [N, D] to the soft prompt [1 + K, H]."""
        x, h = self.unit(query), self.unit(items)
        if len(h):
            w = self.aggregator(x[None], Items(h, h.new_ones(1, len(h), dtype=torch.bool)))[0]  # (3) [N]
            P = (w[:, None] * self.projector(h)).sum(dim=0).view_as(self.no_persona)  # (4) [N, K * H] -> [K, H]
        else:
            P = self.nobody()
        S = P if self.instruction is None else torch.cat([self.instruction[None], P])  # (5)
        return self.scale * S

    def nobody(self) -> Tensor:
        """Return P_0, [K, H]: the personal embedding of a user without history."""
        if not self.config.project_no_persona:
            return self.no_persona
        D, *_ = self.config.sizes
        item = self.no_persona.new_full((1, D), D**-0.5)  # of length 1; the projector makes of it what is needed
        return self.no_persona + self.projector(item).view_as(self.no_persona)

    def hidden(self, items: Tensor) -> Tensor:
        """Return the projector's hidden layer of unit items, [N, D] to [N, M]."""
        return F.gelu(self.projector.hidden(items))

    def project(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Return all of items [N, D] that no query changes: unit vectors [N, D] and their hidden layer [N, M]."""
        items = self.unit(items)
        return items, self.hidden(items)

    def weights(self, queries: Tensor | None, histories: Histories) -> list[Tensor]:
        """Equation (3).

        Args:
            queries: [B, D] vectors of the queries; None for an aggregator that does not look at them.
            histories: B matrices [N_b, D] of item vectors, rows may share one; or groups of `batch_histories`.

        Returns:
            B vectors [N_b] that sum to 1; an empty one for an empty history.
        """
        weighted = [(weigh(self, q, group).weights, group.items.mask) for q, group in pair_queries(queries, histories)]
        return [row[mine] for weights, mask in weighted for row, mine in zip(weights, mask, strict=True)]

    def persona_embedding(
        self, queries: Tensor | None, histories: Histories, strength: Tensor | None = None
    ) -> Tensor:
        """Equation (4), projected after pooling. See `weights` for the arguments.

        Args:
            queries, histories: as of `weights`.
            strength: of the personas, [B]; None: as trained.

        Returns:
            [B, K, H], in the size of the backbone's token embeddings.
        """
        pooled, known = pool(self, queries, histories)  # [B, M], [B]
        persona = self.projector.output(pooled).unflatten(-1, self.no_persona.shape)  # [B, M] -> [B, K, H]
        nobody = self.nobody()
        persona = torch.where(known[:, None, None], persona, nobody)
        if strength is not None:
            a = strength.to(persona)[:, None, None]  # [B, 1, 1]
            persona = torch.lerp(nobody, persona, a)  # P_0 + a (P - P_0); exactly P_0 at 0 and P at 1
        return self.scale * persona

    def forward(self, queries: Tensor | None, histories: Histories, strength: Tensor | None = None) -> Tensor:
        """Equation (5): the soft prompt [I ; P] (or [P]), [B, 1 + K, H]. See `persona_embedding` for the arguments."""
        persona = self.persona_embedding(queries, histories, strength)
        if self.instruction is None:
            return persona
        instruction = self.scale * self.instruction.to(persona.dtype)
        return torch.cat([instruction.expand(len(persona), 1, -1), persona], dim=1)


__all__ = ["PersonaPlug", "Projector", "SoftPrompt", "batch_histories"]
