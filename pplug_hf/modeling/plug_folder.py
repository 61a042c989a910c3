"""Reading the files of a plug's folder or repository, with errors that say what to do."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from ..configuration import PPlugConfig
from ..errors import ConfigurationError, DataError, kind_of
from ..storage.files import read_json_object, write_text
from ..storage.layout import (
    ARTEFACT,
    CHAT_TEMPLATE,
    CHAT_TEMPLATES,
    CONFIG,
    GENERATION_CONFIG,
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
    WEIGHTS,
)
from ..storage.location import HubArguments, Location
from .plug import PersonaPlug

logger = logging.getLogger(__name__)


def absolute_if_local(name: str | None) -> str | None:
    """Return the absolute path of a local folder or GGUF file, for any working directory; other names as they are."""
    if name and (os.path.isdir(name) or (name.endswith(".gguf") and os.path.isfile(name))):
        return os.path.abspath(name)
    return name


def open_location(
    name: str | os.PathLike | Location, kind: str = "plug", **arguments: Unpack[HubArguments]
) -> Location:
    """Open a folder or repository at one commit. All files of one load are read from one such location.

    Args:
        name: folder, Hub id, or a location already opened, which is returned as it is.
        kind: what is there: "plug", "persona".
        **arguments: revision, subfolder, token, cache_dir, local_files_only, force_download.

    Raises:
        MissingFileError: no such folder, repository or revision.
        HubError: the Hub refuses.
    """
    if isinstance(name, Location):
        return name
    return Location(os.fspath(name), kind=kind).updated(arguments)[0].pinned()


def find(
    name: str | os.PathLike | Location, filename: str, kind: str = "plug", **arguments: Unpack[HubArguments]
) -> str:
    """Return the path of a file of a plug (or of something else) in a folder, the cache or on the Hub.

    Raises:
        MissingFileError: it is in none of them.
        HubError: the Hub refuses.
        DataError: it cannot be such a file: too large, or a link out of its folder.
    """
    return str(open_location(name, kind, **arguments).require(filename))


def load_config(name: str | os.PathLike | Location, **arguments: Unpack[HubArguments]) -> PPlugConfig:
    """Read the configuration of a plug.

    Raises:
        MissingFileError: there is none.
        DataError: it is damaged, or too large to be one.
        ConfigurationError: it is another kind of model's.
    """
    location = open_location(name, **arguments)
    if location.is_local and location.file(ARTEFACT):
        raise ConfigurationError(
            f"{location.name!r} is not a plug but an output of `pplug-hf fit`: `pplug-hf bench --trained NAME=FOLDER` takes it."
        )
    values = _read_json(location, location.require(CONFIG))
    model_type = values.get("model_type")
    if model_type != PPlugConfig.model_type:
        raise ConfigurationError(
            f"{location.name!r} is a model of type {model_type!r}, not a plug. To put a plug on it, use "
            f"PPlugForConditionalGeneration.from_backbone({location.name!r}, encoder=...)."
        )
    config = PPlugConfig.from_dict(values)
    config.name_or_path = location.name
    return config


def weight_shapes(name: str | os.PathLike | Location, **arguments: Unpack[HubArguments]) -> dict[str, list[int]]:
    """Read the names and shapes of a plug's trained tensors, but not the tensors.

    Raises:
        MissingFileError: there are none.
        DataError: the file is truncated or damaged, or holds something else than floating point numbers.
    """
    location = open_location(name, **arguments)
    path = location.require(WEIGHTS)
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            if odd := sorted(key for key, part in slices.items() if part.get_dtype() not in _DTYPES):
                raise DataError(
                    f"The weights of {location.name!r} are not floating-point numbers in {odd[0]} "
                    f"({slices[odd[0]].get_dtype()}): the plug is not usable."
                )
            return {key: part.get_shape() for key, part in slices.items()}
    except (SafetensorError, RuntimeError) as error:  # the latter: more than the machine can address
        raise _damaged(location, WEIGHTS, error) from error


_DTYPES = ("F64", "F32", "F16", "BF16")


def load_weights(
    name: str | os.PathLike | Location, expected: Mapping[str, Tensor] | None = None, **arguments: Unpack[HubArguments]
) -> dict[str, Tensor]:
    """Read the trained tensors of a plug, to the CPU.

    Args:
        name: folder, Hub id or location.
        expected: tensors of the names and shapes that must be there; a file with others is not read.
        **arguments: of a location.

    Raises:
        MissingFileError: there are none.
        DataError: the file is damaged, does not fit what is expected, or holds NaN or infinity.
    """
    location = open_location(name, **arguments)
    shapes = weight_shapes(location)
    if expected is not None:
        _check_shapes(shapes, {key: list(tensor.shape) for key, tensor in expected.items()}, location.name)
    weights = load_file(location.require(WEIGHTS))
    for key, tensor in weights.items():
        # A finite sum has finite terms, and takes a tenth of the time of looking at each.
        if not (tensor.sum().isfinite() or tensor.isfinite().all()):
            raise DataError(f"The weights of {location.name!r} hold NaN or infinity in {key}: the plug is not usable.")
    return weights


def check_sizes(shapes: Mapping[str, list[int]], config: PPlugConfig, name: str) -> None:
    """Raise a `DataError` unless the tensors of a plug have the sizes that its configuration says.

    A configuration may say any: this is found out before memory is reserved for them. The input encoder, which is as
    large as the encoder, is left out.
    """
    with torch.device("meta"):
        expected = {f"plug.{key}": list(tensor.shape) for key, tensor in PersonaPlug(config).state_dict().items()}
    _check_shapes({key: shape for key, shape in shapes.items() if "input_encoder" not in key}, expected, name)


def _check_shapes(got: Mapping[str, list[int]], expected: Mapping[str, list[int]], name: str) -> None:
    missing, surplus = sorted(expected.keys() - got.keys()), sorted(got.keys() - expected.keys())
    if missing or surplus:
        raise DataError(
            f"The weights of {name!r} do not fit its configuration: {len(missing)} missing (first {missing[:3]}), "
            f"{len(surplus)} unexpected (first {surplus[:3]})."
        )
    for key, shape in got.items():
        if shape != expected[key]:
            raise DataError(
                f"The weights of {name!r} do not fit its configuration: {key} is {shape}, expected {expected[key]}."
            )


def load_generation_config(
    name: str | os.PathLike | Location, **arguments: Unpack[HubArguments]
) -> GenerationConfig | None:
    """Read the generation configuration saved with a plug, if there is one.

    Raises:
        DataError: it is damaged.
    """
    location = open_location(name, **arguments)
    path = location.file(GENERATION_CONFIG)
    if path is None:
        return None
    values = _read_json(location, path)
    try:
        return GenerationConfig.from_dict(values)
    except (ValueError, TypeError, AttributeError) as error:
        raise _damaged(location, GENERATION_CONFIG, error) from error


def load_tokenizer(
    name: str | os.PathLike | Location, **arguments: Unpack[HubArguments]
) -> PreTrainedTokenizerBase | None:
    """Load the backbone's tokenizer saved with a plug, if there is one.

    Raises:
        DataError: it is damaged, or needs code of its own.
    """
    location = open_location(name, **arguments)
    if not check_tokenizer(location):
        return None
    folder = location.folder((CONFIG, *TOKENIZER_FILES))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises nothing more special
        raise _damaged(location, TOKENIZER_CONFIG, error) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):  # some classes of transformers hold two
        raise _damaged(location, TOKENIZER_CONFIG, f"it is {kind_of(tokenizer)}")
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | os.PathLike) -> None:
    """Save the backbone's tokenizer with a plug, unless its class is code of a repository, which loading would not run."""
    if type(tokenizer).__module__.startswith("transformers_modules."):
        logger.warning(
            "The tokenizer %s is code of its repository and is not saved with the plug: whoever loads the plug passes it, as "
            "PPlugProcessor.from_model(model, tokenizer=...).",
            type(tokenizer).__name__,
        )
    else:
        tokenizer.save_pretrained(folder)
        join_chat_templates(Path(folder))


