"""Tree-GRPO: branch at random turns, at most B in each rollout."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from appo_jax.branching.rule import ByTurns
from appo_jax.branching.tree import Cut, Loop, TreeView, already_branched
from appo_jax.config import BranchingConfig
from appo_jax.types import turn_starts


def random_turns(starts: Sequence[np.ndarray], max_per_rollout: int, loop: Loop) -> list[Cut]:
    """The cuts of a prompt, within the budget; each round takes one turn from every rollout. `starts`: for each rollout, the first
    token of every turn at which a branch may begin."""
    orders = [loop.rng.permutation(of_rollout).tolist()[:max_per_rollout] for of_rollout in starts]
    rounds = [(k, node, t) for node, order in enumerate(orders) for k, t in enumerate(order)]
    return [Cut(node, t) for _, node, t in sorted(rounds)[: loop.budget]]


def turns(tree: TreeView, loop: Loop, config: BranchingConfig) -> list[Cut]:
    """No turn is taken at which a branch begins already."""
    starts = []
    for sampled, branched in zip(tree.sampled, already_branched(tree, include_token=False), strict=True):
        of_rollout = turn_starts(sampled)
        starts.append(of_rollout[~branched[of_rollout]])
    return random_turns(starts, config.num_branch_points, loop)


RULE = ByTurns(turns)
