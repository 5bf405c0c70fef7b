"""The little LaTeX that answers are written in: finding `\\boxed{…}`, and reading text through its markup."""

from __future__ import annotations

import re

_BOXED = re.compile(r"\\boxed\s*\{")
_TEXT_COMMAND = re.compile(r"\\(?:text|mbox|mathrm|mathbf|mathit|operatorname)[a-z]*\s*\{([^{}]*)\}")
_MATH_DELIMITER = re.compile(r"(?<!\\)\$|\\[()\[\]]")
_NO_SPACE = re.compile(r"\\!|\{,\}")
_SPACE = re.compile(r"\\(?:[,;: ]|q?quad\b|thinspace\b)|~")
_ESCAPED = re.compile(r"\\([%$&#_])")


def last_boxed(text: str) -> str | None:
    """Content of the last `\\boxed{…}` whose braces close (an inner one counts as later than its outer); else None."""
    for match in reversed(list(_BOXED.finditer(text))):
        depth = 1
        for brace in re.finditer(r"\\.|[{}]", text[match.end() :], re.DOTALL):  # `\\.` steps over \{ and \}
            depth += {"{": 1, "}": -1}.get(brace.group(), 0)
            if depth == 0:
                return text[match.end() : match.end() + brace.start()]
    return None


def plain(text: str) -> str:
    """`text` without LaTeX's text commands, delimiters, spacing and escapes: `\\text{5\\%}` becomes `5%`."""
    while (unwrapped := _TEXT_COMMAND.sub(r"\1", text)) != text:
        text = unwrapped
    text = _NO_SPACE.sub(lambda m: "," if "," in m.group() else "", _MATH_DELIMITER.sub("", text))
    return _ESCAPED.sub(r"\1", _SPACE.sub(" ", text)).strip()
