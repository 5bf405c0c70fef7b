"""The decoder: one Flax NNX module for Qwen2/2.5, Qwen3, Llama 3 and SmolLM2.

The module says how a token stream becomes hidden states. How queries meet keys is an argument, so the same weights and
the same code serve the training pass, the score pass, the prefill and the decode step.

Parameters leave the module once (`init_params`) as a plain nested dict and come back inside jit (`hidden_states`):

    embed [V, D]   norm [D]   unembed [D, V] (absent when embeddings are tied)
    layers.{i}: attn_norm [D], q [D, H, E], k [D, K, E], v [D, K, E], o [H, E, D], mlp_norm [D], gate [D, F], up [D, F],
                down [F, D]; Qwen2: q_bias [H, E], k_bias, v_bias [K, E]; Qwen3: q_norm [E], k_norm [E]

For decode steps on a CPU the layers' matrices come turned, `[*out, *in]` (`turned`); a layer sees it by the shape of q.
"""

from __future__ import annotations

import functools
import math
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
Rotations = tuple[jax.Array, jax.Array]  # cosines and sines of the rotary embedding

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


def rotations(positions: jax.Array, arch: Architecture) -> Rotations:
    """Cosines and sines of the angles by which heads turn at positions `[...]`, float32 `[..., E/2]`."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(rope_frequencies(arch), jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, by: Rotations) -> jax.Array:
    """Rotary embedding in the half-split convention. x `[..., heads, E]`."""
    cos, sin = (y[..., None, :] for y in by)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


# The matrices of a layer, and how many of their axes come in: x [..., *in] times w [*in, *out].
_INPUTS = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}


@jax.jit
def turned(params: Params) -> Params:
    """A copy with the layers' matrices turned, `[*out, *in]`.

    A CPU's product of few rows is up to half again as fast with the weights on the left, read row by row: they are the
    large operand, and the one on the right is copied into the order that the product wants.
    """

    def one(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        inputs = _INPUTS.get(path[-1].key, 0)
        return jnp.moveaxis(x, range(inputs), range(-inputs, 0))

    return jax.tree_util.tree_map_with_path(one, params)


def _columns(w: jax.Array, x: jax.Array, inputs: int = 1) -> jax.Array:
    """A turned matrix `[*out, *in]` times rows `[..., *in]`, as columns `[out, rows]`."""
    width = math.prod(w.shape[w.ndim - inputs :])
    return jax.lax.dot_general(w.reshape(-1, width), x.reshape(-1, width), (((1,), (1,)), ((), ())))


def _rows(columns: jax.Array, *shape: int) -> jax.Array:
    """Columns `[out, rows]` as rows `[rows, out]` of a shape. Without the barrier the compiler would rather turn the product."""
    return jax.lax.optimization_barrier(columns).T.reshape(shape)


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

    def __call__(self, x: jax.Array, rotation: Rotations, attend: Callable) -> tuple[jax.Array, Any]:
        a, dtype = self.arch, x.dtype
        h = rms_norm(x, self.attn_norm[...], a.norm_eps)
        q, k, v = (self._project(h, w[...].astype(dtype)) for w in (self.q, self.k, self.v))
        if a.qkv_bias:
            q, k, v = (
                y + b[...].astype(dtype)
                for y, b in ((q, self.q_bias), (k, self.k_bias), (v, self.v_bias))
            )  # fmt: skip
        if a.qk_norm:
            q, k = rms_norm(q, self.q_norm[...], a.norm_eps), rms_norm(k, self.k_norm[...], a.norm_eps)
        q, k, v = (constrain(y, ROWS, None, "tensor") for y in (q, k, v))
        out, kept = attend(rotate(q, rotation), rotate(k, rotation), v)
        x = constrain(x + self._output(out, self.o[...].astype(dtype)), ROWS)
        h = rms_norm(x, self.mlp_norm[...], a.norm_eps)
        mlp = self._mlp(h, *(w[...].astype(dtype) for w in (self.gate, self.up, self.down)))
        return constrain(x + mlp, ROWS), kept

    @property
    def _turned(self) -> bool:
        return self.q[...].shape[0] != self.arch.width  # no policy has as many heads as channels

    def _project(self, h: jax.Array, w: jax.Array) -> jax.Array:
        if self._turned:
            return _rows(_columns(w, h), *h.shape[:-1], *w.shape[:2])
        return jnp.einsum("...d,dhe->...he", h, w)

    def _output(self, out: jax.Array, w: jax.Array) -> jax.Array:
        lead = out.shape[:-2]
        if self._turned:
            return _rows(_columns(w, out, inputs=2), *lead, self.arch.width)
        # Contracted as one axis: of two, einsum would choose an order for which the weights are copied.
        return out.reshape(*lead, -1) @ w.reshape(-1, self.arch.width)

    def _mlp(self, h: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        if self._turned:
            return _rows(down @ (jax.nn.silu(_columns(gate, h)) * _columns(up, h)), *h.shape)
        inner = constrain(jax.nn.silu(h @ gate) * (h @ up), ROWS, None, "tensor")
        return inner @ down


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
        self, tokens: jax.Array, rotation: Rotations, attend: Attend, dtype: Any, remat: Remat, scan: bool,
        caches: Sequence[Any] | None,
    ) -> tuple[jax.Array, list[Any]]:  # fmt: skip
        x = constrain(constrain(self.embed[...].astype(dtype), "tensor")[tokens], ROWS)
        graphdef, first = nnx.split(self.layers[0])

        def block(x: jax.Array, of_layer: tuple[nnx.State, Any]) -> tuple[jax.Array, Any]:
            weights, cache = of_layer
            return nnx.merge(graphdef, weights)(x, rotation, functools.partial(attend, cache))

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
    params: Params, arch: Architecture, tokens: jax.Array, rotation: Rotations, attend: Attend, dtype: Any = jnp.float32,
    remat: Remat = "none", scan: bool = False, caches: Sequence[Any] | None = None,
) -> tuple[jax.Array, list[Any]]:  # fmt: skip
    """Final hidden states `[..., D]` of tokens `[...]`, and what `attend` kept of every layer.

    `rotation`: `rotations` at the tokens' positions. `remat`: what the backward pass recomputes, as in OptimizerConfig.
    `scan`: the layers are one loop over stacked weights and caches. `caches`: what `attend` is given of every layer (None:
    nothing).
    """
    graphdef, state = _abstract(arch)
    state = jax.tree.map(lambda x: x, state)  # a private copy: the cached one must not see tracers
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)(tokens, rotation, attend, dtype, remat, scan, caches)


def unembedding(params: Params) -> jax.Array:
    """The matrix `[V, D]` (a transposed view when embeddings are not tied) that turns hidden states into logits."""
    return params["unembed"].T if "unembed" in params else params["embed"]


def unembed(hidden: jax.Array, weights: jax.Array) -> jax.Array:
    """Logits of one token per row as columns, float32 `[V, W]`, of hidden states `[W, D]` and the `unembedding [V, D]`."""
    return jnp.einsum("vd,wd->vw", weights, hidden, preferred_element_type=jnp.float32)
