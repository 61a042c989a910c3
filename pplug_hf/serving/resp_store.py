"""A store in a Valkey or Redis server. For every user of a namespace two values in one slot of a cluster:

    pplug:TENANT:{USER}:NAMESPACE:m    version [8], then ["id", time], for each item
    pplug:TENANT:{USER}:NAMESPACE:v    vectors, one behind the other

and one hash `pplug:store` with the headers of the namespaces, the active one, and the digest of the secret.

Changes are as durable as the server: with `appendonly yes` and `appendfsync always` they are on disk when a call returns.
Deleted bytes are gone from its memory at once, and from its files after `compact`.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any

import numpy as np

from ..errors import ConfigurationError, StoreError
from ..optional import require
from .backend import Backend, GoneError, Header, Place, check_version, damaged, next_version
from .keys import Key
from .packing import Packing, Rows

STORE = "pplug:store"
TIMEOUT = 30
COUNTED = 1000  # users asked for at once when all are counted

_NONE = Rows([], np.zeros(0), np.zeros((0, 0), np.uint8))
# What the server writes its memory into: the setting that says whether it does, command, and whether it runs.
_FILES = (
    ("appendonly", "bgrewriteaof", "aof_rewrite_in_progress"),
    ("save", "bgsave", "rdb_bgsave_in_progress"),
)

# Writes only if nobody else has since the version was read, so it may also be sent twice.
_WRITE = """
if redis.call('GETRANGE', KEYS[1], 0, 7) ~= ARGV[1] then return 0 end
if ARGV[2] == 'append' then
    redis.call('SETRANGE', KEYS[1], 0, ARGV[3])
    redis.call('APPEND', KEYS[1], ARGV[4])
    redis.call('APPEND', KEYS[2], ARGV[5])
elseif ARGV[2] == 'replace' then
    redis.call('MSET', KEYS[1], ARGV[3] .. ARGV[4], KEYS[2], ARGV[5])
else
    redis.call('UNLINK', KEYS[1], KEYS[2])
