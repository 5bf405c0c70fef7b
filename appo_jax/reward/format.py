"""The format rules of the robust reward, checked on the text that the policy wrote."""

from __future__ import annotations

import re

from appo_jax.reward.latex import last_boxed
from appo_jax.reward.response import Response
from appo_jax.tools.format import CallFormat


def format_error(response: Response, call_format: CallFormat) -> str | None:
    """What is wrong with the response's format, or None. Tool results may contain anything.

    - at least one <think>…</think>, every one closed before the next opens; one that the prompt opened counts;
    - one <answer>…</answer>, outside <think>, with a complete \\boxed{…} inside;
    - no marks of a tool result in the policy's text, in any spelling: only tools write results;
    - every tool call well formed, at the end of its turn, and answered by a result.
    """
    text = response.framed_text
    if (mark := call_format.invented_result(text)) is not None:
        return f"the policy wrote the mark of a tool result, {mark[:40]}"

    blocks = re.findall(r"</?(?:think|answer)>", text)
    if blocks.count("<answer>") != 1 or blocks.count("</answer>") != 1:
        return "not exactly one <answer>…</answer>"
    if "<think>" not in blocks or not _alternate(blocks):
        return "<think> and <answer> blocks are missing, nested or not closed"
    if last_boxed(text[text.index("<answer>") : text.index("</answer>")]) is None:
        return "no complete \\boxed{…} in the answer"

    for turn, answered in response.turns:
        if (error := call_format.turn_error(turn, answered)) is not None:
            return error
    return None


def _alternate(tags: list[str]) -> bool:
    """<x> </x> <y> </y> …: every opening tag is closed before the next tag opens."""
    opening, closing = tags[::2], tags[1::2]
    return len(opening) == len(closing) and all(
        o == c.replace("/", "") and o != c for o, c in zip(opening, closing, strict=True)
    )
