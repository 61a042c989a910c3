"""Equation (1) alone: histories to personas, with neither the backbone nor the trained weights of a plug."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from ..configuration import PPlugConfig
from ..errors import DataError, MismatchError
from . import encoders
from . import plug_folder as files
from .frozen import locate
from .persona import History, Persona, check_fingerprint, describe, is_history, item_texts


class PersonaEncoder:
    """Encodes histories as a plug does: for the device of a user who shares vectors and no text.

    Load one with [`from_pretrained`].

    Args:
        config: of the plug.
        encoder: the frozen sentence encoder that the plug was made with.

    Raises:
        MismatchError: another encoder; the message names both.
    """

    def __init__(self, config: PPlugConfig, encoder: SentenceTransformer):
        check_part(config, "encoder", encoders.fingerprint(encoder, config.history_prompt))
        self.config = config
        self.encoder = encoders.freeze_encoder(encoder)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        encoder: str | SentenceTransformer | None = None,
        encoder_kwargs: dict[str, Any] | None = None,
        revision: str | None = None,
        subfolder: str = "",
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> PersonaEncoder:
        """The encoder of a plug.

        Args:
            pretrained_model_name_or_path: plug folder or Hub id.
            encoder: a loaded encoder (or another place) to use instead of the recorded one; it must be the same.
            encoder_kwargs: for `SentenceTransformer` (device, model_kwargs, ...).
            revision, subfolder: of the plug.
            token, cache_dir, local_files_only, force_download: for both.

        Returns:
            It, from the plug's configuration and the encoder at its recorded commit; nothing else is loaded.

        Raises:
            MissingFileError: the plug or its encoder cannot be found.
            MismatchError: the encoder is not the one the plug was made with.
        """
        arguments: dict[str, Any] = {
            "revision": revision,
            "subfolder": subfolder,
            "token": token,
            "cache_dir": cache_dir,
        }
        arguments |= {"local_files_only": local_files_only, "force_download": force_download}
        place = files.open_location(pretrained_model_name_or_path, **arguments)
        config = files.load_config(place)
        source = locate("encoder", encoder, config, place)
        return cls(config, encoders.load_encoder(source, **(encoder_kwargs or {})))

    def encode(self, history: History | Sequence[History], batch_size: int = 32, show_progress: bool = False) -> Any:
        """As [`PPlugForConditionalGeneration.encode_persona`]; see there."""
        personas = encode(
            self.encoder, self.config, users_of(history), batch_size=batch_size, show_progress=show_progress
        )
        return personas[0] if is_one_user(history) else personas


def encode(
    encoder: SentenceTransformer, config: PPlugConfig, histories: Sequence[Any], **kwargs: Any
) -> list[Persona]:
    """Histories (or finished personas, or None) to personas, all texts in one pass, each distinct one once.

    Args:
        encoder: the frozen encoder.
        config: of the plug.
        histories: one per user.
        **kwargs: batch_size, show_progress.

    Raises:
        DataError: something in a history is not a text.
        MismatchError: a finished persona of another encoder.
    """
    fingerprint, width = config.encoder_fingerprint or {}, config.sizes[0]
    texts = [
        None if isinstance(h, Persona) else item_texts(() if h is None else h, config.item_template) for h in histories
    ]
    flat = [text for row in texts if row for text in row]
    vectors = encoders.embed(encoder, flat, prompt=config.history_prompt, **kwargs) if flat else torch.empty(0)
    personas, start = [], 0
    for history, row in zip(histories, texts, strict=True):
        if isinstance(history, Persona):
            check_fingerprint(history, fingerprint)
            if history.embeddings.shape[1] != width:
                raise MismatchError(
                    f"This persona's vectors are {history.embeddings.shape[1]} wide, the model's encoder gives "
                    f"{width}: encode the history with this model's encode_persona."
                )
            personas.append(history)
            continue
        assert row is not None  # only finished personas have none
        stop = start + len(row)
        personas.append(Persona(vectors[start:stop] if row else torch.zeros(0, width), fingerprint))
        start = stop
    return personas


def check_part(config: PPlugConfig, kind: str, got: Mapping[str, Any]) -> None:
    """Raise a `MismatchError` unless a frozen part ("backbone", "encoder") is the one that the plug was made for.

    Args:
        config: of the plug.
        kind: which part.
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


def is_one_user(persona: Any) -> bool:
    """Whether this is one history, Persona or None, not a list of them."""
    return persona is None or isinstance(persona, Persona) or is_history(persona)


def users_of(persona: Any) -> Sequence[Any]:
    """What a user passes as `persona`, as one history, Persona or None per row."""
    if is_one_user(persona):
        return [persona]
    if isinstance(persona, str | Mapping | Tensor) or not hasattr(persona, "__len__"):
        raise DataError(
            f"persona is a history, a list of texts; got a single {type(persona).__name__}: pass [text], or a Persona "
            "for finished vectors."
        )
    return persona
