"""The report of a sweep: sweep.md, sweep.json, sweep.png and best.json in its folder."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from optuna.trial import TrialState
from scipy import stats

from appo_jax.config_io import save_config
from appo_jax.errors import DataError
from appo_jax.storage import to_json
from appo_jax.study.statistics import detectable, format_p
from appo_jax.sweep.definition import Sweep
from appo_jax.sweep.effects import Effect, Effects, Runs, field_effects, in_order, levels_of, noise, trial_values
from appo_jax.sweep.store import Store
from appo_jax.view.plots import STYLE

MAX_ROWS = 40  # of the table of trials; sweep.json has all trials
MAX_PAIRS = 6  # pairs of fields that get a heat map


@dataclasses.dataclass(frozen=True)
class Result:
    """One trial that has run at least one seed."""

    number: int
    params: dict[str, Any]
    values: dict[int, float]  # objective by seed
    state: TrialState

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.values.values())))


def results(store: Store) -> list[Result]:
    """All trials that have results and stand for their points. Complete trials come first, then those that skipped seeds or still
    run; within both groups the best mean objective comes first."""
    sign = -1 if store.sweep.maximize else 1
    unsorted = [Result(t.number, store.point(t), store.values(t), t.state) for t in store.standing() if store.values(t)]
    return sorted(unsorted, key=lambda r: (r.state != TrialState.COMPLETE, sign * r.mean))


def write_report(sweep: Sweep) -> str:
    """Write the report of the finished runs and return its text. Raises DataError if no trial has a result."""
    store = Store(sweep)
    found = results(store)
    if not found:
        raise DataError(f"{sweep.out}: no trial has a result; see the logs in {Path(sweep.out) / 'runs'}")
    runs = _runs(found)
    effects = field_effects(runs, list(sweep.space))
    folder = Path(sweep.out)
    text = "\n\n".join(
        [
            _summary(store, found),
            _fields_table(effects.fields),
            _resolution(runs, effects),
            _trials_table(sweep, found, runs),
        ]
    )
    (folder / "sweep.md").write_text(text + "\n")
    record = {
        "objective": sweep.objective,
        "trials": [
            {"trial": r.number, "state": r.state.name, "fields": r.params, "values": r.values} for r in found
        ],
        "fields": [dataclasses.asdict(effect) for effect in effects.fields],
    }  # fmt: skip
    (folder / "sweep.json").write_text(to_json(record, indent=2))
    save_config(dataclasses.replace(sweep.point_config(found[0].params), run_dir="runs/best"), folder / "best.json")
    draw(sweep, runs, effects.fields, folder / "sweep.png")
    return text


def _runs(found: Sequence[Result]) -> Runs:
    """All runs of the trials."""
    entries = [(r.params, r.number, seed, value) for r in found for seed, value in r.values.items()]
    points, trials, seeds, values = zip(*entries, strict=True)
    return Runs(points, trials, seeds, np.array(values))


def _summary(store: Store, found: Sequence[Result]) -> str:
    """The objective, the number of trials in each state, and the best trial."""
    sweep = store.sweep
    states = [trial.state for trial in store.standing()]
    counts = ", ".join(
        f"{states.count(state)} {name}"
        for state, name in (
            (TrialState.COMPLETE, "complete"), (TrialState.PRUNED, "stopped early"), (TrialState.FAIL, "failed"),
            (TrialState.RUNNING, "running"), (TrialState.WAITING, "waiting"),
        )
        if state in states
    )  # fmt: skip
    best = found[0]
    fields = ", ".join(f"{name} = {_value(value)}" for name, value in best.params.items())
    return (
        f"Objective: {sweep.objective}; {sweep.max_sampled_tokens:,} sampled tokens a run; seeds "
        f"{', '.join(map(str, sweep.seeds))}. Trials: {counts}.\n\n"
        f"Best: trial {best.number} ({fields}), {best.mean:.4f}. Train from it: `appo-jax train --config "
        f"{Path(sweep.out) / 'best.json'}`. The best of {len(found)} noisy results is too good on average: expect less of new runs."
    )


def _fields_table(effects: Sequence[Effect]) -> str:
    lines = [
        "Which fields matter (means over other fields and seeds; p: F test, adjusted by Holm's method):",
        "",
        "| field | explained variance | p | mean objective at each value |",
        "|---|---|---|---|",
    ]
    for e in effects:
        levels = ", ".join(f"{level}: {mean:.4f}" for level, mean in zip(e.levels, e.means, strict=True))
        share = "" if math.isnan(e.share) else f"{100 * e.share:.0f} %"
        lines.append(f"| {e.name} | {share} | {format_p(e.p)} | {levels} |")
    return "\n".join(lines)


def _resolution(runs: Runs, effects: Effects) -> str:
    """The noise between runs, and the smallest differences that the runs can detect."""
    deviation, freedom = noise(runs)
    seeds = len(set(runs.seeds))
    lines = [
        "Detectable differences between two trials: not known yet, because the trials have too few seeds to measure the noise "
        "between runs, or because all runs are equal."
    ]
    if not math.isnan(deviation):
        smallest = detectable(deviation * math.sqrt(2 / seeds), freedom)
        lines = [
            f"Detectable differences: the noise between runs of a trial has a standard deviation of {deviation:.4f} ({freedom} "
            f"degrees of freedom). A true difference of {smallest:.4f} between two trials of {seeds} seeds would be significant "
            "(5 %, two-sided) with 95 % probability."
        ]
    if not math.isnan(effects.deviation):
        lines[0] += (
            f" What the fields leave out of a trial's mean has a standard deviation of {effects.deviation:.4f} "
            f"({effects.freedom} degrees of freedom). So the detectable difference between two values of a field is:"
        )
        for e in effects.fields:
            n = min(e.counts)
            smallest = detectable(effects.deviation * math.sqrt(2 / n), effects.freedom)
            lines.append(f"- {e.name}: {smallest:.4f} (at least {n} trials per value)")
    return "\n".join(lines)


def _trials_table(sweep: Sweep, found: Sequence[Result], runs: Runs) -> str:
    """The trials, the best first. A trial has few seeds, so intervals and tests use the noise between runs of all trials."""
    names = list(sweep.space)
    deviation, freedom = noise(runs)
    lines = [
        "Intervals (95 %) and p (t-test) are from the noise between runs that all trials share.",
        "",
        "| trial | " + " | ".join(names) + " | seeds | objective | difference from the best, paired by seed | p |",
        "|" + "---|" * (len(names) + 5),
    ]
    best = found[0]
    for r in found[:MAX_ROWS]:
        half = stats.t.ppf(0.975, freedom) * deviation / math.sqrt(len(r.values))
        objective = f"{r.mean:.4f}" + ("" if math.isnan(half) else f" [{r.mean - half:.4f}, {r.mean + half:.4f}]")
        shared = [seed for seed in r.values if seed in best.values]
        against, p = "", ""
        if r is not best and shared and not math.isnan(deviation):
            mean = float(np.mean([r.values[seed] - best.values[seed] for seed in shared]))
            error = deviation * math.sqrt(2 / len(shared))
            half = stats.t.ppf(0.975, freedom) * error
            against = f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]"
            p = format_p(2 * stats.t.sf(abs(mean) / error, freedom))
        seeds = f"{len(r.values)}" + ("" if r.state == TrialState.COMPLETE else f" ({r.state.name.lower()})")
        cells = [str(r.number), *(_value(r.params[n]) for n in names), seeds, objective, against, p]
        lines.append("| " + " | ".join(cells) + " |")
    if len(found) > MAX_ROWS:
        lines.append(f"\nThe other {len(found) - MAX_ROWS} trials are in sweep.json.")
    return "\n".join(lines)


def draw(sweep: Sweep, runs: Runs, effects: Sequence[Effect], path: Path) -> None:
    """Draw the objective over each field, the fields that explain most first, and heat maps of pairs of these fields."""
    points, values = trial_values(runs)
    pairs = list(itertools.combinations([e.name for e in effects], 2))[:MAX_PAIRS]
    columns = max(2, min(4, len(effects)))
    rows = -(-len(effects) // columns) + -(-len(pairs) // columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(3.2 * columns, 2.8 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for ax, effect in zip(axes, effects, strict=False):
            labels = levels_of([point[effect.name] for point in points])
            _slice(ax, labels, values, effect, sweep.objective)
        start = -(-len(effects) // columns) * columns
        for ax, pair in zip(axes[start:], pairs, strict=False):
            _heat_map(ax, points, values, pair)
        used = {*range(len(effects)), *range(start, start + len(pairs))}
        for number, ax in enumerate(axes):
            if number not in used:
                ax.set_axis_off()
        figure.savefig(path)


def _slice(ax: Axes, labels: Sequence[str], values: np.ndarray, effect: Effect, objective: str) -> None:
    """Draw the objective over the levels of a field: a dot per trial, and the mean at each level."""
    x_of = {level: i for i, level in enumerate(effect.levels)}
    ax.plot([x_of[label] for label in labels], values, ".", alpha=0.5, color="C0")
    ax.plot(range(len(effect.levels)), effect.means, "o-", color="C1")
    ax.set(xticks=range(len(effect.levels)), xticklabels=effect.levels, xlabel=effect.name, ylabel=objective)


def _heat_map(ax: Axes, points: Sequence[Mapping[str, Any]], values: np.ndarray, pair: tuple[str, str]) -> None:
    """Draw the mean objective of the trials at each pair of levels of two fields."""
    x, y = (levels_of([point[name] for point in points]) for name in pair)
    xs, ys = in_order(x), in_order(y)
    cells = np.full((len(ys), len(xs)), np.nan)
    for i, j in itertools.product(range(len(ys)), range(len(xs))):
        here = [(a, b) == (xs[j], ys[i]) for a, b in zip(x, y, strict=True)]
        if any(here):
            cells[i, j] = values[here].mean()
    image = ax.imshow(cells, aspect="auto", origin="lower", cmap="viridis")
    ax.grid(False)
    ax.set(xticks=range(len(xs)), xticklabels=xs, yticks=range(len(ys)), yticklabels=ys, xlabel=pair[0], ylabel=pair[1])
    ax.figure.colorbar(image, ax=ax)


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
