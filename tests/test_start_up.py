"""A single request to stop ends a real run at any moment of its start."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from appo_jax.config import Config
from appo_jax.config_io import save_config

MOMENTS = 20


def wait_for_first_line(process: subprocess.Popen[str]) -> None:
    """Wait until the program catches SIGTERM, as its first line does. The interpreter itself does not, and may lose a SIGINT."""
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
        if caught and int(caught[1], 16) >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.001)
    raise AssertionError("the program did not reach its first line")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_one_request_ends_a_run_at_any_moment_of_its_start(tiny: Config, tmp_path: Path) -> None:
    """The moments are spread over the start of a run without requests, from the program's first line to APPO's first step."""

    def start(name: str) -> subprocess.Popen[str]:
        file = tmp_path / f"{name}.json"
        save_config(dataclasses.replace(tiny, run_dir=str(tmp_path / name), steps=200), file)
        command = [sys.executable, "-m", "appo_jax", "train", "--config", str(file)]
        return subprocess.Popen(
            command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )

    def first_step(name: str) -> float:
        began = time.monotonic()
        process = start(name)
        assert process.stdout is not None
        try:
            assert any(line.startswith("appo 1/") for line in process.stdout)
            return time.monotonic() - began
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    first_step("compiles")
    duration = first_step("timed")
    for i in range(MOMENTS):
        process = start(str(i))
        wait_for_first_line(process)
        time.sleep(duration * i / (MOMENTS - 1))
        number = (signal.SIGINT, signal.SIGTERM)[i % 2]
        process.send_signal(number)
        asked = time.monotonic()
        try:
            printed, _ = process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        what = f"moment {i}, {time.monotonic() - asked:.1f} s:\n{printed}"
        assert process.returncode == 130, what
        assert "Traceback" not in printed, what
