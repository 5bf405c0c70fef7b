"""The Branching Score (paper §3.2): token entropy times the policy's future likelihood gain, per rollout."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from appo_jax import ops
from appo_jax.config import BranchingConfig


class BranchingScores(NamedTuple):
    """Per token of R rollouts of T tokens; zeros outside `valid`."""

    score: jax.Array  # [R, T] the ranking value
    preferred: jax.Array  # [R, T] bool: passes the gate, and so ranks before every position that does not
    future_value: jax.Array  # [R, T] Ω, unclipped
    constant_future: jax.Array  # [R] bool: Ω did not vary over the rollout, the score is Z(H) alone


def future_value(log_probs: jax.Array, old_log_probs: jax.Array, sampled: jax.Array, tau: float) -> jax.Array:
    """Ω_i = exp(Σ_{j ≥ i} γ^{j−i} log ρ_j) over sampled tokens, γ = 2^(−1/τ). All `[R, T]`; 1 outside `sampled`."""
    log_ratio = jnp.where(sampled, log_probs - old_log_probs, 0.0)
    total = ops.discounted_suffix_sum(log_ratio, sampled, 2.0 ** (-1.0 / tau))
    return jnp.where(sampled, jnp.exp(total), 1.0)


def branching_scores(
    future: jax.Array, entropies: jax.Array, valid: jax.Array, config: BranchingConfig
) -> BranchingScores:
    """BS = Z(clip(Ω)) · Z(H) over each rollout's valid tokens; `future`, `entropies`, `valid` are `[R, T]`.

    A constant clip(Ω) carries no information and leaves Z(H) (as in the first mini-batch, where π_θ = π_old). With the
    gate `both_positive`, positions with Z(H) > 0 and Z(Ω) > 0 are preferred: a product of two negatives is no reason to
    branch. Where Ω is constant nothing needs the gate.
    """
    clipped = jnp.clip(future, config.clip_low, config.clip_high)
    constant = ops.is_constant(clipped, valid)
    z_entropy = ops.masked_zscore(entropies, valid)
    z_future = ops.masked_zscore(clipped, valid)
    everywhere = jnp.ones_like(valid)
    if config.score == "product":
        score = jnp.where(constant[:, None], z_entropy, z_entropy * z_future)
        both = (z_entropy > 0) & (z_future > 0)
        preferred = jnp.where(constant[:, None] | (config.gate == "literal"), everywhere, both)
    elif config.score == "entropy":
        score, preferred = z_entropy, everywhere
    elif config.score == "future":
        score, preferred = z_future, everywhere
    else:  # additive; the scores by turn (branching/turns.py) draw lots and look at none of this
        score = config.entropy_weight * z_entropy + config.future_weight * z_future
        preferred = everywhere
    return BranchingScores(jnp.where(valid, score, 0.0), preferred & valid, future, constant)
