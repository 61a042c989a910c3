"""The validated configuration of a plug."""

from .pplug import PPlugConfig

__all__ = ["PPlugConfig"]
