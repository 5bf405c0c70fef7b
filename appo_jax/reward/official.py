"""The reward of the official code, including its faults (rewritten from the behaviour of `compute_score` in its
`deep_research.py`). It reads the whole response text, including tool results. Known faults, kept and tested: "5" equals
"-5", "25" equals "2.5", the gold "A" never scores, spaces in LaTeX matter, a result that contains a tag breaks the
format, a policy that writes both closing tags without a call gets the bonus.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from appo_jax.reward.grade import grade
from appo_jax.reward.qa import overlap_f1
from appo_jax.reward.response import Response
from appo_jax.types import RewardResult

_DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CLOSED = ("yes", "no", "noanswer")


def official_reward(response: Response, bonus: float) -> RewardResult:
    """−1 for a broken format, else token F1, plus `bonus` (theirs: 0.1) when F1 > 0 and both closing tags occur.

    `correct` comes from grade.py, so that accuracy means the same under every reward.
    """
    correct = grade(response).correct
    answer = official_answer(response.opening + response.text)
    if answer is None:
        return RewardResult(-1.0, correct, {"f1": 0.0, "format": 0.0, "bonus": 0.0})
    f1 = official_f1(answer, response.golds)
    earned = bonus if f1 > 0 and "</search>" in response.text and "</python>" in response.text else 0.0
    return RewardResult(f1 + earned, correct, {"f1": f1, "format": 1.0, "bonus": earned})


def official_answer(text: str) -> str | None:
    """The boxed answer, or None if the format is broken."""
    if text.count("<think>") != text.count("</think>") or "<think>" not in text:
        return None
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    if not (_calls_are_answered(text, "search") and _calls_are_answered(text, "python")):
        return None
    start, end = text.index("<answer>"), text.index("</answer>")
    block = text[start + len("<answer>") : end]
    if start > end or "\\boxed{" not in block or "}" not in block:
        return None
    return _last_boxed(block)


def _calls_are_answered(text: str, tool: str) -> bool:
    """Whether each opening tag is followed by its closing tag, <result> and </result>, in this order."""
    position = 0
    while (start := text.find(f"<{tool}>", position)) >= 0:
        close, result = text.find(f"</{tool}>", start), text.find("<result>", start)
        position = text.find("</result>", result) if result >= 0 else -1
        if not start < close < result < position:
            return False
    return True


def _last_boxed(block: str) -> str | None:
    if "\\boxed " in block:  # the brace-less spelling wins wherever it stands, up to a dollar sign
        return block.split("\\boxed ")[-1].split("$")[0]
    tail = block[block.rindex("\\boxed") :]
    if not tail.startswith("\\boxed{"):
        return None
    depth = 0
    for i, ch in enumerate(tail):
        depth += {"{": 1, "}": -1}.get(ch, 0)
        if ch == "}" and depth == 0:
            return tail[len("\\boxed{") : i]
    return None


def official_f1(answer: str, golds: Sequence[str]) -> float:
    """Highest token F1 after lower-casing, deleting ASCII punctuation, then the words a, an and the."""

    def tokens(text: str) -> list[str]:
        return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_DELETE_PUNCTUATION)).split()

    best = 0.0
    predicted = tokens(answer)
    for gold in golds:
        expected = tokens(gold)
        if predicted != expected and any(" ".join(side) in _CLOSED for side in (predicted, expected)):
            continue
        best = max(best, overlap_f1(predicted, expected))
    return best
