"""The mesh of devices, and the sharding of parameters, batches and caches over it.

Axes of the mesh: `data` and `fsdp` split the rows of a batch; `fsdp` also splits parameters and optimizer state while
training; `tensor` splits heads, the MLP and the vocabulary. Parameters have two layouts:

    train     D over fsdp; H, K, F, V over tensor. Each layer's weights are gathered over fsdp when they are used.
    generate  H, K over tensor; F, V over tensor and fsdp (over tensor alone if tensor × fsdp does not divide them); D is not
              split. The time of decoding is the time to read weights. So a device reads only its part of the MLP, for the rows
              of all devices along fsdp, and the activations of these few rows are sent instead of weights. If there are fewer
              key/value heads than mesh.tensor, they are repeated.

On a mesh of one device nothing is sharded: arrays stay on the default device. Activations follow the constraints of
constraints.py, which use the mesh that `use_mesh` set.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from appo_jax.config import Architecture, MeshConfig
from appo_jax.errors import ConfigError
from appo_jax.policy.adapters import abstract_adapters, with_adapters
from appo_jax.policy.constraints import AXES, ROWS, WIDE, platform, spec_of
from appo_jax.policy.parameters import LAYER, TOP, Params, abstract_params, row_of, transposed

Layout = Literal["train", "generate"]
AnyTree = TypeVar("AnyTree")

# From a parameter's logical axis to the mesh axes that split it. If two are given and do not divide it, only the first splits it.
Rules = Mapping[str, str | tuple[str, ...]]
_TENSOR = {"H": "tensor", "K": "tensor", "F": "tensor", "V": "tensor"}
RULES: dict[Layout, Rules] = {"train": _TENSOR | {"D": "fsdp"}, "generate": _TENSOR | {"F": WIDE, "V": WIDE}}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh `(data, fsdp, tensor)` of `config` over all devices (default: `jax.devices()`).

    With several slices, the data axis is split over the slices first, so that only gradients cross the slow network. Raises
    ConfigError if the numbers of devices or slices are not those of the config.
    """
    devices = jax.devices() if devices is None else devices
    shape = (config.data, config.fsdp, config.tensor)
    if math.prod(shape) != len(devices):
        raise ConfigError(
            f"mesh.data × mesh.fsdp × mesh.tensor = {' × '.join(map(str, shape))} = {math.prod(shape)}, but there are "
            f"{len(devices)} devices ({devices[0].device_kind}): make the product {len(devices)}, for example with "
            f"mesh.data = 1, mesh.fsdp = {len(devices)}, mesh.tensor = 1"
        )
    if config.slices == 1:
        return _mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True))
    # On backends without slices (GPU, CPU), the devices of a process count as a slice: they share the fast network.
    by_process = len({getattr(device, "slice_index", 0) for device in devices}) == 1
    found = len({device.process_index if by_process else device.slice_index for device in devices})
    if found != config.slices:
        raise ConfigError(f"mesh.slices = {config.slices}, but the {len(devices)} devices form {found}")
    return _mesh(
        mesh_utils.create_hybrid_device_mesh(
            (config.data // config.slices, config.fsdp, config.tensor), (config.slices, 1, 1), devices,
            process_is_granule=by_process, allow_split_physical_axes=True,
        )
    )  # fmt: skip


def _mesh(devices: np.ndarray) -> Mesh:
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def use_mesh(mesh: Mesh) -> contextlib.AbstractContextManager[Any]:
    """A context manager: programs traced in `with use_mesh(mesh):` are partitioned over the mesh, and are for its platform."""
    if mesh.size > 1:
        return jax.set_mesh(mesh)
    device = mesh.abstract_mesh.abstract_device
    if device.platform == jax.default_backend():
        return contextlib.nullcontext()
    # A plan for one device of another machine: a mesh without axes says for which platform programs are traced.
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def param_shardings(arch: Architecture, mesh: Mesh, layout: Layout, params: Params | None = None) -> Params:
    """A `NamedSharding` for every parameter of an architecture, or for those of the tree `params`.

    Raises ConfigError that lists the axes that the mesh cannot split, with array, sizes and field.
    """
    problems: dict[str, str] = {}  # by logical axes, so that equal layers give one message

    def sharding(path: tuple[Any, ...], array: jax.ShapeDtypeStruct) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        axes = row_of(path).axes
        try:
            return NamedSharding(mesh, partition_spec(name, axes, array.shape, RULES[layout], mesh))
        except ConfigError as error:
            problems.setdefault(axes, str(error))
            return NamedSharding(mesh, PartitionSpec())

    shardings = jax.tree_util.tree_map_with_path(sharding, abstract_params(arch) if params is None else params)
    if problems:
        raise ConfigError.of(list(problems.values()))
    return shardings


def partition_spec(name: str, axes: str, shape: Sequence[int], rules: Rules, mesh: Mesh) -> PartitionSpec:
    """The partition of one array. `axes`: a letter for each of its axes; `rules`: from letters to mesh axes.

    If the number of key/value heads is smaller than mesh.tensor and divides it, every device holds all of them. Raises
    ConfigError if two array axes would be split over one mesh axis, or if a size is not divisible; the message has `name`.
    """
    taken: dict[str, str] = {}
    array = f"{name} [{', '.join(axes)}] = {list(shape)}"
    spec: list[tuple[str, ...]] = []
    for letter, size in zip(axes, shape, strict=True):
        rule = rules.get(letter, ())
        targets = (rule,) if isinstance(rule, str) else rule
        if size % math.prod(mesh.shape[target] for target in targets):
            targets = targets[:1]
        if letter == "K" and targets and size < mesh.shape[targets[0]] and mesh.shape[targets[0]] % size == 0:
            targets = ()
        for target in targets:
            if target in taken:
                raise ConfigError(
                    f"{array}: axes {taken[target]} and {letter} are both on mesh axis {target!r}; give one of them another "
                    "rule"
                )
            taken[target] = letter
            if size % mesh.shape[target]:
                or_more = " or a multiple" if letter == "K" else ""
                raise ConfigError(
                    f"{array}: axis {letter} = {size} cannot be split over mesh.{target} = {mesh.shape[target]}; "
                    f"set mesh.{target} to a divisor{or_more} of {size}"
                )
        # Mesh axes of one device are left out, as jax leaves them out of the specs that it returns.
        spec.append(tuple(target for target in targets if mesh.shape[target] > 1))
    return spec_of((targets[0] if len(targets) == 1 else targets) or None for targets in spec)


def state_shardings(state: AnyTree, arch: Architecture, mesh: Mesh) -> AnyTree:
    """Shardings of a training state: parameters and the optimizer's arrays, in the training layout.

    `state`: any tree of arrays or `ShapeDtypeStruct`. A leaf whose path ends with a parameter's path is sharded as that
    parameter (optax keeps moments in trees of the parameters' form); all others are replicated.
    """
    params = with_adapters(abstract_params(arch), abstract_adapters(arch))
    shardings = param_shardings(arch, mesh, "train", params)
    of_params = {_dict_keys(path): s for path, s in jax.tree.leaves_with_path(shardings)}
    other = NamedSharding(mesh, PartitionSpec())
    return jax.tree_util.tree_map_with_path(lambda path, _: of_params.get(_dict_keys(path), other), state)


def _dict_keys(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """The dict keys at the end of a path."""
    first = max((i + 1 for i, key in enumerate(path) if not isinstance(key, jax.tree_util.DictKey)), default=0)
    return tuple(key.key for key in path[first:])


def batch_sharding(mesh: Mesh, ndim: int = 2) -> NamedSharding:
    """The sharding of a batch's array `[…, R, T]`: rows over data and fsdp. A scalar is replicated."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * (ndim - 2), ROWS) if ndim else PartitionSpec())


def batch_shardings(batch: AnyTree, mesh: Mesh) -> AnyTree:
    """`batch_sharding` of each array of a batch."""
    return jax.tree.map(lambda x: batch_sharding(mesh, np.ndim(x)), batch)


def cache_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of keys and values `[rows, K, tokens, E]`: rows over data and fsdp, heads over tensor."""
    return NamedSharding(mesh, PartitionSpec(ROWS, "tensor"))


def place(tree: AnyTree, shardings: Any, mesh: Mesh) -> AnyTree:
    """Put the arrays of `tree` under `shardings` (a tree of them, or one for all). On a mesh of one device, nothing changes."""
    return jax.device_put(tree, shardings) if mesh.size > 1 else tree


def annotate(tree: AnyTree, shardings: Any, mesh: Mesh) -> AnyTree:
    """`place` for a tree of `jax.ShapeDtypeStruct`."""
    if mesh.size == 1:
        return tree
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


@functools.partial(jax.jit, static_argnames=("mesh", "dtype"))
def reshard(params: Params, mesh: Mesh, dtype: Any = jnp.bfloat16) -> Params:
    """A copy in the generating layout, with matrices and biases in `dtype`.

    Norm scales stay in float32, because they are applied in float32. The copy is a policy of `generating_architecture`, which
    computes the same function.
    """

    def reshard_array(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        row = row_of(path)
        if "K" in row.axes:
            axis = row.axes.index("K")
            x = jnp.repeat(x, _kv_copies(x.shape[axis], mesh), axis)
        spec = partition_spec(path[-1].key, row.axes, x.shape, RULES["generate"], mesh)
        x = x if row.kind == "norm" else x.astype(dtype)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(reshard_array, params)


def generates_in_place(params: Params, mesh: Mesh, dtype: Any) -> bool:
    """Whether `params` (arrays or `ShapeDtypeStruct`) already have the layout and the dtype of generation."""
    embed = params["embed"]
    if mesh.size == 1:
        return embed.dtype == dtype
    heads = params["layers"][0]["k"].shape[LAYER["k"].axes.index("K")]
    spec = partition_spec("embed", TOP["embed"].axes, embed.shape, RULES["generate"], mesh)
    as_needed = embed.dtype == dtype and _kv_copies(heads, mesh) == 1
    return as_needed and embed.sharding.is_equivalent_to(NamedSharding(mesh, spec), embed.ndim)


def generating_architecture(arch: Architecture, mesh: Mesh) -> Architecture:
    """The architecture of a policy in the generating layout, where key/value heads may be repeated."""
    return dataclasses.replace(arch, num_kv_heads=arch.num_kv_heads * _kv_copies(arch.num_kv_heads, mesh))


def _kv_copies(heads: int, mesh: Mesh) -> int:
    """How often each key/value head is repeated, so that every device along the tensor axis has one."""
    tensor = mesh.shape["tensor"]
    return tensor // heads if heads < tensor and tensor % heads == 0 else 1


class GeneratingPolicy(NamedTuple):
    """A policy's parameters in the forms that generation reads."""

    params: Params  # for prefill and for appends of tool results
    step: Params  # for decode steps


def generating(params: Params, mesh: Mesh, dtype: Any) -> GeneratingPolicy:
    """`params` in the generating layout. They are copied only if they are not in it already (`generates_in_place`).

    On a single CPU device, decode steps read a copy with transposed matrices (`parameters.transposed`), because products of few
    rows are faster with it.
    """
    params = params if generates_in_place(params, mesh, dtype) else reshard(params, mesh, dtype)
    return GeneratingPolicy(params, transposed(params) if mesh.size == 1 and platform() == "cpu" else params)
