"""The short name to load a plug with."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigurationError
from .pplug import PPlugForConditionalGeneration


class PPlugModel:
    """The class to load a plug with: `PPlugModel.from_pretrained(plug)` gives a model that is ready to generate."""

    def __init__(self, *args: object, **kwargs: object):
        raise ConfigurationError(
            "PPlugModel is loaded with PPlugModel.from_pretrained(plug); to create a plug use "
            "PPlugForConditionalGeneration.from_backbone(backbone, encoder=...)."
        )

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> PPlugForConditionalGeneration:
        """Load a plug, see [`PPlugForConditionalGeneration.from_pretrained`]."""
        return PPlugForConditionalGeneration.from_pretrained(*args, **kwargs)
