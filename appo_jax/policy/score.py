"""Teacher-forced passes over whole rows: the score pass, which is also the prefill of the branches, and the prompt prefill."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from appo_jax.config import Architecture, Remat
from appo_jax.policy import attention
from appo_jax.policy.attention import Attend, LayerCache
from appo_jax.policy.constraints import platform, replicate
from appo_jax.policy.logprobs import token_log_probs
from appo_jax.policy.parameters import Params
from appo_jax.policy.transformer import LayerPass, hidden_states, rotations, unembedding


class Rows(NamedTuple):
    """Packed rows. A row holds several texts; texts that begin alike form a tree. All `[R, T]` int32.

    The tree lies in the row depth first, so the descendants of slot t are the slots from t + 1 to ends[t] − 1. A slot sees
    itself and the earlier slots whose `ends` are greater than its own index: its ancestors.
    """

    tokens: Any  # the token that is read at a slot
    targets: Any  # the token after it, whose log-probability is computed
    positions: Any  # the token's index in its text
    ends: Any  # the slot after its last descendant


class Scored(NamedTuple):
    log_probs: (
        jax.Array
    )  # [R, T] float32: of the slot's target given the tokens that the slot sees, at the sampling temperature
    entropies: jax.Array  # [R, T] float32: of the target's distribution
    cache: list[LayerCache]  # per layer: keys [R, K, E, T], values [R, K, T, E]


def positions(tokens: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape)


def whole_rows(
    params: Params, arch: Architecture, tokens: jax.Array, positions: jax.Array, attend: Attend, dtype: Any,
    remat: Remat = "none",
) -> tuple[jax.Array, list[Any]]:  # fmt: skip
    """`hidden_states` of whole rows.

    On accelerators the layers run as a loop: only one layer is compiled, and only one layer's weights are gathered at a time. On a
    CPU they are unrolled: nothing is gathered there, and a loop would copy each layer's weights out of the stack.
    """
    how = LayerPass(dtype, remat, scan=platform() != "cpu")
    return hidden_states(params, arch, tokens, rotations(positions, arch), attend, how)


@functools.partial(jax.jit, static_argnames=("arch", "temperature", "dtype"))
def score(params: Params, rows: Rows, *, arch: Architecture, temperature: float, dtype: jnp.dtype) -> Scored:
    """Log-probabilities, entropies and KV cache of packed rows in one pass."""
    attend = attention.packed(rows.ends, keep=True)
    hidden, cache = whole_rows(params, arch, rows.tokens, rows.positions, attend, dtype)
    log_probs, entropies = token_log_probs(hidden, unembedding(params), rows.targets, temperature, arch)
    return Scored(replicate(log_probs), replicate(entropies), attention.laid_out(cache))


@functools.partial(jax.jit, static_argnames=("arch", "dtype"))
def prefill(params: Params, tokens: jax.Array, *, arch: Architecture, dtype: jnp.dtype) -> list[LayerCache]:
    """KV cache of right-padded prompts `[R, T]`."""
    return attention.laid_out(whole_rows(params, arch, tokens, positions(tokens), attention.causal, dtype)[1])
