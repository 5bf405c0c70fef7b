"""From trees to the batch of the loss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import jax
import numpy as np
import oracle
import pytest

from appo_jax.algorithms import ALGORITHMS, Algorithm, make_algorithm
from appo_jax.config import (
    AdvantageConfig,
    Architecture,
    BranchingConfig,
    Config,
    LossConfig,
    PolicyConfig,
    RolloutConfig,
)
from appo_jax.learner.batch import Measured, make_batch, make_terms
from appo_jax.learner.loss import policy_loss
from appo_jax.rollout.shapes import PackedShape
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
    old = [np.full(4, -1.0, np.float32), np.full(4, -2.0, np.float32)]
    # Ω is 1.1 and 2 at the sampled tokens of the first, 0.5 and 1 at those of the second; a token on, γ = 2^(−1/32)
    first, last = math.log(1.1) - 2 ** (-1 / 32) * math.log(2), math.log(2)
    new = [old[0] + [9, first, 9, last], old[1] + [9, math.log(0.5), 9, 0]]
    batch, base = make_terms([tree], Measured([old], [new]), make_algorithm(CONFIG), length=6)
    assert [a.tolist() for a in base] == [[1.0] * 2, [-1.0] * 2]  # both groups have mean 0.5 and std 0.5
    assert batch.weights.shape == (2, 6), "branches stay out of the loss"
    # 1/M · 1/|H_n| = 1/4 · 1/2 on the two sampled tokens, nothing on prompt, tool result and padding.
    assert batch.weights.tolist() == [[0, 0.125, 0, 0.125, 0, 0]] * 2
    # A = A_base · (1 + 0.5 · clip(Ω, 1, 1.2))
    np.testing.assert_allclose(batch.advantages[0, [1, 3]], [1.55, 1.6], rtol=1e-5)
    np.testing.assert_allclose(batch.advantages[1, [1, 3]], [-1.5, -1.5], rtol=1e-5)
    assert batch.old_log_probs[:, 1].tolist() == [-1.0, -2.0]
    assert batch.ref_log_probs is None


def test_grpo_uses_the_whole_budget_at_once_and_no_future() -> None:
    algorithm = make_algorithm(dataclasses.replace(CONFIG, algorithm="grpo"))
    assert (algorithm.initial, algorithm.branches) == (4, False)
    tree = [rollout(n, reward) for n, reward in enumerate([1.0, 0.0, 0.0, 1.0])]
    old = [np.zeros(4, np.float32)] * 4
    ref = [np.full(4, -0.5, np.float32)] * 4
    batch, base = make_terms([tree], Measured([old], ref_log_probs=[ref]), algorithm, length=4)
    assert [a.tolist() for a in base] == [[x] * 2 for x in (1.0, -1.0, -1.0, 1.0)]
    assert batch.advantages[:, 1].tolist() == [1.0, -1.0, -1.0, 1.0]
    assert batch.ref_log_probs is not None
    assert (batch.ref_log_probs == -0.5).all()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_dual_clip_stays_only_with_the_surrogate_that_has_one(name: str) -> None:
    loss = LossConfig(dual_clip=3.0, max_dual_clipped=1)
    found = make_algorithm(dataclasses.replace(CONFIG, algorithm=name, loss=loss)).loss
    expected = (3.0, 1) if found.surrogate == "clip" else (0.0, -1)
    assert (found.dual_clip, found.max_dual_clipped) == expected


def test_masked_truncated_rollouts_have_no_weight() -> None:
    config = dataclasses.replace(CONFIG, loss=LossConfig(mask_truncated=True))
    tree = [rollout(0, 1.0), rollout(1, 0.0, StopReason.LENGTH)]
    old = [np.zeros(4, np.float32)] * 2
    batch, _ = make_terms([tree], Measured([old]), make_algorithm(config), length=4)
    assert batch.weights.sum(-1).tolist() == [0.25, 0.0]


def test_a_redrawn_token_keeps_the_ratio_of_its_own_drawer() -> None:
    """π_old drew the parent. π_θ drew one branch from token 1 on and another from token 3 on, with the parent's tokens again. They
    keep their own log-probabilities in packed rows, where one slot holds a token of all three."""
    config = dataclasses.replace(CONFIG, algorithm="appo_all", rollout=RolloutConfig(num_initial=1, budget=3))
    algorithm = make_algorithm(config)
    tree = [rollout(0, 1.0), rollout(1, 0.0, parent=0), dataclasses.replace(rollout(2, 0.5, parent=0), fork=3)]
    old = [np.array([0, *own], np.float32) for own in ([-1, 0, -1.5], [-2, 0, -2.5], [-1, 0, -2.5])]
    terms, _ = make_terms([tree], Measured([old], [old]), algorithm, length=4)
    sampled = tree[0].sampled
    assert [row[sampled].tolist() for row in terms.later] == [[False, False], [True, True], [False, True]]
    packed = make_batch([r.tokens for r in tree], terms, PackedShape(1, 4)).terms
    assert packed.weights.shape[1] == 4
    found = {
        (slot + 1, float(value))  # a slot gives the next token's log-probability
        for (_, _, _, slot), value in np.ndenumerate(packed.old_log_probs)
        if value
    }
    assert found == {(1, -1.0), (3, -1.5), (1, -2.0), (3, -2.5)}


def test_missing_branches_change_no_shape() -> None:
    config = dataclasses.replace(CONFIG, algorithm="appo_all", rollout=RolloutConfig(num_initial=2, budget=6))
    algorithm = make_algorithm(config)
    full = [rollout(n, float(n % 2), parent=None if n < 2 else n % 2) for n in range(6)]
    batches = []
    for tree in (full, full[:3]):
        old = [[np.zeros(4, np.float32)] * len(tree)]
        terms, base = make_terms([tree], Measured(old, old), algorithm, length=4)
        assert len(base) == len(tree)
        assert (terms.weights.any(-1) == (np.arange(6) < len(tree))).all()
        batches.append(make_batch([r.tokens for r in tree], terms, PackedShape(1, 4)))
    assert jax.tree.map(np.shape, batches[0]) == jax.tree.map(np.shape, batches[1])
    # 1/M · 1/|H_n| of each of the three, whatever is missing
    assert batches[1].terms.weights.sum() == pytest.approx(3 / 6)


@pytest.mark.parametrize("aggregation", ["paper", "token_mean", "seq_mean", "constant"])
@pytest.mark.parametrize("base", get_args(get_type_hints(AdvantageConfig)["base"]))
def test_a_rollout_without_a_reward_is_not_trained_on_under_any_base(base: Any, aggregation: Any) -> None:
    """A root and a branch have no reward. The failed root has a branch that has one, and every loss term is on."""
    loss = LossConfig(aggregation=aggregation, kl_weight=0.1, entropy_weight=0.1)
    algorithm = make_algorithm(dataclasses.replace(CONFIG, loss=loss, rollout=RolloutConfig(num_initial=3, budget=6)))
    advantage = dataclasses.replace(algorithm.advantage, base=base)
    with_branches = base not in ("paper", "shared_prefix", "init_only")
    algorithm = dataclasses.replace(algorithm, advantage=advantage, train_branches=with_branches)
    nan = math.nan
    tree = [rollout(0, nan), rollout(1, 1.0), rollout(2, 0.0)]
    tree += [rollout(3, 1.0, parent=0), rollout(4, nan, parent=1), rollout(5, 0.0, parent=2)]
    old = [[np.full(4, -1.0, np.float32)] * 6]
    batch, found = make_terms([tree], Measured(old, old, old), algorithm, length=4)
    failed = [n for n, r in enumerate(algorithm.trained(tree)) if math.isnan(r.reward)]
    learn = [n for n in range(algorithm.trained_per_prompt) if n not in failed]
    assert not any(found[n].any() for n in failed)
    # Two sampled tokens each: the failed rollouts count in no mean, but in 1/M and in R·T, which the config alone decides.
    expected = {
        "paper": 1 / 6 / 2, "token_mean": 1 / (2 * len(learn)), "seq_mean": 1 / len(learn) / 2,
        "constant": 1 / (algorithm.trained_per_prompt * 4),
    }  # fmt: skip
    for weights, each in ((batch.weights, expected[aggregation]), (batch.kl_weights, expected["seq_mean"])):
        np.testing.assert_allclose(weights[learn][:, [1, 3]], each, rtol=1e-6)
        assert not weights[failed].any()


def test_the_samplers_rounding_is_corrected_by_truncated_weights() -> None:
    config = dataclasses.replace(CONFIG, loss=LossConfig(sampler_cap=1.5))
    tree = [rollout(0, 1.0), rollout(1, 0.0)]
    tree[0].log_probs = np.log([1.0, 0.5, 1.0, 0.1])  # as the sampler has it; the learner has 0.4
    old = [np.log([1.0, 0.4, 1.0, 0.4]), np.zeros(4)]
    batch, _ = make_terms([tree], Measured([old]), make_algorithm(config), length=4)
    np.testing.assert_allclose(batch.weights, [[0, 0.8 / 8, 0, 1.5 / 8], [0, 1 / 8, 0, 1 / 8]], rtol=1e-6)


# ---------------------------------------------------------------- every algorithm against the oracle

PROMPTS, N, M, LENGTH = 2, 2, 6, 12


def random_tree(rng: np.random.Generator, algorithm: Algorithm) -> list[Rollout]:
    """Rollouts of a prompt token, then turns and tool results; branches grow from one of the initial ones."""
    tree: list[Rollout] = []
    for node in range(algorithm.budget):
        sampled = [False] + [own for _ in range(3) for own in [True] * rng.integers(1, 3) + [False]]
        sampled = np.array(sampled[: rng.integers(4, LENGTH)])
        calls = tuple(
            ToolCall("search", "q", str(rng.choice(["a", "b"])), Outcome.OK, 0.0, t - 1, t, {})
            for t in range(2, len(sampled))
            if sampled[t] and not sampled[t - 1]
        )
        grown = algorithm.branches and node >= algorithm.initial
        zeros = np.zeros(len(sampled), np.float32)
        tree.append(
            Rollout(
                EXAMPLE, np.arange(len(sampled)), 1, sampled, zeros, zeros, StopReason.ANSWERED, calls, node,
                parent=int(rng.integers(algorithm.initial)) if grown else None, fork=1 if grown else None,
                reward=float(rng.choice([0.0, 0.5, 1.0])),
            )
        )  # fmt: skip
    return tree


Advantages = Callable[[list[list[Rollout]], list[np.ndarray], list[list[bool]]], list[np.ndarray]]


def by_prompt(values: Callable[[list[Rollout]], Any]) -> Advantages:
    """The advantages of an algorithm that looks at one prompt's rollouts at a time: `values(tree)` is a number or an array `[T]`
    for each rollout that is trained on."""
    return lambda trees, _, __: [np.broadcast_to(a, LENGTH) for tree in trees for a in values(tree)]


def rewards(tree: list[Rollout]) -> list[float]:
    return [r.reward for r in tree]


def z_score(tree: list[Rollout]) -> Any:
    """GRPO, §2: the z-score among all M rollouts."""
    return oracle.a_base(rewards(tree), [], "init_only")


def dual_groups(tree: list[Rollout]) -> Any:
    """Eq. 6, for the initial rollouts."""
    return oracle.a_base(rewards(tree)[:N], rewards(tree)[N:])


def dual_groups_of_all(tree: list[Rollout]) -> Any:
    """Eq. 6 for branches too: it is the same in both groups."""
    initial, branches = rewards(tree)[:N], rewards(tree)[N:]
    return [*oracle.a_base(initial, branches), *oracle.a_base(branches, initial)]


def within_and_between_trees(tree: list[Rollout]) -> Any:
    return oracle.a_tree(rewards(tree), [r.node if r.parent is None else r.parent for r in tree])


def by_turns(tree: list[Rollout]) -> list[np.ndarray]:
    states = [["the prompt", *[call.result for call in r.calls]] for r in tree]
    out = [np.zeros(LENGTH) for _ in tree]
    for a, r, values in zip(out, tree, oracle.a_turns(rewards(tree), states), strict=True):
        for turn, value in zip(oracle.turns(r.sampled), values, strict=True):
            a[turn] = value
    return out


def over_the_mini_batch(
    trees: list[list[Rollout]], penalties: list[np.ndarray], masks: list[list[bool]]
) -> list[np.ndarray]:
    """Here every rollout is trained on."""
    flat = [np.pad(row, (0, LENGTH - len(row))) for row in penalties]
    return [np.array(row) for row in oracle.a_global([r for tree in trees for r in rewards(tree)], flat, masks)]


GRPO = by_prompt(z_score)


@dataclasses.dataclass(frozen=True)
class Truth:
    """What an algorithm's paper says (§2 and §6 of the method), in the oracle's words. It is never read from appo_jax. The default
    values are GRPO's, with the average and the ε that a config has if it gives none (eq. 8)."""

    advantage: Advantages = GRPO
    """A_base `[LENGTH]` of every rollout that is trained on, from the trees, the KL penalties of its tokens and the masks."""
    scale: Callable[[float], float] = lambda omega: 1.0
    """The factor of a token's advantage, from its clipped Ω."""
    entropy_weight: float = 0.0
    """α: advantages are multiplied by 1 + α·Z(H), Z over all tokens."""
    low: float = 0.2
    high: float = 0.2
    """The ratio is clipped to [1 − low, 1 + high]."""
    mode: str = "paper"
    """How `oracle.aggregate` averages tokens."""
    kind: str = "clip"
    """The surrogate in `oracle.loss` and `oracle.surrogate_slope`."""


