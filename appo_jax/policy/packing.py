"""Packing texts into rows: texts that begin alike share the slots of what they have in common, and rows hold several texts."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from appo_jax.policy.score import Rows


@dataclasses.dataclass(frozen=True)
class Packing:
    """The places of the tokens of n texts in rows of T slots.

    A slot holds a token and the token after it, so a text's last token needs no slot of its own. Two texts in one row share
    their slots up to the first token in which they differ.
    """

    rows: Rows
    """`[R, T]`."""
    row: np.ndarray
    """`[n]` int32: the row of each text."""
    slots: list[np.ndarray]
    """For each text, `[t − 1]` int32: the slots of all its tokens except the last."""


def pack(texts: Sequence[np.ndarray], length: int, at_once: int = 1) -> Packing:
    """Pack texts (token ids `[t]`, t ≥ 1) into rows of `length` slots.

    The longest text comes first. Each text goes into the row where it needs the fewest new slots; among those, into the row
    that it leaves fullest. Empty rows are added until the number of rows is a multiple of `at_once`. The result depends on the
    arguments only. Raises ValueError for a text that is too long for a row.
    """
    sizes = np.array([len(text) - 1 for text in texts])
    if sizes.max() > length:
        raise ValueError(f"a text of {sizes.max() + 1} tokens needs {sizes.max()} slots, but a row has {length}")
    # Big-endian bytes sort as the ids do. In this order, texts that begin alike are neighbours.
    order = sorted(range(len(texts)), key=lambda i: np.asarray(texts[i], ">u4").tobytes())
    shared = _shared([texts[i] for i in order])  # [n, n]: slots that two texts share, in sorted order
    members: list[list[int]] = []  # the texts of each row, as indices into the sorted order
    used = np.zeros(len(texts), int)  # [row]: slots that are filled
    known = np.zeros((len(texts), len(texts)), int)  # [row, text]: slots of the text that the row already holds
    for i in sorted(range(len(order)), key=lambda i: (-sizes[order[i]], i)):
        size = sizes[order[i]]
        new = size - known[: len(members), i]
        left = length - used[: len(members)] - new
        fits = np.flatnonzero(left >= 0)
        if fits.size:
            r = fits[np.lexsort((left[fits], new[fits]))[0]]
        else:
            r, new = len(members), np.append(new, size)
            members.append([])
        members[r].append(i)
        used[r] += new[r]
        np.maximum(known[r], shared[i], out=known[r])
    members += [[]] * (-len(members) % at_once)
    return _laid_out(texts, order, members, shared, length)


def _shared(texts: Sequence[np.ndarray]) -> np.ndarray:
    """`[n, n]`: the numbers of slots that two of n sorted texts share.

    For texts i < j, this is the minimum over the neighbouring pairs between i and j.
    """

    def of_pair(a: np.ndarray, b: np.ndarray) -> int:
        n = min(len(a), len(b))
        differ = np.flatnonzero(a[:n] != b[:n])
        return max(0, (differ[0] if differ.size else n) - 1)

    n = len(texts)
    neighbours = np.array([of_pair(a, b) for a, b in itertools.pairwise(texts)], int)
    shared = np.zeros((n, n), int)
    for i in range(n - 1):
        shared[i, i + 1 :] = np.minimum.accumulate(neighbours[i:])
    shared = np.maximum(shared, shared.T)
    np.fill_diagonal(shared, [len(text) - 1 for text in texts])
    return shared


def _laid_out(
    texts: Sequence[np.ndarray], order: Sequence[int], members: Sequence[Sequence[int]], shared: np.ndarray, length: int
) -> Packing:
    """Lay out each row's tree depth first, which is the order of the sorted texts."""
    shape = len(members), length
    alone = np.tile(
        np.arange(1, length + 1, dtype=np.int32), (shape[0], 1)
    )  # an empty slot sees only itself, and no other slot sees it
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
