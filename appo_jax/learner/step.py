"""One optimizer step: sum gradients over micro-batches, then update. RL (eq. 8) and the cold start (SFT) both use it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from appo_jax.config import Architecture, Config, LossConfig, Remat
from appo_jax.errors import TrainingError
from appo_jax.learner.loss import Terms, policy_loss
from appo_jax.policy import attention
from appo_jax.policy.adapters import with_adapters
from appo_jax.policy.logprobs import token_log_probs
from appo_jax.policy.parameters import Params
from appo_jax.policy.score import Rows, whole_rows
from appo_jax.policy.sharding import place, state_shardings
from appo_jax.policy.transformer import unembedding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """A mini-batch of rollouts or demonstrations in packed rows, cut into n micro-batches of R rows."""

    rows: Rows  # [n, R, T]
    terms: Terms
    """The terms of each slot's target, `[n, C, R, T]`. For rollouts C = 2: rollouts that share a token are joined into one term
    for advantages ≥ 0 and one for advantages < 0."""
    used: Any
    """int32: how many of the n micro-batches hold tokens. It is an argument of the program, so mini-batches of any length use
    one program."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state that a step updates and a checkpoint stores."""

    params: Params  # what is trained: all parameters of the policy, or its adapters
    opt_state: optax.OptState


def init_state(params: Params, optimizer: optax.GradientTransformation, arch: Architecture, mesh: Mesh) -> TrainState:
    """The state before the first step, in the training layout."""
    state = jax.eval_shape(lambda params: TrainState(params, optimizer.init(params)), params)
    shardings = state_shardings(state, arch, mesh)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state if mesh.size > 1 else None)(params)
    return TrainState(place(params, shardings.params, mesh), opt_state)


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """The static arguments of the step program."""

    arch: Architecture
    loss: LossConfig | None  # None: negative log-likelihood of the demonstrations
    temperature: float
    dtype: Any
    remat: Remat = "none"

    @classmethod
    def of_update(cls, config: Config, loss: LossConfig, arch: Architecture, dtype: Any) -> StepSpec:
        """Of an update of RL. `loss`: that of the config's algorithm."""
        return cls(arch, loss, config.rollout.temperature, dtype, config.optimizer.remat)

    @classmethod
    def of_cold_start(cls, config: Config, arch: Architecture, dtype: Any) -> StepSpec:
        """Of an update of the cold start."""
        return cls(arch, None, 1.0, dtype, config.optimizer.remat)


def rows_loss(params: Params, rows: Rows, terms: Terms, spec: StepSpec) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss of a micro-batch (rows `[R, T]`, terms `[C, R, T]`) and its metric sums."""
    attend = attention.packed(rows.ends, keep=False)
    hidden, _ = whole_rows(params, spec.arch, rows.tokens, rows.positions, attend, spec.dtype, spec.remat)
    log_probs, entropies = token_log_probs(hidden, unembedding(params), rows.targets, spec.temperature, spec.arch)
    counts = (terms.weights > 0).astype(log_probs.dtype) if terms.counts is None else terms.counts
    if spec.loss is None:
        loss, metrics = -(terms.weights * log_probs).sum(), {"tokens": counts.sum()}
    else:
        loss, metrics = policy_loss(log_probs, entropies, terms, spec.loss)
    metrics["entropy"] = jax.lax.stop_gradient((counts * entropies).sum())
    return loss, metrics


def gradients(
    params: Params, batch: TrainBatch, spec: StepSpec, base: Params | None = None
) -> tuple[jax.Array, Params, dict[str, jax.Array]]:
    """Loss, gradient of `params` and metric sums of the whole batch, micro-batch by micro-batch.

    `base`: the policy's frozen weights if `params` are adapters. All normalisation is in the weights of tokens, so the sums
    over micro-batches are the loss and the gradient of the whole batch.
    """

    def loss_of(params: Params, rows: Rows, terms: Terms) -> tuple[jax.Array, dict[str, jax.Array]]:
        return rows_loss(with_adapters(base, params), rows, terms, spec)

    grad_fn = jax.value_and_grad(loss_of, has_aux=True)

    def of_micro_batch(i: jax.Array | int) -> Any:
        return grad_fn(params, *jax.tree.map(lambda x: x[i], (batch.rows, batch.terms)))

    if len(batch.rows.tokens) == 1:
        (loss, metrics), grads = of_micro_batch(0)
        return loss, grads, metrics
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_micro_batch, 0))
    (loss, metrics), grads = jax.lax.fori_loop(
        0, batch.used, lambda i, total: jax.tree.map(jnp.add, total, of_micro_batch(i)), zeros
    )
    return loss, grads, metrics


def make_train_step(
    optimizer: optax.GradientTransformation, spec: StepSpec
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted step: (state, batch, and the frozen weights if the state holds adapters) → (new state, metrics).

    It donates the state. Metrics: loss, grad_norm, and the loss's sums divided by the number of tokens. If the loss or the
    gradient is not finite, the state does not change; the caller finds that in the metrics and stops.
    """

    @functools.partial(jax.jit, donate_argnames=("state",))
    def train_step(
        state: TrainState, batch: TrainBatch, base: Params | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        loss, grads, sums = gradients(state.params, batch, spec, base)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new = TrainState(optax.apply_updates(state.params, updates), opt_state)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        tokens = jnp.maximum(sums.pop("tokens"), 1)
        return new, {"loss": loss, "grad_norm": grad_norm} | {k: v / tokens for k, v in sums.items()}

    return train_step


def require_finite(record: Mapping[str, float], phase: str, step: int, rate: str) -> None:
    """Raise TrainingError if a step's loss or gradient norm (`record["<phase>/loss"]` …) is not finite.

    `rate`: the config field of the learning rate, for the message.
    """
    for name in (f"{phase}/loss", f"{phase}/grad_norm"):
        if not math.isfinite(record[name]):
            raise TrainingError(
                f"{name} is {record[name]} at step {step}: training stops, and the last checkpoint is from before it. "
                f"Lower {rate}, or check the data of that step"
            )
