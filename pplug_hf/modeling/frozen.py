"""The frozen modules of a plug, its backbone and its encoder: finding them, and checking that they fit."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from torch import nn

from ..configuration import PPlugConfig
from ..errors import ConfigurationError, MismatchError
from ..storage.location import Location, hub_repository
from .weight_sample import differs_from_files

_SHA256 = 64  # hexadecimal digits of a GGUF file's digest; a commit has 40

T = TypeVar("T")

logger = logging.getLogger(__name__)


def locate(kind: str, given: str | os.PathLike | T | None, config: PPlugConfig, location: Location) -> Location | T:
    """Return a frozen module for `load_backbone` or `load_encoder`: the one the user names, else the one the plug recorded.

    Args:
        kind: "backbone" or "encoder".
        given: by the user: something loaded, a folder, a Hub id, or None.
        config: of the plug.
        location: of the plug, whose token, cache and choices serve for the frozen module too.

    Raises:
        ConfigurationError: neither says it, or a repository names a folder of this machine.
    """
    if given is not None:
        return location.frozen_module(os.fspath(given), None, kind) if isinstance(given, str | os.PathLike) else given
    recorded, revision = getattr(config, kind), getattr(config, f"{kind}_revision")
    wanted = describe(getattr(config, f"{kind}_fingerprint") or {})
    if recorded is None:
        raise ConfigurationError(
            f"This plug does not say where its {kind} is: pass {kind}=<a loaded one, or its name>. It was made with one "
            f"that is not on the Hub: {wanted}."
        )
    repository = hub_repository(recorded, kind)
    if not location.is_local and (repository is None or os.path.exists(repository)):
        what = "no Hub id" if repository is None else "a path on this machine"
        raise ConfigurationError(
            f"The plug {location.name!r} comes from the Hub and says that its {kind} is {recorded!r}, which is {what} and "
            f"is not opened: pass {kind}=<a loaded one, or its name>, {wanted}."
        )
    return location.frozen_module(recorded, revision, kind)


def note_other_backbone(config: PPlugConfig, name: str | None, commit: str | None) -> None:
    """Warn if a backbone that fits differs by name or commit from the one that the plug was trained on.

    Args:
        config: of the plug.
        name, commit: of the backbone, as far as it knows.
    """
    known = (config.backbone, name), (config.backbone_revision, commit)
    if commit == config.backbone_revision and len(commit or "") == _SHA256:
        return  # the same file, wherever it is
    if any(recorded and got and recorded != got for recorded, got in known):
        logger.warning(
            "The plug was trained on the backbone %s at %s and is put on %s at %s. It fits, but its answers may be worse, "
            "unless the weights are the same: measure them.",
            *(config.backbone, config.backbone_revision, name, commit),
        )


def note_other_weights(config: PPlugConfig, digests: Mapping[str, str]) -> None:
    """Warn if a backbone that fits has other weights than the plug was trained on.

    Args:
        config: of the plug. Those of earlier versions have no digests.
        digests: of the backbone, see `weight_digests`.
    """
    known = config.backbone_fingerprint or {}
    recorded = {known[name] for name in digests if name in known}
    if recorded and not recorded & set(digests.values()):
        logger.warning(
            "The backbone %s has other weights than the one that the plug was trained on, which was fine-tuned or merged "
            "in memory, or has been changed since. It fits, but its answers may be worse: pass backbone=<the same weights>.",
            config.backbone,
        )


def note_changed_backbone(name: str | None, folder: Path | None, backbone: nn.Module) -> None:
    """Warn if a loaded backbone is not what the files say that it was loaded from.

    Args:
        name: of the folder or repository.
        folder: with its files on this machine, if there is one.
        backbone: the language model.
    """
    if folder is not None and differs_from_files(backbone, folder):
        logger.warning(
            "The backbone has other weights than %s, from which it was loaded: it was changed in memory. A plug is loaded "
            "with the weights of that place, unless backbone= is given: save the backbone (save_pretrained), load it from "
            "there and make the plug on it.",
            name,
        )


def check_fits(config: PPlugConfig, kind: str, got: Mapping[str, object]) -> None:
    """Raise a `MismatchError` unless a frozen module is the one that the plug was made for.

    Args:
        config: of the plug.
        kind: "backbone" or "encoder".
        got: its fingerprint.
    """
    width = ("hidden_size", config.hidden_size) if kind == "backbone" else ("embedding_size", config.encoder_size)
    expected = {**(getattr(config, f"{kind}_fingerprint") or {}), width[0]: width[1]}
    # Another version of the package may record more, or less.
    if any(got[key] != expected[key] for key in got.keys() & expected.keys()):
        raise MismatchError(
            f"This plug was made for the {kind} {getattr(config, kind)!r} {describe(expected)}, and got "
            f"{describe(got)}. Load that one, or train a plug for this one with from_backbone."
        )


def describe(fingerprint: Mapping[str, object]) -> str:
    """Return a fingerprint in words, for messages."""
    known = {key: value for key, value in fingerprint.items() if value not in (None, "")}
    return "(" + ", ".join(f"{key}={value}" for key, value in known.items()) + ")"
