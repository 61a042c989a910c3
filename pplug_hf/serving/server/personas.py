"""Routes of personas: counts and times, never vectors."""

from __future__ import annotations

import threading
from typing import Annotated
from urllib.parse import unquote_to_bytes

from fastapi import APIRouter, Depends, Request

from ...errors import DataError, MismatchError
from ...modeling import Persona
from ...tasks.items import history_text, parse_date, seconds
from .bodies import ItemBody, ItemsBody
from .failures import ApiError
from .leaving import unless_left
from .monitoring import now
from .service import Service, unknown

router = APIRouter(prefix="/v1/personas")


def decoded(text: str) -> str:
    """Return an id of a path or header, which is percent-encoded UTF-8.

    Raises:
        ApiError: it is not UTF-8, empty, or too long.
    """
    try:
        value = unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        raise ApiError(422, "invalid_value", "An id in a path or header is percent-encoded UTF-8.", "user") from None
    if not 1 <= len(value) <= 256:
        raise ApiError(422, "invalid_value", f"An id has 1 to 256 characters, got {len(value)}.", "user")
    return value


def service_of(request: Request) -> Service:
    """Return the service of an app."""
    return request.app.state.service


def tenant_of(request: Request) -> str:
    """Return the tenant of a request."""
    return request.state.tenant


Services = Annotated[Service, Depends(service_of)]
Tenant = Annotated[str, Depends(tenant_of)]


def user_of(user: str) -> str:
    """Return the user of a path."""
    return decoded(user)


User = Annotated[str, Depends(user_of)]


@router.put("/{user}/items")
async def replace(
    user: User, body: ItemsBody, request: Request, service: Services, tenant: Tenant
) -> dict[str, object]:
    """Put items in the place of all that a user has."""
    left = threading.Event()
    return await unless_left(request, left, service.run(_replace, service, tenant, user, body.items, left))


@router.post("/{user}/items")
async def append(
    user: User, body: ItemsBody, request: Request, service: Services, tenant: Tenant
) -> dict[str, object]:
    """Add items to a user's history. Items whose ids are there already are left out, so a request may be repeated."""
    left = threading.Event()
    return await unless_left(request, left, service.run(_append, service, tenant, user, body.items, left))


@router.get("/{user}")
async def show(user: User, service: Services, tenant: Tenant) -> dict[str, object]:
    """Describe a user's persona."""
    return await service.run(_show, service, tenant, user)


@router.delete("/{user}")
async def delete(user: User, service: Services, tenant: Tenant) -> dict[str, object]:
    """Forget a user."""
    receipt = await service.run(service.of_tenant(tenant).delete_user, user)
    if not receipt.items:
        raise unknown()
    service.monitoring.items.labels("deleted").inc(receipt.items)
    return {
        "id": user,
        "object": "persona.deleted",
        "deleted": True,
        "items": receipt.items,
        "deleted_at": receipt.time,
    }


@router.delete("/{user}/items/{item}")
async def delete_item(user: User, item: str, service: Services, tenant: Tenant) -> dict[str, object]:
    """Forget one item of a user."""
    name = decoded(item)
    receipt = await service.run(service.of_tenant(tenant).delete_items, user, [name])
    if not receipt.items:
        raise ApiError(404, "item_not_found", "This user has no such item.", "item")
    service.monitoring.items.labels("deleted").inc(receipt.items)
    return {"id": name, "object": "persona.item.deleted", "deleted": True, "deleted_at": receipt.time}


def _show(service: Service, tenant: str, user: str) -> dict[str, object]:
    version = service.of_tenant(tenant).version(user)
    persona = service.known(tenant, user)
    if persona is None:
        raise unknown()
    return _description(service, user, len(persona), version)


def _description(service: Service, user: str, items: int, version: int) -> dict[str, object]:
    return {
        "id": user,
        "object": "persona",
        "items": items,
        "updated_at": version / 1e6 if items else None,
        "encoder": service.store.spec.digest,
    }