TRUTHS = {
    "appo": Truth(by_prompt(dual_groups), scale=lambda omega: 1 + 0.5 * omega),
    "appo_all": Truth(by_prompt(dual_groups_of_all), scale=lambda omega: 1 + 0.5 * omega),
    "grpo": Truth(),
    "reinforce_pp": Truth(over_the_mini_batch, mode="token_mean"),
    "dapo": Truth(high=0.28, mode="token_mean"),
    "gppo": Truth(kind="gppo"),
    "cispo": Truth(low=1.0, mode="token_mean", kind="cispo"),
    "gigpo": Truth(by_prompt(by_turns)),
    "arpo": Truth(),
    "aepo": Truth(entropy_weight=0.2, kind="gppo_high"),
    "tree_grpo": Truth(by_prompt(within_and_between_trees)),
    "fipo": Truth(scale=lambda omega: omega),
}


def by_tree(trees: list[list[Rollout]], rows: np.ndarray) -> list[list[np.ndarray]]:
    """Rows `[rollouts, LENGTH]` by tree, each cut to its rollout's length."""
    cut = iter(rows)
    return [[next(cut)[: r.length] for r in tree] for tree in trees]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ALGORITHMS)
def test_advantages_loss_and_gradient_of_every_algorithm_are_the_oracles(name: str, seed: int) -> None:
    assert name in TRUTHS, (
        f"{name!r} is new in ALGORITHMS: add a row to TRUTHS in tests/test_algorithms.py, with the advantage, clip, average and "
        "surrogate that its paper gives (do not read them from the code)"
    )
    truth = TRUTHS[name]
    rng = np.random.default_rng(seed)
    config = dataclasses.replace(CONFIG, algorithm=name, rollout=RolloutConfig(num_initial=N, budget=M))
    algorithm = make_algorithm(config)
    trees = [random_tree(rng, algorithm) for _ in range(PROMPTS)]
    trained = [algorithm.trained(tree) for tree in trees]
    rollouts = [r for tree in trained for r in tree]
    masks = [[*r.sampled.tolist(), *[False] * (LENGTH - r.length)] for r in rollouts]
    old = rng.uniform(-3, -0.1, (len(rollouts), LENGTH))
    log_ratio = rng.choice([-1.5, -0.4, -0.1, 0.05, 0.1, 0.3, 1.0], old.shape)  # none of them where the clip begins
    new = old + log_ratio
    omegas = [oracle.omega(row, mask, 32.0) for row, mask in zip(log_ratio, masks, strict=True)]
    penalties = [[rng.uniform(0, 0.1, r.length) * r.sampled for r in tree] for tree in trees]

    base = truth.advantage(trees, [row for tree in penalties for row in tree], masks)
    advantages = [
        [a * truth.scale(oracle.clip(o, 1, 1.2)) if m else 0.0 for a, o, m in zip(*rows, strict=True)]
        for rows in zip(base, omegas, masks, strict=True)
    ]
    entropies = rng.uniform(0, 3, old.shape)
    known = entropies[np.array(masks)]
    factors = 1 + truth.entropy_weight * (entropies - known.mean()) / known.std()
    advantages = (np.array(advantages) * factors).tolist()
    low, high, mode, kind, budget = truth.low, truth.high, truth.mode, truth.kind, algorithm.budget
    expected = oracle.loss(
        new, old, advantages, masks, clip_low=low, clip_high=high, mode=mode, num_prompts=PROMPTS, budget=budget, kind=kind
    )  # fmt: skip
    weights = [
        [m / (sum(map(sum, masks)) if mode == "token_mean" else PROMPTS * budget * sum(row)) for m in row]
        for row in masks
    ]
    slopes = [
        [-w * oracle.surrogate_slope(kind, x, a, low, high) for w, x, a in zip(*rows, strict=True)]
        for rows in zip(weights, log_ratio, advantages, strict=True)
    ]

    old_by_tree, new_by_tree = by_tree(trained, old), by_tree(trained, new)
    given = penalties if algorithm.loss.kl_in == "reward" else None
    measured = Measured(old_by_tree, new_by_tree, None, given, by_tree(trained, entropies))
    batch, _ = make_terms(trees, measured, algorithm, LENGTH)

    def loss(log_probs: np.ndarray) -> jax.Array:
        return policy_loss(log_probs, None, batch, algorithm.loss)[0]

    np.testing.assert_allclose(np.where(masks, batch.advantages, 0), advantages, rtol=1e-4, atol=1e-6)
    value, gradient = jax.value_and_grad(loss)(new.astype(np.float32))
    assert math.isclose(value, expected, rel_tol=1e-4, abs_tol=1e-6)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-4, atol=1e-7)
    assert np.abs(slopes).max() > 0


