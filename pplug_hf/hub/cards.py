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
import uuid
from collections.abc import Sequence
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from string import Formatter
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from ..configuration import PPlugConfig
from ..errors import ConfigurationError
from ..modeling.plug_folder import weight_shapes
from ..storage.layout import CARD, TRAIN_SETTINGS, TRAINING_ARGS, WEIGHTS
from ..storage.location import is_hub_id
from .card_results import model_index, read_results
from .card_text import CardText

# Of the Trainer's arguments: what determines the weights. The others hold paths and names.
TRAINING_SETTINGS = (
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate"),
    *("encoder_learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2"),
    *("adam_epsilon", "max_grad_norm", "bf16", "fp16", "gradient_checkpointing", "neftune_noise_alpha"),
    *("load_best_model_at_end", "metric_for_best_model", "seed", "data_seed"),
)
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
        folder: with a plug; read are model.safetensors, train_settings.json and training_args.json, if they are there.
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
    folder, path = Path(folder), Path(folder, CARD)
    for name in [*datasets, *([] if repo_id is None else [repo_id])]:
        if not is_hub_id(name):
            raise ConfigurationError(f"{name!r} is not a Hub id: write it as owner/name.")
    bench = read_results(Path(results)) if results is not None else None
    here, there = CardText(path.read_bytes() if path.is_file() else b""), CardText(published)
    card, other = (here, there) if here.own_text or not published else (there, here)
    if repo_id is None and (known := _SNIPPET.search(card.parts.get("use", ""))):
        repo_id, subfolder = known[1], known[2] or ""

    # What was said of these weights before, and may not be known now.
    mark = f"<!-- weights {_digest(folder / WEIGHTS)} -->"
    said = {name: _first_with(mark, name, card, other) for name in ("results", "training")}
    backbone = _frozen(config, "backbone")
    stated = {"license": license, "datasets": datasets, "language": language[0] if len(language) == 1 else language}
    metadata = _metadata(card, other, backbone["id"], stated, tags)
    data = [name for name in _many(metadata.get("datasets")) if is_hub_id(name)]
    title = (
        repo_id.split("/")[-1] if repo_id else f"Persona plug for {backbone['id'] or 'a local ' + backbone['type']}"
    )
    if bench is not None:
        metadata["model-index"] = model_index(bench, title, data[0] if len(data) == 1 else None)
    elif not card.is_by_hand:
        metadata["model-index"] = said["results"] and said["results"].metadata.get("model-index")
    metadata = {key: value for key, value in metadata.items() if value is not None or key not in _DERIVED}

    text = _template().render(
        {"config": config, "backbone": backbone, "encoder": _frozen(config, "encoder"), "title": title, "data": data},
        fields=[
            name for _, name, _, _ in Formatter().parse(config.item_template or "") if name and name.isidentifier()
        ],
        repo=repo_id or "my-plug",
        subfolder=subfolder if re.fullmatch(_SUBFOLDER, subfolder) else "",
        trainable=sum(map(math.prod, weight_shapes(folder).values())) if trainable is None else trainable,
        size=(folder / WEIGHTS).stat().st_size if (folder / WEIGHTS).is_file() else None,
        task=_plain(_read_json(folder / TRAIN_SETTINGS).get("task")),
        settings=_settings(folder),
        results=bench,
        mark=mark,
        said={name: source.parts[name].strip().replace("\r\n", "\n") for name, source in said.items() if source},
    )
    _write(path, card.updated(metadata, text))
    return metadata


def _metadata(
    card: CardText, other: CardText, base: str | None, stated: dict[str, Any], tags: Sequence[str]
) -> dict[str, Any]:
    """Return a card's metadata: what is stated now, else what is there, else what is generated."""
    derived = {"base_model": base, "base_model_relation": base and "adapter"}
    made = {"library_name": "pplug-hf", **derived, "pipeline_tag": "text-generation", "tags": list(TAGS)}
    there = {key: value for key, value in other.metadata.items() if key not in _DERIVED} | card.metadata
    stated = {key: list(value) if isinstance(value, tuple) else value for key, value in stated.items() if value}
    for key in ("license", "datasets", "language"):
        if key in other.metadata and key not in stated and other.metadata[key] != there[key]:
            logger.warning("README.md differs in the folder and in the repository ...")
    if tags:
        stated["tags"] = list(dict.fromkeys([*_many(there.get("tags", made["tags"])), *tags]))
    return made | there | ({} if card.is_by_hand else derived) | stated


def _frozen(config: PPlugConfig, kind: str) -> dict[str, Any]:
    """Return what a card says of the backbone or encoder: its Hub id, or only that it is local. No path gets out."""
    name, revision = getattr(config, kind), getattr(config, f"{kind}_revision")
    fingerprint = getattr(config, f"{kind}_fingerprint") or {}
    size = fingerprint.get("vocab_size")
    return {
        "id": name if is_hub_id(name) and revision else None,  # a relative folder can look like one, but has no commit
        "revision": _plain(revision),
        "type": _plain(fingerprint.get("model_type")) or "model",
        "vocabulary": size if isinstance(size, int) else None,
        "digest": _plain(fingerprint.get("digest")),
    }


def _settings(folder: Path) -> list[tuple[str, str, str]] | None:
    """Return (name, value, default) of the settings that are not the defaults; None if nothing is recorded."""
    recorded = _read_json(folder / TRAIN_SETTINGS)
    values, defaults = recorded.get("settings"), recorded.get("defaults")
    if not isinstance(values, dict) or not isinstance(defaults, dict):  # trained with the Trainer, or before 0.1
        from ..training import PPlugTrainingArguments

        arguments = _read_json(folder / TRAINING_ARGS)
        values = {name: arguments[name] for name in TRAINING_SETTINGS if name in arguments}
        values |= {name: value for name, value in recorded.items() if isinstance(value, bool | int | float)}
        defaults = {field.name: field.default for field in fields(PPlugTrainingArguments)}
    named = [(name, value, defaults.get(name)) for name, value in values.items() if name.isidentifier()]
    found = [(name, _shown(value), _shown(default)) for name, value, default in named if value != default]
    return [setting for setting in found if setting[1]] if values else None


def _shown(value: Any) -> str:
    """Return a setting as a card shows it; "" for whatever is not a number or a plain name."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, int | float) else _plain(value) or ""


def _first_with(mark: str, name: str, *cards: CardText) -> CardText | None:
    return next((card for card in cards if mark in card.parts.get(name, "")), None)


def _template() -> Template:
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    return environment.from_string((files("pplug_hf.hub") / "model_card.md").read_text(encoding="utf-8"))


def _write(path: Path, content: bytes) -> None:
    staging = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        staging.write_bytes(content)
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)


def _read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; an empty one if there is none, because a card can do without."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _digest(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def _plain(value: Any) -> str | None:
    """Return a short name as it is; None for whatever could be a path, a text or Markdown."""
    return value if isinstance(value, str) and _PLAIN.fullmatch(value) else None


def _many(values: Any) -> list[Any]:
    return values if isinstance(values, list) else [] if values is None else [values]
