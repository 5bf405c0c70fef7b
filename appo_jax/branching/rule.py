"""The two kinds of rules that choose branch points: by a score of every position, and by turns.

A rule is a module of `branching/rules/` with a `RULE`; the module's name is what `branching.score` says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from appo_jax.branching.select import select, tree_sizes
from appo_jax.branching.tree import Cut, Loop, TreeView, already_branched
from appo_jax.config import BranchingConfig


class ZScores(NamedTuple):
    """What a score is made of: z-scores over each rollout's valid tokens. R rollouts of T tokens."""

    entropy: jax.Array  # [R, T] Z(H)
    future: jax.Array  # [R, T] Z(clip(Ω))
    constant_future: jax.Array  # [R] bool: clip(Ω) does not vary over the rollout


class Ranking(NamedTuple):
    """How positions rank: preferred ones first, and by their score among themselves."""

    score: jax.Array  # [R, T]
    preferred: jax.Array  # [R, T] bool

    @classmethod
    def by(cls, score: jax.Array) -> Ranking:
        """By the score alone."""
        return cls(score, jnp.ones(score.shape, bool))


@dataclasses.dataclass(frozen=True)
class ByScore:
    """Branches begin where a score is highest. `score` runs inside jit."""

    score: Callable[[ZScores, BranchingConfig], Ranking]

    def choose(self, tree: TreeView, loop: Loop, config: BranchingConfig) -> list[Cut]:
        """The cuts of one loop, in the order in which the branches become nodes."""
        taken = already_branched(tree.parents, tree.forks, [len(s) for s in tree.sampled], config.include_token)
        free = [valid & ~branched for valid, branched in zip(tree.valid, taken, strict=True)]
        points = select(tree.scores, tree.preferred, free, tree.sampled, loop.budget, config)
        return [Cut(node, position + config.include_token) for node, position in points]

    def max_sizes(self, num_initial: int, budget: int, config: BranchingConfig) -> list[int]:
        """The most rollouts of a tree before the first loop and after each one: a loop draws up to B branches a rollout.

        L loops, or as many more as the budget needs: Algorithm 1 branches while fewer than M − N branches exist.
        """
        return tree_sizes(num_initial, config.num_branch_points, config.num_loops, budget)


@dataclasses.dataclass(frozen=True)
class ByTurns:
    """Branches begin where a turn begins; a turn is the policy's own text up to the next tool result, or to the end.

    `turns` draws lots. What is left of the budget after the last loop goes to whole new rollouts, as in ARPO.
    """

    turns: Callable[[TreeView, Loop, BranchingConfig], list[Cut]]

    def choose(self, tree: TreeView, loop: Loop, config: BranchingConfig) -> list[Cut]:
        """The cuts of one loop, in the order in which the branches become nodes."""
        cuts = self.turns(tree, loop, config)
        left = loop.budget - len(cuts) if loop.number == config.num_loops else 0
        return cuts + whole_rollouts(tree.num_initial, tree.prompt_length, left)

    def max_sizes(self, num_initial: int, budget: int, config: BranchingConfig) -> list[int]:
        """The most rollouts of a tree before the first loop and after each one.

        A rollout may have more than B branches, so every loop may fill the budget; the last one does.
        """
        return [num_initial, *[budget] * config.num_loops]


Rule = ByScore | ByTurns


def whole_rollouts(num_initial: int, prompt_length: int, count: int) -> list[Cut]:
    """`count` whole new rollouts: branches at the first token of the initial rollouts, each in turn."""
    return [Cut(k % num_initial, prompt_length) for k in range(count)]
