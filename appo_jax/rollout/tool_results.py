"""Tool results as token ids: marked as results and cut to their limit."""

from __future__ import annotations

from appo_jax.errors import ConfigError
from appo_jax.text.tokenizer import Tokenizer
from appo_jax.tools.format import CallFormat, bare_result, result_ids, shield

CUT_MARK = "\n[…]\n"
MAX_TOKEN_CHARS = 64
"""A longer result than this many characters per token is not tokenised whole: only its two ends are."""


class ToolResults:
    """Encodes tool results for a rollout, with at most `max_tokens` tokens including the marks around them. Raises
    ConfigError if the marks alone take that many.
    """

    def __init__(self, tokenizer: Tokenizer, call_format: CallFormat, max_tokens: int):
        self._tokenizer, self._format = tokenizer, call_format
        self._head, self._tail = result_ids(call_format, tokenizer)
        self._cut = tokenizer.encode(CUT_MARK)
        self._max_body = max_tokens - len(self._head) - len(self._tail)
        marks = len(self._head) + len(self._tail) + len(self._cut)
        if marks >= max_tokens:
            raise ConfigError(
                f"rollout.max_result_tokens = {max_tokens}: a result's own marks take {marks} tokens; give it at least "
                f"{marks + 1}"
            )

    def encode(self, text: str) -> list[int]:
        """Token ids of a result between its marks; a long one is cut once, in the middle, with a visible mark."""
        return [*self._head, *self._fitting(shield(text)), *self._tail]

    def encode_rendered(self, rendered: str) -> list[int]:
        """`encode` for a result that `render_result` has rendered, as demonstrations hold it."""
        return self.encode(bare_result(self._format, rendered))

    def _fitting(self, text: str) -> list[int]:
        max_chars = MAX_TOKEN_CHARS * self._max_body
        for complete in (text, text.rstrip()):  # white space at its end is the first to go
            if len(complete) <= 2 * max_chars:
                ids = self._tokenizer.encode(complete)
                if len(ids) <= self._max_body:
                    return ids
        kept, text = self._max_body - len(self._cut), text.rstrip()
        # The last line is kept: in a traceback it names the error, and otherwise it is often what the program computed.
        last_line = text.rpartition("\n")[2]
        tail = len(self._tokenizer.encode(last_line[: max_chars + 1]))
        if tail > kept:
            text, tail = last_line, 0
        tail = max(kept // 2, tail)
        end = self._tokenizer.encode(text[-max_chars:])[-tail:] if tail else []
        return [*self._tokenizer.encode(text[:max_chars])[: kept - tail], *self._cut, *end]
