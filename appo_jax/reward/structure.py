"""Answers of several parts: lists, sets, tuples, intervals, unions, matrices, and letters of a multiple choice."""

from __future__ import annotations

import dataclasses
import re

_OPENING, _CLOSING = "([{", ")]}"
_THOUSANDS = r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d]|,\d)|"
_TOKEN = (
    r"\\langle(?![a-z])|\\rangle(?![a-z])|\\cup(?![a-z])|\\[a-zA-Z]+|\\.|"
    r",?\s*(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])\s*|."
)
_TOKENS = {kept: re.compile(_THOUSANDS * kept + _TOKEN, re.DOTALL) for kept in (False, True)}
_MATRIX = re.compile(
    r"[(\[]?\s*\\begin\{([pb]?matrix|smallmatrix|array)\}(?:\{[^{}]*\})?(.*)\\end\{\1\}\s*[)\]]?", re.DOTALL
)
_LETTER = r"(?:[(\[]\s*([A-Ja-j])\s*[)\]]|([A-J])|([a-j])(?=\s*[.):]))"
_CHOICE = re.compile(
    rf"(?i:(?:the )?(?:(?:correct|final|best|right) )?(?:answer|option|choice)(?: is)?\s*:?\s*)?{_LETTER}\s*(?:$|[.):]|(?<=[)\]]))"
    r"(?P<rest>.*)",
    re.DOTALL,
)


@dataclasses.dataclass(frozen=True)
class Group:
    """Parts of an answer and the brackets around them."""

    opening: str  # "(", "[", "\\{", "\\langle"; "" for a bare list; "\\cup" for a union; "matrix" for a matrix of rows
    closing: str
    parts: tuple[str, ...]


def read_group(text: str, thousands: bool = False) -> Group | None:
    """The parts of an answer in clean notation, or None if it has only one part.

    Commas, semicolons, "and" and "or" separate parts; where there is a semicolon, commas do not. The comma of 1,234
    separates inside brackets, unless they are read with `thousands`, and never outside. A set may have one part or none.
    """
    if rows := _matrix_rows(text):
        return Group("matrix", "", tuple(rows))
    text = re.sub(r"^\](.*,.*)\[$", r"(\1)", text)  # ]1, 2[ is (1, 2)
    opening, inside, closing = _outer_brackets(text)
    if opening == "\\{":
        return Group(opening, closing, tuple(_split(inside, thousands=thousands)))
    parts = _split(inside, thousands=thousands)
    if opening and len(parts) > 1:
        return Group("\\{" if opening == "{" else opening, "\\}" if opening == "{" else closing, tuple(parts))
    parts = _split(text, r"\cup")
    if len(parts) > 1:
        return Group(r"\cup", "", tuple(parts))
    parts = _split(text)
    return Group("", "", tuple(parts)) if len(parts) > 1 else None


def unwrapped(text: str) -> str:
    """`text` without parentheses or braces around a single part: (5) becomes 5, while (1, 2) stays."""
    while True:
        opening, inside, closing = _outer_brackets(text)
        if (opening, closing) not in (("(", ")"), ("{", "}")) or len(_split(inside, thousands=opening == "{")) != 1:
            return text
        text = inside.rstrip(", ")


def choice(text: str) -> str | None:
    """The letter, in capitals, that an answer in clean notation chooses: E, (E), E., option E, (e), (E) 24; else None."""
    match = _CHOICE.fullmatch(text)
    if match is None or (match["rest"].strip() and re.match(r"\s*(?:and|or|[,;&+*/^=<>-])", match["rest"])):
        return None
    return (match[1] or match[2] or match[3]).upper()


def _matrix_rows(text: str) -> list[str]:
    """The rows of a LaTeX matrix: `[a, b]`, or the entry alone where there is one column; none when it is no matrix."""
    match = _MATRIX.fullmatch(text)
    if match is None:
        return []
    rows = [[cell.strip() for cell in row.split("&")] for row in match[2].split("\\\\") if row.strip()]
    return [row[0] if len(row) == 1 else f"[{'; '.join(row)}]" for row in rows]


def _outer_brackets(text: str) -> tuple[str, str, str]:
    """(opening bracket, content, closing bracket) if one pair encloses the whole text; else ("", text, "")."""
    tokens = _tokens(text)
    if len(tokens) < 2 or _depth(tokens[0]) != 1 or _depth(tokens[-1]) != -1:
        return "", text, ""
    depth = 0
    for i, token in enumerate(tokens):
        depth += _depth(token)
        if depth == 0 and i < len(tokens) - 1:
            return "", text, ""
    if depth:
        return "", text, ""
    return tokens[0].strip(), "".join(tokens[1:-1]).strip(), tokens[-1].strip()


def _split(text: str, separator: str | None = None, thousands: bool = True) -> list[str]:
    """Parts of `text` between separators outside brackets; empty parts are dropped. `thousands`: 1,234 is one number."""
    tokens = _tokens(text, thousands)
    if separator is None:
        top = [token for token, depth in _with_depth(tokens) if depth == 0]
        separators = {";"} if ";" in top else {","}
    else:
        separators = {separator}
    parts = [""]
    for token, depth in _with_depth(tokens):
        is_word = separator is None and token.strip(" ,") in ("and", "or")
        if depth == 0 and (token in separators or is_word):
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip() for part in parts if part.strip()]


def _tokens(text: str, thousands: bool = True) -> list[str]:
    return _TOKENS[thousands].findall(text)


def _with_depth(tokens: list[str]) -> list[tuple[str, int]]:
    """Each token with the number of brackets around it (brackets themselves: as inside)."""
    found, depth = [], 0
    for token in tokens:
        step = _depth(token)
        found.append((token, depth + (step > 0)))
        depth = max(0, depth + step)
    return found


def _depth(token: str) -> int:
    if token in ("\\{", "\\langle") or token in _OPENING:
        return 1
    return -1 if token in ("\\}", "\\rangle") or token in _CLOSING else 0
