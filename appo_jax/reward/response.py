"""The response that a reward function receives."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence

from appo_jax.text.tokenizer import Tokenizer
from appo_jax.types import Kind, Segment, StopReason


@dataclasses.dataclass(frozen=True)
class Response:
    """A finished rollout as text: the policy's own words and the tool results between them, without the prompt."""

    segments: tuple[Segment, ...]
    golds: tuple[str, ...]
    kind: Kind
    tools_used: frozenset[str]  # names of the tools that were called
    stop_reason: StopReason
    question: str = ""
    opening: str = ""  # the end of the prompt that the policy continues: a template may open <think> for it

    @property
    def text(self) -> str:
        """All text, including tool results."""
        return "".join(segment.text for segment in self.segments)

    @property
    def turns(self) -> list[tuple[str, bool]]:
        """The policy's text between tool results; each piece with whether a result follows it."""
        turns = []
        for sampled, group in itertools.groupby(self.segments, key=lambda segment: segment.sampled):
            if sampled:
                turns.append(("".join(segment.text for segment in group), False))
            elif turns:
                turns[-1] = (turns[-1][0], True)
        return turns

    @property
    def framed_turns(self) -> list[str]:
        """The texts of `turns`, with the thoughts that the prompt, or the template after a tool result, opened for the policy."""
        opening, texts = self.opening, []
        for sampled, group in itertools.groupby(self.segments, key=lambda segment: segment.sampled):
            text = "".join(segment.text for segment in group)
            if sampled:
                texts.append(opening + text)
            opening = "" if sampled else opened_thought(text)
        return texts

    @property
    def framed_text(self) -> str:
        """`sampled_text`, with the thoughts that were opened for the policy."""
        return "\n".join(self.framed_turns)

    @property
    def sampled_text(self) -> str:
        """The policy's text. A line break replaces each tool result, so that no tag can form across it."""
        return "\n".join(text for text, _ in self.turns)


def prompt_opening(prompt: Sequence[int], tokenizer: Tokenizer) -> str:
    """The thought that a prompt, or a result in a chat template, opens (and perhaps closes) for the policy; "" for most."""
    token_bytes = tokenizer.token_bytes()
    start = len(prompt)
    while start and token_bytes[prompt[start - 1]]:  # the policy's turn begins after the last control token
        start -= 1
    return opened_thought(tokenizer.decode(list(prompt[start:])))


def text_after(opening: str, text: str) -> str:
    """What a policy writes after `opening` (see `opened_thought`), if it would write `text` without an opening.

    A thought that is open already is not opened again. If `text` has no thought at its beginning, the open one is closed."""
    if text.startswith(opening):
        return text.removeprefix(opening)
    if "</think>" in opening:  # the template has opened and closed a thought, which `text` may do too
        return _EMPTY_THOUGHT.sub("", text)
    if thought := _THOUGHT.match(text):
        return text[thought.end() :]
    tag = re.search("</?think>", text)
    goes_on = tag is not None and tag[0] == "</think>"  # it was written after an opening
    return text if goes_on else f"\n</think>\n\n{text}"


_THOUGHT = re.compile(r"\s*<think>\s*")
_EMPTY_THOUGHT = re.compile(r"\A\s*<think>\s*</think>\s*")
_OPENED_THOUGHT = re.compile(r"<think>\s*(?:</think>\s*)?\Z")


def opened_thought(text: str) -> str:
    """The thought that `text` ends with, if it is open or empty: `<think>`, or `<think>` and `</think>`."""
    found = _OPENED_THOUGHT.search(text[-200:])
    return found[0] if found else ""
