"""Text of a history item: the one place that turns fields into text, compares texts, and names items."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from decimal import Decimal
from functools import lru_cache
from string import Formatter
from typing import Any

from ..errors import DataError


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
    """Return a JSON value as text; null is empty. A stream's numbers are Decimal: 3.50 must read as 3.5 in both."""
    return "" if is_null(value) else str(float(value)) if isinstance(value, Decimal) else str(value)


def is_null(value: Any) -> bool:
    """Return true for None, and for NaN, which is what pandas makes of a missing text."""
    return value is None or (isinstance(value, float) and value != value)


def whole_texts(texts: list[str]) -> list[str]:
    """Return texts in which half a surrogate pair, as JSON may hold, became U+FFFD: tokenizers take UTF-8 alone."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
    return texts


def normalise(text: str) -> str:
    """Return a text for comparison: neither case nor white space makes two texts of one."""
    return " ".join(text.casefold().split())


def item_id(item: Mapping[str, Any]) -> str:
    """Return the item's id, or a fingerprint of its fields if the data has none."""
    return text_of(item.get("id")) or hashlib.sha256(repr(sorted(item.items())).encode()).hexdigest()[:16]
