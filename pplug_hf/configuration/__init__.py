"""The validated configuration of a plug; its class is imported when it is used, because transformers takes seconds."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .pplug import PPlugConfig

__all__ = ["PPlugConfig"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import pplug

    return getattr(pplug, name)
