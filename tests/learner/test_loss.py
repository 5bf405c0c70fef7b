"""The loss (eq. 8) and its gradient against the oracle's float64 numbers, and gradient accumulation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appo_jax.advantage.procedural import procedural_advantage
from appo_jax.branching.score import future_value
from appo_jax.config import AdvantageConfig, Architecture, LossConfig, OptimizerConfig, SFTConfig
from appo_jax.data.pipeline import TraceBatch
from appo_jax.learner.batch import make_batch
from appo_jax.learner.loss import (
    Terms,
    kl_estimate,
    policy_loss,
    sampler_correction,
    token_weights,
    without_dual_clipped,
)
from appo_jax.learner.optimizer import sft_optimizer
from appo_jax.learner.step import StepSpec, TrainState, gradients, make_train_step
from appo_jax.policy import attention
from appo_jax.policy.parameters import abstract_params
from appo_jax.policy.score import positions
from appo_jax.policy.transformer import hidden_states, rotations, unembedding
from appo_jax.rollout.shapes import PackedShape
from appo_jax.sft import to_train_batch

R, T, P, M = 4, 7, 2, 6
MODES = ("paper", "token_mean", "seq_mean", "constant")
jitted_loss = jax.jit(policy_loss, static_argnames="config")


@st.composite
def batches(draw):
    """Log-probs, advantages and ragged masks [R, T]. No ratio lies on a kink of the clipped surrogate."""

    def table(elements):
        return np.array([[draw(elements) for _ in range(T)] for _ in range(R)])

    old = table(st.integers(-40, -1)) / 8
    ratio = table(st.sampled_from([-1.5, -0.4, -0.1, 0.0, 0.05, 0.1, 0.3, 1.0]))  # logs; kinks at −0.22 and 0.18
    ref = table(st.integers(-40, -1)) / 8
    advantages = table(st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.5]))
    return old + ratio, old, ref, advantages, table(st.booleans())


def oracle_loss(new, old, ref, advantages, mask, mode, config, entropies=None):
    return oracle.loss(
        new, old, advantages, mask, clip_low=config.clip_low, clip_high=config.clip_high, mode=mode, num_prompts=P,
        budget=M, constant=T, ref_log_probs=ref, kl_weight=config.kl_weight, kl_estimator=config.kl_estimator,
        kl_in=config.kl_in, max_k3=config.max_k3 or np.inf, dual_clip=config.dual_clip,
        max_dual_clipped=config.max_dual_clipped, max_log_ratio=config.max_log_ratio or np.inf, entropies=entropies,
        entropy_weight=config.entropy_weight,
    )  # fmt: skip


def as_batch(new, old, ref, advantages, mask, mode, config):
    """The loss's arrays, with the weights that make_batch gives the three terms."""
    kept = mask if config.max_dual_clipped < 0 else without_dual_clipped(mask, new - old, advantages, config)
    arrays = [jnp.asarray(x, jnp.result_type(float)) for x in (advantages, old, ref)]
    weights = [
        token_weights(mask, M, P, mode),
        token_weights(kept, M, P, mode),
        token_weights(mask, M, P, "seq_mean" if config.kl_in == "outside" else mode),
    ]
    # weights are float32 numbers: comparisons are good to their rounding
    weights = [jnp.asarray(w, jnp.result_type(float)) for w in weights]
    return Terms(weights[0], *arrays, *weights[1:])


def plain_batch(old, advantages, weights, ref=None):
    """A batch in which every term has the same weights."""
    return Terms(*(jnp.asarray(x) for x in (weights, advantages, old)), ref)


# ---------------------------------------------------------------- value


@settings(max_examples=40)
@given(
    batches(), st.sampled_from(MODES), st.sampled_from([(0.2, 0.2), (0.2, 0.28)]), st.sampled_from([0.0, 0.04]),
    st.sampled_from(["outside", "inside"]),
)  # fmt: skip
def test_loss_is_the_oracles(batch, mode, clip, kl_weight, kl_in):
    new, *_, mask = batch
    config = LossConfig(clip_low=clip[0], clip_high=clip[1], kl_weight=kl_weight, kl_in=kl_in)
    got, metrics = jitted_loss(new.astype(np.float32), None, as_batch(*batch, mode, config), config=config)
    np.testing.assert_allclose(got, oracle_loss(*batch, mode, config), rtol=2e-5, atol=2e-5)
    assert int(metrics["tokens"]) == mask.sum()


