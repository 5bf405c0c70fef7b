"""The prefixes of a generation: caches of several prefixes each, computed when needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from appo_jax.config import Architecture
from appo_jax.policy.attention import LayerCache
from appo_jax.policy.parameters import Params
from appo_jax.policy.score import prefill


class Prefix(NamedTuple):
    """Where a prefix stands."""

    cache: list[LayerCache]
    row: int  # of the cache
    slots: (
        np.ndarray
    )  # [T] int32: of its tokens in the row; T is that of a prefix slot, what is beyond the prefix is never read


Source = Iterator[Prefix]  # the prefixes of a generation, in the order of its groups


def prompt_prefixes(
    params: Params, prompts: Sequence[np.ndarray], rows: int, length: int, arch: Architecture, dtype: Any
) -> Source:
    """The prompts, right-padded to `length`. `rows` of them are prefilled together, when the first is asked for."""
    for first in range(0, len(prompts), rows):
        tokens = np.zeros((rows, length), np.int32)
        some = prompts[first : first + rows]
        for row, prompt in zip(tokens, some, strict=False):
            row[: len(prompt)] = prompt
        cache = prefill(params, tokens, arch=arch, dtype=dtype)
        for place in range(len(some)):
            yield Prefix(cache, place, np.arange(length, dtype=np.int32))
