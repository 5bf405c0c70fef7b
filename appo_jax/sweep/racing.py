"""The rule by which a trial skips its last seeds: only if it is significantly worse than the best trial.

Single runs of reinforcement learning are noisy, so a trial with one bad seed may still be the best. Therefore a trial is
compared with the best other trial on all seeds that it has run, and only from its third seed on. It is stopped if the
one-sided confidence interval of the mean difference (Student's t) lies below zero. The level is 5 %, divided by the number
of comparisons of a trial and by the number of other trials (Bonferroni). If the differences are normal, the best trial is
stopped in at most 5 % of sweeps. tests/sweep/test_racing.py measures this on simulated trials.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

LEVEL = 0.05  # upper bound of the probability that the best trial of a sweep is stopped
MIN_SEEDS = 3  # seeds of a trial before its first comparison

Values = Mapping[int, float]  # objective by seed, higher is better


def excluded(trial: Values, others: Sequence[Values], num_seeds: int) -> bool:
    """Whether `trial` is stopped after the seeds that it has run.

    `others`: all other trials that have run seeds. Those that lack a seed of `trial` are not compared. `num_seeds`: the number
    of seeds of a complete trial.
    """
    if not MIN_SEEDS <= len(trial) < num_seeds:
        return False
    rivals = [other for other in others if other.keys() >= trial.keys()]
    if not rivals:
        return False
    best = max(rivals, key=lambda other: sum(other[seed] for seed in trial))
    differences = np.array([value - best[seed] for seed, value in trial.items()])
    comparisons = num_seeds - MIN_SEEDS
    # Accuracies on n questions are multiples of 1/n: a few differences may be equal by chance, without being exact.
    rounding = smallest_step([value for other in (trial, *rivals) for value in other.values()]) / 2
    return upper_bound(differences, LEVEL / (comparisons * len(rivals)), rounding) < 0


def smallest_step(values: Sequence[float]) -> float:
    """The smallest difference between two different values; 0 if all are equal."""
    steps = np.diff(np.unique(np.round(values, 9)))
    return float(steps.min()) if len(steps) else 0.0


def upper_bound(differences: np.ndarray, level: float, min_deviation: float = 0.0) -> float:
    """The upper end of the one-sided confidence interval of the mean at confidence 1 − `level` (Student's t). `differences`: at
    least two. `min_deviation`: a smaller standard deviation counts as this."""
    n = len(differences)
    standard_error = max(float(np.std(differences, ddof=1)), min_deviation) / np.sqrt(n)
    return float(differences.mean() + stats.t.ppf(1 - level, n - 1) * standard_error)