def test_weights_by_hand():
    mask = np.array([[0, 1, 1, 1, 1], [0, 1, 0, 0, 1], [0, 0, 0, 0, 0]], bool)
    lengths = np.array([[4], [2], [1]])
    np.testing.assert_allclose(token_weights(mask, 8, 3, "paper"), mask / lengths / 24)
    np.testing.assert_allclose(token_weights(mask, 8, 3, "token_mean"), mask / 6)
    np.testing.assert_allclose(token_weights(mask, 8, 3, "seq_mean"), mask / lengths / 2)  # two rollouts have tokens
    np.testing.assert_allclose(token_weights(mask, 8, 3, "constant"), mask / 15)
    for mode in MODES:
        assert not token_weights(np.zeros((2, 3), bool), 8, 3, mode).any()


def test_clip_fraction_and_kl_by_hand():
    log_ratio = np.log(np.array([[1.5, 1.5, 0.5, 0.5, 1.1, 9.0]], np.float32))
    advantages = np.array([[1, -1, 1, -1, 1, 1]], np.float32)
    weights = np.array([[1, 1, 1, 1, 1, 0]], np.float32)
    loss, metrics = policy_loss(
        log_ratio, None, plain_batch(np.zeros_like(log_ratio), advantages, weights), LossConfig()
    )
    # min(ρA, clip(ρ)A): 1.2, −1.5, 0.5, −0.8, 1.1; clipping bites in the first and the fourth
    np.testing.assert_allclose(loss, -0.5, rtol=1e-6)
    assert (int(metrics["clip_fraction"]), int(metrics["tokens"])) == (2, 5)
    ratio = np.array([1.5, 1.5, 0.5, 0.5, 1.1])
    np.testing.assert_allclose(metrics["kl_old_new"], (ratio - 1 - np.log(ratio)).sum(), rtol=1e-5)


@pytest.mark.parametrize(("surrogate", "clipped"), [("clip", 2), ("gppo", 2), ("cispo", 4)])
def test_clip_fraction_counts_the_tokens_whose_weight_or_gradient_is_bounded(surrogate, clipped):
    """Ratios beyond both ends with both signs of A, and one inside: cispo bounds sg(clip(ρ)) whatever the sign."""
    log_ratio = np.log(np.array([[1.5, 1.5, 0.5, 0.5, 1.1, 1.5]], np.float32))
    advantages = np.array([[1, -1, 1, -1, -1, 0]], np.float32)
    batch = plain_batch(np.zeros_like(log_ratio), advantages, np.ones_like(log_ratio))
    _, metrics = policy_loss(log_ratio, None, batch, LossConfig(surrogate=surrogate))
    assert int(metrics["clip_fraction"]) == clipped


# ---------------------------------------------------------------- rates of the cold start


@pytest.mark.parametrize(
    ("steps", "warmup", "expected"),
    [
        (1, 0.05, [1.0]), (1, 0.0, [1.0]),
        (4, 0.0, [1.0, (1 + 2**-0.5) / 2, 0.5, (1 - 2**-0.5) / 2]),
        (6, 1 / 3, [0.0, 0.5, 1.0, (1 + 2**-0.5) / 2, 0.5, (1 - 2**-0.5) / 2]),
        (3, 0.05, [0.0, 1.0, 0.5]),
    ],
)  # fmt: skip
def test_rates_of_a_cold_start(steps, warmup, expected):
    """With equal gradients, each of Adam's updates is the rate."""
    config = SFTConfig(steps=steps, warmup_fraction=warmup, learning_rate=1.0, weight_decay=0.0)
    optimizer = sft_optimizer(config, OptimizerConfig(max_grad_norm=1e9))
    params = {"x": jnp.zeros(1)}
    state, rates = optimizer.init(params), []
    for _ in range(steps):
        updates, state = optimizer.update({"x": jnp.ones(1)}, state, params)
        rates.append(-float(updates["x"][0]))
    np.testing.assert_allclose(rates, expected, atol=1e-5)


