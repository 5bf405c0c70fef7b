"""The device side of generation: padded tree tensors, the decode segment, and the append of tool results.

R prefixes are shared by C rows each. A row's text is the first `start + 1` tokens of its prefix followed by its suffix:

    prefix r     p0 p1 p2 p3 p4 p5 p6 …          keys and values [R, K, T, E], from the prefill or the score pass
    row (r, c)            └ start = 3: sees p0 p1 p2 of the prefix
    suffix                p3 s1 s2 s3 __ __      slot 0 repeats the last prefix token, so that its logits draw s1
                          ^^^^^^^^ cached  ^ slots 0 … length−2 have keys and values; the last token is still to be fed

So a fork is a number, not a copy, and initial rollouts (C = N rows on one prompt) and branches (C = B rows on one parent)
are the same program.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from appo_jax.config import Architecture
from appo_jax.policy import attention
from appo_jax.policy.attention import LayerCache
from appo_jax.policy.logprobs import log_prob_and_entropy
from appo_jax.policy.transformer import Params, hidden_states, unembedding
from appo_jax.rollout.sampling import inverse_cdf, truncate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The rows of one generation. Allocated once, donated from call to call."""

    cache: list[LayerCache]  # per layer: keys and values [R, C, K, S, E]
    tokens: jax.Array  # [R, C, S] int32
    log_probs: jax.Array  # [R, C, S] float32, of sampled tokens
    entropies: jax.Array  # [R, C, S] float32, of sampled tokens
    length: jax.Array  # [R, C] int32: tokens in the suffix, slot 0 included
    start: jax.Array  # [R, C] int32: position of slot 0 in the row's text
    limit: jax.Array  # [R, C] int32: the row stops at this length
    automaton: jax.Array  # [R, C] int32: state of the stop automaton
    active: jax.Array  # [R, C] bool: sampling goes on
    key: jax.Array  # [R, C] PRNG key of the row; each token folds in its position


@dataclasses.dataclass(frozen=True)
class SamplingSpec:
    """What the decode program is compiled for."""

    temperature: float  # 0: greedy
    top_k: int
    top_p: float
    eos_id: int


def row_keys(seed: jax.Array, ids: jax.Array) -> jax.Array:
    """PRNG key of every row from the run's key and the row's identity `ids [R, C, n]` (step, prompt, node …)."""

    def one(row: jax.Array) -> jax.Array:
        return functools.reduce(jax.random.fold_in, row, seed)

    return jax.vmap(jax.vmap(one))(ids)


def new_state(
    arch: Architecture, last_tokens: np.ndarray, start: np.ndarray, limit: np.ndarray, automaton: np.ndarray,
    active: np.ndarray, key: jax.Array, slots: int, dtype: jnp.dtype,
) -> DecodeState:  # fmt: skip
    """Rows at their forks. `last_tokens` are the tokens at `start`; all `[R, C]`. `slots` is S."""
    R, C = start.shape
    cache_shape = (R, C, arch.num_kv_heads, slots, arch.head_dim)
    return DecodeState(
        cache=[(jnp.zeros(cache_shape, dtype), jnp.zeros(cache_shape, dtype)) for _ in range(arch.num_layers)],
        tokens=jnp.zeros((R, C, slots), jnp.int32).at[:, :, 0].set(last_tokens),
        log_probs=jnp.zeros((R, C, slots), jnp.float32),
        entropies=jnp.zeros((R, C, slots), jnp.float32),
        length=jnp.ones((R, C), jnp.int32),
        start=jnp.asarray(start),
        limit=jnp.asarray(limit),
        automaton=jnp.asarray(automaton),
        active=jnp.asarray(active),
        key=key,
    )


def feed(
    params: Params, arch: Architecture, prefix: list[LayerCache], cache: list[LayerCache], tokens: jax.Array,
    slot: jax.Array, count: jax.Array, start: jax.Array, dtype: jnp.dtype,
) -> tuple[jax.Array, list[LayerCache]]:  # fmt: skip
    """Run tokens `[R, C, Q]` through the policy at suffix slots `slot … slot + count − 1` (`[R, C]`; the rest is padding).

    Returns hidden states `[R, C, Q, D]` and the cache with their keys and values written.
    """
    R, C, Q = tokens.shape
    slots = cache[0][0].shape[3]
    offsets = jnp.arange(Q)
    r, c, k = jnp.arange(R)[:, None, None, None], jnp.arange(C)[None, :, None, None], jnp.arange(arch.num_kv_heads)
    # Padding is sent out of bounds, where the scatter drops it.
    target = jnp.where(offsets < count[..., None], slot[..., None] + offsets, slots)[..., None]  # [R, C, Q, 1]

    def attend(layer: int, q: jax.Array, new_k: jax.Array, new_v: jax.Array) -> tuple[jax.Array, LayerCache]:
        ck, cv = cache[layer]
        ck = ck.at[r, c, k, target].set(new_k, mode="drop", unique_indices=True)
        cv = cv.at[r, c, k, target].set(new_v, mode="drop", unique_indices=True)
        return attention.tree(q, prefix[layer], (ck, cv), prefix_length=start, cached=slot), (ck, cv)

    positions = (start + slot)[..., None] + offsets
    return hidden_states(params, arch, tokens, positions, attend, dtype)


