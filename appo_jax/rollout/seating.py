"""Which fork decodes where: the host's side of the padded tree tensors.

R prefix slots, C columns each, and W rows with W ≤ R·C. A row can sit at any free place, so rows stay busy as long as any
open prefix has forks to continue, and a slot is given to the next prefix when its last fork has ended.

On a mesh rows and slots are split alike into shards, and a row sits on a slot of its own shard: no cache, no query leaves
its device.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from appo_jax.policy.attention import Places
from appo_jax.types import Example, ToolCall


@dataclasses.dataclass(frozen=True)
class Fork:
    """Where a new rollout begins: after `tokens`, which are a prompt or the head of a parent."""

    example: Example
    tokens: np.ndarray  # [t] int32: everything before the first new token
    prompt_length: int
    sampled: np.ndarray  # [t] bool
    log_probs: np.ndarray  # [t] float32
    entropies: np.ndarray  # [t] float32
    calls: tuple[ToolCall, ...]
    states: Mapping[str, Any]  # tool states at the fork
    node: int
    parent: int | None = None
    loop: int = 0
    host: int = 0  # of the rollout

    @property
    def boundary(self) -> int:
        """Index after the last tool result, or after the prompt: where the policy's own current text begins."""
        return self.calls[-1].result_end if self.calls else self.prompt_length


class Seating:
    """Seats forks on W rows, group by group. `groups` are (name, forks that share a prefix); names go through unread.

    `most`: what the number of groups can never exceed. Rows and slots are multiples of `shards`.
    """

    def __init__(
        self, groups: Sequence[tuple[int, Sequence[Fork]]], columns: int, rows: int, most: int, shards: int = 1
    ):
        self.num_rows = rows
        # Of C rows on one prefix the last ends long after the first: twice the slots keep all rows busy until then.
        self.num_slots = rows if columns == 1 else min(2 * -(-rows // columns), most)
        self.num_slots = -(-self.num_slots // shards) * shards
        self.shards = shards
        self._of_row = np.full((rows, 2), (self.num_slots, 0), np.int32)
        self._members = np.full((self.num_slots, columns), rows, np.int32)
        self._groups = deque((i, name, forks) for i, (name, forks) in enumerate(groups) if forks)
        self._pending: list[tuple[int, deque[Fork]]] = [(-1, deque()) for _ in range(self.num_slots)]
        # The first slot of every shard, then the second of each …: few prefixes are spread over the shards.
        self._slots = np.arange(self.num_slots).reshape(shards, -1).T.flatten().tolist()

    @property
    def queued(self) -> bool:
        """Whether forks wait for a row."""
        return bool(self._groups) or any(forks for _, forks in self._pending)

    def shard(self, row: int) -> int:
        return row * self.shards // self.num_rows

    def places(self) -> Places:
        """Every shard counts its rows and slots from its first."""
        W, R = self.num_rows // self.shards, self.num_slots // self.shards
        of_row = self._of_row.copy()
        of_row[:, 0] = np.minimum(of_row[:, 0] - np.arange(self.num_rows) // W * R, R)
        first = np.arange(self.num_slots) // R * W  # row of the slot's shard
        return Places(of_row, np.minimum(self._members - first[:, None], W).astype(np.int32))

    def seat(self) -> tuple[list[tuple[int, int]], list[tuple[int, int, Fork]]]:
        """Give free rows to waiting forks; open prefixes are served before new ones are opened.

        Returns (slot, index in `groups`) of every prefix that must be loaded, indices rising, and (row, name, fork) of
        every fork that begins.
        """
        free: list[deque[int]] = [deque() for _ in range(self.shards)]
        for row in np.flatnonzero(self._of_row[:, 0] == self.num_slots).tolist():
            free[self.shard(row)].append(row)
        beside = {slot: free[slot * self.shards // self.num_slots] for slot in self._slots}
        seated = [who for slot in self._slots for who in self._fill(slot, beside[slot])]
        opened = []
        for slot in self._slots:
            empty = not self._pending[slot][1] and (self._members[slot] == self.num_rows).all()
            if self._groups and beside[slot] and empty:
                index, name, forks = self._groups.popleft()
                self._pending[slot] = name, deque(forks)
                opened.append((slot, index))
                seated += self._fill(slot, beside[slot])
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
