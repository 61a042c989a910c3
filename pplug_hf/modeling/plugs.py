"""Several plugs on one backbone: a registry by name, and the soft prompts of rows that name different ones.

B batch, P prefix tokens, H backbone width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..configuration import PPlugConfig
from ..errors import ConfigurationError
from .personalizer import Personalizer
from .plug import SoftPrompt

DEFAULT = "default"  # the name of a model's first plug, as PEFT calls its first adapter


class LoadedPlug(NamedTuple):
    """A plug with its own tokenizer and generation settings; all plugs share the backbone."""

    personalizer: Personalizer
    tokenizer: PreTrainedTokenizerBase | None = None
    generation_config: Any = None


class Plugs:
    """Plugs by name, in the order of loading. One is active: it answers, trains and is saved.

    Args:
        first: the plug that is called "default".
    """

    def __init__(self, first: LoadedPlug):
        self.active = DEFAULT
        self.loaded = {DEFAULT: first}

    def __getitem__(self, name: str) -> LoadedPlug:
        if name not in self.loaded:
            raise ConfigurationError(
                f"There is no plug {name!r}; loaded are {', '.join(self.loaded)}. Load it with "
                f"model.load_plug(<folder or Hub id>, {name!r})."
            )
        return self.loaded[name]

    def check_new(self, name: object, arguments: Mapping[str, object]) -> None:
        """Refuse to load a plug under a name that is taken, or with a backbone of its own."""
        if not isinstance(name, str) or not name or name in self.loaded:
            raise ConfigurationError(
                f"A new plug needs a name that is not taken, got {name!r}; taken are {', '.join(self.loaded)}. Choose "
                "another, or delete_plug first."
            )
        if "backbone" in arguments:
            raise ConfigurationError(
                "load_plug puts a plug on the backbone that is there: leave backbone= out, or load the plug with "
                "PPlugModel.from_pretrained."
            )

    def encoder_of(self, config: PPlugConfig) -> SentenceTransformer | None:
        """Return the sentence encoder of a plug's configuration, if one of these plugs has loaded it."""
        digest = (config.encoder_fingerprint or {}).get("digest")
        parts = (loaded.personalizer for loaded in self.loaded.values())
        return next((part.history_encoder for part in parts if digest and part.spec.digest == digest), None)

    def remove(self, name: str) -> None:
        """Remove a plug that is not the active one."""
        if self[name] is self.loaded[self.active]:
            others = [other for other in self.loaded if other != name]
            raise ConfigurationError(
                f"The plug {name!r} is active: call set_plug first, with one of {', '.join(others)}."
                if others
                else f"{name!r} is the only plug; the backbone alone is model.backbone."
            )
        del self.loaded[name]


def soft_prompts_by_name(
    names: Sequence[str | None],
    make: Callable[..., SoftPrompt],
    given: Sequence[Tensor | Sequence[object] | None],
    width: int,
    device: torch.device,
) -> SoftPrompt:
    """Return the soft prompts [B, P, H] of rows that name a plug each, or None for a row without any.

    Args:
        names: B names.
        make: takes a name, and of what is given the rows of that name.
        given: tensors and lists with something for each of the B rows, or None.
        width: H.
        device: of the result.
    """
    rows: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        if name is not None:
            rows.setdefault(name, []).append(i)
    parts = [(own, make(name, *(_pick(values, own) for values in given))) for name, own in rows.items()]
    B, P = len(names), max((part.mask.shape[1] for _, part in parts), default=0)
    embeddings = torch.zeros(B, P, width, device=device)
    mask = torch.zeros(B, P, dtype=torch.long, device=device)
    at_answer = torch.zeros(B, dtype=torch.bool, device=device)
    for own, part in parts:
        embeddings[own, : part.mask.shape[1]] = part.embeddings
        mask[own, : part.mask.shape[1]] = part.mask
        at_answer[own] = part.at_answer
    return SoftPrompt(embeddings, mask, at_answer)


def _pick(values: Tensor | Sequence[object] | None, rows: list[int]) -> Tensor | list[object] | None:
    """Return some rows of a tensor or a list; None of None."""
    return values if values is None else values[rows] if isinstance(values, Tensor) else [values[i] for i in rows]
