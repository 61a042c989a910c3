"""A store in a folder, as SQLite files:

    store.json                     active namespace, digest of the secret
    secret                         made here unless one is given
    NAMESPACE/namespace.json       spec of the encoder, type of the vectors
    NAMESPACE/00.sqlite ...        users by their digest, 16 items a row

A damaged file costs at most the users in it; each row has a checksum, so a damaged row costs its user alone.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import uuid
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, StoreError
from ..storage.files import locked, read_json_object, write_text
from .backend import Backend, Header, Place, check_version, next_version
from .keys import Key
from .packing import Packing, Rows
from .sqlite_pool import PAGE_SIZE, Pool

STORE, NAMESPACE, SECRET = "store.json", "namespace.json", "secret"
FORMAT = 1
SHARDS = 16
CHUNK = 16  # items a row: with more of them, appending one rewrites too much
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
        id INTEGER PRIMARY KEY, ids TEXT NOT NULL, times BLOB, checksum INTEGER NOT NULL, data BLOB NOT NULL
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
        packing: of its vectors.
    """

    def __init__(self, folder: Path, packing: Packing):
        self.packing = packing
        number = read_json_object(folder / NAMESPACE, str(folder / NAMESPACE)).get("shards", SHARDS)
        self._pools = [Pool(folder / _file(i)) for i in range(number)]

    def _pool(self, key: Key) -> Pool:
        return self._pools[int.from_bytes(key.user[:4], "big") % len(self._pools)]

    def read(self, keys: Sequence[Key]) -> Iterator[Rows | None]:
        for key in keys:
            name = key.user.hex()
            with self._pool(key).lent(name) as connection:
                chunks = connection.execute(_READ, key).fetchall()
            yield self._decode(chunks, name) if chunks else None

    def _decode(self, chunks: list[tuple[Any, ...]], user: str) -> Rows:
        ids: list[str] = []
        times, parts = [], []
        for names, when, checksum, data in chunks:
            if _checksum(names, when, data) != checksum:
                raise DataError(
                    f"The items of user {user} are damaged: delete the user or replace the items; no other user is affected."
                )
            found = json.loads(names)
            ids += found
            times.append(np.full(len(found), np.nan) if when is None else np.frombuffer(when))
            parts.append(data)
        data = np.frombuffer(bytearray().join(parts), np.uint8).reshape(len(ids), self.packing.row_size)
        return Rows(ids, np.concatenate(times), data)

    def version(self, key: Key) -> int:
        with self._pool(key).lent(key.user.hex()) as connection:
            found = connection.execute(_USER, key).fetchone()
        return found[1] if found else 0

    def write(self, key: Key, rows: Rows, expected: int | None, *, keep: bool) -> int:
        name = key.user.hex()
        with self._pool(key).transaction(name) as connection:
            user, version = connection.execute(_USER, key).fetchone() or (None, 0)
            check_version(key, version, expected)
            at = (user or 0) * CHUNKS
            if keep and user is not None:
                known = connection.execute(f"SELECT id, ids FROM chunks WHERE id {_RANGE} ORDER BY id", (user, user))
                last, at = "[]", at
                for at, last in known:  # noqa: B007
                    rows = rows.without(json.loads(last))
                if not len(rows):
                    return version
                if len(json.loads(last)) < CHUNK:
                    rows = self._chunk(connection, at, name) + rows
                else:
                    at += 1
            elif not len(rows) and user is None:
                return version
            version = next_version(version)
            if not keep and user is not None:
                connection.execute(f"DELETE FROM chunks WHERE id {_RANGE}", (user, user))
            if user is None:
                inserted = connection.execute("INSERT INTO users VALUES (NULL, ?, ?, ?, 0)", (*key, version))
                user = inserted.lastrowid or 0
                at = user * CHUNKS
            _write(connection, at, rows)
            return version if _update(connection, user, version) else 0

    def _chunk(self, connection: sqlite3.Connection, at: int, user: str) -> Rows:
        found = connection.execute("SELECT ids, times, checksum, data FROM chunks WHERE id = ?", (at,)).fetchall()
        return self._decode(found, user)

    def delete(self, key: Key, ids: Collection[str] | None) -> int:
        name = key.user.hex()
        with self._pool(key).transaction(name) as connection:
            user, version = connection.execute(_USER, key).fetchone() or (None, 0)
            deleted = 0
            if user is not None and ids is None:
                deleted = connection.execute("SELECT items FROM users WHERE id = ?", (user,)).fetchone()[0]
                connection.execute(f"DELETE FROM chunks WHERE id {_RANGE}", (user, user))
                connection.execute("DELETE FROM users WHERE id = ?", (user,))
            elif user is not None:
                gone = set(ids or ())
                chunks = connection.execute(f"SELECT id, ids FROM chunks WHERE id {_RANGE}", (user, user)).fetchall()
                for at, names in chunks:
                    if gone.isdisjoint(json.loads(names)):
                        continue
                    rows = self._chunk(connection, at, name)
                    left = rows.without(gone)
                    deleted += len(rows) - len(left)
                    connection.execute("DELETE FROM chunks WHERE id = ?", (at,))
                    _write(connection, at, left)
                if deleted:
                    _update(connection, user, next_version(version))
        self._erase_log(self._pool(key), name)
        return deleted

    def _erase_log(self, pool: Pool, user: str) -> None:
        """Bring all changes into the file itself and empty its log, where deleted bytes would stay."""
        with pool.lent(user) as connection:
            if connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                raise StoreError(
                    f"The items of user {user} are deleted, but a reader holds the log of {str(pool.path)!r}, where their "
                    "bytes remain: delete them again for a receipt."
                )

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
                connection.execute("PRAGMA incremental_vacuum").fetchall()
            self._erase_log(pool, "")

    def close(self) -> None:
        """Close all connections."""
        for pool in self._pools:
            pool.close()


