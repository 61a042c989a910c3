"""The strength of a persona, a in P_a = P_0 + a (P - P_0): 0 as for a user without history, 1 as trained, more exaggerates.

Negative strengths are refused: they point away from the user, to soft prompts that no plug has seen in training, and
"the opposite of this user" means nothing that was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ..errors import DataError, MismatchError, kind_of

Strength: TypeAlias = float | Sequence[float] | Tensor  # for all rows, or one per row


def checked_strength(strength: Strength | None, rows: int) -> Tensor | None:
    """Return the strength of each row, [B]; None for None, which is 1.

    Args:
        strength: a number for all rows, or one per row.
        rows: B.

    Raises:
        DataError: not numbers, or one that is negative, NaN or infinite.
        MismatchError: not one per row.
    """
    if strength is None:
        return None
    try:
        values = torch.as_tensor(strength)
    except (TypeError, ValueError, RuntimeError):
        values = torch.tensor(False)
    if values.dtype == torch.bool or values.is_complex() or values.ndim > 1:
        raise DataError(
            f"The strength of a persona is a number, or a list with one per prompt; got {kind_of(strength)}."
        )
    values = values.detach().float()
    if values.ndim and len(values) != rows:
        raise MismatchError(
            f"Got {len(values)} strengths for {rows} prompts: pass one number for all, or one per prompt."
        )
    if not (values.isfinite() & (values >= 0)).all():
        raise DataError(
            f"The strength of a persona must be finite and at least 0, got {strength if not values.ndim else values.tolist()}: "
            "0 answers as for nobody, 1 as trained."
        )
    return values.expand(rows)
