"""Texts into rows without padding: what several begin with stands in a row once, and rows are filled."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from appo_jax.policy.score import Rows


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where the tokens of n texts stand in rows of T slots.

    A slot holds a token and the token after it, so the last token of a text needs none. Two texts share their slots up to the
    first token in which they differ, where they stand in one row.
    """

    rows: Rows
    """`[R, T]`."""
    row: np.ndarray
    """`[n]` int32: the row of each text."""
    slots: list[np.ndarray]
    """Of each text, `[t − 1]` int32: the slots of its tokens but the last."""


def pack(texts: Sequence[np.ndarray], length: int, at_once: int = 1) -> Packing:
    """Pack texts (token ids `[t]`, t ≥ 1) into rows of `length` slots: longest first, each into the row in which it needs the
    fewest new slots, then the one that it leaves fullest.

    Rows are added until there is a multiple of `at_once`. The result follows from the arguments alone. Raises ValueError for a
    text that no row can hold.
    """
    sizes = np.array([len(text) - 1 for text in texts])
    if sizes.max() > length:
        raise ValueError(f"a text of {sizes.max() + 1} tokens does not fit into {length} slots and its last token")
    # Big-endian bytes of ids sort as the ids do; texts that begin alike become neighbours.
    order = sorted(range(len(texts)), key=lambda i: np.asarray(texts[i], ">u4").tobytes())
    shared = _shared([texts[i] for i in order])  # [n, n] slots of two texts, in sorted order
    members: list[list[int]] = []  # of each row, by sorted order
    used = np.zeros(len(texts), int)
    known = np.zeros((len(texts), len(texts)), int)  # [row, text]: slots that the row has already
    for i in sorted(range(len(order)), key=lambda i: (-sizes[order[i]], i)):
        size = sizes[order[i]]
        new = size - known[: len(members), i]
        room = length - used[: len(members)] - new
        fits = np.flatnonzero(room >= 0)
        if fits.size:
            r = fits[np.lexsort((room[fits], new[fits]))[0]]
        else:
            r, new = len(members), np.append(new, size)
            members.append([])
        members[r].append(i)
        used[r] += new[r]
        np.maximum(known[r], shared[i], out=known[r])
    members += [[]] * (-len(members) % at_once)
    return _laid_out(texts, order, members, shared, length)


def _shared(texts: Sequence[np.ndarray]) -> np.ndarray:
    """`[n, n]`: the slots that two of n sorted texts share. Those of two are the least of those of neighbours between them."""

    def of(a: np.ndarray, b: np.ndarray) -> int:
        n = min(len(a), len(b))
        differ = np.flatnonzero(a[:n] != b[:n])
        return max(0, (differ[0] if differ.size else n) - 1)

    n = len(texts)
    neighbours = np.array([of(a, b) for a, b in itertools.pairwise(texts)], int)
    shared = np.zeros((n, n), int)
    for i in range(n - 1):
        shared[i, i + 1 :] = np.minimum.accumulate(neighbours[i:])
    shared = np.maximum(shared, shared.T)
    np.fill_diagonal(shared, [len(text) - 1 for text in texts])
    return shared


def _laid_out(
    texts: Sequence[np.ndarray], order: Sequence[int], members: Sequence[Sequence[int]], shared: np.ndarray, length: int
) -> Packing:
    """The rows, depth first: sorted texts are the leaves of the tree in their order."""
    shape = len(members), length
    alone = np.tile(
        np.arange(1, length + 1, dtype=np.int32), (shape[0], 1)
    )  # an empty slot sees itself, and none sees it
    tokens, targets, positions = np.zeros((3, *shape), np.int32)
    rows = Rows(tokens, targets, positions, alone)
    row, slots = np.zeros(len(texts), np.int32), [np.zeros(0, np.int32)] * len(texts)
    for r, of_row in enumerate(members):
        at, path, before = 0, np.zeros(0, np.int32), None
        for i in sorted(of_row):
            text, known = texts[order[i]], 0 if before is None else shared[before, i]
            new = np.arange(at, at + len(text) - 1 - known, dtype=np.int32)
            at, path, before = at + len(new), np.concatenate([path[:known], new]), i
            rows.tokens[r, new], rows.targets[r, new] = text[known:-1], text[known + 1 :]
            rows.positions[r, new] = np.arange(known, len(text) - 1)
            rows.ends[r, path] = at
            row[order[i]], slots[order[i]] = r, path
    return Packing(rows, row, slots)
