"""The model card of a plug: `model_card.md` beside this file, filled with what the plug's folder says.

Only numbers and plain names get from files into it: no paths, no tokens, nothing of a user's history. What a person
writes outside of the generated parts stays (card_text.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Formatter
from typing import Any

from jinja2 import Environment, StrictUndefined

from ..configuration import PPlugConfig
from ..configuration.choices import choices
from ..errors import ConfigurationError
from ..modeling.plug_folder import weight_shapes
from ..storage.files import atomic_write
from ..storage.layout import CARD, TRAIN_SETTINGS, WEIGHTS
from ..storage.location import hub_repository, is_hub_id
from .card_results import model_index, read_results
from .card_text import CardText

_ENVIRONMENT = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True)
_TEMPLATE = _ENVIRONMENT.from_string((files("pplug_hf.hub") / "model_card.md").read_text(encoding="utf-8"))
_TAGS = ["pplug", "personalization", "soft-prompt", "persona"]
_DERIVED = ("base_model", "base_model_relation", "model-index")  # metadata that follow from the plug
_PLAIN = re.compile(r"[A-Za-z0-9][\w.+-]{0,39}")
_SUBFOLDER = r"\w[\w./-]*"
# The repository that a card was written for.
_SNIPPET = re.compile(rf'from_pretrained\(\s*"([\w.-]+/[\w.-]+)",?\s*(?:subfolder="({_SUBFOLDER})")?')

logger = logging.getLogger(__name__)


def write_card(
    folder: str | os.PathLike,
    config: PPlugConfig,
    *,
    trainable: int | None = None,
    repo_id: str | None = None,
    subfolder: str = "",
    results: str | os.PathLike | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    language: Sequence[str] = (),
    tags: Sequence[str] = (),
    published: bytes = b"",
) -> dict[str, Any]:
    """Write the README.md of a plug folder, or bring the one that is there up to date.

    Only what stands between a pair of markers is replaced. A part that was removed with its markers is not put back,
    and a card without markers, written by hand, gets the metadata that it lacks. Metadata that are there stay, except
    those that follow from the plug: `base_model`, `base_model_relation` and `model-index`. Results stay as long as the
    weights are the same. A published card is brought up to date, unless the one in the folder has text of a person.

    Args:
        folder: with a plug; read are model.safetensors, train_settings.json, if they are there.
        config: of the plug.
        trainable: number of trained parameters (default: those in model.safetensors).
        repo_id, subfolder: where the plug will be on the Hub.
        results: folder of `pplug-hf bench`, or its results.json.
        license, datasets, language: of the plug, Hub ids of its data, of its data; they replace what the card says.
        tags: to add to those of the card.
        published: the README.md in the repository that the plug is pushed to.

    Returns:
        The card's metadata.

    Raises:
        DataError: the README.md or the results cannot be read; the card is as it was.
        ConfigurationError: a name that the Hub does not take.
    """
    for name in [*datasets, *([] if repo_id is None else [repo_id])]:
        if not is_hub_id(name):
            raise ConfigurationError(f"{name!r} is not a Hub id: write it as owner/name.")
    bench = read_results(Path(results)) if results is not None else None
    path = Path(folder, CARD)
    here, there = CardText(path.read_bytes() if path.is_file() else b""), CardText(published)
    card, other = (here, there) if here.own_text or not published else (there, here)
    if repo_id is None and (place := _SNIPPET.search(card.parts.get("use", ""))):
        repo_id, subfolder = place[1], place[2] or ""
    languages = language[0] if len(language) == 1 else list(language)
    stated = {"license": license, "datasets": list(datasets), "language": languages}
    metadata = _metadata(card, other, _frozen(config, "backbone")["id"], stated, list(tags))

    # What a card said of the same weights stays unless it is made anew.
    mark = f"<!-- weights {_digest(Path(folder, WEIGHTS))} -->"
    known = {name: _first_with(mark, name, card, other) for name in ("results", "training")}
    data = [name for name in _many(metadata.get("datasets")) if is_hub_id(name)]
    if bench is not None:
        name = (repo_id or "persona-plug").split("/")[-1]
        metadata["model-index"] = model_index(bench, name, data[0] if len(data) == 1 else None)
    elif not card.is_by_hand:
        metadata["model-index"] = known["results"] and known["results"].metadata.get("model-index")
    text = _TEMPLATE.render(
        **_facts(Path(folder), config, trainable),
        **{"repo": repo_id, "subfolder": subfolder if re.fullmatch(_SUBFOLDER, subfolder) else ""},
        **{"data": data, "results": bench, "mark": mark},
        known={name: source.parts[name].strip() for name, source in known.items() if source},
    )
    metadata = {key: value for key, value in metadata.items() if value is not None or key not in _DERIVED}
    with atomic_write(path) as staging:
        staging.write_bytes(card.updated(metadata, text))
    return metadata


def _metadata(
    card: CardText, other: CardText, base: str | None, stated: dict[str, Any], tags: list[str]
) -> dict[str, Any]:
    """Return a card's metadata: what is stated now, else what is there, else what is generated."""
    derived = {"base_model": base, "base_model_relation": base and "adapter"}
    metadata = {"library_name": "pplug-hf", **derived, "pipeline_tag": "text-generation", "tags": _TAGS}
    metadata |= {key: value for key, value in other.metadata.items() if key not in _DERIVED} | card.metadata
    ignored = [key for key in stated if not stated[key] and other.metadata.get(key) not in (None, metadata.get(key))]
    ignored += ["text"] * (other.own_text not in ("", card.own_text))
    if ignored:
        kept = "folder" if card.own_text else "repository"
        logger.warning("README.md differs in folder and repository (%s): the %s's is kept.", ", ".join(ignored), kept)
    metadata |= {} if card.is_by_hand else derived
    metadata |= {key: value for key, value in stated.items() if value}
    if tags:
        metadata["tags"] = list(dict.fromkeys([*_many(metadata["tags"]), *tags]))
    return metadata