# ---------------------------------------------------------------- the official code's extras, and where the KL term stands


OFFICIAL_LOSS = LossConfig(
    clip_high=0.28, dual_clip=3.0, max_dual_clipped=1, max_log_ratio=20.0, kl_weight=0.02, max_k3=10.0
)
OFFICIAL_ADVANTAGE = AdvantageConfig(max_ratio=3.0, std="sample", future_weight=1.0, clip_low=0.8)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kl_in", ["outside", "inside"])
@pytest.mark.parametrize("aggregation", ["paper", "token_mean", "seq_mean", "constant"])
@pytest.mark.parametrize("name", ["appo", "grpo"])
def test_a_batch_with_the_official_extras_has_the_oracles_loss(
    name: str, aggregation: str, kl_in: str, seed: int
) -> None:
    """The loss from rewards and log-probs: tokens of all ratios, some beyond the clamps, and rollouts that are dropped."""
    rng = np.random.default_rng(seed)
    loss = dataclasses.replace(OFFICIAL_LOSS, aggregation=aggregation, kl_in=kl_in)
    rollout_config = RolloutConfig(num_initial=N, budget=M)
    config = dataclasses.replace(
        CONFIG, algorithm=name, loss=loss, rollout=rollout_config, advantage=OFFICIAL_ADVANTAGE
    )
    algorithm = make_algorithm(config)
    trees = [random_tree(rng, algorithm) for _ in range(PROMPTS)]
    trained = [algorithm.trained(tree) for tree in trees]
    rollouts = [r for tree in trained for r in tree]
    masks = [[*r.sampled.tolist(), *[False] * (LENGTH - r.length)] for r in rollouts]
    old = rng.uniform(-3, -0.1, (len(rollouts), LENGTH))
    log_ratio = rng.choice([-25.0, -0.4, 0.05, 0.3, 1.2, 1.5], old.shape)
    new, ref = old + log_ratio, old + log_ratio + rng.choice([-1.0, 0.5, 3.0], old.shape)

    base: list[float] = []
    for tree in trees:
        rewards = [r.reward for r in tree]
        two = name == "appo"
        base += oracle.a_base(rewards[:N] if two else rewards, rewards[N:] if two else [], "paper", ddof=1).tolist()
    advantages = []
    for a, row, mask in zip(base, log_ratio, masks, strict=True):
        omega = oracle.omega(row, mask, 32.0, max_ratio=3.0, max_log_ratio=20.0)
        scaled = oracle.advantages(a, omega, mask, 1.0, 0.8, 1.2)
        advantages.append(scaled if two else np.where(mask, a, 0.0))
    expected = oracle.loss(
        new, old, advantages, masks, clip_high=0.28, mode=aggregation, num_prompts=PROMPTS, budget=M, constant=LENGTH,
        ref_log_probs=ref, kl_weight=0.02, kl_in=kl_in, max_k3=10.0, dual_clip=3.0, max_dual_clipped=1, max_log_ratio=20.0,
    )  # fmt: skip
    measured = Measured(*(by_tree(trained, rows) for rows in (old, new, ref)))
    batch, _ = make_terms(trees, measured, algorithm, LENGTH)
    got, _ = policy_loss(new.astype(np.float32), None, batch, algorithm.loss)
    assert math.isclose(got, expected, rel_tol=2e-4, abs_tol=1e-5)
    assert batch.surrogate_weights is not None
    if seed == 0:
        assert (np.asarray(batch.surrogate_weights) == 0).sum() > (np.asarray(batch.weights) == 0).sum(), "none dropped"


