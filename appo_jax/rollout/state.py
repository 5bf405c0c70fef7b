"""The device's state of a generation: padded tree tensors, and the programs that load rows and prefixes into them.

W rows decode together. A row sits at a place (r, c): it continues the prefix in slot r, as one of at most C rows that do.
Its text is the first `start + 1` tokens of that prefix followed by its suffix:

    slot r        p0 p1 p2 p3 p4 p5 p6 …         keys [R, K, E, T] and values [R, K, T, E], from prefill or score pass;
                                                 cut along T into blocks (`attention.cut`)
    row w               └ start = 3: sees p0 p1 p2 of the prefix
    suffix              p3 s1 s2 s3 __ __        slot 0 repeats the last prefix token, so that its logits draw s1
                        ^^^^^^^^ cached  ^ slots 0 … length−2 have keys and values; the last token is still to be fed

So a fork is stored as a position in the prefix, and no cache is copied. The same program draws initial rollouts (N rows on one
prompt) and branches (B rows on one parent). Everything except attention over the prefix runs on the W rows; `Places` holds the
places of the rows.

On a mesh, rows, prefix slots and their caches are split over (data, fsdp), and heads over tensor. A row continues a prefix of
its own device, so each device reads and writes only its own caches. The small per-row arrays are replicated on every device,
because the host reads them after every segment.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from appo_jax.config import Architecture
from appo_jax.policy import attention
from appo_jax.policy.attention import Blocks, LayerCache, Places
from appo_jax.policy.constraints import replicate


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


class Prefixes(NamedTuple):
    """The prefixes that rows continue, and which row continues which."""

    slots: list[Blocks]  # per layer: R prefixes of T tokens, cut into blocks
    places: Places


class NewRows(NamedTuple):
    """Rows to begin, as arrays over all W rows. A row with `on` False is not changed."""

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


def laid_out(state: DecodeState) -> DecodeState:
    rest = jax.tree.map(replicate, dataclasses.replace(state, cache=[]))
    return dataclasses.replace(rest, cache=attention.laid_out(state.cache))


@functools.partial(jax.jit, static_argnames=("arch", "slots", "length", "dtype"))
def empty_prefixes(arch: Architecture, slots: int, length: int, dtype: jnp.dtype) -> list[Blocks]:
    """Slots for R prefixes (`slots`) of T tokens (`length`): the layers' caches, cut into blocks."""
    return attention.laid_out([attention.cut(_empty_cache(arch, slots, length, dtype)) for _ in range(arch.num_layers)])


def _empty_cache(arch: Architecture, rows: int, length: int, dtype: jnp.dtype) -> LayerCache:
    K, E = arch.num_kv_heads, arch.head_dim
    return jnp.zeros((rows, K, E, length), dtype), jnp.zeros((rows, K, length, E), dtype)


@functools.partial(jax.jit, static_argnames=("arch", "rows", "slots", "dtype"))
def empty_state(arch: Architecture, rows: int, slots: int, dtype: jnp.dtype) -> DecodeState:
    """W rows, none of them active. `slots` is S."""

    def per_row() -> jax.Array:
        return jnp.zeros(rows, jnp.int32)

    return laid_out(
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
def load_prefix(
    prefixes: list[Blocks], source: list[LayerCache], row: jax.Array, tokens: jax.Array, slot: jax.Array
) -> list[Blocks]:
    """Copy a prefix out of a prefill's or score pass's cache into prefix slot `slot`: its tokens stand in row `row` at
    `tokens [T]`.

    The row is taken out by a gather, because on a mesh only this row is then sent. For a dynamic slice, every device would
    fetch all rows.
    """
    heads = prefixes[0][0][1].shape[1]  # more than the source's where the generating layout repeats them

    def repeated(x: jax.Array) -> jax.Array:
        return x if x.shape[1] == heads else jnp.repeat(x, heads // x.shape[1], axis=1)

    prefix = jax.tree.map(repeated, rows_of(source, jnp.asarray(row)[None]))
    prefix = [(k.at[..., tokens].get(mode="clip"), v.at[..., tokens, :].get(mode="clip")) for k, v in prefix]

    def put(slots: jax.Array, block: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(slots, block, slot, axis=0)

    return attention.laid_out(jax.tree.map(put, prefixes, [attention.cut(cache) for cache in prefix]))


@functools.partial(jax.jit, donate_argnames=("state",))
def begin_rows(state: DecodeState, new: NewRows, seed: jax.Array | int) -> DecodeState:
    """Set rows to the start of their suffix. The old contents of their slots lie beyond their length and are never
    read."""

    def key(ids: jax.Array) -> jax.Array:
        return functools.reduce(jax.random.fold_in, ids, jax.random.key(seed))

    def put(fresh: jax.Array | np.ndarray, old: jax.Array) -> jax.Array:
        return jnp.where(new.on, fresh, old)

    return laid_out(
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
    return laid_out(dataclasses.replace(state, active=state.active & ~rows))


def rows_of(cache: Any, rows: jax.Array) -> Any:
    """Some rows of a cache; indices beyond it are clipped."""
    return jax.tree.map(lambda x: x.at[rows].get(mode="clip"), cache)
