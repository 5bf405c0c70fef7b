"""The fields, functions and defaults that the documents name must exist."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest

import appo_jax
from appo_jax.config import Config, JudgeConfig, PolicyConfig, RewardConfig
from appo_jax.reward.language_judge import Counts

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


def metrics_of_the_page() -> set[str]:
    """The names in the table of metrics on docs/method.md. Its cells shorten a name by what it shares with the one before."""
    names: set[str] = set()
    for row in re.findall(r"^\| (`[a-z]+/.*?) \|", (ROOT / "docs/method.md").read_text(), re.MULTILINE):
        name = ""
        for part in re.findall(r"`([^`]+)`", row):
            if part.startswith("…/"):
                name = name.rpartition("/")[0] + part[1:]
            elif part.startswith("…"):
                name += part[1:]
            elif part.startswith("_"):
                name = name.rpartition("_")[0] + part
            else:
                name = part if "/" in part else f"{name.rpartition('/')[0]}/{part}"
            names.add(name)
    return names


def metrics_of_the_code() -> set[str]:
    """The names that the code writes, from every text `group/…`; {x} stands for what is filled in."""
    groups, found = {name.partition("/")[0] for name in metrics_of_the_page()}, set()
    for file in (ROOT / "appo_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            values = node.values if isinstance(node, ast.JoinedStr) else [node]
            first, *more = [value.value if isinstance(value, ast.Constant) else None for value in values] or [None]
            whole = isinstance(first, str) and re.fullmatch(r"([a-z]+)/[a-z_0-9/]*", first)
            if whole and whole[1] in groups and (more or not first.endswith("/")):  # else the beginning of a name
                found.add("".join(part or "{x}" for part in (first, *more)))
    return found


def test_every_metric_is_explained_on_the_method_page() -> None:
    page = metrics_of_the_page() | {"tools/list", "tools/call"}  # methods of MCP
    known = {"time/wall_s", "eval/{set}/without_verdict", "tools/{tool}/seconds_p99", "rollout/sampled_tokens_total"}
    assert known <= page
    code = metrics_of_the_code()
    assert len(code) > 40, "the pattern no longer finds the names"

    def fits(general: str, name: str) -> bool:
        return re.fullmatch(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(general)), name) is not None

    assert not sorted(name for name in code if not any(fits(name, other) or fits(other, name) for other in page))
    assert {f"judge/{field.name}" for field in dataclasses.fields(Counts)} <= page


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
