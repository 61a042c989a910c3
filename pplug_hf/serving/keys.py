"""Keys of tenants and users: what a store knows of an id is its HMAC-SHA-256.

Without the secret nobody can tell from a store whether a user is in it. Every id is bytes to the HMAC, so `../`, NUL or
two look-alike letters are users like any other, and different ones.
"""

from __future__ import annotations

import hmac
import os
from typing import NamedTuple

from ..errors import ConfigurationError, DataError, kind_of

MAX_ID = 256
MIN_SECRET = 16
SECRET_VARIABLE = "PPLUG_STORE_SECRET"
_NEW_SECRET = "python -c 'import secrets; print(secrets.token_hex())'"


class Key(NamedTuple):
    """A user in a store: digests of the tenant [16] and of tenant and id [32]."""

    tenant: bytes
    user: bytes


class Keys:
    """Maker of keys.

    Args:
        secret: at least 16 bytes or characters; the same for ever, or all users are unknown.

    Raises:
        ConfigurationError: a shorter secret.
    """

    def __init__(self, secret: bytes | str):
        self._tenants: dict[str, bytes] = {}
        self._secret = secret.encode() if isinstance(secret, str) else secret
        if not self._secret:
            raise ConfigurationError(
                f"A store on a server needs a secret of at least {MIN_SECRET} characters: set {SECRET_VARIABLE} to the one that it was made with, or for a new "
                f"store to the output of {_NEW_SECRET}."
            )
        if len(self._secret) < MIN_SECRET:
            raise ConfigurationError(
                f"The secret of a store must be at least {MIN_SECRET} characters long, got {len(self._secret)}: make one "
                f"with {_NEW_SECRET}."
            )

    def _digest(self, *parts: bytes) -> bytes:
        # Lengths first: no two lists of parts are the same bytes.
        message = b"".join([len(part).to_bytes(8, "big") + part for part in parts])
        return hmac.digest(self._secret, message, "sha256")

    def tenant(self, name: str) -> bytes:
        """Return the digest [16] of a tenant, by which its users are counted."""
        if name not in self._tenants:
            self._tenants[name] = self._digest(b"tenant", _bytes(name))[:16]
        return self._tenants[name]

    def user(self, tenant: str, user: str) -> Key:
        """Return the key of a user.

        Raises:
            DataError: no user id.
        """
        check_id(user)
        return Key(self.tenant(tenant), self._digest(b"user", _bytes(tenant), _bytes(user)))

    @property
    def check(self) -> str:
        """A digest by which a store recognises its secret."""
        return self._digest(b"check").hex()


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # any text, lone surrogates too


def check_id(value: object) -> None:
    """Raise a `DataError` unless an id, of a user or an item, is a text of 1 to 256 characters."""
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_ID:
        got = f"a text of {len(value)}" if isinstance(value, str) else kind_of(value)
        raise DataError(f"Ids of users and items are texts of 1 to {MAX_ID} characters, got {got}.")


def secret_from_environment() -> str | None:
    """Return the secret in PPLUG_STORE_SECRET; None if there is none."""
    return os.environ.get(SECRET_VARIABLE) or None
