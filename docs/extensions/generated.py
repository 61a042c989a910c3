"""What pages take from the package itself: the command line's options, from the parsers that the command line uses; the
recipes' settings; and the names that `import pplug_hf` gives."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import MISSING, fields
from typing import Any

from huggingface_hub.constants import HF_HOME
from sphinx.application import Sphinx

import pplug_hf
from pplug_hf import PPlugConfig, cli
from pplug_hf.commands.bench import BenchSettings
from pplug_hf.commands.train import TrainSettings
from pplug_hf.methods.fit_options import FIT
from pplug_hf.tasks.recipes import RECIPES


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", _insert)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _insert(app: Sphinx, name: str, source: list[str]) -> None:
    for mark, make in _MADE.items():
        if mark in source[0]:
            source[0] = source[0].replace(mark, make())


def _options() -> str:
    shown = {name: section(name) for name in cli._COMMANDS}
    shown["fit"] = "\n\n".join([shown["fit"], *map(method_section, FIT)])
    return "\n\n".join(shown.values())


def _functions() -> str:
    public = [(f, settings) for _, settings, f, _ in cli._COMMANDS.values() if f in pplug_hf.__all__]
    return "\n".join(f".. autofunction:: pplug_hf.{f}\n\n.. autoclass:: pplug_hf.{s}\n" for f, s in public)


def _settings_of_recipes() -> str:
    """Return every setting of the paper's recipes as a table, with those of its authors' code, ours and the default."""
    recipes = {name: {**r.training, **r.plug, **r.answering} for name, r in RECIPES.items() if r.task}
    reasons: dict[str, dict[str, list[str]]] = {}
    for recipe in map(RECIPES.__getitem__, recipes):
        for name, why in recipe.reasons.items():
            reasons.setdefault(name, {}).setdefault(why, []).append(recipe.task)
    defaults = {f.name: f.default for kind in (PPlugConfig, BenchSettings, TrainSettings) for f in fields(kind)}
    lines = ["| setting | paper | release | ours | default | why not as in the paper |", "|---|---|---|---|---|---|"]
    for name in dict.fromkeys(name for settings in recipes.values() for name in settings):
        if name != "task":
            paper, release, ours = (_values(name, recipes, f"{kind}/") for kind in ("paper", "release", "ours"))
            why = reasons.get(name, {}) if len({paper, release, ours}) > 1 else {}
            said = " ".join(f"{', '.join(tasks)}: {text}" if len(why) > 1 else text for text, tasks in why.items())
            lines.append(f"| `{name}` | {paper} | {release} | {ours} | {_shown(defaults.get(name))} | {_cell(said)} |")
    return "\n".join(lines)


def _values(name: str, recipes: dict[str, dict[str, Any]], kind: str) -> str:
    """A setting's value in most of the recipes of a kind, and in which tasks it is another one."""
    given = {r: "none" if s.get(name, "") is None else s.get(name) for r, s in recipes.items() if r.startswith(kind)}
    values = {RECIPES[r].task: _shown(value) for r, value in given.items()}
    usual = Counter(values.values()).most_common(1)[0][0]
    others = [f"{task}: {value or 'default'}" for task, value in values.items() if value != usual]
    return "; ".join([usual, *others] if usual else others)


def _shown(value: Any) -> str:
    return "" if value is None or value is MISSING else f"`{_cell(str(value))}`" if str(value) else "nothing"


def _names() -> str:
    callables = [name for name in pplug_hf.__all__ if callable(getattr(pplug_hf, name))]
    return "\n".join([".. autosummary::", "   :nosignatures:", "", *(f"   pplug_hf.{name}" for name in callables)])


_MADE = {
    "<!-- a section for each command -->": _options,
    "<!-- a table of the recipes -->": _settings_of_recipes,
    ".. an entry for each command": _functions,
    ".. a line for each name": _names,
}


def section(name: str) -> str:
    """A command: what it does, and its options as a table."""
    _, _, parser = cli.load_command(name)
    own: dict[str, argparse.Action] = {}
    for action in parser._actions:
        own.setdefault(action.dest, action)  # behind --NAME stands --no_NAME, which the page explains once
    del own["help"]
    needed = [action for action in own.values() if action.required]
    usage = " ".join(["pplug-hf", name, *(f"{action.option_strings[0]} {_value(action)}" for action in needed)])
    lines = [f"## {name}", "", str(parser.description), "", f"    {usage}", "", *_table(own.values())]
    _, _, function, _ = cli._COMMANDS[name]
    if function in pplug_hf.__all__:
        lines += ["", f"In Python: {{py:func}}`pplug_hf.{function}`."]
    return "\n".join(lines)


def method_section(method: str) -> str:
    """A method that `fit` trains: what it does, and its own options as a table."""
    kinds, _, parser = cli.load_command("fit", method)
    own = {f.name for f in fields(kinds[-1])}
    actions = [action for action in parser._actions if action.dest in own]
    return "\n".join([f"### {method}", "", str(parser.description), "", *_table(actions)])


def _table(actions: Iterable[argparse.Action]) -> list[str]:
    rows = [f"| `{a.option_strings[0]}` | {_cell(_help(a))} | {_default(a)} |" for a in actions]
    return ["| option | what it is | default |", "|---|---|---|", *rows]


def _value(action: argparse.Action) -> str:
    return action.dest.upper() + (" ..." if action.nargs in ("+", "*") else "")


def _help(action: argparse.Action) -> str:
    kinds = {"+": " One or more.", "*": " Any number."}
    chosen = f" One of {', '.join(map(str, action.choices))}." if action.choices else ""
    return f"{action.help}{chosen}{kinds.get(str(action.nargs), '')}"


def _default(action: argparse.Action) -> str:
    if action.required:
        return "needed"
    if action.default is None:
        return ""
    value = " ".join(map(str, action.default)) if isinstance(action.default, list) else str(action.default)
    return f"`{_cell(value.replace(HF_HOME, '$HF_HOME'))}`" if value else "nothing"


def _cell(text: str) -> str:
    return re.sub(r"(?<!\S)--\w+", r"`\g<0>`", text.replace("|", "\\|"))
