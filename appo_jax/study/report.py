"""Two tables and one figure of a study: study.md, study.json and study.png in its folder."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from appo_jax.errors import DataError
from appo_jax.metrics import read_metrics
from appo_jax.study.plan import Study
from appo_jax.study.statistics import Interval, detectable, holm, mean_interval, paired
from appo_jax.view.plots import STYLE


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One finished run. Curves hold the held-out accuracy: after the cold start, at each evaluation, at the end."""

    sft: float
    final: float
    tokens: np.ndarray  # [evaluations] sampled so far
    seconds: np.ndarray  # [evaluations] of the run, without its cold start
    accuracy: np.ndarray  # [evaluations]

    def at_tokens(self, tokens: float) -> float:
        """Accuracy after so many sampled tokens, between two evaluations on the line through them."""
        return float(np.interp(tokens, self.tokens, self.accuracy))

    def on_the_way(self, tokens: float) -> float:
        """Accuracy averaged over the first `tokens` sampled tokens: the area under the curve, by which early learning
        counts."""
        before = self.tokens < tokens
        x = [*self.tokens[before], tokens]
        return float(np.trapezoid([*self.accuracy[before], self.at_tokens(tokens)], x) / tokens)

    def at_time(self, seconds: float) -> float:
        """Accuracy after so many seconds, between two evaluations on the line through them."""
        return float(np.interp(seconds, self.seconds, self.accuracy))


def load_outcomes(study: Study) -> dict[str, dict[int, Outcome]]:
    """Finished runs by arm and seed."""
    out: dict[str, dict[int, Outcome]] = {arm: {} for arm in study.arms}
    for arm in study.arms:
        for seed in study.seeds:
            folder = study.run_dir(arm, seed)
            if (folder / "summary.json").exists():
                out[arm][seed] = load_outcome(folder)
    return out


def load_outcome(folder: Path) -> Outcome:
    """The outcome of a finished run, from its summary and its metrics."""
    summary = json.loads((folder / "summary.json").read_text())
    records = [r for r in read_metrics(folder / "metrics.jsonl") if r.get("eval/accuracy") is not None]
    points = [
        (0.0, 0.0, summary["accuracy_sft"]),
        *((r["rollout/sampled_tokens_total"], r["time/wall_s"], r["eval/accuracy"]) for r in records),
        (summary["sampled_tokens"], summary["wall_s"], summary["accuracy_final"]),
    ]
    tokens, seconds, accuracy = np.array(points, float).T
    return Outcome(summary["accuracy_sft"], summary["accuracy_final"], tokens, seconds, accuracy)


def write_report(study: Study) -> str:
    """Write the tables and the figure of the finished runs, and return the tables. Raises DataError if no run is
    finished."""
    outcomes = load_outcomes(study)
    if not any(outcomes.values()):
        raise DataError(f"{study.out}: no run of the study is finished; see the logs in {Path(study.out) / 'runs'}")
    folder = Path(study.out)
    judged = measures(study.max_sampled_tokens, shortest(outcomes))
    markdown = f"{table(outcomes, judged)}\n\n{differences(outcomes, study.baseline, judged)}"
    (folder / "study.md").write_text(markdown + "\n")
    figures = {
        arm: {
            seed: {
                "sft": o.sft, "final": o.final, "tokens": o.tokens[-1], "seconds": o.seconds[-1],
                **{name: measure(o) for name, measure in judged.items()},
            }
            for seed, o in runs.items()
        }
        for arm, runs in outcomes.items()
    }  # fmt: skip
    (folder / "study.json").write_text(json.dumps(figures, indent=2) + "\n")
    draw(outcomes, folder / "study.png")
    return markdown


def shortest(outcomes: Mapping[str, Mapping[int, Outcome]]) -> float:
    """Seconds of the shortest run: the longest time at which all runs can be compared."""
    return float(min(o.seconds[-1] for runs in outcomes.values() for o in runs.values()))


Measures = Mapping[str, Callable[[Outcome], float]]


