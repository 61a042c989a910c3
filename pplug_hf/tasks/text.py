"""Text of a history item: the one place that turns fields into text, compares texts, and names items."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from decimal import Decimal
from functools import lru_cache
from string import Formatter
from typing import Any

import numpy as np

from ..errors import DataError

_WHOLE = 2**53  # below it every whole number is a float of its own


def item_text(item: Mapping[str, Any], template: str, name: str = "The item") -> str:
    """Return a template filled with the fields of an item; a null field is empty.

    Args:
        item: fields and their values.
        template: a format string over the fields, as in "{tag}: {description}".
        name: how a message calls the item.

    Raises:
        DataError: the item lacks a field of the template. The message names fields, never what they hold.
    """
    try:
        values = {field: text_of(item[field]) for field in fields_of(template)}
    except KeyError as error:
        raise DataError(
            f"{name} has no field {error}, which the template {template!r} needs; its fields are "
            f"{sorted(map(str, item))}."
        ) from None
    return template.format_map(values)


def field_text(item: Mapping[str, Any], field: str | None) -> str:
    """Return one field without white space around it; empty if it is null or the item lacks it."""
    return text_of(item.get(field)).strip() if field else ""


@lru_cache  # asked once per history item
def fields_of(template: str) -> frozenset[str]:
    """Return the fields that a template names."""
    return frozenset(name for _, name, _, _ in Formatter().parse(template) if name)


def text_of(value: Any) -> str:
    """Return a JSON value as text; null is empty.

    Equal numbers are equal texts: 5.0, which is what pandas makes of a 5 next to a missing one, is "5"; and a stream's
    Decimal 3.50 is "3.5".
    """
    if is_null(value):
        return ""
    if isinstance(value, float | Decimal | np.floating):
        value = int(value) if abs(value) < _WHOLE and value == int(value) else float(value)
    return str(value)


def is_null(value: Any) -> bool:
    """Return true for None, and for NaN, which is what pandas makes of a missing text."""
    return value is None or (isinstance(value, float | np.floating) and bool(value != value))


def normalise(text: str) -> str:
    """Return a text for comparison: neither case nor white space makes two texts of one."""
    return " ".join(text.casefold().split())


def item_id(item: Mapping[str, Any]) -> str:
    """Return the item's id, or a fingerprint of its fields if the data has none."""
    return text_of(item.get("id")) or hashlib.sha256(repr(sorted(item.items())).encode()).hexdigest()[:16]
