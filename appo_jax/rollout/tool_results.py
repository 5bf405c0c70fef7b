"""Tool results as token ids: marked as results, cut to their limit, and of a few lengths for the device."""

from __future__ import annotations

from appo_jax.errors import ConfigError
from appo_jax.text.tokenizer import Tokenizer
from appo_jax.tools.format import CallFormat, result_ids, shield

CUT_MARK = " […]"


class ToolResults:
    """Encodes what tools return as it enters a rollout, `most` tokens at most, marks included.

    Raises ConfigError where the marks alone take that many.
    """

    def __init__(self, tokenizer: Tokenizer, call_format: CallFormat, most: int):
        self._tokenizer, self._most = tokenizer, most
        self._head, self._tail = result_ids(call_format, tokenizer)
        self._cut_tail = [*tokenizer.encode(CUT_MARK), *self._tail]
        marks = len(self._head) + len(self._cut_tail)
        if marks >= most:
            raise ConfigError(
                f"rollout.max_result_tokens = {most}: a result's own marks take {marks} tokens; give it at least {marks + 1}"
            )
        self.buckets = result_buckets(most)

    def encode(self, text: str) -> list[int]:
        """Token ids of a result, cut with a visible mark where it is too long."""
        ids = self._tokenizer.encode(shield(text))
        if len(self._head) + len(ids) + len(self._tail) <= self._most:
            return [*self._head, *ids, *self._tail]
        keep = max(0, self._most - len(self._head) - len(self._cut_tail))
        return [*self._head, *ids[:keep], *self._cut_tail]

    def bucket(self, length: int) -> int:
        """The length that a result of `length` tokens is padded to."""
        return next(bucket for bucket in self.buckets if bucket >= length)


def result_buckets(most: int) -> list[int]:
    """Lengths in which tool results are appended: 32, 128, 512 … while well below `most`, and `most`."""
    buckets = [32]
    while 2 * buckets[-1] < most:
        buckets.append(4 * buckets[-1])
    return [*buckets[:-1], most]
