"""ARPO (arXiv 2507.19849): branch after a tool call, more likely where the entropy has risen.

The probability of a branch is P = clip(p + w · ΔH, 0, 1), with H taken over a turn's first WINDOW tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from appo_jax.branching.rule import ByTurns
from appo_jax.branching.tree import Cut, Loop, TreeView, already_branched
from appo_jax.config import BranchingConfig
from appo_jax.types import turn_starts

PROBABILITY, RISE_WEIGHT, WINDOW = 0.5, 0.2, 20


def turn_entropy(entropies: np.ndarray, sampled: np.ndarray, start: int, vocab_size: int) -> float:
    """Mean entropy of the turn's first WINDOW tokens, as a share of ln V."""
    turn = np.cumprod(sampled[start : start + WINDOW]).astype(bool)
    return float(entropies[start : start + WINDOW][turn].mean()) / math.log(vocab_size)


def branch_probabilities(entropies: np.ndarray, sampled: np.ndarray, vocab_size: int) -> dict[int, float]:
    """The probability of a branch at each turn that follows a tool result, by the turn's first token.

    ΔH is the turn's entropy less that of the rollout's first turn. `entropies`, `sampled`: `[T]`.
    """
    starts = turn_starts(sampled).tolist()
    if not starts:
        return {}
    first, *later = (turn_entropy(entropies, sampled, t, vocab_size) for t in starts)
    return {
        t: min(1.0, max(0.0, PROBABILITY + RISE_WEIGHT * (entropy - first)))
        for t, entropy in zip(starts[1:], later, strict=True)
    }


def after_tool_calls(
    entropies: Sequence[np.ndarray],
    sampled: Sequence[np.ndarray],
    undrawn_from: Sequence[int],
    loop: Loop,
    penalty: float = 0.0,
    branched: Sequence[np.ndarray] | None = None,
) -> list[Cut]:
    """The cuts of a prompt, within the budget; turns after the rollouts' first calls come first. Beam 2: a turn that is
    drawn is continued twice. `undrawn_from`: for each rollout, the index after which turns have not been drawn yet.
    `penalty`: a turn's probability falls by this share for every branch at the turns just before it. `branched`: for each rollout,
    `[T]` bool, where branches of earlier loops begin (None: nowhere).
    """
    points = []
    for node, (entropy, mask) in enumerate(zip(entropies, sampled, strict=True)):
        probabilities = branch_probabilities(entropy, mask, loop.vocab_size)
        chances = [(t, p) for t, p in probabilities.items() if t > undrawn_from[node]]
        drawn = [t for t in probabilities if t <= undrawn_from[node]]
        taken = branched[node][drawn] if branched is not None else np.zeros(len(drawn), bool)
        in_a_row = int(np.cumprod(taken[::-1]).sum())
        for call, (t, p) in enumerate(chances):
            if loop.rng.random() < p * max(0.0, 1.0 - penalty * in_a_row):
                points.append((call, node, t))
                in_a_row += 1
            else:
                in_a_row = 0
    return [Cut(node, t) for _, node, t in sorted(points)[: loop.budget]]


def turns(tree: TreeView, loop: Loop, config: BranchingConfig, penalty: float = 0.0) -> list[Cut]:
    """Every turn is drawn once, by the first loop after the turn was sampled."""
    latest = [(fork or 0) if at == loop.number - 1 else None for fork, at in zip(tree.forks, tree.loops, strict=True)]
    undrawn_from = [len(s) if fork is None else fork for fork, s in zip(latest, tree.sampled, strict=True)]
    branched = already_branched(tree, include_token=False)
    return after_tool_calls(tree.entropies, tree.sampled, undrawn_from, loop, penalty, branched)


RULE = ByTurns(turns)
