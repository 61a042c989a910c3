"""A cache of the part of a soft prompt that does not depend on the query.

The hidden vectors gelu(W1 h_i + b1) of equation (4) depend on the items and the plug's weights alone, and are nearly all
of the work of a soft prompt. Where no gradient is needed they are computed at a persona's first query. They are
kept outside of the objects, so they are neither saved nor copied. They are dropped with the persona or the plug, with
any change to either, and, least recently used first, beyond `LIMIT` bytes per plug.

Letters: N items of one user, D encoder width, M projector width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from .encoders import state_of
from .persona import Persona
from .plug import PersonaPlug

LIMIT = 2**28  # bytes; a batch that needs more is computed piece by piece, and nothing of it is kept


def get_or_compute(
    plug: PersonaPlug, items: Sequence[Persona | Tensor]
) -> tuple[list[Tensor], list[Tensor] | None, list[Tensor | None] | None]:
    """Return the items of histories as `batch_histories` takes them.

    Args:
        plug: which will weight them.
        items: one persona or matrix [N, D] per row; rows may share one. Personas alone are remembered.

    Returns:
        Item vectors [N, D] on the plug's device and in its dtype; their hidden vectors [N, M]; their ages in days [N].
        None in place of the hidden vectors where gradients are needed, weights are not whole (sharded over processes),
        or memory would not do; None in place of the ages unless the plug asks for them, and of a row's whose items lack
        times.
    """
    users: Any = list(dict.fromkeys(items))
    ages = None
    if plug.aggregator.needs_ages:
        made_ages = {user: _ages(user, plug.no_persona) for user in users}
        ages = [made_ages[user] for user in items]
    if all(isinstance(user, Persona) for user in users) and _may_remember(plug, users):
        known = dict(zip(users, _caches.setdefault(plug, _Cache()).of(plug, users), strict=True))
        return [known[user][0] for user in items], [known[user][1] for user in items], ages
    vectors = {u: (u.vectors if isinstance(u, Persona) else u).to(plug.no_persona) for u in users}
    return [vectors[user] for user in items], None, ages


def _ages(user: Persona | Tensor, like: Tensor) -> Tensor | None:
    """Return the days between each item and the newest of its history, [N]; None where times are missing."""
    if not len(user):
        return like.new_zeros(0)
    if not isinstance(user, Persona) or user.timestamps is None:
        return None
    return ((user.timestamps.max() - user.timestamps) / 86400).to(like)


def _may_remember(plug: PersonaPlug, users: Sequence[Persona]) -> bool:
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    D, M, _, _ = plug.config.sizes
    weight = plug.projector.hidden.weight
    whole = type(weight) is nn.Parameter and weight.shape == (M, D)
    return whole and sum(map(len, users)) * (D + M) * weight.element_size() <= LIMIT


class _Cache:
    """The items of personas for one plug, the most recently used last. Threads may share it."""

    def __init__(self) -> None:
        self._state: object = None
        self._entries: OrderedDict[ref[Persona], tuple[object, tuple[Tensor, Tensor]]] = OrderedDict()
        self._bytes = 0
        self._lock = RLock()  # a persona may go at any moment, also while its thread is in here

    def of(self, plug: PersonaPlug, users: Sequence[Persona]) -> list[tuple[Tensor, Tensor]]:
        state = _state(plug)
        return [self._found(user, state) or self._made(plug, user, state) for user in users]

    def _found(self, user: Persona, state: object) -> tuple[Tensor, Tensor] | None:
        with self._lock:
            if self._state != state:
                self._state, self._bytes = state, 0
                self._entries.clear()
            seen, items = self._entries.get(ref(user), (None, None))
            if items is None or seen != state_of(user.vectors):
                return None
            self._entries.move_to_end(ref(user))
            return items

    def _made(self, plug: PersonaPlug, user: Persona, state: object) -> tuple[Tensor, Tensor]:
        seen = state_of(user.vectors)
        items = plug.project(user.vectors.to(plug.no_persona))
        with self._lock:
            if self._state == state:  # no other thread has seen other weights meanwhile
                self._forget(ref(user))
                self._entries[ref(user, self._forget)] = seen, items
                self._bytes += _bytes(items)
                while self._bytes > LIMIT:
                    self._forget(next(iter(self._entries)))
        return items

    def _forget(self, user: ref[Persona]) -> None:
        with self._lock:
            if (entry := self._entries.pop(user, None)) is not None:
                self._bytes -= _bytes(entry[1])


_caches: WeakKeyDictionary[PersonaPlug, _Cache] = WeakKeyDictionary()


def _state(plug: PersonaPlug) -> tuple[object, ...]:
    """Return a value that changes with everything but the persona that its cached items depend on."""
    layer, device = plug.projector.hidden, plug.no_persona.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    weights = [state_of(tensor) for tensor in (*layer.parameters(), *layer.buffers())]
    return plug.config.normalize, plug.no_persona.dtype, autocast, weights


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