# ---------------------------------------------------------------- gradient


OPTIONS = (
    LossConfig(),
    LossConfig(kl_weight=0.04),
    LossConfig(kl_weight=0.04, kl_in="inside", kl_estimator="k1", clip_high=0.28, dual_clip=1.2, max_dual_clipped=1),
    LossConfig(kl_weight=0.04, kl_estimator="k2", max_log_ratio=0.5),
    LossConfig(kl_weight=0.04, max_k3=0.9, entropy_weight=0.3, dual_clip=2.0, max_dual_clipped=0),
)


@settings(max_examples=15)
@given(batches(), st.sampled_from(MODES), st.sampled_from(OPTIONS))
def test_gradient_is_the_finite_difference_of_the_oracles_loss(batch, mode, config):
    new, old, ref, advantages, mask = batch
    entropies = np.abs(old)
    with jax.enable_x64(True):
        arrays = as_batch(*batch, mode, config)

        def loss(new, entropies):
            return jitted_loss(new, entropies, arrays, config=config)[0]

        gradient = [np.asarray(x) for x in jax.grad(loss, (0, 1))(jnp.asarray(new), jnp.asarray(entropies))]
    h = 1e-5
    for which, g in enumerate(gradient):
        assert g.dtype == np.float64
        np.testing.assert_array_equal(g[~mask], 0)
        for r, t in zip(*np.nonzero(mask), strict=True):
            losses = []
            for step in (h, -h):
                x = [new.copy(), entropies.copy()]
                x[which][r, t] += step
                losses.append(oracle_loss(x[0], old, ref, advantages, mask, mode, config, x[1]))
            np.testing.assert_allclose(g[r, t], (losses[0] - losses[1]) / (2 * h), rtol=1e-6, atol=1e-8)


def test_nothing_flows_through_the_advantage():
    """Ω is a function of the log-probs, but the gradient is that of the loss with its advantage held fixed."""
    rng = np.random.default_rng(0)
    old = -rng.random((R, T)).astype(np.float32)
    new = old + rng.normal(0, 0.05, (R, T)).astype(np.float32)
    base, sampled = jnp.array(rng.normal(size=R), jnp.float32), rng.random((R, T)) < 0.7
    weights = token_weights(sampled, M, P, "paper")

    def advantage(log_probs):
        return procedural_advantage(
            base[:, None], future_value(log_probs, jnp.array(old), jnp.array(sampled), 4.0), AdvantageConfig()
        )

    def whole(log_probs):
        return policy_loss(log_probs, None, plain_batch(old, advantage(log_probs), weights), LossConfig())[0]

    fixed = jax.jit(advantage)(new)
    held = jax.jit(jax.grad(lambda x: policy_loss(x, None, plain_batch(old, fixed, weights), LossConfig())[0]))(new)
    np.testing.assert_allclose(jax.jit(jax.grad(whole))(new), held, rtol=1e-5, atol=1e-8)
    assert np.abs(held[sampled]).max() > 0


def test_no_degenerate_batch_makes_a_nan():
    gradient = jax.jit(jax.grad(lambda x, batch: policy_loss(x, None, batch, LossConfig(kl_weight=0.1))[0]))
    with jax.debug_nans(True):
        for mask in (np.zeros((2, 3), bool), np.array([[0, 1, 0], [0, 0, 0]], bool)):
            for mode in MODES:
                weights = token_weights(mask, M, P, mode)
                # outside the mask: log-probs that must never be looked at
                new = np.where(mask, -1.0, -np.inf).astype(np.float32)
                old = np.where(mask, -1.0, -1e30).astype(np.float32)
                advantages = np.zeros((2, 3), np.float32)
                grad = gradient(new, plain_batch(old, advantages, weights, old))
                np.testing.assert_array_equal(grad[~mask], 0)


