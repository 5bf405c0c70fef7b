"""The report of a study: two tables (study.md), a figure (study.png) and all numbers (study.json), in its folder."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from appo_jax.errors import DataError
from appo_jax.metrics import read_metrics, read_summary
from appo_jax.study.definition import Study
from appo_jax.study.statistics import EXACT_PAIRS, Interval, detectable, format_p, holm, mean_interval, paired
from appo_jax.view.plots import STYLE


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The held-out accuracy of one finished run, 0 to 1. The three curves have a point after the cold start, at each evaluation
    and at the end."""

    sft: float  # accuracy after the cold start
    final: float  # accuracy at the end
    tokens: np.ndarray  # [evaluations] sampled tokens so far
    seconds: np.ndarray  # [evaluations] wall time so far, without the cold start
    accuracy: np.ndarray  # [evaluations]

    def at_tokens(self, tokens: float) -> float:
        """Accuracy after `tokens` sampled tokens, interpolated linearly between two evaluations."""
        return float(np.interp(tokens, self.tokens, self.accuracy))

    def on_the_way(self, tokens: float) -> float:
        """Accuracy averaged over the first `tokens` sampled tokens, which is the area under the curve divided by `tokens`. Of
        two runs with the same final accuracy, the one that learns earlier has the higher average."""
        before = self.tokens < tokens
        x = [*self.tokens[before], tokens]
        return float(np.trapezoid([*self.accuracy[before], self.at_tokens(tokens)], x) / tokens)

    def at_time(self, seconds: float) -> float:
        """Accuracy after `seconds` of wall time, interpolated linearly between two evaluations."""
        return float(np.interp(seconds, self.seconds, self.accuracy))


def load_outcomes(study: Study) -> dict[str, dict[int, Outcome]]:
    """The outcomes of all finished runs, by arm and seed."""
    out: dict[str, dict[int, Outcome]] = {arm: {} for arm in study.arms}
    for arm in study.arms:
        for seed in study.seeds:
            if study.finished(arm, seed):
                out[arm][seed] = load_outcome(study.run_dir(arm, seed))
    return out


def load_outcome(folder: Path) -> Outcome:
    """The outcome of a finished run, from its summary and its metrics. Raises DataError if it has no readable summary."""
    if (summary := read_summary(folder)) is None:
        raise DataError(
            f"{folder / 'summary.json'}: is missing or damaged; train the run again: only its end is repeated"
        )
    records = [r for r in read_metrics(folder / "metrics.jsonl") if r.get("eval/accuracy") is not None]
    points = [
        (0.0, 0.0, summary["accuracy_sft"]),
        *((r["rollout/sampled_tokens_total"], r["time/wall_s"], r["eval/accuracy"]) for r in records),
        (summary["sampled_tokens"], summary["wall_s"], summary["accuracy_final"]),
    ]
    tokens, seconds, accuracy = np.array(points, float).T
    return Outcome(summary["accuracy_sft"], summary["accuracy_final"], tokens, seconds, accuracy)


def write_report(study: Study) -> str:
    """Write the report of the finished runs and return its tables. Raises DataError if no run is finished."""
    outcomes = load_outcomes(study)
    if not any(outcomes.values()):
        raise DataError(
            f"{study.out}: no run of the study is finished; run it first, or read its logs in {Path(study.out) / 'runs'}"
        )
    folder = Path(study.out)
    run_measures = measures(study.max_sampled_tokens, shortest(outcomes))
    markdown = f"{table(outcomes, run_measures)}\n\n{differences(outcomes, study.baseline, run_measures)}"
    (folder / "study.md").write_text(markdown + "\n")
    figures = {
        arm: {
            seed: {
                "sft": o.sft, "final": o.final, "tokens": o.tokens[-1], "seconds": o.seconds[-1],
                **{name: measure(o) for name, measure in run_measures.items()},
            }
            for seed, o in runs.items()
        }
        for arm, runs in outcomes.items()
    }  # fmt: skip
    (folder / "study.json").write_text(json.dumps(figures, indent=2) + "\n")
    draw(outcomes, folder / "study.png")
    return markdown


def shortest(outcomes: Mapping[str, Mapping[int, Outcome]]) -> float:
    """Wall time of the shortest run in seconds, which is the longest time at which all runs can be compared."""
    return float(min(o.seconds[-1] for runs in outcomes.values() for o in runs.values()))


Measures = Mapping[str, Callable[[Outcome], float]]


def measures(tokens: int, seconds: float) -> Measures:
    """The three measures by which runs are compared, by name. Each gives points of accuracy (0 to 100) of an outcome.

    `tokens`: the budget. Accuracies are compared at the budget and not at the end, because a run's last step goes beyond it, in
    some arms further than in others. `seconds`: the wall time at which they are compared.
    """
    return {
        f"at {tokens:,} tokens": lambda o: 100 * o.at_tokens(tokens),
        "on the way": lambda o: 100 * o.on_the_way(tokens),
        f"after {seconds:.0f} s": lambda o: 100 * o.at_time(seconds),
    }