def _facts(folder: Path, config: PPlugConfig, trainable: int | None) -> dict[str, Any]:
    """Return what the template shows of a plug's folder and configuration."""
    weights, names = folder / WEIGHTS, [name for _, name, _, _ in Formatter().parse(config.item_template or "")]
    return {
        **{"config": config, "backbone": _frozen(config, "backbone"), "encoder": _frozen(config, "encoder")},
        "fields": [name for name in dict.fromkeys(names) if name and name.isidentifier()],
        "trainable": sum(map(math.prod, weight_shapes(folder).values())) if trainable is None else trainable,
        "size": weights.stat().st_size if weights.is_file() else None,
        **_training(folder / TRAIN_SETTINGS, config),
    }


def _frozen(config: PPlugConfig, kind: str) -> dict[str, Any]:
    """Return what a card says of the backbone or encoder: its Hub id, or only that it is local. No path gets out."""
    name, revision = getattr(config, kind), getattr(config, f"{kind}_revision")
    fingerprint = getattr(config, f"{kind}_fingerprint") or {}
    return {
        "id": hub_repository(name) if revision else None,  # a relative folder can look like one, but has no commit
        "revision": _plain(revision),
        "type": _plain(fingerprint.get("model_type")) or "model",
        "vocabulary": size if isinstance(size := fingerprint.get("vocab_size"), int) else None,
        "digest": _plain(fingerprint.get("digest")),
    }


def _training(path: Path, config: PPlugConfig) -> dict[str, Any]:
    """Return the task, the data, and the settings that are not the defaults as (name, value, default); None if not recorded."""
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        values, defaults = recorded.get("settings"), recorded.get("defaults", {})
        if values is None:  # as recorded before 0.1 was released
            values = {name: value for name, value in recorded.items() if isinstance(value, bool | int | float)}
        changed = [name for name, value in values.items() if name.isidentifier() and value != defaults.get(name)]
        said = {name: "none" if values[name] is None else _shown(values[name]) for name in changed}
        settings = [(name, shown, _shown(defaults.get(name))) for name, shown in said.items() if shown]
        return {
            **{"task": _plain(recorded.get("task")), "trained_on": _data(recorded.get("data"))},
            "settings": [*settings, *_choices(config)],
        }
    except (OSError, ValueError, AttributeError):  # a card can do without
        return {"task": None, "settings": None, "trained_on": None}


def _choices(config: PPlugConfig) -> list[tuple[str, str, str]]:
    """Return the choices of a plug that are not the defaults and that the table of its parts does not show."""
    shown = (
        "num_persona_tokens",
        "projector_size",
        "instruction",
        "aggregator",
        "item_template",
        "train_input_encoder",
    )
    others = {name: f.default for name, f in choices().items() if name not in shown and "temperature" not in name}
    found = [(name, getattr(config, name), default) for name, default in others.items()]
    return [(name, _shown(value) or "a text", _shown(default)) for name, value, default in found if value != default]


def _data(recorded: Any) -> dict[str, Any] | None:
    """Return name, digest and sizes of the training data, if they are plain; None if they are not recorded."""
    if not isinstance(recorded, dict):
        return None
    numbers = {name: value if type(value := recorded.get(name)) is int else None for name in ("examples", "users")}
    return numbers | {name: _plain(recorded.get(name)) for name in ("name", "digest")}


def _shown(value: Any) -> str:
    """Return a setting as a card shows it; "" for whatever is not a number or a plain name."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, int | float) else _plain(value) or ""


def _first_with(mark: str, part: str, *cards: CardText) -> CardText | None:
    return next((card for card in cards if mark in card.parts.get(part, "")), None)


def _digest(path: Path) -> str:
    if not path.is_file():
        return "none"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def _plain(value: Any) -> str | None:
    """Return a short name as it is; None for whatever could be a path, a text or Markdown."""
    return value if isinstance(value, str) and _PLAIN.fullmatch(value) else None


def _many(values: Any) -> list[Any]:
    return values if isinstance(values, list) else [] if values is None else [values]
