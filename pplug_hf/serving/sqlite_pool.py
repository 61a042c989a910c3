"""Connections to a SQLite file: each is lent to one thread at a time, and none is carried over a fork.

A forked process must not use, nor even close, the connections of its parent: locks of a file belong to the process that
took them. Before a fork, all connections are therefore given back and closed, and both processes open new ones.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from weakref import WeakSet

from ..errors import DamagedStoreError, StoreError

BUSY_SECONDS = 30
KEPT = 4  # idle connections of one file
PAGE_SIZE = 4096

_SETTINGS = f"""
    PRAGMA busy_timeout = {BUSY_SECONDS * 1000};
    PRAGMA synchronous = FULL;
    PRAGMA secure_delete = ON;
    PRAGMA journal_size_limit = {1 << 20};
    PRAGMA temp_store = MEMORY;
    PRAGMA cell_size_check = ON;
    PRAGMA trusted_schema = OFF;
"""


class Pool:
    """Connections to one file, opened when they are needed.

    Args:
        path: of a file that exists.
        check: raises if the file at `path` is not the one that was meant any more. It is called with every connection.
    """

    def __init__(self, path: Path, check: Callable[[], None]):
        self.path, self._check = path, check
        self._idle: list[sqlite3.Connection] = []
        self._lent = 0
        self._lock = threading.Lock()
        self._returned = threading.Condition(self._lock)
        self._is_closed = False
        _POOLS.add(self)

    @contextmanager
    def lent(self, user: str = "", outcome: str = "Nothing was written.") -> Iterator[sqlite3.Connection]:
        """Lend a connection.

        Args:
            user: key of a user, for messages.
            outcome: what a `StoreError` says of the changes.

        Raises:
            StoreError: the disk is full, or another process holds the file for too long.
            DamagedStoreError: the file is damaged or missing.
        """
        with self._lock:
            if self._is_closed:
                raise StoreError("This store is closed: open it again.")
            self._lent += 1
            connection = self._idle.pop() if self._idle else None
        is_sound = False
        try:
            connection = connection or self._open()
            self._check()  # afterwards: what is open now is what was checked
            yield connection
            is_sound = True
        except sqlite3.DatabaseError as error:
            self._check()
            raise self._error(error, user, outcome) from error
        finally:
            with self._lock:
                if connection is not None:
                    if is_sound and len(self._idle) < KEPT and not self._is_closed:
                        self._idle.append(connection)
                    else:
                        connection.close()
                self._lent -= 1
                self._returned.notify_all()

    @contextmanager
    def transaction(self, user: str = "") -> Iterator[sqlite3.Connection]:
        """Lend a connection that alone may write, until the block ends; its changes are durable then, or undone."""
        with self.lent(user) as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    connection.rollback()
                raise

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None, check_same_thread=False
        )
        connection.executescript(_SETTINGS)
        return connection

    def _error(self, error: sqlite3.DatabaseError, user: str, outcome: str) -> Exception:
        whose = f" (user {user})" if user else ""
        if isinstance(error, sqlite3.OperationalError) and self.path.is_file():
            return StoreError(
                f"{str(self.path)!r} cannot be used now{whose}: {error}. {outcome} Look for a full disk, missing rights, or a "
                "process that holds the file."
            )
        return DamagedStoreError(
            f"{str(self.path)!r} is damaged or missing{whose}: {error}. Other files of the store are not affected: restore "
            "this one from a backup."
        )

    def close(self) -> None:
        """Close all connections; those that are lent, when they come back."""
        with self._lock:
            self._is_closed = True
            self._close_idle()

    def _close_idle(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def suspend(self) -> None:
        """Wait for all connections, close them, and lend none until `resume`."""
        self._lock.acquire()
        while self._lent:
            self._returned.wait()
        self._close_idle()

    def resume(self) -> None:
        """Lend connections again."""
        self._lock.release()


_POOLS: WeakSet[Pool] = WeakSet()
_FORKING = threading.Lock()  # two threads may fork at once
_suspended: list[Pool] = []


def _before_fork() -> None:
    _FORKING.acquire()
    for pool in list(_POOLS):
        pool.suspend()
        _suspended.append(pool)


def _after_fork() -> None:
    while _suspended:
        _suspended.pop().resume()
    _FORKING.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
