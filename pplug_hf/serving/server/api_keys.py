"""API keys and their tenants. The file holds the SHA-256 of each key, never a key:

{"5e884898da28047151d0e56f8dc6292773603d0d6aabbdd62a11ef721d1542d8": "acme"}
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from ...errors import ConfigurationError, MissingFileError


class ApiKeys:
    """API keys and the tenants that they belong to.

    Args:
        tenants: tenant by the SHA-256 of a key, in hexadecimal. Several keys may be of one tenant.

    Raises:
        ConfigurationError: something else.
    """

    def __init__(self, tenants: dict[str, str]):
        for digest, tenant in tenants.items() if isinstance(tenants, dict) else [("", "")]:
            if not re.fullmatch(r"[0-9a-f]{64}", digest) or not isinstance(tenant, str) or not tenant:
                raise ConfigurationError(
                    'API keys are given as {"<SHA-256 of the key, 64 hexadecimal digits>": "<name of the tenant>"}; '
                    "printf %s KEY | sha256sum prints one."
                )
        self._tenants = dict(tenants)

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> ApiKeys:
        """Read a JSON file.

        Raises:
            MissingFileError: there is none.
            ConfigurationError: it holds something else.
        """
        if not Path(path).is_file():
            raise MissingFileError(f"There is no file of API keys {os.fspath(path)!r}.")
        try:
            return cls(json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, RecursionError) as error:
            if isinstance(error, ConfigurationError):
                raise
            raise ConfigurationError(f"The file of API keys {os.fspath(path)!r} is not valid JSON.") from None

    def __len__(self) -> int:
        return len(self._tenants)

    def tenant(self, authorization: str | None) -> str | None:
        """Return the tenant of a header `Authorization: Bearer KEY`; None if the key is unknown.

        Keys are looked up by their digest, so the time that it takes tells nothing of other keys.
        """
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        return self._tenants.get(hashlib.sha256(key.strip().encode("latin-1", "replace")).hexdigest())
