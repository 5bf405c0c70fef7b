"""The decoder of Qwen2/2.5, Qwen3, Llama 3 and SmolLM2, as functions of its parameters (parameters.py).

This module computes hidden states from tokens, and logits from hidden states. Attention is an argument, so the training pass,
the score pass, the prefill and the decode step use the same code.

For decode steps on a CPU the layers' matrices are transposed, `[*out, *in]` (`parameters.transposed`). A layer recognises that
by the shape of q.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from appo_jax.config import Architecture, Remat, YarnScaling
from appo_jax.policy.attention import Attend
from appo_jax.policy.constraints import ROWS, constrain, platform, widest
from appo_jax.policy.parameters import LAYER, Adapted, Params

Rotations = tuple[jax.Array, jax.Array]  # cosines and sines of the rotary embedding

# Its exp is 0. It is finite: −inf would give NaN in the gradient of an entropy and when it is divided by the temperature.
_PADDING_LOGIT = -1e30

# What a rematerialised layer keeps for its backward pass, in addition to its input.
_KEPT = {"layers": None, "matmuls": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * scale.astype(jnp.float32)).astype(x.dtype)


def rope_frequencies(arch: Architecture) -> np.ndarray:
    """Angular frequency of each rotated pair, `[E/2]` float64, with the architecture's scaling."""
    E = arch.head_dim
    frequencies = arch.rope_theta ** (-np.arange(0, E, 2, dtype=np.float64) / E)
    if (s := arch.rope_scaling) is None:
        return frequencies
    if isinstance(
        s, YarnScaling
    ):  # arXiv 2309.00071, sec. 3.2, with its bounds rounded to whole pairs as in transformers

        def pair(turns: float) -> float:  # the (fractional) pair that makes this many turns in the original context
            return E * math.log(s.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(arch.rope_theta))

        low, high = max(math.floor(pair(s.beta_fast)), 0), min(math.ceil(pair(s.beta_slow)), E - 1)
        slow = np.clip((np.arange(E // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
        return frequencies * (1 - slow + slow / s.factor)
    wavelength = 2 * np.pi / frequencies
    smooth = (s.original_max_position / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return frequencies * (smooth + (1 - smooth) / s.factor)


def rotations(positions: jax.Array, arch: Architecture) -> Rotations:
    """Cosines and sines of the rotary angles at positions `[...]`, float32 `[..., E/2]`; with yarn, multiplied by its attention
    factor."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(rope_frequencies(arch), jnp.float32)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if isinstance(s := arch.rope_scaling, YarnScaling):
        scale = 0.1 * math.log(s.factor) + 1 if s.attention_factor is None else s.attention_factor
        return cos * scale, sin * scale
    return cos, sin


def rotate(x: jax.Array, by: Rotations) -> jax.Array:
    """Rotary embedding in the half-split convention. x `[..., heads, E]`."""
    cos, sin = (y[..., None, :] for y in by)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _columns(w: jax.Array, x: jax.Array, inputs: int = 1) -> jax.Array:
    """A transposed matrix `[*out, *in]` times rows `[..., *in]`, as columns `[out, rows]`."""
    width = math.prod(w.shape[w.ndim - inputs :])
    return jax.lax.dot_general(w.reshape(-1, width), x.reshape(-1, width), (((1,), (1,)), ((), ())))


def _rows(columns: jax.Array, *shape: int) -> jax.Array:
    """Columns `[out, rows]` as rows `[rows, out]`, reshaped to `shape`.

    Without the barrier, the compiler would transpose the operands of the product instead of its result.
    """
    return jax.lax.optimization_barrier(columns).T.reshape(shape)


def _in_dtype(layer: Params, dtype: Any) -> Params:
    """A layer's parameters in the dtype of the matrix products. Norm scales stay in float32, whatever their axes."""
    return {name: w if LAYER[name].kind == "norm" else w.astype(dtype) for name, w in layer.items()}


class Layer(nnx.Module):
    """Pre-norm attention and a SwiGLU MLP, each added to the residual stream. Its parameters are a layer's rows of the table.

    A parameter that only some families have is applied if the layer has it.
    """

    def __init__(self, arch: Architecture, params: Params):
        self.arch = arch
        self.params = nnx.Dict({name: nnx.Param(value) for name, value in params.items()})

    def __call__(
        self, x: jax.Array, rotation: Rotations, attend: Callable[..., Any], wide: bool = False
    ) -> tuple[jax.Array, Any]:
        """The residual stream x `[..., D]` after this layer, and the cache that `attend` returns.

        `wide`: the MLP is split over WIDE, and each part computes for the rows of all devices along fsdp.
        """
        a, p = self.arch, _in_dtype({name: w[...] for name, w in self.params.items()}, x.dtype)
        transposed = (
            p["q"].shape[0] != a.width
        )  # a policy with as many heads as channels is refused, so the first axis shows whether the matrix is transposed

        h = rms_norm(x, p["attn_norm"], a.norm_eps)
        q, k, v = (self._with_adapter(_project(h, p[name], transposed), name, h, p) for name in ("q", "k", "v"))
        if "q_bias" in p:
            q, k, v = q + p["q_bias"], k + p["k_bias"], v + p["v_bias"]
        if "q_norm" in p:
            q, k = rms_norm(q, p["q_norm"], a.norm_eps), rms_norm(k, p["k_norm"], a.norm_eps)
        q, k, v = (constrain(y, ROWS, None, "tensor") for y in (q, k, v))
        out, kept = attend(rotate(q, rotation), rotate(k, rotation), v)
        x = constrain(x + self._with_adapter(_output(out, p["o"], transposed), "o", out, p), ROWS)

        h = rms_norm(x, p["mlp_norm"], a.norm_eps)
        rows, inner = ("data", widest(a.mlp_width)) if wide else (ROWS, "tensor")
        mlp = self._mlp(constrain(h, rows), p, transposed, (rows, None, inner))
        return constrain(x + mlp, ROWS), kept

    def _mlp(self, h: jax.Array, p: Params, transposed: bool, split: tuple[Any, ...]) -> jax.Array:
        """`split`: the mesh axes over which the inner activations `[R, T, F]` are split."""
        if transposed:
            gate, up = (self._with_adapter(_columns(p[name], h), name, h, p, columns=True) for name in ("gate", "up"))
            inner = jax.nn.silu(gate) * up
            return self._with_adapter(_rows(p["down"] @ inner, *h.shape), "down", inner.T, p)
        gate, up = (self._with_adapter(_product(h, p[name]), name, h, p) for name in ("gate", "up"))
        inner = constrain(jax.nn.silu(gate) * up, *split)
        return self._with_adapter(_product(inner, p["down"]), "down", inner, p)

    def _with_adapter(self, y: jax.Array, name: str, x: jax.Array, p: Params, columns: bool = False) -> jax.Array:
        """`y = x·W` of a matrix, plus its adapter's output if the layer has an adapter. `columns`: y is `[out, rows]`."""
        if f"{name}_a" not in p:
            return y
        assert isinstance(self.arch, Adapted)
        lora, a, b = self.arch.lora, p[f"{name}_a"], p[f"{name}_b"]
        rows = x.reshape(*x.shape[: x.ndim - (a.ndim - 1)], -1)
        inner = _product(rows, a.reshape(-1, lora.rank)) * (lora.alpha / lora.rank)
        added = _product(inner, b.reshape(lora.rank, -1))
        return y + (added.reshape(-1, added.shape[-1]).T if columns else added.reshape(y.shape))


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x `[..., in]` times w `[in, out]`: `[..., out]`.

    On a CPU, the axes before the last are joined: with several, the products of the backward pass copy and transpose their
    operands, and the pass takes a quarter longer.
    """
    if platform() != "cpu":
        return x @ w
    return (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], -1)


def _project(h: jax.Array, w: jax.Array, transposed: bool) -> jax.Array:
    if transposed:
        return _rows(_columns(w, h), *h.shape[:-1], *w.shape[:2])
    if platform() == "cpu":
        return _product(h, w.reshape(len(w), -1)).reshape(*h.shape[:-1], *w.shape[1:])
    return jnp.einsum("...d,dhe->...he", h, w)


def _output(out: jax.Array, w: jax.Array, transposed: bool) -> jax.Array:
    lead = out.shape[:-2]
    if transposed:
        return _rows(_columns(w, out, inputs=2), *lead, w.shape[0])
    # Heads and head width are contracted as one axis. With two axes, einsum would choose an order that copies the weights.
    return _product(out.reshape(*lead, -1), w.reshape(-1, w.shape[-1]))


@dataclasses.dataclass(frozen=True)
class LayerPass:
    """How the layers are run."""

    dtype: Any = jnp.float32
    """The dtype of activations and matrix products."""
    remat: Remat = "none"
    """What the backward pass recomputes (see OptimizerConfig)."""
    scan: bool = False
    """Run a loop over the layers' stacked weights and caches, instead of unrolling the layers."""


def hidden_states(
    params: Params, arch: Architecture, tokens: jax.Array, rotation: Rotations, attend: Attend,
    how: LayerPass = LayerPass(), caches: Sequence[Any] | None = None,
) -> tuple[jax.Array, list[Any]]:  # fmt: skip
    """Final hidden states `[..., D]` of tokens `[...]`, and the cache that `attend` returned for each layer.

    `rotation`: `rotations` at the tokens' positions. `caches`: each layer's cache for `attend`; None: no caches.
    """
    dtype, remat, scan = how.dtype, how.remat, how.scan
    wide = caches is not None  # then rollouts are generated, and the parameters are in the generating layout
    vocabulary = widest(arch.vocab_size) if wide else "tensor"
    x = constrain(constrain(params["embed"].astype(dtype), vocabulary)[tokens], ROWS)

    def block(x: jax.Array, of_layer: tuple[Params, Any]) -> tuple[jax.Array, Any]:
        weights, cache = of_layer
        return Layer(arch, weights)(x, rotation, functools.partial(attend, cache), wide)

    if remat != "none":
        block = jax.checkpoint(block, policy=_KEPT[remat])
    weights = [params["layers"][i] for i in range(arch.num_layers)]
    layers = list(zip(weights, caches or [None] * len(weights), strict=True))
    kept: list[Any] = []
    if scan:
        in_dtype = [(_in_dtype(of_layer, dtype), cache) for of_layer, cache in layers]
        x, stacked = jax.lax.scan(block, x, jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *in_dtype))
        kept = [jax.tree.map(operator.itemgetter(i), stacked) for i in range(len(layers))]
    else:
        for of_layer in layers:
            x, keep = block(x, of_layer)
            kept.append(keep)
    return rms_norm(x, params["norm"], arch.norm_eps), kept


def unembedding(params: Params) -> jax.Array:
    """The matrix `[V, D]` that maps hidden states to logits (a transposed view if embeddings are not tied)."""
    return params["unembed"].T if "unembed" in params else params["embed"]


def unembed(
    hidden: jax.Array, weights: jax.Array, arch: Architecture | None = None, columns: bool = False
) -> jax.Array:
    """Float32 logits `[..., V]` of hidden states `[..., D]` and the `unembedding [V, D]`. `columns`: `[W, D]` gives `[V, W]`.

    Embedding rows that no token uses (from `arch.num_tokens` on, and `arch.missing_ids`) get a logit whose probability is 0.
    The sampler, the score pass and the loss all take their logits from this function. Without `arch`, every row has a token.
    """
    equation = "vd,wd->vw" if columns else "...d,vd->...v"
    operands = (weights, hidden) if columns else (hidden, weights)
    if platform() == "cpu" and not columns:  # as in `_product`
        equation, operands = "nd,vd->nv", (hidden.reshape(-1, hidden.shape[-1]), weights)
    logits = jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)
    if not columns:
        logits = logits.reshape(*hidden.shape[:-1], -1)
    if arch is None or (arch.num_tokens in (None, len(weights)) and not arch.missing_ids):
        return logits
    has_token = jnp.arange(len(weights)) < (arch.num_tokens or len(weights))
    if arch.missing_ids:
        has_token &= ~np.isin(np.arange(len(weights)), arch.missing_ids)
    return jnp.where(has_token[:, None] if columns else has_token, logits, _PADDING_LOGIT)
