"""One draw per row from a distribution over the vocabulary, with two random numbers instead of one per token. Logits
are columns, `[V, W]`, as the product of the unembedding with the hidden states gives them: transposing them took a CPU
as long as drawing.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 128  # tokens; the vocabularies of most policies are multiples of it


def truncate(logits: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Logits `[V, W]` with everything outside the top-k and the top-p nucleus at −inf (0 and 1.0: off).

    The nucleus is the smallest set of most probable tokens whose mass reaches `top_p`; ties with its last token stay.
    """
    if top_k > 0:
        kth = jax.lax.top_k(logits.T, min(top_k, len(logits)))[0][:, -1]
        logits = jnp.where(logits >= kth, logits, -jnp.inf)
    if top_p < 1.0:
        ordered = jnp.sort(logits, axis=0, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ordered, axis=0), axis=0) - jax.nn.softmax(ordered, axis=0)
        last = jnp.where(before < top_p, ordered, jnp.inf).min(0)
        logits = jnp.where(logits >= last, logits, -jnp.inf)
    return logits


class Drawn(NamedTuple):
    """The draws, each `[W]`."""

    token: jax.Array  # int32
    log_prob: jax.Array  # float32
    entropy: jax.Array  # float32, nats: of the distribution it was drawn from


def draw(logits: jax.Array, uniforms: jax.Array | None) -> Drawn:
    """A token per row from `logits [V, W]` (float32) by two uniforms in [0, 1), `[W, 2]`; None: the most probable one.

    The first uniform picks a block of the vocabulary by its mass, the second a token within the block. Both search the first
    place where a cumulative sum exceeds u times its end. A token of probability 0 is never drawn. Log-probability and entropy
    are by-products: every logit is exponentiated once.
    """
    V, W = logits.shape
    w = jnp.arange(W)
    below = logits - logits.max(0)
    blocks = jnp.pad(below, ((0, -V % BLOCK), (0, 0)), constant_values=-jnp.inf).reshape(-1, BLOCK, W)
    mass = jnp.exp(blocks)
    by_block = mass.sum(1)
    total = by_block.sum(0)

    def search(weights: jax.Array, u: jax.Array) -> jax.Array:
        cumulative = jnp.cumsum(weights, axis=0)
        found = (cumulative <= u * cumulative[-1]).sum(0)
        # The rounding of a parallel sum may rise at a weight of 0: then the nearest other one is meant.
        places = jnp.arange(len(weights))[:, None]
        return jnp.where(weights > 0, jnp.abs(places - found), len(weights)).argmin(0)

    if uniforms is None:
        token = logits.argmax(0)
    else:
        block = search(by_block, uniforms[:, 0])
        token = block * BLOCK + search(jnp.exp(blocks[block, :, w]).T, uniforms[:, 1])
    # Where the mass is 0 the logit may be −inf. Both terms of the entropy are positive: nothing cancels.
    spread = jnp.where(mass > 0, mass * blocks, 0.0).sum((0, 1))
    log_total = jnp.log(total)
    return Drawn(token.astype(jnp.int32), below[token, w] - log_total, log_total - spread / total)
