"""The figures of the official evaluation, including its faults (rewritten from the behaviour of `metrics.py` and
`math_equivalence.py` in its `evaluation/src`, commit b04e7e9). Published figures were computed with them.

Known faults, kept and tested: answers keep their punctuation, so "Paris." is not "Paris"; mathematics is compared as strings, so
"7.0" is not "7", and everything after `\\text{ ` is cut off.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from appo_jax.reward.qa import overlap_f1


def official_figures(answer: str, golds: Sequence[str], math: bool) -> dict[str, float]:
    """{"equal": 0 or 1} for mathematics, else {"em": 0 or 1, "f1": token F1}: each the best over the golds. No answer gets 0."""
    if math:
        equal = answer and any(is_equiv(_plain(answer), _plain(gold)) for gold in golds)
        return {"equal": float(bool(equal))}
    if not answer:
        return {"em": 0.0, "f1": 0.0}
    found, expected = _without_articles(answer), [_without_articles(gold) for gold in golds]
    return {
        "em": float(found in expected),
        "f1": max((overlap_f1(found.split(), gold.split()) for gold in expected), default=0.0),
    }


def is_equiv(a: str, b: str) -> bool:
    """Whether two answers are the same string after the rewritings of Hendrycks' MATH."""
    try:
        return _rewritten(a) == _rewritten(b)
    except (ValueError, IndexError):  # LaTeX that the rules do not expect is compared as it is
        return a == b


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _without_articles(text: str) -> str:
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower()).split())


def _rewritten(text: str) -> str:
    """The rules of `_strip_string`, in their order. Raises ValueError or IndexError where it fails."""
    for old, new in (("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), ("\\left", ""),
                     ("\\right", ""), ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", "")):  # fmt: skip
        text = text.replace(old, new)
    if "\\text{ " in text:
        text, _ = text.split("\\text{ ")  # a unit
    text = text.replace("\\%", "").replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if text.startswith("."):
        text = "0" + text
    if text.count("=") == 1 and len(text.split("=")[0]) <= 2:  # "x = "
        text = text.split("=")[1]
    text = _braced_roots(text).replace(" ", "")
    text = _braced_fractions(text)
    if text == "0.5":
        return "\\frac{1}{2}"
    whole = re.fullmatch(r"(0|-?[1-9]\d*)/(0|-?[1-9]\d*)", text, re.ASCII)
    return f"\\frac{{{whole[1]}}}{{{whole[2]}}}" if whole else text


def _braced_roots(text: str) -> str:
    first, *rest = text.split("\\sqrt")
    return first + "".join("\\sqrt" + (part if part[0] == "{" else f"{{{part[0]}}}{part[1:]}") for part in rest)


def _braced_fractions(text: str) -> str:
    """`\\frac12` as `\\frac{1}{2}`. A single character after the last `\\frac` leaves the whole text as it is."""
    first, *rest = text.split("\\frac")
    parts = [first]
    for part in rest:
        if part[0] != "{":
            if len(part) < 2:
                return text
            part = f"{{{part[0]}}}" + (part[1:] if part[1] == "{" else f"{{{part[1]}}}{part[2:]}")
        parts.append(part)
    return "\\frac".join(parts)