@functools.partial(jax.jit, static_argnames=("arch", "spec", "dtype"), donate_argnames=("state",))
def decode_segment(
    params: Params, prefix: list[LayerCache], state: DecodeState, next_state: jax.Array, hit: jax.Array,
    min_active: jax.Array, max_steps: jax.Array, *, arch: Architecture, spec: SamplingSpec, dtype: jnp.dtype,
) -> tuple[DecodeState, jax.Array]:  # fmt: skip
    """Sample until at most `min_active` rows are still active, `max_steps` at most. Returns the state and the steps done.

    `next_state [A, V]` and `hit [A]` are the stop automaton's tables. A row leaves off at EOS, at the end of a stop string
    or at its limit; the host reads which from its last token, its automaton and its length.
    """
    weights = unembedding(params).astype(dtype)
    R, C, S = state.tokens.shape
    r, c = jnp.arange(R)[:, None], jnp.arange(C)[None, :]

    def go_on(carry: tuple[DecodeState, jax.Array]) -> jax.Array:
        return (carry[0].active.sum() > min_active) & (carry[1] < max_steps)

    def step(carry: tuple[DecodeState, jax.Array]) -> tuple[DecodeState, jax.Array]:
        s, steps = carry
        last = s.length - 1
        token = jnp.take_along_axis(s.tokens, last[..., None], axis=-1)
        # Inactive rows write their last token's keys and values too: the same numbers they will be fed with later.
        hidden, cache = feed(params, arch, prefix, s.cache, token, last, jnp.ones_like(last), s.start, dtype)
        logits = jnp.einsum("wd,vd->wv", hidden.reshape(R * C, -1), weights, preferred_element_type=jnp.float32)
        if spec.temperature == 0:
            drawn = logits.argmax(-1)
        else:
            logits = truncate(logits / spec.temperature, spec.top_k, spec.top_p)
            keys = jax.vmap(jax.random.fold_in)(s.key.reshape(-1), (s.start + s.length).reshape(-1))
            drawn = inverse_cdf(logits, jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys))
        log_prob, entropy = log_prob_and_entropy(logits, drawn)
        drawn, log_prob, entropy = (x.reshape(R, C) for x in (drawn, log_prob, entropy))
        slot = jnp.where(s.active, s.length, S)  # out of bounds, and so dropped, for inactive rows
        length = s.length + s.active
        automaton = jnp.where(s.active, next_state[s.automaton, drawn], s.automaton).astype(jnp.int32)
        stop = (drawn == spec.eos_id) | (hit[automaton] >= 0) | (length >= s.limit)
        s = dataclasses.replace(
            s,
            cache=cache,
            tokens=s.tokens.at[r, c, slot].set(drawn.astype(jnp.int32), mode="drop", unique_indices=True),
            log_probs=s.log_probs.at[r, c, slot].set(log_prob, mode="drop", unique_indices=True),
            entropies=s.entropies.at[r, c, slot].set(entropy, mode="drop", unique_indices=True),
            length=length,
            automaton=automaton,
            active=s.active & ~stop,
        )
        return s, steps + 1

    return jax.lax.while_loop(go_on, step, (state, jnp.int32(0)))


@functools.partial(jax.jit, static_argnames=("arch", "dtype"), donate_argnames=("state",))
def append_tokens(
    params: Params, prefix: list[LayerCache], state: DecodeState, rows: jax.Array, chunk: jax.Array, count: jax.Array,
    *, arch: Architecture, dtype: jnp.dtype,
) -> DecodeState:  # fmt: skip
    """Append `chunk[:count]` (a tool result) to some rows and set them sampling again.

    `rows [A, 2]` are indices (r, c); unused places repeat nothing: their r is R, out of bounds. chunk `[A, Q]`, count `[A]`.
    The rows' pending token and all but the last appended one are fed; the last stays pending.
    """
    R, _, S = state.tokens.shape
    A, Q = chunk.shape
    r, c = rows[:, 0], rows[:, 1]
    safe = jnp.minimum(r, R - 1), c
    length, start = state.length[safe], state.start[safe]
    pending = state.tokens[safe][jnp.arange(A), length - 1]
    inputs = jnp.concatenate([pending[:, None], chunk[:, :-1]], axis=1)
    # A rows of their own: prefix and suffix of each are gathered, only the new keys and values are written back.
    some_prefix = [(k[safe[0]], v[safe[0]]) for k, v in prefix]
    some_cache = [(k[safe][:, None], v[safe][:, None]) for k, v in state.cache]
    _, new = feed(
        params,
        arch,
        some_prefix,
        some_cache,
        inputs[:, None],
        (length - 1)[:, None],
        count[:, None],
        start[:, None],
        dtype,
    )
    cache = [
        (k.at[r, c].set(nk[:, 0], mode="drop"), v.at[r, c].set(nv[:, 0], mode="drop"))
        for (k, v), (nk, nv) in zip(state.cache, new, strict=True)
    ]
    offsets = jnp.arange(Q)
    slot = jnp.where(offsets < count[:, None], length[:, None] + offsets, S)
    return dataclasses.replace(
        state,
        cache=cache,
        tokens=state.tokens.at[r[:, None], c[:, None], slot].set(chunk, mode="drop"),
        length=state.length.at[r, c].add(count, mode="drop"),
        automaton=state.automaton.at[r, c].set(0, mode="drop"),
        active=state.active.at[r, c].set(True, mode="drop"),
    )
