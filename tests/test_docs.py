"""The fields, functions and defaults that the documents name must exist."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest

import appo_jax
from appo_jax.config import Config, JudgeConfig, PolicyConfig, RewardConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
CONFIG = Config(policy=PolicyConfig(path="x"), reward=RewardConfig(judge=JudgeConfig("http://x", "m")))
FILES = ("py", "md", "json", "jsonl", "png", "parquet", "sqlite")
PARTS = {f.name for f in dataclasses.fields(Config) if dataclasses.is_dataclass(getattr(CONFIG, f.name))}
MODULES = {name.removeprefix("appo_jax.") for _, name, _ in pkgutil.walk_packages(appo_jax.__path__, "appo_jax.")}


def field(path: str) -> Any:
    """The value of a config field. Raises AttributeError where there is none."""
    value: Any = CONFIG
    for name in path.split("."):
        value = getattr(value, name)
    return value


def exists(path: str) -> bool:
    """Whether `path` is a config field, or a name in one of the program's modules."""
    parts = path.split(".")
    try:
        if parts[0] in PARTS:
            field(path)
            return True
    except AttributeError:
        pass
    split = max((n for n in range(1, len(parts) + 1) if ".".join(parts[:n]) in MODULES), default=0)
    if not split:
        return False
    value: Any = importlib.import_module("appo_jax." + ".".join(parts[:split]))
    try:
        for part in parts[split:]:
            value = getattr(value, part)
    except AttributeError:
        return False
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_fields_and_functions_that_a_page_names_exist(page: Path) -> None:
    heads = PARTS | {name.split(".")[0] for name in MODULES}
    named = set(re.findall(r"`([a-z_]+(?:\.[A-Za-z_0-9]+)+)`", page.read_text()))
    ours = {path for path in named if path.split(".")[0] in heads and path.rsplit(".", 1)[1] not in FILES}
    assert not sorted(path for path in ours if not exists(path))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    """A path in backticks is one from the root of the repository, or from appo_jax/."""
    named = set(re.findall(r"`((?!runs/|artifacts/)[a-z_]+/[\w/]+\.(?:py|md|sh))`", page.read_text()))
    assert not sorted(path for path in named if not any((base / path).exists() for base in (ROOT, ROOT / "appo_jax")))


def test_defaults_in_bold_on_the_method_page_are_the_defaults() -> None:
    """Values in bold are defaults, in the forms `part.field`: **`value`**, **`part.field = value`** and the like."""
    text = (ROOT / "docs/method.md").read_text()
    pairs = re.findall(r"`([a-z_.]+)`(?: = |: (?:`[^*`]+`, )*)\*\*`?([^*`]+?)`?\*\*", text)
    pairs += re.findall(r"\*\*`([a-z_.]+) = ([^`]+)`\*\*", text)
    checked = 0
    for path, value in pairs:
        if "." in path and path.split(".")[0] in PARTS:
            default = field(path)
            assert str(default) == value or float(default) == float(value), (path, default, value)
            checked += 1
    assert checked > 12, "the pattern no longer finds the defaults"
