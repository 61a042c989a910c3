"""The persona plug: the whole idea of PPlug in one module (Liu et al., ACL 2025, arXiv 2409.11901, section 3).

    (1)  h_i = Enc_his(item_i)              frozen, computed once per text, handed to this module as vectors
    (2)  x   = Enc_input(request)           trained
    (3)  w   = softmax_i(x . h_i)           see aggregators.py
    (4)  P   = sum_i w_i Proj(h_i)          Proj = two-layer MLP, trained
    (5)  S   = [I ; P]                      I trained; S goes in front of the backbone's input embeddings

Letters: B batch, N items of one user, D encoder width, M projector width, H backbone width, K persona tokens.

Choices:
- Project after pooling. The weights sum to 1, so P = W2 . sum_i w_i gelu(W1 h_i + b1) + b2 exactly, and the
  wide W2 runs once per request instead of once per item.
- Histories are ragged: the items of a batch are one [sum N, D] matrix, cut per user only for the softmax. There
  is no padding to mask, so a row cannot depend on what else is in its batch.
- The module computes in units of the root mean square component of a token embedding (`config.scale`) and
  multiplies at the end. The optimiser then sees numbers of order 1 for every backbone.
- A user without history gets `no_persona`, a learned stand-in that starts at zero, because a softmax over
  nothing is not defined.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from ..configuration import PPlugConfig
from .aggregators import AGGREGATORS


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

    def _unit(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.config.normalize else vectors

    def weights(self, queries: Tensor | None, histories: Sequence[Tensor]) -> list[Tensor]:
        """Equation (3), one user at a time.

        Args:
            queries: [B, D] vectors of the requests; None for an aggregator that does not look at them.
            histories: B matrices [N_b, D] of item vectors.

        Returns:
            B vectors [N_b] that sum to 1; an empty one for an empty history.
        """
        xs = [None] * len(histories) if queries is None else self._unit(queries)
        return [
            self.aggregator(x, self._unit(h)) if len(h) else h.new_zeros(0) for x, h in zip(xs, histories, strict=True)
        ]

    def persona_embedding(self, queries: Tensor | None, histories: Sequence[Tensor]) -> Tensor:
        """Equation (4), projected after pooling. See `weights` for the arguments.

        Returns:
            [B, K, H], in the size of the backbone's token embeddings.
        """
        weights = self.weights(queries, histories)
        lengths = [len(h) for h in histories]
        hidden = F.gelu(self.projector.hidden(self._unit(torch.cat(list(histories)))))  # [sum N, D] -> [sum N, M]
        pooled = torch.stack(
            [w.to(h.dtype) @ h for w, h in zip(weights, hidden.split(lengths), strict=True)]
        )  # [B, M]
        persona = self.projector.output(pooled).unflatten(-1, self.no_persona.shape)  # [B, M] -> [B, K, H]
        empty = torch.tensor([n == 0 for n in lengths], device=persona.device)
        return self.config.scale * torch.where(empty[:, None, None], self.no_persona, persona)

    def forward(self, queries: Tensor | None, histories: Sequence[Tensor]) -> Tensor:
        """Equation (5): the soft prompt [I ; P] (or [P]), [B, 1 + K, H]."""
        persona = self.persona_embedding(queries, histories)
        if self.instruction is None:
            return persona
        instruction = self.config.scale * self.instruction.to(persona.dtype)
        return torch.cat([instruction.expand(len(persona), 1, -1), persona], dim=1)
