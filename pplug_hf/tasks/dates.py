"""Dates of history items: YYYY, YYYY-MM or YYYY-MM-DD, the last one also with a time of day."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime
from typing import Any

from .text import text_of

_DATE = re.compile(r"(\d{4})(?:-(\d{1,2})(?:-(\d{1,2})(?:[T ](\d{1,2}):(\d{2})(?::(\d{2}))?)?)?)?")
_FIRST = (1, 1, 1, 0, 0, 0)
_MIDDLE = {1: (7, 1), 2: (15,), 3: ()}  # of a year and of a month


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


def _beginning(numbers: tuple[int, ...]) -> datetime:
    year, month, day, hour, minute, second = (*numbers, *_FIRST[len(numbers) :])
    return datetime(year, month, day, hour, minute, second, tzinfo=UTC)
