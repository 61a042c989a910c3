"""`pplug-hf`: the command line. Every command's options and help are the fields of its settings."""

from __future__ import annotations

import importlib
import sys
from argparse import ArgumentParser
from dataclasses import fields, is_dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .errors import ConfigurationError, PPlugError
from .version import __version__

if TYPE_CHECKING:
    from transformers import HfArgumentParser

# command -> (module, settings, function, one line)
_COMMANDS = {
    "demo": ("demo", "DemoSettings", "demo", "train, compare, save and reload a tiny plug, offline, in minutes"),
    "train": ("train", "TrainSettings", "train", "train a plug on questions and histories"),
    "evaluate": ("evaluate", "EvaluateSettings", "evaluate", "compare a plug with its ablations and baselines"),
    "bench": ("bench", "BenchSettings", "bench", "compare any methods, with and without plugs; resumes after a kill"),
    "score": ("score", "ScoreSettings", "score_files", "score a predictions file by LaMP's official rules"),
    "generate": ("generate", "GenerateSettings", "generate", "answer a prompt for the user of a history"),
    "prepare": (
        "prepare",
        "PrepareSettings",
        "prepare",
        "make a data set and a task of a log of events (CSV, Parquet, ...)",
    ),
    "encode": ("encode", "EncodeSettings", "encode", "encode the histories of a data set into the vector store"),
    "report": ("report", "ReportSettings", "report", "describe the histories of a data set"),
    "recipes": ("recipes", "RecipesSettings", "recipes", "list named settings, or show one"),
    "card": ("card", "CardSettings", "card", "write a plug folder's model card"),
    "info": ("info", "InfoSettings", "info", "describe a plug folder"),
    "push": ("push", "PushSettings", "push", "upload a plug and its card to the Hub"),
}

# command -> the sections of a recipe that are its options
_RECIPE_PARTS = {"train": ("training", "plug"), "evaluate": ("answering",), "bench": ("answering",)}

# Options, of any command, that must be greater than zero.
_POSITIVE = (
    "batch_size",
    "epochs",
    "evaluations_per_epoch",
    "gradient_accumulation",
    "learning_rate",
    "max_length",
    "max_new_tokens",
    "max_target_length",
    "num_beams",
    "patience",
)
_NOT_NEGATIVE = ("warmup", "weight_decay")


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0, 1 for bad input (one line on stderr says what), 2 for bad usage, 130 when interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: pplug-hf COMMAND [options]; pplug-hf COMMAND --help\n")
        print("\n".join(f"  {name:10}{line}" for name, (_, _, _, line) in _COMMANDS.items()))
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(__version__)
        return 0
    if arguments[0] not in _COMMANDS:
        print(f"pplug-hf: no command {arguments[0]!r}; options are {', '.join(_COMMANDS)}", file=sys.stderr)
        return 2

    try:
        command, function, parser = load_command(arguments[0])
        chosen, *rest, unknown = parser.parse_args_into_dataclasses(
            [*_recipe(arguments[0], arguments[1:]), *arguments[1:]],
            return_remaining_strings=True,
            look_for_args_file=False,
        )
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        # A choice at its default is not passed on: the library may have a better one (an encoder's own prompts).
        given = {
            f.name: getattr(part, f.name)
            for part in rest
            if is_dataclass(part)
            for f in fields(part)
            if getattr(part, f.name) != f.default
        }
        _check_numbers(chosen)
        getattr(command, function)(chosen, **given)
    except (PPlugError, OSError) as error:
        print(f"pplug-hf {arguments[0]}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def load_command(name: str) -> tuple[ModuleType, str, HfArgumentParser]:
    """Return a command's module, the name of its function and the parser of its options."""
    from transformers import HfArgumentParser

    module, settings, function, _ = _COMMANDS[name]
    command = importlib.import_module(f"{__package__}.commands.{module}")
    kind = getattr(command, settings)
    plug = [command.plug_choices()] if module == "train" else []
    parser = HfArgumentParser([kind, *plug], prog=f"pplug-hf {name}", description=kind.__doc__)
    if name in _RECIPE_PARTS:
        parser.add_argument("--recipe", help=_RECIPE)
    return command, function, parser


_RECIPE = "Named settings, e.g. paper/lamp-4 (`pplug-hf recipes` lists them); options you pass override them."


def _recipe(command: str, arguments: list[str]) -> list[str]:
    """Return the settings of a `--recipe` as options; they go in front of the user's, because the last one counts."""
    if command not in _RECIPE_PARTS:
        return []
    parser = ArgumentParser(prog=f"pplug-hf {command}", add_help=False)
    parser.add_argument("--recipe")
    name = parser.parse_known_args(arguments)[0].recipe
    if name is None:
        return []
    from .tasks.recipes import get_recipe

    recipe = get_recipe(name)
    settings = [pair for part in _RECIPE_PARTS[command] for pair in getattr(recipe, part).items()]
    return [text for name, value in settings for text in (f"--{name}", str(value))]


def _check_numbers(settings: Any) -> None:
    for name in (*_POSITIVE, *_NOT_NEGATIVE):
        value = getattr(settings, name, None)
        if value is not None and (value < 0 or (value == 0 and name in _POSITIVE)):
            bound = "greater than 0" if name in _POSITIVE else "at least 0"
            raise ConfigurationError(f"{name} must be {bound}, got {value}.")
