"""Answers that look like expressions and are none: clock times, dates, ratios, and measures in several units."""

from __future__ import annotations

import re
from fractions import Fraction
from math import gcd

from appo_jax.reward.units import Unit, read_unit, same_unit

_CLOCK = re.compile(r"(\d{1,2})(?:\s*:\s*([0-5]\d)(?:\s*:\s*([0-5]\d))?)?\s*([ap]m)?", re.IGNORECASE)
_HALF = re.compile(r"[ap]m", re.IGNORECASE)
_MONTHS = [
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
]
_DAY = r"\d{1,2}(?: ?(?:\^ ?\{? ?)?(?:st|nd|rd|th)(?: ?\})?)?"
_DATE = re.compile(
    rf"(?:the )?(?:(?P<day>{_DAY}) (?:of )?)?(?P<month>[a-zA-Z]{{3,9}})\.?(?: (?:the )?(?P<day2>{_DAY}))?"
    r"(?:,? (?P<year>\d{4}))?"
)
_RATIO = re.compile(r"\d+(?:\.\d+)?(?:\s*(?::|to)\s*\d+(?:\.\d+)?)+")
_FRACTION = re.compile(r"\\frac\{(\d+)\}\{(\d+)\}|(\d+)\s*/\s*(\d+)")
_MEASURE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]+)(?:,? and |,? |$)")


def same(answer: str, gold: str) -> bool | None:
    """Whether two texts in clean notation name one time, date, ratio or compound measure; None if they are none."""
    a_date, g_date = _date(answer), _date(gold)
    if a_date is not None and g_date is not None:
        return a_date == g_date
    a_parts, g_parts = _compound(answer), _compound(gold)
    if a_parts is not None and g_parts is not None:
        return len(a_parts) == len(g_parts) and all(
            a == g and same_unit(x, y) for (a, x), (g, y) in zip(a_parts, g_parts, strict=True)
        )
    has_half = _HALF.search(answer + gold) is not None
    a_time, g_time = _clock(answer, has_half), _clock(gold, has_half)
    if a_time is not None and g_time is not None:
        return bool(a_time & g_time) if has_half else a_time == g_time
    a_ratio, g_ratio = _ratio(answer), _ratio(gold)
    if a_ratio is None and g_ratio is None:
        return None
    # A fraction is a ratio of two numbers, but no time; a plain number is neither.
    a_ratio = a_ratio or (None if _only_time(gold) else _fraction(answer))
    g_ratio = g_ratio or (None if _only_time(answer) else _fraction(gold))
    return a_ratio is not None and a_ratio == g_ratio


def _clock(text: str, seconds: bool = False) -> set[int] | None:
    """The seconds since midnight that a time with minutes or am or pm may be: 2:30 is in the morning or the afternoon.
    `seconds`: 4:51:06 is a time, too, and not a ratio of three numbers."""
    match = _CLOCK.fullmatch(text)
    if match is None or (match[2] is None and match[4] is None) or (hour := int(match[1])) > 24:
        return None
    if match[3] is not None and not seconds and match[4] is None:
        return None
    if match[4] is not None:
        hours = {hour % 12 + 12 * (match[4].lower() == "pm")}
    else:
        hours = {hour % 12, hour % 12 + 12} if 1 <= hour <= 12 else {hour % 24}
    return {3600 * hour + 60 * int(match[2] or 0) + int(match[3] or 0) for hour in hours}


def _only_time(text: str) -> bool:
    """Whether a text in the form of a time is no ratio in lowest terms: 3:15, 2:05, 3 pm."""
    if _clock(text) is None:
        return False
    hour, colon, minute = text.partition(":")
    return not colon or not minute.strip().isdigit() or minute.strip()[0] == "0" or gcd(int(hour), int(minute)) > 1


def _date(text: str) -> tuple[int, int, str] | None:
    """(month, day, year) of a date that names its month, and its day or its year or both; the day 0 if it names none."""
    match = _DATE.fullmatch(text)
    if match is None or not (match["day"] or match["day2"] or match["year"]):
        return None
    month = next((i for i, name in enumerate(_MONTHS) if name.startswith(match["month"].lower())), None)
    day = int(re.sub(r"\D", "", match["day"] or match["day2"] or "0"))
    return None if month is None else (month, day, match["year"] or "")


def _ratio(text: str) -> tuple[Fraction, ...] | None:
    """The numbers of a ratio, divided by the first that is not 0."""
    if _RATIO.fullmatch(text) is None:
        return None
    return _reduced([Fraction(number) for number in re.findall(r"[\d.]+", text)])


def _fraction(text: str) -> tuple[Fraction, ...] | None:
    match = _FRACTION.fullmatch(text)
    return None if match is None else _reduced([Fraction(part) for part in match.groups() if part])


def _reduced(numbers: list[Fraction]) -> tuple[Fraction, ...]:
    scale = next((number for number in numbers if number), Fraction(1))
    return tuple(number / scale for number in numbers)


def _compound(text: str) -> list[tuple[Fraction, Unit]] | None:
    """The parts of a measure in several units: 1 hour 30 minutes."""
    found = list(_MEASURE.finditer(text))
    units = [(Fraction(match[1]), read_unit(match[2], any_words=False)) for match in found]
    parts = [(number, unit) for number, unit in units if unit is not None]
    whole = "".join(match[0] for match in found) == text and len(parts) == len(found) > 1
    return parts if whole else None
