"""Devices by name, checked before torch fails with an error of its own."""

from __future__ import annotations

import torch

from ..errors import ConfigurationError


def checked_device(device: str | torch.device | None = None) -> torch.device:
    """Return a device that is there.

    Args:
        device: as torch writes it: "cpu", "cuda", "cuda:1", "mps" (default: the accelerator if there is one, else the CPU).

    Raises:
        ConfigurationError: torch does not recognise it, or this machine lacks it.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    here = ["cpu", *([accelerator.type] if accelerator else [])]
    try:
        found = torch.device(here[-1] if device is None else device)
    except RuntimeError:
        raise ConfigurationError(
            f"The device is {device!r}; write it as torch does: cpu, cuda, cuda:1, mps. This machine has "
            f"{' and '.join(here)}."
        ) from None
    if found.type not in (*here, "meta") or (found.index or 0) >= max(1, torch.accelerator.device_count()):
        raise ConfigurationError(
            f"The device {str(device)!r} is not there: this machine, and torch {torch.__version__}, "
            f"have {' and '.join(here)}."
        )
    return found
