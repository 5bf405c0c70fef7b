"""The checks of the machine report what they found, and agree with the tool's behaviour."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_attacks import REFUSED

from appo_jax.config import PythonToolConfig
from appo_jax.errors import ToolError
from appo_jax.tools import doctor
from appo_jax.tools.doctor import probe
from appo_jax.tools.python import PythonTool
from appo_jax.tools.sandbox import seccomp


def test_the_checks_agree_with_the_tool():
    checks = {check.name: check for check in probe()}
    assert all(check.detail for check in checks.values())
    for isolation in ("bubblewrap", "process"):
        try:
            PythonTool(PythonToolConfig(isolation=isolation, preload=("math",))).close()
            works = True
        except ToolError:
            works = False
        assert checks[f"python tool, isolation {isolation}"].ok is works


def test_a_machine_without_bubblewrap(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    checks = {check.name: check for check in probe()}
    for name in ("bubblewrap", "user namespaces", "python tool, isolation bubblewrap"):
        assert not checks[name].ok
    assert "apt-get install bubblewrap" in checks["bubblewrap"].detail


@pytest.mark.parametrize(("soft", "hard", "enough"), [(512, 2048, True), (512, 1000, False)])
def test_open_files_are_counted_as_the_sandbox_counts_them(soft, hard, enough):
    """It raises its own limit to the hard one."""
    code = f"""
import resource
from appo_jax.tools import doctor
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
check = doctor._limits()
print(check.ok, check.detail)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith(f"{enough} open files {hard}: "), done


def test_the_advice_for_docker_is_that_of_the_page(monkeypatch, tmp_path):
    (tmp_path / "bwrap").write_text("#!/bin/sh\nexit 1")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    page = (Path(__file__).parents[2] / "docs" / "tools.md").read_text()
    (line,) = re.findall(r"`(docker run [^`]+)`", page)
    assert line in doctor._namespaces().detail


@pytest.mark.parametrize(("script", "told"), [("/bin/sleep 60", "no answer within"), (None, "Exec format error")])
def test_a_bubblewrap_that_hangs_or_is_no_program_is_told(monkeypatch, tmp_path, script, told):
    (tmp_path / "bwrap").write_text(f"#!/bin/sh\nexec {script}" if script else "\0")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor, "SECONDS", 0.2)
    assert told in doctor._namespaces().detail


@pytest.mark.skipif(bool(REFUSED), reason=REFUSED)
def test_the_worst_attacks_are_tried_and_held():
    checks = [check for check in probe() if check.name.startswith("attack: ")]
    assert len(checks) == 6
    assert [check.detail for check in checks if not check.ok] == []


def test_every_system_call_of_the_filter_is_argued_for():
    text = Path("docs/tools.md").read_text().partition("### Every system call")[2].partition("## ")[0]
    rows = [line.split("|")[2] for line in text.splitlines() if line.startswith("| ") and "`" in line.split("|")[2]]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(seccomp._X86_64.keys() | seccomp._AARCH64.keys())
