"""The format rules of the robust reward, judged on what the policy itself wrote."""

from __future__ import annotations

import re
from collections.abc import Collection

from appo_jax.reward.latex import last_boxed
from appo_jax.reward.response import Response


def format_error(response: Response, tool_names: Collection[str]) -> str | None:
    """What is wrong with the response's format, or None. Tool results may contain anything.

    - at least one <think>…</think>, every one closed before the next opens;
    - one <answer>…</answer>, outside <think>, with a complete \\boxed{…} inside;
    - no <result> tags of the policy's own: results are the tools' to write;
    - every tool call opened once, closed, at the end of its turn, and answered by a result.
    """
    text = response.sampled_text
    if "<result>" in text or "</result>" in text:
        return "the policy wrote a <result> tag"

    blocks = re.findall(r"</?(?:think|answer)>", text)
    if blocks.count("<answer>") != 1 or blocks.count("</answer>") != 1:
        return "not exactly one <answer>…</answer>"
    if "<think>" not in blocks or not _alternate(blocks):
        return "<think> and <answer> blocks are missing, nested or not closed"
    if last_boxed(text[text.index("<answer>") : text.index("</answer>")]) is None:
        return "no complete \\boxed{…} in the answer"

    for turn, answered in response.turns:
        tags = re.findall(rf"</?(?:{'|'.join(map(re.escape, (*tool_names, 'tool_call')))})>", turn)
        if not tags and not answered:
            continue
        if len(tags) != 2 or not _alternate(tags) or not turn.rstrip().endswith(tags[1]):
            return "a tool call is not one opening tag, its argument and its closing tag at the end of the turn"
        if not answered:
            return "a tool call without a result"
    return None


def _alternate(tags: list[str]) -> bool:
    """<x> </x> <y> </y> …: every opening tag is followed at once by its own closing tag."""
    opening, closing = tags[::2], tags[1::2]
    return len(opening) == len(closing) and all(
        o == c.replace("/", "") and o != c for o, c in zip(opening, closing, strict=True)
    )
