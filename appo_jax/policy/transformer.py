"""The decoder: one Flax NNX module for Qwen2/2.5, Qwen3, Llama 3 and SmolLM2.

The module says how a token stream becomes hidden states. How queries meet keys is an argument, so the same weights and
the same code serve the training pass, the score pass, the prefill and the decode step.

Parameters leave the module once (`init_params`) as a plain nested dict and come back inside jit (`hidden_states`):

    embed [V, D]   norm [D]   unembed [D, V] (absent when embeddings are tied)
    layers.{i}: attn_norm [D], q [D, H, E], k [D, K, E], v [D, K, E], o [H, E, D], mlp_norm [D], gate [D, F], up [D, F],
                down [F, D]; Qwen2: q_bias [H, E], k_bias, v_bias [K, E]; Qwen3: q_norm [E], k_norm [E]
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from appo_jax.config import Architecture, Remat
from appo_jax.policy.attention import Attend
from appo_jax.policy.constraints import ROWS, constrain

Params = dict[str, Any]

# What a rematerialised layer keeps for its backward pass, beside its input.
_KEPT = {"layers": None, "matmuls": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * scale.astype(jnp.float32)).astype(x.dtype)


def rope_frequencies(arch: Architecture) -> np.ndarray:
    """Angular frequency of each rotated pair, `[E/2]` float64, with Llama 3's scaling where the architecture has it."""
    frequencies = arch.rope_theta ** (-np.arange(0, arch.head_dim, 2, dtype=np.float64) / arch.head_dim)
    if (s := arch.rope_scaling) is None:
        return frequencies
    wavelength = 2 * np.pi / frequencies
    smooth = (s.original_max_position / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return frequencies * (smooth + (1 - smooth) / s.factor)


def rotate(x: jax.Array, positions: jax.Array, frequencies: np.ndarray) -> jax.Array:
    """Rotary embedding in the half-split convention. x `[..., heads, E]`, positions `[...]`."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _normal(rngs: nnx.Rngs, *shape: int, scale: float) -> nnx.Param:
    # The barrier keeps the compiler from folding the scale into the draw, which moves last bits.
    return nnx.Param(jax.lax.optimization_barrier(jax.random.normal(rngs.params(), shape)) * scale)


class Layer(nnx.Module):
    """Pre-norm attention and a SwiGLU MLP."""

    def __init__(self, arch: Architecture, rngs: nnx.Rngs):
        a = arch
        self.arch = arch

        def weight(*shape: int, fan_in: int) -> nnx.Param:
            return _normal(rngs, *shape, scale=fan_in**-0.5)

        self.attn_norm = nnx.Param(jnp.ones(a.width))
        self.q = weight(a.width, a.num_heads, a.head_dim, fan_in=a.width)
        self.k = weight(a.width, a.num_kv_heads, a.head_dim, fan_in=a.width)
        self.v = weight(a.width, a.num_kv_heads, a.head_dim, fan_in=a.width)
        # Residual outputs start small, so that depth does not grow the stream (GPT-2's initialisation).
        depth = 2 * a.num_layers
        self.o = weight(a.num_heads, a.head_dim, a.width, fan_in=a.num_heads * a.head_dim * depth)
        if a.qkv_bias:
            self.q_bias = nnx.Param(jnp.zeros((a.num_heads, a.head_dim)))
            self.k_bias = nnx.Param(jnp.zeros((a.num_kv_heads, a.head_dim)))
            self.v_bias = nnx.Param(jnp.zeros((a.num_kv_heads, a.head_dim)))
        if a.qk_norm:
            self.q_norm = nnx.Param(jnp.ones(a.head_dim))
            self.k_norm = nnx.Param(jnp.ones(a.head_dim))
        self.mlp_norm = nnx.Param(jnp.ones(a.width))
        self.gate = weight(a.width, a.mlp_width, fan_in=a.width)
        self.up = weight(a.width, a.mlp_width, fan_in=a.width)
        self.down = weight(a.mlp_width, a.width, fan_in=a.mlp_width * depth)

    def __call__(self, x: jax.Array, positions: jax.Array, attend: Callable) -> tuple[jax.Array, Any]:
        a, dtype = self.arch, x.dtype
        h = rms_norm(x, self.attn_norm[...], a.norm_eps)
        q = jnp.einsum("...d,dhe->...he", h, self.q[...].astype(dtype))
        k = jnp.einsum("...d,dke->...ke", h, self.k[...].astype(dtype))
        v = jnp.einsum("...d,dke->...ke", h, self.v[...].astype(dtype))
        if a.qkv_bias:
            q, k, v = (
                y + b[...].astype(dtype)
                for y, b in ((q, self.q_bias), (k, self.k_bias), (v, self.v_bias))
            )  # fmt: skip
        if a.qk_norm:
            q, k = rms_norm(q, self.q_norm[...], a.norm_eps), rms_norm(k, self.k_norm[...], a.norm_eps)
        q, k, v = (constrain(y, ROWS, None, "tensor") for y in (q, k, v))
        frequencies = rope_frequencies(a)
        out, kept = attend(rotate(q, positions, frequencies), rotate(k, positions, frequencies), v)
        x = constrain(x + jnp.einsum("...he,hed->...d", out, self.o[...].astype(dtype)), ROWS)
        h = rms_norm(x, self.mlp_norm[...], a.norm_eps)
        h = jax.nn.silu(h @ self.gate[...].astype(dtype)) * (h @ self.up[...].astype(dtype))
        h = constrain(h, ROWS, None, "tensor")
        return constrain(x + h @ self.down[...].astype(dtype), ROWS), kept


class Decoder(nnx.Module):
    """Token embedding, the layers, the final norm and the (tied or own) unembedding."""

    def __init__(self, arch: Architecture, rngs: nnx.Rngs):
        self.arch = arch
        self.embed = _normal(rngs, arch.vocab_size, arch.width, scale=arch.width**-0.5)
        self.layers = nnx.List([Layer(arch, rngs) for _ in range(arch.num_layers)])
        self.norm = nnx.Param(jnp.ones(arch.width))
        if not arch.tie_embeddings:
            self.unembed = _normal(rngs, arch.width, arch.vocab_size, scale=arch.width**-0.5)

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, attend: Attend, dtype: Any, remat: Remat, scan: bool,
        caches: Sequence[Any] | None,
    ) -> tuple[jax.Array, list[Any]]:  # fmt: skip
        x = constrain(constrain(self.embed[...].astype(dtype), "tensor")[tokens], ROWS)
        graphdef, first = nnx.split(self.layers[0])

        def block(x: jax.Array, of_layer: tuple[nnx.State, Any]) -> tuple[jax.Array, Any]:
            weights, cache = of_layer
            return nnx.merge(graphdef, weights)(x, positions, functools.partial(attend, cache))

        if remat != "none":
            block = jax.checkpoint(block, policy=_KEPT[remat])
        weights = [first, *(nnx.state(layer) for layer in self.layers[1:])]
        layers = list(zip(weights, caches or [None] * len(weights), strict=True))
        kept: list[Any] = []
        if scan:

            def stack(*of_layers: jax.Array) -> jax.Array:  # scales of norms, which are vectors, keep their float32
                return jnp.stack([x.astype(dtype) if x.ndim > 1 else x for x in of_layers])

            x, stacked = jax.lax.scan(block, x, jax.tree.map(stack, *layers))
            kept = [jax.tree.map(operator.itemgetter(i), stacked) for i in range(len(layers))]
        else:
            for layer in layers:
                x, keep = block(x, layer)
                kept.append(keep)
        return rms_norm(x, self.norm[...], self.arch.norm_eps), kept


def init_params(arch: Architecture, seed: int, shardings: Any = None) -> Params:
    """Random float32 parameters. `shardings`, a tree like them: each device draws what it shall hold, no other does."""

    def draw() -> Params:
        return nnx.to_pure_dict(nnx.split(Decoder(arch, nnx.Rngs(params=seed)))[1])

    return draw() if shardings is None else jax.jit(draw, out_shardings=shardings)()


def abstract_params(arch: Architecture) -> Params:
    """Shapes and dtypes of `init_params`, without allocating."""
    return nnx.to_pure_dict(_abstract(arch)[1])


@functools.cache
def _abstract(arch: Architecture) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Decoder(arch, nnx.Rngs(params=0))))


def hidden_states(
    params: Params, arch: Architecture, tokens: jax.Array, positions: jax.Array, attend: Attend, dtype: Any = jnp.float32,
    remat: Remat = "none", scan: bool = False, caches: Sequence[Any] | None = None,
) -> tuple[jax.Array, list[Any]]:  # fmt: skip
    """Final hidden states `[..., D]` of tokens `[...]`, and what `attend` kept of every layer.

    `remat`: what the backward pass recomputes, as in OptimizerConfig. `scan`: the layers are one loop over stacked weights
    and caches. `caches`: what `attend` is given of every layer (None: nothing).
    """
    graphdef, state = _abstract(arch)
    state = jax.tree.map(lambda x: x, state)  # a private copy: the cached one must not see tracers
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)(tokens, positions, attend, dtype, remat, scan, caches)


def unembedding(params: Params) -> jax.Array:
    """The matrix `[V, D]` (a transposed view when embeddings are not tied) that turns hidden states into logits."""
    return params["unembed"].T if "unembed" in params else params["embed"]
