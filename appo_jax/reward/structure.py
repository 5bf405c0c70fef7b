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
    r"[(\[]?\s*\\begin\{([pb]?(?:small)?matrix|array)\}(?:\{[^{}]*\})?((?:(?!\\end\{).)*)\\end\{\1\}\s*[)\]]?",
    re.DOTALL,
)
# Text that a computer algebra system may find equal to a group: x > 2 is (2, \infty).
RELATION = re.compile(r"[<>=]|\\(?:le|ge|ne|in|mid|mathbb|cup|cap|setminus|begin)(?![a-z])")
_OTHER_RELATION = re.compile(r"[<>]|\\(?:[lg]e|ne|in|mid|approx|equiv|sim|to|[a-zA-Z]*arrow|implies|iff)(?![a-z])")
_TURNED = {">": "<", "<": ">", r"\ge": r"\le", r"\le": r"\ge"}
_SIGN = r"\s*([<>]|\\[gl]e(?![a-z]))\s*"
_SIDE = r"((?:(?!\\[gl]e(?![a-z])|(?<![a-zA-Z])(?:and|or)(?![a-zA-Z]))[^<>=,;])+?)"
_CHAIN = re.compile(f"{_SIDE}{_SIGN}{_SIDE}{_SIGN}{_SIDE}")
_BOUND = re.compile(f"([a-z]){_SIGN}{_SIDE}|{_SIDE}{_SIGN}([a-z])")
_R = r"(?:\\mathbb\s*)?\{?R\}?\s*"
_HALF_OF_R = re.compile(_R + r"[\^_]\s*\{?\s*(?:([+-])|([<>]|\\[gl]e)\s*0)\s*\}?")
_REALS = re.compile(
    r"(?:the )?(?:set of )?(?:all )?(?:the )?(positive |negative |non-?negative |non-?positive )?real(?:s| numbers)"
)
_HALVES = {
    r"(0, \infty)": ("+", ">", "positive"), r"(-\infty, 0)": ("-", "<", "negative"),
    r"[0, \infty)": (r"\ge", "nonnegative"), r"(-\infty, 0]": (r"\le", "nonpositive"), r"\mathbb{R}": ("",),
}  # fmt: skip
_REALS_BY_NAME = {name: interval for interval, names in _HALVES.items() for name in names}
_SET_BUILDER = re.compile(
    rf"\\?\{{\s*([a-z])\s*(?:\\in\s*{_R})?(?:\\mid(?![a-z])|\||:)\s*(?=[^,;]*\1)([^,;]*?)\s*\\?\}}"
)
_LETTER = r"(?:[(\[]\s*([A-Ja-j])\s*[)\]]|([A-J])|([a-j])(?=\s*[.):]))"
_NAMED = rf"(?i:(?:the )?(?:(?:correct|final|best|right) )?(?:answer|option|choice)(?: is)?\s*:?\s*)?{_LETTER}"
_CHOICE = re.compile(rf"{_NAMED}\s*(?:$|[.):]|(?<=[)\]]))(?P<rest>.*)", re.DOTALL)
# B (61) as a gold; the point B (1, 2) and the function F (x) are no choices.
_CHOICE_OF_NUMBER = re.compile(r"([A-J]) (?P<rest>\((?:\\[a-zA-Z]+|[^a-zA-Z(),]|\([^a-zA-Z(),]*\))+\))")
_SEPARATED = re.compile(r"\(?[A-J]\)?(?:(?:\s*,\s*(?:and\s+)?|\s+and\s+)\(?[A-J]\)?)+")
_CHOSEN = re.compile(
    rf"{_NAMED}\s*(?:$|[.):!]|(?<=[)\]])| (?=\()| is (?:the )?(?:correct|right|answer)(?: answer| choice| option)?$)"
    r"(?P<rest>.*)",
    re.DOTALL,
)
# What follows a letter that is a part of a list or of an expression.
_GOES_ON = re.compile(r"\s*(?:and|or|[,;&+*/^=<>-])")
# A second letter in what follows the choice: (E) but not (D). "I" may be a numeral or a pronoun, C and F may be degrees.
_ANOTHER = re.compile(r"[(\[]\s*[A-Ja-j]\s*[)\]]|(?<!circ )(?<![a-zA-Z\\'])(?:[A-HJ](?![a-zA-Z'])|[a-jI](?=[.):]))")
# A verdict against the letter behind it: (B) is incorrect, B: no. As the text of a choice, "No" and "Not enough
# information" stand by themselves.
_RIGHT = r"(?:(?:the|a|an|really) )*(?:correct|right|true|valid|answer|choice|option|it)"
_WRONG = r"(?:incorrect|wrong|false|untrue|excluded|eliminated|ruled out)"
_DENIED = re.compile(
    rf"[)\]]?\s*(?::\s*(?:no(?=\W*$|[,;])|{_WRONG}|not {_RIGHT})|[.:)!]?\s*(?:"
    rf"(?:is|was|seems|looks|(?:would|must|can|could) be)(?: (?!not )[a-z]+){{0,2}} {_WRONG}|"
    rf"(?:is|was)(?:n't|(?: [a-z]+)? not)(?: {_RIGHT}|\W*$)|can(?:not|'t| not) (?:be(?: {_RIGHT}|\W*$)|hold)|"
    r"does(?:n't| not) (?:hold|work|fit|apply)))(?![a-z])"
)
# The article of "E) A rectangle"; "E) A is right, too" names another letter.
_ARTICLE = re.compile(r"^\s*A (?!(?:and|or|but|nor|is|was|too|also|as|may|might|could|would|with|if|then)\b)(?=[a-z])")
# A column, written as a row: (1, 2)^T.
_COLUMN = re.compile(r"^(?:(\(.*\))|\[([^\[\]]*)\])\s*\^\s*\{?\s*(?:T|\\top|\\intercal)\s*\}?$")


