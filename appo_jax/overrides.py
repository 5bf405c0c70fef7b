"""Sets fields of a config from the command line, by dotted names: `--branching.num-branch-points 2`."""

from __future__ import annotations

import dataclasses
import itertools
import os
import typing
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import tyro

from appo_jax.config import Config
from appo_jax.errors import ConfigError, did_you_mean


def override(config: Config, args: Sequence[str], prog: str, description: str) -> Config:
    """`config` with the fields set that `args` give. A wrong argument ends the process with code 2, `--help` with code 0.

    A field of an optional part that `config` lacks (`--policy.architecture.width 64`) adds the part; the part's fields without a
    default must then be given too. `--policy.architecture None` removes an optional part. Raises ConfigError for a field that
    such a part does not have.
    """
    args, parts, absent = list(args), list(_optional_parts(Config, ())), []
    for path, part in parts:
        option, fields = _option(path), _names(part)
        if not _has(config, path):
            absent.append(f"{option}.{{{','.join(fields).replace('_', '-')}}}")
        if not _has(config, path[:-1]):
            continue
        if (named := _position(args, option)) is not None:
            config, args = _replaced(config, path, None), args[:named] + args[named + 2 :]
        elif _get(config, path) is None and (given := _given(args, option)):
            known = [name for other, kind in parts if other == path for name in _names(kind)]
            for name in sorted(given - set(known)):
                raise ConfigError(f"{option}.{name} is not a field of the config; {did_you_mean(name, known)}")
            if not given <= set(fields):
                continue  # fields of another type of this part, or of both, which tyro reports
            required = [f.name for f in dataclasses.fields(part) if f.default is dataclasses.MISSING]
            config = _replaced(config, path, part(**dict.fromkeys(required, tyro.MISSING)))
    if absent:
        description += f" Parts that this config does not have, and that any of their fields adds: {'; '.join(absent)}."
    options = (tyro.conf.AvoidSubcommands,)
    with warnings.catch_warnings():  # tyro warns of `Annotated[A | B, …] | None`, although it reads it correctly
        warnings.filterwarnings("ignore", module="tyro")
        return tyro.cli(Config, prog=prog, description=description, args=args, default=config, config=options)


def split_dotted(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """(a command's own arguments, the dotted overrides of a config among them with their values)."""
    own: list[str] = []
    dotted: list[str] = []
    chosen = own
    for arg in args:
        if arg.startswith("--"):
            chosen = dotted if "." in arg.partition("=")[0] else own
        chosen.append(arg)
    return own, dotted


def names_field(args: Sequence[str], field: str) -> bool:
    """Whether the arguments set the field with this dotted name."""
    return any(arg.replace("_", "-").partition("=")[0] == _option(field.split(".")) for arg in args)


def expand_home(arg: str) -> str:
    """An argument with the user's home folder in place of a `~` that begins its value. The shell leaves it in `--out=~/r` and in
    quotes."""
    option, equals, value = arg.partition("=") if arg.startswith("--") else ("", "", arg)
    return option + equals + (os.path.expanduser(value) if value == "~" or value.startswith("~/") else value)


def _optional_parts(cls: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The path and class of every part of the config that may be None; outer parts come first."""
    for name, hint in typing.get_type_hints(cls).items():
        for option in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(option):
                if option is not hint:
                    yield (*path, name), option
                yield from _optional_parts(option, (*path, name))


def _option(path: Sequence[str]) -> str:
    return "--" + ".".join(path).replace("_", "-")


def _names(part: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(part)]


def _given(args: Sequence[str], option: str) -> set[str]:
    """The fields of a part that `args` set."""
    dashed = [arg.replace("_", "-").split("=")[0] for arg in args]
    return {
        arg.removeprefix(option + ".").split(".")[0].replace("-", "_") for arg in dashed if arg.startswith(option + ".")
    }


def _position(args: Sequence[str], option: str) -> int | None:
    """The index of `option None` in the arguments."""
    pairs = itertools.pairwise(args)
    return next((i for i, (a, b) in enumerate(pairs) if a.replace("_", "-") == option and b == "None"), None)


def _get(config: Any, path: Sequence[str]) -> Any:
    for name in path:
        config = getattr(config, name)
    return config


def _has(config: Any, path: Sequence[str]) -> bool:
    """Whether none of the parts on a path is None."""
    return all(_get(config, path[:i]) is not None for i in range(1, len(path) + 1))


def _replaced(config: Any, path: Sequence[str], value: Any) -> Any:
    first, *rest = path
    return dataclasses.replace(config, **{first: _replaced(getattr(config, first), rest, value) if rest else value})