def _replace(
    service: Service, tenant: str, user: str, items: list[ItemBody], left: threading.Event
) -> dict[str, object]:
    """Replace all items. Encoding takes long: what was deleted or changed meanwhile must not come back."""
    _check(service, items, len(items))
    store = service.of_tenant(tenant)
    seen = store.version(user)
    newer = _encoded(service, items, left)
    try:
        version = store.replace(user, newer, expected_version=seen)
    except MismatchError:
        if store.version(user) == seen:
            raise  # of something else
        raise _changed() from None
    service.monitoring.items.labels("written").inc(len(items))
    return _description(service, user, len(items), version)


def _append(
    service: Service, tenant: str, user: str, items: list[ItemBody], left: threading.Event
) -> dict[str, object]:
    """Append what is new. If others change the user meanwhile, count again: encoding takes long, and the limit holds."""
    store, newer, seen, known = service.of_tenant(tenant), None, 0, set[str]()
    while True:
        version = store.version(user)  # before the items, so that no change is missed
        before = service.known(tenant, user)
        earlier, known = known, set(before.item_ids or ()) if before is not None else set()
        if version < seen or any(item.id in earlier and item.id not in known for item in items):  # deleted meanwhile
            raise _changed()
        seen = version
        new = [item for item in items if item.id not in known]
        _check(service, items, len(known) + len(new))
        if not new:
            return _description(service, user, len(known), version)
        if newer is None or newer.item_ids != tuple(item.id for item in new):
            newer = _encoded(service, new, left)
        try:
            version = store.append(user, newer, expected_version=version)
        except MismatchError:
            if store.version(user) == seen:
                raise  # of something else
        else:
            if before is not None and service.monitoring.is_due("append"):
                service.start(service.monitoring.appended, before, newer)
            service.monitoring.items.labels("written").inc(len(new))
            return _description(service, user, len(known) + len(new), version)


def _changed() -> ApiError:
    text = "This user was deleted or changed while the items were encoded: send them again if they are still meant."
    return ApiError(409, "persona_changed", text, "user")


def _check(service: Service, items: list[ItemBody], total: int) -> None:
    """Refuse items of one request that are too many, or leave the user with too many."""
    limits = service.limits
    if len(items) > limits.items:
        text = f"{len(items)} items are more than the {limits.items} of one request: send them in parts."
        raise ApiError(422, "too_many_items", text, "items")
    if len({item.id for item in items}) < len(items):
        raise ApiError(422, "invalid_value", "Two items have the same id.", "items")
    if total > limits.user_items:
        text = f"A user has at most {limits.user_items} items: delete old ones."
        raise ApiError(422, "too_many_items", text, "items")


def _encoded(service: Service, items: list[ItemBody], left: threading.Event) -> Persona:
    return service.encode(_texts(service, items), [item.id for item in items], [_time(item) for item in items], left)


def _texts(service: Service, items: list[ItemBody]) -> list[str]:
    """Return the texts of items, as the encoder reads them."""
    template = service.personalizer.config.item_template
    texts = []
    for i, item in enumerate(items):
        try:
            texts.append(history_text(item.model_dump(exclude_unset=True), template))
        except DataError as error:
            needed = "" if template is None else f"; the plug's item template is {template!r}"
            raise ApiError(422, "invalid_value", f"Item {i} cannot be used: {error}{needed}.", "items") from None
    if any(len(text) > service.limits.item_characters for text in texts):
        text = f"An item has at most {service.limits.item_characters} characters."
        raise ApiError(422, "item_too_long", text, "items")
    return texts


def _time(item: ItemBody) -> float:
    """Return the time of an item; what has none is of now."""
    if item.time is None:
        return float(now())
    date = parse_date(item.time)
    if not date:
        text = "The time of an item is a date such as 2026-03-09T12:00:00Z, or seconds since 1970."
        raise ApiError(422, "invalid_value", text, "items.time")
    return seconds(date)
