"""Whether two mathematical answers have the same value. docs/grading.md lists the rules.

Notation, structure, units and plain numbers are ours: they are read exactly, in every spelling that policies and data sets
use, and most answers need nothing else. What is left, expressions, goes to math-verify (verify.py).
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Sequence

from appo_jax.reward import equations, measures, qa, verify
from appo_jax.reward.notation import clean
from appo_jax.reward.number import numbers_equal, read_number
from appo_jax.reward.structure import (
    RELATION,
    Group,
    choice,
    chosen,
    condition,
    interval,
    matrix_of,
    read_group,
    same_choices,
    text_of_choice,
    unwrapped,
)
from appo_jax.reward.units import Unit, read_unit, same_unit, split_unit

MAX_ANSWER_CHARS = 400
"""Answers longer than this and longer than four times the gold are wrong, unless they are written like the gold."""
MAX_PARTS = 40
"""Answers of more parts, or nested deeper than `MAX_DEPTH`, are equal only as written."""
MAX_DEPTH = 5

_BASE = re.compile(r"_\s*\{?(\d+)\}?$")
_AND_FRACTION = re.compile(r"^(\d+) and (?:(\d+)/(\d+)|\\frac\{(\d+)\}\{(\d+)\})$")
_COMMAS = re.compile(r"-?\d+(?:,\d+)+")
_WORDS = re.compile(r"[\w\s:'.-]*[^\W\d_]{2}[\w\s:'.-]*")
_ONLY_WORDS = re.compile(r"[^\W\d_]{2,}(?:[\s'-]+[^\W\d_]+)*")
# Two letters are a product of variables (xy), except for these words and two capitals (the segment AB).
_SHORT_WORDS = (
    "do",
    "go",
    "he",
    "if",
    "is",
    "it",
    "me",
    "my",
    "no",
    "of",
    "ok",
    "on",
    "or",
    "so",
    "to",
    "up",
    "us",
    "we",
)
# Numbers side by side, and a decimal with an ellipsis and no visible period: neither has a value.
_NO_VALUE = re.compile(r"(?<![\d._^])\d[\d.]* \.?\d|\.\d+\\ldots")


def math_equal(answer: str, gold: str) -> bool | None:
    """Whether two answers are the same value. None: math-verify ran out of time or memory (count it as wrong).

    Raises AppoError when math-verify cannot be started.
    """
    return equals_one((answer,), (gold,))


def equals_one(readings: Sequence[str], golds: Sequence[str]) -> bool | None:
    """Whether one reading of an answer is the same value as one of the golds, as `math_equal` decides it. All comparisons
    share its time limit."""
    comparison = _Comparison()
    for answer in readings:
        for gold in golds:
            if not answer.strip() or not gold.strip():
                continue
            if answer.strip() == gold.strip():
                return True
            if len(answer) > max(MAX_ANSWER_CHARS, 4 * len(gold)):
                continue
            if comparison.equal(clean(answer), clean(gold)):
                return True
    return None if comparison.timed_out else False


class _Comparison:
    """A comparison of two answers; all their parts share a time limit. Texts are in clean notation."""

    def __init__(self) -> None:
        self.timed_out = False
        self._seconds_left = verify.VERIFY_SECONDS

    def equal(self, answer: str, gold: str, depth: int = 0) -> bool:
        if not answer or not gold or _as_written(answer) == _as_written(gold):
            return bool(answer) and bool(gold)
        if depth > MAX_DEPTH:
            return False
        if letter := choice(gold):
            found = chosen(answer) or chosen(unwrapped(answer)) or chosen(equations.named_value(answer))
            text = text_of_choice(gold) if found is None else ""
            return (found or answer.upper()) == letter or bool(text and self.equal(answer, text, depth + 1))
        if same_choices(answer, gold):
            return True
        if (values := self._values(answer, gold, depth)) != (answer, gold):
            return values is not None and self.equal(*values, depth + 1)
        answer, gold = condition(unwrapped(answer)), condition(unwrapped(gold))
        if (verdict := _plain_numbers(answer, gold)) is not None:
            return verdict
        if (verdict := measures.same(answer, gold)) is not None:
            return verdict
        if (values := _without_units(answer, gold)) != (answer, gold):
            return values is not None and self.equal(*values, depth + 1)
        answer, gold = interval(answer), interval(gold)
        a, g = _read(answer), _read(gold)
        if a is None and g is not None and _COMMAS.fullmatch(answer):
            a = Group("", "", tuple(answer.split(",")))  # 1,234 are two numbers where the gold is a list
        if a is None and g is None:
            return self._expressions(answer, gold)
        both_read = a is not None and g is not None and ("\\cup" not in (a.opening, g.opening) or a.word + g.word)
        a, g = a or _alone(answer), g or _alone(gold)
        pairs = ((a, g), (_with_thousands(answer, a), g), (a, _with_thousands(gold, g)))
        if any(self._groups(*pair, depth) for pair in dict.fromkeys(pairs)):
            return True
        return not both_read and bool(RELATION.search(answer + gold)) and self._verify(answer, gold)

    def _values(self, answer: str, gold: str, depth: int) -> tuple[str, str] | None:
        """Both without what stands before the value of an equation: 5 of `x = 5` and of `2 + 3 = 5`, where the other answer
        names no variable or the same one. None if the answer's equation does not have the gold's value."""
        a, g = equations.read_equation(answer), equations.read_equation(gold)
        if a is None and g is None:
            return _elements(answer, gold)
        known = False
        if a and g and _as_written(a.first) == _as_written(g.first):
            value, known = g.value, True
        elif g and g.gives_value and (a is None or a.calculates or g.calculates):
            if a is None:
                return (answer, gold) if equations.has_equals_sign(answer) else (answer, g.value)
            value = g.value
        elif a is None or g or equations.has_equals_sign(gold):
            return None if a and a.calculates else (answer, gold)
        else:
            value = gold
        return (a.value, value) if all(self.equal(side, value, depth + 1) for side in a.to_check(known)) else None

    def _groups(self, answer: Group, gold: Group, depth: int) -> bool:
        """Lists and sets are compared in any order (lists with multiplicity), everything else part by part and with its
        brackets."""
        if max(len(answer.parts), len(gold.parts)) > MAX_PARTS:
            return False
        kinds = answer.opening, gold.opening
        if "matrix" in kinds:
            return self._matrices(answer, gold, depth)
        if {answer.word, gold.word} == {"and", "or"} and any(map(RELATION.search, answer.parts)):
            return False
        named = [equations.names_variables(answer), equations.names_variables(gold)]
        if any(named) and not all(named) and {"", "("}.issuperset(kinds):  # x = 1, y = 2 is (1, 2)
            return self._in_order(equations.by_name(answer), equations.by_name(gold), depth)
        if "\\cup" in kinds and {(group.opening, group.word) for group in (answer, gold)} == {
            ("\\cup", ""),
            ("", "or"),
        }:
            return self._same_list(answer.parts, gold.parts, depth)
        if set(kinds) <= {"", "\\{"} or kinds == ("\\cup", "\\cup"):
            pairs_off = self._same_set if "\\{" in kinds else self._same_list
            return pairs_off(answer.parts, gold.parts, depth)
        return _same_brackets(answer, gold) and self._in_order(answer.parts, gold.parts, depth)

    def _matrices(self, answer: Group, gold: Group, depth: int) -> bool:
        """Matrices are compared entry by entry. A row or a column is also a tuple, whatever its brackets."""
        matrices = [matrix_of(answer), matrix_of(gold)]
        shapes = [None if m is None else (len(m), {len(row) for row in m}) for m in matrices]
        if None not in matrices and shapes[0] != shapes[1]:
            return False
        vectors: list[Sequence[str]] = []
        for group, matrix in zip((answer, gold), matrices, strict=True):
            if matrix is None and group.opening in ("", "(", "[", "\\langle"):
                vectors.append(group.parts)
            elif matrix is None or (None in matrices and len(matrix) > 1 and any(len(row) > 1 for row in matrix)):
                return False
            else:
                vectors.append([entry for row in matrix for entry in row])
        return self._in_order(vectors[0], vectors[1], depth)

    def _in_order(self, answer: Sequence[str], gold: Sequence[str], depth: int) -> bool:
        pairs = zip(answer, gold, strict=False)
        return len(answer) == len(gold) and all(self.equal(a, g, depth + 1) for a, g in pairs)

    def _same_set(self, answer: Sequence[str], gold: Sequence[str], depth: int) -> bool:
        return all(any(self.equal(a, g, depth + 1) for a in answer) for g in gold) and all(
            any(self.equal(a, g, depth + 1) for g in gold) for a in answer
        )

    def _same_list(self, answer: Sequence[str], gold: Sequence[str], depth: int) -> bool:
        left = list(gold)
        for a in answer:
            match = next((i for i, g in enumerate(left) if self.equal(a, g, depth + 1)), None)
            if match is None:
                return False
            left.pop(match)
        return not left

    def _expressions(self, answer: str, gold: str) -> bool:
        if _WORDS.fullmatch(answer) and _WORDS.fullmatch(gold) and _same_words(answer, gold):
            return True
        if _are_words(answer, gold):
            return False  # math-verify would take words for products of letters: "act" for "cat"
        bases = [base[1] for text in (answer, gold) if (base := _BASE.search(text))]
        if len(set(bases)) > 1:
            return False  # math-verify drops the base of 43_5
        if equations.has_equals_sign(answer) != equations.has_equals_sign(gold):
            return False  # math-verify would take the last side of 2x = 5
        return self._verify(answer, gold)

    def _verify(self, answer: str, gold: str) -> bool:
        if _has_letter(gold, "i") and not _has_letter(gold, "j") and not _has_letter(answer, "i"):
            answer = re.sub(r"(?<![a-zA-Z\\])j(?![a-zA-Z])", "i", answer)  # the imaginary unit of engineers
        elif re.search(r"\dj(?![a-zA-Z])", gold) and not _has_letter(gold, "i") and not _has_letter(answer, "j"):
            gold = re.sub(r"(?<=\d)j(?![a-zA-Z])", "i", gold)
        answer, gold = _joined_digits(answer), _joined_digits(gold)
        if _NO_VALUE.search(answer) or _NO_VALUE.search(gold):
            return False  # 2 3 is neither 5 nor 6
        verdict = None
        if self._seconds_left > 0:
            verify.start()
            began = time.monotonic()
            verdict = verify.same_value(answer, gold)
            self._seconds_left -= time.monotonic() - began
        self.timed_out |= verdict is None
        return bool(verdict)


def _plain_numbers(answer: str, gold: str) -> bool | None:
    """Whether two plain numbers are equal; None if one of them is not a plain number."""
    a, g = read_number(answer), read_number(gold)
    if a is None and g is not None:
        text = re.sub(r"(\d)k$", r"\1 thousand", _AND_FRACTION.sub(r"(\1+\\frac{\2\4}{\3\5})", answer))
        a = read_number(text, decimal_comma=True)
    elif g is None and a is not None:
        g = read_number(gold, decimal_comma=True)
    return numbers_equal(a, g) if a is not None and g is not None else None


def _without_units(answer: str, gold: str) -> tuple[str, str] | None:
    """Both without their units; None if the units differ."""
    a, g = split_unit(answer), split_unit(gold)
    if a is not None and g is not None and None in (a[1], g[1]):  # 29g has a unit where the other answer has grams
        a, g = _touching(answer, a, g[1]), _touching(gold, g, a[1])
    if a is None or g is None or not (g[1] is None or a[1] is None or same_unit(a[1], g[1])):
        return None
    return a[0], g[0]


def _touching(text: str, found: tuple[str, Unit | None], other: Unit | None) -> tuple[str, Unit | None]:
    """The value and unit of a text whose last letter is a unit if it is that of the other answer; else `found`."""
    match = re.fullmatch(r"(.*\d)((?:\s*\\mu\s*)?[a-zA-Z])", text)
    if match and found[1] is None and other is not None and read_unit(match[2]) == other:
        return match[1], other
    return found


def _read(text: str) -> Group | None:
    """The parts of an answer, with `\\pm` written out as two."""
    if text == r"\emptyset":
        return Group("\\{", "\\}", ())
    group = read_group(text) or (_alone(text) if r"\pm" in text else None)
    if group is None or group.opening not in ("", "\\{"):
        return group
    parts: list[str] = []
    for part in group.parts:
        parts += [_signed(part, "+", "-"), _signed(part, "-", "+")] if r"\pm" in part else [part]
    return dataclasses.replace(group, parts=tuple(parts))


def _alone(text: str) -> Group:
    return Group("", "", (text,))


def _signed(text: str, plus_minus: str, minus_plus: str) -> str:
    return text.replace(r"\pm", plus_minus).replace(r"\mp", minus_plus).lstrip("+ ")


def _same_brackets(answer: Group, gold: Group) -> bool:
    """Whether two groups are of one kind. A tuple's parentheses may be left out or be pointed; a column is a tuple."""

    def kind(group: Group) -> tuple[str, str]:
        if group.opening == "matrix":
            rows = any(part.startswith("[") for part in group.parts)
            return ("matrix", "") if rows else ("(", ")")
        if group.opening == "[" and all(part.startswith("[") for part in group.parts):
            return "matrix", ""
        return ("(", ")") if group.opening == "\\langle" else (group.opening, group.closing)

    return kind(answer) == kind(gold) or {kind(answer), kind(gold)} == {("", ""), ("(", ")")}