def loss_of(config: Config, tree: list[Rollout], ratios: list[list[float]], ref_ratios: Any = None) -> float:
    """The loss of one prompt's rollouts, each a prompt token and then sampled tokens, from the ratios of those."""
    algorithm = make_algorithm(config)
    old = [np.full(r.length, -1.0) for r in tree]
    new = [o + np.log([1.0, *row]) for o, row in zip(old, ratios, strict=False)]
    refs = None if ref_ratios is None else [[n + np.log([1.0, *row]) for n, row in zip(new, ref_ratios, strict=True)]]
    batch, _ = make_terms([tree], Measured([old], [new], refs), algorithm, max(r.length for r in tree))
    log_probs = np.zeros(batch.weights.shape, np.float32)
    for row, values in zip(log_probs, new, strict=False):
        row[: len(values)] = values
    return float(policy_loss(log_probs, None, batch, algorithm.loss)[0])


def plain_rollout(node: int, reward: float, length: int, parent: int | None = None) -> Rollout:
    sampled = np.array([False] + [True] * length)
    zeros = np.zeros(length + 1, np.float32)
    return Rollout(
        EXAMPLE, np.arange(length + 1), 1, sampled, zeros, zeros, StopReason.ANSWERED, (), node, parent=parent,
        fork=None if parent is None else 1, reward=reward,
    )  # fmt: skip


