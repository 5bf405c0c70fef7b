"""The device side of generation: padded tree tensors, the decode segment, and the append of tool results.

W rows decode together. A row sits at a place (r, c): it continues the prefix in slot r, as one of at most C rows that do.
Its text is the first `start + 1` tokens of that prefix followed by its suffix:

    slot r        p0 p1 p2 p3 p4 p5 p6 …         keys [R, K, E, T] and values [R, K, T, E], from prefill or score pass;
                                                 cut along T into blocks (`attention.cut`)
    row w               └ start = 3: sees p0 p1 p2 of the prefix
    suffix              p3 s1 s2 s3 __ __        slot 0 repeats the last prefix token, so that its logits draw s1
                        ^^^^^^^^ cached  ^ slots 0 … length−2 have keys and values; the last token is still to be fed

So a fork is a number, not a copy, and initial rollouts (N rows on one prompt) and branches (B rows on one parent) are the
same program. Everything but attention over the prefix runs on the W rows; `members [R, C]` says who sits where.

On a mesh, rows and prefix slots are split over (data, fsdp) and heads over tensor, caches with them. A row sits on a prefix
of its own device, so each device reads and writes its own caches and attends by itself. The small per-row arrays are whole
on every device: the host reads them at every look.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from appo_jax.config import Architecture
from appo_jax.policy import attention
from appo_jax.policy.attention import Blocks, LayerCache, Places
from appo_jax.policy.constraints import ROWS, on_each_device, parts, platform, replicate
from appo_jax.policy.parameters import Params
from appo_jax.policy.transformer import Rotations, hidden_states, rotations, unembed, unembedding
from appo_jax.rollout.sampling import draw, truncate

BY_ROW, BY_HEAD, BY_CACHE = PartitionSpec(ROWS), PartitionSpec(ROWS, None, "tensor"), PartitionSpec(ROWS, "tensor")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The rows of a generation. Allocated once, donated from call to call."""

    # Per layer: keys [W, K, E, S−1] and values [W, K, S−1, E] of the suffixes; the last token of a full row is never fed.
    cache: list[LayerCache]
    tokens: jax.Array  # [W, S] int32
    log_probs: jax.Array  # [W, S] float32, of sampled tokens
    entropies: jax.Array  # [W, S] float32, of sampled tokens
    length: jax.Array  # [W] int32: tokens in the suffix, slot 0 included
    start: jax.Array  # [W] int32: position of slot 0 in the row's text
    limit: jax.Array  # [W] int32: the row stops at this length
    automaton: jax.Array  # [W] int32: state of the stop automaton
    active: jax.Array  # [W] bool: sampling goes on
    key: jax.Array  # [W] PRNG key of the row; each token folds in its position


@dataclasses.dataclass(frozen=True)
class SamplingSpec:
    """What the decode program is compiled for."""

    temperature: float  # 0: greedy
    top_k: int
    top_p: float
    eos_id: int


class NewRows(NamedTuple):
    """Rows to begin, as arrays over all W rows; the others are left as they are where `on` is False."""

    on: np.ndarray  # [W] bool
    last_token: np.ndarray  # [W] int32: the token at `start`
    start: np.ndarray  # [W] int32
    limit: np.ndarray  # [W] int32
    automaton: np.ndarray  # [W] int32
    ids: np.ndarray  # [W, n] int32: the row's identity (step, prompt, node …), from which its PRNG key is folded

    @classmethod
    def none(cls, rows: int, ids: int) -> NewRows:
        last_token, start, limit, automaton = np.zeros((4, rows), np.int32)
        return cls(np.zeros(rows, bool), last_token, start, limit, automaton, np.zeros((rows, ids), np.int32))


def _laid_out(state: DecodeState) -> DecodeState:
    rest = jax.tree.map(replicate, dataclasses.replace(state, cache=[]))
    return dataclasses.replace(rest, cache=attention.laid_out(state.cache))


