"""Persona plugs: personalise any frozen language model from a user's history.

PPlug (Liu et al., ACL 2025, arXiv 2409.11901) as a transformers library. Names are imported when they are used, so
that `import pplug_hf` costs no more than `import transformers`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import auto
from .version import __version__

if TYPE_CHECKING:
    from .configuration import PPlugConfig
    from .data.lamp import Example, read_lamp
    from .data.vectors import VectorStore
    from .modeling import EncoderSpec, Persona, Personalizer, PPlugForConditionalGeneration, PPlugModel
    from .pipeline import PersonalizedTextGenerationPipeline
    from .processing import PPlugProcessor
    from .tasks.task import TASKS, Task, get_task
    from .training import PPlugCollator, PPlugTrainer

_WHERE = {
    "PPlugConfig": "configuration",
    "TASKS": "tasks.task",
    "Task": "tasks.task",
    "get_task": "tasks.task",
    "Example": "data.lamp",
    "read_lamp": "data.lamp",
    "VectorStore": "data.vectors",
    "Persona": "modeling",
    "Personalizer": "modeling",
    "EncoderSpec": "modeling",
    "PPlugForConditionalGeneration": "modeling",
    "PPlugModel": "modeling",
    "PersonalizedTextGenerationPipeline": "pipeline",
    "PPlugProcessor": "processing",
    "PPlugCollator": "training",
    "PPlugTrainer": "training",
}

__all__ = [*_WHERE, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


auto.register()
