"""The definition of a sweep, read from a python file: a base config, a space of fields to vary, an objective and a budget."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution

from appo_jax.algorithms import overwritten
from appo_jax.config import Config
from appo_jax.config.effects import affects, shared_by_runs
from appo_jax.config_io import at_home, check, flatten, read_variable, with_fields
from appo_jax.errors import ConfigError
from appo_jax.study.definition import MAX_STEPS, check_cold_starts, check_runs, shared_cold_start
from appo_jax.sweep.unused import unused

optuna.logging.set_verbosity(optuna.logging.WARNING)

Search = Literal["grid", "random", "tpe"]
OBJECTIVES = ("on_the_way", "final")  # other objectives are names of metrics
Point = dict[str, Any]  # a value for every field of the space

# At most this many random points are drawn per trial. A sweep is refused if too few different ones keep the rules between fields.
MAX_DRAWS = 200
SET_FOR_EACH_RUN = ("seed", "run_dir", "init_from", "steps", "max_sampled_tokens")  # fields that a space cannot have


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Trials of one base config. Each trial is a point of the space, run with every seed."""

    out: str
    """Folder of the sweep: its storage, runs and report. Workers on several machines share it."""
    base: Config
    space: Mapping[str, tuple[Any, ...] | BaseDistribution]
    """Dotted name of a config field -> its values, or an Optuna distribution (not for a grid)."""
    seeds: tuple[int, ...]
    """Seeds of every trial. Runs of the same seed begin with the same cold start, so comparisons are paired."""
    max_sampled_tokens: int
    """Budget of one run. A run ends with the first step that reaches it."""
    cold_starts: tuple[str, ...] = ()
    """Folders of cold starts. Seed s uses the folder at index s modulo their number. A missing cold start is made. Studies
    and other sweeps may share the folders. (): every seed makes its own cold start in `out`."""
    search: Search = "grid"
    """grid: every point of the space. random: `trials` points, drawn with a fixed seed. tpe: `trials` points that Optuna's TPE
    sampler chooses from the results so far. No two trials have the same runs (`form`)."""
    trials: int = 0
    """Number of trials. A grid ignores it: it has one trial per point."""
    objective: str = "on_the_way"
    """on_the_way: held-out accuracy averaged over the tokens of the budget. final: held-out accuracy at the end. Otherwise the
    name of a metric in metrics.jsonl, such as reward/initial, of which the last value counts."""
    maximize: bool = True
    """Whether higher values of the objective are better."""
    prune: bool = True
    """Whether a trial skips its last seeds when it is significantly worse than the best trial (sweep/racing.py)."""

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """The space as Optuna distributions: a tuple of values is a categorical distribution."""
        return {
            name: values if isinstance(values, BaseDistribution) else CategoricalDistribution(values)
            for name, values in self.space.items()
        }

    def run_dir(self, trial: int, seed: int) -> Path:
        """The run directory of one run."""
        return Path(self.out) / "runs" / f"{trial:04d}-{seed}"

    def point_config(self, point: Point) -> Config:
        """The base config with the fields of a point. Raises ConfigError if the point breaks a rule between fields, or if its
        algorithm sets one of the fields to another value, so that it would be the trial of that value."""
        config = with_fields(self.base, point)
        check(config, trains=True)
        for name, sets in overwritten(config).items():
            if name in point:
                raise ConfigError(
                    f"space: {name} = {point[name]!r} is not used, because algorithm = {config.algorithm!r} sets it to {sets!r}; "
                    "remove it from `space`"
                )
        return config

    def config(self, trial: int, point: Point, seed: int) -> Config:
        """The config of one run. Raises ConfigError if the point breaks a rule between fields."""
        return dataclasses.replace(
            self.point_config(point), seed=seed, run_dir=str(self.run_dir(trial, seed)),
            init_from=self.cold_start(seed).run_dir, steps=MAX_STEPS, max_sampled_tokens=self.max_sampled_tokens,
        )  # fmt: skip

    def cold_start(self, seed: int) -> Config:
        """The config of the cold start with which all trials begin their runs of a seed."""
        return shared_cold_start(self.base, self.cold_starts, self.out, seed)

    def possible(self, point: Point) -> bool:
        """Whether the point keeps the rules between fields."""
        try:
            self.point_config(point)
        except ConfigError:
            return False
        return True

    def form(self, point: Point) -> frozenset[tuple[str, Any]]:
        """The values of a point without those that have no effect there. Points of one form have the same runs."""
        without = unused(with_fields(self.base, point))
        return frozenset((name, value) for name, value in point.items() if name not in without)

    def queued_points(self) -> list[Point]:
        """The points of a grid or of a random sweep, in their order: the first of each form, without points that break a rule.

        Empty for TPE, which chooses points during the sweep. Raises ConfigError if no point of a grid keeps the rules, if a grid
        has a field without a tuple of values or without any effect, or for the reason of `random_points`.
        """
        if self.search == "tpe":
            return []
        if self.search == "random":
            return self.random_points()
        values = [distribution.choices for distribution in self._categorical().values()]
        points = list(
            self._different(dict(zip(self.space, choice, strict=True)) for choice in itertools.product(*values))
        )
        if not points:
            raise ConfigError(
                "space: every point of the grid breaks a rule between fields (appo_jax/config/rules.py); give other values"
            )
        effective = {name for point in points for name, _ in self.form(point)}
        if idle := [name for name in self.space if name not in effective]:
            raise ConfigError(
                f"space: {', '.join(idle)}: without effect at every point of the grid, because of the algorithm or of other fields "
                "(appo_jax/sweep/unused.py); remove it from `space`"
            )
        return points

    def random_points(self) -> list[Point]:
        """`trials` points of different forms that keep the rules between fields, the same for every call; for more trials, these
        come first.

        Raises ConfigError if there are fewer.
        """
        draws = itertools.islice(self._draws(), MAX_DRAWS * self.trials)
        points = list(itertools.islice(self._different(draws), self.trials))
        if len(points) < self.trials:
            raise ConfigError(
                f"trials = {self.trials}: only {len(points)} different points that keep the rules between fields were found in "
                f"{MAX_DRAWS * self.trials} random ones (those that differ only in fields without effect there are one); lower "
                "`trials`, or widen the space"
            )
        return points

    def _different(self, points: Iterable[Point]) -> Iterator[Point]:
        """The first point of each form, without points that break a rule."""
        seen, forms = set[tuple[Any, ...]](), set[frozenset[tuple[str, Any]]]()
        for point in points:
            if (values := tuple(point.values())) in seen:
                continue
            seen.add(values)
            if self.possible(point) and (form := self.form(point)) not in forms:
                forms.add(form)
                yield point

    def _categorical(self) -> dict[str, CategoricalDistribution]:
        found = {n: d for n, d in self.distributions.items() if isinstance(d, CategoricalDistribution)}
        if others := self.space.keys() - found.keys():
            raise ConfigError(
                f"space: {', '.join(sorted(others))}: a grid needs a tuple of values for every field; give one, or another `search`"
            )
        return found

    def _draws(self) -> Iterator[Point]:
        """An endless sequence of random points, the same for every call and every order of the fields. Points may come again."""
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        distributions = dict(sorted(self.distributions.items()))
        while True:
            params = study.ask(distributions).params
            yield {name: params[name] for name in self.space}


