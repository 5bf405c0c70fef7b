"""The parameters of every model family, in one table.

The parameters are a nested dict, `{"embed": …, "layers": {0: {"q": …, …}, 1: …}, "norm": …}`. A row of the table below holds
all facts about a parameter. Sharding (sharding.py), Hugging Face files (weights.py), GGUF files (convert.py), the cold start's
Muon (learner/optimizer.py), `init_params` and `transposed` read this table. transformer.py uses the parameters.

LoRA's adapters are rows of the table, too: two for each matrix that may have an adapter.

To add a model family: an entry in FAMILIES, rows for the parameters that only this family has, `families` of the rows that it
lacks, and its mathematics in transformer.py. There a layer applies a parameter if the layer has it.
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
    """A Hugging Face model class that is supported."""

    hf: str
    """Its name in `architectures` of config.json."""
    config: dict[str, Any]
    """Fields of config.json that would change what the model computes, each with the only supported value."""
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Values that transformers' config class gives fields that config.json lacks, where `from_hf` would take another one."""


# By `model_type` of config.json, which exports write.
FAMILIES = {
    # Llama 3, SmolLM2
    "llama": Family("LlamaForCausalLM", {"attention_bias": False, "mlp_bias": False}),
    # Qwen2, Qwen2.5: with biases on queries, keys and values
    "qwen2": Family("Qwen2ForCausalLM", {"use_sliding_window": False}, {"num_key_value_heads": 32}),
    # Qwen3: with a norm on queries and keys
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {"attention_bias": False, "use_sliding_window": False},
        {"head_dim": 128, "num_key_value_heads": 32},
    ),
}


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A row of the table."""

    axes: str
    """One letter of types.py for each axis of the array; F is the MLP's inner width, r an adapter's rank."""
    kind: Literal["embedding", "matrix", "bias", "norm", "adapter"]
    """Matrices and embeddings start as random numbers, biases at 0, norm scales at 1. Norm scales are always float32."""
    hf: str
    """Its module in Hugging Face files; a layer's name follows `model.layers.{i}.`."""
    gguf: str = ""
    """Its name in GGUF files, for the parameters of llama; a layer's name follows `blk.{i}.`. Only SmolLM2's conversion reads such
    files, so parameters of other families have none."""
    inputs: int = 0
    """For a matrix: the number of its leading axes that are input axes. x `[..., *in]` times w `[*in, *out]`."""
    residual: bool = False
    """A matrix whose output is added to the residual stream."""
    families: tuple[str, ...] = tuple(FAMILIES)
    """The families that have it; by default every one, a new family included."""

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
        """The end of its name in Hugging Face and GGUF files."""
        return "bias" if self.kind == "bias" else "weight"

    @property
    def hf_axes(self) -> tuple[tuple[int, ...], ...]:
        """For each axis of the tensor in Hugging Face files, the axes of our array that it merges.

        Hugging Face stores matrices `[out, in]`, with heads and head width as one axis: `q [D, H, E]` is stored as
        `[H·E, D]`, so its axes are ((1, 2), (0,)). Both sides use half-split rope, so nothing is permuted.
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
    "q_bias": Parameter("HE", "bias", "self_attn.q_proj", families=_QWEN2),
    "k_bias": Parameter("KE", "bias", "self_attn.k_proj", families=_QWEN2),
    "v_bias": Parameter("KE", "bias", "self_attn.v_proj", families=_QWEN2),
    "q_norm": Parameter("E", "norm", "self_attn.q_norm", families=_QWEN3),
    "k_norm": Parameter("E", "norm", "self_attn.k_norm", families=_QWEN3),
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
    """The rows of a matrix's adapter: A and B."""
    into, out = row.axes[: row.inputs], row.axes[row.inputs :]
    return (
        Parameter(f"{into}r", "adapter", f"{row.hf}.lora_A", inputs=row.inputs, families=()),
        Parameter(f"r{out}", "adapter", f"{row.hf}.lora_B", inputs=1, families=()),
    )


for _name in get_args(Adaptable):
    LAYER[f"{_name}_a"], LAYER[f"{_name}_b"] = _adapter(LAYER[_name])


@dataclasses.dataclass(frozen=True)
class Adapted(Architecture):
    """An architecture whose layers have adapters on the matrices in `lora.targets`."""

    lora: LoRAConfig = dataclasses.field(default_factory=LoRAConfig)


def adapted(arch: Architecture, lora: LoRAConfig | None) -> Architecture:
    """The architecture with the adapters of `lora`; None: without adapters."""
    if lora is None:
        return arch
    return Adapted(**{field.name: getattr(arch, field.name) for field in dataclasses.fields(Architecture)}, lora=lora)


def check_family(arch: Architecture) -> None:
    """Raises ConfigError if the architecture's family is not in FAMILIES."""
    if arch.family not in FAMILIES:
        raise ConfigError(f"policy.architecture.family = {arch.family!r}: expected one of {', '.join(FAMILIES)}")


def parameters(arch: Architecture) -> Iterator[tuple[KeyPath, Parameter]]:
    """Every parameter and its row, from the embedding to the unembedding, without adapters. Raises ConfigError as check_family."""
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
    """A and B of every adapter and their rows, layer by layer."""
    if isinstance(arch, Adapted):
        for i in range(arch.num_layers):
            for name in arch.lora.targets:
                for part in "ab":
                    yield ("layers", i, f"{name}_{part}"), LAYER[f"{name}_{part}"]


def row_of(path: tuple[Any, ...]) -> Parameter:
    """The row of the parameter at a path of keys: a KeyPath, or one of jax's (`jax.tree_util.DictKey`)."""
    keys = [getattr(key, "key", key) for key in path]
    return (LAYER if "layers" in keys else TOP)[keys[-1]]


def build(rows: Iterable[tuple[KeyPath, Parameter]], make: Callable[[KeyPath, Parameter], Any]) -> Params:
    """A tree with `make(path, row)` at the path of each of `rows`."""
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
    """Random float32 parameters. `shardings`: a tree of the same form; each device then draws only the part that it holds.

    A random parameter is normal with variance 1 / fan-in. Matrices whose output is added to the residual stream are divided by
    the square root of twice the number of layers, so that the stream does not grow with depth (GPT-2's initialisation).
    """

    def draw() -> Params:
        count = 0

        def init(_: KeyPath, row: Parameter) -> jax.Array:
            nonlocal count
            shape = row.shape(arch)
            if row.kind in ("norm", "bias"):
                return jnp.full(shape, 1.0 if row.kind == "norm" else 0.0, jnp.float32)
            fan_in = math.prod(shape[: row.inputs]) if row.inputs else arch.width
            scale = (fan_in * (2 * arch.num_layers if row.residual else 1)) ** -0.5
            key = jax.random.fold_in(jax.random.key(seed), count)
            count += 1
            # Without the barrier the compiler would fold the scale into the draw, which changes last bits.
            return jax.lax.optimization_barrier(jax.random.normal(key, shape)) * scale

        return build(parameters(arch), init)

    return draw() if shardings is None else jax.jit(draw, out_shardings=shardings)()


@jax.jit
def transposed(params: Params) -> Params:
    """A copy with the layers' matrices transposed, `[*out, *in]`.

    On a CPU, a product of few rows with the weights is up to 1.5 times as fast if the weights are the left operand, because XLA
    copies the right operand into another order, and the weights are the large one.
    """

    def transpose(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        inputs = row_of(path).inputs if row_of(path).kind == "matrix" else 0
        return jnp.moveaxis(x, range(inputs), range(-inputs, 0))

    return jax.tree_util.tree_map_with_path(transpose, params)
