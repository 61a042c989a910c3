"""`pplug-hf store`: what a store holds, the persona of one user, and deletion."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from ..errors import ConfigurationError, MissingFileError
from ..serving.open_store import open_store
from ..serving.store import PersonaStore
from .options import StoreSettings

_NOTHING = (
    "Nothing was deleted: this tenant's store holds no such items. Check --user, --items and --tenant, unless this repeats a "
    "deletion that ended with an error: then its bytes are gone now."
)


def store(settings: StoreSettings) -> None:
    """Do one thing and print what was done, as JSON.

    Args:
        settings: see the fields.

    Raises:
        PPlugError: settings or a store that cannot be used.
    """
    needed = {"export": ("user", "output"), "delete-items": ("user", "items"), "delete-user": ("user",)}
    missing = [name for name in needed.get(settings.action, ()) if getattr(settings, name) is None]
    if missing:
        raise ConfigurationError(f"--action {settings.action} needs {' and '.join(f'--{name}' for name in missing)}.")
    taken = needed.get(settings.action, ())
    given = [name for name in ("user", "items", "output") if getattr(settings, name) is not None]
    if useless := [f"--{name}" for name in given if name not in taken]:
        others = [action for action, names in needed.items() if set(given) <= set(names)]
        raise ConfigurationError(
            f"--action {settings.action} takes no {' or '.join(useless)}: leave it out"
            + (f", or name another one, --action {' or '.join(others)}." if others else ".")
        )
    with open_store(settings.store, None, tenant=settings.tenant, namespace=settings.namespace) as opened:
        done = _act(opened, settings)
    print(json.dumps(done, indent=1))
    if settings.action in ("delete-user", "delete-items") and not done["items"]:
        print(_NOTHING, file=sys.stderr)


def _act(opened: PersonaStore, settings: StoreSettings) -> dict[str, object]:
    user = settings.user or ""
    if settings.action == "delete-items":
        return asdict(opened.delete_items(user, settings.items or ()))
    if settings.action == "delete-user":
        return asdict(opened.delete_user(user))
    if settings.action == "export":
        persona = opened.get(user)
        if persona is None:
            raise MissingFileError("The store holds no item of this user.")
        persona.save_pretrained(settings.output or "")
        return {"items": len(persona), "folder": settings.output}
    if settings.action == "compact":
        opened.compact()
    names = {name: str(spec) for name, spec in opened.namespaces().items()}
    return asdict(opened.stats()) | {"namespace": opened.namespace, "namespaces": names}
