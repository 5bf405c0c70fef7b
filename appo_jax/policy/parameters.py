"""The parameters of every model family, in one table.

The parameters are a nested dict, `{"embed": …, "layers": {0: {"q": …, …}, 1: …}, "norm": …}`. A row of the table below says
everything that the rest of the program knows of a parameter: the shardings (sharding.py), Hugging Face files (weights.py),
GGUF files (convert.py), the cold start's Muon (learner/optimizer.py), `init_params` and `turned` derive from it. How the
parameters are used is in transformer.py.

LoRA's adapters are rows of it, too: two for each matrix that may have one. A layer that has them applies them.

To add a model family: an entry in FAMILIES, rows for the parameters that only it has, and its mathematics in
transformer.py, where a layer applies a parameter if it has it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from appo_jax.config import Adaptable, Architecture, LoRAConfig
from appo_jax.errors import ConfigError

Params = dict[Any, Any]
KeyPath = tuple[str | int, ...]  # the keys that lead to a parameter: ("embed",), ("layers", 3, "q")


@dataclasses.dataclass(frozen=True)
class Family:
    """A Hugging Face model class that we know."""

    hf: str
    """Its name in `architectures` of config.json."""
    config: dict[str, Any]
    """Fields of config.json that its class reads and that would change what it computes: the one value we support."""
    head_dim: int | None = None
    """Head width where config.json gives none; None: hidden_size / num_attention_heads."""


FAMILIES = {
    "llama": Family("LlamaForCausalLM", {"attention_bias": False, "mlp_bias": False}),  # Llama 3, SmolLM2
    "qwen2": Family("Qwen2ForCausalLM", {"use_sliding_window": False}),  # Qwen2, Qwen2.5
    "qwen3": Family("Qwen3ForCausalLM", {"attention_bias": False, "use_sliding_window": False}, head_dim=128),
}


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A row of the table."""

    axes: str
    """One letter of types.py for each axis of the array; F is the MLP's inner width, r an adapter's rank."""
    kind: Literal["embedding", "matrix", "bias", "norm", "adapter"]
    """Matrices and embeddings start as random numbers, biases at 0, norm scales at 1. Norm scales are always float32."""
    hf: str
    """Its module in Hugging Face files, those of a layer after `model.layers.{i}.`."""
    gguf: str
    """Its name in GGUF files, those of a layer after `blk.{i}.`."""
    inputs: int = 0
    """Of a matrix: how many leading axes its input has. x `[..., *in]` times w `[*in, *out]`."""
    residual: bool = False
    """A matrix whose output is added to the residual stream."""
    families: tuple[str, ...] = tuple(FAMILIES)
    """The families that have it."""

    def shape(self, arch: Architecture) -> tuple[int, ...]:
        a = arch
        sizes = {
            "V": a.vocab_size,
            "D": a.width,
            "H": a.num_heads,
            "K": a.num_kv_heads,
            "E": a.head_dim,
            "F": a.mlp_width,
        }
        if isinstance(arch, Adapted):
            sizes["r"] = arch.lora.rank
        return tuple(sizes[letter] for letter in self.axes)

    @property
    def suffix(self) -> str:
        """How its name ends in files of either kind."""
        return "bias" if self.kind == "bias" else "weight"

    @property
    def hf_axes(self) -> tuple[tuple[int, ...], ...]:
        """For each axis of the stored tensor, the axes of ours that it merges.

        Hugging Face stores matrices `[out, in]`, with heads and head width as one axis: `q [D, H, E]` is stored as
        `[H·E, D]`, so its axes are ((1, 2), (0,)). Rope is half-split on both sides: nothing is permuted.
        """
        groups: list[tuple[int, ...]] = []
        for axis in (*range(self.inputs, len(self.axes)), *range(self.inputs)):
            if self.axes[axis] == "E" and groups and groups[-1] == (axis - 1,):
                groups[-1] = (axis - 1, axis)
            else:
                groups.append((axis,))
        return tuple(groups)


_QWEN2, _QWEN3 = ("qwen2",), ("qwen3",)
LAYER = {
    "attn_norm": Parameter("D", "norm", "input_layernorm", "attn_norm"),
    "q": Parameter("DHE", "matrix", "self_attn.q_proj", "attn_q", inputs=1),
    "k": Parameter("DKE", "matrix", "self_attn.k_proj", "attn_k", inputs=1),
    "v": Parameter("DKE", "matrix", "self_attn.v_proj", "attn_v", inputs=1),
    "o": Parameter("HED", "matrix", "self_attn.o_proj", "attn_output", inputs=2, residual=True),
    "q_bias": Parameter("HE", "bias", "self_attn.q_proj", "attn_q", families=_QWEN2),
    "k_bias": Parameter("KE", "bias", "self_attn.k_proj", "attn_k", families=_QWEN2),
    "v_bias": Parameter("KE", "bias", "self_attn.v_proj", "attn_v", families=_QWEN2),
    "q_norm": Parameter("E", "norm", "self_attn.q_norm", "attn_q_norm", families=_QWEN3),
    "k_norm": Parameter("E", "norm", "self_attn.k_norm", "attn_k_norm", families=_QWEN3),
    "mlp_norm": Parameter("D", "norm", "post_attention_layernorm", "ffn_norm"),
    "gate": Parameter("DF", "matrix", "mlp.gate_proj", "ffn_gate", inputs=1),
    "up": Parameter("DF", "matrix", "mlp.up_proj", "ffn_up", inputs=1),
    "down": Parameter("FD", "matrix", "mlp.down_proj", "ffn_down", inputs=1, residual=True),
}
TOP = {
    "embed": Parameter("VD", "embedding", "model.embed_tokens", "token_embd"),
    "norm": Parameter("D", "norm", "model.norm", "output_norm"),
    "unembed": Parameter("DV", "embedding", "lm_head", "output", inputs=1),  # unless embeddings are tied
}


