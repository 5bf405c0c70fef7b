"""The version is written in one place only."""

import importlib.metadata
import tomllib
from pathlib import Path

import pytest

import appo_jax
from appo_jax import cli


def test_the_metadata_takes_the_version_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "appo_jax.__version__"}
    assert importlib.metadata.version("appo-jax") == appo_jax.__version__


def test_the_command_tells_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"appo-jax {appo_jax.__version__}\n"
