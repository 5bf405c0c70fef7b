"""The two kinds of rules that choose branch points: by a score of every position, and by turns. A rule is a module of
`branching/rules/` that defines `RULE`; the config field `branching.score` names the module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from appo_jax.branching.select import far_from, select, tree_sizes
from appo_jax.branching.tree import Cut, Loop, TreeView, already_branched
from appo_jax.config import BranchingConfig


class ZScores(NamedTuple):
    """The inputs of a score: z-scores over each rollout's valid tokens. R rollouts of T tokens."""

    entropy: jax.Array  # [R, T] Z(H)
    future: jax.Array  # [R, T] Z(clip(Ω))
    constant_future: jax.Array  # [R] bool: clip(Ω) does not vary over the rollout


class Ranking(NamedTuple):
    """The order of positions: preferred ones first; among equals, by score."""

    score: jax.Array  # [R, T]
    preferred: jax.Array  # [R, T] bool

    @classmethod
    def by(cls, score: jax.Array) -> Ranking:
        """Rank by the score alone."""
        return cls(score, jnp.ones(score.shape, bool))


@dataclasses.dataclass(frozen=True)
class ByScore:
    """Branches begin at the positions with the highest score. `score` runs inside jit."""

    score: Callable[[ZScores, BranchingConfig], Ranking]

    def choose(self, tree: TreeView, loop: Loop, config: BranchingConfig) -> list[Cut]:
        """The cuts of one loop, in the order in which the branches become nodes."""
        branched = already_branched(tree, config.include_token)
        free = [
            valid & far_from(taken, sampled, config.min_spacing)
            for valid, taken, sampled in zip(tree.valid, branched, tree.sampled, strict=True)
        ]
        points = select(tree.scores, tree.preferred, free, tree.sampled, loop.budget, config)
        return [Cut(node, position + config.include_token) for node, position in points]

    def max_sizes(self, num_initial: int, budget: int, config: BranchingConfig) -> list[int]:
        """The maximal number of rollouts of a tree before the first loop and after each loop: a loop draws up to B
        branches from each rollout. There are L loops, or more if the budget needs them: Algorithm 1 branches while
        fewer than M − N branches exist.
        """
        return tree_sizes(num_initial, config.num_branch_points, config.num_loops, budget)


@dataclasses.dataclass(frozen=True)
class ByTurns:
    """Branches begin where a turn begins; a turn is the policy's own text up to the next tool result, or to the end.

    `turns` draws them at random. What is left of the budget after the last loop goes to new rollouts from the prompt,
    as in ARPO.
    """

    turns: Callable[[TreeView, Loop, BranchingConfig], list[Cut]]

    def choose(self, tree: TreeView, loop: Loop, config: BranchingConfig) -> list[Cut]:
        """The cuts of one loop, in the order in which the branches become nodes."""
        cuts = self.turns(tree, loop, config)
        left = loop.budget - len(cuts) if loop.number == config.num_loops else 0
        return cuts + rollouts_from_the_prompt(tree.num_initial, tree.prompt_length, left)

    def max_sizes(self, num_initial: int, budget: int, config: BranchingConfig) -> list[int]:
        """The maximal number of rollouts of a tree before the first loop and after each loop. A rollout may get more
        than B branches, so each loop may use up the budget; the last one does.
        """
        return [num_initial, *[budget] * config.num_loops]


Rule = ByScore | ByTurns


def rollouts_from_the_prompt(num_initial: int, prompt_length: int, count: int) -> list[Cut]:
    """Cuts for `count` new rollouts from the prompt: at the first token of each initial rollout in turn."""
    return [Cut(k % num_initial, prompt_length) for k in range(count)]