def load_sweep(path: str | Path) -> Sweep:
    """The module-level variable `sweep` of a python file, checked.

    Raises ConfigError if the file does not exist or has no sweep, and for the reasons of `check_sweep`.
    """
    sweep = at_home(read_variable(path, "sweep", Sweep))
    check_sweep(sweep)
    return sweep


def check_sweep(sweep: Sweep) -> None:
    """Raise ConfigError if a sweep cannot be run, or if its trials cannot be compared.

    That is: it has no field, no seed, the same seed twice, no budget or no number of trials; its objective is no metric, or the
    accuracy on the way, and nothing is evaluated there; the space has an unknown field, a field of the cold start or of the
    evaluation, a field without effect, a value of the wrong type or too few points that keep the rules between fields; the base
    config breaks a rule; or `check_cold_starts` refuses the cold starts.
    """
    if not isinstance(sweep.space, Mapping):
        raise ConfigError(
            f'space = {sweep.space!r:.80}: expected values by field, such as {{"branching.tau": (16.0, 32.0)}}'
        )
    if not sweep.space or not sweep.seeds:
        raise ConfigError(
            f"sweep: `space` has {len(sweep.space)} fields and `seeds` has {len(sweep.seeds)}; give at least one field and one seed"
        )
    check_runs(sweep.out, sweep.seeds, sweep.max_sampled_tokens, sweep.cold_starts)
    if sweep.search not in get_args(Search):
        raise ConfigError(f"search = {sweep.search!r}: expected {', '.join(get_args(Search))}")
    if sweep.search != "grid" and (type(sweep.trials) is not int or sweep.trials <= 0):
        raise ConfigError(
            f"trials = {sweep.trials!r}: search = {sweep.search!r} needs the number of trials, at least 1"
        )
    _check_space(sweep)
    _check_objective(sweep)
    if sweep.objective == "on_the_way" and sweep.base.eval.every == 0:
        raise ConfigError(
            "eval.every = 0: the objective is 'on_the_way', the accuracy averaged over a run, but nothing is evaluated on the way; "
            "set eval.every in `base`, such as 1, or objective='final'"
        )
    check(sweep.base, trains=True)
    if "algorithm" not in sweep.space:
        _check_used(sweep)
    check_cold_starts(sweep.cold_starts, sweep.base, sweep.out, r"trial-\d+|\d{4,}-\d+")
    if sweep.search == "tpe":
        sweep.random_points()  # there are enough points
    sweep.queued_points()
    for seed in sweep.seeds:
        check(sweep.cold_start(seed), trains=True)
        check(sweep.config(0, {}, seed), trains=True)