@dataclasses.dataclass(frozen=True)
class Group:
    """Parts of an answer and the brackets around them."""

    opening: str  # "(", "[", "\\{", "\\langle"; "" for a bare list; "\\cup" for a union; "matrix" for a matrix of rows
    closing: str
    parts: tuple[str, ...]
    word: str = ""  # "and" or "or" if it separates two parts


def read_group(text: str, thousands: bool = False) -> Group | None:
    """The parts of an answer in clean notation, or None if it has only one part.

    Commas, semicolons, "and" and "or" separate parts; where there is a semicolon, commas do not. The comma of 1,234
    separates inside brackets, unless they are read with `thousands`, and never outside. A set may have one part or none.
    """
    if rows := _matrix_rows(text):
        return Group("matrix", "", tuple(rows))
    text = _COLUMN.sub(lambda m: m[1] or f"({m[2]})", text)
    opening, inside, closing = _outer_brackets(text)
    if opening == "\\{":
        return Group(opening, closing, tuple(_split(inside, thousands=thousands)))
    parts = _split(inside, thousands=thousands)
    if opening and (len(parts) > 1 or (opening == "[" and inside.startswith("["))):
        return Group("\\{" if opening == "{" else opening, "\\}" if opening == "{" else closing, tuple(parts))
    text = re.sub(r"(?<=[)\]])\s*U\s*(?=[(\[])", r"\\cup ", text)
    parts = _split(text, r"\cup")
    if len(parts) > 1:
        return Group(r"\cup", "", tuple(parts))
    parts = _split(text)
    words = {token.strip(" ,") for token, depth in _with_depth(_tokens(text)) if depth == 0} & {"and", "or"}
    return Group("", "", tuple(parts), words.pop() if len(words) == 1 else "") if len(parts) > 1 else None


def condition(text: str) -> str:
    """`\\{x \\mid x > 2\\}` is x > 2, |x| < 1 is -1 < x < 1, "all real numbers" are a set, and `\\mathbb{R}^+` is an interval."""
    if named := _REALS.fullmatch(text.lower()):
        return _REALS_BY_NAME[(named[1] or "").replace("-", "").strip()]
    if half := _HALF_OF_R.fullmatch(text):
        return _REALS_BY_NAME[half[1] or half[2]]
    match = _SET_BUILDER.fullmatch(text)
    text = match[2] if match and RELATION.search(match[2]) else text
    return re.sub(r"^\|([a-z])\|\s*(<|\\le)\s*(\w+)$", r"-\3 \2 \1 \2 \3", text)


