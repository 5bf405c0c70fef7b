"""Plain numbers: read in every usual spelling, and compared exactly as fractions, without a computer algebra system."""

from __future__ import annotations

import dataclasses
import re
from fractions import Fraction

from appo_jax.reward.units import SCALES, Unit, same_unit, split_unit

MAX_DIGITS = 4000
"""Numbers with more digits or larger powers of ten are not plain numbers, because Python refuses to read them."""

_GROUPED = "|".join(
    (
        r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d*)?",  # 1,234.5
        r"[1-9]\d?(?:,\d\d)+,\d{3}(?:\.\d*)?",  # 12,34,567.5
        r"[1-9]\d{0,2}(?: \d{3})+(?:[.,]\d+)?",  # 1 234.5
        r"[1-9]\d{0,2}(?:'\d{3})+(?:[.,]\d+)?",  # 1'234.5
        r"[1-9]\d{0,2}(?:_\d{3})+(?:\.\d+)?",  # 1_234.5
        r"\d+\.\d{3}(?: \d{3})*(?: \d{1,3})",  # 3.141 592 6
        r"[1-9]\d{0,2}(?:\.\d{3})+,\d+|[1-9]\d{0,2}(?:\.\d{3}){2,}",  # 1.234,5 and 1.234.567
    )
)
_DECIMAL = rf"(?:{_GROUPED}|\d+\.?\d*|\.\d+)"
_POWER = r"10\s*\^\s*(?:\{{\s*([+-]?\d+)\s*\}}|([+-]?\d+))".replace("{{", "{").replace("}}", "}")
_FRACTION = rf"(?:\\frac\{{\s*(-?{_DECIMAL})\s*\}}\{{\s*(-?{_DECIMAL})\s*\}}|({_DECIMAL})\s*/\s*({_DECIMAL}))"
_FORMS = {
    "decimal": re.compile(rf"({_DECIMAL})"),
    "fraction": re.compile(_FRACTION),
    "repeating": re.compile(r"(\d*)\.(\d*)\s*(?:\\(?:overline|bar|dot)\s*(?:\{\s*(\d+)\s*\}|(\d))|\((\d+)\))"),
    "mixed": re.compile(r"\((\d+)\+\\frac\{(\d+)\}\{(\d+)\}\)"),  # as clean writes it
    "scientific": re.compile(rf"(?:({_DECIMAL})\s*(?:\\times|\\cdot|\*|x)\s*)?{_POWER}|({_DECIMAL})[eE]([+-]?\d+)"),
}
_SCALE = re.compile(rf"(.*[\d}})])\s*(?<![a-z])({'|'.join(SCALES)})s?", re.DOTALL)
_PERCENT = re.compile(r"([^%]*[^%\s])\s*%")
_ORDINAL = re.compile(r"(\d+)\s*(?:\^\s*\{?\s*)?(?:st|nd|rd|th)\s*\}?")
_SUM = re.compile(r"\d+\+\\frac\{\d+\}\{\d+\}")
_DECIMAL_COMMA = re.compile(r"\d+,\d+")


@dataclasses.dataclass(frozen=True)
class Number:
    """A number as written: `decimals` digits after the point, perhaps with a percent sign (not yet divided by 100)."""

    value: Fraction
    decimals: int
    percent: bool
    unit: Unit | None = None


def read_number(text: str, decimal_comma: bool = False) -> Number | None:
    """Read a plain number with its sign, currency, separators, percent, scale word and unit, from text in clean notation
    (`notation.clean`). None for text that is not a plain number ("2x", "1, 3", "4343_6"). `decimal_comma`: 3,14 is read as 3.14
    (a list of two numbers otherwise)."""
    if len(text) > MAX_DIGITS or (parts := split_unit(re.sub(r"^\\approx\s*", "", text))) is None:
        return None
    text, unit = parts
    percent = _PERCENT.fullmatch(text)
    scale = _SCALE.fullmatch(percent[1] if percent else text)
    text = scale[1].strip() if scale else percent[1] if percent else text
    if ordinal := _ORDINAL.fullmatch(text):
        text = ordinal[1]
    if decimal_comma and _DECIMAL_COMMA.fullmatch(text.lstrip("+- ")):
        text = text.replace(",", ".")
    if _SUM.fullmatch(text):  # the parentheses of a mixed number may have been removed
        text = f"({text})"
    sign, text = (-1 if text.startswith("-") else 1), re.sub(r"^[+-]\s*", "", text)
    value = _value(text)
    if value is None:
        return None
    number, decimals = value
    return Number(sign * number * (SCALES[scale[2]] if scale else 1), decimals, percent is not None, unit)


def _value(text: str) -> tuple[Fraction, int] | None:
    """(value, digits after the point) of a number without sign, or None."""
    for form, pattern in _FORMS.items():
        if (match := pattern.fullmatch(text)) is None:
            continue
        part = [group for group in match.groups() if group is not None]
        match form:
            case "decimal":
                return _decimal(part[0])
            case "fraction":
                (top, decimals), (bottom, more) = _decimal(part[0]), _decimal(part[1])
                return (top / bottom, max(decimals, more)) if bottom else None
            case "mixed":
                share = Fraction(int(part[1]), int(part[2]) or 1)
                return (int(part[0]) + share, 0) if 0 < share < 1 else None
            case "repeating":
                digits, fixed, cycle = part
                first = Fraction(int("0" + digits + fixed), 10 ** len(fixed))
                return first + Fraction(int(cycle), (10 ** len(cycle) - 1) * 10 ** len(fixed)), 0
            case _:
                factor, decimals = _decimal(part[0]) if len(part) == 2 else (Fraction(1), 0)
                exponent = int(part[-1])
                return (factor * Fraction(10) ** exponent, decimals) if abs(exponent) <= MAX_DIGITS else None
    return None


def _decimal(text: str) -> tuple[Fraction, int]:
    """Value and number of digits after the point, of digits with or without separators."""
    if re.fullmatch(r".*[. ']\d+,\d+|\d+(?:\.\d{3}){2,}", text):
        text = text.replace(".", "").replace(",", ".")
    text = re.sub("[, '_]", "", text)
    return Fraction("0" + text.rstrip(".") if text[0] == "." else text.rstrip(".")), len(text.partition(".")[2])


def numbers_equal(answer: Number, gold: Number) -> bool:
    """Exact equality, with three allowances.

    A decimal written to at least six places may be off by 1e-6 of the smaller of 1 and the gold (1/3 = 0.333333).
    A percent sign on one side only is read either way: 10% is 10 and 0.1.
    A unit may be left out, or added if the gold has none; two different units are never equal,
    and a percent sign is none of the other's unit.
    """
    if answer.unit is not None and gold.unit is not None and not same_unit(answer.unit, gold.unit):
        return False
    if answer.percent != gold.percent and (answer if gold.percent else gold).unit is not None:  # 29% for 29 dollars
        return False
    readings = [answer.value]
    if answer.percent != gold.percent:
        readings.append(answer.value / 100 if answer.percent else answer.value * 100)
    tolerance = Fraction(1, 10**6) * min(Fraction(1), abs(gold.value))
    if max(answer.decimals, gold.decimals) < 6:
        tolerance = Fraction(0)
    return any(abs(value - gold.value) <= tolerance for value in readings)
