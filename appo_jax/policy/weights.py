"""Reads and writes the weights of Hugging Face folders (safetensors files).

Loading reads each tensor's slices directly into its shards, so the host holds about one tensor at a time. Weights that are
loaded and then exported are the same byte for byte. Names and axes come from parameters.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from appo_jax.config import Architecture
from appo_jax.errors import WeightsError
from appo_jax.policy.architecture import read_architecture, to_hf
from appo_jax.policy.parameters import KeyPath, Parameter, Params, adapters, parameters, put

_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One of our arrays, and the form in which Hugging Face files store it."""

    path: KeyPath  # in the parameter tree
    name: str  # in the files
    axes: tuple[tuple[int, ...], ...]  # for each axis of the stored tensor, the axes of our array that it merges
    shape: tuple[int, ...]  # of our array

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return tuple(math.prod(self.shape[a] for a in group) for group in self.axes)

    def read(self, file: Path, index: tuple[slice, ...]) -> np.ndarray:
        """The part `index` of our array. Of merged axes, the inner ones are read whole and then cut."""
        bounds = [part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True)]
        window: list[slice] = []  # of the stored tensor
        block: list[int] = []  # the window's shape, with merged axes separated
        order: list[int] = []  # the axis of our array that each axis of `block` is
        for group in self.axes:
            (start, stop), rest = bounds[group[0]], [self.shape[a] for a in group[1:]]
            window.append(slice(start * math.prod(rest), stop * math.prod(rest)))
            block += [stop - start, *rest]
            order += group
        with safe_open(file, "np") as tensors:
            stored = tensors.get_slice(self.name)[tuple(window)]
        ours = stored.reshape(block).transpose(np.argsort(order))
        inner = {a for group in self.axes for a in group[1:]}
        return ours[tuple(slice(*bounds[a]) if a in inner else slice(None) for a in range(len(bounds)))]

    def to_stored(self, array: np.ndarray) -> np.ndarray:
        order = [a for group in self.axes for a in group]
        return np.ascontiguousarray(array.transpose(order)).reshape(self.stored_shape)


def load(folder: str | Path, shardings: Any = None, dtype: Any = None) -> Params:
    """The parameters of a Hugging Face folder.

    Args:
        folder: holds config.json and model.safetensors, or several files with model.safetensors.index.json.
        shardings: a tree like the parameters with a `jax.sharding.Sharding` at each leaf; None: the default device.
        dtype: of the parameters; None: as stored.

    Raises WeightsError that lists every missing, extra or wrongly shaped tensor, before any weights are read.
    """
    folder = Path(folder)
    tensors = _tensors(read_architecture(folder))
    files = _check(folder, tensors)
    params: Params = {}
    for tensor in tensors:
        sharding = _get(shardings, tensor.path) if shardings is not None else None
        sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        put(params, tensor.path, _load_one(tensor, files[tensor.name], sharding, dtype))
    return params


def _load_one(tensor: _Tensor, file: Path, sharding: jax.sharding.Sharding, dtype: Any) -> jax.Array:
    parts: dict[Any, np.ndarray] = {}  # so that replicas of a shard are read once

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # jax gives None only for arrays of keys and tokens
        key = tuple((s.start, s.stop) for s in index)  # slices cannot be hashed before Python 3.12
        if key not in parts:
            array = tensor.read(file, index)
            parts[key] = np.ascontiguousarray(array if dtype is None else array.astype(dtype))
        return parts[key]

    return jax.make_array_from_callback(tensor.shape, sharding, part).block_until_ready()


def new_folder(folder: str | Path) -> Path:
    """The absolute path of a folder to export to. Raises WeightsError if it exists and is not an empty folder."""
    if (folder := Path(folder).resolve()).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WeightsError(f"{folder}: exists and is not empty; export to a new folder")
    return folder


def save(
    folder: str | Path,
    params: Params,
    arch: Architecture,
    source: str | Path | None = None,
    eos_ids: Sequence[int] = (),
    files: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = 2 << 30,
) -> None:
    """Write a Hugging Face folder that transformers and vLLM load: config, generation config, tokenizer, safetensors.

    Args:
        source: the Hugging Face folder that training started from; its generation settings are copied.
        eos_ids: the ids that end a turn. If given, they replace those of `source` in config.json and generation_config.json.
        files: further files (the tokenizer's), from name to content.
        max_shard_bytes: the largest size of a weights file; the host holds one file's weights at a time.

    A new folder appears when it is complete; in an empty one that exists (it may be a mount point, which cannot be replaced),
    config.json is written last. With several hosts, all must call this, and the first one writes. Raises WeightsError if the
    folder exists and is not empty.
    """
    folder = new_folder(folder)
    writes = jax.process_index() == 0
    partial = folder if folder.exists() else folder.with_name(folder.name + ".partial")
    if writes and partial != folder:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    tensors = _tensors(arch)
    shards: list[list[_Tensor]] = [[]]
    filled = total = 0
    for tensor in tensors:
        size = _get(params, tensor.path).nbytes
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled, total = filled + size, total + size
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        weight_map |= {tensor.name: name for tensor in shard}
        stored = {tensor.name: tensor.to_stored(_to_host(_get(params, tensor.path))) for tensor in shard}
        if writes:
            write_tensors(partial / name, stored)
    if not writes:
        return
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(partial / "model.safetensors.index.json", index)
    config = to_hf(arch) | {"dtype": str(params["embed"].dtype), "torch_dtype": str(params["embed"].dtype)}
    for name, content in (files or {}).items():
        (partial / name).write_bytes(content)
    _write_configs(partial, config, Path(source) if source is not None else None, eos_ids)
    if partial != folder:
        partial.rename(folder)


