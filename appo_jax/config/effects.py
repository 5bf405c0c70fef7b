"""What each config field affects. Decided from this table: which fields a run may change when it is continued, which the
arms of a study share, which cold starts and measured accuracies can be used again, and which samples may be mixed.
"""

from __future__ import annotations

import enum


class Affects(enum.Flag):
    """What another value of a field changes. Nothing: what a run computes stays the same."""

    NOTHING = 0
    ROUNDING = enum.auto()
    """How something is computed, but not what: sums in another order, so the last bits, and therefore rollouts, may differ."""
    STEP = enum.auto()
    """A training step."""
    COLD_START = enum.auto()
    """The policy after the cold start."""
    ACCURACY = enum.auto()
    """How the held-out accuracy of a given policy is measured."""
    CURVE = enum.auto()
    """At which steps the held-out accuracy is measured."""
    SAMPLES = enum.auto()
    """The rollouts that `appo-jax eval` draws from a given policy."""
    ADDRESS = enum.auto()
    """Nothing, because a service may move. But whether an address is given at all affects everything."""


EVERYTHING = Affects.STEP | Affects.COLD_START | Affects.ACCURACY | Affects.SAMPLES

# A field, or a group of fields for all that are not named themselves.
_TABLE: dict[str, Affects] = {
    **dict.fromkeys(
        (
            "run_dir", "steps", "max_sampled_tokens", "checkpoint_every", "sft.checkpoint_every", "keep_checkpoints",
            "keep_best_checkpoints", "keep_rollouts", "stop_grace_seconds", "max_silent_seconds", "eval.sets",
            "tools.max_unavailable", "tools.pause_seconds", "tools.python.allow_private", "tools.search.allow_private",
            "tools.search.timeout", "tools.search.max_retries", "tools.search.max_per_second", "reward.timeout",
            # A judge that is given or left out while another function gives the rewards decides only sets of `eval.sets`.
            "reward.judge", "reward.judge.url", "reward.judge.key_variable", "reward.judge.concurrency",
            "reward.judge.timeout", "reward.judge.attempts", "reward.judge.cache",
        ),
        Affects.NOTHING,
    ),
    **dict.fromkeys(("tools.python.url", "tools.search.url"), Affects.ADDRESS),
    **dict.fromkeys(
        (
            "mesh", "optimizer.micro_batch", "optimizer.remat", "sft.micro_batch", "rollout.decode_rows",
            "rollout.share_prefix", "tools.max_concurrency",
        ),
        Affects.ROUNDING,
    ),
    **dict.fromkeys(
        (
            "init_from", "algorithm", "prompts_per_step", "prompts_per_minibatch", "max_resamples", "rollout.num_initial",
            "rollout.budget", "rollout.temperature", "branching", "advantage", "loss", "optimizer", "reward.terms",
            "reward.tool_bonus", "reward.overlong_buffer",
        ),
        Affects.STEP,
    ),
    "sft": Affects.COLD_START,
    **dict.fromkeys(("optimizer.b1", "optimizer.b2", "optimizer.max_grad_norm"), Affects.STEP | Affects.COLD_START),
    "seed": Affects.STEP | Affects.COLD_START | Affects.SAMPLES,
    **dict.fromkeys(("rollout.top_p", "rollout.top_k"), Affects.STEP | Affects.SAMPLES),
    # The cold start trains all parameters and is measured before there are adapters.
    "policy.lora": Affects.STEP | Affects.SAMPLES,
    "eval.num_prompts": Affects.ACCURACY,
    "eval.every": Affects.CURVE,
    **dict.fromkeys(("reward.function", "reward.judge.model", "reward.judge.temperature"), Affects.STEP | Affects.ACCURACY),
    **dict.fromkeys(
        (
            "policy", "data", "tools", "rollout.max_prompt_tokens", "rollout.max_response_tokens",
            "rollout.max_result_tokens", "rollout.max_tool_calls", "rollout.max_seconds",
        ),
        EVERYTHING,
    ),
}  # fmt: skip


def affects(field: str) -> Affects:
    """What the field with this dotted name affects. Raises KeyError for a field that the table lacks."""
    name = field
    while name not in _TABLE:
        name = name.rpartition(".")[0]
        if not name:
            raise KeyError(field)
    return _TABLE[name]


def shared_by_runs(effect: Affects) -> bool:
    """Whether runs that are compared must have the same value: they are evaluated by it, or it affects only the cold start,
    which they share."""
    return bool(effect & (Affects.ACCURACY | Affects.CURVE)) or effect == Affects.COLD_START
