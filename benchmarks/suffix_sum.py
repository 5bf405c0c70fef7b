"""The time of the discounted suffix sum: our linear scan against products with a quadratic matrix.

python benchmarks/suffix_sum.py            # prints the figures and writes them to benchmarks/results/suffix_sum.json
"""

from __future__ import annotations

import functools
import json
import math
import platform
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from appo_jax import ops

RESULTS = Path(__file__).parent / "results" / "suffix_sum.json"
ROWS, LENGTHS, GAMMA = 64, (4096, 8192), 2.0 ** (-1 / 32)


@functools.partial(jax.jit, static_argnums=2)
def quadratic(x: jax.Array, mask: jax.Array, gamma: float) -> jax.Array:
    """The same sums as products with the matrix γ^d(i, j), row by row. Each row has its own mask and so its own matrix; the time
    includes making the matrix. x `[R, T]` float32, mask `[R, T]` bool; returns `[R, T]`."""

    def sums_of_row(row: tuple[jax.Array, jax.Array]) -> jax.Array:
        values, count = jnp.where(row[1], row[0], 0.0), jnp.cumsum(row[1])
        distance = (count[None, :] - count[:, None]).astype(jnp.float32)
        later = jnp.arange(len(count))[None, :] >= jnp.arange(len(count))[:, None]
        return jnp.where(later, jnp.exp2(distance * math.log2(gamma)), 0.0) @ values

    return jax.lax.map(sums_of_row, (x, mask))


@jax.jit
def product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """The product with one matrix for all rows, as if no rollout had a tool result. The matrix is made before and not timed, so
    this is the lowest possible time of the quadratic form; its sums are different. x `[R, T]`, matrix `[T, T]`."""
    return x @ matrix.T


def timed(function: jax.stages.Wrapped, *args: object, repeats: int) -> tuple[float, jax.Array]:
    """The median time of a call in milliseconds, without compilation, and its result."""
    program = function.lower(*args).compile()
    arrays = [x for x in args if isinstance(x, jax.Array)]
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        result = program(*arrays).block_until_ready()
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times), result


def main() -> None:
    linear = jax.jit(ops.discounted_suffix_sum, static_argnums=2)
    result: dict = {"machine": f"{platform.machine()}, {jax.devices()[0].device_kind}", "rows": ROWS}
    for length in LENGTHS:
        x = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, length)), jnp.float32)
        mask = jnp.asarray(np.random.default_rng(1).random(x.shape) < 0.9)
        matrix = jnp.triu(
            GAMMA ** jnp.abs(jnp.arange(length)[None, :] - jnp.arange(length)[:, None]).astype(jnp.float32)
        )
        result[f"linear_ms_{length}"], ours = timed(linear, x, mask, GAMMA, repeats=101)
        result[f"quadratic_ms_{length}"], theirs = timed(quadratic, x, mask, GAMMA, repeats=1)
        result[f"product_alone_ms_{length}"], _ = timed(product, x, matrix, repeats=11)
        difference = float(jnp.where(mask, jnp.abs(ours - theirs), 0.0).max())
        assert difference < 1e-3, f"the two forms differ by {difference}"
    short, long = LENGTHS
    for form in ("quadratic", "product_alone"):
        result[f"speedup_over_{form}_{long}"] = result[f"{form}_ms_{long}"] / result[f"linear_ms_{long}"]
    result[f"time_ratio_{long}_{short}"] = result[f"linear_ms_{long}"] / result[f"linear_ms_{short}"]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
