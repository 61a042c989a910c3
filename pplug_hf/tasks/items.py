"""Fields of a history item: the one place that turns them into text, compares texts, names items and reads dates.

Times are read by one rule for all readers; everything with a zone is compared in UTC:

2018, 2018-03, 2018-03-09            a date, as far as it is given
2018-03-09 12:00, 2018-03-09T12:00:30.25
                                     a time of day; without a zone it counts as UTC
2018-03-09T12:00:30+02:00, ... Z     a time with a zone
1520596830, 1520596830.25            seconds since 1970: a number of 9 or 10 digits
1520596830250                        milliseconds: 12 or 13 digits; microseconds: 15 or 16; nanoseconds: 18 or 19

These numbers are of 1973 and later. A number of 14 digits is rather a date without its marks, as 20180309120030, and no time
here; nor is one of 11 or 17.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from functools import lru_cache
from string import Formatter
from typing import Any, TypeVar

import numpy as np

from ..errors import DataError, kind_of

Item = TypeVar("Item", bound=Mapping[str, Any])

_WHOLE = 2**53  # below it every whole number is a float of its own
_ZONE = r"\s*(Z|UTC|GMT|[+-]\d{2}(?::?\d{2})?)"
_DATE = re.compile(
    r"(\d{4})(?:-(\d{1,2})(?:-(\d{1,2})(?:[T ](\d{1,2}):(\d{2})(?::(\d{2})(?:[.,](\d+))?)?"
    rf"(?:{_ZONE})?)?)?)?",
    re.IGNORECASE | re.ASCII,
)
_EPOCH = re.compile(r"([1-9]\d{8,9}|[1-9]\d{11,12}|[1-9]\d{14,15}|[1-9]\d{17,18})(?:\.(\d+))?", re.ASCII)
_1970 = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST = (1, 1, 1, 0, 0, 0, 0)
_MIDDLE = {1: (7, 1), 2: (15,), 3: ()}  # of a year and of a month


def item_text(item: Mapping[str, object], template: str, name: str = "The item") -> str:
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


def history_text(item: Mapping[str, object], template: str | None) -> str:
    """Return the text of an item that is to be encoded and stored.

    Args:
        item: fields and their values.
        template: as of `item_text`; None for the field "text" as it is.

    Raises:
        DataError: a field is missing, or is not a text or a number, or all of them are empty. The message is a few words,
            for the caller to say which item.
    """
    template = "{text}" if template is None else template
    fields = sorted(fields_of(template))
    for name in fields:
        if name not in item:
            raise DataError(f"no field {name!r}")
        if isinstance(item[name], list | dict):
            raise DataError(f"the field {name!r} is {kind_of(item[name])}, not a text")
    if not any(field_text(item, name) for name in fields):
        raise DataError("no text")
    (text,) = whole_texts([item_text(item, template)])
    return text


def field_text(item: Mapping[str, object], field: str | None) -> str:
    """Return one field without white space around it; empty if it is null or the item lacks it."""
    return text_of(item.get(field)).strip() if field else ""


@lru_cache  # asked once per history item
def fields_of(template: str) -> frozenset[str]:
    """Return the fields that a template names."""
    return frozenset(name for _, name, _, _ in Formatter().parse(template) if name)


def text_of(value: object) -> str:
    """Return a JSON value as text; null is empty.

    Equal numbers are equal texts: 5.0, which is what pandas makes of a 5 next to a missing one, is "5"; and a stream's
    Decimal 3.50 is "3.5".
    """
    if is_null(value):
        return ""
    if isinstance(value, float | Decimal | np.floating):
        value = int(value) if abs(value) < _WHOLE and value == int(value) else float(value)
    return str(value)


def is_rounded(value: object) -> bool:
    """Return true for a whole number that is a float and so large that digits may be lost: two ids may have become one."""
    return isinstance(value, float | np.floating) and bool(abs(value) >= _WHOLE)


def is_null(value: object) -> bool:
    """Return true for None, and for NaN, which is what pandas makes of a missing text."""
    return value is None or (isinstance(value, float | np.floating) and bool(value != value))


def whole_texts(texts: list[str]) -> list[str]:
    """Return texts in which half a surrogate pair, as JSON may hold, became U+FFFD: tokenizers take UTF-8 alone."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
    return texts


