"""The scripts of this folder, which are run by hand, still start."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = ("damage", "growth", "hosts", "kill", "long_run", "prompts")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_starts(name: str) -> None:
    script = Path(__file__).with_name(f"{name}.py")
    done = subprocess.run(
        [sys.executable, str(script), "--help"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {name}.py")
