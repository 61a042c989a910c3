"""A store in a folder, as SQLite files:

    store.json                     active namespace, digest of the secret
    secret                         made here unless one is given
    NAMESPACE/namespace.json       spec of the encoder, type of the vectors
    NAMESPACE/00.sqlite ...        users by their digest, 32 KB of items a row

A damaged file costs at most the users in it; each row has a checksum, so a damaged row costs its user alone.

Deleted bytes are overwritten by SQLite's `secure_delete`, with one gap: where it moves rows from one page of a table to
another, it leaves copies behind in the unused part of the old page. Of a long row only the first 489 bytes are in such a
page, and all others in pages of their own, which are overwritten as a whole. Every row here is made long and begins with
489 zeros.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import time
import uuid
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigurationError, DamagedStoreError, DataError, StoreError
from ..storage.files import locked, new_folder, read_json_object, write_text
from .backend import Backend, GoneError, Header, Place, check_version, damaged, next_version
from .keys import Key
from .packing import Packing, Rows
from .sqlite_pool import BUSY_SECONDS, PAGE_SIZE, Pool

STORE, NAMESPACE, SECRET = "store.json", "namespace.json", "secret"
FORMAT = 1
SHARDS = 16
OVERFLOW = PAGE_SIZE - 4  # bytes of a row in a page of its own
LOCAL = (PAGE_SIZE - 12) * 32 // 255 - 23  # bytes of a row in a page of the table, at least
CHUNK = 8 * OVERFLOW  # bytes a row, at most: with more of them, appending one item rewrites too much
_UNERASED = (
    "What was deleted stays deleted, but its bytes may be in the log: delete it again for a receipt, or compact again."
)
_INT64 = (1 << 63) - 1
CHUNKS = 1 << 20  # rows a user can have; their numbers are user * CHUNKS and following

_SCHEMA = f"""
    PRAGMA page_size = {PAGE_SIZE};
    PRAGMA auto_vacuum = INCREMENTAL;
    PRAGMA journal_mode = WAL;
    CREATE TABLE users(
        id INTEGER PRIMARY KEY, tenant BLOB NOT NULL, key BLOB NOT NULL, version INTEGER NOT NULL,
        items INTEGER NOT NULL, UNIQUE(tenant, key)
    );
    CREATE TABLE chunks(
        id INTEGER PRIMARY KEY, zeros BLOB NOT NULL, ids BLOB NOT NULL, times BLOB, checksum INTEGER NOT NULL,
        data BLOB NOT NULL, filling BLOB NOT NULL
    );
"""
_USER = "SELECT id, version FROM users WHERE tenant = ? AND key = ?"
_RANGE = f"BETWEEN ? * {CHUNKS} AND ? * {CHUNKS} + {CHUNKS - 1}"
_READ = f"""
    SELECT ids, times, checksum, data FROM users
    JOIN chunks ON chunks.id BETWEEN users.id * {CHUNKS} AND users.id * {CHUNKS} + {CHUNKS - 1}
    WHERE tenant = ? AND key = ? ORDER BY chunks.id
