"""`pplug-hf recipes`: the named settings that `train`, `fit`, `evaluate` and `bench` take with `--recipe`."""

from __future__ import annotations

from collections.abc import Mapping

from ..tasks.recipes import FIT_RECIPES, RECIPES, Recipe, get_recipe
from .options import RecipesSettings


def recipes(settings: RecipesSettings) -> None:
    """Print the list, or the recipe.

    Raises:
        ConfigurationError: there is no such recipe.
    """
    known = [*RECIPES.values(), *FIT_RECIPES.values()]
    print("\n".join(map(_line, known)) if settings.name is None else describe(get_recipe(settings.name)))


def describe(recipe: Recipe) -> str:
    """Return a recipe as text: its settings, why they differ from the paper's, and what it lacks."""
    lines = [f"{recipe.name}, for {recipe.task or 'any task'}"]
    trains = "fit" if "method" in recipe.training else "train"
    for title, settings in ((trains, {**recipe.training, **recipe.plug}), ("evaluate, bench", recipe.answering)):
        lines += ["", f"{title}:", *_settings(settings)] * bool(settings)
    if recipe.reasons:
        lines += ["", "Not as in the paper:" if recipe.task else "Reasons:"]
        lines += [f"  {name:24}{why}" for name, why in recipe.reasons.items()]
    if recipe.not_reproduced:
        lines += ["", "Of the paper's way it lacks:"]
        lines += [f"  - {what}" for what in recipe.not_reproduced]
    return "\n".join(lines)


def _settings(settings: Mapping[str, object]) -> list[str]:
    return [
        f"  --{name:22}{value!r}" if isinstance(value, str) else f"  --{name:22}{value}"
        for name, value in settings.items()
    ]


def _line(recipe: Recipe) -> str:
    models = [recipe.training[name] for name in ("backbone", "encoder") if name in recipe.training]
    return f"{recipe.name:16}{', '.join(models) if recipe.task else 'any task'}"