# ---------------------------------------------------------------- options


@settings(max_examples=30)
@given(
    batches(), st.sampled_from(["k1", "k2", "k3"]), st.sampled_from([(0.0, -1), (1.2, -1), (1.2, 1), (2.0, 0)]),
    st.sampled_from([0.0, 0.35]), st.sampled_from([0.0, 0.3]), st.sampled_from(MODES),
)  # fmt: skip
def test_loss_with_its_options_is_the_oracles(batch, estimator, dual, max_log_ratio, entropy_weight, mode):
    new, old, *_ = batch
    config = LossConfig(
        dual_clip=dual[0], max_dual_clipped=dual[1], max_log_ratio=max_log_ratio, kl_weight=0.04, kl_estimator=estimator,
        max_k3=2.0 if estimator == "k3" else 0.0, entropy_weight=entropy_weight,
    )  # fmt: skip
    entropies = np.abs(old)
    arrays = as_batch(*batch, mode, config)
    got, _ = jitted_loss(new.astype(np.float32), entropies.astype(np.float32), arrays, config=config)
    np.testing.assert_allclose(got, oracle_loss(*batch, mode, config, entropies), rtol=2e-5, atol=2e-5)


def test_dual_clip_by_hand():
    log_ratio = np.log(np.array([[4.0, 2.0, 4.0, 4.0]], np.float32))
    batch = plain_batch(
        np.zeros((1, 4), np.float32), np.array([[-1, -1, 1, -1]], np.float32), np.array([[1, 1, 1, 0]], np.float32)
    )
    loss, metrics = policy_loss(log_ratio, None, batch, LossConfig(dual_clip=3.0))
    np.testing.assert_allclose(loss, 3 + 2 - 1.2, rtol=1e-6)  # max(−4, −3), −2, min(4, 1.2)
    assert int(metrics["dual_clip_fraction"]) == 1


def test_rollouts_with_dual_clipped_tokens_are_found_by_hand():
    mask = np.array([[1, 1, 1], [1, 1, 0], [1, 1, 1]], bool)
    ratio = np.array([[4.0, 4.0, 1.0], [4.0, 1.0, 4.0], [4.0, 4.0, 4.0]])
    advantages = np.array([[-1.0, -1.0, -1.0], [-1.0, -1.0, -1.0], [1.0, 1.0, -1.0]])
    # dual-clipped tokens: 2, 1 (the other stands outside the mask), 1 (for the others A > 0)
    for most, kept in ((0, [0, 0, 0]), (1, [0, 1, 1]), (2, [1, 1, 1])):
        config = LossConfig(dual_clip=3.0, max_dual_clipped=most)
        got = without_dual_clipped(mask, np.log(ratio), advantages, config)
        np.testing.assert_array_equal(got, mask & np.array(kept, bool)[:, None])


def test_a_clamped_log_ratio_has_its_value_and_no_gradient():
    log_ratio = np.array([[25.0, -25.0, 0.1]], np.float32)
    batch = plain_batch(np.zeros((1, 3), np.float32), np.array([[-1, 1, 1]], np.float32), np.ones((1, 3), np.float32))
    config = LossConfig(max_log_ratio=20.0)
    (loss, _), gradient = jax.value_and_grad(lambda x: policy_loss(x, None, batch, config), has_aux=True)(log_ratio)
    expected = np.exp(20.0) - np.exp(-20.0) - np.exp(0.1)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[0, 0, -np.exp(0.1)]], rtol=1e-6)
    unclamped = policy_loss(log_ratio, None, batch, LossConfig())[0]
    assert unclamped > 100 * loss


