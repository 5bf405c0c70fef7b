"""Answers that look like expressions and are none: clock times, dates, ratios, and measures in several units."""

from __future__ import annotations

import re
from fractions import Fraction

from appo_jax.reward.units import Unit, read_unit

_CLOCK = re.compile(r"(\d{1,2})(?:\s*:\s*([0-5]\d))?\s*([ap]m)?", re.IGNORECASE)
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
_DAY = r"\d{1,2}(?:st|nd|rd|th)?"
_DATE = re.compile(
    rf"(?:(?P<day>{_DAY}) (?:of )?)?(?P<month>[a-zA-Z]{{3,9}})\.?(?: (?P<day2>{_DAY}))?,? (?P<year>\d{{4}})"
)
_RATIO = re.compile(r"\d+(?:\.\d+)?(?:\s*(?::|to)\s*\d+(?:\.\d+)?)+")
_FRACTION = re.compile(r"\\frac\{(\d+)\}\{(\d+)\}|(\d+)\s*/\s*(\d+)")
_MEASURE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]+)(?:,? and |,? |$)")


def same(answer: str, gold: str) -> bool | None:
    """Whether two texts in clean notation name one time, date, ratio or compound measure; None if they are none."""
    for read in (_date, _compound):
        a, g = read(answer), read(gold)
        if a is not None and g is not None:
            return a == g
    a_time, g_time = _clock(answer), _clock(gold)
    if a_time is not None and g_time is not None:
        return a_time[0] == g_time[0] and (None in (a_time[1], g_time[1]) or a_time[1] == g_time[1])
    a_ratio, g_ratio = _ratio(answer), _ratio(gold)
    if a_ratio is None and g_ratio is None:
        return None
    # A fraction is a ratio of two numbers, but never a time (3:15); a plain number is neither.
    a_ratio = a_ratio or (None if g_time else _fraction(answer))
    g_ratio = g_ratio or (None if a_time else _fraction(gold))
    return a_ratio is not None and a_ratio == g_ratio


def _clock(text: str) -> tuple[tuple[int, int], str | None] | None:
    """((hour, minute), am or pm) of a time with minutes or am or pm."""
    match = _CLOCK.fullmatch(text)
    if match is None or (match[2] is None and match[3] is None) or int(match[1]) > 24:
        return None
    return (int(match[1]), int(match[2] or 0)), match[3].lower() if match[3] else None


def _date(text: str) -> tuple[int, str, str] | None:
    """(month, day, year) of a date that names its month."""
    match = _DATE.fullmatch(text)
    if match is None:
        return None
    month = next((i for i, name in enumerate(_MONTHS) if name.startswith(match["month"].lower())), None)
    return None if month is None else (month, re.sub(r"\D", "", match["day"] or match["day2"] or ""), match["year"])


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


def _compound(text: str) -> list[tuple[Fraction, Unit | None]] | None:
    """The parts of a measure in several units: 1 hour 30 minutes."""
    parts = [(Fraction(match[1]), read_unit(match[2], any_words=False)) for match in _MEASURE.finditer(text)]
    whole = "".join(match[0] for match in _MEASURE.finditer(text)) == text
    return parts if whole and len(parts) > 1 and all(unit for _, unit in parts) else None
