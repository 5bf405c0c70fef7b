"""Where activations lie on the mesh: what the partitioner is told inside jit.

Rows are split over the data and fsdp axes, heads and the MLP's inner axis over the tensor axis. The mesh is the one that
`sharding.use_mesh` set; without one, on a single device, nothing here does anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

AXES = ("data", "fsdp", "tensor")  # of every mesh
ROWS = ("data", "fsdp")  # what rows of a batch are split over
# What the MLP's inner axis and the vocabulary are split over while rollouts are generated. Tensor first: a part of the training
# layout is cut further, and parts come together within their tensor place.
WIDE = ("tensor", "fsdp")


def widest(size: int) -> str | tuple[str, ...]:
    """WIDE where it divides an axis of this size, else its first axis alone."""
    return WIDE if parts(size, WIDE) > 1 else WIDE[0]


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """`x` with its leading axes laid over the mesh axes named, the others replicated.

    An array axis that the mesh axes do not divide is replicated too (one row, a few appended tool results).
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, divided(x.shape, *axes))


def divided(shape: Sequence[int], *axes: str | tuple[str, ...] | None) -> PartitionSpec:
    """The partition of `constrain` on the mesh in use."""
    return spec_of(
        names if names and parts(size, names) > 1 else None for size, names in zip(shape, axes, strict=False)
    )


def parts(size: int, names: str | tuple[str, ...]) -> int:
    """Into how many parts `constrain` splits an array axis over mesh axes: 1 where they do not divide its size."""
    mesh = jax.sharding.get_abstract_mesh()
    count = math.prod(mesh.shape.get(name, 1) for name in ((names,) if isinstance(names, str) else names))
    return count if size % count == 0 else 1


def spec_of(axes: Iterable[str | tuple[str, ...] | None]) -> PartitionSpec:
    """The partition in its shortest form, which is the one jax gives back: two forms would be two programs."""
    axes = list(axes)
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)


def replicate(x: jax.Array) -> jax.Array:
    """`x` whole on every device: what the host reads (with several hosts, each of them)."""
    return constrain(x)


def row_shards(mesh: Mesh | AbstractMesh) -> int:
    """How many parts the rows of a batch are split into."""
    return math.prod(mesh.shape[name] for name in ROWS)


def on_each_device(run: Callable[..., Any], arguments: Any, results: Any) -> Callable[..., Any]:
    """`run` on each device's own part of the arguments: inside it nothing travels, because nothing can.

    `arguments` and `results` say over which mesh axes those are split (pytree prefixes of partitions, as for
    `jax.shard_map`).
    """
    if jax.sharding.get_abstract_mesh().empty:
        return run
    return jax.shard_map(run, in_specs=arguments, out_specs=results, check_vma=False)


def merged(*sizes: int) -> tuple[int, ...]:
    """The shape of leading axes that a reshape may merge: one axis, but on a mesh as they are.

    To merge rows and heads of a cache, the TPU compiler copies it into another layout, at every token.
    """
    return sizes if not jax.sharding.get_abstract_mesh().empty else (math.prod(sizes),)


def platform() -> str:
    """What programs are compiled for: the mesh's devices (which may be another machine's), or the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
