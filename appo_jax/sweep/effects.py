"""The effects of a sweep's fields: which matter, by how much, and how large a difference the runs can show.

The model: a run's objective = its seed + the value of each field + noise. Fields of a distribution are cut into thirds by
rank. A field matters if the model without it fits worse than chance explains (F test; p-values by Holm over the
fields).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from appo_jax.study.statistics import holm

NUM_BINS = 3  # of a field with many values


@dataclasses.dataclass(frozen=True)
class Effect:
    """One field."""

    name: str
    share: float  # of the variance between runs of one seed that the field explains (partial η²)
    p: float  # adjusted by Holm
    levels: tuple[str, ...]
    means: tuple[float, ...]  # objective at each level, other fields and seeds averaged out
    counts: tuple[int, ...]  # runs at each level


@dataclasses.dataclass(frozen=True)
class Runs:
    """All runs of a sweep that have a result, one entry per run."""

    points: Sequence[Mapping[str, Any]]
    seeds: Sequence[int]
    values: np.ndarray  # [runs]


def field_effects(runs: Runs, names: Sequence[str]) -> list[Effect]:
    """Every field's effect, the largest first. NaN where there are too few runs to tell."""
    labels = {name: levels_of([point[name] for point in runs.points]) for name in names}
    seeds = _dummies([str(seed) for seed in runs.seeds])
    columns = {name: _dummies(labels[name]) for name in names}
    full, rank = _residual(np.hstack([seeds, *columns.values()]), runs.values)
    freedom = len(runs.values) - rank
    found = []
    for name in names:
        rest = [columns[other] for other in names if other != name]
        without, less = _residual(np.hstack([seeds, *rest]), runs.values)
        p = share = float("nan")
        if freedom > 0 and rank > less:
            explained = without - full
            share = explained / without if without > 0 else 0.0
            noise = full / freedom
            p = float(stats.f.sf(explained / (rank - less) / noise, rank - less, freedom)) if noise > 0 else 0.0
        found.append((name, share, p))
    adjusted = holm([p for *_, p in found])
    centred = _centred(runs)
    return sorted(
        (
            Effect(name, share, p, *_level_means(labels[name], centred))
            for (name, share, _), p in zip(found, adjusted, strict=True)
        ),
        key=lambda effect: -np.nan_to_num(effect.share, nan=-1.0),
    )


def noise(runs: Runs, trials: Sequence[int]) -> tuple[float, int]:
    """Standard deviation of runs around the means of their trial and seed, and its degrees of freedom."""
    design = np.hstack([_dummies([str(t) for t in trials]), _dummies([str(s) for s in runs.seeds])])
    residual, rank = _residual(design, runs.values)
    freedom = len(runs.values) - rank
    return (float(np.sqrt(residual / freedom)) if freedom > 0 else float("nan")), freedom


def levels_of(values: Sequence[Any]) -> list[str]:
    """The level of each value: the value itself, or its third by rank if there are many numbers."""
    distinct = sorted(set(values), key=lambda value: (str(type(value)), value if value is not None else 0))
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in distinct)
    if not numbers or len(distinct) <= 2 * NUM_BINS:
        return [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    parts = np.array_split(np.array(distinct, float), NUM_BINS)
    names = {float(value): f"{part[0]:.3g} to {part[-1]:.3g}" for part in parts for value in part}
    return [names[float(value)] for value in values]


def _level_means(
    labels: Sequence[str], centred: np.ndarray
) -> tuple[tuple[str, ...], tuple[float, ...], tuple[int, ...]]:
    levels = tuple(in_order(labels))
    picked = [centred[[label == level for label in labels]] for level in levels]
    return levels, tuple(float(x.mean()) for x in picked), tuple(len(x) for x in picked)


def in_order(labels: Sequence[str]) -> list[str]:
    """The different levels, numbers and thirds of numbers from small to large, other values after them by name."""
    return sorted(set(labels), key=_numeric)


def _numeric(label: str) -> tuple[float, str]:
    try:
        return float(label.split(" to ")[0]), label
    except ValueError:
        return float("inf"), label


def _centred(runs: Runs) -> np.ndarray:
    """Values with the differences between seeds taken out."""
    seeds = np.array(runs.seeds)
    out = runs.values.astype(float).copy()
    for seed in set(runs.seeds):
        out[seeds == seed] += runs.values.mean() - runs.values[seeds == seed].mean()
    return out


def _dummies(labels: Sequence[str]) -> np.ndarray:
    """`[runs, levels]` of 0 and 1."""
    levels = sorted(set(labels))
    return np.array([[float(label == level) for level in levels] for label in labels])


def _residual(design: np.ndarray, values: np.ndarray) -> tuple[float, int]:
    """Sum of squared residuals of the best fit, and the rank of the design."""
    fit, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    return float(np.square(values - design @ fit).sum()), int(rank)