def test_a_token_of_a_large_ratio_leaves_the_sum_of_the_future_value_and_stays_in_the_loss() -> None:
    """Ratios 1, 1, 4, 1 with A = 1, τ = 64, b = 1: Ω is 1 everywhere, so A = 2 and the objectives 2, 2, 1.28·2, 2."""
    tree = [
        plain_rollout(0, 1.0, 4),
        plain_rollout(1, 0.0, 4),
        plain_rollout(2, 1.0, 4, 0),
        plain_rollout(3, 0.0, 4, 0),
    ]
    config = dataclasses.replace(
        CONFIG, rollout=RolloutConfig(num_initial=2, budget=4), branching=BranchingConfig(tau=64.0),
        advantage=AdvantageConfig(future_weight=1.0, max_ratio=3.0), loss=LossConfig(clip_high=0.28, aggregation="token_mean"),
    )  # fmt: skip
    ratios = [[1.0, 1.0, 4.0, 1.0], [1.0] * 4]
    # The second rollout has A_base = −1, ratios of 1 and Ω = 1: objectives of −2.
    assert math.isclose(loss_of(config, tree, ratios), -(4 * 2.14 - 4 * 2) / 8, rel_tol=1e-5)
    kept = dataclasses.replace(config, advantage=AdvantageConfig(future_weight=1.0))
    assert math.isclose(loss_of(kept, tree, ratios), -(2.2 * 3.28 + 2 - 4 * 2) / 8, rel_tol=1e-5)


