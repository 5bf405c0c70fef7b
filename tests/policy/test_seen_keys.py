"""The kernel that reads only the seen part of a cache: interpreted on the CPU, and compiled for TPUs if libtpu is installed."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appo_jax.policy import seen_keys as module
from appo_jax.policy.attention import Places, tree
from appo_jax.policy.seen_keys import seen_keys
from appo_jax.rollout.decode import write

R, C, W, K, G, E, T, S = 3, 3, 5, 2, 2, 8, 1100, 530  # both caches end in the middle of a block


class Tree(NamedTuple):
    q: np.ndarray  # [W, Q, H, E]
    prefix: tuple[np.ndarray, np.ndarray]
    suffix: tuple[np.ndarray, np.ndarray]
    places: Places
    prefix_length: np.ndarray
    cached: np.ndarray


def random_tree(seed: int, longest_prefix: int, longest_suffix: int, new: int = 1) -> Tree:
    """W rows with `new` tokens each, at random places of R prefixes, each with a fork position and a suffix of its own."""
    rng = np.random.default_rng(seed)
    at = rng.permutation(R * C)[:W]
    of_row = np.stack([at // C, at % C], axis=1).astype(np.int32)
    members = np.full((R, C), W, np.int32)
    members[of_row[:, 0], of_row[:, 1]] = np.arange(W)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    return Tree(
        normal(W, new, K * G, E), (normal(R, K, E, T), normal(R, K, T, E)), (normal(W, K, E, S), normal(W, K, S, E)),
        Places(of_row, members), rng.integers(0, longest_prefix + 1, W).astype(np.int32),
        rng.integers(0, longest_suffix, W).astype(np.int32),
    )  # fmt: skip


def by_hand(t: Tree) -> np.ndarray:
    """Float64 `[W, Q, H, E]`: each row over its part of its prefix and its own suffix, in one softmax."""
    out = np.zeros(t.q.shape)
    for w, i, h in np.ndindex(t.q.shape[:3]):
        r, seen, own = t.places.of_row[w, 0], t.prefix_length[w], t.cached[w] + 1 + i
        keys = np.concatenate([t.prefix[0][r, h // G, :, :seen], t.suffix[0][w, h // G, :, :own]], axis=1).astype(float)
        values = np.concatenate([t.prefix[1][r, h // G, :seen], t.suffix[1][w, h // G, :own]]).astype(float)
        logits = t.q[w, i, h] @ keys / np.sqrt(E)
        p = np.exp(logits - logits.max())
        out[w, i, h] = p @ values / p.sum()
    return out


run = jax.jit(tree, static_argnames="interpret")


@given(st.integers(0, 2**31), st.integers(0, T), st.integers(1, S))
@settings(max_examples=12)
def test_trees_of_any_lengths(seed: int, longest_prefix: int, longest_suffix: int) -> None:
    t = random_tree(seed, longest_prefix, longest_suffix)
    expected = by_hand(t)
    for interpret in (True, False):
        found = run(t.q, [t.prefix], *t[2:], interpret=interpret)
        np.testing.assert_allclose(found, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("new", [2, 7])
def test_new_tokens_are_taken_in_blocks(monkeypatch: pytest.MonkeyPatch, new: int) -> None:
    """Of 32 queries each: the first block of an appended result sees fewer keys than the last."""
    monkeypatch.setattr(module, "MAX_QUERIES", 32 * K)
    t = random_tree(new, T, S - 8 * new, 8 * new)
    assert module.query_blocks(K, 8 * new * G) == new // 2 + new % 2
    found = jax.jit(functools.partial(tree, interpret=True))(t.q, [t.prefix], *t[2:])
    np.testing.assert_allclose(found, by_hand(t), atol=2e-6, rtol=0)


def test_blocks_that_nobody_sees_are_not_read() -> None:
    """Unseen blocks hold NaN. One block of 512 keys is read of the first row's cache, and two of the second row's."""
    rng = np.random.default_rng(0)
    q, keys, values = (rng.normal(size=s).astype(np.float32) for s in ((2, K, G, E), (2, K, T, E), (2, K, T, E)))
    keys[0, :, 512:], values[0, :, 512:], keys[1, :, 1024:], values[1, :, 1024:] = (np.nan,) * 4
    seen = jnp.asarray([[0, 512], [513, 700]])
    out, top, total = jax.jit(functools.partial(seen_keys, interpret=True))(q, keys, values, seen)
    assert np.isfinite(out).all()
    assert not out[0, :, 0].any()
    assert not total[0, :, 0].any()
    logits = np.einsum("kme,kte->kmt", q[1].astype(float), keys[1, :, :700].astype(float))[:, 1]
    np.testing.assert_allclose(np.log(total[1, :, 1, 0]) + top[1, :, 1, 0], np.log(np.exp(logits).sum(-1)), atol=1e-5)


COMPILE = """
import jax, jax.numpy as jnp
from appo_jax.plan.compiler import compiler_for
from appo_jax.policy.seen_keys import seen_keys

for topology in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2"):
    here = jax.sharding.SingleDeviceSharding(compiler_for(topology).devices[0])
    for (N, K, M, E, T), dtype in (
        ((6, 4, 7, 128, 1500), "bfloat16"), ((6, 2, 4, 64, 300), "float32"),
        ((2, 1, 8000, 128, 9216), "bfloat16"), ((2, 8, 2048, 128, 5121), "bfloat16"),  # an appended result
        ((2, 16, 512, 128, 5121), "bfloat16"), ((2, 32, 512, 64, 5121), "bfloat16"),
    ):
        shapes = (((N, K, M, E), dtype), ((N, K, T, E), dtype), ((N, K, T, E), dtype), ((N, M), "int32"))
        arrays = [jax.ShapeDtypeStruct(shape, jnp.dtype(kind), sharding=here) for shape, kind in shapes]
        text = jax.jit(seen_keys).lower(*arrays).compile().as_text()
        assert "seen_keys" in text and "tpu_custom_call" in text
    print(topology)
"""


def test_it_compiles_for_tpus() -> None:
    pytest.importorskip("libtpu")
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=os.environ, check=False)
    assert done.stdout.split() == ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"], done.stderr[-3000:]


def test_keys_and_values_are_written_at_their_slots() -> None:
    """By head or not; what lies out of bounds is dropped."""
    rng = np.random.default_rng(0)
    keys, values = rng.normal(size=(W, K, E, S)), rng.normal(size=(W, K, S, E))
    new_keys, new_values = rng.normal(size=(2, W, 3, K, E))
    target = np.array([[0, 1, 2], [5, 6, S], [S, S, S], [S - 2, S - 1, S], [7, S, S]])
    expected_keys, expected_values = keys.copy(), values.copy()
    for w, q in np.argwhere(target < S):
        expected_keys[w, :, :, target[w, q]] = new_keys[w, q]
        expected_values[w, :, target[w, q]] = new_values[w, q]
    for by_head in (False, True):
        cache, new = (jnp.asarray(keys), jnp.asarray(values)), (jnp.asarray(new_keys), jnp.asarray(new_values))
        k, v = write(cache, new, jnp.asarray(target), by_head)
        np.testing.assert_array_equal(k, expected_keys.astype(k.dtype))
        np.testing.assert_array_equal(v, expected_values.astype(v.dtype))
