"""Each kind of failure gives one clear message and an exit code, and the traceback with --verbose.

Every command is a process of its own in an empty folder, started as `appo-jax` starts (`-P`: no folder of its own on the path).
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from appo_jax.config import Architecture
from appo_jax.errors import AppoError, WeightsError
from appo_jax.policy import weights
from appo_jax.policy.parameters import init_params
from appo_jax.tools.build import import_tool

QUICKSTART = str(Path(__file__).parents[1] / "configs" / "quickstart.py")
TOOLS = """
import collections

def broken():
    raise RuntimeError("the key is missing")

def dataset(config):
    return collections.Counter()["x"].nothing
"""


def appo_jax(folder: Path, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "appo_jax", *args], cwd=folder, capture_output=True, text=True, timeout=120,
        env=os.environ | environment,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(TOOLS)
    (tmp_path / "raises.py").write_text("import appo_jax\nx = 1 / 0\n")
    (tmp_path / "unknown.py").write_text("from appo_jax.nowhere import study\n")
    (tmp_path / "syntax.py").write_text("study = (\n")
    return tmp_path


CASES = {
    "a study that raises": (["study", "--config", "raises.py"], 2, "raises.py:2: ZeroDivisionError: division by zero"),
    "a study that imports nothing": (["study", "--config", "unknown.py"], 2, "unknown.py:1: ModuleNotFoundError"),
    "a sweep that is no python": (["sweep", "--config", "syntax.py"], 2, "syntax.py:1: SyntaxError"),
    "a fresh checkout": (["train", "--config", QUICKSTART], 1, "`appo-jax data world --config FILE`"),
    "a data source that raises": (
        ["train", "--config", QUICKSTART, "--data.source", "mine:dataset", "--data", "."], 1,
        "data.source = 'mine:dataset' raised AttributeError: 'int' object has no attribute 'nothing'",
    ),
    "an unwritable folder": (
        ["data", "world", "--config", QUICKSTART, "--data", "/proc/nothing"], 1, "/proc/nothing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_failure_is_one_message_and_an_exit_code(name: str, folder: Path) -> None:
    args, code, expected = CASES[name]
    done = appo_jax(folder, *args, "--run-dir", "run") if args[0] in ("train", "data") else appo_jax(folder, *args)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert expected in done.stderr


@pytest.mark.parametrize("path", ["mine:broken", "mine:none", "raises:anything", "syntax:anything", "nowhere:anything"])
def test_a_tool_that_cannot_be_had_is_named(path: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)
    for name in ("mine", "raises", "syntax"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(AppoError, match=f"tools.enabled = {path!r} (raised|cannot be imported)"):
        import_tool(path)


def test_the_traceback_is_given_when_it_is_asked_for(folder: Path) -> None:
    done = appo_jax(folder, "study", "--config", "raises.py", "--verbose")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert done.stderr.rstrip().endswith("raises.py:2: ZeroDivisionError: division by zero")


def test_a_platform_that_is_not_there(folder: Path) -> None:
    done = appo_jax(folder, "doctor", JAX_PLATFORMS="cuda")
    assert done.returncode == 1
    assert "FAIL devices: " in done.stdout
    assert "checks failed: devices" in done.stderr
    here = appo_jax(folder, "doctor", JAX_PLATFORMS="cpu")
    assert "ok   devices: 1 x cpu" in here.stdout
    assert here.returncode == ("FAIL" in here.stdout)


def test_what_jax_raises_for_a_platform_that_is_not_there_is_explained(folder: Path) -> None:
    code = """
import jax
from appo_jax import failures
try:
    jax.devices()
except Exception as error:
    print(failures.is_understood(error), failures.explain(error))
"""
    for platform in ("tpu", "cuda", "nonsense"):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60,
            env=os.environ | {"JAX_PLATFORMS": platform},
        )  # fmt: skip
        assert done.stdout.startswith("True JAX has no such device on this machine"), done.stdout
        assert f"JAX_PLATFORMS = '{platform}'" in done.stdout


def test_a_librarys_own_chatter_is_not_shown(folder: Path) -> None:
    code = """
import logging
from appo_jax.cli import _set_up_logging
_set_up_logging()
loud = logging.getLogger("bm25s")
loud.setLevel(logging.DEBUG)
loud.debug("building an index"); loud.info("index"); loud.warning("a warning")
logging.getLogger("appo_jax.x").info("ours")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines() == ["a warning", "ours"]


def test_help_ends_with_its_reader(folder: Path) -> None:
    command = f"{sys.executable} -m appo_jax train --help | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("usage: appo-jax train")
    assert done.stderr == ""


@pytest.mark.parametrize("damage", ["cut", "empty", "missing", "no header"])
def test_weights_that_cannot_be_read_are_one_message(damage: str, tmp_path: Path) -> None:
    arch = Architecture(
        vocab_size=8, width=8, num_layers=2, num_heads=1, num_kv_heads=1, head_dim=8, mlp_width=8, tie_embeddings=False
    )
    weights.save(tmp_path / "policy", init_params(arch, 0), arch)
    file = tmp_path / "policy" / "model.safetensors"
    content = file.read_bytes()
    broken = {"cut": content[:-100], "empty": b"", "missing": None, "no header": struct.pack("<Q", 1 << 40) + b"x"}[
        damage
    ]
    file.unlink() if broken is None else file.write_bytes(broken)
    with pytest.raises(WeightsError) as raised:
        weights.load(tmp_path / "policy")
    lines = str(raised.value).splitlines()
    assert len(lines) == 2, "the cause alone, not a line for each tensor"
    assert "model.safetensors" in lines[1]
    save_file({"x": np.zeros(1, np.float32)}, file)  # a whole file of other tensors: a line for each
    with pytest.raises(WeightsError, match=r"x: extra"):
        weights.load(tmp_path / "policy")
