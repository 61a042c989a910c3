"""The model card of a plug: what its folder says, in the words of one template, `model_card.md` beside this file.

Every block of the template is a part of the card. Only numbers and plain names get from files into it: no places,
no tokens, nothing of a user's history. What a person edits in a card stays (card_edits.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import uuid
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Formatter
from typing import Any

from jinja2 import Environment, StrictUndefined

from ..configuration import PPlugConfig
from ..errors import ConfigurationError, DataError
from ..storage.layout import CARD, WEIGHTS
from ..storage.location import is_hub_id
from ..version import __version__
from .card_edits import Card
from .card_results import read_results

LIBRARY = "pplug-hf"

TRAINING_ARGS, TRAIN_SETTINGS = "training_args.json", "train_settings.json"

# What determines the weights, with the defaults; tests/test_cards.py compares them with the classes'. Nothing else of
# a file of settings is read: they hold places and names.
FILES_OF_SETTINGS: dict[str, dict[str, Any]] = {
    TRAINING_ARGS: {  # PPlugTrainingArguments
        "num_train_epochs": 3.0,
        "max_steps": -1,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "encoder_learning_rate": None,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "bf16": False,
        "fp16": False,
        "gradient_checkpointing": False,
        "neftune_noise_alpha": None,
        "load_best_model_at_end": False,
        "metric_for_best_model": None,
        "seed": 42,
        "data_seed": None,
    },
    TRAIN_SETTINGS: {  # TrainSettings of `pplug-hf train`, as far as it is not above
        "backbone_dtype": "auto",
        "train_on_histories": True,
        "synthetic_users": 0,
        "labelled_items": True,
        "use_history": True,
        "max_items": None,
        "history_dropout": 0.5,
        "history_repeats": 0,
        "leave_out_users": 0.0,
        "split_seed": 0,
        "validation_users": 0.1,
        "patience": 5,
        "max_length": 256,
        "max_target_length": 128,
    },
}
logger = logging.getLogger(__name__)

_TEMPLATE = files("pplug_hf.hub") / "model_card.md"
_PLAIN = re.compile(r"[A-Za-z0-9][\w.+ -]{0,59}")


def write_card(
    folder: str | os.PathLike,
    config: PPlugConfig,
    *,
    trainable: int,
    repo_id: str | None = None,
    subfolder: str = "",
    results: str | os.PathLike | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    language: Sequence[str] = (),
    tags: Sequence[str] = (),
    published: str | bytes | None = None,
) -> list[str]:
    """Write the README.md of a plug folder, or bring the one that lies there up to date.

    Of a card that is there, only generated parts and metadata that nobody touched are replaced; a card written by
    hand gets the metadata it lacks. Results stay as long as the weights are the same. If there is a card in the folder
    and another one is published, the one that a person edited counts; if both were edited, the folder's.

    Args:
        folder: with a plug; read are model.safetensors, training_args.json and train_settings.json, if they are there.
        config: of the plug.
        trainable: number of trained parameters.
        repo_id, subfolder: where the plug will be on the Hub.
        results: folder of `pplug-hf bench`, or its results.json.
        license, datasets, language: of the plug, Hub ids of its data, of its data; they replace what the card says.
        tags: to add to those of the card.
        published: the README.md in the repository that the plug is pushed to, if there is one.

    Returns:
        Names of the parts and keys that a person edited or removed, and which are left so.

    Raises:
        DataError: The README.md or the results cannot be read; the card is as it was.
        ConfigurationError: A name that the Hub does not take.
    """
    folder = Path(folder)
    path = folder / CARD
    subfolder = _plain_path(subfolder)
    for name in [*datasets, *([repo_id] if repo_id is not None else [])]:
        _check_id(name)
    bench = read_results(Path(results)) if results is not None else None
    settings = _settings(folder)
    weights = _digest(folder / WEIGHTS)
    card, other = _choose(_read_card(path.read_bytes() if path.is_file() else b""), _read_card(published or b""))
    if repo_id is None:
        repo_id, subfolder = _known_place(card)

    metadata = _metadata(config)
    stated: dict[str, Any] = {"license": license, "datasets": list(datasets), "language": _one_or_many(language)}
    for key, value in stated.items():
        if not value and card.untouched:  # else a person may have removed it
            stated[key] = card.metadata.get(key) or other.metadata.get(key)
    if tags:
        stated["tags"] = list(dict.fromkeys([*_many(card.metadata.get("tags", metadata["tags"])), *tags]))
    stated = {key: value for key, value in stated.items() if value}

    named = [name for name in _many(stated.get("datasets") or card.metadata.get("datasets")) if is_hub_id(name)]
    title = repo_id.split("/")[-1] if repo_id else f"Persona plug for {_backbone(config)['words']}"
    if bench is not None:
        metadata["model-index"] = bench.model_index(title, named[0] if len(named) == 1 else None)
    parts = _render(
        config,
        title=title,
        repo=repo_id or "my-plug",
        subfolder=subfolder,
        trainable=trainable,
        size=_size(folder / WEIGHTS),
        datasets=named,
        settings=settings,
        task=_task(folder),
        results=bench,
    )
    # What was said of these weights before, and is not known now.
    keep: set[str] = set()
    for names in [("results", "model-index")] * (bench is None) + [("training",)] * (settings is None):
        told = (c for c in (card, other) if c.record.get("weights") == weights and c.generated.issuperset(names))
        source = next(told, None)
        if source is card:
            keep.update(names)
        elif source is not None:
            parts |= {name: source.parts[name] for name in names if name in source.parts}
            metadata |= {name: source.metadata[name] for name in names if name in source.metadata}
    record = {"weights": weights, **({"repo": repo_id, "subfolder": subfolder} if repo_id else {})}
    text, edited = card.update(metadata, parts, stated=stated, keep=keep, **record)
    _write(path, text)
    return edited


def _choose(here: Card, there: Card) -> tuple[Card, Card]:
    """(the card to bring up to date, the other one) of a folder's and a published one."""
    if there.is_empty or (there.untouched and not here.is_empty):
        return here, there
    if here.is_empty or here.untouched:
        return there, here
    logger.warning("README.md was edited in the folder and in the repository: the folder's is taken.")
    return here, there


