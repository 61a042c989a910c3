"""Clients that leave before their answer is there: the work on it ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable
from typing import TypeVar

from fastapi import Request

from .failures import ApiError

T = TypeVar("T")


async def unless_left(request: Request, left: threading.Event, work: Awaitable[T]) -> T:
    """Wait for work, which `left` ends if the client leaves before it is done.

    Args:
        request: of the client, with its body read.
        left: set when the client leaves; the work looks at it.
        work: for the answer.
    """

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(leave())
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            left.set()
        return await working
    finally:
        working.cancel()
        leaving.cancel()


def disconnected() -> ApiError:
    """Return the error for a client that has left, which nobody reads."""
    return ApiError(400, "disconnected", "The client has left.")
