"""LoRA (arXiv 2106.09685): the trained adapters of a policy, beside weights that stay as they are.

Adapters are rows of the table in parameters.py, and a tree of them is like one of parameters: `{"layers": {0: {"q_a": …,
"q_b": …}, 1: …}}`. A policy with adapters is one tree of both, `with_adapters`; transformer.py applies what a layer has.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from appo_jax.config import Architecture
from appo_jax.errors import WeightsError
from appo_jax.policy import weights
from appo_jax.policy.parameters import LAYER, Adapted, KeyPath, Parameter, Params, adapters, build, row_of


def with_adapters(base: Params | None, trained: Params) -> Params:
    """The policy of weights that stay as they are and trained adapters; of no such weights, `trained` itself."""
    if base is None:
        return trained
    own = trained.get("layers", {})
    return base | {"layers": {i: layer | own.get(i, {}) for i, layer in base["layers"].items()}}


def abstract_adapters(arch: Architecture) -> Params:
    """Shapes and dtypes of `init_adapters`; empty for an architecture without adapters."""
    return build(adapters(arch), lambda _, row: jax.ShapeDtypeStruct(row.shape(arch), jnp.float32))


def init_adapters(arch: Architecture, seed: int, shardings: Any = None) -> Params:
    """Float32 adapters that add nothing: A is normal with variance 1 / fan-in, B is 0. `shardings`: a tree like them."""

    def draw() -> Params:
        key = jax.random.fold_in(jax.random.key(seed), 0x10FA)  # of no parameter in `init_params`
        keys = iter(jax.random.split(key, len(list(adapters(arch)))))

        def one(path: KeyPath, row: Parameter) -> jax.Array:
            shape, own = row.shape(arch), next(keys)
            if str(path[-1]).endswith("_b"):
                return jnp.zeros(shape, jnp.float32)
            return jax.random.normal(own, shape) * math.prod(shape[:-1]) ** -0.5

        return build(adapters(arch), one)

    return draw() if shardings is None else jax.jit(draw, out_shardings=shardings)()


def frozen(params: Params, arch: Architecture) -> Params:
    """The weights as they are held beside adapters: in `lora.base_dtype`, scales of norms in float32."""
    assert isinstance(arch, Adapted)
    dtype = jnp.dtype(arch.lora.base_dtype)

    def one(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        return x if row_of(path).kind == "norm" else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(one, params)


def merged(base: Params, trained: Params, arch: Architecture) -> Params:
    """Float32 parameters of a policy without adapters that computes the same: W + alpha/rank · A·B."""
    assert isinstance(arch, Adapted)
    scale = arch.lora.alpha / arch.lora.rank

    params = jax.tree.map(lambda x: x.astype(jnp.float32), base)  # its dicts are new
    for i, own in trained["layers"].items():
        for name in arch.lora.targets:
            params["layers"][i][name] += scale * jnp.tensordot(own[f"{name}_a"], own[f"{name}_b"], 1)
    return params


def save_adapters(folder: Path, trained: Params, arch: Architecture, base: str | None) -> None:
    """Write adapters as a new folder that peft loads beside the Hugging Face folder `base` (None: said by who loads it).

    Raises WeightsError if the folder exists and is not empty.
    """
    assert isinstance(arch, Adapted)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WeightsError(f"{folder}: exists and is not empty; export to a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    weights.save_adapters(folder / "adapter_model.safetensors", trained, arch)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": arch.lora.rank,
        "lora_alpha": arch.lora.alpha, "lora_dropout": 0.0, "bias": "none",
        "target_modules": [LAYER[name].hf.split(".")[-1] for name in arch.lora.targets],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
