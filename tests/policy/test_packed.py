"""A packed row must compute what its traces compute alone."""

import jax
import jax.numpy as jnp
import numpy as np

from appo_jax.config import Architecture
from appo_jax.learner.loss import TrainBatch
from appo_jax.learner.step import StepSpec, gradients
from appo_jax.policy.parameters import init_params

ARCH = Architecture(vocab_size=50, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=64)
SPEC = StepSpec(ARCH, None, 1.0, 0, jnp.float32)


def test_packed_traces_give_the_loss_and_gradient_of_separate_ones() -> None:
    rng = np.random.default_rng(0)
    lengths = [5, 9, 4]
    traces = [rng.integers(0, 50, n) for n in lengths]
    masks = [np.append(False, rng.random(n - 1) < 0.6) for n in lengths]  # a first token is never trained on

    def batch(rows: list[list[int]], width: int, packed: bool) -> TrainBatch:
        tokens, weights, segments, positions = (np.zeros((len(rows), width)) for _ in range(4))
        for r, members in enumerate(rows):
            at = 0
            for s, i in enumerate(members):
                part = slice(at, at + lengths[i])
                tokens[r, part], weights[r, part] = traces[i], masks[i]
                segments[r, part], positions[r, part] = s + 1, np.arange(lengths[i])
                at += lengths[i]
        ones = jnp.ones((len(rows), width))
        extra = {"segments": jnp.asarray(segments, jnp.int32), "positions": jnp.asarray(positions, jnp.int32)}
        return TrainBatch(
            jnp.asarray(tokens, jnp.int32), jnp.asarray(weights, jnp.float32), ones, ones, **extra if packed else {}
        )

    params = init_params(ARCH, 0)
    loss, grads, sums = gradients(params, batch([[0], [1], [2]], 9, packed=False), SPEC)
    packed_loss, packed_grads, packed_sums = gradients(params, batch([[1, 0], [2]], 16, packed=True), SPEC)
    assert int(sums["tokens"]) == int(packed_sums["tokens"])
    np.testing.assert_allclose(loss, packed_loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, packed_grads)