def _check_objective(sweep: Sweep) -> None:
    """Raise ConfigError for an objective that no run has, and for another value than True or False in `maximize` and `prune`."""
    if not isinstance(sweep.objective, str) or ("/" not in sweep.objective and sweep.objective not in OBJECTIVES):
        raise ConfigError(
            f"objective = {sweep.objective!r}: expected {', '.join(map(repr, OBJECTIVES))} or the name of a metric in "
            "metrics.jsonl, which has a '/', such as 'reward/initial'"
        )
    for name in ("maximize", "prune"):
        if not isinstance(value := getattr(sweep, name), bool):
            raise ConfigError(f"{name} = {value!r}: expected True or False")


def _check_space(sweep: Sweep) -> None:
    """Raise ConfigError for a field that cannot vary, and for values that the field cannot have."""
    known = flatten(sweep.base)
    for name, values in sweep.space.items():
        if name not in known:
            raise ConfigError(
                f"space: {name!r} is not a field of the config; give dotted names such as 'branching.tau'"
            )
        if name in SET_FOR_EACH_RUN or shared_by_runs(affects(name)):
            raise ConfigError(
                f"space: {name!r} cannot vary, because all trials share their seeds, their budget, the cold start of each seed and "
                "the evaluation; remove it from `space`"
            )
        if isinstance(values, CategoricalDistribution):
            values = values.choices
        elif isinstance(values, BaseDistribution):
            continue
        if not isinstance(values, tuple | list) or not values:
            raise ConfigError(
                f"space: {name!r}: {values!r} given; expected a tuple of values, or an Optuna distribution"
            )
        for value in values:
            # The journal stores values as JSON, which gives a tuple back as a list.
            if not isinstance(value, None | bool | int | float | str):
                raise ConfigError(
                    f"space: {name!r}: {value!r} given; expected numbers, texts, True, False or None; compare other values as "
                    "arms of a study"
                )
        # Of the types of the field, so that 1 and 1.0 are one value. Raises for a value of the wrong type.
        used = [flatten(with_fields(sweep.base, {name: value}))[name] for value in values]
        if len(set(used)) < len(used):
            raise ConfigError(f"space: {name!r}: {values!r} has a value twice; give every value once")


def _check_used(sweep: Sweep) -> None:
    """Raise ConfigError for a field of the space whose value the algorithm sets: its trials would be the same."""
    distribution: Any  # its values, or its bounds
    for name, distribution in sweep.distributions.items():
        for value in getattr(distribution, "choices", None) or (distribution.low, distribution.high):
            config = with_fields(sweep.base, {name: value})
            if name in (sets := overwritten(config)):
                raise ConfigError(
                    f"space: {name} = {value!r} is not used, because algorithm = {config.algorithm!r} sets it to {sets[name]!r}; "
                    "remove it from `space`"
                )
