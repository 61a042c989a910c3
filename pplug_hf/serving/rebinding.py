"""Requests of web pages that had their own name point at this machine (DNS rebinding), so that a browser lets them ask."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit


def is_rebound(scope: Mapping[str, Any]) -> bool:
    """Return true for a request that came over loopback and names another host than this machine.

    Args:
        scope: of ASGI. A gateway on the same machine must send the host that it connects to, as nginx does by default.
    """
    server = scope.get("server")
    named = next((value for name, value in scope["headers"] if name == b"host"), b"")
    return bool(server) and _is_loopback(server[0]) and not _is_loopback(_without_port(named.decode("latin-1")))


def _without_port(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
