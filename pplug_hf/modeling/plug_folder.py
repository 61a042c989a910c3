"""What is read from a plug's folder or repository, with errors that say what to do."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from ..configuration import PPlugConfig
from ..errors import ConfigurationError, DataError
from ..storage.files import read_json_object
from ..storage.layout import CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG, TOKENIZER_FILES, WEIGHTS
from ..storage.location import Location
from .plug import PersonaPlug

logger = logging.getLogger(__name__)


def absolute_if_local(name: str | None) -> str | None:
    """Local folders are recorded absolute, so that a plug loads from any working directory."""
    return os.path.abspath(name) if name and os.path.isdir(name) else name


def open_location(name: str | os.PathLike | Location, kind: str = "plug", **arguments: Any) -> Location:
    """A folder or repository at one commit: read all files of one load from one such place.

    Args:
        name: folder, Hub id, or a place already opened, which is returned as it is.
        kind: what is there: "plug", "persona".
        **arguments: revision, subfolder, token, cache_dir, local_files_only, force_download.

    Raises:
        MissingFileError: no such folder, repository or revision.
        HubError: the Hub refuses.
    """
    if isinstance(name, Location):
        return name
    return Location(os.fspath(name), kind=kind).updated(arguments)[0].pinned()


def find(name: str | os.PathLike | Location, filename: str, kind: str = "plug", **arguments: Any) -> str:
    """The path of a file of a plug (or of another kind of thing) in a folder, the cache or on the Hub.

    Raises:
        MissingFileError: it is in none of them.
        HubError: the Hub refuses.
        DataError: it cannot be such a file: too large, or a link out of its folder.
    """
    return str(open_location(name, kind, **arguments).require(filename))


def load_config(name: str | os.PathLike | Location, **arguments: Any) -> PPlugConfig:
    """The configuration of a plug.

    Raises:
        MissingFileError: there is none.
        DataError: it is damaged, or too large to be one.
        ConfigurationError: it is another kind of model's.
    """
    place = open_location(name, **arguments)
    values = _read_json(place, place.require(CONFIG))
    model_type = values.get("model_type")
    if model_type != PPlugConfig.model_type:
        raise ConfigurationError(
            f"{place.name!r} is a model of type {model_type!r}, not a plug. To put a plug on it, use "
            f"PPlugForConditionalGeneration.from_backbone({place.name!r}, encoder=...)."
        )
    config = PPlugConfig.from_dict(values)
    config.name_or_path = place.name
    return config


def weight_shapes(name: str | os.PathLike | Location, **arguments: Any) -> dict[str, list[int]]:
    """Names and shapes of the trained tensors of a plug, of which none is read.

    Raises:
        MissingFileError: there are none.
        DataError: the file is truncated or damaged, or holds something else than floating point numbers.
    """
    place = open_location(name, **arguments)
    path = place.require(WEIGHTS)
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            if odd := sorted(key for key, part in slices.items() if part.get_dtype() not in _DTYPES):
                raise DataError(
                    f"The weights of {place.name!r} are no floating point numbers in {odd[0]} "
                    f"({slices[odd[0]].get_dtype()}): the plug is not usable."
                )
            return {key: part.get_shape() for key, part in slices.items()}
    except (SafetensorError, RuntimeError) as error:  # the latter: more than the machine can address
        raise _damaged(place, WEIGHTS, error) from error


_DTYPES = ("F64", "F32", "F16", "BF16")


def load_weights(
    name: str | os.PathLike | Location, expected: Mapping[str, Tensor] | None = None, **arguments: Any
) -> dict[str, Tensor]:
    """The trained tensors of a plug, on the CPU.

    Args:
        name: folder, Hub id or place.
        expected: tensors of the names and shapes that must be there; a file with others is not read.
        **arguments: of a place.

    Raises:
        MissingFileError: there are none.
        DataError: the file is damaged, does not fit what is expected, or holds NaN or infinity.
    """
    place = open_location(name, **arguments)
    shapes = weight_shapes(place)
    if expected is not None:
        _check_shapes(shapes, {key: list(tensor.shape) for key, tensor in expected.items()}, place.name)
    weights = load_file(place.require(WEIGHTS))
    for key, tensor in weights.items():
        # A finite sum has finite terms, and takes a tenth of the time of looking at each.
        if not (tensor.sum().isfinite() or tensor.isfinite().all()):
            raise DataError(f"The weights of {place.name!r} hold NaN or infinity in {key}: the plug is not usable.")
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


def load_generation_config(name: str | os.PathLike | Location, **arguments: Any) -> GenerationConfig | None:
    """The generation configuration saved with a plug, if there is one.

    Raises:
        DataError: it is damaged.
    """
    place = open_location(name, **arguments)
    path = place.file(GENERATION_CONFIG)
    if path is None:
        return None
    values = _read_json(place, path)
    try:
        return GenerationConfig.from_dict(values)
    except (ValueError, TypeError, AttributeError) as error:
        raise _damaged(place, GENERATION_CONFIG, error) from error


def load_tokenizer(name: str | os.PathLike | Location, **arguments: Any) -> PreTrainedTokenizerBase | None:
    """The backbone's tokenizer saved with a plug, if there is one.

    Raises:
        DataError: it is damaged, or needs code of its own.
    """
    place = open_location(name, **arguments)
    if not check_tokenizer(place):
        return None
    folder = place.folder((CONFIG, *TOKENIZER_FILES))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises nothing more special
        raise _damaged(place, TOKENIZER_CONFIG, error) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):  # some classes of transformers hold two
        raise _damaged(place, TOKENIZER_CONFIG, f"it is a {type(tokenizer).__name__}")
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | os.PathLike) -> None:
    """Put the backbone's tokenizer beside a plug; not one whose class is a repository's code, which no load would run."""
    if type(tokenizer).__module__.startswith("transformers_modules."):
        logger.warning(
            "The tokenizer %s is code of its repository and is not saved with the plug: whoever loads the plug passes it, as "
            "PPlugProcessor.from_model(model, tokenizer=...).",
            type(tokenizer).__name__,
        )
    else:
        tokenizer.save_pretrained(folder)


def check_tokenizer(place: Location) -> bool:
    """Whether a plug has a tokenizer. Its files are found by their names, never by what one of them says.

    Raises:
        DataError: one of them names another.
    """
    path = place.file(TOKENIZER_CONFIG)
    for key, value in _read_json(place, path).items() if path is not None else ():
        if key.endswith(("_file", "_files")) and value:
            raise _damaged(place, TOKENIZER_CONFIG, f"its {key} names a file")
    return path is not None


def _read_json(place: Location, path: Path) -> dict[str, Any]:
    return read_json_object(path, f"The {path.name} of {place.name!r}")


def _damaged(place: Location, filename: str, why: Any) -> DataError:
    state = "truncated or damaged" if filename == WEIGHTS else "damaged"
    return DataError(f"The {filename} of {place.name!r} is {state} ({why}): download or save it again.")
