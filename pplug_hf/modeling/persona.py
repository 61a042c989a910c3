"""A user, as the model sees them: the vectors of their history, and the spec of the encoder that made them.

A file holds the vectors [N, D], a format number and the spec, never a text:

    format 1 (0.1.0 before its release)  tensor `embeddings`; metadata `fingerprint`; no item template
    format 2                             tensors `vectors`, `timestamps`?; metadata `persona_format`, `spec`, `item_ids`?
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..configuration import PPlugConfig
from ..errors import DataError, MismatchError, MissingFileError, kind_of
from ..storage.files import atomic_write
from ..tasks.items import parse_date, seconds
from . import plug_folder
from .encoders import Item, check_finite

PERSONA_FILE = "persona.safetensors"
FORMAT = 2
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
UNRECORDED = "<not recorded>"  # the item template of a persona file of format 1, which agrees with every template

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncoderSpec:
    """Everything that decides which vectors a history gets, so that two personas fit if their specs do.

    Args:
        digest: of the encoder's weights and settings, see `encoders.fingerprint`.
        width: D, of its vectors.
        prompt: text put in front of every item.
        item_template: format string that makes an item's text of its fields; None if items are texts.
        granularity: what one vector stands for.
        model_type: of the encoder, for messages alone.
    """

    digest: str | None
    width: int | None
    prompt: str = ""
    item_template: str | None = None
    granularity: Literal["item", "phrase"] = "item"
    model_type: str | None = field(default=None, compare=False)

    @classmethod
    def of(cls, config: PPlugConfig) -> EncoderSpec:
        """Return the spec of the personas that a plug reads.

        Args:
            config: of the plug.
        """
        spec = cls.from_fingerprint(config.encoder_fingerprint or {}, config.item_template)
        return replace(spec, width=config.encoder_size, prompt=config.history_prompt)

    @classmethod
    def from_fingerprint(cls, fingerprint: Mapping[str, Any], item_template: str | None) -> EncoderSpec:
        """Return the spec of an encoder and a template.

        Args:
            fingerprint: of the encoder, with the prompt of history items.
            item_template: see the class.
        """
        width, prompt = fingerprint.get("embedding_size"), fingerprint.get("history_prompt") or ""
        model_type = fingerprint.get("model_type")
        return cls(fingerprint.get("digest"), width, prompt, item_template, model_type=model_type)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EncoderSpec:
        """Return the spec that `to_dict` gave.

        Args:
            values: fields by name; those of later versions are left out.
        """
        names = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})

    def to_dict(self) -> dict[str, object]:
        """Return all fields by name, as JSON takes them."""
        return asdict(self)

    def fits(self, other: EncoderSpec) -> bool:
        """Return whether vectors of both specs may stand in one history.

        Args:
            other: spec to compare with.
        """
        if UNRECORDED in (self.item_template, other.item_template):
            return replace(self, item_template=None) == replace(other, item_template=None)
        return self == other

    def __str__(self) -> str:
        known = {name: value for name, value in self.to_dict().items() if value not in (None, "", "item")}
        return "(" + ", ".join(f"{name}={value}" for name, value in known.items()) + ")"


@dataclass(frozen=True, eq=False)
class Persona:
    """An encoded history. It holds no text, but it is personal data all the same.

    Args:
        vectors: [N, D] in fp32, bf16, fp16 or fp64, oldest first, as the encoder gives them. N may be 0.
        spec: of the encoder that made them.
        item_ids: N ids of the items, where the data have them: what deletes an item later.
        timestamps: [N] seconds since 1970 (UTC) in fp64, where every item has a date.

    Raises:
        DataError: not a floating point matrix, a value that is not finite, or ids or times of another number.
    """

    vectors: Tensor
    spec: EncoderSpec
    item_ids: tuple[str, ...] | None = None
    timestamps: Tensor | None = None

    def __post_init__(self) -> None:
        vectors = self.vectors
        if not isinstance(vectors, Tensor) or vectors.ndim != 2 or vectors.dtype not in DTYPES:
            got = f"{vectors.dtype} {list(vectors.shape)}" if isinstance(vectors, Tensor) else type(vectors).__name__
            raise DataError(f"A persona needs a floating point tensor of shape [items, width], got {got}.")
        if self.spec.width not in (None, vectors.shape[1]):
            raise DataError(f"These vectors are {vectors.shape[1]} wide, and their encoder's are {self.spec.width}.")
        for name, values in (("item_ids", self.item_ids), ("timestamps", self.timestamps)):
            if values is not None and len(values) != len(vectors):
                raise DataError(f"A persona of {len(vectors)} items got {len(values)} {name}: give one per item.")
        check_finite(vectors)

    def __len__(self) -> int:
        return len(self.vectors)

    def __repr__(self) -> str:
        return f"Persona({len(self)} items x {self.vectors.shape[1]})"

    def __add__(self, newer: Persona) -> Persona:
        """Return this history followed by newer items, with ids and times if both have them."""
        check_spec(newer, self.spec)
        vectors = torch.cat([self.vectors, newer.vectors.to(self.vectors)])
        ids = None if self.item_ids is None or newer.item_ids is None else self.item_ids + newer.item_ids
        both = None if self.timestamps is None or newer.timestamps is None else [self.timestamps, newer.timestamps]
        return Persona(vectors, self.spec, ids, None if both is None else torch.cat(both))

    def select(self, positions: Sequence[int]) -> Persona:
        """Return some of the items, in their order in the history.

        Args:
            positions: which, from 0 on.
        """
        kept = sorted(positions)
        ids = None if self.item_ids is None else tuple(self.item_ids[i] for i in kept)
        times = None if self.timestamps is None else self.timestamps[kept]
        return replace(self, vectors=self.vectors[kept], item_ids=ids, timestamps=times)

    def without(self, item_ids: Collection[str]) -> Persona:
        """Return the history without some items.

        Args:
            item_ids: of items to leave out; ids that are not there are no error.

        Returns:
            The persona of the others.

        Raises:
            DataError: the items of this persona have no ids.
        """
        if self.item_ids is None:
            raise DataError("The items of this persona have no ids: encode items that carry an 'id'.")
        gone = {item_ids} if isinstance(item_ids, str) else set(item_ids)
        return self.select([i for i, name in enumerate(self.item_ids) if name not in gone])

    def last(self, n: int) -> Persona:
        """Return the newest items: by time where every item has one, else those at the end.

        Args:
            n: how many; a shorter history is returned whole.
        """
        newest = range(len(self)) if self.timestamps is None else self.timestamps.argsort(stable=True).tolist()
        return self.select(newest[max(0, len(self) - n) :])

    def top(self, k: int, weights: Tensor) -> Persona:
        """Return the items with the largest weights, of equal ones the later.

        Args:
            k: how many; a shorter history is returned whole.
            weights: [N] or longer, as a row of `Personalizer.weights`.
        """
        return self.select(weights[: len(self)].float().cpu().argsort(stable=True)[max(0, len(self) - k) :].tolist())

    def to(self, *args: Any, **kwargs: Any) -> Persona:
        """Return the same persona on another device or in another floating point type, as `Tensor.to`."""
        return replace(self, vectors=self.vectors.to(*args, **kwargs))

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write the vectors, bit for bit, with ids, times and spec; never a text.

        A reader sees the file of before or the new one, never half of it.

        Args:
            save_directory: a folder, which gets a `persona.safetensors`; or a path that ends in `.safetensors`, for
                folders with one file per user.
        """
        path = Path(save_directory)
        path = path if path.suffix == ".safetensors" else path / PERSONA_FILE
        tensors = {"vectors": self.vectors, "timestamps": self.timestamps}
        header = {"persona_format": str(FORMAT), "spec": json.dumps(self.spec.to_dict(), sort_keys=True)}
        if self.item_ids is not None:
            header["item_ids"] = json.dumps(self.item_ids)
        with atomic_write(path) as staging:
            save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items() if t is not None}, staging, header)

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
        """Read what `save_pretrained` wrote, in this or an earlier version.

        Args:
            pretrained_persona_name_or_path: folder, file, or Hub id.
            revision, subfolder, token, cache_dir, local_files_only, force_download: of a repository on the Hub.

        Returns:
            The persona, on the CPU. A model refuses it unless it has the same spec.

        Raises:
            MissingFileError: there is none.
            DataError: the file is damaged, not a persona, or holds NaN or infinity.
        """
        name = str(pretrained_persona_name_or_path)
        if os.path.isfile(name):
            path = name
        elif name.endswith(".safetensors"):
            raise MissingFileError(f"There is no persona file {name!r}.")
        else:
            where = {"revision": revision, "subfolder": subfolder, "token": token, "cache_dir": cache_dir}
            where |= {"local_files_only": local_files_only, "force_download": force_download}
            path = plug_folder.find(name, PERSONA_FILE, kind="persona", **where)
        try:
            return _read(path)
        except (SafetensorError, ValueError, TypeError, RecursionError) as error:
            raise DataError(
                f"{path!r} is damaged or not a persona: {str(error).rstrip('.')}. Encode the history again, or copy the "
                "file again from where it was saved."
            ) from error


