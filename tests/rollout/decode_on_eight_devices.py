"""tests/policy/test_sharding.py runs this in a separate process with eight CPU devices."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from growing import log_probs, make_trees
from jax.sharding import Mesh

from appo_jax.config import Architecture, BranchingConfig, MeshConfig, RolloutConfig
from appo_jax.policy.architecture import for_tokenizer
from appo_jax.policy.attention import Places
from appo_jax.policy.parameters import Params, init_params
from appo_jax.policy.sharding import generating, make_mesh, param_shardings, place, use_mesh
from appo_jax.rollout.decode import AppendBatch, DecodeSpec, StopTables, Until, append_tokens, decode_segment
from appo_jax.rollout.growth import TreeGrower
from appo_jax.rollout.state import Prefixes, empty_prefixes, empty_state, load_prefix
from appo_jax.rollout.tree_sampler import TreeSampler
from appo_jax.text.tokenizer import SentencePieceTokenizer
from appo_jax.tools.executor import ToolExecutor
from appo_jax.types import Example, Rollout


@pytest.fixture(scope="session")
def text() -> list[str]:
    """One more character than in conftest.py, for a vocabulary that the tensor axis can split."""
    return ["the quick brown fox jumps over the lazy dog ! . < / > 0 1 2 3 4 5 6 7 8 9"] * 20


# Compiling takes nearly all of the time. So most meshes have one policy, whose programs for one device are compiled once, and
# only one mesh has two layers: all layers are split alike.
@pytest.mark.parametrize(
    ("shape", "layers"),
    [
        ((2, 2, 2), 1),
        ((1, 1, 8), 1),
        pytest.param((4, 2, 1), 2, marks=pytest.mark.long),
        pytest.param((1, 2, 4), 1, marks=pytest.mark.long),
    ],
)
def test_trees_are_those_of_one_device(
    shape: tuple[int, int, int], layers: int, arch: Architecture, tokenizer: SentencePieceTokenizer, executor: ToolExecutor,
    examples: list[Example], rollout_config: RolloutConfig,
) -> None:  # fmt: skip
    # Eight query heads and two key/value heads: on two of the meshes, fewer than the tensor axis has places.
    arch = dataclasses.replace(arch, num_layers=layers, num_heads=8, vocab_size=-(-arch.vocab_size // 8) * 8)
    arch = for_tokenizer(arch, tokenizer.vocab_size)

    def params() -> Params:
        return jax.tree.map(lambda x: 1.4 * x, init_params(arch, seed=1 if shape[2] <= 2 else 2))

    def make(mesh: Mesh | None = None) -> tuple[TreeSampler, TreeGrower]:
        return make_trees(arch, tokenizer, executor, rollout_config, BranchingConfig(num_branch_points=2), mesh)

    def draw(sampler: TreeSampler, grower: TreeGrower, params: Params) -> list[Rollout]:
        trees = sampler.initial(params, examples, 3, (0, 0))
        # All at once, as a run does: passes of another size round otherwise, and the Branching Score would be of that.
        flat = iter(log_probs(sampler, params, [rollout for tree in trees for rollout in tree]))
        old = [[next(flat) for _ in tree] for tree in trees]
        return [rollout for tree in grower.grow(params, trees, old, (1, 0)).trees for rollout in tree]

    expected = draw(*make(), params())
    mesh = make_mesh(MeshConfig(*shape))
    compiled: list[float] = []
    with use_mesh(mesh):
        sampler, grower = make(mesh)
        sharded = place(params(), param_shardings(arch, mesh, "train"), mesh)
        found = draw(sampler, grower, sharded)

        def listen(event: str, duration: float, **kwargs: object) -> None:
            if event == "/jax/core/compile/backend_compile_duration":
                compiled.append(duration)

        jax.monitoring.register_event_duration_secs_listener(listen)
        draw(sampler, grower, sharded)
        jax.monitoring.clear_event_listeners()
    assert not compiled
    assert len(found) == len(expected) == 27
    for a, b in zip(found, expected, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        # On 4x2x1 one token of 1,600 is 2.0e-5 apart: 2.3e-5 from a float64 pass, where others are up to 0.8e-5 from it.
        bound = 2.5e-5 if shape == (4, 2, 1) else 1e-5
        assert np.abs(a.log_probs - b.log_probs).max() < bound
        assert np.abs(a.entropies - b.entropies).max() < bound
        assert (a.stop_reason, a.node, a.parent, a.fork) == (b.stop_reason, b.node, b.parent, b.fork)


def test_caches_and_queries_stay_on_their_device() -> None:
    """No collective of a decode step or of an append moves more than the activations that the tensor axis sums."""
    arch = Architecture(512, 64, 2, 4, 2, 16, 96)
    W, S, R, T, A, Q = 8, 512, 8, 512, 4, 8
    dtype = jnp.dtype("float32")
    mesh = make_mesh(MeshConfig(2, 2, 2))
    places = Places(  # both rows of a device on the first of its two slots
        np.array([[0, w % 2] for w in range(W)], np.int32),
        np.array([[0, 1] if r % 2 == 0 else [2, 2] for r in range(R)], np.int32),
    )
    with use_mesh(mesh):
        params = generating(init_params(arch, 0), mesh, dtype).params
        state = empty_state(arch, W, S, dtype)
        prefixes = Prefixes(empty_prefixes(arch, R, T, dtype), places)
        stops = StopTables(jnp.zeros((3, 512), jnp.int32), jnp.full(3, -1))
        spec = DecodeSpec(arch, dtype, 1.0, 0, 1.0, 2)
        decode = decode_segment.lower(params, prefixes, state, stops, Until(0, 4), spec=spec)
        rows = np.arange(0, W, 2, dtype=np.int32)
        batch = AppendBatch(rows, np.zeros((A, Q), np.int32), np.ones(A, np.int32))
        append = append_tokens.lower(params, prefixes, state, batch, arch=arch, dtype=dtype)
    # A mesh with a tensor axis must reduce something. Logits are gathered for sampling.
    assert 0 < most_moved(decode.compile().as_text()) <= W // 4 * arch.vocab_size
    # The MLP of each data place works for the rows of its two fsdp places.
    assert 0 < most_moved(append.compile().as_text()) <= A // 2 * Q * arch.width


def test_of_a_cache_one_row_travels_into_a_slot() -> None:
    arch, rows, T = Architecture(512, 64, 2, 4, 2, 16, 96), 16, 128
    with use_mesh(make_mesh(MeshConfig(2, 2, 2))):
        prefixes = empty_prefixes(arch, 8, T, jnp.dtype("float32"))
        source = empty_state(arch, rows, T + 1, jnp.dtype("float32")).cache
        text = load_prefix.lower(prefixes, source, 0, np.arange(T), 0).compile().as_text()
    row = arch.num_kv_heads * T * arch.head_dim
    assert 0 < most_moved(text) <= row // 2  # the tensor axis has two parts of it


def most_moved(text: str) -> int:
    """Elements of the largest array that a collective of a compiled program moves."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    moved = [
        dims for shapes in re.findall(rf" = (.*) (?:{kinds})\(", text) for dims in re.findall(r"\[([\d,]*)\]", shapes)
    ]
    return max((math.prod(int(size) for size in dims.split(",") if size) for dims in moved), default=0)
