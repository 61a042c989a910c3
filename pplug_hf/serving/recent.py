"""Personas that a process has read from a store, so that a user who asks again is not read again."""

from __future__ import annotations

import os
from collections import OrderedDict
from threading import Lock
from weakref import WeakSet

from ..modeling import Persona
from .keys import Key

LIMIT = 64 * 2**20  # bytes of vectors
_ALL: WeakSet[Recent] = WeakSet()


class Recent:
    """The personas that were read last, each with the version of the user at that time. Threads may share it.

    What a plug makes of a persona is remembered with the object, so it pays twice to get the same one again.

    Args:
        limit: bytes of vectors that are kept.
    """

    def __init__(self, limit: int = LIMIT):
        self._limit, self._bytes, self._lock = limit, 0, Lock()
        self._kept: OrderedDict[Key, tuple[int, Persona]] = OrderedDict()
        _ALL.add(self)

    def get(self, key: Key, version: int) -> Persona | None:
        """Return a user's persona if it was read at this version; another version is forgotten.

        Args:
            key: of the user.
            version: of the user now.
        """
        with self._lock:
            found = self._kept.get(key)
            if found is not None and found[0] == version:
                self._kept.move_to_end(key)
                return found[1]
            self._forget(key)
            return None

    def put(self, key: Key, version: int, persona: Persona) -> None:
        """Keep a persona.

        Args:
            key: of the user.
            version: that the user had before the persona was read: if it was changed meanwhile, it is read again.
            persona: what was read.
        """
        with self._lock:
            self._forget(key)
            self._kept[key] = version, persona
            self._bytes += persona.vectors.nbytes
            while self._bytes > self._limit:
                self._forget(next(iter(self._kept)))

    def forget(self, key: Key) -> None:
        """Drop a user."""
        with self._lock:
            self._forget(key)

    def _forget(self, key: Key) -> None:
        if (found := self._kept.pop(key, None)) is not None:
            self._bytes -= found[1].vectors.nbytes


def _begin_anew() -> None:
    """Empty all of them in a forked process, where a lock may be held by a thread that does not exist there."""
    for one in _ALL:
        one._kept, one._bytes, one._lock = OrderedDict(), 0, Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
