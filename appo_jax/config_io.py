"""Reads, checks and writes configs. A person writes them as python files; a run stores them as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import runpy
import shlex
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import pydantic_core

from appo_jax import algorithms
from appo_jax import config as config_module
from appo_jax.config import Config, rules
from appo_jax.config.effects import EVERYTHING, Affects, affects
from appo_jax.errors import ConfigError, did_you_mean

T = TypeVar("T")

_ADAPTER = pydantic.TypeAdapter(Config)
# The names of the fields that are paths, in all parts of a config (`data`: the file of a set in `eval.sets`), a study and a sweep.
PATHS = (
    "run_dir", "init_from", "path", "tokenizer", "held_out", "evaluation", "traces", "corpus", "cache", "cache_fill", "data", "out",
    "cold_starts",
)  # fmt: skip


def load_config(path: str | Path) -> Config:
    """Read a config from a python file (its module-level `config`), from a .json written by `save_config`, or from the directory
    of a run, which holds its config.json.

    Every value is checked against its field's type and bounds. Raises ConfigError that names the file, the dotted field,
    what was given, what was expected and, for an unknown field, the nearest name. Rules between fields are not checked here
    but in `check`, because overrides may still change the fields.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix not in (".py", ".json"):
        raise ConfigError(f"{path}: expected a config file, which ends in .py or .json, or the directory of a run")
    if path.suffix == ".json":
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; give the directory of a run, or a config file")
        text = _read(path)
        if _is_of_weights(text):
            raise ConfigError(
                f"{path}: is the config of a model's weights, not of a run; give the directory of a run, or a config file with "
                f"policy.path = {str(path.parent)!r}"
            )
        return parse_config(text, str(path))
    return parse_config(_to_json(read_variable(path, "config", Config), f"{path}: "), str(path))


def _read(path: Path) -> bytes:
    """The content of a file. Raises ConfigError if the user may not read it, and OSError if its disk fails."""
    try:
        return path.read_bytes()
    except PermissionError as error:
        raise ConfigError(f"{path}: {error.strerror}; give this user permission to read it") from error