"""


class Shards(Backend):
    """Rows of one namespace in files, to which users are assigned by their digest.

    Args:
        folder: of the namespace.

    Raises:
        GoneError: there is no such folder.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self._folder = folder
        self._identity = _identity(folder)  # first: what is read next is of this namespace or of a later one
        values = _header(folder)
        header = Header.from_dict(values, str(folder / NAMESPACE))
        self.packing = Packing(header.spec, header.dtype)
        self._pools = [Pool(folder / _file(i), self.check) for i in range(values.get("shards", SHARDS))]

    def check(self) -> None:
        """Raise a `GoneError` if the namespace was dropped, even if there is another one of its name."""
        if _identity(self._folder) != self._identity:
            raise GoneError(self._folder.name)

    def _pool(self, key: Key) -> Pool:
        return self._pools[int.from_bytes(key.user[:4], "big") % len(self._pools)]

    def read(self, keys: Sequence[Key]) -> Iterator[Rows | None]:
        for key in keys:
            with self._pool(key).lent(key.user.hex()) as connection:
                chunks = connection.execute(_READ, key).fetchall()
            yield self._decode(chunks, key) if chunks else None

    def _decode(self, chunks: list[tuple[Any, ...]], key: Key) -> Rows:
        try:
            names, times, checksums, parts = zip(*chunks, strict=True)
            data = np.frombuffer(bytearray().join(parts), np.uint8).reshape(-1, self.packing.row_size)
            ids: list[list[str]] = json.loads(b"[" + b",".join(names) + b"]")
            ends = list(accumulate(map(len, ids)))
            found = _checksums(data, [0, *ends[:-1]], names, times)
        except (ValueError, IndexError, TypeError) as error:
            raise damaged(key) from error
        if found != list(checksums):
            raise damaged(key)
        if None in times:
            times = [b"\xff" * 8 * len(some) if when is None else when for some, when in zip(ids, times, strict=True)]
        return Rows([*chain(*ids)], np.frombuffer(bytearray().join(times)), data)

    def version(self, key: Key) -> int:
        with self._pool(key).lent(key.user.hex()) as connection:
            found = connection.execute(_USER, key).fetchone()
        return found[1] if found else 0

    def write(self, key: Key, rows: Rows, expected: int | None, *, keep: bool) -> int:
        with self._pool(key).transaction(key.user.hex()) as connection:
            user, version = connection.execute(_USER, key).fetchone() or (None, 0)
            check_version(key, version, expected)
            at, items = (user or 0) * CHUNKS, 0
            if keep and user is not None:
                known = connection.execute(f"SELECT id, ids FROM chunks WHERE id {_RANGE} ORDER BY id", (user, user))
                for at, names in known:  # noqa: B007
                    ids = _ids(names, key)
                    items, rows = items + len(ids), rows.without(ids)
                if not len(rows):
                    return version
            elif not len(rows) and user is None:
                return version
            items += len(rows)
            version = next_version(version)
            if user is None:
                inserted = connection.execute("INSERT INTO users VALUES (NULL, ?, ?, ?, 0)", (*key, version))
                user = inserted.lastrowid or 0
                at = user * CHUNKS
            elif keep:
                rows = self._chunk(connection, at, key) + rows
            else:
                connection.execute(f"DELETE FROM chunks WHERE id {_RANGE}", (user, user))
            _write(connection, at, rows)
            return version if _update(connection, user, version, items) else 0

    def _chunk(self, connection: sqlite3.Connection, at: int, key: Key) -> Rows:
        found = connection.execute("SELECT ids, times, checksum, data FROM chunks WHERE id = ?", (at,)).fetchall()
        return self._decode(found, key)

    def _delete(self, key: Key, ids: Collection[str] | None) -> Iterator[int]:
        with self._pool(key).transaction(key.user.hex()) as connection:
            user, version = connection.execute(_USER, key).fetchone() or (None, 0)
            deleted = items = 0
            if user is not None and ids is None:
                deleted = connection.execute("SELECT items FROM users WHERE id = ?", (user,)).fetchone()[0]
                connection.execute(f"DELETE FROM chunks WHERE id {_RANGE}", (user, user))
                connection.execute("DELETE FROM users WHERE id = ?", (user,))
            elif user is not None:
                gone = set(ids or ())
                chunks = connection.execute(f"SELECT id, ids FROM chunks WHERE id {_RANGE}", (user, user)).fetchall()
                for at, names in chunks:
                    here = _ids(names, key)
                    items += len(here)
                    if gone.isdisjoint(here):
                        continue
                    rows = self._chunk(connection, at, key)
                    left = rows.without(gone)
                    deleted += len(rows) - len(left)
                    connection.execute("DELETE FROM chunks WHERE id = ?", (at,))
                    _write(connection, at, left)
                if deleted:
                    _update(connection, user, next_version(version), items - deleted)
        yield deleted
        self._erase_log(self._pool(key), key.user.hex())

    def _erase_log(self, pool: Pool, user: str = "") -> None:
        """Bring all changes into the file itself and empty its log, where deleted bytes would stay."""
        end = time.monotonic() + BUSY_SECONDS
        with pool.lent(user, _UNERASED) as connection:
            # SQLite waits for readers here, but not for the checkpoint of another thread or process.
            while connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                if time.monotonic() > end:
                    raise StoreError(f"No receipt yet: a reader holds the log of {str(pool.path)!r}. {_UNERASED}")
                time.sleep(0.01)

    def users(self, tenant: bytes) -> Iterator[bytes]:
        for pool in self._pools:
            last = b""
            while True:  # in parts: a connection is not held while the caller works
                with pool.lent() as connection:
                    query = "SELECT key FROM users WHERE tenant = ? AND key > ? ORDER BY key LIMIT 1000"
                    found = connection.execute(query, (tenant, last)).fetchall()
                if not found:
                    break
                yield from (key for (key,) in found)
                last = found[-1][0]

    def count(self, tenant: bytes) -> tuple[int, int]:
        users = items = 0
        for pool in self._pools:
            with pool.lent() as connection:
                query = "SELECT count(*), coalesce(sum(items), 0) FROM users WHERE tenant = ?"
                some = connection.execute(query, (tenant,)).fetchone()
            users, items = users + some[0], items + some[1]
        return users, items

    def size(self) -> int:
        return sum(path.stat().st_size for pool in self._pools for path in pool.path.parent.glob(pool.path.name + "*"))

    def compact(self) -> None:
        for pool in self._pools:
            with pool.lent() as connection:
                connection.executescript("PRAGMA incremental_vacuum")  # `execute` would stop after one page
            self._erase_log(pool)

    def close(self) -> None:
        """Close all connections."""
        for pool in self._pools:
            pool.close()


