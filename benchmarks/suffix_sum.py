"""The discounted suffix sum, ours in linear time against the quadratic matmul form, in one run.

python benchmarks/suffix_sum.py            # prints, and writes benchmarks/results/suffix_sum.json
"""

from __future__ import annotations

import functools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from appo_jax import ops

RESULTS = Path(__file__).parent / "results" / "suffix_sum.json"
ROWS, LENGTHS, GAMMA = 64, (4096, 8192), 2.0 ** (-1 / 32)


@functools.partial(jax.jit, static_argnums=2)
def quadratic(x: jax.Array, mask: jax.Array, gamma: float) -> jax.Array:
    """The same sums as a product with the matrix γ^d(i, j), one row after the other: each mask has its own matrix."""

    def one_row(row: tuple[jax.Array, jax.Array]) -> jax.Array:
        values, count = jnp.where(row[1], row[0], 0.0), jnp.cumsum(row[1])
        distance = (count[None, :] - count[:, None]).astype(jnp.float32)
        later = jnp.arange(len(count))[None, :] >= jnp.arange(len(count))[:, None]
        return jnp.where(later, gamma**distance, 0.0) @ values

    return jax.lax.map(one_row, (x, mask))


@jax.jit
def product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """The product alone, with a matrix made beforehand, as if no mask had gaps: the least the quadratic form can cost."""
    return x @ matrix.T


def milliseconds(function: Callable[[], jax.Array], repeats: int) -> float:
    """Median time of a call, after one to compile."""
    function().block_until_ready()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function().block_until_ready()
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def main() -> None:
    linear = jax.jit(ops.discounted_suffix_sum, static_argnums=2)
    result: dict[str, float | str] = {"machine": f"{platform.machine()}, {jax.devices()[0].device_kind}", "rows": ROWS}
    for length in LENGTHS:
        x = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, length)), jnp.float32)
        mask = jnp.asarray(np.random.default_rng(1).random(x.shape) < 0.9)
        error = jnp.where(mask, linear(x, mask, GAMMA) - quadratic(x, mask, GAMMA), 0.0)
        difference = float(jnp.abs(error).max())
        matrix = jnp.triu(
            GAMMA ** jnp.abs(jnp.arange(length)[None, :] - jnp.arange(length)[:, None]).astype(jnp.float32)
        )
        assert difference < 1e-3, f"the two forms differ by {difference}"
        result[f"linear_ms_{length}"] = milliseconds(lambda x=x, mask=mask: linear(x, mask, GAMMA), 51)
        result[f"quadratic_ms_{length}"] = milliseconds(lambda x=x, mask=mask: quadratic(x, mask, GAMMA), 1)
        result[f"product_alone_ms_{length}"] = milliseconds(lambda x=x, matrix=matrix: product(x, matrix), 11)
    short, long = LENGTHS
    result["speedup_8192"] = result[f"quadratic_ms_{long}"] / result[f"linear_ms_{long}"]
    result["time_ratio_8192_4096"] = result[f"linear_ms_{long}"] / result[f"linear_ms_{short}"]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
