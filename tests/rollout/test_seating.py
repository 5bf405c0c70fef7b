"""Seating: every fork gets a row exactly once, no two rows have the same place, and rows are kept busy."""

import itertools
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from appo_jax.config import BranchingConfig, RolloutConfig
from appo_jax.rollout.seating import Seating
from appo_jax.rollout.shapes import Shapes


@given(
    sizes=st.lists(st.integers(0, 5), max_size=12), columns=st.integers(1, 4), rows=st.integers(1, 9),
    spare=st.integers(0, 2), shards=st.integers(1, 3), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_every_fork_sits_once_beside_its_prefix(
    sizes: list[int], columns: int, rows: int, spare: int, shards: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    groups: list[tuple[int, list[Any]]] = [(g, [(g, i) for i in range(size)]) for g, size in enumerate(sizes)]
    config = RolloutConfig(decode_rows=rows * shards)
    shapes = Shapes(config, BranchingConfig(), shards).generation(len(groups) + spare, columns, 8)
    seating = Seating(groups, shapes)
    rows = shapes.rows // shards
    slots = seating.num_slots // shards
    loaded: dict[int, int] = {}  # slot -> group whose prefix it holds
    sitting: dict[int, tuple[int, int]] = {}
    served, last_loaded = [], -1
    for _ in range(10 * (sum(sizes) + 1)):
        opened, seated = seating.seat()
        for slot, index in opened:
            assert index > last_loaded  # the source of prefixes is read once, in order
            last_loaded = index
            assert not any(
                w // rows == slot // slots and seating.places().of_row[w, 0] == slot % slots for w in sitting
            )
            loaded[slot] = index
        for row, name, fork in seated:
            assert row not in sitting
            assert fork[0] == name
            sitting[row] = fork
            served.append(fork)
        places = seating.places()
        for row, fork in sitting.items():
            slot, column = places.of_row[row]  # a shard counts from its own first slot and row
            slot += row // rows * slots
            assert loaded[slot] == fork[0]
            assert places.members[slot, column] == row % rows
        taken = places.members.reshape(shards, slots, columns) < rows
        assert taken.sum() == len(sitting)
        for shard in range(shards):
            if sum(row // rows == shard for row in sitting) == rows:
                continue
            # A row stands idle only when every waiting fork lacks a column or its group a slot, or has it elsewhere.
            slot_of = {group: slot for slot, group in loaded.items()}
            for group, forks in groups:
                if set(forks) <= set(served):
                    continue
                if group not in slot_of:
                    assert taken[shard].any(axis=1).all()
                elif slot_of[group] // slots == shard:
                    assert taken[shard, slot_of[group] % slots].all()
        if not sitting:
            break
        for row in [row for row in sitting if rng.random() < 0.4]:
            seating.release(row)
            del sitting[row]
    assert not seating.queued
    assert sorted(served) == sorted(itertools.chain(*(forks for _, forks in groups)))