PersonaLike: TypeAlias = Persona | Iterable[Item] | None  # of one user: encoded, a history, or none
Personas: TypeAlias = PersonaLike | Iterable[PersonaLike]  # of one user or several


def _read(path: str) -> Persona:
    """Read a persona of any format; `ValueError` and `TypeError` say what is wrong with it."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        # Copies, which do not depend on the file any more.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    if "persona_format" not in header:  # format 1
        if list(tensors) != ["embeddings"] or "fingerprint" not in header:
            raise ValueError(f"expected vectors and the spec of their encoder, got tensors {list(tensors)[:3]}")
        fingerprint = _mapping(header["fingerprint"], "fingerprint")
        return Persona(tensors["embeddings"], EncoderSpec.from_fingerprint(fingerprint, UNRECORDED))
    if not header["persona_format"].isdecimal() or "vectors" not in tensors or "spec" not in header:
        raise ValueError(f"expected vectors and the spec of their encoder, got tensors {list(tensors)[:3]}")
    surplus = sorted(tensors.keys() - {"vectors", "timestamps"})
    if int(header["persona_format"]) > FORMAT or surplus:
        logger.warning(
            "The persona %r has format %s and this version of pplug-hf knows %d: what it does not know is left out%s. "
            "Update pplug-hf.",
            *(path, header["persona_format"], FORMAT, f" ({', '.join(surplus[:3])})" if surplus else ""),
        )
    ids = json.loads(header.get("item_ids", "null"))
    if ids is not None and not (isinstance(ids, list) and all(isinstance(one, str) for one in ids)):
        raise ValueError("its item_ids are not a list of texts")
    spec = EncoderSpec.from_dict(_mapping(header["spec"], "spec"))
    return Persona(tensors["vectors"], spec, None if ids is None else tuple(ids), tensors.get("timestamps"))


def _mapping(text: str, name: str) -> dict[str, Any]:
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError(f"its {name} is {kind_of(values)}, not a mapping")
    return values


def item_facts(history: Iterable[object]) -> tuple[tuple[str, ...] | None, Tensor | None]:
    """Return the ids and the times [N] of a history's items; None unless every item has one."""
    ids, dates = [], []
    for item in history:
        if not isinstance(item, Mapping):
            return None, None
        ids.append(item.get("id"))
        dates.append(parse_date(item.get("date")))
    return (
        None if any(one in (None, "") for one in ids) else tuple(map(str, ids)),
        torch.tensor([seconds(date) for date in dates], dtype=torch.float64) if all(dates) else None,
    )


def check_spec(persona: Persona, spec: EncoderSpec) -> None:
    """Raise a `MismatchError` unless a persona was made by the encoder, prompt and template of `spec`."""
    if not persona.spec.fits(spec):
        raise MismatchError(
            f"This persona was encoded by {persona.spec}, and the model uses {spec}. Vectors of two encoders, or of two "
            "ways to write an item, cannot be mixed: encode the history with this model's encode_persona."
        )