def _metadata(config: PPlugConfig) -> dict[str, Any]:
    base = _backbone(config)["id"]
    return {
        "library_name": LIBRARY,
        **({"base_model": base, "base_model_relation": "adapter"} if base else {}),
        "pipeline_tag": "text-generation",
        "tags": ["pplug", "personalization", "soft-prompt", "persona"],
    }


def _render(config: PPlugConfig, **values: Any) -> dict[str, str]:
    """The template's blocks by name, filled."""
    template = _environment().from_string(_TEMPLATE.read_text(encoding="utf-8"))
    attention = config.aggregator == "attention"
    D, M, H, K = config.sizes
    temperature = f"temperature {'learned from ' if config.learn_temperature else ''}{config.attention_temperature:g}"
    values |= {
        "config": config,
        "version": __version__,
        "backbone": _backbone(config),
        "encoder": _encoder(config),
        "fields": _fields(config.item_template),
        "projector": f"{D:,} → {M:,} → {K} x {H:,}",
        "input_encoder": attention and config.train_input_encoder,
        "aggregator": config.aggregator + (f", {temperature}" if attention else ""),
    }
    context = template.new_context(values)
    return {name: "".join(block(context)) for name, block in template.blocks.items()}


def _environment() -> Environment:
    return Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)


# ---- what is known of a plug ------------------------------------------------------------------------------------------


def _backbone(config: PPlugConfig) -> dict[str, str | None]:
    print_ = config.backbone_fingerprint or {}
    known = _words(print_, {"vocab_size": "vocabulary"})
    return _place(config.backbone, config.backbone_revision, print_, config.hidden_size, known)


def _encoder(config: PPlugConfig) -> dict[str, str | None]:
    print_ = config.encoder_fingerprint or {}
    known = _words(print_, {"digest": "fingerprint"})
    return _place(config.encoder, config.encoder_revision, print_, config.encoder_size, known)


