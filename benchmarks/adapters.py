"""How far bfloat16 takes a policy with adapters from itself, factored and merged: `python benchmarks/adapters.py`.

A random policy of the quickstart's shape with its weights in bfloat16, and adapters whose B has moved as Adam moves it: every entry
by about the rate, 1e-5, at each update. "Moved" is what that does to the log-probabilities of random tokens in float32, rms.
The other columns are how far the movement in bfloat16 is from it, rms: with adapters beside the weights, and merged into them.
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
RATE = 1e-5


def main() -> None:
    rng = np.random.default_rng(0)
    rows = pack(list(rng.integers(0, PLAIN.vocab_size, (16, 129))), 128, 16).rows
    base, start = frozen(init_params(PLAIN, 0), ARCH), init_adapters(ARCH, 0)
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

        own = jax.tree_util.tree_map_with_path(moved_b, start)
        moved = log_probs(with_adapters(exact_base, own), "float32") - log_probs(exact_base, "float32")
        still = log_probs(base, "bfloat16")
        errors = [
            rms(log_probs(policy, "bfloat16") - still - moved)
            for policy in (with_adapters(base, own), frozen(merged(base, own, ARCH), ARCH))
        ]
        print(f"| {updates} | {rms(moved):.1e} | {errors[0]:.1e} | {errors[1]:.1e} |")


if __name__ == "__main__":
    main()
