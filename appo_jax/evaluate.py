"""Held-out accuracy under greedy decoding."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import numpy as np

from appo_jax import heartbeat
from appo_jax.components import Components, give_rewards
from appo_jax.policy.parameters import Params
from appo_jax.types import Example, Rollout


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Greedy rollouts of the held-out questions, and their share of right answers."""

    rollouts: list[Rollout]
    accuracy: float
    seconds: float

    @property
    def metrics(self) -> dict[str, float]:
        return {
            "eval/accuracy": self.accuracy,
            "eval/reward": float(np.nanmean([r.reward for r in self.rollouts])),
            "eval/truncated": float(np.mean([r.truncated for r in self.rollouts])),
            "eval/calls": float(np.mean([len(r.calls) for r in self.rollouts])),
            "eval/seconds": self.seconds,
        }


def held_out_examples(components: Components) -> Sequence[Example]:
    """The first `eval.num_prompts` held-out questions (all for 0)."""
    count = components.config.eval.num_prompts or len(components.held_out)
    return [components.held_out[i] for i in range(min(count, len(components.held_out)))]


@heartbeat.phase("evaluate")
def evaluate(params: Params, components: Components) -> Evaluation:
    """One greedy rollout, tools and all, of every held-out question."""
    began = time.perf_counter()
    heartbeat.detail(f"{len(held_out_examples(components))} questions")
    trees = components.sampler.initial(params, held_out_examples(components), 1, draw_id=(2,), temperature=0.0)
    rollouts = [rollout for tree in trees for rollout in tree]
    give_rewards(rollouts, components)
    components.sampler.take_stats()  # an evaluation's calls and tokens belong to no training step
    components.executor.metrics()
    return Evaluation(rollouts, float(np.mean([r.correct for r in rollouts])), time.perf_counter() - began)
