"""The identity of a user's vectors: equal specs give equal vectors of equal items."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from ..configuration import PPlugConfig

UNRECORDED = "<not recorded>"  # the item template of a persona file of format 1, which agrees with every template


@dataclass(frozen=True)
class EncoderSpec:
    """Everything that decides which vectors a history gets, so that two personas fit if their specs do.

    Args:
        digest: of the encoder's weights and settings, see `encoders.fingerprint`.
        width: D, of its vectors.
        prompt: text put in front of every item.
        item_template: format string that makes an item's text of its fields; None if items are texts.
        granularity: what one vector stands for.
        model_type: of the encoder, for messages alone.
    """

    digest: str | None
    width: int | None
    prompt: str = ""
    item_template: str | None = None
    granularity: Literal["item", "phrase"] = "item"
    model_type: str | None = field(default=None, compare=False)

    @classmethod
    def of(cls, config: PPlugConfig) -> EncoderSpec:
        """Return the spec of the personas that a plug reads.

        Args:
            config: of the plug.
        """
        spec = cls.from_fingerprint(config.encoder_fingerprint or {}, config.item_template)
        return replace(spec, width=config.encoder_size, prompt=config.history_prompt)

    @classmethod
    def from_fingerprint(cls, fingerprint: Mapping[str, Any], item_template: str | None) -> EncoderSpec:
        """Return the spec of an encoder and a template.

        Args:
            fingerprint: of the encoder, with the prompt of history items.
            item_template: see the class.
        """
        width, prompt = fingerprint.get("embedding_size"), fingerprint.get("history_prompt") or ""
        model_type = fingerprint.get("model_type")
        return cls(fingerprint.get("digest"), width, prompt, item_template, model_type=model_type)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EncoderSpec:
        """Return the spec that `to_dict` gave.

        Args:
            values: fields by name; those of later versions are left out.
        """
        names = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name, as JSON takes them."""
        return asdict(self)

    def fits(self, other: EncoderSpec) -> bool:
        """Return whether vectors of both specs may stand in one history.

        Args:
            other: spec to compare with.
        """
        if UNRECORDED in (self.item_template, other.item_template):
            return replace(self, item_template=None) == replace(other, item_template=None)
        return self == other

    def __str__(self) -> str:
        known = {name: value for name, value in self.to_dict().items() if value not in (None, "", "item")}
        return "(" + ", ".join(f"{name}={value}" for name, value in known.items()) + ")"
