"""Which fork decodes in which row: the host's side of the padded tree tensors. There are R prefix slots with C columns
each, and W ≤ R·C rows. A row can take any free place, so rows stay busy as long as any loaded prefix has forks left; a
slot gets the next prefix when its last fork has ended. On a mesh rows and slots are split into the same shards, and a
row uses a slot of its own shard, so that no cache and no query leaves its device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from appo_jax.policy.attention import Places
from appo_jax.rollout.rows import Fork
from appo_jax.rollout.shapes import GenerationShapes


class Seating:
    """Assigns forks to W rows, group by group. `groups`: (name, forks that share a prefix). A name is only returned
    with the forks of its group.
    """

    def __init__(self, groups: Sequence[tuple[int, Sequence[Fork]]], shapes: GenerationShapes):
        self.num_rows, self.num_slots, self.shards, self._shard = shapes.rows, shapes.slots, shapes.shards, shapes.shard
        self._of_row = np.full((self.num_rows, 2), (self.num_slots, 0), np.int32)
        self._members = np.full((self.num_slots, shapes.columns), self.num_rows, np.int32)
        self._groups = deque((i, name, forks) for i, (name, forks) in enumerate(groups) if forks)
        self._pending: list[tuple[int, deque[Fork]]] = [(-1, deque()) for _ in range(self.num_slots)]
        # The first slot of every shard, then the second of each, and so on: few prefixes are spread over all shards.
        self._slots = np.arange(self.num_slots).reshape(self.shards, -1).T.flatten().tolist()

    @property
    def queued(self) -> bool:
        """Whether forks wait for a row."""
        return bool(self._groups) or any(forks for _, forks in self._pending)

    def places(self) -> Places:
        """Every shard counts its rows and slots from its first."""
        W, R = self.num_rows // self.shards, self.num_slots // self.shards
        of_row = self._of_row.copy()
        of_row[:, 0] = np.minimum(of_row[:, 0] - np.arange(self.num_rows) // W * R, R)
        first = np.arange(self.num_slots) // R * W  # row of the slot's shard
        return Places(of_row, np.minimum(self._members - first[:, None], W).astype(np.int32))

    def seat(self) -> tuple[list[tuple[int, int]], list[tuple[int, int, Fork]]]:
        """Give free rows to waiting forks; loaded prefixes come before new ones.

        Returns (slot, index in `groups`) of every prefix that must be loaded, indices rising, and (row, name, fork) of
        every fork that begins.
        """
        free: list[deque[int]] = [deque() for _ in range(self.shards)]
        for row in np.flatnonzero(self._of_row[:, 0] == self.num_slots).tolist():
            free[self._shard(row)].append(row)
        free_for = {
            slot: free[slot * self.shards // self.num_slots] for slot in self._slots
        }  # rows of the slot's shard
        seated = [new for slot in self._slots for new in self._fill(slot, free_for[slot])]
        opened = []
        for slot in self._slots:
            empty = not self._pending[slot][1] and (self._members[slot] == self.num_rows).all()
            if self._groups and free_for[slot] and empty:
                index, name, forks = self._groups.popleft()
                self._pending[slot] = name, deque(forks)
                opened.append((slot, index))
                seated += self._fill(slot, free_for[slot])
        return opened, seated

    def _fill(self, slot: int, free: deque[int]) -> list[tuple[int, int, Fork]]:
        name, forks = self._pending[slot]
        seated = []
        for column in np.flatnonzero(self._members[slot] == self.num_rows).tolist():
            if not (free and forks):
                break
            row = free.popleft()
            self._of_row[row] = slot, column
            self._members[slot, column] = row
            seated.append((row, name, forks.popleft()))
        return seated

    def release(self, row: int) -> None:
        """Free the place of a row whose rollout is over."""
        slot, column = self._of_row[row]
        self._members[slot, column] = self.num_rows
        self._of_row[row] = self.num_slots, 0