def test_dual_clipped_rollouts_leave_the_average_and_keep_their_kl() -> None:
    """Rewards 1 and 0 with one branch of each give A = 1 and −1. The second rollout has two tokens of ratio 4, branches none."""
    tree = [
        plain_rollout(0, 1.0, 2),
        plain_rollout(1, 0.0, 4),
        plain_rollout(2, 1.0, 2, 0),
        plain_rollout(3, 0.0, 2, 0),
    ]
    loss = LossConfig(
        aggregation="token_mean", dual_clip=3.0, max_dual_clipped=1, kl_weight=1.0, kl_in="inside", kl_estimator="k2"
    )
    config = dataclasses.replace(
        CONFIG, rollout=RolloutConfig(num_initial=2, budget=4), advantage=AdvantageConfig(future_weight=0.0), loss=loss
    )
    ratios, refs = [[1.0, 1.0], [4.0, 4.0, 1.0, 1.0]], [[1.0, 1.0], [math.e, 1.0, 1.0, 1.0]]
    # The surrogate's mean is over the first's two tokens; the KL's over all six, 1/2 · 1² at one of them.
    assert math.isclose(loss_of(config, tree, ratios, refs), -1.0 + 0.5 / 6, rel_tol=1e-5)
    most = dataclasses.replace(config, loss=dataclasses.replace(loss, max_dual_clipped=2))  # −3, −3, −1, −1 stay
    assert math.isclose(loss_of(most, tree, ratios, refs), -(2 - 8) / 6 + 0.5 / 6, rel_tol=1e-5)


