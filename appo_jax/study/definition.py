"""The definition of a study, read from a python file: arms × seeds, each run with the same budget of sampled tokens."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from appo_jax.config import Config
from appo_jax.config.effects import Affects, shared_by_runs
from appo_jax.config_io import at_home, changed_effects, check, flatten, load_config, read_variable, with_fields
from appo_jax.errors import ConfigError
from appo_jax.metrics import read_summary

# More steps than any run makes, so that the budget of tokens ends a run.
MAX_STEPS = 100_000


@dataclasses.dataclass(frozen=True)
class Study:
    """The runs to compare: every arm with every seed."""

    out: str
    """Folder of the study: its runs and its report."""
    arms: Mapping[str, Config]
    """Configs by name. The first arm is the baseline, with which the others are compared."""
    seeds: tuple[int, ...]
    """Seeds of every arm. Runs of the same seed begin with the same cold start, so comparisons are paired."""
    max_sampled_tokens: int
    """Budget of one run. A run ends with the first step that reaches it."""
    cold_starts: tuple[str, ...] = ()
    """Folders of cold starts. Seed s uses the folder at index s modulo their number. A missing cold start is made. Other
    studies and sweeps may share the folders. (): every seed makes its own cold start in `out`."""

    @property
    def baseline(self) -> str:
        """The name of the first arm."""
        return next(iter(self.arms))

    def run_dir(self, arm: str, seed: int) -> Path:
        """The run directory of one run."""
        return Path(self.out) / "runs" / f"{arm}-{seed}"

    def finished(self, arm: str, seed: int) -> bool:
        """Whether a run has used its budget and has its final evaluation."""
        summary = read_summary(self.run_dir(arm, seed))
        return summary is not None and summary["sampled_tokens"] >= self.max_sampled_tokens

    def cold_start(self, seed: int) -> Config:
        """The config of the cold start with which all arms of a seed begin."""
        return shared_cold_start(self.arms[self.baseline], self.cold_starts, self.out, seed)

    def config(self, arm: str, seed: int) -> Config:
        """The config of one run."""
        return dataclasses.replace(
            self.arms[arm], seed=seed, run_dir=str(self.run_dir(arm, seed)),
            init_from=self.cold_start(seed).run_dir, steps=MAX_STEPS, max_sampled_tokens=self.max_sampled_tokens,
        )  # fmt: skip


def shared_cold_start(first: Config, folders: tuple[str, ...], out: str, seed: int) -> Config:
    """The config of the cold start with which the runs of `seed` begin.

    Without `folders`, it is a cold start in `out` with this seed. Otherwise it is the cold start in the folder at index
    `seed` modulo their number, whose seed is this index. A cold start that was begun with another arm, or by another study, goes
    on with that one's fields of the training steps, on which it does not depend.

    Raises ConfigError if a given folder holds a cold start that differs from the config `first` in a field on which it depends.
    """
    if not folders:
        wanted = dataclasses.replace(first, seed=seed, run_dir=str(Path(out) / "runs" / f"cold-{seed}"))
        with contextlib.suppress(ConfigError):  # `sft` says what is wrong, unless it can begin again
            return _as_begun(wanted)
        return wanted
    index = seed % len(folders)
    return _as_begun(dataclasses.replace(first, seed=index, run_dir=folders[index]))


def _as_begun(wanted: Config) -> Config:
    """`wanted` with the fields that a cold start in its `run_dir` may not change and does not depend on. Raises ConfigError if its
    config cannot be read, or differs in a field on which a cold start depends."""
    file = Path(wanted.run_dir) / "config.json"
    if not file.exists():
        return wanted
    existing = load_config(file)
    effects = changed_effects(existing, wanted)
    if different := [name for name, effect in effects.items() if effect & (Affects.COLD_START | Affects.ACCURACY)]:
        raise ConfigError(
            f"cold_starts: the run in {wanted.run_dir} differs in {', '.join(different)}; give another folder, or delete the run"
        )
    fixed = [name for name, effect in effects.items() if effect & Affects.STEP or name == "eval.sets"]
    return with_fields(wanted, {name: flatten(existing)[name] for name in fixed})


def check_runs(out: str, seeds: tuple[int, ...], max_sampled_tokens: int, cold_starts: tuple[str, ...]) -> None:
    """Raise ConfigError if runs cannot have this folder, these seeds, this budget and these cold starts: a value of another
    type or out of its bounds, or a seed that is given twice."""
    if not isinstance(out, str | Path) or not str(out):
        raise ConfigError(f"out = {out!r}: expected the folder of the runs")
    if not isinstance(seeds, tuple | list) or not all(type(seed) is int and 0 <= seed < 2**31 for seed in seeds):
        raise ConfigError(
            f"seeds = {seeds!r}: expected a tuple of whole numbers from 0 to {2**31 - 1}, such as (0, 1, 2)"
        )
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds = {seeds}: a seed is given twice; give every seed once")
    if type(max_sampled_tokens) is not int or max_sampled_tokens <= 0:
        raise ConfigError(
            f"max_sampled_tokens = {max_sampled_tokens!r}: expected the budget of a run, a whole number greater than 0, such as "
            "2_000_000"
        )
    if not isinstance(cold_starts, tuple | list) or not all(isinstance(folder, str) for folder in cold_starts):
        raise ConfigError(f'cold_starts = {cold_starts!r}: expected a tuple of folders, such as ("runs/cold",)')


def check_cold_starts(folders: tuple[str, ...], config: Config, out: str, run_names: str) -> None:
    """Raise ConfigError if a run could begin with two cold starts, if a folder holds a cold start of another kind, or if two
    folders, or a folder and a run, have one name. `run_names`: regular expression of the names of runs."""
    if config.init_from is not None:
        raise ConfigError(
            f"init_from = {config.init_from!r}: expected None, because each seed begins with a cold start of its own; to begin "
            f"with this run, write cold_starts=({config.init_from!r},)"
        )
    names = [Path(folder).name for folder in folders]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"cold_starts = {folders}: the last parts of two paths are equal, but config files and logs are named by them; "
            "rename one of the folders"
        )
    if taken := [name for name in names if re.fullmatch(f"world|{run_names}", name)]:
        raise ConfigError(
            f"cold_starts = {folders}: {taken[0]!r} is the name of a run here, and config files and logs are named by it; "
            "rename the folder"
        )
    for seed in range(len(folders)):
        shared_cold_start(config, folders, out, seed)


def load_study(path: str | Path, arms: Sequence[str] = (), seeds: tuple[int, ...] = ()) -> Study:
    """The module-level variable `study` of a python file, with `arms` and `seeds` alone if they are given; checked.

    Raises ConfigError if the file does not exist, has no study or not all of these arms, and for the reasons of `check_study`.
    """
    study = at_home(read_variable(path, "study", Study))
    check_study(study)
    if unknown := [arm for arm in arms if arm not in study.arms]:
        raise ConfigError(f"--arms {unknown[0]}: not an arm of {path}; it has {', '.join(study.arms)}")
    chosen = dataclasses.replace(
        study, arms={arm: study.arms[arm] for arm in arms or study.arms}, seeds=seeds or study.seeds
    )
    check_study(chosen)
    return chosen


def check_study(study: Study) -> None:
    """Raise ConfigError if a study cannot be run, or if its arms cannot be compared.

    That is: it has no arm or no seed, no budget, an arm whose name is not permitted or whose config breaks a rule, arms that
    need different cold starts or are evaluated differently, or seeds, a budget or cold starts that `check_runs` or
    `check_cold_starts` refuses. The config of every run is built and checked.
    """
    if not isinstance(study.arms, Mapping) or not all(isinstance(config, Config) for config in study.arms.values()):
        raise ConfigError(f'arms = {study.arms!r:.80}: expected configs by name, such as {{"appo": Config(...)}}')
    if not study.arms or not study.seeds:
        raise ConfigError(
            f"study: it has {len(study.arms)} arms and {len(study.seeds)} seeds; give at least one arm and one seed"
        )
    check_runs(study.out, study.seeds, study.max_sampled_tokens, study.cold_starts)
    for name, config in study.arms.items():
        if not isinstance(name, str) or not re.fullmatch(r"\w+", name) or name == "cold":
            raise ConfigError(
                f"study: arm {name!r}: expected a name of letters, digits and _, but not 'cold', the name of the cold starts; "
                "rename the arm"
            )
        try:
            check(config, trains=True)
        except ConfigError as error:
            raise ConfigError(f"arm {name!r}: {error}") from error
        effects = changed_effects(study.arms[study.baseline], config)
        if different := [name for name, effect in effects.items() if shared_by_runs(effect)]:
            raise ConfigError(
                f"arm {name!r} differs from {study.baseline!r} in {', '.join(different)}: all arms of a study "
                "share the cold start and the evaluation; give these fields the same value in all arms"
            )
    run_names = rf"({'|'.join(study.arms)})-\d+"
    check_cold_starts(study.cold_starts, study.arms[study.baseline], study.out, run_names)
    for seed in study.seeds:
        check(study.cold_start(seed), trains=True)
        for name in study.arms:
            check(study.config(name, seed), trains=True)


def check_kept_runs(study: Study) -> None:
    """Raise ConfigError if a run that the study's folder holds was made with another config than its arm has now, or does not say
    with which: its results would be reported as those of the arm. A change of fields that affect nothing, or only rounding, may
    stay.

    The config.json of a run that is not finished may be damaged: the run writes it again when it goes on.
    """
    problems = []
    for arm, seed in itertools.product(study.arms, study.seeds):
        folder = study.run_dir(arm, seed)
        if not (folder / "config.json").exists():
            continue
        try:
            effects = changed_effects(load_config(folder / "config.json"), study.config(arm, seed))
        except ConfigError as error:
            if study.finished(arm, seed):
                problems.append(f"{error}; put the file back, or remove {folder} to make the run again")
            continue
        if different := [name for name, effect in effects.items() if effect not in (Affects.NOTHING, Affects.ROUNDING)]:
            problems.append(
                f"arm {arm!r}: the run in {folder} was made with other values of {', '.join(different)}; give them back to the "
                "arm, give another `out`, or remove that run to make it again"
            )
    if problems:
        raise ConfigError.of(problems)
