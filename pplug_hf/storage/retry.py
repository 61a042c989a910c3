"""Retries where the Hub's client has none: a transfer that breaks, or a Hub that is busy for a moment."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from .hub_errors import FAILURES, chain_of, header_of, is_incomplete_download, status_of

_WAITS = (1, 4)  # seconds
_MAX_WAIT = 60  # seconds that the Hub may ask us to wait
_BROKEN_CONNECTION = ("ReadError", "WriteError", "RemoteProtocolError")  # httpx errors

T = TypeVar("T")
logger = logging.getLogger(__name__)


def with_retries(call: Callable[[], T]) -> T:
    """Return the result of `call`, tried up to three times while its errors look temporary."""
    for wait in _WAITS:
        try:
            return call()
        except FAILURES as error:
            asked = header_of(error, "Retry-After") if status_of(error) == 429 else ""
            wait = int(asked) if asked.isdecimal() else wait
            if not _is_temporary(error) or wait > _MAX_WAIT:
                raise
            logger.warning("The Hub did not finish (%s): trying again in %d s.", type(error).__name__, wait)
            time.sleep(wait)
    return call()


def _is_temporary(error: BaseException) -> bool:
    status = status_of(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    return is_incomplete_download(error) or any(type(e).__name__ in _BROKEN_CONNECTION for e in chain_of(error))
