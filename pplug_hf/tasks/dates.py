"""Times of history items, by one rule for all readers: everything with a zone is compared in UTC.

2018, 2018-03, 2018-03-09            a date, as far as it is given
2018-03-09 12:00, 2018-03-09T12:00:30.25
                                     a time of day; without a zone it counts as UTC
2018-03-09T12:00:30+02:00, ... Z     a time with a zone
1520596830, 1520596830.25            seconds since 1970: a number of 9 or 10 digits
1520596830250                        milliseconds: 11 to 13 digits; microseconds: 14 to 16; nanoseconds: 17 to 19
"""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, timedelta
from typing import Any

from .text import text_of

_ZONE = r"\s*(Z|UTC|GMT|[+-]\d{2}(?::?\d{2})?)"
_DATE = re.compile(
    r"(\d{4})(?:-(\d{1,2})(?:-(\d{1,2})(?:[T ](\d{1,2}):(\d{2})(?::(\d{2})(?:[.,](\d+))?)?"
    rf"(?:{_ZONE})?)?)?)?",
    re.IGNORECASE | re.ASCII,
)
_EPOCH = re.compile(r"(\d{9,19})(?:\.(\d+))?", re.ASCII)
_1970 = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST = (1, 1, 1, 0, 0, 0, 0)
_MIDDLE = {1: (7, 1), 2: (15,), 3: ()}  # of a year and of a month


def parse_date(value: Any) -> tuple[int, ...]:
    """Return the numbers of a time from the year down, as far as they are given; they compare as the times do.

    Args:
        value: the `date` of an item.

    Returns:
        One to seven numbers in UTC, the last one microseconds; none for a value that is not a time, such as a day that
        no calendar has.
    """
    text = text_of(value).strip()
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
