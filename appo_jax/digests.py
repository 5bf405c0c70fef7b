"""Digests of arrays, which do not depend on their sharding. A checkpoint is verified by them."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def describe(state: PyTree) -> dict[str, list[Any]]:
    """Name -> [dtype, shape, digest] of every array."""
    named = named_leaves(state)
    # One after another: if many programs are queued, several CPU devices of one process can starve each other.
    digests = [jax.device_get(digest(leaf)) for _, leaf in named]
    return {
        name: [str(leaf.dtype), list(leaf.shape), f"{int(high):08x}{int(low):08x}"]
        for (name, leaf), (high, low) in zip(named, digests, strict=True)
    }


def identity(state: PyTree) -> str:
    """One digest of all arrays together."""
    return hashlib.sha256(json.dumps(describe(state), sort_keys=True).encode()).hexdigest()[:16]


def named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    return [
        (jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in jax.tree.leaves_with_path(tree)
    ]


@jax.jit
def digest(array: jax.Array) -> jax.Array:
    """[2] uint32: two sums over the array's words, each word times an odd number drawn from its index, modulo 2^32.

    Integer sums do not depend on order, so the digest is the same under every sharding, and it is computed on the devices that
    hold the array. A change in a single word always changes it, because an odd factor maps no other difference to 0. Any other
    change stays unnoticed with probability 2^-64.
    """
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    bits = jnp.dtype(f"uint{8 * min(array.dtype.itemsize, 4)}")
    words = jax.lax.bitcast_convert_type(array, bits).astype(jnp.uint32)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)

    def weighted_sum(multiplier: int) -> jax.Array:
        factor = (index + 1) * jnp.uint32(multiplier)
        factor = (factor ^ (factor >> 15)) * jnp.uint32(
            0x2C1B3C6D
        )  # mixed, so that close indices get unrelated factors
        return jnp.sum(words * (factor ^ (factor >> 12) | 1), dtype=jnp.uint32)

    return jnp.stack([weighted_sum(0x9E3779B1), weighted_sum(0x85EBCA77)])