def interval(text: str) -> str:
    """`2 > x > 1`, `x > 1 and x < 2` and `2 > x and 1 < x` are 1 < x < 2."""
    if (chain := _CHAIN.fullmatch(text)) and {chain[2], chain[4]} <= {">", r"\ge"}:
        return " ".join((chain[5], _TURNED[chain[4]], chain[3], _TURNED[chain[2]], chain[1]))
    bounds = [_bound(part) for part in text.split(" and ")]
    lower = [bound for bound in bounds if bound and bound[1] in (">", r"\ge")]
    upper = [bound for bound in bounds if bound and bound[1] in ("<", r"\le")]
    if len(bounds) != 2 or not lower or not upper or lower[0][0] != upper[0][0]:
        return text
    (x, low, start), (_, high, end) = lower[0], upper[0]
    return f"{start} {_TURNED[low]} {x} {high} {end}"


def _bound(text: str) -> tuple[str, str, str] | None:
    """(variable, sign, value) of an inequality, with its variable first: 2 < x is ("x", ">", "2")."""
    match = _BOUND.fullmatch(text)
    if match is None:
        return None
    return (match[1], match[2], match[3]) if match[1] else (match[6], _TURNED[match[5]], match[4])


def unwrapped(text: str) -> str:
    """`text` without parentheses or braces around a single part: (5) becomes 5, while (1, 2) stays."""
    while True:
        opening, inside, closing = _outer_brackets(text)
        wraps = (opening, closing) in (("(", ")"), ("{", "}")) and _SET_BUILDER.fullmatch(text) is None
        if not wraps or len(_split(inside, thousands=opening == "{")) != 1:
            return text
        text = inside.rstrip(", ")


def choice(text: str) -> str | None:
    """The letter, in capitals, that a gold in clean notation chooses: E, (E), E., option E, (e), (E) 24, E (24); else None."""
    found = _choice_and_text(text)
    return found[0] if found else None


def text_of_choice(text: str) -> str:
    """The text that a gold has behind its letter: 24 of (E) 24, E: 24 and E (24); empty if it has none, or another letter."""
    found = _choice_and_text(text)
    rest = found[1].lstrip(" .):") if found else ""
    return rest if re.search(r"\w", rest) and _choice_and_text(rest) is None else ""


def _choice_and_text(text: str) -> tuple[str, str] | None:
    if match := _CHOICE_OF_NUMBER.fullmatch(text):
        return match[1], match["rest"]
    match = _CHOICE.fullmatch(text)
    if match is None or _GOES_ON.match(match["rest"]):
        return None
    return (match[1] or match[2] or match[3]).upper(), match["rest"]


def same_choices(answer: str, gold: str) -> bool:
    """Whether the gold is several letters of a choice, ABD, and the answer has the same ones, separated: `A, B, and D`. An answer
    that is not separated may be the name of a segment or a triangle."""
    letters = sorted(re.findall("[A-J]", answer))
    return (
        bool(_SEPARATED.fullmatch(answer))
        and len(gold) <= 6
        and "".join(letters) == gold
        and len({*letters}) == len(letters)
    )


def chosen(text: str) -> str | None:
    """The letter, in capitals, that an answer chooses where the gold is a letter: as `choice`, and with an explanation
    behind (E (24), E is correct). None for an answer that names several letters."""
    match = _CHOSEN.fullmatch(text)
    if match is None or _GOES_ON.match(match["rest"]) or _ANOTHER.search(_ARTICLE.sub("", match["rest"])):
        return None
    if _DENIED.match(text, max(match.end(1), match.end(2), match.end(3))):
        return None
    return (match[1] or match[2] or match[3]).upper()


def sides(text: str) -> list[str]:
    """The sides of an equation or of a chain of equations; the text alone if it is none: a list, or another relation."""
    parts = _split(text, "=")
    return parts if not any(_OTHER_RELATION.search(part) or len(_split(part)) > 1 for part in parts[:-1]) else [text]


def matrix_of(group: Group) -> list[list[str]] | None:
    """The entries of a matrix by rows: of LaTeX, or of brackets in brackets, [[1, 2], [3, 4]]; None for anything else."""
    if group.opening == "matrix":
        return [_split(part[1:-1]) if part.startswith("[") and part.endswith("]") else [part] for part in group.parts]
    if group.opening == "[" and len(group.parts) > 1 and not any("[" in part for part in group.parts):
        rows = [part.replace(",", " ").split() for part in group.parts]
        return rows if len({len(row) for row in rows}) == 1 and len(rows[0]) > 1 else None
    if group.opening in ("[", "(") and all(part.startswith(group.opening) for part in group.parts):
        return [_split(part[1:-1], thousands=False) for part in group.parts]
    return None


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