def _adapter(row: Parameter) -> tuple[Parameter, Parameter]:
    """A and B of a matrix."""
    into, out = row.axes[: row.inputs], row.axes[row.inputs :]
    return (
        Parameter(f"{into}r", "adapter", f"{row.hf}.lora_A", "", row.inputs, families=()),
        Parameter(f"r{out}", "adapter", f"{row.hf}.lora_B", "", 1, families=()),
    )


for _name in get_args(Adaptable):
    LAYER[f"{_name}_a"], LAYER[f"{_name}_b"] = _adapter(LAYER[_name])


@dataclasses.dataclass(frozen=True)
class Adapted(Architecture):
    """An architecture whose layers may have adapters."""

    lora: LoRAConfig = dataclasses.field(default_factory=LoRAConfig)


def adapted(arch: Architecture, lora: LoRAConfig | None) -> Architecture:
    """The architecture with adapters, where `lora` says which."""
    if lora is None:
        return arch
    return Adapted(**{field.name: getattr(arch, field.name) for field in dataclasses.fields(Architecture)}, lora=lora)


def check_family(arch: Architecture) -> None:
    """Raises ConfigError for an architecture of a family that is not in FAMILIES."""
    if arch.family not in FAMILIES:
        raise ConfigError(f"policy.architecture.family = {arch.family!r}: expected one of {', '.join(FAMILIES)}")


def parameters(arch: Architecture) -> Iterator[tuple[KeyPath, Parameter]]:
    """Every parameter but the adapters' with its row, from the embedding to the unembedding. Raises ConfigError."""
    check_family(arch)
    yield ("embed",), TOP["embed"]
    for i in range(arch.num_layers):
        for name, row in LAYER.items():
            if arch.family in row.families:
                yield ("layers", i, name), row
    yield ("norm",), TOP["norm"]
    if not arch.tie_embeddings:
        yield ("unembed",), TOP["unembed"]


def adapters(arch: Architecture) -> Iterator[tuple[KeyPath, Parameter]]:
    """Both parameters of every adapter with their rows, layer by layer."""
    if isinstance(arch, Adapted):
        for i in range(arch.num_layers):
            for name in arch.lora.targets:
                for part in "ab":
                    yield ("layers", i, f"{name}_{part}"), LAYER[f"{name}_{part}"]


def row_of(path: tuple[Any, ...]) -> Parameter:
    """The row of the parameter at a path of keys, ours or jax's (`jax.tree_util.DictKey`)."""
    keys = [getattr(key, "key", key) for key in path]
    return (LAYER if "layers" in keys else TOP)[keys[-1]]


def build(rows: Iterable[tuple[KeyPath, Parameter]], make: Callable[[KeyPath, Parameter], Any]) -> Params:
    """A tree with `make(path, row)` at the place of every one of `rows`."""
    tree: Params = {}
    for path, row in rows:
        put(tree, path, make(path, row))
    return tree


def put(tree: Params, path: KeyPath, value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def abstract_params(arch: Architecture) -> Params:
    """Shapes and dtypes of `init_params`, without allocating."""
    return build(parameters(arch), lambda _, row: jax.ShapeDtypeStruct(row.shape(arch), jnp.float32))


def init_params(arch: Architecture, seed: int, shardings: Any = None) -> Params:
    """Random float32 parameters. `shardings`, a tree like them: each device draws what it shall hold, no other does.

    A random parameter is normal with variance 1 / fan-in. Matrices that write to the residual stream start smaller by the
    square root of twice the number of layers, so that depth does not grow the stream (GPT-2's initialisation).
    """

    def draw() -> Params:
        count = 0

        def one(_: KeyPath, row: Parameter) -> jax.Array:
            nonlocal count
            shape = row.shape(arch)
            if row.kind in ("norm", "bias"):
                return jnp.full(shape, 1.0 if row.kind == "norm" else 0.0, jnp.float32)
            fan_in = math.prod(shape[: row.inputs]) if row.inputs else arch.width
            scale = (fan_in * (2 * arch.num_layers if row.residual else 1)) ** -0.5
            key = jax.random.fold_in(jax.random.key(seed), count)
            count += 1
            # The barrier keeps the compiler from folding the scale into the draw, which moves last bits.
            return jax.lax.optimization_barrier(jax.random.normal(key, shape)) * scale

        return build(parameters(arch), one)

    return draw() if shardings is None else jax.jit(draw, out_shardings=shardings)()


@jax.jit
def turned(params: Params) -> Params:
    """A copy with the layers' matrices turned, `[*out, *in]`.

    A CPU's product of few rows is up to half again as fast with the weights on the left, read row by row: they are the
    large operand, and the one on the right is copied into the order that the product wants.
    """

    def one(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        inputs = row_of(path).inputs if row_of(path).kind == "matrix" else 0
        return jnp.moveaxis(x, range(inputs), range(-inputs, 0))

    return jax.tree_util.tree_map_with_path(one, params)