@pytest.mark.parametrize("log_r", [3.0, 100.0, 1e4])
def test_a_clamped_k3_has_its_value_and_no_gradient(log_r):
    value, slope = jax.value_and_grad(lambda x: kl_estimate(x, jnp.float32(log_r), "k3", 10.0))(jnp.float32(0.0))
    assert (float(value), float(slope)) == (10.0, 0.0)
    small = kl_estimate(jnp.float32(0.0), jnp.float32(2.0), "k3", 10.0)
    np.testing.assert_allclose(small, np.exp(2.0) - 3, rtol=1e-6)  # 4.39: under the bound


@settings(max_examples=20)
@given(
    batches(),
    st.sampled_from(["clip", "gppo", "gppo_high", "cispo"]),
    st.sampled_from([(0.2, 0.2), (0.2, 0.28), (0.5, 0.2)]),
)
def test_the_slope_of_each_surrogate_is_its_closed_form(batch, kind, clip):
    new, old, _, advantages, mask = batch
    config = LossConfig(surrogate=kind, clip_low=clip[0], clip_high=clip[1])
    weights = token_weights(mask, M, P, "paper")
    new32, old32, advantages32 = (x.astype(np.float32) for x in (new, old, advantages))
    arrays = plain_batch(old32, advantages32, weights)
    slope = jax.jit(jax.grad(lambda x, batch: policy_loss(x, None, batch, config)[0]))(new32, arrays)
    for r, t in np.ndindex(R, T):
        expected = -weights[r, t] * oracle.surrogate_slope(kind, new[r, t] - old[r, t], advantages[r, t], *clip)
        np.testing.assert_allclose(slope[r, t], expected, rtol=1e-4, atol=1e-6)


def test_gppo_has_the_value_of_the_clipped_surrogate():
    rng = np.random.default_rng(0)
    new, old, advantages = rng.normal(size=(3, R, T)).astype(np.float32)
    weights = np.ones((R, T), np.float32)
    clipped, *others = (
        policy_loss(new, None, plain_batch(old, advantages, weights), LossConfig(surrogate=kind))[0]
        for kind in ("clip", "gppo", "gppo_high")
    )
    np.testing.assert_allclose(others, [clipped] * 2, rtol=1e-6)


def test_entropy_bonus_reaches_the_policy(params, batch):
    """The gradient of the bonus alone, on a policy, is that of −w·ΣH / (P·M·|H_n|)."""
    loss = dataclasses.replace(SPEC.loss, kl_weight=0.0, entropy_weight=0.5)
    plain = dataclasses.replace(loss, entropy_weight=0.0)
    one, two = (accumulate(params, batch, spec=dataclasses.replace(SPEC, loss=x)) for x in (loss, plain))
    _, entropies = log_probs_and_entropies(params, batch, temperature=0.7)
    np.testing.assert_allclose(one[0] - two[0], -0.5 * (batch[1].weights * entropies).sum(), rtol=1e-3, atol=1e-6)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), one[1], two[1])
    assert max(jax.tree.leaves(moved)) > 1e-4


def test_sampler_correction_by_hand():
    old, sampler = np.log([0.5, 0.2, 0.9, 0.1]), np.log([0.25, 0.4, 0.9, 1e-30])
    np.testing.assert_allclose(sampler_correction(old, sampler, 3.0), [2.0, 0.5, 1.0, 3.0])
    with np.errstate(all="raise"):
        np.testing.assert_allclose(sampler_correction(np.array([0.0]), np.array([-1e4]), 2.0), [2.0])


@pytest.mark.parametrize("kind", ["clip", "gppo", "gppo_high", "cispo"])
def test_no_option_makes_a_nan_of_a_degenerate_batch(kind):
    config = LossConfig(
        surrogate=kind, dual_clip=3.0 if kind == "clip" else 0.0, max_log_ratio=20.0, kl_weight=0.1, max_k3=10.0,
        entropy_weight=0.1,
    )  # fmt: skip
    gradient = jax.jit(jax.grad(lambda x, entropies, batch: policy_loss(x, entropies, batch, config)[0]))
    with jax.debug_nans(True):
        for mask in (np.zeros((2, 3), bool), np.array([[0, 1, 0], [0, 0, 0]], bool)):
            new = np.where(mask, -90.0, -np.inf).astype(np.float32)  # a ratio that underflows
            old = np.where(mask, -0.1, -1e30).astype(np.float32)
            advantages = np.where(mask, -1.0, np.inf).astype(np.float32)
            arrays = plain_batch(old, advantages, token_weights(mask, M, P, "paper"), old)
            grad = gradient(new, np.zeros((2, 3), np.float32), arrays)
            np.testing.assert_array_equal(np.asarray(grad)[~mask], 0)


