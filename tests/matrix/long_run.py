"""Can a long run still be opened? `python tests/matrix/long_run.py [--steps 10000]`.

Its records are written by a run's own writers (a step's metrics with the names of a real run, two trees of 16 rollouts of some 200
tokens), without training. Then each of its readers is timed, with the bytes that it reads.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from tiny import tiny_config

from appo_jax.metrics import MetricsLogger, read_metrics
from appo_jax.study.report import load_outcome
from appo_jax.text.tokenizer import load_tokenizer
from appo_jax.train import train
from appo_jax.types import Example, Rollout, StopReason
from appo_jax.view.plots import draw_plots
from appo_jax.view.tree import show_tree

KEEP = 1000


def tree(rng: np.random.Generator, step: int) -> list[Rollout]:
    """Eight rollouts of a prompt, and a branch of each."""
    nodes: list[Rollout] = []
    example = Example(f"q{step}", "Where does the river rise?", ("Tommis",), "qa", "")
    for node in range(16):
        length = int(rng.integers(150, 250))
        sampled, zeros = np.arange(length) >= 20, np.zeros(length, np.float32)
        tokens = rng.integers(10, 400, length).astype(np.int32)
        parent = node - 8 if node >= 8 else None
        fork = int(rng.integers(21, 140)) if node >= 8 else None
        nodes.append(Rollout(
            example, tokens, 20, sampled, zeros, zeros, StopReason.ANSWERED, (), node, parent, fork, int(node >= 8), reward=1.0
        ))  # fmt: skip
    return nodes


def size_mb(path: Path) -> float:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


def measure(what: str, reader: Callable[[], object]) -> None:
    """Print a row: seconds of a reader, and the MB that it read."""

    def read_so_far() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before, began = read_so_far(), time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        reader()
    print(f"| {what} | {time.perf_counter() - began:.1f} | {(read_so_far() - before) / 1e6:.1f} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    steps = parser.parse_args().steps
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = dataclasses.replace(tiny_config(folder), steps=1)
        with contextlib.redirect_stdout(io.StringIO()):
            train(config)
        names = [
            key
            for key, value in read_metrics(folder / "run/metrics.jsonl")[-1].items()
            if isinstance(value, float | int)
        ]
        names.remove("step")
        decode = load_tokenizer(str(folder / "world.model")).decode
        run = folder / "long"
        run.mkdir()
        logger, began = MetricsLogger(run), time.perf_counter()
        for step in range(1, steps + 1):
            logger.dump_trees(step, [tree(rng, step), tree(rng, step)], decode)
            record = dict(zip(names, rng.random(len(names)).tolist(), strict=True)) | {
                "rollout/sampled_tokens_total": 6400 * step
            }
            record |= {"time/wall_s": 2.0 * step} | ({"eval/accuracy": rng.random()} if step % 100 == 0 else {})
            logger.log(step, record)
        logger.close()
        summary = {"accuracy_sft": 0.1, "accuracy_final": 0.9, "sampled_tokens": 6400 * steps, "wall_s": 2.0 * steps}
        logger.write_summary(summary)
        print(
            f"{steps} steps of {len(names)} metrics written in {time.perf_counter() - began:.0f} s: metrics.jsonl "
            f"{size_mb(run / 'metrics.jsonl'):.1f} MB, tensorboard/ {size_mb(run / 'tensorboard'):.1f}, "
            f"rollouts/ {size_mb(run / 'rollouts'):.1f}"
        )
        print("\n| what | s | MB read |\n|---|---:|---:|")
        measure("the last tree (`appo-jax view`)", lambda: show_tree(run))
        measure("a tree of the middle", lambda: show_tree(run, steps // 2))
        measure("all plots (`appo-jax view`)", lambda: draw_plots(run))
        measure("the outcome of a run (`appo-jax study`)", lambda: load_outcome(run))
        measure("a start that goes on from the last step", lambda: MetricsLogger(run).resume(steps))
        measure(f"the same, the newest {KEEP} dumps kept", lambda: MetricsLogger(run, keep_rollouts=KEEP).resume(steps))
    return 0


if __name__ == "__main__":
    sys.exit(main())