def test_the_kl_term_stands_where_its_field_says() -> None:
    """N = 2, M = 8: inside the sums of eq. 8 the KL counts N/M of what it does beside them. GRPO trains all M: no difference."""
    loss = LossConfig(kl_weight=1.0, kl_estimator="k2", kl_in="outside")
    tree = [plain_rollout(n, 0.0, 2 + n, None if n < 2 else 0) for n in range(8)]  # equal rewards: the surrogate is 0
    config = dataclasses.replace(CONFIG, rollout=RolloutConfig(num_initial=2, budget=8), loss=loss)
    ratios = [[1.0] * (2 + n) for n in range(8)]
    refs = [[math.e, *[1.0] * (1 + n)] for n in range(8)]  # k2 = 1/2 at the first of 2 + n tokens
    inside = dataclasses.replace(config, loss=dataclasses.replace(loss, kl_in="inside"))
    mean = (1 / 2 / 2 + 1 / 2 / 3) / 2
    assert math.isclose(loss_of(config, tree, ratios[:2], refs[:2]), mean, rel_tol=1e-5)
    assert math.isclose(loss_of(inside, tree, ratios[:2], refs[:2]), mean * 2 / 8, rel_tol=1e-5)
    flat = [plain_rollout(n, 0.0, 2 + n) for n in range(8)]
    mean = sum(1 / 2 / (2 + n) for n in range(8)) / 8
    for algorithm in ("grpo", "gigpo"):
        for where in (config, inside):
            grpo = dataclasses.replace(where, algorithm=algorithm)
            assert math.isclose(loss_of(grpo, flat, ratios, refs), mean, rel_tol=1e-5)
    # Under DAPO's token mean the two differ again: 8 · 1/2 over all 44 tokens, or the mean of the rollouts' means.
    dapo = dataclasses.replace(inside, algorithm="dapo")
    assert math.isclose(loss_of(dapo, flat, ratios, refs), 4 / 44, rel_tol=1e-5)
    assert math.isclose(loss_of(dataclasses.replace(config, algorithm="dapo"), flat, ratios, refs), mean, rel_tol=1e-5)
