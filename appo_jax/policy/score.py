"""Teacher-forced passes over whole rows: scoring, which is also the prefill of the branches, and the prompt prefill."""

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
    """Packed rows: several texts to a row, those that begin alike as a tree. All `[R, T]` int32.

    A row holds its tree depth first, so that what continues a token stands from its slot to its end: a token sees the slots
    before it whose end lies behind it.
    """

    tokens: Any  # what is read at a slot
    targets: Any  # the token after it, whose log-probability is asked for
    positions: Any  # the token's index in its text
    ends: Any  # the slot after the last one that continues it


class Scored(NamedTuple):
    log_probs: (
        jax.Array
    )  # [R, T] float32: of the slot's target given the tokens that it sees, at the sampling temperature
    entropies: jax.Array  # [R, T] float32: of the distribution that the target was drawn from
    cache: list[LayerCache]  # per layer: keys [R, K, E, T], values [R, K, T, E]


def positions(tokens: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape)


def whole_rows(
    params: Params, arch: Architecture, tokens: jax.Array, positions: jax.Array, attend: Attend, dtype: Any,
    remat: Remat = "none",
) -> tuple[jax.Array, list[Any]]:  # fmt: skip
    """`hidden_states` of whole rows.

    On accelerators the layers are a loop: there is one to compile, and the weights of one are gathered at a time. A CPU
    gathers nothing, and would copy each layer's weights out of the stack.
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
