"""What a stopped training needs to go on: the plugs' weights, the best ones so far and the optimisers, in one file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pplug_hf.storage.files import atomic_write

if TYPE_CHECKING:
    from training import Trained

KINDS = ("plug", "best", "optimizer")


def save(path: Path, key: object, plugs: Sequence[Trained], step: int) -> None:
    """Write the state of plugs in training.

    Args:
        path: of the file, which is replaced as a whole.
        key: what is trained, as JSON takes it; another training does not go on from this file.
        plugs: J plugs.
        step: the last one that is done.
    """
    tensors: dict[str, Tensor] = {}
    for j, trained in enumerate(plugs):
        optimizer = trained.optimizer.state_dict()["state"]
        state = {f"{i}.{name}": value for i, of in optimizer.items() for name, value in of.items()}
        for kind, found in zip(KINDS, (trained.plug.state_dict(), trained.state, state), strict=True):
            tensors |= {f"{j}/{kind}/{name}": value.detach().clone().contiguous() for name, value in found.items()}
    about = {"key": key, "step": step, "curves": [trained.curve for trained in plugs]}
    with atomic_write(path) as staging:
        save_file(tensors, staging, {"about": json.dumps(about)})


def restore(path: Path, key: object, plugs: Sequence[Trained]) -> int:
    """Give plugs the state of a stopped training, and return its last step; 0 if there is none with this key."""
    if not path.is_file():
        return 0
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
        if about["key"] != json.loads(json.dumps(key)):
            return 0
        read: list[dict[str, dict[str, Tensor]]] = [{kind: {} for kind in KINDS} for _ in plugs]
        for name in file.keys():  # noqa: SIM118 (no mapping)
            j, kind, rest = name.split("/", 2)
            read[int(j)][kind][rest] = file.get_tensor(name)
    for trained, of, curve in zip(plugs, read, about["curves"], strict=True):
        trained.plug.load_state_dict(of["plug"], strict=False)
        trained.curve, trained.state = curve, {name: value.to(trained.device) for name, value in of["best"].items()}
        trained.best = min(curve)
        state: dict[int, dict[str, Any]] = {}
        for name, value in of["optimizer"].items():
            i, _, field = name.partition(".")
            state.setdefault(int(i), {})[field] = value
        trained.optimizer.load_state_dict({**trained.optimizer.state_dict(), "state": state})
    return about["step"]
