"""`open_store`: a folder of SQLite files, or a Valkey or Redis server, as a `PersonaStore`."""

from __future__ import annotations

import copy
import os
import re
import secrets
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Self

from ..errors import ConfigurationError, DamagedStoreError, DataError, MismatchError, MissingFileError
from ..modeling import EncoderSpec, Persona
from ..storage.files import atomic_write, locked
from .backend import GoneError, Header, Place, damaged
from .keys import Key, Keys, check_id, secret_from_environment
from .packing import Packing, Rows
from .recent import Recent
from .resp_store import Server
from .sqlite_store import SECRET, STORE, Folder, namespaces
from .store import DeletionReceipt, PersonaStore, StoreStats

FIRST = "default"  # namespace of a new store


def open_store(
    place: str | os.PathLike,
    spec: EncoderSpec | None,
    *,
    secret: bytes | str | None = None,
    tenant: str = "",
    namespace: str | None = None,
    dtype: str | None = None,
) -> PersonaStore:
    """Open a store, or make one.

    Args:
        place: a folder on a local disk; or redis://..., rediss://..., valkey://... of a server.
        spec: of the encoder, as in `personalizer.spec`; None takes that of the store, which must be there then.
        secret: what user ids are hashed with, at least 16 characters, the same for ever (default: the variable
            PPLUG_STORE_SECRET; else, of a folder, its file `secret`, made at first with rights for the owner alone).
        tenant: whose users these are.
        namespace: personas of one encoder (default: the active one). A new one is made empty; see `PersonaStore.activate`.
        dtype: of the vectors of a new namespace: "float32", "float16" (default) or "int8".

    Raises:
        MismatchError: the namespace is of another encoder, or the secret is not the store's.
        MissingFileError: no `spec` was given, and there is no such store or namespace.
        ConfigurationError: settings that cannot be used.
        DataError: the store is damaged.
        StoreError: the disk is full, or the server does not answer.
    """
    url = os.fspath(place)
    if "://" in url:
        keys = Keys(secret or secret_from_environment() or "")
        # What is in front of an @ may be a password, and is in no message.
        shown = re.sub("//.*@", "//", url)
        return _open(Server(url, keys.check), shown, spec, keys, tenant, namespace, dtype)
    folder = Path(url)
    if folder.is_file():
        raise ConfigurationError(f"{url!r} is a file; a store is a folder.")
    if spec is None and not (folder / STORE).is_file() and not namespaces(folder):
        raise MissingFileError(f"There is no store in {url!r}: check the path. The first encoding makes a store.")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    keys = Keys(secret or secret_from_environment() or _own_secret(folder))
    return _open(Folder(folder, keys.check), url, spec, keys, tenant, namespace, dtype)


def _own_secret(folder: Path) -> str:
    """Return the secret in the folder of a store; a new one the first time."""
    path = folder / SECRET
    with locked(folder):
        if not path.exists() or not path.read_text().strip():  # empty: its writer was killed
            with atomic_write(path) as staging, open(staging, "x", opener=partial(os.open, mode=0o600)) as file:
                file.write(secrets.token_hex())
                file.flush()
                os.fsync(file.fileno())  # before the store that needs it is made
    return path.read_text().strip()


def _open(
    place: Place, url: str, spec: EncoderSpec | None, keys: Keys, tenant: str, namespace: str | None, dtype: str | None
) -> PersonaStore:
    if place.check != keys.check:
        raise MismatchError(
            f"This secret is not the one that the store {url!r} was made with, and with another one all its "
            "users are unknown: look at PPLUG_STORE_SECRET, which goes before the file `secret` of a folder."
        )
    name = namespace or place.active or FIRST
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ConfigurationError(
            f"namespace={name!r} cannot be a name: it takes up to 64 letters, digits, '.', '_' and '-'."
        )
    headers = place.headers()
    if name not in headers:
        if name == place.active:
            raise DamagedStoreError(
                f"The active namespace {f'{url}/{name}'!r} is missing: restore it from a backup, or open another one by name "
                "and activate it."
            )
        if spec is None:
            raise MissingFileError(f"The store {url!r} has no namespace {name!r}, but {', '.join(headers) or 'none'}.")
        header = Header(spec, dtype or "float16")
        Packing(header.spec, header.dtype)  # raises
        place.create(name, header)
        headers = place.headers()
    if not place.active:
        place.activate(name)
    header = headers[name]
    if spec is not None and not spec.fits(header.spec):
        fitting = [other for other, header in headers.items() if spec.fits(header.spec)]
        remedy = f"pass namespace={fitting[0]!r}" if fitting else "pass the name of a new namespace and fill it"
        raise MismatchError(
            f"Namespace {name!r} of the store {url!r} holds vectors of the encoder {header.spec}, and {spec} was given: "
            f"vectors of two encoders cannot be mixed. Use the store's encoder, or {remedy}."
        )
    if dtype is not None and dtype != header.dtype:
        raise MismatchError(f"Namespace {name!r} of the store {url!r} holds {header.dtype}, not {dtype}.")
    return KeyedStore(place, name, keys, tenant)


