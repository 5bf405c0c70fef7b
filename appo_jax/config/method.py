"""The method: where rollouts branch, what an advantage is, what the loss is. Equations: docs/method.md."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from annotated_types import Ge
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from appo_jax.config.bounds import Fraction

# Names of the modules in branching/rules/: a score ranks every position; a rule by turns draws turns at random.
Score = Literal["product", "entropy", "future", "additive"]
TurnRule = Literal["entropy_change", "entropy_balanced", "random_turn"]
Std = Literal["population", "sample"]


@dataclasses.dataclass(frozen=True)
class BranchingConfig:
    """Where and when branches are drawn (eq. 5, algorithm 1)."""

    num_branch_points: PositiveInt = 3
    """B: positions per rollout and loop where a new rollout is drawn. Paper: 3."""
    num_loops: PositiveInt = 1
    """L: loops of scoring and branching. A budget above N·(B+1)^L adds loops until it is used (Algorithm 1). Paper: 1."""
    tau: PositiveFloat = 32.0
    """τ: half-life, in sampled tokens, of the discount γ = 2^(−1/τ) in the future value Ω. Paper: 32."""
    clip_low: NonNegativeFloat = 1.0
    """Ω is clipped to [clip_low, clip_high] before its z-score. Paper: 1; official code: 0.8."""
    clip_high: NonNegativeFloat = 1.2
    """Upper end of that clip, above clip_low. Paper: 1.2."""
    score: Literal[Score, TurnRule] = "product"
    """product: Z(Ω)·Z(H), the paper. entropy, future, additive are its ablations; additive uses the two weights below.
    entropy_change (ARPO), entropy_balanced (AEPO) and random_turn (Tree-GRPO) branch where a turn begins."""
    entropy_weight: NonNegativeFloat = 1.0
    """Weight of Z(H) in the additive score."""
    future_weight: NonNegativeFloat = 1.0
    """Weight of Z(Ω) in the additive score."""
    gate: Literal["both_positive", "literal"] = "both_positive"
    """both_positive: positions with Z(H) > 0 and Z(Ω) > 0 come first, then the others by the product. literal: all
    positions by the product."""
    skip_blank: bool = True
    """Do not branch at tokens that decode to only whitespace or punctuation."""
    refresh: Literal["minibatch", "step"] = "minibatch"
    """When branches are scored and drawn: under the current policy of every mini-batch, or once, at the step's start."""
    include_token: bool = False
    """True: the prefix of a branch includes the scored token, as in the official code. False: the paper."""
    allocation: Literal["per_rollout", "pooled", "proportional"] = "per_rollout"
    """per_rollout: the best B positions of each rollout, one branch each. pooled: the prompt's best positions (official
    code).
    proportional: the best B positions of each rollout share the prompt's budget in proportion to their score (Theorem
    1); those that the gate does not prefer get branches only if no preferred one has a positive score."""
    min_spacing: PositiveInt = 1
    """Least distance, in sampled tokens, between two branch points of one rollout, in whichever loop. 1: any two positions."""