def namespaces(folder: Path) -> list[Path]:
    """Return the folders of a store's namespaces, also of those that have lost their header."""
    found = folder.glob("[!.]*")
    return sorted(path for path in found if (path / NAMESPACE).is_file() or (path / _file(0)).is_file())


def _missing(path: Path) -> DamagedStoreError:
    return DamagedStoreError(f"{str(path)!r} is missing, and the vectors beside it are not: restore it from a backup.")


def _header(folder: Path) -> dict[str, Any]:
    try:
        return _settings(folder / NAMESPACE)
    except FileNotFoundError:
        raise GoneError(folder.name) from None


def _settings(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path, str(path), "restore it from a backup")
    except DataError as error:
        raise DamagedStoreError(str(error)) from error


def _identity(folder: Path) -> tuple[int, int]:
    """Return what tells a namespace from a later one of the same name: a file that is written once."""
    try:
        facts = (folder / NAMESPACE).stat()
    except FileNotFoundError:
        raise GoneError(folder.name) from None
    return facts.st_ino, facts.st_mtime_ns


def _file(shard: int) -> str:
    return f"{shard:02}.sqlite"


def _ids(names: bytes, key: Key) -> list[str]:
    """Return the ids of a chunk."""
    try:
        return [*json.loads(names)]
    except (ValueError, TypeError):
        raise damaged(key) from None


def _checksums(
    data: np.ndarray, starts: Sequence[int], ids: Sequence[bytes], times: Sequence[bytes | None]
) -> list[int]:
    """Return the checksum of each chunk: of its vectors a sum, as fast as memory, where a CRC costs more than reading.

    Args:
        data: [N, row size] of all chunks.
        starts: index of each chunk's first row.
        ids, times: of each chunk, as they are stored.
    """
    sums = np.add.reduceat(data.view(np.uint64).sum(axis=1), starts).tolist()
    facts = (zlib.crc32(names + (when or b"")) for names, when in zip(ids, times, strict=True))
    return [(words + fact) & _INT64 for words, fact in zip(sums, facts, strict=True)]


def _write(connection: sqlite3.Connection, at: int, rows: Rows) -> None:
    """Write rows as chunks from a number on."""
    ids = [json.dumps(name) for name in rows.ids]
    for start, end in _cuts([len(name) + 9 + rows.data.shape[1] for name in ids]):
        part = slice(start, end)
        names, data = f"[{','.join(ids[part])}]".encode(), rows.data[part].tobytes()
        times = None if np.isnan(rows.times[part]).all() else rows.times[part].tobytes()
        checksum = _checksums(rows.data[part], [0], [names], [times])[0]
        filling = bytes(_filling(len(names) + len(times or b"") + len(data)))
        values = (at, bytes(LOCAL), names, times, checksum, data, filling)
        connection.execute("INSERT OR REPLACE INTO chunks VALUES (?, ?, ?, ?, ?, ?, ?)", values)
        at += 1


def _cuts(sizes: list[int]) -> Iterator[tuple[int, int]]:
    """Yield start and end of chunks that hold as many items of given sizes as fit, but at least one."""
    start, size = 0, 0
    for i, more in enumerate(sizes):
        if i > start and size + more > CHUNK - 64:  # what SQLite itself writes of a row is less than 64 bytes
            yield start, i
            start, size = i, 0
        size += more
    if sizes:
        yield start, len(sizes)


