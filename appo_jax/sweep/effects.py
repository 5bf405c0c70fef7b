"""The effects of a sweep's fields on the objective, by analysis of variance.

The linear model: objective of a run = effect of its seed + effect of the level of each field + noise. A field with few values
has one level per value; a field with many numbers has three levels, the thirds of its values by rank. The F test compares the
residuals of the model with and without a field. Its p-values are adjusted by Holm's method over the fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from appo_jax.study.statistics import holm

NUM_BINS = 3  # levels of a field with many numbers


@dataclasses.dataclass(frozen=True)
class Effect:
    """The effect of one field."""

    name: str
    share: float  # partial η², 0 to 1: the field's share of the variance that seeds and other fields do not explain
    p: float  # of the F test, adjusted by Holm's method
    levels: tuple[str, ...]
    means: tuple[float, ...]  # mean objective at each level, without the differences between seeds
    counts: tuple[int, ...]  # number of runs at each level


@dataclasses.dataclass(frozen=True)
class Runs:
    """All runs of a sweep that have a result. Entry i of each field belongs to run i."""

    points: Sequence[Mapping[str, Any]]  # value of each field of the space
    seeds: Sequence[int]
    values: np.ndarray  # [runs] objective


def field_effects(runs: Runs, names: Sequence[str]) -> list[Effect]:
    """The effects of the fields `names`, the largest share first. Share and p are NaN if there are too few runs."""
    labels = {name: levels_of([point[name] for point in runs.points]) for name in names}
    seeds = _dummies([str(seed) for seed in runs.seeds])
    columns = {name: _dummies(labels[name]) for name in names}
    full_residual, full_rank = _residual(np.hstack([seeds, *columns.values()]), runs.values)
    residual_freedom = len(runs.values) - full_rank
    tests = []
    for name in names:
        other_columns = [columns[other] for other in names if other != name]
        reduced_residual, reduced_rank = _residual(np.hstack([seeds, *other_columns]), runs.values)
        p = share = float("nan")
        if residual_freedom > 0 and full_rank > reduced_rank:
            explained = reduced_residual - full_residual
            share = explained / reduced_residual if reduced_residual > 0 else 0.0
            noise_variance = full_residual / residual_freedom
            field_freedom = full_rank - reduced_rank
            p = (
                float(stats.f.sf(explained / field_freedom / noise_variance, field_freedom, residual_freedom))
                if noise_variance > 0
                else 0.0
            )
        tests.append((name, share, p))
    adjusted = holm([p for *_, p in tests])
    without_seeds = _without_seed_effects(runs)
    return sorted(
        (
            Effect(name, share, p, *_level_means(labels[name], without_seeds))
            for (name, share, _), p in zip(tests, adjusted, strict=True)
        ),
        key=lambda effect: -np.nan_to_num(effect.share, nan=-1.0),
    )


def noise(runs: Runs, trials: Sequence[int]) -> tuple[float, int]:
    """The standard deviation of the noise between runs, and its degrees of freedom.

    The noise is the residual of the linear model: effect of the trial + effect of the seed. `trials`: the trial of each run. The
    standard deviation is NaN without degrees of freedom.
    """
    design = np.hstack([_dummies([str(t) for t in trials]), _dummies([str(s) for s in runs.seeds])])
    residual, rank = _residual(design, runs.values)
    freedom = len(runs.values) - rank
    return (float(np.sqrt(residual / freedom)) if freedom > 0 else float("nan")), freedom


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


def _without_seed_effects(runs: Runs) -> np.ndarray:
    """`[runs]`: the values, shifted so that all seeds have the same mean."""
    seeds = np.array(runs.seeds)
    shifted = runs.values.astype(float).copy()
    for seed in set(runs.seeds):
        shifted[seeds == seed] += runs.values.mean() - runs.values[seeds == seed].mean()
    return shifted


def _dummies(labels: Sequence[str]) -> np.ndarray:
    """Indicator variables `[runs, levels]`: 1 at the level of the run, otherwise 0."""
    levels = sorted(set(labels))
    return np.array([[float(label == level) for level in levels] for label in labels])


def _residual(design: np.ndarray, values: np.ndarray) -> tuple[float, int]:
    """The sum of squared residuals of the least-squares fit, and the rank of the design matrix `[runs, variables]`."""
    coefficients, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    return float(np.square(values - design @ coefficients).sum()), int(rank)
