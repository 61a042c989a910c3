"""Whether a tensor has changed since somebody looked at it."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def state_of(tensor: Tensor) -> Any:
    """Changes with every write to a tensor: torch counts those, except through `.data`, which a sample notices."""
    step = max(1, tensor.numel() // 64)
    version = object() if tensor.is_inference() else tensor._version  # those are not counted: never the same
    sample = tensor.detach().flatten()[::step].tolist()
    return tensor.data_ptr(), version, tensor.dtype, tensor.device, sample
