"""`PersonaStore`: the personas of many users, by tenant and user id.

    with open_store("personas/", personalizer.spec, secret=...) as store:       # a folder of SQLite files
        store.append("user-17", personalizer.encode(items))                     # durable when it returns
        persona = store.get("user-17")
        store.tenant("acme").delete_user("user-17")                             # another tenant's user: not the same

Items are known by their ids: what is appended twice is kept once, and one text can be forgotten later without encoding
anything again. A store holds vectors, ids and times, never a text, and no user id: a key is the HMAC-SHA-256 of tenant
and id. Vectors are as private as the texts that they were made of.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from ..modeling import EncoderSpec, Persona


@dataclass(frozen=True)
class DeletionReceipt:
    """Confirmation that vectors are gone from every file of a store; of one on a server, from its memory until `compact`.

    Args:
        key: of the user, as the store knows them: a digest, not the id.
        items: number of deleted items; of several namespaces, in the one that had most of them.
        time: seconds since 1970 (UTC).
    """

    key: str
    items: int
    time: float


@dataclass(frozen=True)
class StoreStats:
    """Size of a store: of the tenant that it was asked of, and in bytes of all.

    Args:
        users: with at least one item.
        items: of all of them.
        size: of all files, or of the memory, in bytes.
    """

    users: int
    items: int
    size: int


class PersonaStore(ABC):
    """Personas of one encoder, of one tenant. Every method may be called from several threads and processes at once.

    A user id is any text of 1 to 256 characters. Appending, replacing and deleting are atomic per user, and durable when
    they return.
    """

    spec: EncoderSpec
    namespace: str

    @property
    @abstractmethod
    def tenant_name(self) -> str:
        """Name of the tenant whose users these are."""

    @abstractmethod
    def tenant(self, name: str) -> PersonaStore:
        """Return the same store for another tenant, who shares its files and sees none of its users.

        Args:
            name: of the tenant; "" is a tenant like any other.
        """

    def get(self, user: str) -> Persona | None:
        """Return a user's persona, oldest item first; None for an unknown user.

        A store may give the same object as long as the user does not change, so do not write into its vectors.

        Args:
            user: id.

        Raises:
            DamagedPersonaError: the items of this user are damaged.
        """
        return self.get_many([user])[0]

    @abstractmethod
    def get_many(self, users: Sequence[str]) -> list[Persona | None]:
        """Return the personas of several users, in their order; see `get`.

        Args:
            users: ids.
        """

    @abstractmethod
    def version(self, user: str) -> int:
        """Return a number that grows with every change of a user's items; 0 for an unknown user.

        It is the time of the change in microseconds since 1970, or a little more after several changes at once.

        Args:
            user: id.
        """

    @abstractmethod
    def append(self, user: str, items: Persona, *, expected_version: int | None = None) -> int:
        """Add newer items to a user's persona. Items whose ids are there already are left out.

        Args:
            user: id; a new one becomes a user.
            items: with `item_ids`.
            expected_version: write only if nobody else has changed the user since `version` said this.

        Returns:
            The version afterwards.

        Raises:
            DataError: items without ids, or no user id.
            MismatchError: items of another encoder, or another version than expected.
        """

    @abstractmethod
    def replace(self, user: str, items: Persona, *, expected_version: int | None = None) -> int:
        """Put items in the place of all that a user has. See `append`."""

    @abstractmethod
    def delete_items(self, user: str, item_ids: Collection[str]) -> DeletionReceipt:
        """Forget some items of a user, in all namespaces; ids that are not there are no error.

        Args:
            user: id.
            item_ids: of the items.

        Returns:
            The receipt, once the bytes are gone. It counts what an earlier call of this process deleted that ended with a
            `StoreError`.
        """

    @abstractmethod
    def delete_user(self, user: str) -> DeletionReceipt:
        """Forget a user with all items, in all namespaces; the receipt of an unknown user counts none.

        Args:
            user: id.

        Returns:
            The receipt, as of `delete_items`.
        """

    @abstractmethod
    def users(self) -> Iterator[str]:
        """Yield the keys of all users of this tenant: digests, not ids."""

    @abstractmethod
    def stats(self) -> StoreStats:
        """Count users and items, and measure the size."""

    @abstractmethod
    def compact(self) -> None:
        """Give back the space of what was deleted, and make short appends one again."""

    @abstractmethod
    def namespaces(self) -> dict[str, EncoderSpec]:
        """Return the encoder of every namespace by name, the active one first."""

    @abstractmethod
    def activate(self) -> None:
        """Make the namespace of this store the one that `open_store` opens where none is named: a single step.

        A new encoder is a new namespace: open it by name, fill it with the vectors of all users while the old one serves,
        activate it, and drop the old one. Deleting an item or a user deletes it in all namespaces.
        """

    @abstractmethod
    def drop_namespace(self, name: str) -> None:
        """Delete a namespace that is not in use any more, with all its vectors.

        Args:
            name: of a namespace that is neither active nor the one of this store.
        """

    @abstractmethod
    def close(self) -> None:
        """Close all connections, of all tenants."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
