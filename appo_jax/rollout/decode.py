"""The programs that advance rows: decoding until the host must act, and appending tool results."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from appo_jax.config import Architecture, RolloutConfig
from appo_jax.policy import attention
from appo_jax.policy.attention import Blocks, LayerCache, Places
from appo_jax.policy.constraints import ROWS, constrain, on_each_device, parts, platform, replicate, widest
from appo_jax.policy.parameters import Params
from appo_jax.policy.transformer import LayerPass, Rotations, hidden_states, rotations, unembed, unembedding
from appo_jax.rollout.sampling import draw, truncate
from appo_jax.rollout.state import DecodeState, Prefixes, laid_out, rows_of

BY_ROW, BY_HEAD, BY_CACHE = PartitionSpec(ROWS), PartitionSpec(ROWS, None, "tensor"), PartitionSpec(ROWS, "tensor")


@dataclasses.dataclass(frozen=True)
class DecodeSpec:
    """The static arguments of the decode program."""

    arch: Architecture
    dtype: Any
    temperature: float  # 0: greedy
    top_k: int
    top_p: float
    eos_ids: tuple[int, ...]

    @classmethod
    def of(
        cls, config: RolloutConfig, arch: Architecture, dtype: Any, temperature: float, eos_ids: tuple[int, ...]
    ) -> DecodeSpec:
        """Of a run. `arch`: of the parameters that generation reads."""
        return cls(arch, dtype, temperature, config.top_k, config.top_p, eos_ids)


class StopTables(NamedTuple):
    """The stop automaton on the device (text/automaton.py): A states, V tokens."""

    next_state: jax.Array  # [A, V]
    hit: jax.Array  # [A] int32: the stop string that is completed in a state; −1: none


class Until(NamedTuple):
    """When decoding pauses for the host: at this few active rows, or after this many steps, whichever comes first."""

    min_active: jax.Array | int
    max_steps: jax.Array | int


class AppendBatch(NamedTuple):
    """Tool results for some rows."""

    rows: np.ndarray | jax.Array  # [A] int32: row indices; unused entries are W, which is out of bounds
    chunk: np.ndarray | jax.Array  # [A, Q] int32: the tokens of each result, padded
    counts: np.ndarray | jax.Array  # [A] int32: how many tokens each result has

    @classmethod
    def empty(cls, places: int, length: int, rows: int) -> AppendBatch:
        """A batch that appends nothing. `rows` is W."""
        return cls(np.full(places, rows, np.int32), np.zeros((places, length), np.int32), np.zeros(places, np.int32))


class _Span(NamedTuple):
    """The positions of the tokens that are fed, each `[W]`."""

    slot: jax.Array  # suffix slot of the first
    counts: jax.Array  # how many there are; the others are padding
    start: jax.Array  # position of slot 0 in the row's text


def _feed(
    params: Params, spec: tuple[Architecture, Any, bool], prefixes: Prefixes, cache: list[LayerCache], tokens: jax.Array,
    span: _Span, table: Rotations,
) -> tuple[jax.Array, list[LayerCache]]:  # fmt: skip
    """Run tokens `[W, Q]` through the policy, at the suffix slots of `span`.

    `spec`: the architecture, the dtype, and `scan` (see LayerPass); `table`: the rotations of all positions. Returns
    hidden states `[W, Q, D]` and the cache with the tokens' keys and values written.
    """
    (arch, dtype, scan), (slot, count, start) = spec, span
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
        slots = suffix[1].shape[2]
        # Padding gets an index out of bounds; the scatter drops it.
        target = jnp.where(offsets < count[:, None], slot[:, None] + offsets, slots)  # [W, Q]
        written = write(suffix, (new_k, new_v), target, by_head=platform() == "tpu")
        return attention.tree(q, prefix, written, places, prefix_length=start, cached=slot), written

    def attend(
        of_layer: tuple[Blocks, LayerCache], q: jax.Array, new_k: jax.Array, new_v: jax.Array
    ) -> tuple[jax.Array, LayerCache]:
        return write_and_attend(q, new_k, new_v, *of_layer, prefixes.places, start, slot, count)

    positions = (start + slot)[:, None] + offsets
    rotation = jax.tree.map(lambda x: x.at[positions].get(mode="clip"), table)
    caches = list(zip(prefixes.slots, cache, strict=True))
    return hidden_states(params, arch, tokens, rotation, attend, LayerPass(dtype, scan=scan), caches)


def write(suffix: LayerCache, new: LayerCache, target: jax.Array, by_head: bool) -> LayerCache:
    """The suffix caches of a layer with new keys and values `[W, Q, K, E]` in the slots `target [W, Q]`; slots out of bounds are
    dropped.

    `by_head`: each head is written by itself. With more than one head on a device, the TPU compiler would otherwise lay out the
    heads of a token side by side, and copy the caches into the order of the kernel at every token.
    """
    w, heads = jnp.arange(len(target))[:, None], cast(Any, slice(None))
    if by_head:
        w, target, heads = w[..., None], target[..., None], jnp.arange(suffix[1].shape[1])
    k = suffix[0].at[w, heads, :, target].set(new[0], mode="drop", unique_indices=True)
    v = suffix[1].at[w, heads, target].set(new[1], mode="drop", unique_indices=True)
    return k, v


def _rotation_table(arch: Architecture, prefixes: Prefixes, suffix_length: int) -> Rotations:
    """`rotations` of every position that a row can reach.

    Decode steps look them up, because the compiler would compute them again for every head of every layer.
    """
    positions = attention.slot_length(prefixes.slots[0]) + suffix_length
    return jax.lax.optimization_barrier(rotations(jnp.arange(positions), arch))


@functools.partial(jax.jit, static_argnames=("spec",), donate_argnames=("state",))
def decode_segment(
    params: Params, prefixes: Prefixes, state: DecodeState, stops: StopTables, until: Until, *, spec: DecodeSpec
) -> tuple[DecodeState, jax.Array]:
    """Sample until the host must act (`until`). Returns the state and the number of steps.

    A row stops at EOS, at the end of a stop string or at its limit; the host reads which from its last token, its automaton
    and its length.
    """
    weights = unembedding(params).astype(spec.dtype)
    W, S = state.tokens.shape
    w = jnp.arange(W)
    table = _rotation_table(spec.arch, prefixes, S)

    def go_on(carry: tuple[DecodeState, jax.Array]) -> jax.Array:
        return (carry[0].active.sum() > until.min_active) & (carry[1] < until.max_steps)

    def step(carry: tuple[DecodeState, jax.Array]) -> tuple[DecodeState, jax.Array]:
        s, steps = carry
        last = s.length - 1
        token = s.tokens[w, last][:, None]
        # Inactive rows also write the keys and values of their last token: the same numbers that are written when it is
        # fed later.
        span = _Span(last, jnp.ones_like(last), s.start)
        hidden, cache = _feed(params, (spec.arch, spec.dtype, False), prefixes, s.cache, token, span, table)
        # Each device computes the logits of its part of the vocabulary for the rows of all devices along fsdp. Then the logits are
        # redistributed, so that it has a larger part of the vocabulary for fewer rows.
        logits = unembed(constrain(hidden[:, 0], "data"), weights, spec.arch, columns=True)
        logits = constrain(constrain(logits, widest(len(weights)), "data"), "tensor", ROWS)
        uniforms = None
        if spec.temperature > 0:
            logits = truncate(logits / spec.temperature, spec.top_k, spec.top_p)
            keys = jax.vmap(jax.random.fold_in)(s.key, s.start + s.length)
            uniforms = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
        drawn, log_prob, entropy = draw(logits, uniforms)
        slot = jnp.where(s.active, s.length, S)  # out of bounds for inactive rows, and therefore dropped
        length = s.length + s.active
        automaton = jnp.where(s.active, stops.next_state[s.automaton, drawn], s.automaton).astype(jnp.int32)
        stop = jnp.isin(drawn, jnp.asarray(spec.eos_ids)) | (stops.hit[automaton] >= 0) | (length >= s.limit)
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
        return laid_out(s), steps + 1

    state, steps = jax.lax.while_loop(go_on, step, (state, jnp.int32(0)))
    return laid_out(state), replicate(steps)


def _with_rows(cache: list[LayerCache], rows: jax.Array, new: list[LayerCache]) -> list[LayerCache]:
    return jax.tree.map(lambda x, y: x.at[rows].set(y, mode="drop"), cache, new)


@functools.partial(jax.jit, static_argnames=("arch", "dtype"), donate_argnames=("state",))
def append_tokens(
    params: Params, prefixes: Prefixes, state: DecodeState, batch: AppendBatch, *, arch: Architecture, dtype: Any
) -> DecodeState:
    """Append tool results to some rows and set those rows sampling again.

    On a mesh, each equal part of the batch holds rows of one device. The row's pending token and all appended tokens
    except the last are fed; the last becomes the pending token.
    """
    W, S = state.tokens.shape
    A, Q = batch.chunk.shape
    rows, chunk = jnp.asarray(batch.rows), batch.chunk
    in_bounds = jnp.minimum(rows, W - 1)
    # Replicated on every device: otherwise the compiler would put a collective of these few numbers into every matrix
    # product.
    length, start, count = (
        replicate(x) for x in (state.length[in_bounds], state.start[in_bounds], jnp.asarray(batch.counts))
    )
    pending = state.tokens[in_bounds, length - 1]
    inputs = jnp.concatenate([pending[:, None], chunk[:, :-1]], axis=1)
    # The rows' prefixes and suffixes are taken out of the caches, and the suffixes are put back.
    shards = parts(W, ROWS)
    on_device = rows - jnp.arange(A) // (A // shards) * (W // shards)  # row indices, as the row's device counts them
    take = on_each_device(rows_of, (BY_CACHE, BY_ROW), BY_CACHE)
    put = on_each_device(_with_rows, (BY_CACHE, BY_ROW, BY_CACHE), BY_CACHE)
    i = jnp.arange(A) % (A // shards)
    one_row_each = Places(jnp.stack([i, jnp.zeros_like(i)], axis=1), i[:, None])
    taken = Prefixes(take(prefixes.slots, prefixes.places.of_row[in_bounds, 0]), one_row_each)
    suffixes = take(state.cache, on_device)
    # On accelerators the layers run as a loop: copying the weights and a few rows into it costs less than compiling every layer.
    spec = (arch, dtype, platform() != "cpu")
    table = _rotation_table(arch, prefixes, S)
    _, suffixes = _feed(params, spec, taken, suffixes, inputs, _Span(length - 1, count, start), table)
    cache = put(state.cache, on_device, suffixes)
    offsets = jnp.arange(Q)
    target = jnp.where(offsets < count[:, None], length[:, None] + offsets, S)
    # This is not a scatter, because the v6e compiler would give such a small scatter to the sparse core, which runs out of stack.
    receives = jnp.arange(W)[:, None] == rows  # [W, A]
    return laid_out(
        dataclasses.replace(
            state,
            cache=cache,
            tokens=state.tokens.at[rows[:, None], target].set(chunk, mode="drop"),
            length=state.length + jnp.where(receives, count, 0).sum(1),
            automaton=jnp.where(receives.any(1), 0, state.automaton),
            active=state.active | receives.any(1),
        )
    )
