"""What a plug is, as data: the validated model configuration and the tasks it is trained on."""

from .pplug import PPlugConfig

__all__ = ["PPlugConfig"]
