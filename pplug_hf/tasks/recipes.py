"""Recipes: named settings for each task of LaMP. `paper/lamp-4` is the paper's, `ours/lamp-4` ours.

    pplug-hf train --recipe paper/lamp-4 --data LaMP_4 --output my-plug     what is given explicitly wins
    pplug-hf recipes --name ours/lamp-4                                     what is in it, and why

    recipe = get_recipe("paper/lamp-4")
    train(TrainSettings(**recipe.training, data="LaMP_4", output="my-plug"), **recipe.plug)
    bench(BenchSettings(**recipe.answering, data="LaMP_4", output="bench", plugs=["pplug=my-plug"]))

The paper's settings are those of its text and, where that is silent, of its authors' code. Ours were chosen on
a few dev splits with small backbones; only those of LaMP-2 have shown a gain (`benchmarks/results`), and nobody has
compared them on large ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigurationError
from .task import TASKS, Task

_BGE_PROMPT = "Represent this sentence for searching relevant passages: "

_NOT_REPRODUCED = (
    "The soft prompt's fixed scale (539.9738, and a seventh of it for I) is FlanT5-XXL's: here the scale is measured "
    "from any backbone's token embeddings.",
    "I has no MLP of its own: it is a trained vector, which can become every vector that the MLP could give.",
    "P starts at a tenth of a token's size and not where the authors' initialisation puts it.",
    "The checkpoint is the one with the best loss on a tenth of the training users, who are held out for that.",
    "The plug is computed in float32 on a bfloat16 backbone.",
)

_NOT_IN_THE_PAPER = ("The paper has no LaMP-6, whose corpus is licensed: these are its settings for the other tasks.",)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings by name."""

    name: str = field(metadata={"help": "Name of the recipe, as in 'paper/lamp-4'."})
    task: str = field(metadata={"help": "Name of its task."})
    training: Mapping[str, Any] = field(metadata={"help": "Settings of `pplug-hf train`."})
    plug: Mapping[str, Any] = field(metadata={"help": "Choices of the plug's configuration, for training too."})
    answering: Mapping[str, Any] = field(metadata={"help": "Settings of `pplug-hf evaluate` and `pplug-hf bench`."})
    reasons: Mapping[str, str] = field(
        default_factory=dict, metadata={"help": "Why a setting is not the paper's, by its name."}
    )
    not_reproduced: tuple[str, ...] = field(default=(), metadata={"help": "What of the paper's way is not in it."})


def _paper(task: Task) -> Recipe:
    rating = task.name == "LaMP-3"
    shared = {"task": task.name, "backbone_dtype": "bfloat16", "max_length": 256, "max_items": 512}
    training = {
        "backbone": "google/flan-t5-xxl",
        "encoder": "BAAI/bge-base-en-v1.5",
        "train_on_histories": False,
        "history_dropout": 0.5,
        "history_repeats": 10,
        "epochs": 1 if rating else 2,
        "patience": 100,
        "batch_size": 64,
        "learning_rate": 1e-4,
        "encoder_learning_rate": 1e-4,
        "weight_decay": 1e-4,
        "warmup": 0.05,
        "max_target_length": 128,
    }
    if task.name in ("LaMP-2", "LaMP-3"):
        training["labelled_items"] = False
    plug = {
        "num_persona_tokens": 1,
        "instruction": True,
        "aggregator": "attention",
        "attention_temperature": 1.0,
        "learn_temperature": False,
        "normalize": True,
        "train_input_encoder": True,
        "query_prompt": _BGE_PROMPT,
        "history_prompt": "",
    }
    answering = {"num_beams": 4, "max_new_tokens": 10 if rating else 128}
    return Recipe(
        name=f"paper/{task.name.lower()}",
        task=task.name,
        training=shared | training,
        plug=plug,
        answering=shared | answering,
        not_reproduced=_NOT_REPRODUCED + (_NOT_IN_THE_PAPER if task.name == "LaMP-6" else ()),
    )