end
return 1
"""

logger = logging.getLogger(__name__)


@contextmanager
def _as_store_errors() -> Iterator[None]:
    redis = require("redis", "redis", "A store in a server")
    try:
        yield
    except (redis.RedisError, redis.exceptions.RedisClusterException) as error:
        # A server that answers has refused; one whose answer is lost may have done its work.
        is_refused = isinstance(error, redis.ResponseError)
        outcome = "Nothing was written." if is_refused else "A change may have been written or not: repeat it."
        raise StoreError(f"The server of the store does not do its work: {error}. {outcome}") from error


class Values(Backend):
    """Rows of one namespace.

    Args:
        client: of the redis package.
        namespace: its name.
        header: of the namespace, as it is stored.
    """

    def __init__(self, client: Any, namespace: str, header: bytes):
        super().__init__()
        found = _header(f"namespace:{namespace}", header)
        self.packing, self.header = Packing(found.spec, found.dtype), header
        self._client, self._namespace = client, namespace
        self._is_cluster = not hasattr(client, "connection_pool")
        self._script = client.register_script(_WRITE)

    def _names(self, key: Key) -> list[str]:
        return [f"pplug:{key.tenant.hex()}:{{{key.user.hex()}}}:{self._namespace}:{part}" for part in "mv"]

    def read(self, keys: Sequence[Key]) -> Iterator[Rows | None]:
        with _as_store_errors():
            if self._is_cluster:  # where no pipeline takes MGET
                found = [self._client.mget(self._names(key)) for key in keys]
            else:
                with self._client.pipeline(transaction=False) as pipeline:
                    for key in keys:
                        pipeline.mget(self._names(key))
                    found = pipeline.execute()
        for key, (facts, data) in zip(keys, found, strict=True):
            yield None if facts is None else self._decode(key, facts, data)

    def _decode(self, key: Key, facts: bytes, data: bytes | None) -> Rows:
        names, times = _items(key, facts)
        try:
            matrix = np.frombuffer(bytearray(data or b""), np.uint8).reshape(len(names), self.packing.row_size)
        except ValueError as error:
            raise damaged(key) from error
        return Rows(names, times, matrix)

    def version(self, key: Key) -> int:
        with _as_store_errors():
            return int.from_bytes(self._client.getrange(self._names(key)[0], 0, 7), "big")

    def write(self, key: Key, rows: Rows, expected: int | None, *, keep: bool) -> int:
        while True:
            with _as_store_errors():
                if self._client.hget(STORE, f"namespace:{self._namespace}") != self.header:
                    raise GoneError(self._namespace)
                facts = self._client.get(self._names(key)[0]) or b""
            version = int.from_bytes(facts[:8], "big")
            check_version(key, version, expected)
            new = rows.without(_items(key, facts)[0]) if keep else rows
            if not len(new) and (keep or not facts):
                return version
            how = "append" if keep and facts else "replace"
            written = self._write(key, facts[:8], how if len(new) else "delete", new)
            if written is not None:
                return written

    def _write(self, key: Key, seen: bytes, how: str, rows: Rows) -> int | None:
        """Write if the version is still the one that was seen, and return the new one; None if it is another."""
        version = next_version(int.from_bytes(seen, "big")) if len(rows) else 0
        times = [None if np.isnan(when) else when for when in rows.times.tolist()]
        facts = "".join(json.dumps(pair, separators=(",", ":")) + "," for pair in zip(rows.ids, times, strict=True))
        values = [seen, how, version.to_bytes(8, "big"), facts, rows.data.tobytes()]
        with _as_store_errors():
            return version if self._script(self._names(key), values) else None

    def _delete(self, key: Key, ids: Collection[str] | None) -> Iterator[int]:
        is_done = False
        while not is_done:
            with _as_store_errors():
                facts, data = self._client.mget(self._names(key))
            if facts is None:
                yield 0
                return
            if ids is None:
                deleted, how, left = len(data or b"") // self.packing.row_size, "delete", _NONE
            else:
                rows = self._decode(key, facts, data)
                left = rows.without(ids)
                deleted, how = len(rows) - len(left), "replace" if len(left) else "delete"
            yield deleted
            is_done = (ids is not None and not deleted) or self._write(key, facts[:8], how, left) is not None

    def users(self, tenant: bytes) -> Iterator[bytes]:
        seen = set()  # a scan may give a key twice
        for name in self._scan(f"pplug:{tenant.hex()}:*:{self._namespace}:m"):
            user = bytes.fromhex(name.split(b"{")[1].split(b"}")[0].decode())
            if user not in seen:
                seen.add(user)
                yield user

    def _scan(self, pattern: str) -> Iterator[bytes]:
        with _as_store_errors():
            yield from self._client.scan_iter(pattern, count=1000)

    def count(self, tenant: bytes) -> tuple[int, int]:
        number, size, remaining = 0, 0, self.users(tenant)
        while users := list(islice(remaining, COUNTED)):
            with _as_store_errors(), self._client.pipeline(transaction=False) as pipeline:
                for user in users:
                    pipeline.strlen(self._names(Key(tenant, user))[1])
                size += sum(pipeline.execute())
            number += len(users)
        return number, size // self.packing.row_size

    def size(self) -> int:
        with _as_store_errors():
            return int(self._client.info("memory")["used_memory"])

    def compact(self) -> None:
        """Write the server's files again, without what was deleted, and wait for the end of it."""
        with _as_store_errors():
            for setting, start, running in _FILES:
                if self._client.config_get(setting).get(setting) in (None, "", "no"):
                    continue
                while self._client.info("persistence")[running]:
                    time.sleep(0.05)
                getattr(self._client, start)()
                time.sleep(0.1)
                while self._client.info("persistence")[running]:
                    time.sleep(0.05)