# ---------------------------------------------------------------- through the policy

ARCH = Architecture(
    vocab_size=11, width=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, mlp_width=16, tie_embeddings=False
)
SPEC = StepSpec(ARCH, LossConfig(kl_weight=0.05, kl_in="inside"), temperature=0.7, dtype=jnp.float32)
_accumulate = jax.jit(gradients, static_argnames="spec")


def accumulate(params, batch, spec, at_once=R):
    tokens, terms = batch
    return _accumulate(params, make_batch(tokens, terms, PackedShape(at_once, T - 1)), spec=spec)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape), jnp.float32), abstract_params(ARCH))


@pytest.fixture(scope="module")
def batch():
    """Four rollouts: two prompt tokens, the policy's text with a tool result inside, ragged ends; the third has only a prompt."""
    rng = np.random.default_rng(0)
    mask = np.array([[0, 0, 1, 1, 0, 0, 1], [0, 0, 1, 1, 1, 1, 1], [0] * 7, [0, 0, 0, 1, 1, 0, 0]], bool)
    old = -2.4 + 0.2 * rng.normal(size=(R, T))
    return rng.integers(0, 11, (R, T)), Terms(
        weights=token_weights(mask, M, P, "paper"),
        advantages=rng.normal(size=(R, T)).astype(np.float32),
        old_log_probs=old.astype(np.float32),
        ref_log_probs=(old - 0.3).astype(np.float32),
    )


@jax.jit
def hidden_and_logits(params, tokens):
    """[R, T, D] and [R, T, V] of a plain forward pass."""
    hidden, _ = hidden_states(params, ARCH, tokens, rotations(positions(tokens), ARCH), attention.causal)
    return hidden, hidden @ unembedding(params).T


def log_probs_and_entropies(params, batch, temperature):
    tokens, mask = batch[0], batch[1].weights > 0
    logits = hidden_and_logits(params, tokens)[1]
    both = [oracle.log_probs_and_entropies(np.asarray(logits[r]), tokens[r], mask[r], temperature) for r in range(R)]
    return tuple(np.stack(x) for x in zip(*both, strict=True))


def test_loss_of_a_policy_is_the_oracles_from_its_logits(params, batch):
    terms = batch[1]
    mask = terms.weights > 0
    new, entropies = log_probs_and_entropies(params, batch, temperature=0.7)
    loss, _, metrics = accumulate(params, batch, spec=SPEC)
    expected = oracle_loss(new, terms.old_log_probs, terms.ref_log_probs, terms.advantages, mask, "paper", SPEC.loss)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["entropy"], entropies.sum(), rtol=1e-4)
    assert int(metrics["tokens"]) == mask.sum()


def test_micro_batches_add_up_to_the_whole(params, batch):
    loss, grads, metrics = accumulate(params, batch, spec=SPEC)
    parts = accumulate(params, batch, SPEC, at_once=2)
    scale = float(optax.tree.norm(grads))
    assert scale > 1e-2
    np.testing.assert_allclose(parts[0], loss, rtol=1e-5)
    for whole, summed in zip(jax.tree.leaves(grads), jax.tree.leaves(parts[1]), strict=True):
        np.testing.assert_allclose(summed, whole, rtol=1e-5, atol=1e-5 * scale)
    for name, value in metrics.items():
        np.testing.assert_allclose(parts[2][name], value, rtol=1e-5)


