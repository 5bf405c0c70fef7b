"""Answers with `=`: the names and the calculations before a value, and the values of several variables."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from appo_jax.reward import notation, units
from appo_jax.reward.structure import Group, sides

_NAME = (
    r"(?:\\(?!ln(?![a-z])|log(?![a-z]))[a-zA-Z]+|[a-zA-Z]{1,3})(?:_\{\w+\}|_\w+)?'?"
    r"(?:\s*\([^()=]*\))?"
)
_SEVERAL = r"\s*[a-zA-Z]\s*(?:,\s*[a-zA-Z]\s*)+"
_ANGLE = r"m?\s*\\angle\s*[A-Z]{1,3}"
_OF_ANGLE = rf"\\(?:sin|cos|tan|cot|sec|csc)\s*(?:{_ANGLE}|(?:\\[a-zA-Z]+|[a-zA-Z])(?:_\{{\w+\}}|_\w+)?)"
# |x| = 5 is an equation of x; |z| and |\vec{a}| are what was asked for.
_LENGTH = r"\|\s*(?:\\(?:vec|overrightarrow|mathbf)\s*\{\s*[a-zA-Z]\s*\}|[a-wzA-WZ]|\\[a-zA-Z]+)\s*\|"
_IS_NAME = re.compile(rf"\({_SEVERAL}\)|\\\{{{_SEVERAL}\\\}}|{_ANGLE}|{_NAME}|{_OF_ANGLE}|{_LENGTH}")
_ONE_VARIABLE = re.compile(rf"({_ANGLE}|{_NAME})\s*(?:=|\\in(?![a-z]))\s*[^=]+")
_ELEMENT = re.compile(rf"({_NAME})\s*\\in(?![a-z])\s*([^=]+)")
_WORD_OF_NAME = r"(?:[a-zA-Z]{2,}|[ABCDEFGHJ-WZ]|a(?= ))"
_IN_WORDS = re.compile(rf"{_WORD_OF_NAME}(?:[ '-]+{_WORD_OF_NAME})*|[vV]alue of [a-z]")
_BEFORE_COLON = re.compile(r"([a-zA-Z][a-zA-Z '-]*[a-zA-Z])\s*:\s*(?=[-+\d.\\$€£({\[])(.+)", re.DOTALL)
# Words that make another value of the one behind them, or that begin no name.
_NO_NAME = (units.NO_UNIT - {"a", "an", "the", "for", "to", "over", "by", "percent", "percentage"}) | units.ATTRIBUTES | {
    "option", "choice", "answer", "nor", "never", "except", "without", "unless", "least", "most", "let", "given", "suppose",
}  # fmt: skip
_ANOTHER_OF = re.compile(
    r"(?:square|cube|opposite|inverse|reciprocal|multiple|rest|fraction|part|percent) of", re.IGNORECASE
)
_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]?[a-z]{3,}")
_CHOSEN_OF = re.compile(r"C_\{?\d+\}?\^\{?\d+\}?|C\^\{?\d+\}?_\{?\d+\}?")  # C_6^3 is a number
_LETTER = re.compile(r"(\\[a-zA-Z]+|[a-zA-Z])(_\{\w+\}|_\w|\(\d+\))?")
_LETTER_NAMES = {f"\\{name}" for name in notation.GREEK_NAMES if name != "pi"}
_UNIT_OF_NUMBER = re.compile(r"(?<=\d)\s*([a-zA-Z]{2,})")
_INDEX = re.compile(r"_\{[^{}]*\}")


@dataclasses.dataclass(frozen=True)
class Equation:
    """An equation, or a chain of them: `A = \\pi r^2 = 9\\pi`."""

    sides: tuple[str, ...]

    @property
    def first(self) -> str:
        return self.sides[0]

    @property
    def value(self) -> str:
        return self.sides[-1]

    @property
    def named(self) -> bool:
        """Whether the first side only names the value: x, f(2), (a, b), \\angle ABC, \\sin A, total distance."""
        return _IS_NAME.fullmatch(self.first) is not None or _name_in_words(self.first)

    @property
    def calculates(self) -> bool:
        """Whether no side before the value has a variable: 63 + 14 = 77."""
        return not any(map(_variables, self.sides[:-1]))

    @property
    def gives_value(self) -> bool:
        """Whether the last side alone is what the equation says. That of a curve, x^2 + y^2 = 4, says more than 4."""
        letters = _variables(self.first)
        of_points = all(letter[0].isupper() and letter[0] not in "XY" for letter in letters)  # AF^2, P \cap M
        alone = of_points and not re.search("[+-]", self.first) and not _variables(self.value)
        return self.named or self.calculates or (alone and len(self.sides) == 2)

    @property
    def states_value(self) -> bool:
        """Whether an answer states the last side as its value. An equation of one variable, 2x = 5, leaves it to be solved."""
        return self.named or (len(_variables(self.first)) > 1 and not _WORD.search(self.first))

    def to_check(self, known: bool) -> list[str]:
        """The sides that must be equal to the value. A formula between a name and its value cannot be checked. `known`: the gold
        has the same first side."""
        rest = list(self.sides[:-1])
        if known or self.states_value:
            rest = [side for side in rest[1:] if not _is_formula(side)]
        return [side.replace("$", "") for side in rest]


def read_equation(text: str) -> Equation | None:
    """The sides of `text` in clean notation, if it is one equation: `x = 5`, `2 + 3 = 5`, `total: 5`."""
    found = sides(text)
    if len(found) > 1:
        return Equation(tuple(found))
    match = _BEFORE_COLON.fullmatch(text)
    return Equation((match[1], match[2])) if match and _name_in_words(match[1]) else None


def named_value(text: str) -> str:
    """5 of `x = 5`; any other text as it is."""
    equation = read_equation(text)
    return equation.value if equation and equation.named else text


def element(text: str) -> tuple[str, str] | None:
    """(x, A) of `x \\in A`."""
    match = _ELEMENT.fullmatch(text)
    return (match[1], match[2]) if match else None


def has_equals_sign(text: str) -> bool:
    """Whether a text has an `=` that is not in an index, as that of a sum is."""
    return "=" in _INDEX.sub("", text)


def names_variables(group: Group) -> bool:
    """Whether every part gives the value of another variable: `x = 1, y = 2`."""
    names = {match[1] for part in group.parts if (match := _ONE_VARIABLE.fullmatch(part))}
    return len(names) == len(group.parts) > 1


def by_name(group: Group) -> Sequence[str]:
    """The parts in the order of the variables that they name, if they do."""
    return (
        sorted(group.parts, key=_name_of) if names_variables(group) and all(map(_name_of, group.parts)) else group.parts
    )


def _name_of(part: str) -> str:
    """The one letter that a part assigns a value; empty for another name."""
    match = _ONE_VARIABLE.fullmatch(part)
    return match[1] if match and len(match[1]) == 1 else ""


def _name_in_words(text: str) -> bool:
    """Whether words name a value (total distance), and do not change it (half the profit)."""
    words = re.findall(r"[a-zA-Z]+", text.lower())
    return (
        _IN_WORDS.fullmatch(text) is not None
        and not _ANOTHER_OF.search(text)
        and max(map(len, words)) > 2
        and not any(word in _NO_NAME or units.is_number_word(word) for word in words)
    )


def _variables(text: str) -> set[str]:
    """The letters of a text that are no constant and no unit, each with its index: a_1 and a_2 are two."""
    text = _UNIT_OF_NUMBER.sub(
        lambda m: "" if units.read_unit(m[1], any_words=False) else m[0], _CHOSEN_OF.sub("", text)
    )
    found = {(match[1], match[0]) for match in _LETTER.finditer(text)}
    return {letter for name, letter in found if letter not in ("e", "i") and (len(name) == 1 or _is_letter(name))}


def _is_letter(command: str) -> bool:
    return command.lower() in _LETTER_NAMES or command.startswith("\\var")


def _is_formula(text: str) -> bool:
    """Whether a side has variables, in letters or in words (length \\times width); 5 dollars is an amount."""
    return bool(_variables(text)) and not (re.search(r"\d", text) and _WORD.search(text))
