"""A sweep: a base config, a space of fields to vary, an objective and a budget, read from a python file."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution

from appo_jax.config import Config
from appo_jax.config_io import check, flatten, read_variable, with_fields
from appo_jax.errors import ConfigError
from appo_jax.study.plan import COLD_START, MAX_STEPS, check_cold_starts, shared_cold_start

optuna.logging.set_verbosity(optuna.logging.WARNING)

Point = dict[str, Any]  # a value for every field of the space

# A random sweep is refused if it draws this many points per trial and too few of them keep the rules between fields.
MAX_DRAWS = 200


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Trials of one base config. Each trial is a point of the space, run with every seed."""

    out: str
    """Folder of the sweep: its storage, runs and report. Workers on several machines share it."""
    base: Config
    space: Mapping[str, tuple[Any, ...] | BaseDistribution]
    """Dotted config field -> the values it takes, or an Optuna distribution (not for a grid)."""
    seeds: tuple[int, ...]
    """Seeds of every trial. All trials share them, and the cold start of each: comparisons are paired."""
    max_sampled_tokens: int
    """Budget of one run."""
    cold_starts: tuple[str, ...] = ()
    """Folders of the cold starts that the seeds begin with, in turn; they are made where they are not there yet. Studies
    and other sweeps may share them. (): every seed makes its own."""
    search: Literal["grid", "random", "tpe"] = "grid"
    trials: int = 0
    """Number of trials; a grid has as many as it has points."""
    objective: str = "on_the_way"
    """on_the_way: accuracy averaged over the tokens of the budget. final: accuracy at the end. Or the name of a metric of
    metrics.jsonl, whose last value is taken."""
    maximize: bool = True
    prune: bool = True
    """Whether a trial skips its last seeds once its interval excludes the best trial (sweep/racing.py)."""

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        return {
            name: values if isinstance(values, BaseDistribution) else CategoricalDistribution(values)
            for name, values in self.space.items()
        }

    def run_dir(self, trial: int, seed: int) -> Path:
        return Path(self.out) / "runs" / f"{trial:04d}-{seed}"

    def point_config(self, point: Point) -> Config:
        """The base config with the fields of a point. Raises ConfigError if the point breaks a rule between fields."""
        config = with_fields(self.base, point)
        check(config)
        return config

    def config(self, trial: int, point: Point, seed: int) -> Config:
        """The config of one run."""
        return dataclasses.replace(
            self.point_config(point), seed=seed, run_dir=str(self.run_dir(trial, seed)),
            init_from=self.cold_start(seed).run_dir, steps=MAX_STEPS, max_sampled_tokens=self.max_sampled_tokens,
        )  # fmt: skip

    def cold_start(self, seed: int) -> Config:
        """The config of the cold start that every trial of a seed begins with."""
        return shared_cold_start(self.base, self.cold_starts, self.out, seed)

    def possible(self, point: Point) -> bool:
        """Whether the point keeps the rules between fields."""
        try:
            self.point_config(point)
        except ConfigError:
            return False
        return True

    def planned_points(self) -> list[Point]:
        """The points of a grid or of a random sweep, in their order; impossible ones are left out. Empty for TPE, which
        chooses points during the sweep. Raises ConfigError when the space holds too few possible points."""
        if self.search == "tpe":
            return []
        if self.search == "grid":
            values = [distribution.choices for distribution in self._categorical().values()]
            points = [dict(zip(self.space, choice, strict=True)) for choice in itertools.product(*values)]
            points = [point for point in points if self.possible(point)]
            if not points:
                raise ConfigError(
                    "space: every point of the grid breaks a rule between fields (appo_jax/config/rules.py)"
                )
            return points
        drawn = (p for p in itertools.islice(self._draws(), MAX_DRAWS * self.trials) if self.possible(p))
        points = list(itertools.islice(drawn, self.trials))
        if len(points) < self.trials:
            raise ConfigError(
                f"space: only {len(points)} of {MAX_DRAWS * self.trials} random points keep the rules between fields, "
                f"{self.trials} are wanted: narrow the space, or lower `trials`"
            )
        return points

    def _categorical(self) -> dict[str, CategoricalDistribution]:
        found = {n: d for n, d in self.distributions.items() if isinstance(d, CategoricalDistribution)}
        if other := self.space.keys() - found.keys():
            raise ConfigError(f"space: {', '.join(sorted(other))}: a grid needs a tuple of values for every field")
        return found

    def _draws(self) -> Iterator[Point]:
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        while True:
            yield study.ask(self.distributions).params


def load_sweep(path: str | Path) -> Sweep:
    """The module-level `sweep` of a python file, checked.

    Raises ConfigError: no such file or no sweep in it, an unknown field, a field that the shared cold start depends on, a
    value of the wrong type, a space without a possible point.
    """
    sweep = read_variable(path, "sweep", Sweep)
    check_sweep(sweep)
    return sweep


def check_sweep(sweep: Sweep) -> None:
    """Raise ConfigError for a sweep that cannot be run or whose trials could not be compared."""
    if not sweep.space or not sweep.seeds:
        raise ConfigError("sweep: give at least one field in `space` and one seed in `seeds`")
    if len(set(sweep.seeds)) < len(sweep.seeds):
        raise ConfigError(f"seeds = {sweep.seeds}: a seed stands there twice")
    if sweep.max_sampled_tokens <= 0:
        raise ConfigError(f"max_sampled_tokens = {sweep.max_sampled_tokens}: the budget of a run must be above 0")
    if sweep.search != "grid" and sweep.trials <= 0:
        raise ConfigError(f"trials = {sweep.trials}: a {sweep.search} sweep needs their number")
    known = flatten(sweep.base)
    for name, values in sweep.space.items():
        if name not in known:
            raise ConfigError(f"space: {name!r} is not a field of the config")
        if name.startswith(COLD_START) or name in ("seed", "run_dir", "init_from", "steps", "max_sampled_tokens"):
            raise ConfigError(
                f"space: {name!r} cannot vary: all trials share their seeds, their budget and the cold start of each seed"
            )
        if isinstance(values, tuple):
            for value in values:
                with_fields(sweep.base, {name: value})  # raises for a value of the wrong type
    check(sweep.base)
    check_cold_starts(sweep.cold_starts, sweep.base, sweep.out)
    sweep.planned_points()