def table(outcomes: Mapping[str, Mapping[int, Outcome]], run_measures: Measures) -> str:
    """The table of arms: means over seeds of the held-out accuracy in points, with 95 % intervals (Student's t), of the sampled
    tokens and of the minutes of a run."""
    lines = [
        f"| arm | seeds | after SFT | {' | '.join(run_measures)} | tokens | minutes |",
        "|" + "---|" * (len(run_measures) + 5),
    ]
    for arm, runs in outcomes.items():
        if not runs:
            lines.append(f"| {arm} | 0 |" + " |" * (len(run_measures) + 3))
            continue
        sft = 100 * np.mean([o.sft for o in runs.values()])
        means = [_interval(mean_interval([measure(o) for o in runs.values()])) for measure in run_measures.values()]
        tokens = np.mean([o.tokens[-1] for o in runs.values()])
        minutes = np.mean([o.seconds[-1] for o in runs.values()]) / 60
        lines.append(
            f"| {' | '.join([arm, str(len(runs)), f'{sft:.1f}', *means, f'{tokens:,.0f}', f'{minutes:.1f}'])} |"
        )
    return "\n".join(lines)


def differences(outcomes: Mapping[str, Mapping[int, Outcome]], baseline: str, run_measures: Measures) -> str:
    """The table of differences in points between each arm and the baseline, paired by seed, and the smallest difference that
    the study can detect."""
    baseline_runs = outcomes[baseline]
    others = {arm: runs for arm, runs in outcomes.items() if arm != baseline and runs.keys() & baseline_runs.keys()}
    if not others:
        return f"No seed is finished in both {baseline} and another arm yet."
    pairs = max(len(runs.keys() & baseline_runs.keys()) for runs in others.values())
    signs_test = "exact sign-flip test" if pairs <= EXACT_PAIRS else f"sign-flip test, exact up to {EXACT_PAIRS} seeds"
    lines = [
        f"Differences from {baseline}, paired by seed. p (t): paired t-test; p (signs): {signs_test}; both adjusted by "
        f"Holm's method for {len(others)} arms. detectable: the smallest true difference that the t-test finds significant with "
        f"95 % probability, at the level of 5 % and at that of 5 % / {len(others)}.",
        "",
        "| arm | measure | seeds | difference | p (t) | p (signs) | detectable |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, measure in run_measures.items():
        gains = {
            arm: np.array(
                [measure(runs[seed]) - measure(baseline_runs[seed]) for seed in runs if seed in baseline_runs]
            )
            for arm, runs in others.items()
        }
        tests = {arm: paired(gain, np.zeros(len(gain))) for arm, gain in gains.items()}
        p_t, p_signs = holm([test.p_t for test in tests.values()]), holm([t.p_permutation for t in tests.values()])
        for (arm, test), t, signs in zip(tests.items(), p_t, p_signs, strict=True):
            n = len(gains[arm])
            known = not math.isnan(test.difference.low)  # whether there is noise to measure
            standard_error = float(np.std(gains[arm], ddof=1)) / math.sqrt(n) if known else math.nan
            smallest = [detectable(standard_error, n - 1, level) for level in (0.05, 0.05 / len(others)) if known]
            cells = [arm, name, str(n), _interval(test.difference, sign=True), format_p(t), format_p(signs)]
            lines.append(f"| {' | '.join([*cells, ', '.join(f'{x:.1f}' for x in smallest)])} |")
    return "\n".join(lines)


def _interval(x: Interval, sign: bool = False) -> str:
    number = "+.1f" if sign else ".1f"
    return f"{x.mean:{number}}" + ("" if math.isnan(x.low) else f" [{x.low:{number}}, {x.high:{number}}]")


def mean_curve(x: Sequence[np.ndarray], y: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(x, mean y) of linearly interpolated curves at 200 points of the range of x that all curves cover."""
    grid = np.linspace(max(a[0] for a in x), min(a[-1] for a in x), 200)
    return grid, np.mean([np.interp(grid, a, b) for a, b in zip(x, y, strict=True)], axis=0)


def draw(outcomes: Mapping[str, Mapping[int, Outcome]], path: Path) -> None:
    """Draw the mean held-out accuracy of each arm over sampled tokens and over wall time, with a dot at the end of each run."""
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 4), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for number, (arm, runs) in enumerate((arm, list(runs.values())) for arm, runs in outcomes.items() if runs):
            for ax, name, scale in zip(axes, ("tokens", "seconds"), (1e3, 60), strict=True):
                xs = [getattr(run, name) / scale for run in runs]
                grid, mean = mean_curve(xs, [run.accuracy for run in runs])
                color = f"C{number % 10}"
                ax.plot(grid, mean, color=color, label=arm)
                ax.plot([x[-1] for x in xs], [run.final for run in runs], ".", color=color, alpha=0.5)
        axes[0].set(xlabel="sampled tokens (thousands)", ylabel="held-out accuracy, greedy", ylim=(0, 1))
        axes[1].set(xlabel="wall time (minutes)")
        axes[0].legend(ncols=2)
        figure.savefig(path)
