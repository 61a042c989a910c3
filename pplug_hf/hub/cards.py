"""The model card of a plug: `model_card.md` beside this file, filled with what the plug's folder says.

Only numbers and plain names get from files into it: no paths, no tokens, nothing of a user's history. What a person
writes outside of the generated parts stays (card_text.py).
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from ..configuration import PPlugConfig
from ..configuration.choices import choices
from ..errors import ConfigurationError
from ..evaluation.results import read_results
from ..modeling.plug_folder import weight_shapes
from ..storage.files import atomic_write, read_json_object
from ..storage.layout import CARD, TRAIN_SETTINGS, WEIGHTS
from ..storage.location import hub_repository, is_hub_id
from ..tasks.items import fields_of
from ..tasks.metrics import score_titles
from .card_text import CardText

_ENVIRONMENT = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True)
_TEMPLATE = _ENVIRONMENT.from_string((files("pplug_hf.hub") / "model_card.md").read_text(encoding="utf-8"))
_TAGS = ["pplug", "personalization", "soft-prompt", "persona"]
_OPTIONS = ("results", "license", "datasets", "language", "tags")  # of a user
# Of transformers' create_model_card.
_OF_TRAINERS = ("model_name", "finetuned_from", "tasks", "dataset", "dataset_args")
_DERIVED = ("base_model", "base_model_relation", "model-index")  # metadata that follow from the plug
_PLAIN = re.compile(r"([A-Za-z0-9-][\w.+-]{0,39})?")  # of a list or a mapping it is none
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
    datasets: str | Sequence[str] = (),
    language: str | Sequence[str] = (),
    tags: str | Sequence[str] = (),
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
        tags: to add to those of the card. Each of them may be one text or several.
        published: the README.md in the repository that the plug is pushed to.

    Returns:
        The card's metadata.

    Raises:
        DataError: the README.md or the results cannot be read; the card is as it was.
        ConfigurationError: a name that the Hub does not take.
    """
    datasets, languages, tags = _many(datasets), _many(language), _many(tags)
    _check_ids([*datasets, *([] if repo_id is None else [repo_id])])
    bench = None if results is None else read_results(results)
    path = Path(folder, CARD)
    here, there = CardText(path.read_bytes() if path.is_file() else b""), CardText(published)
    card, other = (here, there) if here.own_text or not published else (there, here)
    if repo_id is None and (place := _SNIPPET.search(card.parts.get("use", ""))):
        repo_id, subfolder = place[1], place[2] or ""
    stated = {"license": license, "datasets": datasets, "language": languages[0] if len(languages) == 1 else languages}
    backbone, encoder = _frozen(config, "backbone"), _frozen(config, "encoder")
    metadata = _metadata(card, other, backbone["id"], stated, tags)

    # What a card said of the same weights stays unless it is made anew.
    size, digest = None, "none"
    if (weights := Path(folder, WEIGHTS)).is_file():
        with weights.open("rb") as file:
            size, digest = weights.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()[:12]
    mark = f"<!-- weights {digest} -->"
    known = {
        part: next((text for text in (card, other) if mark in text.parts.get(part, "")), CardText(b""))
        for part in ("results", "training")
    }
    data = [name for name in _many(metadata.get("datasets")) if is_hub_id(name)]
    if bench is not None:
        metadata["model-index"] = model_index(bench, repo_id or "persona-plug", data[0] if len(data) == 1 else None)
    elif index := known["results"].metadata.get("model-index"):
        metadata.setdefault("model-index", index)
    template = config.item_template or ""
    text = _TEMPLATE.render(
        repo=repo_id,
        subfolder=subfolder if re.fullmatch(_SUBFOLDER, subfolder) else "",
        data=data,
        config=config,
        backbone=backbone,
        encoder=encoder,
        size=size,
        results=bench,
        mark=mark,
        known=known,
        fields=sorted(filter(str.isidentifier, fields_of(template)), key=lambda name: template.index(f"{{{name}}}")),
        trainable=sum(map(math.prod, weight_shapes(folder).values())) if trainable is None else trainable,
        **_training(Path(folder, TRAIN_SETTINGS), config),
    )
    with atomic_write(path) as staging:
        staging.write_bytes(card.updated(metadata, text))
    return metadata