def measures(tokens: int, seconds: float) -> Measures:
    """What a run is judged by, in points of accuracy. A run's last step goes beyond the budget of `tokens`, further for some
    arms than for others, so that accuracies at the budget are compared."""
    return {
        f"at {tokens:,} tokens": lambda o: 100 * o.at_tokens(tokens),
        "on the way": lambda o: 100 * o.on_the_way(tokens),
        f"after {seconds:.0f} s": lambda o: 100 * o.at_time(seconds),
    }


def table(outcomes: Mapping[str, Mapping[int, Outcome]], judged: Measures) -> str:
    """Held-out accuracy in points by arm, with 95 % bootstrap intervals over the seeds."""
    lines = [
        f"| arm | seeds | after SFT | {' | '.join(judged)} | tokens | minutes |",
        "|" + "---|" * (len(judged) + 5),
    ]
    for arm, runs in outcomes.items():
        if not runs:
            lines.append(f"| {arm} | 0 |" + " |" * (len(judged) + 3))
            continue
        sft = 100 * np.mean([o.sft for o in runs.values()])
        means = [_cell(mean_interval([measure(o) for o in runs.values()])) for measure in judged.values()]
        tokens = np.mean([o.tokens[-1] for o in runs.values()])
        minutes = np.mean([o.seconds[-1] for o in runs.values()]) / 60
        lines.append(
            f"| {' | '.join([arm, str(len(runs)), f'{sft:.1f}', *means, f'{tokens:,.0f}', f'{minutes:.1f}'])} |"
        )
    return "\n".join(lines)


def differences(outcomes: Mapping[str, Mapping[int, Outcome]], baseline: str, judged: Measures) -> str:
    """Each arm against the baseline, paired by seed, and how large a difference the study could have seen."""
    first = outcomes[baseline]
    others = {arm: runs for arm, runs in outcomes.items() if arm != baseline and runs.keys() & first.keys()}
    if not others:
        return f"No other arm has a seed in common with {baseline} yet."
    lines = [
        f"Differences from {baseline}, paired by seed. p: paired t-test and exact test that flips signs, each adjusted by Holm "
        f"for {len(others)} arms. detectable: the true difference that the t-test sees with 95 % probability, at 5 % alone "
        f"and at 5 % / {len(others)}.",
        "",
        "| arm | measure | seeds | difference | p (t) | p (signs) | detectable |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, measure in judged.items():
        gains = {
            arm: np.array([measure(runs[seed]) - measure(first[seed]) for seed in runs if seed in first])
            for arm, runs in others.items()
        }
        tests = {arm: paired(gain, np.zeros(len(gain))) for arm, gain in gains.items()}
        p_t, p_signs = holm([test.p_t for test in tests.values()]), holm([t.p_permutation for t in tests.values()])
        for (arm, test), t, signs in zip(tests.items(), p_t, p_signs, strict=True):
            n = len(gains[arm])
            error = float(np.std(gains[arm], ddof=1)) / math.sqrt(n) if n > 1 else math.nan
            seen = (detectable(error, n - 1, level) for level in (0.05, 0.05 / len(others)))
            cells = [arm, name, str(n), _cell(test.difference, sign=True), _number(t), _number(signs)]
            lines.append(f"| {' | '.join([*cells, ', '.join(f'{x:.1f}' for x in seen)])} |")
    return "\n".join(lines)


def _cell(x: Interval, sign: bool = False) -> str:
    form = "+.1f" if sign else ".1f"
    return f"{x.mean:{form}}" + ("" if math.isnan(x.low) else f" [{x.low:{form}}, {x.high:{form}}]")


def _number(p: float) -> str:
    return "" if math.isnan(p) else f"{p:.3f}"


def mean_curve(x: Sequence[np.ndarray], y: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The mean of interpolated curves, on the range of x that all of them cover."""
    grid = np.linspace(max(a[0] for a in x), min(a[-1] for a in x), 200)
    return grid, np.mean([np.interp(grid, a, b) for a, b in zip(x, y, strict=True)], axis=0)


def draw(outcomes: Mapping[str, Mapping[int, Outcome]], path: Path) -> None:
    """Mean held-out accuracy over sampled tokens and over wall time, with a mark per run at its end."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
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
        plt.close(figure)
