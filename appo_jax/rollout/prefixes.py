"""Where the prefixes of a generation come from: caches with a row for each, made when they are wanted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from appo_jax.config import Architecture
from appo_jax.policy.attention import LayerCache
from appo_jax.policy.parameters import Params
from appo_jax.policy.score import prefill


def prompt_caches(
    params: Params, prompts: Sequence[np.ndarray], rows: int, length: int, arch: Architecture, dtype: Any
) -> Iterator[list[LayerCache]]:
    """Caches of the prompts, right-padded to `length`, `rows` at a time and not before they are asked for."""
    for first in range(0, len(prompts), rows):
        tokens = np.zeros((rows, length), np.int32)
        for row, prompt in zip(tokens, prompts[first : first + rows], strict=False):
            row[: len(prompt)] = prompt
        yield prefill(params, tokens, arch=arch, dtype=dtype)


class CacheRows:
    """The rows of an iterator of caches, asked for in rising order; caches that are past are let go."""

    def __init__(self, caches: Iterator[list[LayerCache]]):
        self._caches, self._first, self._cache = caches, 0, next(caches)

    def at(self, index: int) -> tuple[list[LayerCache], int]:
        """The cache that holds row `index` of them all, and the row within it."""
        while index >= self._first + len(self._cache[0][0]):
            self._first += len(self._cache[0][0])
            self._cache = next(self._caches)
        return self._cache, index - self._first
