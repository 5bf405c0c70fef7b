"""Packed rows against rollouts one by one: loss, gradients, metrics, and the numbers of a score."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from appo_jax.config import Architecture, LossConfig
from appo_jax.data.pipeline import TraceBatch
from appo_jax.learner.batch import make_batch
from appo_jax.learner.loss import Terms, policy_loss, token_weights, without_dual_clipped
from appo_jax.learner.step import StepSpec, gradients
from appo_jax.policy import attention
from appo_jax.policy.packing import pack
from appo_jax.policy.parameters import Params, init_params
from appo_jax.policy.score import positions, score
from appo_jax.policy.transformer import hidden_states, rotations, unembedding
from appo_jax.rollout.shapes import PackedShape
from appo_jax.sft import to_train_batch

ARCH = Architecture(vocab_size=50, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=64)
T, TEMPERATURE = 24, 0.7
LOSSES = {
    "clip": LossConfig(dual_clip=3.0, max_dual_clipped=2, kl_weight=0.05, entropy_weight=0.02),
    "gppo": LossConfig(surrogate="gppo", kl_weight=0.05, kl_in="inside"),
}  # fmt: skip


@pytest.fixture(scope="module")
def params() -> Params:
    return init_params(ARCH, 0)


def trees(rng: np.random.Generator) -> list[np.ndarray]:
    """Tokens of three prompts' rollouts: some share only the prompt, branches share more, two are equal."""
    rollouts = []
    for _ in range(3):
        parent = rng.integers(0, 50, T)
        prompt = rng.integers(2, 6)
        for fork in (T, prompt, rng.integers(prompt, 15), rng.integers(prompt, 15), T):
            rollouts.append(
                np.append(parent[:fork], rng.integers(0, 50, T - fork))[: rng.integers(fork // 2 + 6, T + 1)]
            )
        rollouts[-1] = rollouts[-5]
    return rollouts


def flat(params: Params, texts: list[np.ndarray]) -> tuple[jax.Array, jax.Array]:
    """Log-probs and entropies `[R, T]` of every rollout in a row of its own."""
    tokens = np.array([np.pad(text, (0, T - len(text))) for text in texts])
    hidden, _ = hidden_states(params, ARCH, tokens, rotations(positions(tokens), ARCH), attention.causal)
    log_p = jax.nn.log_softmax(hidden[:, :-1] @ unembedding(params).T / TEMPERATURE)
    own = jnp.take_along_axis(log_p, tokens[:, 1:, None], -1)[..., 0]
    return tuple(jnp.pad(x, ((0, 0), (1, 0))) for x in (own, -(jnp.exp(log_p) * log_p).sum(-1)))


def make_case(params: Params, loss: LossConfig, drawers: int) -> tuple[list[np.ndarray], Terms, np.ndarray]:
    """Tokens, terms and π_θ's log-probs. If rollouts share a token, its log π_ref is the same, and so is its log π_old if one
    policy drew it for all of them. Of two drawers, the second one drew every other rollout from token 6 on."""
    rng = np.random.default_rng(0)
    texts = trees(rng)
    mask = np.array([(np.arange(T) >= 3) & (np.arange(T) < len(x)) & (np.arange(T) % 7 != 6) for x in texts])
    new = np.asarray(flat(params, texts)[0])
    later = np.zeros_like(mask)
    later[1::2, 6:] = drawers == 2
    known: dict[tuple[bytes, bool], float] = {}

    def moved(choices: list[float], drawer: np.ndarray) -> np.ndarray:
        known.clear()
        out = np.zeros_like(new)
        for (r, t), x in np.ndenumerate(new):
            out[r, t] = x - known.setdefault((texts[r][: t + 1].tobytes(), drawer[r, t]), rng.choice(choices))
        return out

    old = moved([-1.5, -0.4, -0.1, 0.05, 0.1, 0.3, 1.0, 1.5], later)
    ref = moved([-0.5, 0.2, 1.0], np.zeros_like(later))
    advantages = (rng.choice([-2.0, -0.5, 1.0, 1.5], len(texts))[:, None] * rng.uniform(1, 1.6, mask.shape)).astype(
        np.float32
    )
    kept = without_dual_clipped(mask, new - old, advantages, loss) if loss.max_dual_clipped >= 0 else None
    return texts, Terms(
        token_weights(mask, 5, 3, "paper"), advantages, old, ref if loss.kl_weight else None,
        None if kept is None else token_weights(kept, 5, 3, "paper"),
        token_weights(mask, 5, 3, "seq_mean") if loss.kl_weight and loss.kl_in == "outside" else None,
        later=later if drawers == 2 else None,
    ), new  # fmt: skip


@pytest.mark.parametrize(
    ("name", "length", "at_once", "drawers"), [("clip", T, 2, 1), ("gppo", 4 * T, 1, 1), ("clip", 4 * T, 1, 2)]
)
def test_loss_and_gradient_are_those_of_the_flat_batch(
    params: Params, name: str, length: int, at_once: int, drawers: int
) -> None:
    loss = LOSSES[name]
    texts, terms, new = make_case(params, loss, drawers)

    def unpacked(params: Params, terms: Terms) -> tuple[jax.Array, dict[str, jax.Array]]:
        log_probs, entropies = flat(params, texts)
        value, metrics = policy_loss(log_probs, entropies, terms, loss)
        return value, metrics | {"entropy": jnp.where(terms.weights > 0, entropies, 0.0).sum()}

    (value, metrics), grads = jax.jit(jax.value_and_grad(unpacked, has_aux=True))(params, terms)
    if terms.surrogate_weights is not None:
        dropped = (terms.surrogate_weights == 0) & (terms.weights > 0)
        assert dropped.any()
    spec = StepSpec(ARCH, loss, TEMPERATURE, jnp.float32)
    batch = make_batch(texts, terms, PackedShape(at_once, length))
    assert 0 < batch.used < len(batch.rows.tokens)
    found, packed_grads, sums = jax.jit(gradients, static_argnames="spec")(params, batch, spec=spec)
    np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-6)
    assert sums.keys() == metrics.keys()
    for key, total in metrics.items():
        np.testing.assert_allclose(sums[key], total, rtol=2e-5, err_msg=key)
    for a, b in zip(jax.tree.leaves(packed_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) > 1e-2
    # The loss of the flat batch is the oracle's, in float64.
    expected = oracle.loss(
        new, terms.old_log_probs, terms.advantages, terms.weights > 0, mode="paper", num_prompts=3, budget=5, kind=name,
        clip_low=loss.clip_low, clip_high=loss.clip_high, ref_log_probs=terms.ref_log_probs, kl_weight=loss.kl_weight,
        kl_in=loss.kl_in, kl_estimator=loss.kl_estimator, max_k3=loss.max_k3 or np.inf, dual_clip=loss.dual_clip,
        max_dual_clipped=loss.max_dual_clipped, max_log_ratio=loss.max_log_ratio or np.inf,
        entropies=np.asarray(flat(params, texts)[1]), entropy_weight=loss.entropy_weight,
    )  # fmt: skip
    np.testing.assert_allclose(value, expected, rtol=1e-4)


def test_scores_are_those_of_rollouts_alone(params: Params) -> None:
    texts = trees(np.random.default_rng(1))
    log_probs, entropies = flat(params, texts)
    packing = pack(texts, 2 * T)
    result = score(params, packing.rows, arch=ARCH, temperature=TEMPERATURE, dtype=jnp.dtype("float32"))
    assert len(packing.rows.tokens) < len(texts) / 2
    for i, (r, slots) in enumerate(zip(packing.row, packing.slots, strict=True)):
        np.testing.assert_allclose(result.log_probs[r, slots], log_probs[i, 1 : len(texts[i])], atol=1e-5)
        np.testing.assert_allclose(result.entropies[r, slots], entropies[i, 1 : len(texts[i])], atol=1e-5)


def test_packed_demonstrations_give_the_loss_and_gradient_of_separate_ones(params: Params) -> None:
    rng = np.random.default_rng(0)
    lengths = [5, 9, 4]
    traces = [rng.integers(0, 50, n) for n in lengths]
    masks = [np.append(False, rng.random(n - 1) < 0.6) for n in lengths]  # a first token is never trained on

    def found(rows: list[list[int]], width: int):
        tokens, mask, segments, where = (np.zeros((len(rows), width), np.int32) for _ in range(4))
        for r, members in enumerate(rows):
            at = 0
            for s, i in enumerate(members):
                part = slice(at, at + lengths[i])
                tokens[r, part], mask[r, part] = traces[i], masks[i]
                segments[r, part], where[r, part] = s + 1, np.arange(lengths[i])
                at += lengths[i]
        batch = to_train_batch(TraceBatch(tokens, mask.astype(bool), segments, where), 1)
        spec = StepSpec(ARCH, None, 1.0, jnp.float32)
        return jax.jit(gradients, static_argnames="spec")(params, batch, spec=spec)

    loss, grads, sums = found([[0], [1], [2]], 9)
    packed_loss, packed_grads, packed_sums = found([[1, 0], [2]], 16)
    assert int(sums["tokens"]) == int(packed_sums["tokens"]) == sum(map(sum, masks))
    np.testing.assert_allclose(loss, packed_loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), grads, packed_grads)