# Setting -> (value, why it is not the paper's); None leaves the setting to its default.
_TRAINING: dict[str, tuple[Any, str]] = {
    "backbone": ("google/flan-t5-base", "It trains on one small GPU; pass --backbone for any other."),
    "max_items": (None, "An item costs one vector that is encoded once, so none need be left out."),
    "train_on_histories": (True, "Every answered item becomes an example: a plug needs many more than there are."),
    "history_repeats": (0, "With an example for every item, one draw of what is dropped per pass is enough."),
    "batch_size": (32, "Smaller batches make more steps of the few examples of a small data set."),
    "learning_rate": (1e-3, "Without an encoder to train, what is left is small and starts from nothing."),
    "encoder_learning_rate": (None, "No encoder is trained."),
    "weight_decay": (0.01, "Small data sets have few users, whom a plug soon knows by heart."),
    "evaluations_per_epoch": (8, "Passes are few, and the best checkpoint may lie within one."),
}
_PLUG: dict[str, tuple[Any, str]] = {
    "num_persona_tokens": (4, "A user is more than one vector, and three more tokens cost next to nothing."),
    "projector_size": (256, "Fewer parameters for as few users as small data sets have."),
    "attention_temperature": (0.1, "At 1, unit vectors get almost the same weight each."),
    "learn_temperature": (True, "How sharply to choose among items depends on the task, and can be learned."),
    "train_input_encoder": (False, "The plug stays small, and requests are encoded once."),
    "query_prompt": (None, "An encoder's own prompts are used, so that another encoder needs no other recipe."),
    "history_prompt": (None, "As query_prompt."),
}
_LABELLED = {"labelled_items": (True, "Without the user's tag or score an item does not say how this user judges.")}
_OF_TASK: dict[str, dict[str, tuple[Any, str]]] = {
    "LaMP-1": {"epochs": (5, "Its items carry no answers to learn from, so examples are few.")},
    "LaMP-2": {
        **_LABELLED,
        "batch_size": (16, "Smaller batches make more steps of few examples, and this task has the fewest."),
        "synthetic_users": (3000, "Synthetic users: a plug memorises the hundred or so of a small data set."),
        "item_template": (
            "tag: {tag}. tag: {tag}. {description}",
            "In the vector of a long description one mention of the tag drowns.",
        ),
    },
    "LaMP-3": _LABELLED,
    "LaMP-4": {"epochs": (1, "Every item is an example, so a pass is long.")},
    "LaMP-5": {"epochs": (1, "Every item is an example, so a pass is long.")},
    "LaMP-6": {"epochs": (1, "Every item is an example, so a pass is long.")},
    "LaMP-7": {"epochs": (5, "Its items carry no answers to learn from, so examples are few.")},
}


def _ours(paper: Recipe) -> Recipe:
    own = _OF_TASK[paper.task]
    plug_changes = _PLUG | {name: change for name, change in own.items() if name == "item_template"}
    training_changes = _TRAINING | {name: change for name, change in own.items() if name not in plug_changes}
    if paper.task in ("LaMP-1", "LaMP-7"):
        del training_changes["train_on_histories"]  # there is nothing in the items to learn from
    shared = {name: change for name, change in training_changes.items() if name in paper.answering}
    return Recipe(
        name=paper.name.replace("paper/", "ours/"),
        task=paper.task,
        training=_changed(paper.training, training_changes),
        plug=_changed(paper.plug, plug_changes),
        answering=_changed(paper.answering, shared),
        reasons={name: why for name, (_, why) in (training_changes | plug_changes).items()},
    )


def _changed(settings: Mapping[str, Any], changes: Mapping[str, tuple[Any, str]]) -> dict[str, Any]:
    changed = {**settings, **{name: value for name, (value, _) in changes.items()}}
    return {name: value for name, value in changed.items() if value is not None}


_PAPER = [_paper(task) for name, task in TASKS.items() if name.startswith("LaMP-")]
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in [*_PAPER, *map(_ours, _PAPER)]}


def get_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Args:
        name: as in "paper/lamp-4"; "paper/LaMP_4" is the same.

    Raises:
        ConfigurationError: there is no such recipe.
    """
    wanted = name.strip().lower().replace("_", "-")
    if wanted not in RECIPES:
        raise ConfigurationError(f"There is no recipe {name!r}; choose one of {', '.join(RECIPES)}.")
    return RECIPES[wanted]
