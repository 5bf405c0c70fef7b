"""The future value Ω (paper §3.2), and the score that the configured rule computes from it and the entropy."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from appo_jax import ops
from appo_jax.branching.rule import ByScore, Ranking, ZScores
from appo_jax.branching.rules import RULES
from appo_jax.config import BranchingConfig


class BranchingScores(NamedTuple):
    """Per token of R rollouts of T tokens; zeros outside `valid`."""

    score: jax.Array  # [R, T] the ranking value
    preferred: jax.Array  # [R, T] bool: passes the gate, and therefore ranks before every position that does not
    future_value: jax.Array  # [R, T] Ω, unclipped
    constant_future: jax.Array  # [R] bool: clip(Ω) did not vary over the rollout


def future_value(
    log_probs: Float[Array, "R T"], old_log_probs: Float[Array, "R T"], sampled: Bool[Array, "R T"], tau: float, *,
    max_ratio: float = 0.0, max_log_ratio: float = 0.0,
) -> Float[Array, "R T"]:  # fmt: skip
    """Ω_i = exp(Σ_{j ≥ i} γ^{j−i} log ρ_j) over sampled tokens, γ = 2^(−1/τ). All `[R, T]`; 1 outside `sampled`.

    Official code, in the loss: log ρ is clamped to ±`max_log_ratio`, and tokens with ρ > `max_ratio` add nothing to the sum.
    0: off.
    """
    log_ratio = jnp.where(sampled, log_probs - old_log_probs, 0.0)
    if max_log_ratio:
        log_ratio = jnp.clip(log_ratio, -max_log_ratio, max_log_ratio)
    if max_ratio:
        log_ratio = jnp.where(log_ratio <= jnp.log(max_ratio), log_ratio, 0.0)
    total = ops.discounted_suffix_sum(log_ratio, sampled, 2.0 ** (-1.0 / tau))
    return jnp.where(sampled, jnp.exp(total), 1.0)


def branching_scores(
    future: Float[Array, "R T"], entropies: Float[Array, "R T"], valid: Bool[Array, "R T"], config: BranchingConfig
) -> BranchingScores:
    """The scores by the rule `config.score`; `future`, `entropies`, `valid` are `[R, T]`. Z-scores are taken over the
    valid tokens of each rollout. Rules by turns do not score positions: their score is 0.
    """
    clipped = jnp.clip(future, config.clip_low, config.clip_high)
    constant = ops.is_constant(clipped, valid)
    z = ZScores(ops.masked_zscore(entropies, valid), ops.masked_zscore(clipped, valid), constant)
    rule = RULES[config.score]
    score, preferred = rule.score(z, config) if isinstance(rule, ByScore) else Ranking.by(jnp.zeros_like(entropies))
    return BranchingScores(jnp.where(valid, score, 0.0), preferred & valid, future, constant)
