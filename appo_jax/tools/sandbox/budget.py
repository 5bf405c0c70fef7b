"""Counts the memory of all snapshots together. A snapshot shares its memory with the snapshots forked from it. So freeing an
early one frees no shared memory while a later one lives; that memory is then counted for the later ones."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(eq=False)
class _Weight:
    above: _Weight | None
    memory: int  # bytes of private memory, pages shared with its ancestors included
    files: int  # bytes of files of its own
    alive: bool = True
    below: set[_Weight] = dataclasses.field(default_factory=set)

    @property
    def added(self) -> int:
        """The bytes that it uses in addition to its nearest kept ancestor."""
        return max(0, self.memory - (self.above.memory if self.above else 0)) + self.files


class Budget:
    """The limit of bytes for all snapshots together, and what they use of it."""

    def __init__(self, total: int, root_memory: int = 0):
        self.total = total
        self.used = 0
        self._root = _Weight(None, root_memory, 0)
        self._weights: dict[int, _Weight] = {0: self._root}

    def start(self, root_memory: int) -> None:
        """Set the memory of state 0. All states share it, so it is not counted."""
        self._root.memory = root_memory

    def add(self, identity: int, parent: int, memory: int, files: int) -> bool:
        """Count a new snapshot. Returns False, without counting it, if it would exceed the limit."""
        above = self._weights.get(parent, self._root)
        weight = _Weight(above, memory, files)
        if self.used + weight.added > self.total:
            return False
        self._weights[identity] = weight
        above.below.add(weight)
        self.used += weight.added
        return True

    def growth(self, parent: int, memory: int) -> int:
        """Bytes that a process forked from `parent` has added so far."""
        return max(0, memory - self._weights.get(parent, self._root).memory)

    def remove(self, identity: int) -> None:
        """Remove a snapshot. The memory that later ones share with it stays counted."""
        weight = self._weights.pop(identity, None) if identity else None
        if weight is not None:
            weight.alive = False
            self._fold(weight)

    def _fold(self, weight: _Weight) -> None:
        """Take a dead snapshot out of the tree, unless two or more branches share its memory."""
        above = weight.above
        if above is None or weight.alive or len(weight.below) > 1:
            return
        self.used -= weight.added
        above.below.discard(weight)
        for heir in weight.below:  # at most one
            self.used -= heir.added
            heir.above = above
            above.below.add(heir)
            self.used += heir.added
        self._fold(above)