@functools.partial(jax.jit, static_argnames=("arch", "slots", "length", "dtype"))
def empty_prefixes(arch: Architecture, slots: int, length: int, dtype: jnp.dtype) -> list[Blocks]:
    """Room for R prefixes of T tokens: the layers' caches, cut."""
    return attention.laid_out([attention.cut(_empty_cache(arch, slots, length, dtype)) for _ in range(arch.num_layers)])


def _empty_cache(arch: Architecture, rows: int, length: int, dtype: jnp.dtype) -> LayerCache:
    K, E = arch.num_kv_heads, arch.head_dim
    return jnp.zeros((rows, K, E, length), dtype), jnp.zeros((rows, K, length, E), dtype)


@functools.partial(jax.jit, static_argnames=("arch", "rows", "slots", "dtype"))
def empty_state(arch: Architecture, rows: int, slots: int, dtype: jnp.dtype) -> DecodeState:
    """W rows, none of them active. `slots` is S."""

    def per_row() -> jax.Array:
        return jnp.zeros(rows, jnp.int32)

    return _laid_out(
        DecodeState(
            cache=[_empty_cache(arch, rows, slots - 1, dtype) for _ in range(arch.num_layers)],
            tokens=jnp.zeros((rows, slots), jnp.int32),
            log_probs=jnp.zeros((rows, slots), jnp.float32),
            entropies=jnp.zeros((rows, slots), jnp.float32),
            length=per_row() + 1,
            start=per_row(),
            limit=per_row(),
            automaton=per_row(),
            active=jnp.zeros(rows, bool),
            key=jax.random.split(jax.random.key(0), rows),
        )
    )


