"""`Rows`: items as a store writes them: ids, times, and vectors in fp32, fp16 or int8 with one scale a row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigurationError, DataError, MismatchError
from ..modeling import EncoderSpec, Persona
from .keys import check_id

DType = Literal["float32", "float16", "int8"]
_TORCH = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Rows:
    """Items of one user, oldest first.

    Args:
        ids: of the items, all different.
        times: [N] seconds since 1970 in fp64, NaN for an item without one.
        data: [N, row size] bytes, see `Packing`.
    """

    ids: list[str]
    times: np.ndarray
    data: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, positions: Sequence[int]) -> Rows:
        """Return some of the items."""
        kept = list(positions)
        return Rows([self.ids[i] for i in kept], self.times[kept], self.data[kept])

    def without(self, ids: Iterable[str]) -> Rows:
        """Return the items whose ids are not among `ids`."""
        gone = set(ids)
        if gone.isdisjoint(self.ids):
            return self
        return self.select([i for i, name in enumerate(self.ids) if name not in gone])

    def __add__(self, newer: Rows) -> Rows:
        parts = (self, newer)
        return Rows(
            self.ids + newer.ids, np.concatenate([p.times for p in parts]), np.concatenate([p.data for p in parts])
        )


class Packing:
    """Conversion of one encoder's vectors into bytes and back.

    A row is a whole number of 8 bytes: the vector, after its scale as fp32 for int8, and zeros.

    Args:
        spec: of the encoder.
        dtype: "float32", "float16", or "int8", which takes half of the bytes of float16 and keeps a cosine of .9999.

    Raises:
        ConfigurationError: no such type, or an encoder whose width is not known.
    """

    def __init__(self, spec: EncoderSpec, dtype: str = "float16"):
        if dtype not in get_args(DType):
            raise ConfigurationError(
                f"dtype={dtype!r} is not a type of a store's vectors: {', '.join(get_args(DType))}."
            )
        if not spec.width:
            raise ConfigurationError(f"A store needs an encoder whose width is known, got {spec}.")
        self.spec, self.dtype, self.width = spec, dtype, spec.width
        self.used = 4 + self.width if dtype == "int8" else self.width * _TORCH[dtype].itemsize
        self.row_size = -(-self.used // 8) * 8

    def pack(self, persona: Persona) -> Rows:
        """Return the items of a persona, of each id the first.

        Raises:
            DataError: items without ids, or values that the type cannot hold.
            MismatchError: items of another encoder.
        """
        if not persona.spec.fits(self.spec):
            raise MismatchError(
                f"These items were encoded by {persona.spec}, and the store holds vectors of {self.spec}: encode them with "
                "the encoder of the store, or open a new namespace for the other one."
            )
        if persona.item_ids is None:
            raise DataError(
                "A store needs items with ids, by which they are deleted: encode items that carry an 'id'."
            )
        for name in persona.item_ids:
            check_id(name)
        times = np.full(len(persona), np.nan)
        if persona.timestamps is not None:
            times[:] = persona.timestamps.cpu().double().numpy()
        data = np.zeros((len(persona), self.row_size), np.uint8)
        data[:, : self.used] = self._bytes(persona.vectors.detach().cpu())
        rows = Rows(list(persona.item_ids), times, data)
        first = {name: i for i, name in reversed([*enumerate(rows.ids)])}
        return rows if len(first) == len(rows) else rows.select(sorted(first.values()))

    def _bytes(self, vectors: Tensor) -> np.ndarray:  # [N, used]
        if self.dtype != "int8":
            cast = vectors.to(_TORCH[self.dtype]).contiguous()
            if not cast.isfinite().all():
                raise DataError(
                    f"Vectors with values too large for {self.dtype}: make the store with dtype='float32'."
                )
            return cast.numpy().view(np.uint8).reshape(len(cast), self.used)
        values = vectors.float().numpy()
        if not np.isfinite(values).all():
            raise DataError("Vectors with values too large for float32 cannot be stored.")
        scale = np.abs(values).max(1, keepdims=True, initial=0) / np.float32(127)
        rounded = np.rint(values / np.where(scale > 0, scale, 1)).clip(-127, 127).astype(np.int8)
        return np.concatenate([scale.astype(np.float32).view(np.uint8), rounded.view(np.uint8)], axis=1)

    def unpack(self, rows: Rows) -> Persona:
        """Return the persona of rows: vectors in fp16 as stored, or in fp32; times if every item has one.

        Raises:
            DataError: a value that is not finite.
        """
        times = None if np.isnan(rows.times).any() else torch.from_numpy(rows.times)
        return Persona(self._vectors(rows.data), self.spec, tuple(rows.ids), times)

    def _vectors(self, data: np.ndarray) -> Tensor:  # [N, D]
        if self.dtype != "int8":
            return torch.from_numpy(data.view(self.dtype)[:, : self.width])
        scale = np.ascontiguousarray(data[:, :4]).view(np.float32)
        return torch.from_numpy(data[:, 4 : self.used].view(np.int8).astype(np.float32) * scale)
