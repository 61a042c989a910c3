"""Socket that a server listens on, opened before anything says that the server is there."""

from __future__ import annotations

import os
import socket

from ..errors import ConfigurationError


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Args:
        host: address or name of this machine.
        port: 0 takes a free one.

    Raises:
        ConfigurationError: the port is taken or none at all, or the address is not one of this machine.
    """
    if not 0 <= port <= 65535:
        raise ConfigurationError(f"--port must be from 0 to 65535, got {port}.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048, reuse_port=False)
    except OSError as error:
        why = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        raise ConfigurationError(f"Cannot listen on {host}:{port}: {why}. Choose another --host or --port.") from error


def url(host: str, listening: socket.socket) -> str:
    """Return the address of a server, for people to open."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listening.getsockname()[1]}"
