"""The prefixes of a generation: caches of several prefixes each, computed when needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from appo_jax.config import Architecture
from appo_jax.policy.attention import LayerCache
from appo_jax.policy.parameters import Params
from appo_jax.policy.score import prefill

Caches = Iterator[list[LayerCache]]  # each holds a few prefixes, one a row


def prompt_caches(
    params: Params, prompts: Sequence[np.ndarray], rows: int, length: int, arch: Architecture, dtype: Any
) -> Caches:
    """Caches of the prompts, right-padded to `length`. `rows` prompts are prefilled together, when the first is asked for."""
    for first in range(0, len(prompts), rows):
        tokens = np.zeros((rows, length), np.int32)
        for row, prompt in zip(tokens, prompts[first : first + rows], strict=False):
            row[: len(prompt)] = prompt
        yield prefill(params, tokens, arch=arch, dtype=dtype)


class PrefixSource:
    """The prefixes of a series of caches, numbered through all of them. Indices must rise; caches before the current
    one are freed."""

    def __init__(self, caches: Caches):
        self._caches, self._next = caches, 0  # index of the first prefix of the next cache
        self._cache: list[LayerCache] = []

    def at(self, index: int) -> tuple[list[LayerCache], int]:
        """The cache that holds prefix `index`, and the row within it."""
        while index >= self._next:
            self._cache = next(self._caches)
            self._next += len(self._cache[0][0])
        return self._cache, index - self._next + len(self._cache[0][0])