def join_chat_templates(folder: Path) -> None:
    """Move the chat templates of a tokenizer that has several into its settings: all files of a plug lie in one folder."""
    if not (folder / CHAT_TEMPLATES).is_dir():
        return
    paths = {path.stem: path for path in sorted((folder / CHAT_TEMPLATES).glob("*.jinja"))}
    if (default := folder / CHAT_TEMPLATE).is_file():
        paths["default"] = default
    templates = [{"name": name, "template": path.read_text(encoding="utf-8")} for name, path in paths.items()]
    settings = read_json_object(folder / TOKENIZER_CONFIG, TOKENIZER_CONFIG) | {"chat_template": templates}
    write_text(folder / TOKENIZER_CONFIG, json.dumps(settings, indent=2, sort_keys=True) + "\n")
    shutil.rmtree(folder / CHAT_TEMPLATES)
    default.unlink(missing_ok=True)


def check_tokenizer(location: Location) -> bool:
    """Return whether a plug has a tokenizer. Its files are found by name, never through a setting in one of them.

    Raises:
        DataError: one of them names another.
    """
    path = location.file(TOKENIZER_CONFIG)
    for key, value in _read_json(location, path).items() if path is not None else ():
        if key.endswith(("_file", "_files")) and value:
            raise _damaged(location, TOKENIZER_CONFIG, f"its {key} names a file")
    return path is not None


def _read_json(location: Location, path: Path) -> dict[str, Any]:
    return read_json_object(path, f"The {path.name} of {location.name!r}")


def _damaged(location: Location, filename: str, why: object) -> DataError:
    state = "truncated or damaged" if filename == WEIGHTS else "damaged"
    return DataError(f"The {filename} of {location.name!r} is {state} ({why}): download or save it again.")