def _file(shard: int) -> str:
    return f"{shard:02}.sqlite"


def _checksum(ids: str, times: bytes | None, data: bytes) -> int:
    """Return a sum in 63 bits over everything in a row: at the speed of memory, where a CRC would cost more than reading."""
    words = int(np.frombuffer(data, np.uint64).sum())
    return (words + zlib.crc32(ids.encode() + (times or b""))) & (1 << 63) - 1


def _write(connection: sqlite3.Connection, at: int, rows: Rows) -> None:
    """Write rows as chunks from a number on."""
    for chunk, start in enumerate(range(0, len(rows), CHUNK)):
        part = slice(start, start + CHUNK)
        ids, data = json.dumps(rows.ids[part], separators=(",", ":")), rows.data[part].tobytes()
        times = None if np.isnan(rows.times[part]).all() else rows.times[part].tobytes()
        values = (at + chunk, ids, times, _checksum(ids, times, data), data)
        connection.execute("INSERT OR REPLACE INTO chunks VALUES (?, ?, ?, ?, ?)", values)


def _update(connection: sqlite3.Connection, user: int, version: int) -> int:
    """Set the version and the number of items of a user, forget one without items, and return the number."""
    names = connection.execute(f"SELECT ids FROM chunks WHERE id {_RANGE}", (user, user)).fetchall()
    items = sum(len(json.loads(ids)) for (ids,) in names)
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
    """

    def __init__(self, folder: Path, check: str):
        self._folder = folder
        self._open: dict[str, Shards] = {}
        with locked(folder):
            if not (folder / STORE).exists():
                self._save({"format": FORMAT, "check": check, "active": ""})
        self.check = str(self._load().get("check"))

    def _load(self) -> dict[str, Any]:
        path = str(self._folder / STORE)
        values = read_json_object(path, path, "restore it from a backup")
        if values.get("format") != FORMAT:
            raise DataError(f"{path!r} has format {values.get('format')}, and this version reads format {FORMAT}.")
        return values

    def _save(self, values: dict[str, Any]) -> None:
        write_text(self._folder / STORE, json.dumps(values, indent=1) + "\n")

    @property
    def active(self) -> str:
        return str(self._load()["active"])

    def headers(self) -> dict[str, Header]:
        paths = sorted(self._folder.glob(f"[!.]*/{NAMESPACE}"))
        return {path.parent.name: Header.from_dict(read_json_object(path, str(path)), str(path)) for path in paths}

    def create(self, name: str, header: Header) -> None:
        with locked(self._folder):
            if (self._folder / name).exists():
                return
            staging = self._folder / f".{name}-{uuid.uuid4().hex}"
            staging.mkdir(mode=0o700)
            try:
                for i in range(SHARDS):
                    with closing(sqlite3.connect(staging / _file(i))) as connection:
                        connection.executescript(_SCHEMA)
                write_text(staging / NAMESPACE, json.dumps(header.to_dict() | {"shards": SHARDS}, indent=1) + "\n")
                os.rename(staging, self._folder / name)
            finally:
                shutil.rmtree(staging, ignore_errors=True)

    def open(self, name: str) -> Shards:
        if name not in self._open:
            header = self.headers()[name]
            self._open[name] = Shards(self._folder / name, Packing(header.spec, header.dtype))
        return self._open[name]

    def activate(self, name: str) -> None:
        with locked(self._folder):
            self._save(self._load() | {"active": name})

    def drop(self, name: str) -> None:
        if name in self._open:
            self._open.pop(name).close()
        gone = self._folder / f".{name}-{uuid.uuid4().hex}"
        os.rename(self._folder / name, gone)
        shutil.rmtree(gone)

    def close(self) -> None:
        for shards in self._open.values():
            shards.close()
