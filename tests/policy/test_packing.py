"""Packed rows against the texts in them, by brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appo_jax.policy.kernels import visible
from appo_jax.policy.packing import pack

texts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9).map(np.array), min_size=1, max_size=12)


@given(texts, st.integers(8, 20), st.integers(1, 4))
def test_a_slot_sees_the_tokens_of_its_text_up_to_its_own(texts: list[np.ndarray], length: int, at_once: int) -> None:
    packing = pack(texts, length, at_once)
    rows = packing.rows
    assert all(x.shape == (len(rows.tokens), length) and x.dtype == np.int32 for x in rows)
    assert len(rows.tokens) % at_once == 0
    seen = np.asarray(visible(rows.ends))
    for text, r, slots in zip(texts, packing.row, packing.slots, strict=True):
        assert rows.tokens[r, slots].tolist() == text[:-1].tolist()
        assert rows.targets[r, slots].tolist() == text[1:].tolist()
        assert rows.positions[r, slots].tolist() == list(range(len(text) - 1))
        for i, slot in enumerate(slots):
            assert np.flatnonzero(seen[r, slot]).tolist() == slots[: i + 1].tolist()
    assert seen[..., range(length), range(length)].all(), "a slot that sees nothing has no softmax"


@given(texts, st.integers(8, 20))
def test_each_beginning_stands_in_a_row_once(texts: list[np.ndarray], length: int) -> None:
    packing = pack(texts, length)
    for r in range(len(packing.rows.tokens)):
        held = [text for text, row in zip(texts, packing.row, strict=True) if row == r]
        beginnings = {tuple(text[: t + 1]) for text in held for t in range(1, len(text))}
        used = {int(slot) for slots, row in zip(packing.slots, packing.row, strict=True) if row == r for slot in slots}
        assert used == set(range(len(beginnings)))


def test_rows_are_filled_by_hand() -> None:
    """Prompts of 3 with answers of 4, 3, 3 and 1 tokens; a row has 9 slots, one fewer than its longest text has tokens."""
    a, b, c, d = (np.array([1, 2, 3, *own]) for own in ([4, 4, 4, 4], [5, 5, 5], [6, 6, 6], [7]))
    other = np.array([9, 9, 9, 9])
    packing = pack([d, b, a, other, c], 9)
    # a takes 6 slots; b shares the first two and needs three more, which fills the row; c begins another; d joins it with one
    # new slot; the other prompt has three left there.
    assert packing.row.tolist() == [1, 0, 0, 1, 1]
    assert packing.slots[2][:2].tolist() == packing.slots[1][:2].tolist()
    assert (packing.rows.ends[0, :2] == 9).all()


def test_a_text_that_no_row_holds() -> None:
    with pytest.raises(ValueError, match="11 tokens needs 10 slots, but a row has 9"):
        pack([np.arange(4), np.arange(11)], 9)
