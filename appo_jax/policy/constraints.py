"""Sharding constraints on activations, for the partitioner inside jit.

Rows are split over the data and fsdp axes, heads and the MLP's inner axis over the tensor axis. The mesh is the one that
`sharding.use_mesh` set. On a single device there is no mesh, and these functions return their arguments unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

AXES = ("data", "fsdp", "tensor")  # of every mesh
ROWS = ("data", "fsdp")  # the rows of a batch are split over these axes
# The MLP's inner axis and the vocabulary are split over these axes while rollouts are generated. Tensor comes first: a part of
# the training layout is split further, and it is gathered among devices of the same tensor index.
WIDE = ("tensor", "fsdp")


def widest(size: int) -> str | tuple[str, ...]:
    """WIDE if it divides an array axis of this size, else its first mesh axis."""
    return WIDE if parts(size, WIDE) > 1 else WIDE[0]


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """`x` with its leading axes split over the named mesh axes and the other axes replicated.

    An array axis whose size the mesh axes do not divide is replicated too (one row, a few appended tool results).
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, divided(x.shape, *axes))


def divided(shape: Sequence[int], *axes: str | tuple[str, ...] | None) -> PartitionSpec:
    """The partition that `constrain` gives an array of this shape on the mesh in use."""
    return spec_of(
        names if names and parts(size, names) > 1 else None for size, names in zip(shape, axes, strict=False)
    )


def parts(size: int, names: str | tuple[str, ...]) -> int:
    """The number of parts into which `constrain` splits an array axis over mesh axes; 1 if they do not divide its size."""
    mesh = jax.sharding.get_abstract_mesh()
    count = math.prod(mesh.shape.get(name, 1) for name in ((names,) if isinstance(names, str) else names))
    return count if size % count == 0 else 1


def spec_of(axes: Iterable[str | tuple[str, ...] | None]) -> PartitionSpec:
    """The partition in its shortest form, which is also the form that jax returns. Two forms would compile two programs."""
    axes = list(axes)
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)


def replicate(x: jax.Array) -> jax.Array:
    """`x` replicated on every device, so that every host can read it."""
    return constrain(x)


def row_shards(mesh: Mesh | AbstractMesh) -> int:
    """The number of parts into which the rows of a batch are split."""
    return math.prod(mesh.shape[name] for name in ROWS)


def on_each_device(run: Callable[..., Any], arguments: Any, results: Any) -> Callable[..., Any]:
    """`run` on each device's own part of the arguments, without communication between devices.

    `arguments` and `results`: the partitions of its arguments and results, as pytree prefixes (see `jax.shard_map`).
    """
    if jax.sharding.get_abstract_mesh().empty:
        return run
    return jax.shard_map(run, in_specs=arguments, out_specs=results, check_vma=False)


def merged(*sizes: int) -> tuple[int, ...]:
    """The shape to which leading axes of these sizes are reshaped: one axis, but on a mesh they stay separate.

    If rows and heads of a cache were merged on a mesh, the TPU compiler would copy the cache into another layout at every
    token.
    """
    return sizes if not jax.sharding.get_abstract_mesh().empty else (math.prod(sizes),)


def platform() -> str:
    """The platform that programs are compiled for: that of the mesh's devices (maybe on another machine), else the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
