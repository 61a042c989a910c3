"""A sample of a language model's weights: enough to notice that they were fine-tuned or merged, at no cost.

Name and commit of a backbone say where it was loaded from, not what it is now.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

VALUES = 16  # per tensor


def weight_digests(model: nn.Module) -> dict[str, str]:
    """Return digests of a sample of weights, as `PPlugConfig.backbone_fingerprint` records them.

    There are two, of values rounded to bfloat16 and to float16 before: the weights may be loaded in other dtypes than
    they were recorded in, and keep one of both. Empty where weights are quantised, sharded or not in memory.
    """
    weights = [weight.detach() for weight in model.parameters()]
    plain = (type(weight.data) is Tensor and weight.is_floating_point() and not weight.is_meta for weight in weights)
    if getattr(model, "is_quantized", False) or not all(plain):
        return {}
    samples = [weight.flatten()[:: max(1, weight.numel() // VALUES)][:VALUES].float().cpu() for weight in weights]
    return {"digest": _digest(samples, lambda x: x), "digest_fp16": _digest(samples, lambda x: x.half().float())}


def weight_state(weight: Tensor) -> tuple[object, ...]:
    """Return a value that changes with every write to a weight but through `.data`, in less time than its digest takes."""
    try:
        place = weight.data_ptr()
    except RuntimeError:  # of quantised weights, which hold several tensors
        place = 0
    return place, 0 if weight.is_inference() else weight._version, weight.dtype, weight.device


def _digest(samples: list[Tensor], rounded: Callable[[Tensor], Tensor]) -> str:
    """Return a digest that does not depend on the names and the order of tensors, nor on how often one is tied."""
    parts = {rounded(sample).bfloat16().view(torch.int16).numpy().tobytes() for sample in samples}
    return hashlib.sha256(b"".join(sorted(parts))).hexdigest()[:16]


def differs_from_files(model: nn.Module, folder: Path) -> bool:
    """Return whether a tensor of a model is another than in the safetensors of a folder, as far as a few rows tell.

    Tensors that the files do not have under their name and shape are left out, and so are quantised ones.
    """
    weights = dict(model.named_parameters())
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    weight, rows = weights.get(name), file.get_slice(name)
                    if weight is None or type(weight.data) is not Tensor or list(weight.shape) != rows.get_shape():
                        continue
                    if not weight.is_floating_point() or weight.is_meta or not weight.ndim:
                        continue
                    for row in {0, len(weight) // 2, len(weight) - 1}:
                        here, there = weight[row : row + 1].detach().cpu(), rows[row : row + 1]
                        if not (torch.equal(here, there.to(here)) or torch.equal(here.to(there), there)):
                            return True
        except (OSError, SafetensorError):
            continue
    return False
