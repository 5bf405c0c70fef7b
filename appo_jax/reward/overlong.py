"""DAPO's soft punishment of overlong responses (arXiv 2503.14476, eq. 13)."""

from __future__ import annotations


def overlong_penalty(length: int, limit: int, buffer: int) -> float:
    """The punishment (≤ 0) that is added to the reward of a response of `length` tokens under a limit of `limit`
    tokens.

    0 while length ≤ limit − buffer, then falling in proportion, −1 at the limit. A `buffer` of 0 punishes nothing.
    """
    if buffer == 0:
        return 0.0
    return -min(1.0, max(0.0, (length - (limit - buffer)) / buffer))
