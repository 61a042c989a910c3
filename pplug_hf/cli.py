"""`pplug-hf`: the command line. Every command's options and help are the fields of its settings."""

from __future__ import annotations

import importlib
import os
import re
import sys
from argparse import ArgumentParser
from collections.abc import Mapping
from dataclasses import fields, make_dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigurationError, PPlugError
from .version import __version__

if TYPE_CHECKING:
    from .commands.parser import Parser

# command -> (module, settings, function, one line)
_COMMANDS = {
    "demo": ("demo", "DemoSettings", "demo", "train, compare, save and reload a tiny plug, offline, in a minute"),
    "train": ("train", "TrainSettings", "train", "train a plug on questions and histories"),
    "evaluate": ("evaluate", "EvaluateSettings", "evaluate", "compare a plug with its ablations and baselines"),
    "bench": ("bench", "BenchSettings", "bench", "compare any methods, with and without plugs; resumes after a kill"),
    "pairs": ("pairs", "PairsSettings", "pairs", "write pairs of answers for human judges; needs no gold answers"),
    "fit": ("fit", "FitSettings", "fit", "train a baseline to compare with, such as a retriever"),
    "score": ("score", "ScoreSettings", "score_files", "score a predictions file by LaMP's official rules"),
    "generate": ("generate", "GenerateSettings", "generate", "answer a prompt for the user of a history"),
    "serve": ("serve", "ServeSettings", "serve", "answer over HTTP, each request for its own user"),
    "app": ("app", "AppSettings", "app", "try a plug on a page in the browser"),
    "prepare": (
        "prepare",
        "PrepareSettings",
        "prepare",
        "make a data set and a task of a log of events (CSV, Parquet, ...)",
    ),
    "encode": (
        "encode",
        "EncodeSettings",
        "encode",
        "encode the histories of a data set, or a log of items into a store",
    ),
    "store": ("store", "StoreSettings", "store", "look after a store of personas: size, access, deletion"),
    "report": ("report", "ReportSettings", "report", "describe the histories of a data set"),
    "recipes": ("recipes", "RecipesSettings", "recipes", "list named settings, or show one"),
    "card": ("card", "CardSettings", "card", "write a plug folder's model card"),
    "export-vllm": (
        "export_vllm",
        "ExportVllmSettings",
        "export_vllm",
        "write what vllm serve needs for a plug: chat template, command line",
    ),
    "info": ("info", "InfoSettings", "info", "describe a plug folder"),
    "push": ("push", "PushSettings", "push", "upload a plug and its card to the Hub"),
}

# command -> the sections of a recipe that are its options
_RECIPE_PARTS = {
    "train": ("training", "plug"),
    "fit": ("training",),
    "evaluate": ("answering",),
    "bench": ("answering",),
}

