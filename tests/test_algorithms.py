"""From trees to the batch of the loss."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
import oracle
import pytest

from appo_jax.algorithms import ALGORITHMS, make_algorithm
from appo_jax.config import Architecture, Config, LossConfig, PolicyConfig, RolloutConfig
from appo_jax.learner.batch import Measured, make_batch
from appo_jax.learner.loss import policy_loss
from appo_jax.types import Example, Outcome, Rollout, StopReason, ToolCall

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
    batch, base = make_batch([tree], Measured([old], None, [future]), make_algorithm(CONFIG), length=6)
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
    batch, base = make_batch([tree], Measured([old], [ref]), algorithm, length=4)
    assert [a.tolist() for a in base] == [[x] * 2 for x in (1.0, -1.0, -1.0, 1.0)]
    assert batch.advantages[:, 1].tolist() == [1.0, -1.0, -1.0, 1.0]
    assert batch.ref_log_probs is not None
    assert (batch.ref_log_probs == -0.5).all()


def test_masked_truncated_rollouts_have_no_weight() -> None:
    config = dataclasses.replace(CONFIG, loss=LossConfig(mask_truncated=True))
    tree = [rollout(0, 1.0), rollout(1, 0.0, StopReason.LENGTH)]
    old = [np.zeros(4, np.float32)] * 2
    batch, _ = make_batch([tree], Measured([old]), make_algorithm(config), length=4)
    assert batch.weights.sum(-1).tolist() == [0.25, 0.0]


def test_the_samplers_rounding_is_corrected_by_truncated_weights() -> None:
    config = dataclasses.replace(CONFIG, loss=LossConfig(sampler_cap=1.5))
    tree = [rollout(0, 1.0), rollout(1, 0.0)]
    tree[0].log_probs = np.log([1.0, 0.5, 1.0, 0.1])  # as the sampler has it; the learner has 0.4
    old = [np.log([1.0, 0.4, 1.0, 0.4]), np.zeros(4)]
    batch, _ = make_batch([tree], Measured([old]), make_algorithm(config), length=4)
    np.testing.assert_allclose(batch.weights, [[0, 0.8 / 8, 0, 1.5 / 8], [0, 1 / 8, 0, 1 / 8]], rtol=1e-6)


# ---------------------------------------------------------------- every algorithm against the oracle

PROMPTS, N, M, LENGTH = 2, 2, 6, 12
TOKEN_MEAN = ("reinforce_pp", "dapo", "cispo")


def random_tree(rng: np.random.Generator, branches: bool) -> list[Rollout]:
    """M rollouts of a prompt token, then turns and tool results; branches grow from one of the first N."""
    tree: list[Rollout] = []
    for node in range(M):
        sampled = [False] + [own for _ in range(3) for own in [True] * rng.integers(1, 3) + [False]]
        sampled = np.array(sampled[: rng.integers(4, LENGTH)])
        calls = tuple(
            ToolCall("search", "q", str(rng.choice(["a", "b"])), Outcome.OK, 0.0, t - 1, t, {})
            for t in range(2, len(sampled))
            if sampled[t] and not sampled[t - 1]
        )
        grown = branches and node >= N
        zeros = np.zeros(len(sampled), np.float32)
        tree.append(
            Rollout(
                EXAMPLE, np.arange(len(sampled)), 1, sampled, zeros, zeros, StopReason.ANSWERED, calls, node,
                parent=int(rng.integers(N)) if grown else None, fork=1 if grown else None,
                reward=float(rng.choice([0.0, 0.5, 1.0])),
            )
        )  # fmt: skip
    return tree


def by_the_oracle(name: str, tree: list[Rollout]) -> list[np.ndarray]:
    """A_base `[T]` of the rollouts of one prompt that the algorithm trains on, from §2 and §6 of the method."""
    rewards = [r.reward for r in tree]
    match name:
        case "appo":
            return [np.full(LENGTH, a) for a in oracle.a_base(rewards[:N], rewards[N:])]
        case "tree_grpo":
            roots = [r.node if r.parent is None else r.parent for r in tree]
            return [np.full(LENGTH, a) for a in oracle.a_tree(rewards, roots)]
        case "gigpo":
            states = [["the prompt", *[call.result for call in r.calls]] for r in tree]
            out = [np.zeros(LENGTH) for _ in tree]
            for a, r, values in zip(out, tree, oracle.a_turns(rewards, states), strict=True):
                for turn, value in zip(oracle.turns(r.sampled), values, strict=True):
                    a[turn] = value
            return out
        case _:
            return [np.full(LENGTH, a) for a in oracle.a_base(rewards, [], "init_only")]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ALGORITHMS)
def test_advantages_loss_and_gradient_of_every_algorithm_are_the_oracles(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    config = dataclasses.replace(CONFIG, algorithm=name, rollout=RolloutConfig(num_initial=N, budget=M))
    algorithm = make_algorithm(config)
    trees = [random_tree(rng, algorithm.branches) for _ in range(PROMPTS)]
    trained = [tree[:N] if name == "appo" else tree for tree in trees]
    rollouts = [r for tree in trained for r in tree]
    masks = [[*r.sampled.tolist(), *[False] * (LENGTH - r.length)] for r in rollouts]
    old = rng.uniform(-3, -0.1, (len(rollouts), LENGTH))
    log_ratio = rng.choice([-1.5, -0.4, -0.1, 0.05, 0.1, 0.3, 1.0], old.shape)  # none of them where the clip begins
    new = old + log_ratio
    omegas = [oracle.omega(row, mask, 32.0) for row, mask in zip(log_ratio, masks, strict=True)]
    penalties = [[rng.uniform(0, 0.1, r.length) * r.sampled for r in tree] for tree in trees]

    if name == "reinforce_pp":
        flat = [np.pad(x, (0, LENGTH - len(x))) for tree in penalties for x in tree]
        base = [np.array(row) for row in oracle.a_global([r.reward for r in rollouts], flat, masks)]
    else:
        base = [a for tree in trees for a in by_the_oracle(name, tree)]
    scale = {"appo": lambda o: 1 + 0.5 * o, "fipo": lambda o: o}.get(name, lambda o: 1.0)
    advantages = [
        [a * scale(oracle.clip(o, 1, 1.2)) if m else 0.0 for a, o, m in zip(*rows, strict=True)]
        for rows in zip(base, omegas, masks, strict=True)
    ]
    low, high = (1.0 if name == "cispo" else 0.2), (0.28 if name == "dapo" else 0.2)
    mode = "token_mean" if name in TOKEN_MEAN else "paper"
    kind = name if name in ("gppo", "cispo") else "clip"
    expected = oracle.loss(
        new, old, advantages, masks, clip_low=low, clip_high=high, mode=mode, num_prompts=PROMPTS, budget=M, kind=kind
    )
    weights = [
        [m / (sum(map(sum, masks)) if mode == "token_mean" else PROMPTS * M * sum(row)) for m in row] for row in masks
    ]
    slopes = [
        [-w * oracle.surrogate_slope(kind, x, a, low, high) for w, x, a in zip(*rows, strict=True)]
        for rows in zip(weights, log_ratio, advantages, strict=True)
    ]

    cut = iter([(row[: r.length], omega[: r.length]) for r, row, omega in zip(rollouts, old, omegas, strict=True)])
    pairs = [[next(cut) for _ in tree] for tree in trained]
    old_by_tree, future = ([[pair[i] for pair in tree] for tree in pairs] for i in (0, 1))
    given = penalties if algorithm.loss.kl_in == "reward" else None
    batch, _ = make_batch(trees, Measured(old_by_tree, None, future, given), algorithm, LENGTH)

    def loss(log_probs: np.ndarray) -> jax.Array:
        return policy_loss(log_probs, batch.old_log_probs, None, batch.advantages, batch.weights, algorithm.loss)[0]

    np.testing.assert_allclose(np.where(masks, batch.advantages, 0), advantages, rtol=1e-4, atol=1e-6)
    value, gradient = jax.value_and_grad(loss)(new.astype(np.float32))
    assert math.isclose(value, expected, rel_tol=1e-4, abs_tol=1e-6)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-4, atol=1e-7)
    assert np.abs(slopes).max() > 0
