"""A study: arms × seeds at an equal budget of sampled tokens, read from a python file."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from appo_jax.config import Config
from appo_jax.config_io import check, diff_configs, flatten, load_config, read_variable
from appo_jax.errors import ConfigError

# More steps than any budget of tokens lasts: the budget is what ends a run.
MAX_STEPS = 100_000
# Data sources that make their own questions, and whose tokenizer is trained on them.
GENERATED = ("world", "decisions")
# What a cold start depends on; all arms of a study share it.
COLD_START = ("policy.", "data.", "sft.", "tools.", "eval.num_prompts", "rollout.max_")


def lacks_tokenizer(config: Config) -> bool:
    """Whether the run's tokenizer must still be trained on its generated world (`appo-jax data world`)."""
    return config.data.source in GENERATED and not Path(str(config.policy.tokenizer)).exists()


@dataclasses.dataclass(frozen=True)
class Study:
    """Arms by name; the others are compared with the first one."""

    out: str
    arms: Mapping[str, Config]
    seeds: tuple[int, ...]
    max_sampled_tokens: int
    cold_starts: tuple[str, ...] = ()
    """Folders of the cold starts that the seeds begin with, in turn; they are made where they are not there yet. Other
    studies may share them. (): every seed makes its own."""

    @property
    def baseline(self) -> str:
        return next(iter(self.arms))

    def run_dir(self, arm: str, seed: int) -> Path:
        return Path(self.out) / "runs" / f"{arm}-{seed}"

    def cold_start(self, seed: int) -> Config:
        """The config of the cold start that every arm of a seed begins with."""
        return shared_cold_start(self.arms[self.baseline], self.cold_starts, self.out, seed)

    def config(self, arm: str, seed: int) -> Config:
        """The config of one run."""
        return dataclasses.replace(
            self.arms[arm], seed=seed, run_dir=str(self.run_dir(arm, seed)),
            init_from=self.cold_start(seed).run_dir, steps=MAX_STEPS, max_sampled_tokens=self.max_sampled_tokens,
        )  # fmt: skip


def shared_cold_start(first: Config, folders: tuple[str, ...], out: str, seed: int) -> Config:
    """The config of the cold start that the runs of a seed begin with: the seed's own one in `out`, or one of `folders`, in
    turn. That of the k-th folder has seed k; what another study has begun there goes on with its config.

    Raises ConfigError where a folder holds a cold start that differs in what it depends on.
    """
    if not folders:
        return dataclasses.replace(first, seed=seed, run_dir=str(Path(out) / "runs" / f"cold-{seed}"))
    index = seed % len(folders)
    wanted = dataclasses.replace(first, seed=index, run_dir=folders[index])
    file = Path(wanted.run_dir) / "config.json"
    if not file.exists():
        return wanted
    begun = dataclasses.replace(load_config(file), run_dir=wanted.run_dir)
    if different := [name for name in diff_configs(begun, wanted) if name.startswith((*COLD_START, "seed"))]:
        raise ConfigError(
            f"cold_starts: the run in {wanted.run_dir} differs in {', '.join(different)}; give another folder, or delete it"
        )
    return begun


def check_cold_starts(folders: tuple[str, ...], config: Config, out: str) -> None:
    """Raise ConfigError where it is not clear which cold start a run begins with, or where a folder holds another one."""
    if config.init_from is not None:
        raise ConfigError(
            f"init_from = {config.init_from!r}: the runs begin with cold starts of their own; to begin with that one, write "
            f"cold_starts=({config.init_from!r},)"
        )
    if len({Path(folder).name for folder in folders}) < len(folders):
        raise ConfigError(f"cold_starts = {folders}: two folders have one name")
    for seed in range(len(folders)):
        shared_cold_start(config, folders, out, seed)


def load_study(path: str | Path) -> Study:
    """The module-level `study` of a python file, checked.

    Raises ConfigError: no such file or no study in it, nothing to run, arms of different cold starts (with the fields),
    or an arm whose config breaks a rule.
    """
    study = read_variable(path, "study", Study)
    check_study(study)
    return study


def check_study(study: Study) -> None:
    """Raise ConfigError for a study that cannot be run or would not be a fair comparison."""
    if not study.arms or not study.seeds:
        raise ConfigError("study: give at least one arm and one seed")
    if study.max_sampled_tokens <= 0:
        raise ConfigError(
            f"max_sampled_tokens = {study.max_sampled_tokens}: the budget of a run must be greater than 0"
        )
    first = flatten(study.arms[study.baseline])
    for name, config in study.arms.items():
        if not re.fullmatch(r"\w+", name) or name == "cold":
            raise ConfigError(f"study: arm {name!r}: a name is made of letters, digits and _, and 'cold' is taken")
        try:
            check(config)
        except ConfigError as error:
            raise ConfigError(f"arm {name!r}: {error}") from error
        fields = flatten(config)
        different = [f for f in {**first, **fields} if f.startswith(COLD_START) and first.get(f) != fields.get(f)]
        if different:
            raise ConfigError(
                f"arm {name!r} differs from {study.baseline!r} in {', '.join(different)}: all arms begin with the same "
                "cold start and are judged alike"
            )
    check_cold_starts(study.cold_starts, study.arms[study.baseline], study.out)