def _place(
    name: str | None, revision: str | None, print_: dict, width: int | None, known: list[str]
) -> dict[str, Any]:
    """Where a frozen part is, in words: its Hub id, or that it is local. A place on a machine is told to nobody."""
    type_ = _plain(print_.get("model_type")) or "model"
    what = ", ".join([type_, *([f"width {width:,}"] if width else []), *known])
    id_ = name if is_on_hub(name, revision) else None
    if id_ is None:
        words = f"a local {type_}" + (f" of width {width:,}" if width else "")
        return {"id": None, "words": words, "cell": ", ".join([words, *known])}
    link = f"[{id_}](https://huggingface.co/{id_})"
    commit = f" at `{revision}`" if _plain(revision) else ""
    return {"id": id_, "words": link, "cell": f"{link}{commit}: {what}"}


def is_on_hub(name: str | None, revision: str | None) -> bool:
    """Whether a recorded name is a Hub id. A relative folder can look like one, but has no commit."""
    return is_hub_id(name) and bool(revision)


def _words(fingerprint: dict[str, Any], names: dict[str, str]) -> list[str]:
    found = []
    for key, word in names.items():
        value = fingerprint.get(key)
        if isinstance(value, int):
            found.append(f"{word} {value:,}")
        elif _plain(value):
            found.append(f"{word} `{value}`")
    return found


def _fields(template: str | None) -> list[str]:
    """The fields of an item, never the words around them."""
    try:
        names = [name for _, name, _, _ in Formatter().parse(template or "") if name]
    except ValueError:
        return []
    return [name for name in dict.fromkeys(names) if name.isidentifier()]


def _settings(folder: Path) -> list[tuple[str, str, str]] | None:
    """(name, value, default) of what determines the weights and is not the default; None if nothing is recorded."""
    found, there = [], False
    for file, defaults in FILES_OF_SETTINGS.items():
        recorded = _read_json(folder / file)
        there |= bool(recorded)
        for name, default in defaults.items():
            value = recorded.get(name, default)
            if value != default and (isinstance(value, bool | int | float) or _plain(value)):
                found.append((name, _shown(value), _shown(default)))
    return found if there else None


def _task(folder: Path) -> str | None:
    return _plain(_read_json(folder / TRAIN_SETTINGS).get("task"))


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _size(path: Path) -> str | None:
    if not path.is_file():
        return None
    size = path.stat().st_size
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"


# ---- reading and writing ----------------------------------------------------------------------------------------------


def _read_card(content: str | bytes) -> Card:
    try:
        return Card(content.decode("utf-8-sig") if isinstance(content, bytes) else content)
    except UnicodeDecodeError:
        raise DataError("README.md is not UTF-8: save it as UTF-8, or remove it and it is made again.") from None


def _write(path: Path, text: str) -> None:
    staging = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        with staging.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one if there is none, because a card can do without."""
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


def _known_place(card: Card) -> tuple[str | None, str]:
    """(repository, subfolder) that a card was written for."""
    repo, subfolder = card.record.get("repo"), card.record.get("subfolder", "")
    return (repo, _plain_path(subfolder)) if is_hub_id(repo) else (None, "")


def _plain_path(subfolder: Any) -> str:
    return subfolder if isinstance(subfolder, str) and re.fullmatch(r"\w[\w./-]*", subfolder) else ""


def _plain(value: Any) -> str | None:
    """A short name as it is; None for whatever could be a place, a text or Markdown."""
    return value if isinstance(value, str) and _PLAIN.fullmatch(value) else None


def _many(values: Any) -> list[Any]:
    return values if isinstance(values, list) else [] if values is None else [values]


def _one_or_many(values: Sequence[str]) -> Any:
    return values[0] if len(values) == 1 else list(values)


def _check_id(name: str) -> None:
    if not is_hub_id(name):
        raise ConfigurationError(f"{name!r} is no Hub id: write it as owner/name.")
