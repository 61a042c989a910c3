"""A user, as the model sees them: the vectors of their history and the encoder that made them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import DataError, MismatchError, MissingFileError
from ..tasks.text import item_text
from . import plug_folder as files

PERSONA_FILE = "persona.safetensors"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

Item: TypeAlias = str | Mapping[str, Any]
History: TypeAlias = Sequence[Item]


@dataclass(frozen=True, eq=False)
class Persona:
    """An encoded history. It holds no text, but it is personal data all the same.

    Args:
        embeddings: [N, D] vectors in fp32, bf16, fp16 or fp64, oldest first, as the encoder gives them. N may be 0.
        fingerprint: of the encoder that made them (see `encoders.fingerprint`).

    Raises:
        DataError: not a floating point matrix, or a value that is not finite.
    """

    embeddings: Tensor
    fingerprint: dict[str, Any]

    def __post_init__(self) -> None:
        vectors = self.embeddings
        if not isinstance(vectors, Tensor) or vectors.ndim != 2 or vectors.dtype not in DTYPES:
            got = f"{vectors.dtype} {list(vectors.shape)}" if isinstance(vectors, Tensor) else type(vectors).__name__
            raise DataError(f"A persona needs a floating point tensor of shape [items, width], got {got}.")
        if vectors.sum().isfinite():  # then every value is, and one pass without a copy has told
            return
        finite = vectors.isfinite().all(dim=1)
        if not finite.all():
            bad = (~finite).nonzero().flatten().tolist()
            raise DataError(
                f"{len(bad)} of {len(vectors)} item vectors hold NaN or infinity (first at item {bad[0]}). "
                "Encode the history again with model.encode_persona(history)."
            )

    def __len__(self) -> int:
        return len(self.embeddings)

    def __repr__(self) -> str:
        return f"Persona({len(self)} items x {self.embeddings.shape[1]})"

    def __add__(self, newer: Persona) -> Persona:
        """This history followed by newer items: how a user's vectors grow as they act."""
        check_fingerprint(newer, self.fingerprint)
        vectors = newer.embeddings.to(self.embeddings)
        return Persona(torch.cat([self.embeddings, vectors]), self.fingerprint)

    def to(self, *args: Any, **kwargs: Any) -> Persona:
        """The same persona on another device or in another floating point type, as `Tensor.to`."""
        return Persona(self.embeddings.to(*args, **kwargs), self.fingerprint)

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write the vectors, bit for bit, and the fingerprint of their encoder; never a text.

        A reader sees the file of before or the new one, never half of it.

        Args:
            save_directory: a folder, which gets a `persona.safetensors`; or a path that ends in `.safetensors`, for
                folders with one file per user.
        """
        path = Path(save_directory)
        if path.suffix != ".safetensors":
            path = path / PERSONA_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        # In the same file system, because only a rename within one is atomic.
        with tempfile.TemporaryDirectory(prefix=".persona-", dir=path.parent) as staging:
            written = Path(staging) / path.name
            vectors = self.embeddings.detach().cpu().contiguous()
            save_file({"embeddings": vectors}, written, {"fingerprint": json.dumps(self.fingerprint, sort_keys=True)})
            os.replace(written, path)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_persona_name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        subfolder: str = "",
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> Persona:
        """Read what `save_pretrained` wrote.

        Args:
            pretrained_persona_name_or_path: folder, file, or Hub id.
            revision, subfolder, token, cache_dir, local_files_only, force_download: of a repository on the Hub.

        Returns:
            The persona, on the CPU. A model refuses it unless it has the same encoder.

        Raises:
            MissingFileError: there is none.
            DataError: the file is damaged, no persona, or holds NaN or infinity.
        """
        name = str(pretrained_persona_name_or_path)
        if os.path.isfile(name):
            path = name
        elif name.endswith(".safetensors"):
            raise MissingFileError(f"There is no persona file {name!r}.")
        else:
            place = {"revision": revision, "subfolder": subfolder, "token": token, "cache_dir": cache_dir}
            place |= {"local_files_only": local_files_only, "force_download": force_download}
            path = files.find(name, PERSONA_FILE, kind="persona", **place)
        try:
            with safe_open(path, framework="pt") as file:
                header, tensors = file.metadata() or {}, list(file.keys())
                if tensors != ["embeddings"] or "fingerprint" not in header:
                    raise DataError(f"expected embeddings and their fingerprint, got tensors {tensors[:3]}")
                fingerprint = json.loads(header["fingerprint"])
                if not isinstance(fingerprint, dict):
                    raise DataError(f"its fingerprint is a {type(fingerprint).__name__}, not a mapping")
                # A copy, which does not depend on the file any more.
                return cls(file.get_tensor("embeddings").clone(), fingerprint)
        except (SafetensorError, ValueError, RecursionError) as error:
            raise DataError(
                f"{path!r} is damaged or no persona: {str(error).rstrip('.')}. Encode the history again, or copy the "
                "file again from where it was saved."
            ) from error


def check_fingerprint(persona: Persona, fingerprint: Mapping[str, Any]) -> None:
    """Raise a `MismatchError` unless `persona` was made by the encoder of `fingerprint`, with its history prompt."""
    if any(persona.fingerprint.get(key) != fingerprint.get(key) for key in ("digest", "history_prompt")):
        raise MismatchError(
            f"This persona was encoded by {describe(persona.fingerprint)}, the model uses {describe(fingerprint)}. "
            "Vectors of two encoders cannot be mixed: encode the history with this model's encode_persona."
        )


def describe(fingerprint: Mapping[str, Any]) -> str:
    """A fingerprint in words, for messages."""
    known = {key: value for key, value in fingerprint.items() if value not in (None, "")}
    return "(" + ", ".join(f"{key}={value}" for key, value in known.items()) + ")"


def is_history(value: Any) -> bool:
    """Whether `value` is one history (a list of texts or task items), not a batch of them."""
    return isinstance(value, list | tuple) and (not value or isinstance(value[0], str | Mapping))


def item_texts(history: History, template: str | None) -> list[str]:
    """The text of every item, as the encoder gets it.

    Args:
        history: texts, or task items (mappings of fields) that `template` turns into texts.
        template: a format string over the fields of an item.

    Raises:
        DataError: something that is not a text, or an item without a field of the template. Names the position
            and the type or the field, never what the item says.
    """
    if isinstance(history, str) or not isinstance(history, Iterable):
        raise DataError(f"A history is a list of texts or items, got a single {type(history).__name__}: pass [text].")
    texts = []
    for i, item in enumerate(history):
        if isinstance(item, Mapping):
            if template is None:
                raise DataError(
                    f"History item {i} is a mapping with the fields {sorted(map(str, item))}, and the model has no "
                    "item_template to turn it into text: set config.item_template, or pass texts."
                )
            item = item_text(item, template, f"History item {i}")
        if not isinstance(item, str):
            raise DataError(
                f"History item {i} is a {type(item).__name__}, not a text: pass str, or a mapping of fields."
            )
        texts.append(item)
    return texts