def _write_configs(folder: Path, config: dict[str, Any], source: Path | None, eos_ids: Sequence[int]) -> None:
    """Write config.json and generation_config.json."""
    theirs = _read_json_if_any(source / "config.json") if source is not None else {}
    generation = _read_json_if_any(source / "generation_config.json") if source is not None else {}
    inherited = ("bos_token_id", "eos_token_id", "pad_token_id")
    config = {key: theirs[key] for key in inherited if theirs.get(key) is not None} | config
    generation = {key: config[key] for key in inherited if key in config} | generation
    if eos_ids:
        config["eos_token_id"] = generation["eos_token_id"] = list(eos_ids) if len(eos_ids) > 1 else eos_ids[0]
    write_json(folder / "generation_config.json", generation)
    write_json(folder / "config.json", config)


def save_adapters(file: Path, params: Params, arch: Architecture) -> None:
    """Write the adapters of an architecture to a safetensors file under peft's names. One host calls this."""
    tensors = _tensors(arch, adapters(arch))
    stored = {
        f"base_model.model.{tensor.name}": tensor.to_stored(_to_host(_get(params, tensor.path))) for tensor in tensors
    }
    write_tensors(file, stored)


def write_tensors(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a safetensors file that all users can read."""
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors makes files that only their owner can read


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file of a Hugging Face folder."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tensors(arch: Architecture, rows: Iterable[tuple[KeyPath, Parameter]] | None = None) -> list[_Tensor]:
    """The tensors of all parameters, or of `rows`, in the order of the layers."""

    def tensor(path: KeyPath, row: Parameter) -> _Tensor:
        layer = f"model.layers.{path[1]}." if path[0] == "layers" else ""
        return _Tensor(path, f"{layer}{row.hf}.{row.suffix}", row.hf_axes, row.shape(arch))

    return [tensor(path, row) for path, row in rows or parameters(arch)]


def _check(folder: Path, tensors: list[_Tensor]) -> dict[str, Path]:
    """The file of each tensor. Raises WeightsError that lists every missing file and every tensor that is not as expected."""
    index = _read_json_if_any(folder / "model.safetensors.index.json")
    names = sorted(set(index["weight_map"].values())) if "weight_map" in index else ["model.safetensors"]
    files: dict[str, Path] = {}
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    problems = []
    for name in names:
        try:
            with safe_open(folder / name, "np") as stored:
                for key in stored.keys():  # noqa: SIM118  safe_open is no dict
                    part = stored.get_slice(key)
                    files[key], found[key] = folder / name, (tuple(part.get_shape()), part.get_dtype())
        except FileNotFoundError:
            problems.append(f"{name}: the file is missing")
        except SafetensorError as error:
            problems.append(f"{name}: not a complete safetensors file ({error}); download or copy it again")
    if problems:  # tensors are checked only if all files can be read
        raise WeightsError(f"{folder}: " + "\n- ".join(["weights cannot be read:", *problems]))
    expected = {tensor.name: tensor.stored_shape for tensor in tensors}
    for key, shape in expected.items():
        if key not in found:
            problems.append(f"{key} {list(shape)}: missing")
        elif found[key][0] != shape:
            problems.append(f"{key}: shape {list(found[key][0])}, expected {list(shape)}")
        elif found[key][1] not in _FLOATS:
            problems.append(f"{key}: dtype {found[key][1]}, expected one of {', '.join(_FLOATS)}")
    # Old exports hold two tensors that transformers ignores: rope's buffer, and a copy of tied embeddings.
    ignored = re.compile(r".*\.rotary_emb\.inv_freq" + ("" if "lm_head.weight" in expected else r"|lm_head\.weight"))
    problems += [f"{key}: extra" for key in sorted(found) if key not in expected and not ignored.fullmatch(key)]
    if problems:
        lines = "\n".join(f"- {problem}" for problem in problems)
        raise WeightsError(f"{folder}: its tensors are not those of its config.json:\n{lines}")
    return files


def _to_host(array: jax.Array) -> np.ndarray:
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def _get(tree: Any, path: KeyPath) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _read_json_if_any(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise WeightsError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{file}: expected an object, got {content!r:.100}")
    return content
