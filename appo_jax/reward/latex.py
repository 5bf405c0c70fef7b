"""The little LaTeX that answers are written in: finding `\\boxed{…}`, and reading text through its markup."""

from __future__ import annotations

import re

# A box, a brace, or an escape to step over (\\{ and \\}); `\\\\boxed`, escaped once too often, is a box as well.
_BOX_OR_BRACE = re.compile(r"(?P<box>(?<!\\)\\++boxed\s*\{)|\\.|[{}]", re.DOTALL)
_TEXT_COMMAND = re.compile(r"\\(?:text|mbox|mathrm|mathbf|mathit|operatorname)[a-z]*\s*\{([^{}]*)\}")
_MATH_DELIMITER = re.compile(r"(?<!\\)\$|\\[()\[\]]")
_NO_SPACE = re.compile(r"\\!|\{,\}")
_SPACE = re.compile(r"\\(?:[,;: ]|q?quad\b|thinspace\b)|~")
_ESCAPED = re.compile(r"\\([%$&#_])")


def last_boxed(text: str) -> str | None:
    """Content of the last `\\boxed{…}` whose braces close (an inner one counts as later than its outer); else None.

    One pass, in time linear in the text."""
    open_braces: list[
        int | None
    ] = []  # of each brace that is still open: where its box's content begins, if it is a box
    content: tuple[int, int] | None = None
    for token in _BOX_OR_BRACE.finditer(text):
        if token["box"]:
            open_braces.append(token.end())
        elif token.group() == "{":
            open_braces.append(None)
        elif token.group() == "}" and open_braces:
            start = open_braces.pop()
            if start is not None and (content is None or start > content[0]):
                content = start, token.start()
    return text[slice(*content)] if content else None


def plain(text: str) -> str:
    """`text` without LaTeX's text commands, delimiters, spacing and escapes: `\\text{5\\%}` becomes `5%`."""
    while (unwrapped := _TEXT_COMMAND.sub(r"\1", text)) != text:
        text = unwrapped
    text = _NO_SPACE.sub(lambda m: "," if "," in m.group() else "", _MATH_DELIMITER.sub("", text))
    return _ESCAPED.sub(r"\1", _SPACE.sub(" ", text)).strip()
