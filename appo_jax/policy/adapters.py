"""LoRA (arXiv 2106.09685): a policy of frozen base weights and trained adapters.

Adapters are rows of the table in parameters.py. Their tree has the form of the parameters' tree: `{"layers": {0: {"q_a": …,
"q_b": …}, 1: …}}`. `with_adapters` joins both into one tree, and transformer.py applies the adapters that a layer has.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from appo_jax.config import Architecture
from appo_jax.policy import weights
from appo_jax.policy.parameters import LAYER, Adapted, KeyPath, Parameter, Params, adapters, build, row_of


def with_adapters(base: Params | None, trained: Params) -> Params:
    """The policy's parameters: the frozen weights `base` joined with the trained adapters. `base` None: `trained` itself."""
    if base is None:
        return trained
    layer_adapters = trained.get("layers", {})
    return base | {"layers": {i: layer | layer_adapters.get(i, {}) for i, layer in base["layers"].items()}}


def abstract_adapters(arch: Architecture) -> Params:
    """Shapes and dtypes of `init_adapters`; empty for an architecture without adapters."""
    return build(adapters(arch), lambda _, row: jax.ShapeDtypeStruct(row.shape(arch), jnp.float32))


def init_adapters(arch: Architecture, seed: int, shardings: Any = None) -> Params:
    """Float32 adapters that add 0: A is normal with variance 1 / fan-in, B is 0. `shardings`: a tree of the same form."""

    def draw() -> Params:
        key = jax.random.fold_in(jax.random.key(seed), 0x10FA)  # `init_params` uses no key of this number
        keys = iter(jax.random.split(key, len(list(adapters(arch)))))

        def init(path: KeyPath, row: Parameter) -> jax.Array:
            shape, adapter_key = row.shape(arch), next(keys)
            if str(path[-1]).endswith("_b"):
                return jnp.zeros(shape, jnp.float32)
            return jax.random.normal(adapter_key, shape) * math.prod(shape[:-1]) ** -0.5

        return build(adapters(arch), init)

    return draw() if shardings is None else jax.jit(draw, out_shardings=shardings)()


def frozen(params: Params, arch: Architecture) -> Params:
    """The frozen base weights of a policy with adapters: in `lora.base_dtype`, norm scales in their own dtype."""
    assert isinstance(arch, Adapted)
    dtype = jnp.dtype(arch.lora.base_dtype)

    def cast(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        return x if row_of(path).kind == "norm" else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def merged(base: Params, trained: Params, arch: Architecture) -> Params:
    """Float32 parameters of the same policy without adapters: W + alpha/rank · A·B."""
    assert isinstance(arch, Adapted)
    scale = arch.lora.alpha / arch.lora.rank

    params = jax.tree.map(lambda x: x.astype(jnp.float32), base)  # tree.map makes new dicts, which may be changed
    for i, layer in trained["layers"].items():
        for name in arch.lora.targets:
            params["layers"][i][name] += scale * jnp.tensordot(layer[f"{name}_a"], layer[f"{name}_b"], 1)
    return params


def save_adapters(folder: Path, trained: Params, arch: Architecture, base: str | None) -> None:
    """Write adapters to a new folder that peft can load.

    `base`: the Hugging Face folder of the base weights, which adapter_config.json names; None: whoever loads the adapters
    must name it. Raises WeightsError if the folder exists and is not empty.
    """
    assert isinstance(arch, Adapted)
    folder = weights.new_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights.save_adapters(folder / "adapter_model.safetensors", trained, arch)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": arch.lora.rank,
        "lora_alpha": arch.lora.alpha, "lora_dropout": 0.0, "bias": "none",
        "target_modules": [LAYER[name].hf.split(".")[-1] for name in arch.lora.targets],
    }  # fmt: skip
    weights.write_json(folder / "adapter_config.json", config)