def whole_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields whose texts are those of `whole_texts`."""
    return {name: whole_texts([value])[0] if isinstance(value, str) else value for name, value in fields.items()}


def normalise(text: str) -> str:
    """Return a text for comparison: neither case nor white space makes two texts of one."""
    return " ".join(text.casefold().split())


def item_id(item: Mapping[str, object]) -> str:
    """Return the item's id, or a fingerprint of its fields if the data has none."""
    return text_of(item.get("id")) or hashlib.sha256(repr(sorted(item.items())).encode()).hexdigest()[:16]


def parse_date(value: object) -> tuple[int, ...]:
    """Return the numbers of a time from the year down, as far as they are given; they compare as the times do.

    Args:
        value: the `date` of an item.

    Returns:
        One to seven numbers in UTC, the last one microseconds; none for a value that is not a time, such as a day that
        no calendar has.
    """
    return _parsed(text_of(value).strip())


@lru_cache(maxsize=1 << 16)  # an item is part of many histories
def _parsed(text: str) -> tuple[int, ...]:
    try:
        if epoch := _EPOCH.fullmatch(text):
            return _numbers(_since_1970(*epoch.groups()))
        if not (found := _DATE.fullmatch(text)):
            return ()
        *parts, fraction, zone = found.groups()
        numbers = tuple(int(part) for part in (*parts, fraction and f"{fraction:0<6}"[:6]) if part)
        moment = _beginning(numbers)  # raises for a day that no calendar has
        return _numbers(moment - _offset(zone or "Z"))[: len(numbers)]
    except (ValueError, OverflowError):
        return ()


def seconds(numbers: tuple[int, ...]) -> float:
    """Return the seconds from 1970 to the beginning of a parsed time, in UTC."""
    return _beginning(numbers).timestamp()


def day_number(numbers: tuple[int, ...]) -> int:
    """Return the day of a parsed time, counted from year 1; a year is its first of July, a month its 15th."""
    return date(*numbers[:3], *_MIDDLE[min(3, len(numbers))]).toordinal()


def newest_first(history: Sequence[Mapping[str, object]]) -> list[int]:
    """Return all positions of a history, newest item first: by date if every item has one, else the last item first."""
    dates = [parse_date(item.get("date")) for item in history]
    order = list(range(len(dates)))
    if all(dates):
        order.sort(key=lambda i: dates[i])  # stable: of one day, the later in the history is the newer
    return order[::-1]


def oldest_first(history: Sequence[Item]) -> list[Item]:
    """Return the items of a history in the order of `newest_first`, oldest item first."""
    return [history[i] for i in reversed(newest_first(history))]


def _beginning(numbers: tuple[int, ...]) -> datetime:
    year, month, day, hour, minute, second, micro = (*numbers, *_FIRST[len(numbers) :])
    return datetime(year, month, day, hour, minute, second, micro, tzinfo=UTC)


def _numbers(moment: datetime) -> tuple[int, ...]:
    """Return all numbers of a moment; microseconds only if there are any, so that equal times are equal."""
    return (*moment.timetuple()[:6], moment.microsecond)[: 7 if moment.microsecond else 6]


def _offset(zone: str) -> timedelta:
    if zone[0] not in "+-":
        return timedelta()
    digits = zone[1:].replace(":", "")
    hours, minutes = int(digits[:2]), int(digits[2:] or 0)
    if hours > 23 or minutes > 59:
        raise ValueError
    return timedelta(hours=hours, minutes=minutes) * (-1 if zone[0] == "-" else 1)


def _since_1970(digits: str, fraction: str | None) -> datetime:
    unit = 0 if len(digits) < 11 else 3 if len(digits) < 14 else 6 if len(digits) < 17 else 9
    digits = digits + (fraction or "") + "0" * 6
    whole = len(digits) - len(fraction or "") - 6 - unit  # digits of whole seconds
    return _1970 + timedelta(microseconds=int(digits[: whole + 6]))
