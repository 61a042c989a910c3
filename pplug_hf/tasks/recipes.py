"""Recipes: named settings for a task, next to the task.

    paper/lamp-4     of the paper's text and, where that is silent, of its authors' code
    release/lamp-4   of the authors' code where text and code differ
    ours/lamp-4      ours
    preset/small     for any task with up to a few thousand examples (`--preset small`); preset/large for tens of thousands

    pplug-hf train --recipe paper/lamp-4 --data LaMP_4 --output my-plug     options you pass override it
    pplug-hf recipes --name ours/lamp-4                                     what is in it, and why

    recipe = get_recipe("paper/lamp-4")
    train(TrainSettings(**recipe.training, data="LaMP_4", output="my-plug"), **recipe.plug)
    bench(BenchSettings(**recipe.answering, data="LaMP_4", output="bench", plugs=["pplug=my-plug"]))

Ours were chosen on
a few dev splits with small backbones; only those of LaMP-2 have shown a gain (`benchmarks/results`), and nobody has
compared them on large ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings by name."""

    name: str = field(metadata={"help": "Name of the recipe, as in 'paper/lamp-4'."})
    task: str | None = field(default=None, metadata={"help": "Name of its task (default: for any)."})
    training: Mapping[str, Any] = field(metadata={"help": "Settings of `pplug-hf train`, or of `pplug-hf fit`."})
    plug: Mapping[str, Any] = field(metadata={"help": "Choices of the plug's configuration, for training too."})
    answering: Mapping[str, Any] = field(
        default_factory=dict, metadata={"help": "Settings of `pplug-hf evaluate` and `pplug-hf bench`."}
    )
    reasons: Mapping[str, str] = field(
        default_factory=dict, metadata={"help": "Why a setting is as it is, e.g. not the paper's, by its name."}
    )
    not_reproduced: tuple[str, ...] = field(default=(), metadata={"help": "What of the paper's way is not in it."})


RECIPES: dict[str, Recipe] = {}
FIT_RECIPES: dict[str, Recipe] = {}  # of `pplug-hf fit`; their training settings name the method


def spelled(name: str) -> str:
    """Return a name as it is looked up: "LaMP_4" is "lamp-4"."""
    return name.strip().lower().replace("_", "-")


def register_recipe(recipe: Recipe, exist_ok: bool = False) -> None:
    """Make a recipe known by its name.

    Raises:
        ConfigurationError: the name is taken, and `exist_ok` is not given.
    """
    if spelled(recipe.name) in RECIPES and not exist_ok:
        raise ConfigurationError(f"There is a recipe {recipe.name!r} already: pass exist_ok=True to replace it.")
    RECIPES[spelled(recipe.name)] = recipe


def get_recipe(name: str) -> Recipe:
    """Return the recipe of that name.

    Args:
        name: as in "paper/lamp-4"; "paper/LaMP_4" is the same.

    Returns:
        The recipe.

    Raises:
        ConfigurationError: there is no such recipe.
    """
    known = {**RECIPES, **FIT_RECIPES}
    if spelled(name) not in known:
        raise ConfigurationError(f"There is no recipe {name!r}; choose one of {', '.join(known)}.")
    return known[spelled(name)]
