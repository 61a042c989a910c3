"""Reading and writing a plug folder: whole or not at all, with errors that say what to do."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, cached_file

from ..configuration import PPlugConfig
from ..errors import ConfigurationError, DataError, MissingFileError

TOKENIZER_CONFIG = "tokenizer_config.json"


def absolute_if_local(name: str | None) -> str | None:
    """Local folders are recorded absolute, so that a plug loads from any working directory."""
    return os.path.abspath(name) if name and os.path.isdir(name) else name


def check_writable(folder: str | os.PathLike) -> None:
    """Raise a `ConfigurationError` if writing a plug here would overwrite something that is none."""
    folder = Path(folder)
    if folder.is_file():
        raise ConfigurationError(f"{str(folder)!r} is a file; a plug is saved as a folder.")
    if (folder / CONFIG_NAME).is_file():
        try:
            model_type = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")).get("model_type")
        except (ValueError, AttributeError):
            model_type = None
        if model_type == PPlugConfig.model_type:
            return
        raise ConfigurationError(
            f"{str(folder)!r} exists and holds a model of type {model_type!r}, not a plug: choose another folder, or "
            "remove it first."
        )
    if (folder / SAFE_WEIGHTS_NAME).exists():
        raise ConfigurationError(f"{str(folder)!r} holds weights that are no plug: choose another folder.")


@contextlib.contextmanager
def replacing(folder: str | os.PathLike) -> Iterator[str]:
    """A staging folder whose files replace those of `folder` once they are all there.

    A process killed while it writes leaves `folder` as it was; the moves at the end are atomic for each file.
    """
    check_writable(folder)
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # In the same file system, because only a rename within one is atomic.
    staging = tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent)
    try:
        yield staging
        folder.mkdir(exist_ok=True)
        for path in sorted(Path(staging).rglob("*")):
            target = folder / path.relative_to(staging)
            if path.is_dir():
                target.mkdir(exist_ok=True)
            else:
                os.replace(path, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def required(given: Any, recorded: str | None, kind: str) -> Any:
    """Where a frozen part ("backbone", "encoder") is: what the user says, else what the plug recorded.

    Raises:
        ConfigurationError: neither says it.
    """
    if given is None and recorded is None:
        raise ConfigurationError(
            f"This plug does not say where its {kind} is: pass {kind}=<a loaded one, or its name>."
        )
    return recorded if given is None else given


def load_config(name: str | os.PathLike, **place: Any) -> PPlugConfig:
    """The configuration of a plug.

    Raises:
        MissingFileError: there is none.
        ConfigurationError: it is another kind of model's.
    """
    path = find(name, CONFIG_NAME, **place)
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        model_type = values.get("model_type")
    except (ValueError, AttributeError) as error:
        raise DataError(
            f"The {CONFIG_NAME} of {str(name)!r} is damaged ({error}): download or save it again."
        ) from error
    if model_type != PPlugConfig.model_type:
        raise ConfigurationError(
            f"{str(name)!r} is a model of type {model_type!r}, not a plug. To put a plug on it, use "
            f"PPlugForConditionalGeneration.from_backbone({str(name)!r}, encoder=...)."
        )
    config = PPlugConfig.from_dict(values)
    config.name_or_path = str(name)
    return config


def load_weights(name: str | os.PathLike, **place: Any) -> dict[str, Tensor]:
    """The trained tensors of a plug, on the CPU."""
    path = find(name, SAFE_WEIGHTS_NAME, **place)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise DataError(
            f"The {SAFE_WEIGHTS_NAME} of {str(name)!r} is truncated or damaged ({error}): download or save it again."
        ) from error


def load_generation_config(name: str | os.PathLike, **place: Any) -> GenerationConfig | None:
    """The generation configuration saved with a plug, if there is one."""
    try:
        return GenerationConfig.from_pretrained(name, **place)
    except OSError:
        return None


def load_tokenizer(name: str | os.PathLike, **place: Any) -> PreTrainedTokenizerBase | None:
    """The backbone's tokenizer saved with a plug, if there is one."""
    try:
        cached_file(name, TOKENIZER_CONFIG, **place)
    except OSError:
        return None
    return AutoTokenizer.from_pretrained(name, **place)


def check_weights(weights: dict[str, Tensor], expected: dict[str, Tensor], name: str | os.PathLike) -> None:
    """Raise a `DataError` unless names and shapes are the expected ones and every value is finite."""
    missing, surplus = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or surplus:
        raise DataError(
            f"The weights of {str(name)!r} do not fit its configuration: {len(missing)} missing (first {missing[:3]}), "
            f"{len(surplus)} unexpected (first {surplus[:3]})."
        )
    for key, tensor in weights.items():
        if tensor.shape != expected[key].shape:
            raise DataError(
                f"The weights of {str(name)!r} do not fit its configuration: {key} is {list(tensor.shape)}, expected "
                f"{list(expected[key].shape)}."
            )
        if not tensor.isfinite().all():
            raise DataError(f"The weights of {str(name)!r} hold NaN or infinity in {key}: the plug is not usable.")


def find(name: str | os.PathLike, filename: str, kind: str = "plug", **place: Any) -> str:
    """The path of a file of a plug (or of another kind of thing) in a folder, the cache or on the Hub.

    Raises:
        MissingFileError: it is in none of them.
    """
    try:
        path = cached_file(name, filename, **place)
        if path is None:  # what cached_file says of a folder without config.json
            raise FileNotFoundError(filename)
    except OSError as error:
        raise MissingFileError(
            f"Cannot load {filename} of the {kind} {str(name)!r}: it is in no local folder of that name, and neither "
            f"the cache nor the Hub answered for it ({type(error).__name__}). Check the name and the connection."
        ) from error
    return path
