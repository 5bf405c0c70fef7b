"""The launch commands that the pages, the configs and the scripts give can work on a fresh pod as they are.

setup.sh sends a worker only what is committed. So whatever else a command needs lies on the shared storage, or it names it.
"""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from appo_jax.cli import config_from
from appo_jax.config import Config
from appo_jax.sweep.definition import load_sweep

ROOT = Path(__file__).parents[1]
SOURCES = [
    ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").rglob("*.py"), *(ROOT / "launch").glob("*.sh")
]  # fmt: skip


def commands(script: str) -> list[tuple[str, str, list[str]]]:
    """(file, what stands before the script on its line, its arguments) of the commands with arguments of their own."""
    found = []
    for source in SOURCES:
        text = re.sub(r" \\\n[# ]*", " ", source.read_text())
        for before, rest in re.findall(rf"^[# ]*((?:[A-Z_]+=\S+ )*)launch/{script}\.sh (--config [^#\n]*)", text, re.M):
            if "…" not in rest:
                found.append((source.name, before, shlex.split(rest)))
    return found


RUNS = commands("run") + commands("resume")
SWEEPS = commands("sweep")


def shared(path: str | None) -> bool:
    return path is not None and Path(path).is_relative_to("/mnt/shared")


@pytest.mark.parametrize(("source", "before", "args"), RUNS)
def test_a_run_finds_what_it_needs_on_every_worker(
    source: str, before: str, args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config: Config = config_from("train", args)
    for path in (config.run_dir, config.policy.path, config.data.path, *config.sft.traces):
        assert shared(path), (source, path)
    search = config.tools.search
    if search.provider == "serper":
        assert "TPU_ENV=SERPER_API_KEY" in before, source
    else:
        assert search.url is not None
        assert urlsplit(search.url).hostname not in ("127.0.0.1", "localhost"), source


@pytest.mark.parametrize(("source", "before", "args"), SWEEPS)
def test_the_slices_of_a_sweep_share_its_folder_and_have_its_devices(source: str, before: str, args: list[str]) -> None:
    sweep = load_sweep(ROOT / args[1])
    mesh, policy = sweep.base.mesh, sweep.base.policy
    paths = [sweep.out, sweep.base.data.path, *sweep.cold_starts]
    assert all(shared(path) for path in (*paths, policy.path or policy.tokenizer)), (source, paths)
    text = next(file for file in SOURCES if file.name == source).read_text()
    types = re.findall(r"TPU_TYPE=v6e-(\d+)", text)  # v6e counts chips
    assert types, source
    assert {int(chips) for chips in types} == {math.prod((mesh.data, mesh.fsdp, mesh.tensor))}


def test_every_config_of_the_paper_has_its_command() -> None:
    given = {args[1] for _, _, args in RUNS}
    paper = {
        f"configs/{file.name}" for file in (ROOT / "configs").glob("*.py") if "arXiv 2606.12384" in file.read_text()
    }
    assert len(paper) >= 4
    assert paper <= given
    assert len(SWEEPS) >= 2