class KeyedStore(PersonaStore):
    """Store of a place: ids become keys, and personas rows.

    Args:
        place: of the namespaces.
        namespace: name of one.
        keys: made with the secret.
        tenant: whose users these are.
    """

    def __init__(self, place: Place, namespace: str, keys: Keys, tenant: str):
        self._place, self._keys, self._tenant = place, keys, tenant
        self._backend = place.open(namespace)
        self._packing = self._backend.packing
        self.spec, self.namespace = self._packing.spec, namespace
        self._recent = Recent()

    @property
    def tenant_name(self) -> str:
        return self._tenant

    def tenant(self, name: str) -> Self:
        other = copy.copy(self)
        other._tenant = name
        return other

    def get(self, user: str) -> Persona | None:
        key = self._keys.user(self._tenant, user)
        version = self._backend.version(key)
        if not version:
            self._recent.forget(key)
            return None
        if (persona := self._recent.get(key, version)) is None and (persona := self.get_many([user])[0]) is not None:
            self._recent.put(key, version, persona)
        return persona

    def get_many(self, users: Sequence[str]) -> list[Persona | None]:
        keys = [self._keys.user(self._tenant, user) for user in users]
        pairs = zip(keys, self._backend.read(keys), strict=True)
        return [None if rows is None else self._unpacked(key, rows) for key, rows in pairs]

    def _unpacked(self, key: Key, rows: Rows) -> Persona:
        try:
            return self._packing.unpack(rows)
        except DataError as error:  # NaN or infinity
            raise damaged(key) from error

    def version(self, user: str) -> int:
        return self._backend.version(self._keys.user(self._tenant, user))

    def append(self, user: str, items: Persona, *, expected_version: int | None = None) -> int:
        return self._write(user, items, expected_version, keep=True)

    def replace(self, user: str, items: Persona, *, expected_version: int | None = None) -> int:
        return self._write(user, items, expected_version, keep=False)

    def _write(self, user: str, items: Persona, expected: int | None, *, keep: bool) -> int:
        key = self._keys.user(self._tenant, user)
        return self._backend.write(key, self._packing.pack(items), expected, keep=keep)

    def delete_items(self, user: str, item_ids: Collection[str]) -> DeletionReceipt:
        ids = {item_ids} if isinstance(item_ids, str) else set(item_ids)
        for name in ids:
            check_id(name)
        return self._delete(user, ids)

    def delete_user(self, user: str) -> DeletionReceipt:
        return self._delete(user, None)

    def _delete(self, user: str, ids: set[str] | None) -> DeletionReceipt:
        key = self._keys.user(self._tenant, user)
        self._recent.forget(key)
        deleted, headers = 0, self._place.headers()
        for name in dict.fromkeys([*headers, self.namespace]):
            with suppress(GoneError):  # dropped meanwhile, with everything in it
                # What this store wrote while another process dropped its namespace, no other one finds.
                backend = self._place.open(name) if name in headers else self._backend
                deleted = max(deleted, backend.delete(key, ids))
        return DeletionReceipt(key.user.hex(), deleted, time.time())

    def users(self) -> Iterator[str]:
        return (key.hex() for key in self._backend.users(self._keys.tenant(self._tenant)))

    def stats(self) -> StoreStats:
        return StoreStats(*self._backend.count(self._keys.tenant(self._tenant)), self._backend.size())

    def compact(self) -> None:
        self._backend.compact()

    def namespaces(self) -> dict[str, EncoderSpec]:
        active, headers = self._place.active, self._place.headers()
        return {name: headers[name].spec for name in sorted(headers, key=lambda name: name != active)}

    def activate(self) -> None:
        self._place.activate(self.namespace)

    def drop_namespace(self, name: str) -> None:
        if name not in self._place.headers():
            raise ConfigurationError(f"The store has no namespace {name!r}: {', '.join(self._place.headers())}.")
        if name in (self.namespace, self._place.active):
            raise ConfigurationError(f"Namespace {name!r} is in use: activate another one and open that first.")
        self._place.drop(name)

    def close(self) -> None:
        self._place.close()
