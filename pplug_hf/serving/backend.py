"""Base classes of a kind of store: the rows of keys in one namespace, and the namespaces of one place."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DamagedPersonaError, DamagedStoreError, MismatchError, StoreError
from ..modeling import EncoderSpec
from .keys import Key
from .packing import Packing, Rows


@dataclass(frozen=True)
class Header:
    """A namespace: the encoder whose vectors it holds, and the type of the vectors."""

    spec: EncoderSpec
    dtype: str

    def to_dict(self) -> dict[str, object]:
        """Return the fields, as JSON takes them."""
        return {"spec": self.spec.to_dict(), "dtype": self.dtype}

    @classmethod
    def from_dict(cls, values: dict[str, Any], name: str) -> Header:
        """Return the header that `to_dict` gave.

        Args:
            values: the fields.
            name: of what they were read from, for messages.

        Raises:
            DamagedStoreError: they are not a header.
        """
        try:
            return cls(EncoderSpec.from_dict(values["spec"]), str(values["dtype"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise DamagedStoreError(f"{name} is damaged (no spec and dtype): restore it from a backup.") from error


class GoneError(StoreError):
    """A namespace is not there any more, or another one has its name."""

    def __init__(self, name: str):
        super().__init__(
            f"The namespace {name!r} was dropped or replaced by another process: open the store again. Nothing was written."
        )


class Backend(ABC):
    """Rows of one namespace. See `PersonaStore` for what the methods promise."""

    packing: Packing

    def __init__(self) -> None:
        self._unconfirmed: dict[tuple[Key, frozenset[str] | None], int] = {}

    @abstractmethod
    def read(self, keys: Sequence[Key]) -> Iterator[Rows | None]:
        """Yield the rows of users, in their order."""

    @abstractmethod
    def version(self, key: Key) -> int:
        """Return the version of a user's rows."""

    @abstractmethod
    def write(self, key: Key, rows: Rows, expected: int | None, *, keep: bool) -> int:
        """Append rows, or put them in the place of those that are there, and return the version.

        Args:
            key: of the user.
            rows: the new ones.
            expected: version, or None.
            keep: append.
        """

    def delete(self, key: Key, ids: Collection[str] | None) -> int:
        """Delete rows by their ids, or all, and return how many were deleted, now or by a call that ended with an error."""
        call = key, None if ids is None else frozenset(ids)
        deleted = earlier = self._unconfirmed.get(call, 0)
        for now in self._delete(key, ids):
            deleted = now or earlier
            if deleted:
                self._unconfirmed[call] = deleted
        self._unconfirmed.pop(call, None)
        return deleted

    @abstractmethod
    def _delete(self, key: Key, ids: Collection[str] | None) -> Iterator[int]:
        """Yield the number of rows as soon as they may be deleted, and end when their bytes are gone; the last one counts."""

    @abstractmethod
    def users(self, tenant: bytes) -> Iterator[bytes]:
        """Yield the digests of a tenant's users."""

    @abstractmethod
    def count(self, tenant: bytes) -> tuple[int, int]:
        """Return the number of a tenant's users and of their items."""

    @abstractmethod
    def size(self) -> int:
        """Return the size in bytes."""

    @abstractmethod
    def compact(self) -> None:
        """See `PersonaStore.compact`."""


class Place(ABC):
    """Namespaces of one store.

    Attributes:
        check: digest by which the store recognises its secret.
        active: name of the namespace that is opened where none is named.
    """

    check: str

    @property
    @abstractmethod
    def active(self) -> str: ...

    @abstractmethod
    def headers(self) -> dict[str, Header]:
        """Return the headers of all namespaces by name, sorted. Vectors that are in none of them are gone by then."""

    @abstractmethod
    def create(self, name: str, header: Header) -> None:
        """Make an empty namespace, unless there is one of this name."""

    @abstractmethod
    def open(self, name: str) -> Backend:
        """Return the backend of a namespace; the same one as long as the namespace is there.

        Raises:
            GoneError: there is none of this name.
        """

    @abstractmethod
    def activate(self, name: str) -> None:
        """Make a namespace the active one."""

    @abstractmethod
    def drop(self, name: str) -> None:
        """Delete a namespace with everything in it."""

    @abstractmethod
    def close(self) -> None:
        """Close all connections."""


def damaged(key: Key) -> DamagedPersonaError:
    """Return the error for a user whose rows cannot be read."""
    return DamagedPersonaError(
        f"The items of user {key.user.hex()} are damaged: delete the user or replace the items. No other user is affected."
    )


def check_version(key: Key, version: int, expected: int | None) -> None:
    """Raise a `MismatchError` unless a user's version is the expected one, or none is expected."""
    if expected is not None and version != expected:
        raise MismatchError(
            f"User {key.user.hex()} is at version {version}, and version {expected} was expected: somebody else has changed "
            "the items. Read them again, and try again."
        )


def next_version(version: int) -> int:
    """Return a greater version: microseconds since 1970, so that a user who was deleted gets no version of before."""
    return max(version + 1, time.time_ns() // 1000)
