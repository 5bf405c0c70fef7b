"""A prompt's tree as the branching rules see it, and the cuts that they return. Plain arrays, no model, no device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Cut(NamedTuple):
    """Where a branch begins: it keeps the first `length` tokens of the rollout `node` and samples the rest."""

    node: int
    length: int


@dataclasses.dataclass(frozen=True)
class TreeView:
    """One prompt's rollouts. Every list has an entry for each rollout; entry n is the rollout with node n.

    Arrays are `[T]`, T being the length of that rollout.
    """

    prompt_length: int
    parents: Sequence[int | None]  # node that the rollout was branched from; None for initial rollouts
    forks: Sequence[int | None]  # index of the first token that it does not share with its parent
    loops: Sequence[int]  # branching loop that drew it; 0 for initial rollouts
    sampled: Sequence[np.ndarray]  # bool: the policy chose this token
    entropies: Sequence[np.ndarray]  # float32, nats, under the current policy
    scores: Sequence[np.ndarray]  # float32: the score that ranks positions
    preferred: Sequence[np.ndarray]  # bool: ranks before every position that is not preferred
    valid: Sequence[np.ndarray]  # bool: a branch may begin here

    @property
    def num_initial(self) -> int:
        return sum(parent is None for parent in self.parents)


@dataclasses.dataclass(frozen=True)
class Loop:
    """The branching loop for which a rule chooses cuts."""

    number: int  # 1 … L
    budget: int  # rollouts that may still be added to the tree
    vocab_size: int
    rng: np.random.Generator  # of this tree and loop


def already_branched(tree: TreeView, include_token: bool) -> list[np.ndarray]:
    """`[T]` bool for each rollout of a tree: whether a branch that keeps the same tokens exists already. A branch
    shares its first tokens with its parent, so a position among them is the same branch point in both; all rollouts share
    the prompt.
    """

    def drawer(node: int, length: int) -> int | None:
        """The rollout that drew the last of the first `length` tokens of `node`; None for the prompt."""
        if length <= tree.prompt_length:
            return None
        while (parent := tree.parents[node]) is not None and (fork := tree.forks[node]) is not None and length <= fork:
            node = parent
        return node

    pairs = zip(tree.parents, tree.forks, strict=True)
    branched = {(drawer(p, f), f) for p, f in pairs if p is not None and f is not None}
    out = [np.zeros(len(sampled), bool) for sampled in tree.sampled]
    for node, taken in enumerate(out):
        for by, length in branched:
            if length - include_token < len(taken) and drawer(node, length) == by:
                taken[length - include_token] = True
    return out
