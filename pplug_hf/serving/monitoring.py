"""Numbers that show whether personas still do what they did: for a dashboard, an alarm, or a log without any text.

    weights = personalizer.weights(personas, query=queries)                 # [B, N]
    weight_entropy(weights)                                                 # [B], nats
    persona_norm(personalizer.embedding(personas, query=queries), personalizer.config.embedding_norm)      # [B]

| number | equation | an alarm |
|---|---|---|
| `weight_entropy` | H = - sum_i w_i ln w_i; exp(H) is the effective number of items | near 0: single items decide; near ln N: the query decides nothing |
| `empty_share` | users without items / users | rises: the store is not found, or ids have changed |
| `persona_norm` | (1/K) sum_k norm(P_k) / mean norm of the backbone's token embeddings | far above what it was: another plug, or a damaged one |
| `persona_drift` | norm(P' - P) / norm(P) | one user's persona jumps: their history was replaced |

B users, N items, K persona tokens, H backbone width. Results are fp64, on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import MismatchError
from ..modeling import Persona


def weight_entropy(weights: Tensor) -> Tensor:
    """Return the entropy of the items' weights in nats, [B]: 0 where one item has all the weight, ln N where all have the same.

    Args:
        weights: [B, N] as of `Personalizer.weights`; zeros behind shorter histories count nothing.
    """
    return torch.special.entr(weights.cpu().double()).sum(dim=-1)


def empty_share(personas: Sequence[Persona | None]) -> float:
    """Return the share of users without a history, between 0 and 1; 0 of nobody.

    Args:
        personas: of users, or None.
    """
    return sum(not persona for persona in personas) / max(1, len(personas))


def persona_norm(embeddings: Tensor, embedding_norm: float) -> Tensor:
    """Return the mean norm of each user's persona tokens in units of a word's embedding, [B]. 1: as large as a word.

    Args:
        embeddings: [B, K, H] as of `Personalizer.embedding`.
        embedding_norm: of the backbone, as `config.embedding_norm` has it.
    """
    return embeddings.cpu().double().norm(dim=-1).mean(dim=-1) / embedding_norm


def persona_drift(before: Tensor, after: Tensor) -> Tensor:
    """Return the relative change of each user's persona, [B]; infinite where there was nothing and is something now.

    Args:
        before, after: [B, K, H] as of `Personalizer.embedding`, for the same query: of two versions of a history, or of one
            history and two plugs.

    Raises:
        MismatchError: they differ in shape.
    """
    if before.shape != after.shape:
        raise MismatchError(
            f"Two versions of a persona are compared in one shape, got {list(before.shape)} and {list(after.shape)}: embed "
            "the same users with plugs of equally many tokens."
        )
    change, size = (x.cpu().double().flatten(1).norm(dim=1) for x in (after - before, before))
    return torch.where(change == 0, 0.0, change / size)
