"""What samples of a policy depend on, so that samples of two settings are never mixed in one file."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic_core

from appo_jax import __version__
from appo_jax.archive import entries
from appo_jax.config import Config
from appo_jax.config.effects import Affects, affects
from appo_jax.config_io import flatten
from appo_jax.data.source import makes_files


def provenance(config: Config, weights: Path | None, step: int | None = None) -> dict[str, Any]:
    """Everything of a policy and its tools that samples depend on, by name, in the types of JSON. step: None for the newest
    checkpoint of the run `weights`."""
    steps = [] if weights is None else [entry for entry in entries(weights) if entry.kind == "checkpoint"]
    if step is not None:
        steps = [entry for entry in steps if entry.path.parent.name == "rl" and entry.path.name == str(step)]
    newest = [f"{entry.path.parent.name}/{entry.path.name} of {time.ctime(entry.written)}" for entry in steps[-1:]]
    drawn_by = Affects.SAMPLES | Affects.ADDRESS
    setting = {
        "run": str(weights), "checkpoint": "".join(newest), "appo_jax": __version__, "files": _files(config),
    } | {name: value for name, value in flatten(config).items() if affects(name) & drawn_by}  # fmt: skip
    return json.loads(pydantic_core.to_json(setting))


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The names whose values differ in two settings, with both values. Empty: the settings are the same."""
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return ", ".join(f"{name} = {then.get(name)!r} (now {now.get(name)!r})" for name in names)


def _files(config: Config) -> dict[str, str]:
    """The number, size and time of the files behind each name that the config has: weights, tokenizer and chat template, the
    questions and corpus, and modules of tools and of data sources. A folder may be written again under its old name."""
    sources = [(part.source, part.path) for part in config.data.mixture] + [(config.data.source, config.data.path)]
    data = {path for source, path in sources if not makes_files(source)}  # else the first command may write them
    names = {config.policy.path, config.policy.tokenizer, config.tools.search.corpus, *data} - {None}
    paths = {str(name): Path(str(name)) for name in names}
    factories = [*config.tools.enabled, *(source for source, _ in sources)]
    for module in {name.partition(":")[0] for name in factories if ":" in name}:
        with contextlib.suppress(Exception, SystemExit):  # it imports the package; the error of its user says more
            if (spec := importlib.util.find_spec(module)) is not None and spec.origin is not None:
                paths[module] = Path(spec.origin)
    found = {}
    for name, path in sorted(paths.items()):
        facts = [file.stat() for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
        newest = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(max((fact.st_mtime for fact in facts), default=0)))
        found[name] = f"{len(facts)} files, {sum(fact.st_size for fact in facts)} bytes, newest of {newest}"
    return found
