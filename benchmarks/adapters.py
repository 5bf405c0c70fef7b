"""The error of bfloat16 for a policy with adapters, factored and merged: `python benchmarks/adapters.py`.

The policy is random, has the quickstart's shape and bfloat16 weights. The B matrices of its adapters are changed as Adam changes
them: every entry by about the learning rate, 1e-5, in each update. "Moved" is the change that this makes to the log-probs of random
tokens in float32. The other columns are the error of this change in bfloat16, with adapters as factors and merged into the weights.
All figures are root mean squares in nats.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from appo_jax.config import Architecture, LoRAConfig
from appo_jax.policy.adapters import frozen, init_adapters, merged, with_adapters
from appo_jax.policy.packing import pack
from appo_jax.policy.parameters import Params, adapted, init_params
from appo_jax.policy.score import score

PLAIN = Architecture(1152, 256, 3, 4, 2, 64, 768, family="qwen3")
ARCH = adapted(PLAIN, LoRAConfig())
RATE = 1e-5  # learning rate


def main() -> None:
    rng = np.random.default_rng(0)
    rows = pack(list(rng.integers(0, PLAIN.vocab_size, (16, 129))), 128, 16).rows
    base, initial = frozen(init_params(PLAIN, 0), ARCH), init_adapters(ARCH, 0)
    exact_base = jax.tree.map(lambda x: x.astype(jnp.float32), base)

    def log_probs(params: Params, dtype: Any) -> np.ndarray:
        return np.asarray(score(params, rows, arch=ARCH, temperature=1.0, dtype=jnp.dtype(dtype)).log_probs)

    def rms(x: np.ndarray) -> float:
        return float(np.sqrt(np.square(x).mean()))

    print("| updates | moved | factored | merged |\n|---:|---:|---:|---:|")
    for updates in (1, 10, 100, 1000):

        def moved_b(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
            if not path[-1].key.endswith("_b"):
                return x
            return jnp.asarray(rng.choice([-1, 1], x.shape) * rng.uniform(0.5, 1, x.shape) * RATE * updates, x.dtype)  # noqa: B023

        changed = jax.tree_util.tree_map_with_path(moved_b, initial)
        moved = log_probs(with_adapters(exact_base, changed), "float32") - log_probs(exact_base, "float32")
        unchanged = log_probs(base, "bfloat16")
        errors = [
            rms(log_probs(policy, "bfloat16") - unchanged - moved)
            for policy in (with_adapters(base, changed), frozen(merged(base, changed, ARCH), ARCH))
        ]
        print(f"| {updates} | {rms(moved):.1e} | {errors[0]:.1e} | {errors[1]:.1e} |")


if __name__ == "__main__":
    main()
