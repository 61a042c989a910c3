"""Checks that every request passes: key, limits of size, number and time, the log line, the counters."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..rebinding import is_from_elsewhere
from .api_keys import ApiKeys
from .failures import ApiError, api_error
from .leaving import disconnected
from .limits import Limits
from .monitoring import Monitoring, place_of

logger = logging.getLogger("pplug_hf.server")

OPEN = ("/health", "/ready")  # without a key
_DRAINED = 16  # times the limit is read and thrown away, so that a client that only writes sees the answer


class Guard:
    """ASGI middleware around all routes. It reads the body, so that no route waits for a slow client.

    Args:
        app: the routes.
        keys: of tenants; None: whoever reaches the server is the tenant "".
        limits: see the class.
        monitoring: takes the figures.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys | None, limits: Limits, monitoring: Monitoring):
        self.app, self.keys, self.limits, self.monitoring = app, keys, limits, monitoring
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request = _Passing(scope, receive, send, self.limits)
        is_open = scope["path"] in OPEN
        self._count(0 if is_open else 1)
        try:
            if (
                not is_open
            ):  # nobody needs a key for the others: they take no room, and their bodies are not waited for
                if self._running > self.limits.concurrency:
                    raise ApiError(429, "too_many_requests", f"{self.limits.concurrency} requests are in progress.")
                self._admit(scope)
                await request.read_body()
            await self.app(scope, request.receive, request.send)
        except Exception as error:
            await self._failed(request, error)
        finally:
            self._count(0 if is_open else -1)
            self._note(request)
        return None

    def _count(self, change: int) -> None:
        self._running += change
        self.monitoring.running.set(self._running)

    def _admit(self, scope: Scope) -> None:
        """Find the tenant of a request. Without keys a browser is the only lock: pages from elsewhere are kept out."""
        if self.keys is None and is_from_elsewhere(scope):
            text = (
                "Without keys this server answers to the names of loopback alone, and to no web page from elsewhere: call it "
                "http://127.0.0.1 or localhost."
            )
            raise ApiError(421, "misdirected_request", text)
        tenant = "" if self.keys is None else self.keys.tenant(Headers(scope=scope).get("authorization"))
        if tenant is None:
            raise ApiError(
                401, "invalid_api_key", "The API key is missing or unknown: send Authorization: Bearer KEY."
            )
        scope.setdefault("state", {})["tenant"] = tenant
        if scope["path"].startswith("/v1/personas/"):  # ids may hold a slash: parts are decoded behind the routing
            scope["path"] = scope["raw_path"].partition(b"?")[0].decode("ascii", "replace")

    async def _failed(self, request: _Passing, error: Exception) -> None:
        known = api_error(error)
        if known.code == "internal_error" and not request.is_gone:
            logger.error("failed", extra={"fields": {"id": request.id, **place_of(error)}})
        if request.status is None and not request.is_gone:
            await known.response()(request.scope, request.receive, request.send)

    def _note(self, request: _Passing) -> None:
        route = getattr(request.scope.get("route"), "path", "other")
        status, seconds = request.status or 499, time.monotonic() - request.start  # 499: the client has left
        self.monitoring.requests.labels(route, status).inc()
        self.monitoring.seconds.labels(route).observe(seconds)
        fields = {"id": request.id, "method": request.scope["method"], "route": route, "status": status}
        facts = request.scope.get("state", {})
        fields |= {"seconds": round(seconds, 4), "tenant": facts.get("tenant"), **facts.get("facts", {})}
        logger.info("request", extra={"fields": fields})


class _Passing:
    """A request on its way: its body in memory, its answer with a limit of time for each piece."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, limits: Limits):
        self.scope, self._receive, self._send, self.limits = scope, receive, send, limits
        self.id, self.start = uuid.uuid4().hex, time.monotonic()
        self.status: int | None = None
        self.is_gone = False  # the client has left, or takes nothing
        self._body: bytes | None = b""

    async def read_body(self) -> None:
        """Read the whole body.

        Raises:
            ApiError: it is too large, or comes too slowly.
        """
        limit, parts, size = self.limits.body, [], 0
        try:
            async with asyncio.timeout(self.limits.client_seconds):
                more = True
                while more:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        self.is_gone = True
                        raise disconnected()
                    size += len(message.get("body", b""))
                    more = message.get("more_body", False) and size <= _DRAINED * limit
                    if size <= limit:
                        parts.append(message.get("body", b""))
        except TimeoutError:
            text = f"The request was not sent within {self.limits.client_seconds:g} seconds."
            raise ApiError(408, "request_timeout", text) from None
        if size > limit:
            raise ApiError(413, "body_too_large", f"The body is larger than {limit} bytes: send less at once.")
        self._body = b"".join(parts)

    async def receive(self) -> Message:
        """Give the app the body, and then wait for the client to leave."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        message = await self._receive()
        self.is_gone |= self.status is None and message["type"] == "http.disconnect"
        return message

    async def send(self, message: Message) -> None:
        """Pass a piece of the answer on."""
        if message["type"] == "http.response.start":
            self.status = None if self.is_gone else message["status"]
            MutableHeaders(scope=message)["X-Request-ID"] = self.id
        try:
            async with asyncio.timeout(self.limits.client_seconds):
                await self._send(message)
        except (TimeoutError, OSError):
            self.is_gone = True
            raise ConnectionAbortedError("The client takes nothing.") from None
