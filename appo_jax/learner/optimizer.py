"""AdamW with gradient clipping and linear warm-up, from optax."""

from __future__ import annotations

import optax


def make_optimizer(
    learning_rate: float, warmup_steps: int, weight_decay: float, max_grad_norm: float, b1: float, b2: float,
    decay_steps: int = 0,
) -> optax.GradientTransformation:  # fmt: skip
    """Constant rate after the warm-up, or, with `decay_steps`, a cosine fall to 0 at that step (the cold start's)."""
    if decay_steps:
        schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, max(1, warmup_steps), decay_steps)
    elif warmup_steps:
        schedule = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    else:
        schedule = learning_rate
    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm), optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay)
    )
