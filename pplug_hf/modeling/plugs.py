"""Several plugs on one backbone: loaded by name, switched, and mixed within a batch. The backbone is in memory once.

    model = PPlugModel.from_pretrained("me/movie-tags")                # this one is called "default"
    model.load_plug("me/headlines", "headlines")
    model.set_plug("headlines")                                         # from now on
    model.generate(**inputs, persona=history, plug="default")           # for one call
    model.generate(**inputs, persona=histories, plug=["default", "headlines", None])  # row by row; None: no plug at all

The active plug is what the model's attributes show (`plug`, `config`, `history_encoder`, `generation_config`), what is
trained and what is saved. The others wait beside it, outside of the module tree, so no optimiser, checkpoint or
`parameters()` sees them. A call that names a plug computes with that plug's own parts; nothing is swapped meanwhile.

Letters: B batch, P prefix tokens (the longest of a batch), H backbone width.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..configuration import PPlugConfig
from ..errors import ConfigurationError, MismatchError
from . import plug_folder as files
from .backbone import word_embeddings
from .personalization import PersonaMixin, users_of
from .plug import PersonaPlug

DEFAULT = "default"  # what a model's first plug is called, as PEFT calls its first adapter
_PLACE = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download")
_PARTS = ("config", "plug", "history_encoder", "tokenizer", "generation_config")


@dataclass(eq=False)
class Slot(PersonaMixin):
    """A plug and what belongs to it alone: everything but the backbone."""

    config: PPlugConfig
    plug: PersonaPlug
    history_encoder: Any
    tokenizer: Any
    generation_config: Any

    def _attached(self) -> tuple[Any, Any]:
        return None, self.history_encoder


class PlugsMixin(PersonaMixin):
    """Loading, switching and deleting plugs of [`PPlugForConditionalGeneration`], which has what they need."""

    backbone: Any
    training: bool
    _slots: dict[str, Slot | None]  # by name, in the order of loading; None for the active one, whose parts are ours

    @property
    def plugs(self) -> dict[str, PPlugConfig]:
        """The configuration of every loaded plug, by name."""
        return {name: self.config if slot is None else slot.config for name, slot in self._slots.items()}

    @property
    def active_plug(self) -> str:
        """Name of the plug that answers unless a call names another."""
        return next(name for name, slot in self._slots.items() if slot is None)

    def load_plug(self, pretrained_model_name_or_path: str | os.PathLike, name: str, **kwargs: Any) -> None:
        """Load another plug beside those that are there. It becomes active with [`set_plug`].

        Args:
            pretrained_model_name_or_path: plug folder or Hub id, made for this model's backbone.
            name: what to call it.
            **kwargs: as of `from_pretrained`: revision, subfolder, token, encoder, ... A sentence encoder that another
                plug has loaded already is shared.

        Raises:
            ConfigurationError: the name is taken or no text, or the model has no backbone yet.
            MismatchError: the plug was made for another backbone or encoder.
            MissingFileError, DataError: as `from_pretrained`.
        """
        backbone, _ = self._attached()
        if not isinstance(name, str) or not name or name in self._slots:
            raise ConfigurationError(
                f"A new plug needs a name that is not taken, got {name!r}; taken are {', '.join(self._slots)}. Choose "
                "another, or delete_plug first."
            )
        if "backbone" in kwargs:
            raise ConfigurationError(
                "load_plug puts a plug on the backbone that is there: leave backbone= out, or load the plug with "
                "PPlugModel.from_pretrained."
            )
        # Opened once: configuration and weights are of one commit.
        where = {argument: kwargs.pop(argument) for argument in _PLACE if argument in kwargs}
        place = files.open_location(pretrained_model_name_or_path, **where)
        if kwargs.get("encoder") is None:
            fingerprint = files.load_config(place).encoder_fingerprint or {}
            kwargs["encoder"] = self._loaded_encoder(fingerprint.get("digest"))
        loaded: Any = type(self).from_pretrained(place, backbone=backbone, **kwargs)  # type: ignore[attr-defined]
        slot = Slot(**{part: getattr(loaded, part) for part in _PARTS})
        slot.plug.train(self.training)
        self._slots[name] = slot

    def _loaded_encoder(self, digest: str | None) -> Any:
        for holder in (self._holder(name) for name in self._slots):
            if digest is not None and (holder.config.encoder_fingerprint or {}).get("digest") == digest:
                return holder.history_encoder
        return None

    def set_plug(self, name: str) -> None:
        """Make a loaded plug the one that answers, trains and is saved.

        Args:
            name: one of `plugs`.

        Raises:
            ConfigurationError: no plug of that name is loaded.
        """
        slot = self._holder(name)
        if slot is self:
            return
        self._slots[self.active_plug] = Slot(**{part: getattr(self, part) for part in _PARTS})
        self._slots[name] = None
        for part in _PARTS:
            setattr(self, part, getattr(slot, part))
        self.train(self.training)  # type: ignore[attr-defined]

    def delete_plug(self, name: str) -> None:
        """Detach a plug and free its memory. The backbone stays; the last plug cannot go.

        Args:
            name: one of `plugs`.

        Raises:
            ConfigurationError: no such plug, or it is the active one.
        """
        if self._holder(name) is self:
            others = [other for other in self._slots if other != name]
            raise ConfigurationError(
                f"The plug {name!r} is active: call set_plug first, with one of {', '.join(others)}."
                if others
                else f"{name!r} is the only plug; the backbone alone is model.backbone."
            )
        del self._slots[name]

    def _holder(self, name: str) -> Any:
        """What computes with the plug of that name: the model itself, or a slot, on the backbone's device."""
        if name not in self._slots:
            raise ConfigurationError(
                f"There is no plug {name!r}; loaded are {', '.join(self._slots)}. Load it with "
                f"model.load_plug(<folder or Hub id>, {name!r})."
            )
        slot = self._slots[name]
        if slot is None:
            return self
        device = word_embeddings(self.backbone).weight.device
        slot.plug.to(device)
        slot.history_encoder.to(device)
        return slot

    def _soft_prompts(
        self, plug: Any, persona: Any, query: Any, input_ids: Tensor, mask: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Equation (5) for a batch whose rows may have plugs of their own: [B, P, H], and which of it is there [B, P].

        Args:
            plug: None for the active plug, a name for all rows, or a name or None (no plug) per row.
            persona, query, input_ids, mask, labels: as in `forward`.
        """
        B = len(input_ids)
        if plug is None or isinstance(plug, str):
            prefix = self._soft_prompt_of(plug or self.active_plug, persona, query, input_ids, mask, labels)
            return prefix, mask.new_ones(prefix.shape[:2])

        names = list(plug)
        users = [None] * B if persona is None else users_of(persona)
        queries = [query] if isinstance(query, str) else query
        for what, values in (("plugs", names), ("personas", users), ("queries", queries)):
            if values is not None and len(values) != B:
                raise MismatchError(f"Got {len(values)} {what} for {B} prompts: pass one per prompt.")
        parts: dict[str, tuple[list[int], Tensor]] = {}
        for name in dict.fromkeys(name for name in names if name is not None):
            rows = [i for i, other in enumerate(names) if other == name]
            own = (
                None
                if queries is None
                else queries[rows]
                if isinstance(queries, Tensor)
                else [queries[i] for i in rows]
            )
            texts = input_ids[rows], mask[rows], None if labels is None else labels[rows]
            parts[name] = rows, self._soft_prompt_of(name, [users[i] for i in rows], own, *texts)
        embeddings = word_embeddings(self.backbone).weight
        P = max((part.shape[1] for _, part in parts.values()), default=0)
        prefix = torch.zeros(B, P, self.config.sizes[2], device=embeddings.device)  # [B, P, H]
        shown = mask.new_zeros(B, P)
        for rows, part in parts.values():
            prefix[rows, : part.shape[1]] = part
            shown[rows, : part.shape[1]] = 1
        return prefix, shown

    def _soft_prompt_of(
        self, name: str, persona: Any, query: Any, input_ids: Tensor, mask: Tensor, labels: Tensor | None
    ) -> Tensor:
        holder = self._holder(name)
        personas = holder._personas(persona, len(input_ids))
        return holder.plug(holder._queries(query, personas, input_ids, mask, labels), holder._groups(personas))