# Options, of any command, that must be greater than zero.
_POSITIVE = (
    "batch_size",
    "candidates",
    "epochs",
    "evaluations_per_epoch",
    "gradient_accumulation",
    "head_learning_rate",
    "learning_rate",
    "logging_steps",
    "max_batch",
    "max_body",
    "max_items",
    "max_length",
    "max_new_tokens",
    "max_prompt_tokens",
    "max_queue",
    "max_questions",
    "max_steps",
    "max_target_length",
    "num_beams",
    "patience",
    "questions_per_step",
    "questions_per_user",
    "target_temperature",
    "temperature",
    "text_length",
    "time_limit",
    "top_p",
    "workers",
)
_NOT_NEGATIVE = (
    *("encoder_learning_rate", "history_repeats", "min_history", "persona_strength", "port", "seed", "stop_below"),
    *("synthetic_users", "warmup", "weight_decay"),
)
_MOST = {"port": 2**16 - 1, "seed": 2**32 - 1}  # more are no ports, and no seeds of numpy
_SHARES = (
    *("dev", "dropout", "held_users", "history_dropout", "leave_out_users", "new_users", "select_users", "test"),
    "validation_users",
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0, 1 for bad input (one line on stderr says what), 2 for bad usage, 130 when interrupted.
    """
    try:
        status = _run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader has seen enough: pplug-hf recipes | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: pplug-hf COMMAND [options]; pplug-hf COMMAND --help\n")
        print("\n".join(f"  {name:13}{line}" for name, (_, _, _, line) in _COMMANDS.items()))
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(__version__)
        return 0
    if arguments[0] not in _COMMANDS:
        print(f"pplug-hf: no command {arguments[0]!r}; options are {', '.join(_COMMANDS)}", file=sys.stderr)
        return 2
    values: dict[str, Any] = {}

    try:
        recipe = _recipe(arguments[0], arguments[1:])
        given = [*_as_arguments(recipe), *arguments[1:]]
        kinds, function, parser = load_command(arguments[0], _method(given) if arguments[0] == "fit" else None)
        values = parser.parse(given)
        if values.get("train_input_encoder") is False or values.get("aggregator") == "mean":
            # The user's options freeze an encoder that the recipe has a rate for. A rate of the user's is refused.
            recipe.pop("encoder_learning_rate", None)
            values = parser.parse([*_as_arguments(recipe), *arguments[1:]])
        chosen = kinds[0](**{f.name: values[f.name] for f in fields(kinds[0])})
        # A choice at its default is not passed on: the library may have a better one (an encoder's own prompts).
        own = [f for kind in kinds[1:] for f in fields(kind)]
        further = {f.name: values[f.name] for f in own if values[f.name] != f.default}
        _check_numbers(values)
        _check_places(values)
        command = importlib.import_module(f"{__package__}.commands.{_COMMANDS[arguments[0]][0]}")
        getattr(command, function)(chosen, **further)
    except BrokenPipeError:
        raise
    except (PPlugError, OSError) as error:
        print(f"pplug-hf {arguments[0]}: {as_options(str(error), values)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if os.environ.get("PPLUG_TRACEBACK"):
            raise
        first = (str(error).strip().splitlines() or [""])[0][:200]
        print(
            f"pplug-hf {arguments[0]}: stopped by an unforeseen {type(error).__name__}: {first} (PPLUG_TRACEBACK=1 in the "
            "environment shows where)",
            file=sys.stderr,
        )
        return 1
    return 0


def load_command(name: str, method: str | None = None) -> tuple[list[type], str, Parser]:
    """Return the settings of a command, the name of its function, and the parser of its options; no model library.

    Args:
        name: of the command.
        method: what `fit` trains; without one it has the options that all methods share.
    """
    from .commands import options
    from .commands.parser import Parser

    _, settings, function, _ = _COMMANDS[name]
    kinds: list[type] = [getattr(options, settings), *([plug_choices()] if name == "train" else [])]
    if method is not None:
        from .methods.fit_options import options_of

        kinds.append(options_of(method))
    parser = Parser(f"pplug-hf {name}", *kinds)
    if method is not None:
        parser.help_command = f"pplug-hf {name} --method {method} --help"
        parser.description = kinds[-1].__doc__
    if name in _RECIPE_PARTS:
        parser.add_argument("--recipe", help=_RECIPE, metavar="TEXT")
    if name == "train":
        parser.add_argument("--preset", help=_PRESET, choices=_PRESETS)
    return kinds, function, parser


def _method(arguments: list[str]) -> str | None:
    """Return what --method names, the last one of several."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--method", nargs="?")
    return parser.parse_known_args(arguments)[0].method


def plug_choices() -> type:
    """Return the configuration's own choices as a dataclass, for the command line."""
    from .commands import options
    from .configuration.choices import choices

    # Not given means the encoder's own prompts; "" switches them off.
    default = {"query_prompt": None, "history_prompt": None}
    declared = [
        (f.name, f.type, options.option(default.get(f.name, f.default), f.metadata["help"]))
        for f in choices().values()
    ]
    first = next(iter(choices()))
    return make_dataclass("PlugChoices", declared, namespace={"GROUPS": {first: "plug"}})


def as_options(message: str, values: Mapping[str, object]) -> str:
    """Return an error of the library with the options of a command in the place of Python's keywords.

    Args:
        message: e.g. "Pass query=<text>, or task='LaMP-2'."
        values: of the command's options; to load in Python what an option names already is not a remedy here.

    Returns:
        e.g. "Pass --query, or --task LaMP-2." A keyword that is not an option loses its equals sign.
    """

    def typed(found: re.Match[str]) -> str:
        name, value = found[1], (found[2] or "").strip("'")
        if value and name not in values:
            return found[0]
        return f"{f'--{name}' if name in values else _ELSEWHERE.get(name, name)} {value}".rstrip()

    message = re.sub(rf"(?<![\w'\"/.-])(?=\w+_)({'|'.join(values) or '-'})\b(?![='\"/.]\w)", r"--\1", message)
    given = "|".join(name for name, value in values.items() if value is not None)
    # A call in Python is advice for Python: its arguments are left alone.
    message = re.sub(
        r" To put a plug on it, use \S+\.from_backbone\(.*?\)\.", " `pplug-hf train` puts a plug on it.", message
    )
    message = re.sub(rf", or pass (?:{given})=<a loaded [^>]*>", "", message)
    return re.sub(
        r"(?<![\w'\"=/.-])(?:--)?([a-z][a-z_]+)=(?!=)('[^']*'|\d[\w.]*\b|True\b|False\b)?(?:<[^>]*>|(?![\w<]))",
        typed,
        message,
    )


