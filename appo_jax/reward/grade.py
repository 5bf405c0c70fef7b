"""Whether an answer is right: the source of `correct` under every reward, and so of accuracy."""

from __future__ import annotations

import dataclasses

from appo_jax.reward import qa
from appo_jax.reward.latex import boxed_answer
from appo_jax.reward.math import equals_one
from appo_jax.reward.response import Response

_OPEN, _CLOSE = "<answer>", "</answer>"


@dataclasses.dataclass(frozen=True)
class Grade:
    """How good an answer is."""

    score: float  # in [0, 1]: math 0 or 1, qa the best token F1
    correct: bool  # math: equal to a gold; qa: exact match with an alias
    timed_out: bool = False  # math-verify gave up


def final_answer(response: Response, repeats: bool = False) -> str | None:
    """The policy's answer in any format. Only the policy's text counts, never a tool result.

    The last `\\boxed{…}` of the last <answer> block (or several that are joined), or the block's text; without a block, the
    last box anywhere. `repeats`: of joined boxes, an answer that is boxed twice is written twice.
    """
    text = response.sampled_text
    block = _last_block(text)
    if block is None or not block.strip():
        return boxed_answer(text, repeats)
    boxed = boxed_answer(block, repeats)
    return block.strip() if boxed is None else boxed


def _last_block(text: str) -> str | None:
    """The text of the last `<answer>…</answer>`."""
    close = text.rfind(_CLOSE)
    while close >= 0:
        before = text.rfind(_CLOSE, 0, close)
        start = text.find(_OPEN, max(0, before), close)
        if start >= 0:
            return text[start + len(_OPEN) : close]
        close = before
    return None


def grade(response: Response) -> Grade:
    """Compare the final answer with the golds by the response's kind. No answer gets 0."""
    answer = final_answer(response)
    if answer is None:
        return Grade(0.0, False)
    if response.kind == "qa":
        return Grade(qa.token_f1(answer, response.golds), qa.exact_match(answer, response.golds))
    repeated = final_answer(response, repeats=True) or ""  # what is boxed twice may be meant twice: (3, 3)
    verdict = equals_one(tuple(dict.fromkeys((answer, repeated))), response.golds)
    return Grade(float(verdict is True), verdict is True, verdict is None)
