"""LaTeX in answers: finding `\\boxed{…}`, and removing text markup."""

from __future__ import annotations

import re

# A box, a brace, or an escape to step over (\\{ and \\}); `\\\\boxed`, escaped once too often, is a box as well.
_BOX_OR_BRACE = re.compile(r"(?P<box>(?<!\\)\\++boxed\s*\{)|\\.|[{}]", re.DOTALL)
_FRAME = re.compile(r"\\fbox\s*\{")
# A box without braces: what follows on the line, to the end of the formula.
_BARE_BOX = re.compile(
    r"\\boxed(?![a-zA-Z])\s*(?![\s{])((?:[^${}\\\n]|\{(?:[^{}]|\{[^{}]*\})*\}|\\(?!end(?![a-z]))[a-zA-Z]+)+)"
)
_LAYOUT = r"\\(?:text[a-z]*|mbox|q?quad|boxed)\b|\\[,;: ()\[\]]|\*\*|[${}~]"
_ITEM = r"(?:\n\s*[-*•]|\(?\d[.)])\s*"  # the mark of an item of a list
_WORD_BETWEEN = re.compile(r"(?<![a-zA-Z])(?:and|or|as well as)(?![a-zA-Z])|&")
_MAX_GAP = 60  # characters between two boxes of one answer
_TEXT_OR_BRACE = re.compile(
    r"(?P<text>\\(?:text|mbox|mathrm|mathbf|mathit|operatorname|emph|underline)[a-z]*\s*\{)|[{}]"
)
_MATH_DELIMITER = re.compile(r"(?<!\\)\$|\\[()\[\]]")
_NO_SPACE = re.compile(r"\\!|\{,\}")
_SPACE = re.compile(r"\\(?:[,;: ]|q?quad\b|thinspace\b)|~")
_ESCAPED = re.compile(r"\\([%$&#_])")


def last_boxed(text: str) -> str | None:
    """Content of the last `\\boxed{…}` whose braces close (an inner box counts as later than its outer box); else
    None."""
    boxes = _boxes(text)
    return text[boxes[-1][1] : boxes[-1][2]] if boxes else None


def boxed_gold(solution: str) -> str | None:
    """The answer in a solution of a data set: its last box. MATH also writes `\\boxed 2`, and `\\fbox{4}` if there is no box."""
    solution = _BARE_BOX.sub(lambda box: rf"\boxed{{{box[1].rstrip(' .,')}}}", solution)
    return last_boxed(solution if "\\boxed" in solution else _FRAME.sub(r"\\boxed{", solution))


def boxed_answer(text: str, repeats: bool = False) -> str | None:
    """The answer in boxes: the last box, and the boxes right before it that are joined to it by a comma, "and" or the
    like.

    `\\boxed{3} and \\boxed{5}` answers `3, and 5`, while `\\boxed{3}, so \\boxed{5}` answers `5`. Of nested boxes the inner
    ones count. `repeats`: an answer that is boxed twice is written twice. None without a closed box.
    """
    boxes = _boxes(text)
    innermost = [box for i, box in enumerate(boxes) if i + 1 == len(boxes) or boxes[i + 1][0] > box[2]]
    if not innermost:
        return None
    answers: list[tuple[str, str]] = []  # with the word that stands before
    following = None  # where the box after this one begins
    for start, begin, end in reversed(innermost):
        if following is not None and not _joined(text[max(0, start - _MAX_GAP) : start], text[end + 1 : following]):
            break
        if answers:
            gap = _WORD_BETWEEN.search(text[end + 1 : following])
            word = "" if gap is None else "or " if gap[0] == "or" else "and "
            answers[-1] = (word, answers[-1][1])
        answers.append(("", text[begin:end]))
        following = start
    answers.reverse()
    if not repeats:
        first: dict[str, str] = {}  # of each answer, its word
        for word, answer in answers:
            first.setdefault(answer, word)
        answers = [(word, answer) for answer, word in first.items()]
    return ", ".join(word + answer for word, answer in answers)


def _boxes(text: str) -> list[tuple[int, int, int]]:
    """(start, start of the content, end of the content) of every closed box, by start; in time linear in the text."""
    open_braces: list[
        tuple[int, int] | None
    ] = []  # open braces: the start of a box and of its content, or None for another brace
    boxes = []
    for token in _BOX_OR_BRACE.finditer(text):
        if token["box"]:
            open_braces.append(token.span())
        elif token.group() == "{":
            open_braces.append(None)
        elif token.group() == "}" and open_braces and (box := open_braces.pop()):
            boxes.append((*box, token.start()))
    return sorted(boxes)


def _joined(before: str, gap: str) -> bool:
    """Whether the text between two boxes joins them to one answer. `y =` may precede the second box. So may the mark of an
    item of a list (a dash, `2.`) if one precedes the first box, too; else it begins a new step."""
    if len(gap) > _MAX_GAP:
        return False
    before, gap = (re.sub(_LAYOUT, "", part) for part in (before, gap))
    if re.fullmatch(rf"[,;.]?\s*{_ITEM}", gap):
        return re.search(rf"(?:^\s*[-*•]|(?:^|\s){_ITEM})\s*$", before) is not None
    gap = re.sub(r"\s", "", gap)
    return re.fullmatch(r"(?:[,;]|[,;]?(?:and|or|&|aswellas))(?:\\?[a-zA-Z]\w{0,8}=)?", gap) is not None


def plain(text: str) -> str:
    """`text` without LaTeX's text commands, delimiters, spacing and escapes: `\\text{5\\%}` becomes `5%`."""
    text = _NO_SPACE.sub(
        lambda m: "," if "," in m.group() else "", _MATH_DELIMITER.sub("", _without_text_commands(text))
    )
    return _ESCAPED.sub(r"\1", _SPACE.sub(" ", text)).strip()


def _without_text_commands(text: str) -> str:
    """`text` with each `\\text{…}` that closes replaced by what is in it."""
    pieces: list[str] = []
    open_braces: list[int | None] = []  # the piece that opened each text command, None for another brace
    end = 0
    for token in _TEXT_OR_BRACE.finditer(text):
        pieces += (text[end : token.start()], token.group())
        end = token.end()
        if token.group() != "}":
            open_braces.append(len(pieces) - 1 if token["text"] else None)
        elif open_braces and (opening := open_braces.pop()) is not None:
            pieces[opening] = pieces[-1] = ""
    return "".join(pieces) + text[end:]
