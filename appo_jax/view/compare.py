"""Learning curves of several runs on one picture: accuracy over sampled tokens, mean and spread over seeds.

python -m appo_jax.view.compare runs/compare/* --out compare.png
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tyro

from appo_jax.config_io import load_config
from appo_jax.errors import DataError
from appo_jax.metrics import read_metrics
from appo_jax.view.plots import STYLE

WINDOW = 5  # steps over which training accuracy is averaged before it is drawn


@dataclasses.dataclass(frozen=True)
class Run:
    """What the picture needs of a run. Curves start after the first step."""

    algorithm: str
    seed: int
    tokens: np.ndarray  # [steps] sampled up to and including the step
    accuracy: np.ndarray  # [steps] share of initial rollouts that are right, averaged over WINDOW steps
    held_out: dict[str, float]  # summary.json: accuracy_base, accuracy_sft, accuracy_final; empty while it runs


def compare(runs: Sequence[Path], out: Path) -> str:
    """Draw `runs` (directories) into the picture `out`; returns a Markdown table of held-out accuracy by algorithm.

    The band is the standard deviation over seeds (n − 1). Raises DataError for a directory without metrics.
    """
    loaded = [_load(Path(run)) for run in runs]
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in loaded:
        groups[run.algorithm].append(run)
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
        for number, (algorithm, members) in enumerate(sorted(groups.items())):
            tokens, mean, spread = _mean_curve(members)
            color = f"C{number}"
            seeds = f"{len(members)} seed" + "s" * (len(members) > 1)
            ax.plot(tokens / 1e6, mean, color=color, label=f"{algorithm.upper()}, training questions ({seeds})")
            ax.fill_between(tokens / 1e6, mean - spread, mean + spread, color=color, alpha=0.2, linewidth=0)
            ends = [(run.tokens[-1], run.held_out["accuracy_final"]) for run in members if run.held_out]
            if ends:
                at, values = np.mean(ends, axis=0)
                error = _spread(np.array([[value] for _, value in ends]))
                label = f"{algorithm.upper()}, held-out questions, greedy"
                ax.errorbar(at / 1e6, values, error, color=color, marker="D", capsize=3, linestyle="", label=label)
        starts = [run.held_out["accuracy_sft"] for run in loaded if run.held_out]
        if starts:
            ax.axhline(
                float(np.mean(starts)), color="0.5", linestyle=":", label="after SFT, held-out questions, greedy"
            )
        ax.set(xlabel="sampled tokens (millions)", ylabel="accuracy", ylim=(0, 1), xlim=(0, None))
        ax.legend(loc="lower right")
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out)
        plt.close(figure)
    return _table(groups)


def _load(folder: Path) -> Run:
    records = read_metrics(folder / "metrics.jsonl")
    if not records:
        raise DataError(f"{folder / 'metrics.jsonl'}: no metrics; give directories of runs that have made a step")
    config = load_config(folder / "config.json")
    summary = folder / "summary.json"
    return Run(
        algorithm=config.algorithm,
        seed=config.seed,
        tokens=np.array([record["rollout/sampled_tokens_total"] for record in records], float),
        accuracy=_smooth(np.array([record["accuracy/initial"] for record in records], float)),
        held_out=json.loads(summary.read_text()) if summary.exists() else {},
    )


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean of each value and up to WINDOW − 1 before it."""
    return np.array([values[max(0, end - WINDOW) : end].mean() for end in range(1, len(values) + 1)])


def _mean_curve(runs: Sequence[Run]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, mean, spread) on the range of tokens that all runs cover."""
    first, last = max(run.tokens[0] for run in runs), min(run.tokens[-1] for run in runs)
    tokens = np.linspace(first, last, 200)
    curves = np.stack([np.interp(tokens, run.tokens, run.accuracy) for run in runs])
    return tokens, curves.mean(axis=0), _spread(curves)


def _spread(curves: np.ndarray) -> np.ndarray:
    """Standard deviation over the first axis; 0 for a single run."""
    return curves.std(axis=0, ddof=1) if len(curves) > 1 else np.zeros(curves.shape[1:])


def _table(groups: dict[str, list[Run]]) -> str:
    lines = ["| algorithm | seeds | sampled tokens | after SFT | at the end | gain |", "|---|---|---|---|---|---|"]
    for algorithm, members in sorted(groups.items()):
        done = [run for run in members if run.held_out]
        if done:
            after = np.array([[run.held_out["accuracy_sft"]] for run in done]) * 100
            final = np.array([[run.held_out["accuracy_final"]] for run in done]) * 100
            tokens = np.mean([run.tokens[-1] for run in done]) / 1e6
            cells = " | ".join(f"{x.mean():.1f} ± {_spread(x)[0]:.1f}" for x in (after, final, final - after))
            lines.append(f"| {algorithm.upper()} | {len(done)} | {tokens:.2f} M | {cells} |")
    return "\n".join(lines)


def main(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path) -> None:
    """Draw the learning curves of several runs on one picture and print a table of their held-out accuracy."""
    print(compare(runs, out))


if __name__ == "__main__":
    tyro.cli(main)
