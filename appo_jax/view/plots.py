"""Draws plots/*.png of a run from its metrics.jsonl and rollout dumps."""

from __future__ import annotations

import dataclasses
import fnmatch
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: pictures go to files, and a display and its state are not needed
from matplotlib.ticker import MaxNLocator

from appo_jax.dumps import dumped_steps, read_dump
from appo_jax.errors import DataError
from appo_jax.metrics import read_metrics
from appo_jax.timing import Phase

log = logging.getLogger(__name__)

STYLE: Any = {
    "figure.dpi": 120,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


@dataclasses.dataclass(frozen=True)
class Panel:
    """Axes of a figure. They show every metric whose name matches one of `metrics`, over training steps."""

    title: str
    ylabel: str
    metrics: tuple[str, ...]
    stacked: bool = False


# The branches of at most this many steps are drawn, evenly spaced: more columns would not be readable.
MAX_COLUMNS = 100


FIGURES: dict[str, tuple[Panel, ...]] = {
    "accuracy": (Panel("Accuracy", "share of rollouts that are right", ("accuracy/*", "eval/accuracy*")),),
    "sets": (
        Panel("Benchmark sets", "accuracy", ("eval/*/accuracy",)),
        Panel("Benchmark sets", "token F1", ("eval/*/f1",)),
    ),
    "reward": (
        Panel("Reward", "mean", ("reward/initial", "reward/branch")),
        Panel("Spread of rewards", "std within a prompt", ("reward/*_std",)),
    ),
    "entropy": (Panel("Entropy of sampled tokens", "nats", ("rollout/entropy*",)),),
    "lengths": (
        Panel("Length of responses", "tokens", ("rollout/response_tokens*",)),
        Panel("How rollouts end", "share", ("stop/*",), stacked=True),
    ),
    "tools": (
        Panel("Tool calls by outcome", "calls in a step", ("calls/*/*",)),
        Panel("Tool calls", "per initial rollout", ("calls/per_rollout",)),
    ),
    "updates": (
        Panel("Clipping", "share of tokens", ("update/clip*",)),
        Panel("KL", "nats per token", ("update/*kl*",)),
        Panel("Gradient", "norm", ("update/grad_norm*",)),
    ),
    "branching": (
        Panel("Future value Ω", "std over tokens", ("branching/future_std",)),
        Panel("Rollouts with constant Ω", "share", ("branching/constant_future_share",)),
    ),
    "timings": (
        Panel(
            "Where a step's time goes", "seconds", tuple(f"time/{phase}_s" for phase in get_args(Phase)), stacked=True
        ),
        Panel("Speed", "sampled tokens per second of a step", ("time/tokens_per_s",)),
    ),
}


def try_to_draw_plots(run_dir: Path) -> None:
    """Draw every figure of a run that has ended. A figure that cannot be drawn is logged and does not stop the
    others."""
    try:
        draw_plots(run_dir)
    except Exception as error:
        log.warning(
            "the plots could not be drawn (%s: %s); `appo-jax view %s` tries again",
            type(error).__name__,
            error,
            run_dir,
        )


def draw_plots(run_dir: str | Path) -> list[Path]:
    """Draw every figure for which the run has numbers into `run_dir`/plots, and return the files. Raises DataError if
    the directory has no metrics.
    """
    run_dir = Path(run_dir)
    records = read_metrics(run_dir / "metrics.jsonl")
    if not records:
        raise DataError(f"{run_dir / 'metrics.jsonl'}: no metrics; give the directory of a run that has made a step")
    (run_dir / "plots").mkdir(exist_ok=True)
    written = []
    with rc_context(STYLE):
        for name, panels in FIGURES.items():
            drawn = [(panel, series) for panel in panels if (series := _series(records, panel.metrics))]
            if not drawn:
                continue
            figure = Figure(figsize=(5.0 * len(drawn), 3.2), layout="constrained")
            for ax, (panel, series) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
                _draw(ax, panel, series)
            written.append(_save(figure, run_dir / "plots" / f"{name}.png"))
        points = _branch_points(run_dir / "rollouts")
        if points:
            figure = Figure(figsize=(5.0, 3.2), layout="constrained")
            _draw_branch_points(figure.subplots(), points)
            written.append(_save(figure, run_dir / "plots" / "branch_positions.png"))
    return written


def _series(records: Sequence[dict[str, Any]], patterns: Sequence[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Metric -> (steps, values), for the metrics that match. Values that were not finite are left out."""
    names = {name: None for record in records for name in record if any(fnmatch.fnmatch(name, p) for p in patterns)}
    series = {}
    for name in names:
        pairs = [(r["step"], r[name]) for r in records if r.get(name) is not None]
        if pairs:
            steps, values = zip(*pairs, strict=True)
            series[name] = (np.array(steps), np.array(values, float))
    return series


def _draw(ax: Axes, panel: Panel, series: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    labels = dict(zip(series, _short(list(series)), strict=True))
    if panel.stacked:
        steps = np.unique(np.concatenate([steps for steps, _ in series.values()]))
        shown = {name: (s, v) for name, (s, v) in series.items() if v.any()}
        heights = np.zeros((len(shown), len(steps)))
        for row, (at, values) in zip(heights, shown.values(), strict=True):
            row[np.searchsorted(steps, at)] = values
        ax.stackplot(steps, heights, labels=[labels[name] for name in shown], alpha=0.85)
    else:
        for name, (steps, values) in series.items():
            ax.plot(steps, values, label=labels[name], marker="o" if len(steps) < 20 else None, markersize=3)
    ax.set(title=panel.title, ylabel=panel.ylabel, xlabel="step")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if all((values >= 0).all() for _, values in series.values()):
        ax.set_ylim(bottom=0)
    if len(series) > 1:
        ax.legend(ncols=1 + len(series) // 5)


def _short(names: list[str]) -> list[str]:
    """The names without their first part if all of them share it."""
    if len(names) == 1:
        return names
    parts = [name.split("/") for name in names]
    shared = parts[0][0] if len({part[0] for part in parts}) == 1 else None
    return [" ".join(part[1:] if shared else part) for part in parts]


def _branch_points(folder: Path) -> list[tuple[int, float]]:
    """(step, place) of every dumped branch. The place is where it begins, as a share of its parent's response."""
    points = []
    dumps = list(dumped_steps(folder).values())
    for path in dumps[:: 1 + len(dumps) // MAX_COLUMNS]:
        try:
            trees = list(read_dump(path))
        except DataError as error:
            log.warning("%s; left out of the plots", error)
            continue
        for tree in trees:
            nodes = {node["node"]: node for node in tree["nodes"]}
            for node in nodes.values():
                if node["parent"] is not None:
                    parent = nodes[node["parent"]]
                    length = parent["tokens"] - parent["prompt_tokens"]
                    points.append((tree["step"], (node["fork"] - parent["prompt_tokens"]) / max(1, length)))
    return points


def _draw_branch_points(ax: Axes, points: Sequence[tuple[int, float]]) -> None:
    """Draw one column per dumped step: the share of its branches that begin in each tenth of the parent's response."""
    steps, places = np.unique([step for step, _ in points], return_inverse=True)
    counts = np.zeros((10, len(steps)))
    np.add.at(counts, (np.minimum(9, [int(10 * share) for _, share in points]), places), 1)
    image = ax.imshow(counts / counts.sum(axis=0), origin="lower", aspect="auto", extent=(-0.5, len(steps) - 0.5, 0, 1))
    ticks = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 8)).round().astype(int))
    ax.set_xticks(ticks, [str(steps[tick]) for tick in ticks])
    ax.set(title="Where branches begin", xlabel="step", ylabel="share of the parent's response")
    ax.grid(False)
    ax.figure.colorbar(image, ax=ax, label="share of branches")


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path)
    return path