def _filling(size: int) -> int:
    """Return the number of bytes to add to a row, so that no more than `LOCAL` of it are in a page of the table.

    SQLite leaves there what is more than whole pages, if that fits; so the last page must be nearly full.
    """
    last = (size + 24) % OVERFLOW  # 20 to 28 bytes are SQLite's own
    return 0 if 3600 <= last <= OVERFLOW - 12 else (3800 - last) % OVERFLOW


def _update(connection: sqlite3.Connection, user: int, version: int, items: int) -> int:
    """Set the version and the number of items of a user, forget one without items, and return the number."""
    if items:
        connection.execute("UPDATE users SET version = ?, items = ? WHERE id = ?", (version, items, user))
    else:
        connection.execute("DELETE FROM users WHERE id = ?", (user,))
    return items


class Folder(Place):
    """Namespaces as folders.

    Args:
        folder: of the store; made if there is none.
        check: digest of the secret.

    Raises:
        DataError: the folder holds something else.
        DamagedStoreError: it holds namespaces, and its `store.json` is missing or damaged.
    """

    def __init__(self, folder: Path, check: str):
        self._folder = folder
        self._open: dict[str, Shards] = {}
        with locked(folder):
            if not (folder / STORE).exists():
                if namespaces(folder):
                    raise _missing(folder / STORE)
                self._save({"format": FORMAT, "check": check, "active": ""})
        self.check = str(self._load().get("check"))

    def _load(self) -> dict[str, object]:
        path = self._folder / STORE
        values = _settings(path)
        if values.get("format") != FORMAT:
            raise DataError(
                f"{str(path)!r} has format {values.get('format')}, and this version reads format {FORMAT}."
            )
        return values

    def _save(self, values: Mapping[str, object]) -> None:
        write_text(self._folder / STORE, json.dumps(values, indent=1) + "\n")

    @property
    def active(self) -> str:
        return str(self._load()["active"])

    def headers(self) -> dict[str, Header]:
        if self._leftovers():  # or the work of a process that is alive and holds the lock
            with locked(self._folder):
                self._remove_leftovers()
        headers = {}
        for folder in namespaces(self._folder):
            try:
                headers[folder.name] = Header.from_dict(_header(folder), str(folder / NAMESPACE))
            except GoneError:
                if folder.is_dir():  # not dropped meanwhile, which is one step
                    raise _missing(folder / NAMESPACE) from None
        return headers

    def create(self, name: str, header: Header) -> None:
        with locked(self._folder):
            if (self._folder / name / NAMESPACE).exists():
                return
            if (self._folder / name).exists():
                raise ConfigurationError(
                    f"{str(self._folder / name)!r} holds something else than a namespace: move it away, or choose another "
                    "name with namespace=."
                )
            with new_folder(self._folder / name) as staging:
                for i in range(SHARDS):
                    with closing(sqlite3.connect(staging / _file(i))) as connection:
                        connection.executescript(_SCHEMA)
                write_text(staging / NAMESPACE, json.dumps(header.to_dict() | {"shards": SHARDS}, indent=1) + "\n")

    def open(self, name: str) -> Shards:
        if name in self._open:
            with suppress(GoneError):
                self._open[name].check()
                return self._open[name]
            self._open.pop(name).close()
        self._open[name] = Shards(self._folder / name)
        return self._open[name]

    def activate(self, name: str) -> None:
        with locked(self._folder):
            self._save(self._load() | {"active": name})

    def drop(self, name: str) -> None:
        if name in self._open:
            self._open.pop(name).close()
        with locked(self._folder):
            os.rename(self._folder / name, self._folder / f".{name}-{uuid.uuid4().hex}")
            self._remove_leftovers()

    def _leftovers(self) -> list[Path]:
        """Return the folders of namespaces that are being made or dropped, or were when a process was killed."""
        return [path for path in self._folder.glob(f".*-{'[0-9a-f]' * 32}") if path.is_dir()]

    def _remove_leftovers(self) -> None:
        """Delete them; the folder is locked, so none is of a process that is alive."""
        for path in self._leftovers():
            shutil.rmtree(path)

    def close(self) -> None:
        for shards in self._open.values():
            shards.close()
