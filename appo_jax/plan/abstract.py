"""Shapes, dtypes and shardings of a run's arrays on a mesh, as `jax.ShapeDtypeStruct`: nothing is allocated."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from appo_jax.algorithms import Algorithm
from appo_jax.config import Architecture, Config
from appo_jax.learner.batch import terms_per_token
from appo_jax.learner.loss import Terms
from appo_jax.learner.optimizer import rl_optimizer, sft_optimizer
from appo_jax.learner.step import TrainBatch, TrainState
from appo_jax.policy import sharding
from appo_jax.policy.adapters import abstract_adapters, frozen, with_adapters
from appo_jax.policy.attention import Places
from appo_jax.policy.parameters import Adapted, Params, abstract_params
from appo_jax.policy.score import Rows
from appo_jax.rollout.shapes import GenerationShapes, PackedShape
from appo_jax.rollout.state import DecodeState, Prefixes, empty_prefixes, empty_state


class Arrays:
    """The arrays of a run of `config` on `mesh`. Letters for axes are those of types.py."""

    def __init__(self, config: Config, arch: Architecture, mesh: Mesh):
        self.arch, self.generating_arch, self.mesh = arch, sharding.generating_architecture(arch, mesh), mesh
        self.dtype = jnp.dtype("bfloat16" if config.policy.compute_dtype == "auto" else config.policy.compute_dtype)
        self.optimizer = rl_optimizer(config.optimizer)
        self.sft_optimizer = sft_optimizer(config.sft, config.optimizer)
        self._replicated = NamedSharding(mesh, PartitionSpec())

    def of(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """An array that is replicated on every device."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._replicated)

    def rows(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """An array `[…, R, T]` whose rows R are split over the devices, like rollouts."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(self.mesh, len(shape)))

    def packed(self, *shape: int) -> Rows:
        """Packed rows of texts `[…, R, T]`, int32."""
        return Rows(*(self.rows(shape, jnp.int32) for _ in Rows._fields))

    def state(self) -> TrainState:
        """Trained parameters (the adapters, if the policy has them) and optimizer state, in the training layout."""
        return self._state(abstract_adapters(self.arch) or abstract_params(self.arch), self.optimizer)

    def cold_start_state(self) -> TrainState:
        """All parameters and the optimizer state of the cold start, in the training layout."""
        return self._state(abstract_params(self.arch), self.sft_optimizer)

    def base(self) -> Params | None:
        """The frozen weights of a policy with adapters, in the training layout. None: all weights are trained."""
        if not isinstance(self.arch, Adapted):
            return None
        base = jax.eval_shape(lambda p: frozen(p, self.arch), abstract_params(self.arch))
        return sharding.annotate(base, sharding.param_shardings(self.arch, self.mesh, "train"), self.mesh)

    def policy(self) -> Params:
        """All parameters of the policy, trained and frozen, in the training layout."""
        return with_adapters(self.base(), self.state().params)

    def generating(self) -> Any:
        """The copy of the parameters that generation reads, as `sharding.reshard` makes it."""
        copy = jax.eval_shape(lambda p: sharding.reshard(p, self.mesh, self.dtype), self.policy())
        layout = sharding.param_shardings(self.generating_arch, self.mesh, "generate", copy)
        return sharding.annotate(copy, layout, self.mesh)

    def caches(self, rows: int, length: int) -> Any:
        """KV caches of `rows` prefixes of `length` tokens, for every layer."""
        return self._placed(jax.eval_shape(lambda: empty_prefixes(self.generating_arch, rows, length, self.dtype)))

    def generation(self, shapes: GenerationShapes) -> tuple[Prefixes, DecodeState]:
        """The prefixes and the decoding rows of one generation, as the engine holds them."""
        rows = jax.eval_shape(lambda: empty_state(self.generating_arch, shapes.rows, shapes.suffix_length, self.dtype))
        places = Places(self.of((shapes.rows, 2), jnp.int32), self.of((shapes.slots, shapes.columns), jnp.int32))
        return Prefixes(self.caches(shapes.slots, shapes.prefix_length), places), self._placed(rows)

    def batch(self, parts: int, shape: PackedShape, algorithm: Algorithm) -> TrainBatch:
        """The mini-batch of an update: `parts` micro-batches of packed rows of this shape."""
        floats = self.rows((parts, terms_per_token(algorithm.trains_later_branches), *shape), jnp.float32)
        terms = Terms(
            floats, floats, floats,
            ref_log_probs=floats if algorithm.scores_reference else None,
            surrogate_weights=floats if algorithm.drops_dual_clipped else None,
            kl_weights=floats if algorithm.adds_kl else None,
            counts=floats,
        )  # fmt: skip
        return TrainBatch(self.packed(parts, *shape), terms, self.of((), jnp.int32))

    def demonstrations(self, parts: int, rows: int, length: int) -> TrainBatch:
        """The batch of an update of the cold start: `parts` micro-batches of `rows` packed rows of `length` slots."""
        floats = self.rows((parts, 1, rows, length), jnp.float32)
        return TrainBatch(self.packed(parts, rows, length), Terms(floats, floats, floats), self.of((), jnp.int32))

    def _state(self, params: Params, optimizer: optax.GradientTransformation) -> TrainState:
        state = jax.eval_shape(lambda p: TrainState(p, optimizer.init(p)), params)
        return sharding.annotate(state, sharding.state_shardings(state, self.arch, self.mesh), self.mesh)

    def _placed(self, tree: Any) -> Any:
        """Place the arrays of a generation: of arrays with four axes, which are KV caches, the first axis is split over data and
        fsdp and the key/value heads over tensor. Other arrays are replicated."""
        caches = sharding.cache_sharding(self.mesh)

        def sharded(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=caches if x.ndim == 4 else self._replicated)

        return jax.tree.map(sharded, tree)


def on_chip(tree: Any) -> int:
    """Bytes per device of a tree of sharded `ShapeDtypeStruct`."""

    def shape(x: jax.ShapeDtypeStruct) -> tuple[int, ...]:
        return x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)

    return sum(_bytes(shape(x), x.dtype) for x in jax.tree.leaves(tree))


def in_all(tree: Any) -> int:
    """Bytes of a tree's arrays. Each array is counted once, on however many devices it lies."""
    return sum(_bytes(x.shape, x.dtype) for x in jax.tree.leaves(tree))


def _bytes(shape: tuple[int, ...], dtype: Any) -> int:
    # A PRNG key has two words of 4 bytes.
    return int(np.prod(shape)) * (8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize)