@functools.partial(jax.jit, donate_argnames=("prefixes",))
def load_prefix(prefixes: list[Blocks], source: list[LayerCache], row: jax.Array, slot: jax.Array) -> list[Blocks]:
    """Copy row `row` of a prefill's or score pass's cache into prefix slot `slot`.

    On a mesh the one row travels: a gather is partitioned so; for a dynamic slice every device would fetch all rows.
    """

    one = _rows_of(source, jnp.asarray(row)[None])

    def put(pool: jax.Array, block: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(pool, block, slot, axis=0)

    return attention.laid_out(jax.tree.map(put, prefixes, [attention.cut(cache) for cache in one]))


@functools.partial(jax.jit, donate_argnames=("state",))
def begin_rows(state: DecodeState, new: NewRows, seed: jax.Array | int) -> DecodeState:
    """Set rows to the start of their suffix. What their slots held before lies beyond their length and is never read."""

    def key(ids: jax.Array) -> jax.Array:
        return functools.reduce(jax.random.fold_in, ids, jax.random.key(seed))

    def put(fresh: jax.Array | np.ndarray, old: jax.Array) -> jax.Array:
        return jnp.where(new.on, fresh, old)

    return _laid_out(
        dataclasses.replace(
            state,
            tokens=state.tokens.at[:, 0].set(put(new.last_token, state.tokens[:, 0])),
            length=put(jnp.ones_like(state.length), state.length),
            start=put(new.start, state.start),
            limit=put(new.limit, state.limit),
            automaton=put(new.automaton, state.automaton),
            active=state.active | new.on,
            key=put(jax.vmap(key)(jnp.asarray(new.ids)), state.key),
        )
    )


@functools.partial(jax.jit, donate_argnames=("state",))
def halt_rows(state: DecodeState, rows: jax.Array) -> DecodeState:
    """End the sampling of `rows [W]` bool."""
    return _laid_out(dataclasses.replace(state, active=state.active & ~rows))


def feed(
    params: Params, arch: Architecture, prefixes: list[Blocks], places: Places, cache: list[LayerCache],
    tokens: jax.Array, slot: jax.Array, count: jax.Array, start: jax.Array, table: Rotations, dtype: jnp.dtype,
    scan: bool = False,
) -> tuple[jax.Array, list[LayerCache]]:  # fmt: skip
    """Run tokens `[W, Q]` through the policy at suffix slots `slot … slot + count − 1` (`[W]`; the rest is padding).

    `table`: the rotations of all positions; `scan`: as of `hidden_states`. Returns hidden states `[W, Q, D]` and the cache
    with their keys and values written.
    """
    offsets = jnp.arange(tokens.shape[1])

    @functools.partial(
        on_each_device,
        arguments=(BY_HEAD, BY_HEAD, BY_HEAD, BY_CACHE, BY_CACHE, BY_ROW, BY_ROW, BY_ROW, BY_ROW),
        results=(BY_HEAD, BY_CACHE),
    )
    def write_and_attend(
        q: jax.Array, new_k: jax.Array, new_v: jax.Array, prefix: Blocks, suffix: LayerCache, places: Places,
        start: jax.Array, slot: jax.Array, count: jax.Array,
    ) -> tuple[jax.Array, LayerCache]:  # fmt: skip
        w, slots = jnp.arange(len(q))[:, None], suffix[1].shape[2]
        # Padding is sent out of bounds, where the scatter drops it.
        target = jnp.where(offsets < count[:, None], slot[:, None] + offsets, slots)  # [W, Q]
        k = suffix[0].at[w, :, :, target].set(new_k, mode="drop", unique_indices=True)
        v = suffix[1].at[w, :, target].set(new_v, mode="drop", unique_indices=True)
        return attention.tree(q, prefix, (k, v), places, prefix_length=start, cached=slot), (k, v)

    def attend(
        of_layer: tuple[Blocks, LayerCache], q: jax.Array, new_k: jax.Array, new_v: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        return write_and_attend(q, new_k, new_v, *of_layer, places, start, slot, count)

    positions = (start + slot)[:, None] + offsets
    rotation = jax.tree.map(lambda x: x.at[positions].get(mode="clip"), table)
    caches = list(zip(prefixes, cache, strict=True))
    return hidden_states(params, arch, tokens, rotation, attend, dtype, scan=scan, caches=caches)


def _rotation_table(arch: Architecture, prefixes: list[Blocks], slots: int) -> Rotations:
    """`rotations` of every position that a row can reach.

    A step looks them up: the compiler would compute them again for every head of every layer.
    """
    return jax.lax.optimization_barrier(rotations(jnp.arange(attention.room(prefixes[0]) + slots), arch))


@functools.partial(jax.jit, static_argnames=("arch", "spec", "dtype"), donate_argnames=("state",))
def decode_segment(
    params: Params, prefixes: list[Blocks], places: Places, state: DecodeState, next_state: jax.Array,
    hit: jax.Array, min_active: jax.Array, max_steps: jax.Array, *, arch: Architecture, spec: SamplingSpec,
    dtype: jnp.dtype,
) -> tuple[DecodeState, jax.Array]:  # fmt: skip
    """Sample until at most `min_active` rows are still active, `max_steps` at most. Returns the state and the steps done.

    `next_state [A, V]` and `hit [A]` are the stop automaton's tables. A row leaves off at EOS, at the end of a stop string
    or at its limit; the host reads which from its last token, its automaton and its length.
    """
    weights = unembedding(params).astype(dtype)
    W, S = state.tokens.shape
    w = jnp.arange(W)
    table = _rotation_table(arch, prefixes, S)

    def go_on(carry: tuple[DecodeState, jax.Array]) -> jax.Array:
        return (carry[0].active.sum() > min_active) & (carry[1] < max_steps)

    def step(carry: tuple[DecodeState, jax.Array]) -> tuple[DecodeState, jax.Array]:
        s, steps = carry
        last = s.length - 1
        token = s.tokens[w, last][:, None]
        # Inactive rows write their last token's keys and values too: the same numbers they will be fed with later.
        hidden, cache = feed(
            params, arch, prefixes, places, s.cache, token, last, jnp.ones_like(last), s.start, table, dtype
        )  # fmt: skip
        logits = unembed(hidden[:, 0], weights, arch.num_tokens, columns=True)
        uniforms = None
        if spec.temperature > 0:
            logits = truncate(logits / spec.temperature, spec.top_k, spec.top_p)
            keys = jax.vmap(jax.random.fold_in)(s.key, s.start + s.length)
            uniforms = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
        drawn, log_prob, entropy = draw(logits, uniforms)
        slot = jnp.where(s.active, s.length, S)  # out of bounds, and so dropped, for inactive rows
        length = s.length + s.active
        automaton = jnp.where(s.active, next_state[s.automaton, drawn], s.automaton).astype(jnp.int32)
        stop = (drawn == spec.eos_id) | (hit[automaton] >= 0) | (length >= s.limit)
        s = dataclasses.replace(
            s,
            cache=cache,
            tokens=s.tokens.at[w, slot].set(drawn, mode="drop", unique_indices=True),
            log_probs=s.log_probs.at[w, slot].set(log_prob, mode="drop", unique_indices=True),
            entropies=s.entropies.at[w, slot].set(entropy, mode="drop", unique_indices=True),
            length=length,
            automaton=automaton,
            active=s.active & ~stop,
        )
        return _laid_out(s), steps + 1

    state, steps = jax.lax.while_loop(go_on, step, (state, jnp.int32(0)))
    return _laid_out(state), replicate(steps)


def _rows_of(cache: Any, rows: jax.Array) -> Any:
    return jax.tree.map(lambda x: x.at[rows].get(mode="clip"), cache)


def _with_rows(cache: list[LayerCache], rows: jax.Array, new: list[LayerCache]) -> list[LayerCache]:
    return jax.tree.map(lambda x, y: x.at[rows].set(y, mode="drop"), cache, new)


@functools.partial(jax.jit, static_argnames=("arch", "dtype"), donate_argnames=("state",))
def append_tokens(
    params: Params, prefixes: list[Blocks], places: Places, state: DecodeState, rows: jax.Array, chunk: jax.Array,
    count: jax.Array, *, arch: Architecture, dtype: jnp.dtype,
) -> DecodeState:  # fmt: skip
    """Append `chunk[:count]` (a tool result) to some rows and set them sampling again.

    `rows [A]` are row indices, on a mesh in equal parts for its devices, each part rows of its device; an unused place holds
    W, out of bounds. chunk `[A, Q]`, count `[A]`. The rows' pending token and all but the last appended one are fed; the
    last stays pending.
    """
    W, S = state.tokens.shape
    A, Q = chunk.shape
    safe = jnp.minimum(rows, W - 1)
    # Whole on every device: a collective of these few numbers would be woven into every matrix product of a layer.
    length, start, count = (replicate(x) for x in (state.length[safe], state.start[safe], count))
    pending = state.tokens[safe, length - 1]
    inputs = jnp.concatenate([pending[:, None], chunk[:, :-1]], axis=1)
    # A rows of their own: prefix and suffix of each are taken out, and the suffix is put back.
    shards = parts(W, ROWS)
    here = rows - jnp.arange(A) // (A // shards) * (W // shards)  # as its device counts them
    take = on_each_device(_rows_of, (BY_CACHE, BY_ROW), BY_CACHE)
    put = on_each_device(_with_rows, (BY_CACHE, BY_ROW, BY_CACHE), BY_CACHE)
    i = jnp.arange(A) % (A // shards)
    alone = Places(jnp.stack([i, jnp.zeros_like(i)], axis=1), i[:, None])
    taken, own = take(prefixes, places.of_row[safe, 0]), take(state.cache, here)
    # On accelerators a loop: its copies, of the weights and of a few rows, cost less than to compile every layer.
    scan = platform() != "cpu"
    table = _rotation_table(arch, prefixes, S)
    _, own = feed(params, arch, taken, alone, own, inputs, length - 1, count, start, table, dtype, scan)
    cache = put(state.cache, here, own)
    offsets = jnp.arange(Q)
    target = jnp.where(offsets < count[:, None], length[:, None] + offsets, S)
    # No scatter: the v6e compiler hands one of so few numbers to the sparse core, and ran out of stack over it.
    given = jnp.arange(W)[:, None] == rows  # [W, A]
    return _laid_out(
        dataclasses.replace(
            state,
            cache=cache,
            tokens=state.tokens.at[rows[:, None], target].set(chunk, mode="drop"),
            length=state.length + jnp.where(given, count, 0).sum(1),
            automaton=jnp.where(given.any(1), 0, state.automaton),
            active=state.active | given.any(1),
        )
    )
