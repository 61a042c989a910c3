"""Persona plugs: personalise any frozen language model from a user's history.

PPlug (Liu et al., ACL 2025, arXiv 2409.11901) as a transformers library. Names are imported when they are used, so
that `import pplug_hf` costs no more than `import transformers`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from . import auto
from .version import __version__

if TYPE_CHECKING:
    from .commands.bench import bench
    from .commands.evaluate import evaluate
    from .commands.fit import fit
    from .commands.options import BenchSettings, EvaluateSettings, FitSettings, TrainSettings
    from .commands.train import train
    from .configuration import PPlugConfig
    from .data.dataset import PersonaDataset
    from .data.events import from_events
    from .data.examples import stream
    from .data.histories import history_examples, split_users
    from .data.lamp import read_lamp
    from .data.records import Example
    from .data.report import describe
    from .data.tables import read_table
    from .data.vectors import VectorStore
    from .errors import (
        ConfigurationError,
        DataError,
        HubError,
        MismatchError,
        MissingFileError,
        MissingPackageError,
        PPlugError,
        StoreError,
    )
    from .evaluation.compare import Comparison
    from .evaluation.plots import plot_weights
    from .evaluation.rendering import markdown
    from .methods.base import Method
    from .methods.decoding import ModelInputs, answer, shuffle_histories
    from .methods.names import register_method
    from .methods.prompts import persona_positions, retrieval_prompt
    from .methods.retrievers import get_ranker, retrieve
    from .modeling import EncoderSpec, Persona, Personalizer, PPlugForConditionalGeneration, PPlugModel
    from .modeling.aggregators import Aggregator, Items, register_aggregator
    from .modeling.plug import SoftPrompt
    from .modeling.prompt_cache import PromptCache
    from .pipeline import PersonalizedTextGenerationPipeline
    from .processing import PPlugProcessor
    from .serving.ab import assign_arm
    from .serving.bulk import encode_items
    from .serving.cohorts import Cohorts
    from .serving.engine import Request, Sampling
    from .serving.open_store import open_store
    from .serving.store import PersonaStore
    from .serving.transformers_engine import TransformersEngine
    from .tasks.metrics import Metric, register_metric
    from .tasks.recipes import Recipe, get_recipe
    from .tasks.task import TASKS, PromptFormat, Task, get_task, register_task, score
    from .training import PPlugCollator, PPlugTrainer, PPlugTrainingArguments

# The public names: these alone are documented and kept stable. Where each is defined may change.
_WHERE = {
    "Aggregator": "modeling.aggregators",
    "answer": "methods.decoding",
    "assign_arm": "serving.ab",
    "bench": "commands.bench",
    "BenchSettings": "commands.options",
    "Cohorts": "serving.cohorts",
    "Comparison": "evaluation.compare",
    "ConfigurationError": "errors",
    "DataError": "errors",
    "describe": "data.report",
    "encode_items": "serving.bulk",
    "EncoderSpec": "modeling",
    "evaluate": "commands.evaluate",
    "EvaluateSettings": "commands.options",
    "Example": "data.records",
    "fit": "commands.fit",
    "FitSettings": "commands.options",
    "from_events": "data.events",
    "get_ranker": "methods.retrievers",
    "get_recipe": "tasks.recipes",
    "get_task": "tasks.task",
    "history_examples": "data.histories",
    "HubError": "errors",
    "Items": "modeling.aggregators",
    "markdown": "evaluation.rendering",
    "Method": "methods.base",
    "Metric": "tasks.metrics",
    "MismatchError": "errors",
    "MissingFileError": "errors",
    "MissingPackageError": "errors",
    "ModelInputs": "methods.decoding",
    "Persona": "modeling",
    "open_store": "serving.open_store",
    "persona_positions": "methods.prompts",
    "PersonaDataset": "data.dataset",
    "PersonalizedTextGenerationPipeline": "pipeline",
    "Personalizer": "modeling",
    "PersonaStore": "serving.store",
    "plot_weights": "evaluation.plots",
    "PPlugCollator": "training",
    "PPlugConfig": "configuration",
    "PPlugError": "errors",
    "PPlugForConditionalGeneration": "modeling",
    "PPlugModel": "modeling",
    "PPlugProcessor": "processing",
    "PPlugTrainer": "training",
    "PPlugTrainingArguments": "training",
    "PromptCache": "modeling.prompt_cache",
    "PromptFormat": "tasks.task",
    "read_lamp": "data.lamp",
    "read_table": "data.tables",
    "Recipe": "tasks.recipes",
    "register_aggregator": "modeling.aggregators",
    "register_method": "methods.names",
    "register_metric": "tasks.metrics",
    "register_task": "tasks.task",
    "Request": "serving.engine",
    "retrieval_prompt": "methods.prompts",
    "retrieve": "methods.retrievers",
    "Sampling": "serving.engine",
    "score": "tasks.task",
    "shuffle_histories": "methods.decoding",
    "SoftPrompt": "modeling.plug",
    "StoreError": "errors",
    "split_users": "data.histories",
    "stream": "data.examples",
    "Task": "tasks.task",
    "TASKS": "tasks.task",
    "train": "commands.train",
    "TrainSettings": "commands.options",
    "TransformersEngine": "serving.transformers_engine",
    "VectorStore": "data.vectors",
}

__all__ = [*_WHERE, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


auto.register()
