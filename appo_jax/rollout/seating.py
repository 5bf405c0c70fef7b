"""Which fork decodes where: the host's side of the padded tree tensors.

R prefix slots, C columns each, and W rows with W ≤ R·C. A row can sit at any free place, so rows stay busy as long as any
open prefix has forks to continue, and a slot is given to the next prefix when its last fork has ended.
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

    The number of prefix slots is a multiple of `shards`.
    """

    def __init__(self, groups: Sequence[tuple[int, Sequence[Fork]]], columns: int, rows: int, shards: int = 1):
        self.num_rows = rows
        # Of C rows on one prefix the last ends long after the first: twice the slots keep all rows busy until then.
        self.num_slots = rows if columns == 1 else 2 * -(-rows // columns)
        self.num_slots = -(-self.num_slots // shards) * shards
        self._of_row = np.full((rows, 2), (self.num_slots, 0), np.int32)
        self._members = np.full((self.num_slots, columns), rows, np.int32)
        self._groups = deque((i, name, forks) for i, (name, forks) in enumerate(groups) if forks)
        self._pending: list[tuple[int, deque[Fork]]] = [(-1, deque()) for _ in range(self.num_slots)]

    @property
    def queued(self) -> bool:
        """Whether forks wait for a row."""
        return bool(self._groups) or any(forks for _, forks in self._pending)

    def places(self) -> Places:
        return Places(self._of_row.copy(), self._members.copy())

    def seat(self) -> tuple[list[tuple[int, int]], list[tuple[int, int, Fork]]]:
        """Give free rows to waiting forks; open prefixes are served before new ones are opened.

        Returns (slot, index in `groups`) of every prefix that must be loaded, indices rising, and (row, name, fork) of
        every fork that begins.
        """
        free = deque(np.flatnonzero(self._of_row[:, 0] == self.num_slots).tolist())
        seated = [who for slot in range(self.num_slots) for who in self._fill(slot, free)]
        opened = []
        for slot in range(self.num_slots):
            if not (free and self._groups):
                break
            if not self._pending[slot][1] and (self._members[slot] == self.num_rows).all():
                index, name, forks = self._groups.popleft()
                self._pending[slot] = name, deque(forks)
                opened.append((slot, index))
                seated += self._fill(slot, free)
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
