"""The sampler's distribution against the softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from appo_jax.rollout.sampling import BLOCK, inverse_cdf, truncate

DRAWS = 50_000


def draw(logits: np.ndarray, seed: int) -> np.ndarray:
    uniforms = jax.random.uniform(jax.random.key(seed), (DRAWS, 2))
    return np.asarray(jax.jit(jax.vmap(lambda u: inverse_cdf(jnp.asarray(logits)[None], u[None])[0]))(uniforms))


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
    truncated = np.asarray(truncate(jnp.asarray(logits, jnp.float32)[None], top_k, top_p)[0])
    assert (np.isfinite(truncated) == kept).all()
    assert chi_square_p(draw(truncated, seed=vocab), np.where(kept, p, 0) / p[kept].sum()) > 1e-3


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = np.full(3 * BLOCK, -np.inf, np.float32)
    logits[[0, 2 * BLOCK + 5, 3 * BLOCK - 1]] = 0.0
    for u in (0.0, 0.3333333, 0.5, np.nextafter(np.float32(1), np.float32(0))):
        for v in (0.0, 0.5, np.nextafter(np.float32(1), np.float32(0))):
            drawn = int(inverse_cdf(jnp.asarray(logits)[None], jnp.asarray([[u, v]], jnp.float32))[0])
            assert np.isfinite(logits[drawn])