# Keywords of the library that are not options, by what they are on the command line.
_ELSEWHERE = {"token": "HF_TOKEN", "cache_dir": "HF_HOME"}
_RECIPE = "Named settings, e.g. paper/lamp-4 (`pplug-hf recipes` lists them); options you pass override them."
_PRESETS = ("small", "large")
_PRESET = (
    "Recipe by the size of the data: small for up to a few thousand examples, large for tens of thousands and more "
    "(`pplug-hf recipes` shows their reasons); options you pass override it."
)


def _as_arguments(settings: Mapping[str, object]) -> list[str]:
    """Return settings as options; they go in front of the user's, because the last one counts."""
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def _recipe(command: str, arguments: list[str]) -> dict[str, object]:
    """Return the settings of the recipe or preset that is named."""
    if command not in _RECIPE_PARTS:
        return {}
    parser = ArgumentParser(prog=f"pplug-hf {command}", add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", nargs="?")
    parser.add_argument("--preset", nargs="?")
    named = parser.parse_known_args(arguments)[0]
    if named.recipe and named.preset:
        raise ConfigurationError(
            f"--recipe {named.recipe} and --preset {named.preset} contradict each other: pass one."
        )
    if not (named.recipe or named.preset in _PRESETS):  # another preset is a mistake that the parser names
        return {}
    from .tasks.recipes import get_recipe

    recipe = get_recipe(named.recipe or f"preset/{named.preset}")
    method, trained = _method(arguments), recipe.training.get("method")
    if command == "fit" and trained and method and method != trained:
        raise ConfigurationError(f"The recipe {recipe.name!r} is one of --method {trained}, not of {method}.")
    if ("method" in recipe.training) != (command == "fit"):
        raise ConfigurationError(
            f"The recipe {recipe.name!r} is not one of {command}: `pplug-hf recipes` lists all, those of fit last."
        )
    return {name: value for part in _RECIPE_PARTS[command] for name, value in getattr(recipe, part).items()}


def _check_numbers(values: Mapping[str, Any]) -> None:
    """Raise for numbers that cannot be meant: out of range, or, of whatever option, infinite or nan."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        is_positive, is_finite = name in _POSITIVE, -inf < value < inf
        least = 0 if is_positive or name in (*_NOT_NEGATIVE, *_SHARES) else -inf
        most = 1 if name in _SHARES else _MOST.get(name, inf)
        if is_finite and least <= value <= most and not (is_positive and value == 0):
            continue
        wanted = ["greater than 0" if is_positive else "at least 0" if least == 0 else "finite"]
        wanted += [f"at most {most}"] if most < inf else []
        raise ConfigurationError(
            f"--{name} must be {'' if is_finite or least < 0 else 'finite and '}{' and '.join(wanted)}, got {value}."
        )


def _check_places(values: Mapping[str, Any]) -> None:
    """Raise for folders and tasks that are not there, before libraries are imported that take seconds."""
    from .storage.location import Location, is_hub_id, split_gguf

    for name, kind in (("plug", "plug"), ("backbone", "backbone"), ("encoder", "encoder"), ("persona", "persona")):
        given = values.get(name) or []
        for place in [given] if isinstance(given, str) else given:
            if not Path(place).exists() and not is_hub_id(split_gguf(place)[0]):
                Location(place, kind=kind).pinned()  # raises
    if values.get("task") is not None:
        from .tasks.task_files import find_task

        find_task(values["task"])  # raises
    data = values.get("data")
    if data is not None and not Path(data).exists():
        from .data import sources

        split = values.get("split") or "train"
        sources.find(Path(data), f"{split}_questions.json", f"{split}.jsonl")  # raises