def card_options(given: dict[str, Any]) -> dict[str, Any]:
    """Return what a user says about a plug as `write_card` takes it.

    Args:
        given: results, license, datasets, language, tags; or what `Trainer.create_model_card` of transformers takes, of which
            dataset_tags are the Hub ids of the data, and the rest is left out, because the plug itself says it.

    Raises:
        ConfigurationError: something else, or a data set that is not a Hub id.
    """
    options = {name: value for name, value in given.items() if name not in _OF_TRAINERS and value is not None}
    if ids := [*_many(options.pop("datasets", None)), *_many(options.pop("dataset_tags", None))]:
        options["datasets"] = ids
    if unknown := sorted(options.keys() - set(_OPTIONS)):
        raise ConfigurationError(f"A card has no option {', '.join(unknown)}; options are {', '.join(_OPTIONS)}.")
    _check_ids(ids)
    return options


def _check_ids(names: Sequence[str]) -> None:
    for name in names:
        if not is_hub_id(name):
            raise ConfigurationError(f"{name!r} is not a Hub id: write it as owner/name.")


def model_index(results: dict[str, Any], name: str, dataset: str | None) -> list[dict[str, Any]]:
    """Return the `model-index` of the metadata.

    Args:
        results: of `read_results`.
        name: of the model, or its repository.
        dataset: Hub id of the data; None if it is not on the Hub.
    """
    own, task = results["rows"][0], results["task"]
    metrics = [
        {"type": score_titles()[metric][1] or metric, "value": round(own[metric], 4), "name": title}
        for metric, title in results["metrics"].items()
    ]
    about = {"type": "text-generation", "name": "Personalized text generation"}
    data = {"name": task, "type": dataset or task.lower(), "split": results["split"]}
    return [{"name": name.split("/")[-1], "results": [{"task": about, "dataset": data, "metrics": metrics}]}]


def _metadata(
    card: CardText, other: CardText, base: str | None, stated: dict[str, Any], tags: Sequence[str]
) -> dict[str, Any]:
    """Return a card's metadata: what is stated now, else what is there, else what is generated."""
    derived = {"base_model": base, "base_model_relation": "adapter"} if base else {}
    metadata = {"library_name": "pplug-hf", **derived, "pipeline_tag": "text-generation", "tags": _TAGS}
    metadata |= {key: value for key, value in other.metadata.items() if key not in _DERIVED}
    metadata |= {key: value for key, value in card.metadata.items() if key not in _DERIVED or card.is_by_hand}
    ignored = [key for key in stated if not stated[key] and other.metadata.get(key) not in (None, metadata.get(key))]
    ignored += ["text"] * (other.own_text not in ("", card.own_text))
    if ignored:
        kept = "folder" if card.own_text else "repository"
        logger.warning("README.md differs in folder and repository (%s): the %s's is kept.", ", ".join(ignored), kept)
    metadata |= {key: value for key, value in stated.items() if value}
    return {**metadata, "tags": list(dict.fromkeys([*_many(metadata["tags"]), *tags]))} if tags else metadata


def _frozen(config: PPlugConfig, kind: str) -> dict[str, Any]:
    """Return what a card says of the backbone or encoder: its Hub id, or only that it is local. No path gets out."""
    name, revision = getattr(config, kind), getattr(config, f"{kind}_revision")
    said = _plain({**(getattr(config, f"{kind}_fingerprint") or {}), "revision": revision})
    # A relative folder can look like a Hub id, but has no commit.
    return {"model_type": "model", **said, "id": hub_repository(name, kind) if revision else None}


def _training(path: Path, config: PPlugConfig) -> dict[str, Any]:
    """Return the task, the data, and the settings that are not the defaults as (name, value, default); None if not recorded."""
    try:
        recorded = read_json_object(path, path.name)
        values, defaults = _plain(recorded["settings"]), _plain(recorded["defaults"])
        about = {"task": _plain(recorded).get("task"), "trained_on": _plain(recorded.get("data") or {})}
    except (OSError, ValueError, LookupError, AttributeError):  # a card can do without
        return {"task": None, "trained_on": {}, "settings": None}
    own = {name: field.default for name, field in choices().items()}
    values |= dict.fromkeys(own, "a text") | _plain({name: getattr(config, name) for name in own})
    defaults |= own
    changed = [(name, value, defaults.get(name)) for name, value in values.items() if value != defaults.get(name)]
    return {**about, "settings": changed}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values that are numbers or short names; whatever could be a path, a text or Markdown is left out."""
    return {name: value for name, value in values.items() if name.isidentifier() and _PLAIN.fullmatch(str(value))}


def _many(values: Any) -> list[Any]:
    return list(values) if isinstance(values, list | tuple | set) else [] if values is None else [values]
