"""Fields of a history item: the one place that turns them into text, compares texts, names items and reads dates.

A date is YYYY, YYYY-MM or YYYY-MM-DD, the last one also with a time of day.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from functools import lru_cache
from string import Formatter
from typing import Any

from ..errors import DataError

_DATE = re.compile(r"(\d{4})(?:-(\d{1,2})(?:-(\d{1,2})(?:[T ](\d{1,2}):(\d{2})(?::(\d{2}))?)?)?)?")
_FIRST = (1, 1, 1, 0, 0, 0)
_MIDDLE = {1: (7, 1), 2: (15,), 3: ()}  # of a year and of a month


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


def parse_date(value: Any) -> tuple[int, ...]:
    """Return the numbers of a date from the year down, as far as they are given; they compare as the dates do.

    Args:
        value: the `date` of an item.

    Returns:
        One to six numbers; none for a value that is not a date, such as a day that no calendar has.
    """
    found = _DATE.fullmatch(text_of(value).strip())
    numbers = tuple(int(number) for number in found.groups() if number) if found else ()
    try:
        return numbers if numbers and _beginning(numbers) else ()
    except ValueError:
        return ()


def seconds(numbers: tuple[int, ...]) -> float:
    """Return the seconds from 1970 to the beginning of a parsed date, in UTC."""
    return _beginning(numbers).timestamp()


def day_number(numbers: tuple[int, ...]) -> int:
    """Return the day of a parsed date, counted from year 1; a year is its first of July, a month its 15th."""
    return date(*numbers[:3], *_MIDDLE[min(3, len(numbers))]).toordinal()


def newest_first(history: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return all positions of a history, newest item first: by date if every item has one, else the last item first."""
    dates = [parse_date(item.get("date")) for item in history]
    order = list(range(len(dates)))
    if all(dates):
        order.sort(key=lambda i: dates[i])  # stable: of one day, the later in the history is the newer
    return order[::-1]


def _beginning(numbers: tuple[int, ...]) -> datetime:
    year, month, day, hour, minute, second = (*numbers, *_FIRST[len(numbers) :])
    return datetime(year, month, day, hour, minute, second, tzinfo=UTC)
