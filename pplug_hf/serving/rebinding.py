"""Requests that a web page from elsewhere has a browser send to this machine.

Browsers let every page send a form or text, and keep the answer from it. They give it the answer if the page has had its own
name point at this machine (DNS rebinding).
"""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit


def is_from_elsewhere(scope: Mapping[str, Any]) -> bool:
    """Return true for a request that came over loopback and names another host, or an origin on another host.

    Args:
        scope: of ASGI. A gateway on the same machine must send the host that it connects to, as nginx does by default.
    """
    server = scope.get("server")
    headers = [(name, value.decode("latin-1")) for name, value in scope["headers"]]
    named = [f"//{value}" for name, value in headers if name == b"host"] or [""]
    named += [value for name, value in headers if name == b"origin"]
    return bool(server) and _is_loopback(server[0]) and not all(_is_loopback(_host(url)) for url in named)


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
