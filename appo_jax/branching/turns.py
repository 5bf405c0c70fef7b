"""Branch points of the baselines that branch where a turn begins: ARPO after tool calls, Tree-GRPO anywhere.

A turn is a stretch of the policy's own text: the beginning of the response, or what follows a tool result. Both draw
lots. A prompt whose turns do not use up the budget gets whole new rollouts for the rest, as in ARPO.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from appo_jax.types import turn_starts

# ARPO (arXiv 2507.19849): P = clip(p + w · ΔH, 0, 1), H over a turn's first WINDOW tokens.
PROBABILITY, ENTROPY_WEIGHT, WINDOW = 0.5, 0.2, 20


def turn_entropy(entropies: np.ndarray, sampled: np.ndarray, start: int, vocab_size: int) -> float:
    """Mean entropy of the turn's first WINDOW tokens, as a share of ln V."""
    turn = np.cumprod(sampled[start : start + WINDOW]).astype(bool)
    return float(entropies[start : start + WINDOW][turn].mean()) / math.log(vocab_size)


def branch_probabilities(entropies: np.ndarray, sampled: np.ndarray, vocab_size: int) -> dict[int, float]:
    """ARPO: the probability of a branch at each turn that follows a tool result, by its first token.

    ΔH is the turn's entropy less that of the rollout's first turn. `entropies`, `sampled`: `[T]`.
    """
    starts = turn_starts(sampled).tolist()
    if not starts:
        return {}
    first, *later = (turn_entropy(entropies, sampled, t, vocab_size) for t in starts)
    return {
        t: min(1.0, max(0.0, PROBABILITY + ENTROPY_WEIGHT * (entropy - first)))
        for t, entropy in zip(starts[1:], later, strict=True)
    }


def after_tool_calls(
    entropies: Sequence[np.ndarray], sampled: Sequence[np.ndarray], own_from: Sequence[int], budget: int,
    vocab_size: int, rng: np.random.Generator,
) -> list[tuple[int, int]]:  # fmt: skip
    """ARPO's branch points `(rollout, position)` of one prompt, at most `budget`, the rollouts' first calls first.

    Beam 2: a turn whose lot says so goes on twice. `own_from`: where the tokens begin whose lots are yet to be drawn.
    """
    points = []
    for n, (h, own) in enumerate(zip(entropies, sampled, strict=True)):
        probabilities = branch_probabilities(h, own, vocab_size)
        chances = [(t, p) for t, p in probabilities.items() if t > own_from[n]]
        points += [(call, n, t) for call, (t, p) in enumerate(chances) if rng.random() < p]
    return [(n, t) for _, n, t in sorted(points)[:budget]]


def random_turns(
    sampled: Sequence[np.ndarray], per_rollout: int, budget: int, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """Tree-GRPO's: random turns of each rollout, `per_rollout` at most, served in rounds over the rollouts."""
    orders = [rng.permutation(turn_starts(own)).tolist()[:per_rollout] for own in sampled]
    rounds = [(k, n, t) for n, order in enumerate(orders) for k, t in enumerate(order)]
    return [(n, t) for _, n, t in sorted(rounds)[:budget]]


def fresh(num_initial: int, prompt_length: int, count: int) -> list[tuple[int, int]]:
    """`count` whole new rollouts, as branches at the first token of the initial rollouts in turn."""
    return [(k % num_initial, prompt_length) for k in range(count)]
