"""Tree-GRPO: branch at random turns, at most B in each rollout."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from appo_jax.branching.rule import ByTurns
from appo_jax.branching.tree import Cut, Loop, TreeView
from appo_jax.config import BranchingConfig
from appo_jax.types import turn_starts


def random_turns(sampled: Sequence[np.ndarray], max_per_rollout: int, loop: Loop) -> list[Cut]:
    """The cuts of a prompt, within the budget; each round takes one turn from every rollout. `sampled`: `[T]` of each
    rollout."""
    orders = [loop.rng.permutation(turn_starts(mask)).tolist()[:max_per_rollout] for mask in sampled]
    rounds = [(k, node, t) for node, order in enumerate(orders) for k, t in enumerate(order)]
    return [Cut(node, t) for _, node, t in sorted(rounds)[: loop.budget]]


def turns(tree: TreeView, loop: Loop, config: BranchingConfig) -> list[Cut]:
    return random_turns(tree.sampled, config.num_branch_points, loop)


RULE = ByTurns(turns)