def _items(key: Key, facts: bytes) -> tuple[list[str], np.ndarray]:
    """Return the ids and times of the first value, behind the version."""
    try:
        pairs = json.loads(b"[" + facts[8:-1] + b"]")
        times = np.array([np.nan if when is None else when for _, when in pairs], np.float64)
    except (ValueError, TypeError) as error:
        raise damaged(key) from error
    return [name for name, _ in pairs], times


def _header(field: str, value: bytes) -> Header:
    try:
        values = json.loads(value)
    except ValueError:
        values = {}
    return Header.from_dict(values, f"{field!r} of {STORE!r}")


class Server(Place):
    """Namespaces of a server.

    Args:
        url: redis://..., rediss://..., valkey://..., valkeys://... or unix://...
        check: digest of the secret.

    Raises:
        StoreError: it does not answer.
        MissingPackageError: the package redis is missing.
    """

    def __init__(self, url: str, check: str):
        redis = require("redis", "redis", "A store in a server")
        url = re.sub("^valkey", "redis", url.replace("valkeys://", "rediss://"))
        options = {"socket_timeout": TIMEOUT, "socket_connect_timeout": TIMEOUT}
        try:
            self._client = redis.Redis.from_url(url, **options)
        except ValueError:  # its text may hold a part of the password
            raise ConfigurationError(
                "This URL of a server cannot be used: write redis://:PASSWORD@HOST:PORT/0, with special characters of the "
                "password percent-encoded (/ is %2F)."
            ) from None
        with _as_store_errors():
            if self._client.info("cluster").get("cluster_enabled"):
                self._client.close()
                self._client = redis.RedisCluster.from_url(url, **options)
            self._client.hsetnx(STORE, "check", check)
            self.check = self._text("check")
        self._warn()
        self._open: dict[str, Values] = {}

    def _text(self, field: str) -> str:
        return (self._client.hget(STORE, field) or b"").decode()

    def _warn(self) -> None:
        """Say if the server forgets what it has confirmed; one that does not tell its settings is trusted."""
        redis = require("redis", "redis", "A store in a server")
        with suppress(redis.ResponseError):
            settings = self._client.config_get("appendonly", "appendfsync", "maxmemory-policy")
            if (settings.get("appendonly"), settings.get("appendfsync")) != ("yes", "always"):
                logger.warning(
                    "The server of this store loses its last changes when it is killed: set appendonly yes and appendfsync "
                    "always, unless the items can be appended again."
                )
            if settings.get("maxmemory-policy", "noeviction") != "noeviction":
                logger.warning("The server of this store may evict users: set maxmemory-policy noeviction.")

    @property
    def active(self) -> str:
        with _as_store_errors():
            return self._text("active")

    def headers(self) -> dict[str, Header]:
        with _as_store_errors():
            fields = {name.decode(): value for name, value in self._client.hgetall(STORE).items()}
        names = sorted(name for name in fields if name.startswith("namespace:"))
        return {name.partition(":")[2]: _header(name, fields[name]) for name in names}

    def create(self, name: str, header: Header) -> None:
        with _as_store_errors():
            self._client.hsetnx(STORE, f"namespace:{name}", json.dumps(header.to_dict()))

    def open(self, name: str) -> Values:
        with _as_store_errors():
            found = self._client.hget(STORE, f"namespace:{name}")
        if found is None:
            raise GoneError(name)
        if name not in self._open or self._open[name].header != found:
            self._open[name] = Values(self._client, name, found)
        return self._open[name]

    def activate(self, name: str) -> None:
        with _as_store_errors():
            self._client.hset(STORE, "active", name)

    def drop(self, name: str) -> None:
        self._open.pop(name, None)
        with _as_store_errors():
            for key in self._client.scan_iter(f"pplug:*:{name}:[mv]", count=1000):
                self._client.unlink(key)
            # Last: what a killed process leaves is in a namespace that deletions reach and that can be dropped again.
            self._client.hdel(STORE, f"namespace:{name}")

    def close(self) -> None:
        self._client.close()