@dataclasses.dataclass(frozen=True)
class AdvantageConfig:
    """What a token's advantage is (eq. 6, 7)."""

    base: Literal["paper", "every_rollout", "shared_prefix", "joint", "init_only", "global", "tree", "turn"] = "paper"
    """paper: eq. 6, for the initial rollouts. every_rollout: eq. 6 for branches too (ours). shared_prefix: official code.
    joint: one group of all rollouts (the paper's ablation "without dual groups"). init_only: one group of the initial rollouts
    (GRPO). global: returns normalised over the mini-batch (REINFORCE++). tree: within the tree plus over all (Tree-GRPO).
    turn: episode plus turns that began in equal states (GiGPO)."""
    scaling: Literal["offset", "plain"] = "offset"
    """offset: A = A_base · (1 + b · clip(Ω)), eq. 7. plain: A = A_base · clip(Ω) (FIPO)."""
    future_weight: NonNegativeFloat = 0.5
    """b of eq. 7. Paper: 0.5; official code: 1. 0: no future-aware scaling."""
    clip_low: NonNegativeFloat = 1.0
    """Ω is clipped to [clip_low, clip_high] here. One-sided, as in the paper: 1. Two-sided: 0.8."""
    clip_high: NonNegativeFloat = 1.2
    """Upper end of that clip, at least clip_low. Paper: 1.2."""
    entropy_weight: NonNegativeFloat = 0.0
    """α of AEPO: A is multiplied by 1 + α·Z(H), with the entropy H under π_θ and Z over the mini-batch's trained tokens. 0:
    off. Official code: 0.2."""
    max_ratio: NonNegativeFloat = 0.0
    """Tokens with a ratio above this are left out of the sum in the Ω of eq. 7, not of the loss (official code: 3). 0:
    off; else above 1. The Ω of the Branching Score keeps them, as in the official code."""
    std: Std = "population"
    """Standard deviation of a group. population: divide by the number of members n. sample: divide by n − 1 and add
    1e-6, as in the official code's GRPO (its APPO estimator uses the population's)."""


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The objective (eq. 8) and the terms that other methods add to it."""

    clip_low: Fraction = 0.2
    """ε of eq. 8, downwards: the ratio is clipped to [1 − clip_low, 1 + clip_high]. Official code: 0.2. 1: no lower bound."""
    clip_high: NonNegativeFloat = 0.2
    """ε of eq. 8, upwards. The paper gives no ε; official code and DAPO: 0.28."""
    surrogate: Literal["clip", "gppo", "gppo_high", "cispo"] = "clip"
    """clip: PPO's, eq. 8. gppo: its value, but clipped tokens keep a bounded gradient. gppo_high: only those
    clipped at the upper end do (AEPO). cispo: sg(clip(ρ))·A·log π."""
    dual_clip: NonNegativeFloat = 0.0
    """c: with A < 0 the surrogate is at least c·A (official code: 3). 0: off; else above 1."""
    max_dual_clipped: Annotated[int, Ge(-1)] = -1
    """Rollouts with more dual-clipped tokens than this are left out of the surrogate's sum, and of the count that token_mean and
    seq_mean divide by (paper and constant divide by a fixed number). Their KL term and entropy bonus stay (official
    code: 1). −1: off."""
    max_log_ratio: NonNegativeFloat = 0.0
    """log ρ is clamped to ±this, in the surrogate and in the Ω of eq. 7 (official code: 20). 0: off."""
    aggregation: Literal["paper", "token_mean", "seq_mean", "constant"] = "paper"
    """How tokens are averaged. paper: eq. 8, 1/M of the sum over rollouts of their token means. token_mean: over all tokens
    of the mini-batch (DAPO). seq_mean: the mean over trained rollouts of their token means (GRPO). constant: the sum over
    the number of rollouts (those that branching could not add included) times their padded length (as Dr. GRPO)."""
    kl_weight: NonNegativeFloat = 0.0
    """β: weight of KL(π_θ‖π_ref). With 0 no reference policy is kept. Paper: 0; official code: 0.001."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """With r = π_ref/π_θ: k1 = −log r, k2 = (log r)²/2, k3 = r − 1 − log r."""
    max_k3: NonNegativeFloat = 0.0
    """k3 is at most this for each token (official code: 10). 0: off."""
    kl_in: Literal["outside", "inside", "reward"] = "outside"
    """Where β·KL is added. outside: outside the sums over rollouts and tokens, as eq. 8 is typeset; KL is the mean over
    trained rollouts of their token means. inside: within those sums, with the surrogate's weights (GRPO's eq. 3; the
    official code's token mean); with aggregation = paper this is N/M of `outside`. reward: subtracted from the reward
    at each token, under the policy that drew the token."""
    entropy_weight: NonNegativeFloat = 0.0
    """Weight of the entropy bonus. 0: off."""
    sampler_cap: NonNegativeFloat = 0.0
    """C: tokens are weighted by min(π_old/π_sampler, C), which corrects for the sampler's different rounding. 0:
    off."""
    mask_truncated: bool = False
    """Leave rollouts that hit a limit (length, calls, time) out of the loss."""
