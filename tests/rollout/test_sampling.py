"""The sampler's distribution against the softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from appo_jax.rollout.sampling import BLOCK, draw, truncate

DRAWS = 50_000


def draws(logits: np.ndarray, seed: int) -> np.ndarray:
    uniforms = jax.random.uniform(jax.random.key(seed), (DRAWS, 2))
    return np.asarray(jax.jit(jax.vmap(lambda u: draw(jnp.asarray(logits)[:, None], u[None]).token[0]))(uniforms))


def chi_square_p(draws: np.ndarray, p: np.ndarray) -> float:
    """P-value of the counts against probabilities p; tokens expected less than 10 times share one bin."""
    counts = np.bincount(draws, minlength=len(p))
    rare = p * DRAWS < 10
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(p[~rare], p[rare].sum()) * DRAWS
    keep = expected > 0
    assert observed[~keep].sum() == 0
    return stats.chisquare(observed[keep], expected[keep]).pvalue


@pytest.mark.parametrize("vocab", [5, BLOCK, BLOCK + 1, 1000])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (0, 0.8), (7, 1.0)])
def test_draws_follow_the_softmax(vocab: int, top_k: int, top_p: float) -> None:
    logits = np.random.default_rng(vocab).normal(size=vocab) * 2
    p = np.exp(logits - logits.max())
    p /= p.sum()
    order = np.argsort(-p)
    kept = np.zeros(vocab, bool)
    kept[order[: top_k or vocab]] = True
    if top_p < 1:
        kept[order[np.cumsum(p[order]) - p[order] >= top_p]] = False
    truncated = np.asarray(truncate(jnp.asarray(logits, jnp.float32)[:, None], top_k, top_p)[:, 0])
    assert (np.isfinite(truncated) == kept).all()
    assert chi_square_p(draws(truncated, seed=vocab), np.where(kept, p, 0) / p[kept].sum()) > 1e-3


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = np.full(3 * BLOCK, -np.inf, np.float32)
    logits[[0, 2 * BLOCK + 5, 3 * BLOCK - 1]] = 0.0
    for u in (0.0, 0.3333333, 0.5, np.nextafter(np.float32(1), np.float32(0))):
        for v in (0.0, 0.5, np.nextafter(np.float32(1), np.float32(0))):
            drawn = draw(jnp.asarray(logits)[:, None], jnp.asarray([[u, v]], jnp.float32))
            assert np.isfinite(logits[int(drawn.token[0])])


def test_a_block_without_probability_is_never_drawn_where_a_parallel_sum_rises_at_it() -> None:
    """Of 1200 blocks most have no mass. Uniforms are aimed at those where the rounded cumulative sum rises or falls."""
    blocks, rng = 1200, np.random.default_rng(0)
    logits = np.full((blocks, BLOCK), -np.inf, np.float32)
    with_mass = rng.random(blocks) < 0.3
    logits[with_mass] = rng.normal(size=(with_mass.sum(), BLOCK)) * 3
    mass = jnp.exp(logits - logits.max()).sum(1)
    c = np.asarray(jnp.cumsum(jnp.stack([mass] * 2, 1), axis=0))[:, 0]
    odd = np.flatnonzero(~with_mass[1:] & (np.diff(c) > 0))
    assert odd.size, "the case must contain a sum that rises at a block without mass"
    aims = (c[odd, None] / c[-1] + np.float32(2**-24) * np.arange(-4, 5, dtype=np.float32)).ravel()
    uniforms = jnp.stack([jnp.asarray(aims), jnp.full(len(aims), 0.5)], 1)
    column = jnp.asarray(logits.ravel())[:, None]
    tokens = jax.jit(draw)(jnp.broadcast_to(column, (logits.size, len(aims))), uniforms).token
    assert np.isfinite(logits.ravel()[np.asarray(tokens)]).all()


@pytest.mark.parametrize("vocab", [5, BLOCK, 1000])
@pytest.mark.parametrize("scale", [0.0, 3.0, 200.0])  # uniform, usual, all but certain
@pytest.mark.parametrize("greedy", [False, True])
def test_log_prob_and_entropy_of_what_is_drawn(vocab: int, scale: float, greedy: bool) -> None:
    rng = np.random.default_rng(vocab)
    logits = (rng.normal(size=(vocab, 16)) * scale + 50).astype(np.float32)
    logits[1:, 0], logits[::2, 1] = -np.inf, -np.inf  # one token left; half of them
    uniforms = None if greedy else jnp.asarray(rng.uniform(size=(16, 2)), jnp.float32)
    with jax.debug_nans(True):
        drawn = jax.jit(draw)(jnp.asarray(logits), uniforms)
    shifted = logits.astype(float) - logits.max(0)
    log_p = shifted - np.log(np.exp(shifted).sum(0))
    p = np.exp(log_p)
    entropy = -np.where(p > 0, p * np.where(p > 0, log_p, 0), 0).sum(0)
    tokens = np.asarray(drawn.token)
    np.testing.assert_allclose(drawn.log_prob, log_p[tokens, range(16)], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(drawn.entropy, entropy, rtol=1e-5, atol=1e-5)
    if greedy:
        assert (tokens == logits.argmax(0)).all()