def _is_of_weights(text: bytes) -> bool:
    """Whether a config.json is that of a Hugging Face folder."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and bool(content.keys() & {"architectures", "model_type"})


def check(config: Config, trains: bool = False) -> Config:
    """Check a config against all types, bounds and rules between fields. All configs pass through this function.

    Values are converted to the declared types (a list becomes a tuple), and paths by `at_home`. The rules between fields are those
    of the config with the values that its algorithm sets; `trains`: and those that only training must keep. Raises ConfigError that
    lists every problem: the field, what was given, what was expected, what to do.
    """
    config = at_home(parse_config(_to_json(config)))
    name = f"algorithm = {config.algorithm!r}"
    used = parse_config(_to_json(algorithms.resolved(config)), name)
    problems = []
    for problem in rules.broken(used, trains):
        sets = ", ".join(field for field in algorithms.overwritten(config) if field in problem)
        problems.append(f"{problem} ({name} sets {sets})" if sets else problem)
    if problems := [*problems, *algorithms.broken(config)]:
        raise ConfigError.of(problems)
    return config


def at_home(value: T, is_path: bool = False) -> T:
    """A config, a study or a sweep with the user's home folder in place of each `~` that begins a path.

    `is_path`: a text is a path. Other values come back as they are: `check` says what is wrong with them."""
    new: Any = value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        new = dataclasses.replace(value, **{name: at_home(item, name in PATHS) for name, item in fields.items()})
    elif isinstance(value, Mapping):
        new = {name: at_home(item) for name, item in value.items()}
    elif isinstance(value, tuple | list):
        new = type(value)(at_home(item, is_path) for item in value)
    elif is_path and isinstance(value, str | Path):
        new = type(value)(os.path.expanduser(str(value)))
    return new


def require_own_folder(file: str | Path, config: Config) -> None:
    """Raises ConfigError if `file` is a run, or its config.json, and `config.run_dir` is another folder: the run was copied or
    moved, or its path was relative to another folder, and training would begin a new run there."""
    path = Path(file)
    folder = path if path.is_dir() else path.parent
    if path not in (folder, folder / "config.json") or not (folder / "checkpoints").is_dir():
        return
    given = Path(config.run_dir)
    if not (given.exists() and given.samefile(folder)):
        raise ConfigError(
            f"--config {file}: this run was copied or moved: its config has run_dir = {config.run_dir!r}, which is another folder; "
            f"to continue the run in this one, give --config {shlex.quote(str(file))} --run-dir {shlex.quote(str(folder))}; to "
            "begin a new run, give --run-dir NEW"
        )


def save_config(config: Config, path: str | Path) -> None:
    """Write `config` as JSON that `load_config` reads back to an equal config. Raises ConfigError if that is impossible."""
    Path(path).write_bytes(config_json(config, path))


def config_json(config: Config, path: str | Path) -> bytes:
    """What `save_config` writes to `path`. Raises ConfigError if it would not be read back as an equal config."""
    text = _to_json(config)
    if (back := parse_config(text, str(path))) != config:
        fields = ", ".join(diff_configs(config, back))
        raise ConfigError(f"{path}: these fields are not the same when they are read back from JSON: {fields}")
    return text + b"\n"


def diff_configs(a: Config, b: Config) -> list[str]:
    """Dotted names of the fields that differ, in the order of the fields."""
    left, right = flatten(a), flatten(b)
    return [name for name in {**left, **right} if left.get(name, ...) != right.get(name, ...)]


def changed_effects(a: Config, b: Config) -> dict[str, Affects]:
    """For each dotted name of `diff_configs`, what the change from `a` to `b` affects.

    A field of an optional group that only one of the configs has affects what the group does. Another path of the same cold start
    affects nothing."""
    left, right = flatten(a), flatten(b)
    effects = {}
    for name in diff_configs(a, b):
        group = name.rpartition(".")[0]  # has a name of its own in the config that leaves it out
        effect = affects(group if group in left or group in right else name)
        if effect is Affects.ADDRESS:
            effect = EVERYTHING if None in (left[name], right[name]) else Affects.NOTHING
        if name == "init_from" and _begin_alike(a, b):
            effect = Affects.NOTHING
        effects[name] = effect
    return effects


def _begin_alike(a: Config, b: Config) -> bool:
    """Whether two runs begin with the cold start in one folder, or in folders that lie alike to their `run_dir`: the folder of a
    study or a sweep was moved, with its runs and its cold starts, or is written in another way."""
    if a.init_from is None or b.init_from is None:
        return False
    if os.path.realpath(a.init_from) == os.path.realpath(b.init_from):
        return True
    return os.path.relpath(a.init_from, a.run_dir) == os.path.relpath(b.init_from, b.run_dir)


def flatten(config: Config) -> dict[str, Any]:
    """`{"branching.tau": 32.0, ...}`: all fields that are not groups of fields."""

    def walk(value: Any, prefix: str) -> Iterable[tuple[str, Any]]:
        for field in dataclasses.fields(value):
            name, item = prefix + field.name, getattr(value, field.name)
            if dataclasses.is_dataclass(item):
                yield from walk(item, name + ".")
            else:
                yield name, item

    return dict(walk(config, ""))


def with_fields(config: Config, values: Mapping[str, Any]) -> Config:
    """`config` with other values at dotted names. Raises ConfigError for an unknown field or a value of a wrong type."""
    record = json.loads(pydantic_core.to_json(config, inf_nan_mode="null"))
    for name, value in values.items():
        *parents, last = name.split(".")
        node = record
        for i, part in enumerate(parents, 1):
            if isinstance(node, dict) and node.get(part, ...) is None:
                raise ConfigError(f"{name}: the config has no {'.'.join(parents[:i])}; add it to the config first")
            node = node.get(part) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            raise ConfigError(f"{name} is not a field of the config")
        node[last] = value
    return parse_config(pydantic_core.to_json(record, inf_nan_mode="null"), "the config")


def read_variable(path: str | Path, name: str, kind: type[T]) -> T:
    """The module-level variable `name` of a python file, which must be of type `kind`.

    Raises ConfigError if the file does not exist or raises an error (with its line), or if the variable is missing or of
    another type.
    """
    path, wanted = Path(path), f"`{name} = {kind.__name__}(...)`"
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; give a .py file with {wanted}")
    variables = _run_python(path)
    if name not in variables:
        raise ConfigError(f"{path}: expected a module-level {wanted}, found no `{name}`")
    if not isinstance(value := variables[name], kind):
        raise ConfigError(f"{path}: expected a module-level {wanted}, found `{name}` of type {type(value).__name__}")
    return value


def _run_python(path: Path) -> dict[str, Any]:
    """The globals of an executed python file. Raises ConfigError with the file, the line and the error."""
    _read(path)
    try:
        return runpy.run_path(str(path))
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        file, line = str(path), frames[-1].lineno if frames else None
        # A mistake may be in this file, or in one that it imports.
        if isinstance(error, SyntaxError) and Path(error.filename or "").is_file():
            file, line = str(error.filename), error.lineno
        said = error.msg if isinstance(error, SyntaxError) else error
        message = f"{file}{f':{line}' if line else ''}: {type(error).__name__}: {said}"
        if file != str(path):
            message += f" (imported by {path})"
        if unknown := re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error)):
            owner = getattr(config_module, unknown[1], None)
            message += _nearest(unknown[2], [f.name for f in dataclasses.fields(owner)] if owner else [])
        raise ConfigError(message) from error


def _to_json(config: Config, source: str = "") -> bytes:
    """A config as JSON, before any check. `source`: the file in errors. Raises ConfigError for a value that JSON cannot hold."""
    try:
        return pydantic_core.to_json(config, indent=2, inf_nan_mode="constants")
    except pydantic_core.PydanticSerializationError as error:
        problems = [
            f"{source}{name} = {value!r}: expected a plain number, text, list or table, not a value of type {type(value).__name__}"
            for name, value in flatten(config).items()
            if not _is_plain(value)
        ]
        raise ConfigError.of(problems or [f"{source}{error}"]) from error


def _is_plain(value: Any) -> bool:
    """Whether JSON can hold a value."""
    try:
        pydantic_core.to_json(value)
    except pydantic_core.PydanticSerializationError:
        return False
    return True


def parse_config(text: str | bytes, source: str | None = None) -> Config:
    """The config in a JSON text, checked field by field. `source`: the file of the text, for errors."""
    try:
        return _ADAPTER.validate_json(text)
    except pydantic.ValidationError as error:
        prefix = "" if source is None else f"{source}: "
        raise ConfigError.of([prefix + _explain(problem) for problem in error.errors()]) from error


def _explain(problem: pydantic_core.ErrorDetails) -> str:
    """The message for one problem: dotted field, what was given, what was expected, nearest field."""
    # If a part may have several types, pydantic adds the type to the path: policy.architecture.rope_scaling.yarn.factor.
    path = [
        part for part, before in zip(problem["loc"], (None, *problem["loc"]), strict=False) if before != "rope_scaling"
    ]
    *parents, name = path or ("the file",)
    field = ".".join(map(str, path)) or "the file"
    if problem["type"] == "json_invalid":
        return f"not valid JSON: {problem['ctx']['error']}"
    if problem["type"] == "unexpected_keyword_argument":
        return f"{field} is not a field of the config" + _nearest(str(name), _fields_at(parents))
    if problem["type"] == "missing":
        return f"{field} is missing and has no default"
    expected = problem["msg"].removeprefix("Input ")
    return f"{field} = {problem['input']!r}: {expected}"


def _fields_at(parents: Iterable[str | int]) -> list[str]:
    """Names of the fields that the schema has under the dotted path `parents`."""
    schema = _ADAPTER.json_schema()
    node = schema
    for part in [None, *parents]:
        node = node if part is None else node.get("properties", {}).get(part, {})
        for option in [node, *node.get("anyOf", [])]:
            if "$ref" in option:
                node = schema["$defs"][option["$ref"].rsplit("/", 1)[-1]]
    return list(node.get("properties", {}))


def _nearest(name: str, known: list[str]) -> str:
    return f"; {did_you_mean(name, known)}" if known else ""
