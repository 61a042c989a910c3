"""Service behind the routes: an engine, a store of personas, their limits and figures."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, TypeVar

from ...errors import DamagedPersonaError, DataError, EngineError, MismatchError, PPlugError
from ...modeling import Persona, Personalizer
from ...modeling.encoders import check_finite
from ..engine import Engine
from ..store import PersonaStore
from .failures import ApiError
from .leaving import disconnected
from .limits import Limits
from .monitoring import Monitoring, now

T = TypeVar("T")

_CHUNK = 32  # texts that are encoded at once


class Found(NamedTuple):
    """A user's persona as a request gets it: "applied", "unknown" to the store, or "none" asked for."""

    persona: Persona | None
    state: str

    @property
    def headers(self) -> dict[str, str]:
        """The facts that go with an answer."""
        return {"X-Persona": self.state, "X-Persona-Items": str(0 if self.persona is None else len(self.persona))}


@dataclass
class Service:
    """An engine and a store behind the routes.

    Args:
        engine: answers.
        store: of the personas; its tenant "" is the one without keys.
        limits: see the class.
        temperature: of requests that name none.

    Raises:
        MismatchError: the store holds vectors of another encoder than a plug reads.
    """

    engine: Engine
    store: PersonaStore
    limits: Limits = field(default_factory=Limits)
    temperature: float = 0.0
    patience: ClassVar = 1.0  # seconds

    def __post_init__(self) -> None:
        for name, personalizer in self.engine.personalizers.items():
            if not personalizer.spec.fits(self.store.spec):
                raise MismatchError(
                    f"The plug {name!r} reads vectors of the encoder {personalizer.spec}, and the store holds those of "
                    f"{self.store.spec}: serve it with a store of its own."
                )
        self.monitoring = Monitoring(lambda: self.engine.waiting)
        self.started = now()
        self._pool = ThreadPoolExecutor(self.limits.concurrency + 8, "pplug-request")
        # Every answer of a stream is read by a thread, which must not be one that other requests wait for.
        self._readers = ThreadPoolExecutor(self.limits.concurrency * self.limits.choices, "pplug-stream")
        self._watch = ThreadPoolExecutor(1, "pplug-watch")  # never waits for requests
        self._encoder = ThreadPoolExecutor(1, "pplug-encode")  # its queue is fair, which a lock is not
        self._checked: tuple[float, PPlugError | None] = (-1.0, None)  # when, and what was wrong
        self._checking: Future[None] | None = None

    @property
    def personalizer(self) -> Personalizer:
        """The personalizer that encodes items: the default plug's, as every plug reads the same vectors."""
        return next(iter(self.engine.personalizers.values()))

    async def run(self, function: Callable[..., T], *arguments: object) -> T:
        """Call a function that waits, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    def start(self, function: Callable[..., object], *arguments: object) -> None:
        """Call a function in a thread, and do not wait for it."""
        self._pool.submit(function, *arguments)

    def read(self, function: Callable[..., object], *arguments: object) -> None:
        """Call a function that reads a stream of the engine in a thread, and do not wait for it."""
        self._readers.submit(function, *arguments)

    async def check(self) -> None:
        """Ask the engine its known question, at most once a second. While it waits behind a batch, the last answer counts.

        Raises:
            PPlugError: it did not answer, or otherwise.
        """
        if self._checking is None or self._checking.done():
            self._checking = self._watch.submit(self._check)
        await asyncio.wait([asyncio.wrap_future(self._checking)], timeout=self.patience)
        if error := self._checked[1]:
            raise error

    def _check(self) -> None:
        at, error = self._checked
        if time.monotonic() > at + 1:
            try:
                self.engine.check()
                error = None
            except PPlugError as failure:
                error = failure
            except Exception as failure:
                error = EngineError(f"The engine failed ({type(failure).__name__}).")
            self._checked = (time.monotonic(), error)

    def close(self) -> None:
        """End all threads, the engine and the store."""
        self.engine.close()
        for pool in (self._pool, self._readers, self._encoder, self._watch):
            pool.shutdown(wait=False, cancel_futures=True)
        self.store.close()

    # ---- personas ------------------------------------------------------------------------------------------

    def of_tenant(self, tenant: str) -> PersonaStore:
        """Return the store of a tenant."""
        return self.store.tenant(tenant) if tenant else self.store

    def known(self, tenant: str, user: str) -> Persona | None:
        """Return a user's persona; None for an unknown user.

        Raises:
            DamagedPersonaError: it is damaged.
            StoreError: the store cannot be read now.
        """
        persona = self.of_tenant(tenant).get(user)
        if persona is not None:
            try:
                check_finite(persona.vectors)
            except DataError as error:
                raise DamagedPersonaError(f"A stored persona is damaged: {error}") from error
        return persona

    def find(self, tenant: str, user: str | None, required: bool = False) -> Found:
        """Return the persona for a request.

        Raises:
            ApiError: it is unknown and required.
            DamagedPersonaError: it is damaged.
        """
        if user is None:
            return Found(None, "none")
        persona = self.known(tenant, user)
        is_known = persona is not None and len(persona) > 0
        if required and not is_known:
            raise unknown()
        self.monitoring.empty.append(float(not is_known))
        return Found(persona if is_known else None, "applied" if is_known else "unknown")

    def encode(
        self, texts: list[str], ids: list[str], times: list[float], left: threading.Event | None = None
    ) -> Persona:
        """Return new items of a user as vectors. Requests take turns after each chunk of texts.

        Args:
            texts: of the items.
            ids: likewise.
            times: likewise.
            left: set when the client leaves, which ends the work.

        Raises:
            DataError: something in them is not a text.
            ApiError: the client has left.
        """
        import torch

        distinct = sorted(dict.fromkeys(texts), key=len)  # a chunk is as long as its longest text
        found: dict[str, torch.Tensor] = {}
        for start in range(0, len(distinct), _CHUNK):
            if left is not None and left.is_set():
                raise disconnected()
            chunk = distinct[start : start + _CHUNK]
            vectors = self._encoder.submit(self.personalizer.encode, chunk).result().vectors.cpu()
            found.update(zip(chunk, vectors, strict=True))
        rows = torch.stack([found[text] for text in texts]) if texts else torch.zeros(0, self.store.spec.width or 0)
        return Persona(rows, self.store.spec, tuple(ids), torch.tensor(times, dtype=torch.float64))


def unknown() -> ApiError:
    """Return the error for a user who is not there, or is another tenant's: a stranger cannot tell which."""
    return ApiError(404, "persona_not_found", "There is no persona of this user.", "persona.user")