def _elements(answer: str, gold: str) -> tuple[str, str]:
    """`x \\in A` is A if the other answer names no variable or the same one."""
    a, g = equations.element(answer), equations.element(gold)
    if a and g:
        return (a[1], g[1]) if a[0] == g[0] else (answer, gold)
    return (a[1] if a and not equations.has_equals_sign(gold) else answer), (
        g[1] if g and not equations.has_equals_sign(answer) else gold
    )


def _as_written(text: str) -> str:
    """Spelling differences that never matter, removed: white space that separates no digits, and the case of words."""
    text = re.sub(r"(?<!\d)(?<!\d[,.]) | (?!\d)", "", text)
    return text.casefold() if re.fullmatch(r"[^\W\d_]{2,}", text) and not _two_letters(text) else text


def _two_letters(text: str) -> bool:
    """Whether the text may be two variables or two points (xy, AB): then capitals make a difference."""
    return re.fullmatch(r"[a-zA-Z]{2}", text) is not None and text.lower() not in _SHORT_WORDS


def _are_words(answer: str, gold: str) -> bool:
    """Whether both are words, and not products of variables."""
    products = all(_two_letters(text) and not text.isupper() for text in (answer, gold))
    return not products and all(_ONLY_WORDS.fullmatch(text) for text in (answer, gold))


def _with_thousands(text: str, group: Group) -> Group:
    """The parts of a text in brackets if the comma of 1,234 separates none; `group` if only one number would remain."""
    again = read_group(text, thousands=True) if group.opening else None
    return again if again is not None and len(again.parts) > 1 else group


def _joined_digits(text: str) -> str:
    """`text` without the spaces that group digits in threes."""
    return re.sub(r"(?<![\d.,] )(?<![\d.,])[1-9]\d{0,2}(?: \d{3})+(?! ?\d)", lambda m: m[0].replace(" ", ""), text)


def _same_words(answer: str, gold: str) -> bool:
    if _two_letters(answer) or _two_letters(gold):
        return False
    return re.findall(r"\d+", answer) == re.findall(r"\d+", gold) and qa.exact_match(answer, [gold])


def _has_letter(text: str, letter: str) -> bool:
    return re.search(rf"(?<![a-zA-Z\\]){letter}(?![a-zA-Z])", text) is not None
