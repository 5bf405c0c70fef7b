"""From trees to the batch of the loss."""

from __future__ import annotations

import dataclasses

import numpy as np

from appo_jax.algorithms import make_algorithm, make_batch
from appo_jax.config import Architecture, Config, LossConfig, PolicyConfig, RolloutConfig
from appo_jax.types import Example, Rollout, StopReason

EXAMPLE = Example("e", "?", ("1",), "qa", "")
CONFIG = Config(
    policy=PolicyConfig(architecture=Architecture(8, 8, 1, 1, 1, 8, 8), tokenizer="x"),
    rollout=RolloutConfig(num_initial=2, budget=4),
)


def rollout(node: int, reward: float, stop: StopReason = StopReason.ANSWERED, parent: int | None = None) -> Rollout:
    sampled = np.array([False, True, False, True])  # prompt, sampled, tool result, sampled
    zeros = np.zeros(4, np.float32)
    fork = None if parent is None else 1
    return Rollout(
        EXAMPLE, np.arange(4), 1, sampled, zeros, zeros, stop, (), node, parent=parent, fork=fork, reward=reward
    )


def test_appo_batch_by_hand() -> None:
    tree = [rollout(0, 1.0), rollout(1, 0.0), rollout(2, 1.0, parent=0), rollout(3, 0.0, parent=1)]
    future = [np.array([1, 1.1, 1, 2.0]), np.array([1, 0.5, 1, 1.0])]
    old = [np.full(4, -1.0, np.float32), np.full(4, -2.0, np.float32)]
    batch, base = make_batch([tree], [old], None, [future], make_algorithm(CONFIG), CONFIG, length=6)
    assert [a.tolist() for a in base] == [[1.0] * 2, [-1.0] * 2]  # both groups have mean 0.5 and std 0.5
    assert batch.tokens.shape == (2, 6), "branches stay out of the loss"
    # 1/M · 1/|H_n| = 1/4 · 1/2 on the two sampled tokens, nothing on prompt, tool result and padding.
    assert batch.weights.tolist() == [[0, 0.125, 0, 0.125, 0, 0]] * 2
    # A = A_base · (1 + 0.5 · clip(Ω, 1, 1.2))
    np.testing.assert_allclose(batch.advantages[0, [1, 3]], [1.55, 1.6], rtol=1e-6)
    np.testing.assert_allclose(batch.advantages[1, [1, 3]], [-1.5, -1.5], rtol=1e-6)
    assert batch.old_log_probs[:, 1].tolist() == [-1.0, -2.0]
    assert batch.ref_log_probs is None


def test_grpo_uses_the_whole_budget_at_once_and_no_future() -> None:
    algorithm = make_algorithm(dataclasses.replace(CONFIG, algorithm="grpo"))
    assert (algorithm.initial, algorithm.branches) == (4, False)
    tree = [rollout(n, reward) for n, reward in enumerate([1.0, 0.0, 0.0, 1.0])]
    old = [np.zeros(4, np.float32)] * 4
    ref = [np.full(4, -0.5, np.float32)] * 4
    batch, base = make_batch([tree], [old], [ref], None, algorithm, CONFIG, length=4)
    assert [a.tolist() for a in base] == [[x] * 2 for x in (1.0, -1.0, -1.0, 1.0)]
    assert batch.advantages[:, 1].tolist() == [1.0, -1.0, -1.0, 1.0]
    assert batch.ref_log_probs is not None
    assert (batch.ref_log_probs == -0.5).all()


def test_masked_truncated_rollouts_have_no_weight() -> None:
    config = dataclasses.replace(CONFIG, loss=LossConfig(mask_truncated=True))
    tree = [rollout(0, 1.0), rollout(1, 0.0, StopReason.LENGTH)]
    old = [np.zeros(4, np.float32)] * 2
    batch, _ = make_batch([tree], [old], None, None, make_algorithm(config), config, length=4)
    assert batch.weights.sum(-1).tolist() == [0.25, 0.0]