def test_gradient_of_the_parameters_is_the_finite_difference(params, batch):
    direction = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(x.size).normal(size=x.shape), x.dtype), params)
    _, grads, _ = accumulate(params, batch, spec=SPEC)
    along = sum(float((g * d).sum()) for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True))
    h = 1e-3  # float32: the step is a compromise between curvature and rounding

    def at(step):
        return float(accumulate(jax.tree.map(lambda p, d: p + step * d, params, direction), batch, spec=SPEC)[0])

    np.testing.assert_allclose((at(h) - at(-h)) / (2 * h), along, rtol=2e-2, atol=1e-3)


def test_what_stands_at_prompt_and_tool_tokens_changes_nothing(params, batch):
    """The loss does not read the advantages and log-probs of such tokens, and predicting them gives no gradient."""
    tokens, terms = batch
    off = terms.weights == 0
    noisy = dataclasses.replace(
        terms,
        advantages=np.where(off, 1e4, terms.advantages).astype(np.float32),
        old_log_probs=np.where(off, -80.0, terms.old_log_probs).astype(np.float32),
    )
    one, two = accumulate(params, batch, spec=SPEC), accumulate(params, (tokens, noisy), spec=SPEC)
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_only_sampled_tokens_train_the_unembedding(params):
    """With one trained token the unembedding's gradient is w·ρA/τ·(onehot − p)·h of that position: rank one."""
    tokens, row, t = np.arange(R * T).reshape(R, T) % 11, 1, 4
    here = np.zeros((R, T), np.float32)
    here[row, t] = 1.0
    hidden, logits = (np.asarray(x)[row, t - 1] for x in hidden_and_logits(params, tokens))
    token, log_p = int(tokens[row, t]), np.array(oracle.log_softmax(logits, 0.7))
    same = np.float32(log_p[token]) * here  # ρ = 1, and the KL term at its minimum
    _, grads, _ = accumulate(params, (tokens, Terms(0.5 * here, 3.0 * here, same, same)), spec=SPEC)
    expected = -0.5 * 3.0 / 0.7 * np.outer(hidden, np.eye(11)[token] - np.exp(log_p))
    np.testing.assert_allclose(grads["unembed"], expected, rtol=1e-3, atol=1e-5)


def test_step_on_nothing_is_no_step_and_a_nan_leaves_the_state(params, batch):
    optimizer = optax.sgd(1.0)
    tokens, terms = batch[0], dataclasses.replace(batch[1], ref_log_probs=None)
    step = make_train_step(optimizer, dataclasses.replace(SPEC, loss=LossConfig()))

    def run(terms):
        copy = jax.tree.map(jnp.copy, params)  # the step consumes its state
        new, metrics = step(TrainState(copy, optimizer.init(copy)), make_batch(tokens, terms, PackedShape(R, T - 1)))
        moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), new.params, params)
        return max(jax.tree.leaves(moved)), metrics

    moved, metrics = run(terms)
    assert moved > 0
    assert np.isfinite(list(metrics.values())).all()
    moved, metrics = run(dataclasses.replace(terms, weights=np.zeros_like(terms.weights)))
    assert moved == 0
    assert all(float(value) == 0 for value in metrics.values())
    broken = terms.advantages.copy()
    broken[0, 2] = np.nan
    moved, metrics = run(dataclasses.replace(terms, advantages=broken))
    assert moved == 0
    assert not np.isfinite(float(metrics["loss"]))


def test_demonstrations_are_learned_by_mean_negative_log_likelihood(params, batch):
    mask = batch[1].weights > 0
    segments = np.repeat(np.arange(1, 3), T)[None].repeat(2, 0)  # two demonstrations to a row
    index = np.tile(np.arange(T), (2, 2))
    demonstrations = to_train_batch(TraceBatch(batch[0].reshape(2, -1), mask.reshape(2, -1), segments, index), 1)
    spec = dataclasses.replace(SPEC, loss=None, temperature=1.0)
    loss, _, metrics = _accumulate(params, demonstrations, spec=spec)
    assert int(metrics["tokens"]) == mask.sum()
    log_probs, _ = log_probs_and_entropies(params, batch, temperature=1.0)
    np.testing.assert_allclose(loss, -log_probs.sum() / mask.sum(), rtol=1e-4)
