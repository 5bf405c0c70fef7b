"""Shapes against cases computed by hand, and the bounds on rollouts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appo_jax.config import BranchingConfig, RolloutConfig
from appo_jax.policy.packing import pack
from appo_jax.rollout.shapes import GenerationShapes, PackedShape, Shapes

QUICKSTART = RolloutConfig(
    num_initial=4, budget=16, max_prompt_tokens=24, max_response_tokens=112, max_result_tokens=48, decode_rows=64
)


def test_the_quickstarts_shapes() -> None:
    """16 prompts, 4 initial rollouts each, 32 rollouts a mini-batch, 3 branches each."""
    shapes = Shapes(QUICKSTART, BranchingConfig(num_branch_points=3))
    every = {"suffix_length": 113, "append_rows": 8, "result_lengths": (48,), "shards": 1}
    assert shapes.initial(16, 4) == GenerationShapes(rows=64, slots=16, columns=4, prefix_length=24, **every)
    # 64 rows at 3 to a prefix sit on 22 prefixes; twice as many slots are more than the 32 rollouts that there are.
    assert shapes.branches(32) == GenerationShapes(rows=64, slots=32, columns=3, prefix_length=136, **every)
    assert shapes.prefill_rows(16) == 16
    # 3 rows of 136 tokens are less than 512, 4 are more; each of 3 devices has 3. They are joined to rows of at most 1,024.
    assert (shapes.packed(32), shapes.packed(2), shapes.packed(32, 16)) == ((1, 408), (1, 272), (4, 544))
    assert Shapes(QUICKSTART, BranchingConfig(), shards=3).packed(32) == (3, 408)
    long = dataclasses.replace(QUICKSTART, max_response_tokens=1000)
    assert Shapes(long, BranchingConfig()).packed(32, 4) == (4, 1024)
    assert Shapes(QUICKSTART, BranchingConfig(), shards=3).initial(16, 4).append_rows == 9


def test_without_shared_prefixes_every_row_has_a_slot() -> None:
    config = dataclasses.replace(QUICKSTART, share_prefix=False)
    shapes = Shapes(config, BranchingConfig(num_branch_points=3))
    found = shapes.branches(32)
    assert (found.rows, found.slots, found.columns) == (64, 64, 1)


@pytest.mark.parametrize(("limit", "lengths"), [(24, (24,)), (48, (48,)), (512, (32, 128, 512)), (600, (32, 128, 600))])
def test_padded_lengths_hold_every_result(limit: int, lengths: tuple[int, ...]) -> None:
    shapes = Shapes(dataclasses.replace(QUICKSTART, max_result_tokens=limit), BranchingConfig()).initial(4, 2)
    assert shapes.result_lengths == lengths
    for length in range(1, limit + 1):
        assert shapes.padded_result(length) == min(padded for padded in lengths if padded >= length)


@pytest.mark.parametrize(
    ("score", "loops", "expected"),
    [
        ("product", 1, [2, 6]),
        ("product", 3, [2, 6, 16]),
        ("random_turn", 2, [2, 16]),
        ("entropy_change", 3, [2, 16, 16]),
    ],
)
def test_rollouts_that_a_loop_can_score(score: str, loops: int, expected: list[int]) -> None:
    """One initial rollout, two branches a rollout and loop, 8 rollouts at most. By turns one rollout may have all branches."""
    branching = BranchingConfig(num_branch_points=2, num_loops=loops, score=score)
    shapes = Shapes(dataclasses.replace(QUICKSTART, num_initial=1, budget=8), branching)
    assert shapes.max_scored(num_trees=2, num_initial=1) == expected


@given(
    rows=st.integers(1, 70), groups=st.integers(1, 40), columns=st.integers(1, 6), shards=st.integers(1, 8),
    share=st.booleans(),
)  # fmt: skip
def test_every_row_has_a_place_and_the_mesh_can_split_all(
    rows: int, groups: int, columns: int, shards: int, share: bool
) -> None:
    config = dataclasses.replace(QUICKSTART, decode_rows=rows, share_prefix=share)
    shapes = Shapes(config, BranchingConfig(), shards).generation(groups, columns, 8)
    assert shapes.rows % shards == shapes.slots % shards == 0
    assert min(rows, groups * columns) <= shapes.rows < min(rows, groups * columns) + shards
    assert shapes.slots * shapes.columns >= min(rows, groups * columns)


@given(st.data())
def test_rollouts_of_any_lengths_fit_into_the_passes_that_are_allowed_for(data: st.DataObject) -> None:
    max_tokens = data.draw(st.integers(2, 12))
    texts = data.draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=max_tokens), min_size=1, max_size=24))
    shape = PackedShape(data.draw(st.integers(1, 3)), data.draw(st.integers(max_tokens - 1, 40)))
    packing = pack([np.array(text, np.int32) for text in texts], shape.length, shape.rows)
    assert len(packing.rows.tokens) <= shape.rows * shape.max_passes(len(texts), max_tokens)
