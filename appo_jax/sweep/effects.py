"""The effects of a sweep's fields on the objective, by analysis of variance.

First each trial gets one value: its effect in the linear model: objective of a run = effect of its trial + effect of its seed +
noise. So a trial that skipped seeds is not compared with others on easier or harder seeds. Then: value of a trial = sum of the
effects of the levels of its fields + rest. The F test compares the rests of the model with and without a field. The runs of a
trial are not separate observations there: they share what the model of the fields leaves out. A field with few values has one
level per value; a field with many numbers has three levels, the thirds of its values by rank. The p-values are adjusted by
Holm's method over the fields.

Accuracies on n questions are multiples of 1/n, so differences may be equal by chance, without being exact: a standard deviation
between runs is at least half of the smallest difference between two runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from appo_jax.study.statistics import holm
from appo_jax.sweep.racing import smallest_step

NUM_BINS = 3  # levels of a field with many numbers


@dataclasses.dataclass(frozen=True)
class Effect:
    """The effect of one field."""

    name: str
    share: float  # of the variance between trials (η², 0 to 1): what the model loses without the field
    p: float  # of the F test, adjusted by Holm's method
    levels: tuple[str, ...]
    means: tuple[float, ...]  # mean objective of the trials at each level, without the differences between seeds
    counts: tuple[int, ...]  # number of trials at each level


@dataclasses.dataclass(frozen=True)
class Runs:
    """All runs of a sweep that have a result. Entry i of each field belongs to run i."""

    points: Sequence[Mapping[str, Any]]  # value of each field of the space
    trials: Sequence[int]
    seeds: Sequence[int]
    values: np.ndarray  # [runs] objective


@dataclasses.dataclass(frozen=True)
class Effects:
    """The effects of all fields, the largest share first, and the rest of the model: what it leaves out of a trial's value."""

    fields: list[Effect]
    deviation: float  # standard deviation of the rest; NaN without degrees of freedom, or if all runs are equal
    freedom: int  # degrees of freedom of the rest


def field_effects(runs: Runs, names: Sequence[str]) -> Effects:
    """The effects of the fields `names`. Share and p are NaN if there are too few trials."""
    points, values = trial_values(runs)
    labels = {name: levels_of([point[name] for point in points]) for name in names}
    columns = {name: _dummies(labels[name]) for name in names}
    constant = np.ones((len(values), 1))
    # The fit leaves rounding errors of about this size; what is smaller counts as 0.
    rounding = 1e-20 * float(np.square(values).sum())
    full_residual, full_rank = _residual(np.hstack([constant, *columns.values()]), values)
    freedom, total = len(values) - full_rank, float(np.square(values - values.mean()).sum())
    deviation = _deviation(runs, full_residual, freedom, len(set(runs.seeds)))
    tests = []
    for name in names:
        others = [columns[other] for other in names if other != name]
        reduced_residual, reduced_rank = _residual(np.hstack([constant, *others]), values)
        p = share = float("nan")
        if freedom > 0 and full_rank > reduced_rank:
            explained = reduced_residual - full_residual
            share, p = 0.0, 1.0
            if explained > rounding:
                share = explained / total
                ratio = explained / (full_rank - reduced_rank) / deviation**2
                p = float(stats.f.sf(ratio, full_rank - reduced_rank, freedom))
        tests.append((name, share, p))
    adjusted = holm([p for *_, p in tests])
    fields = [
        Effect(name, share, p, *_level_means(labels[name], values))
        for (name, share, _), p in zip(tests, adjusted, strict=True)
    ]
    return Effects(sorted(fields, key=lambda e: -np.nan_to_num(e.share, nan=-1.0)), deviation, freedom)


def noise(runs: Runs) -> tuple[float, int]:
    """The standard deviation of the noise between runs of a trial, and its degrees of freedom.

    The noise is the residual of the linear model: effect of the trial + effect of the seed. The standard deviation is NaN
    without degrees of freedom, or if all runs are equal.
    """
    residual, rank = _residual(_design(runs), runs.values)
    freedom = len(runs.values) - rank
    return _deviation(runs, residual, freedom, num_seeds=1), freedom


def _deviation(runs: Runs, residual: float, freedom: int, num_seeds: int) -> float:
    """The standard deviation of a residual of means over `num_seeds` runs, but at least that of the steps between runs. NaN
    without degrees of freedom, or if all runs are equal."""
    least = smallest_step(runs.values.tolist()) / 2 / num_seeds**0.5
    return max(float(np.sqrt(residual / freedom)), least) if freedom > 0 and least > 0 else float("nan")


def levels_of(values: Sequence[Any]) -> list[str]:
    """The level of each value: the value as text, or, if there are more than 2·NUM_BINS different numbers, its third by rank."""
    distinct = sorted(set(values), key=lambda value: (str(type(value)), value if value is not None else 0))
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in distinct)
    if not numbers or len(distinct) <= 2 * NUM_BINS:
        return [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    parts = np.array_split(np.array(distinct, float), NUM_BINS)
    names = {float(value): f"{part[0]:.3g} to {part[-1]:.3g}" for part in parts for value in part}
    return [names[float(value)] for value in values]


def _level_means(
    labels: Sequence[str], values: np.ndarray
) -> tuple[tuple[str, ...], tuple[float, ...], tuple[int, ...]]:
    """The levels, the mean value at each, and the number of values at each."""
    levels = tuple(in_order(labels))
    by_level = [values[[label == level for label in labels]] for level in levels]
    return levels, tuple(float(x.mean()) for x in by_level), tuple(len(x) for x in by_level)


def in_order(labels: Sequence[str]) -> list[str]:
    """The different levels: numbers and thirds of numbers from small to large, then other values in alphabetical order."""
    return sorted(set(labels), key=_sort_key)


def _sort_key(label: str) -> tuple[float, str]:
    try:
        return float(label.split(" to ")[0]), label
    except ValueError:
        return float("inf"), label


def trial_values(runs: Runs) -> tuple[list[Mapping[str, Any]], np.ndarray]:
    """The point of each trial, and its objective as if it had run all seeds, `[trials]`; in the order of their numbers."""
    trials = sorted(set(runs.trials))
    design = _design(runs)
    coefficients, *_ = np.linalg.lstsq(design, runs.values, rcond=None)
    of_trials, of_seeds = coefficients[: len(trials)], coefficients[len(trials) :]
    points = dict(zip(runs.trials, runs.points, strict=True))
    return [points[trial] for trial in trials], of_trials + of_seeds.mean()


def _design(runs: Runs) -> np.ndarray:
    """Indicator variables `[runs, trials + seeds]`, in rising order of trials and of seeds."""
    return np.hstack([_dummies(runs.trials), _dummies(runs.seeds)])


def _dummies(labels: Sequence[Any]) -> np.ndarray:
    """Indicator variables `[labels, levels]`, in rising order of the levels: 1 at the level of the label, otherwise 0."""
    levels = sorted(set(labels))
    return np.array([[float(label == level) for level in levels] for label in labels])


def _residual(design: np.ndarray, values: np.ndarray) -> tuple[float, int]:
    """The sum of squared residuals of the least-squares fit, and the rank of the design matrix `[runs, variables]`."""
    coefficients, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    return float(np.square(values - design @ coefficients).sum()), int(rank)
