"""Does a long run grow? `python tests/matrix/growth.py [--steps 1000]`: memory, descriptors, threads and files of a tiny run.

The run is the smallest there is (tests/matrix/damage.py); it is looked at from outside, every tenth of its steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from tiny import tiny_config

from appo_jax.config_io import save_config
from appo_jax.supervision.status import read_status


def resident_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return 0.0


def size_mb(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = dataclasses.replace(
            tiny_config(folder), steps=steps, checkpoint_every=max(1, steps // 20), prompts_per_step=2
        )
        run = Path(config.run_dir)
        save_config(config, folder / "config.json")
        began = time.monotonic()
        with (folder / "log").open("w") as log:
            command = [sys.executable, "-m", "appo_jax.cli", "train", "--config", str(folder / "config.json")]
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        print("| step | supervisor MB | run MB | descriptors | threads | dumps MB | run directory MB | s |")
        print("|---:|---:|---:|---:|---:|---:|---:|---:|")
        due = 1
        while process.poll() is None:
            status = read_status(run) if run.exists() else None
            if status is not None and (step := int(status.hosts["0"]["step"])) >= due and status.state == "running":
                pid = int(status.hosts["0"]["pid"])
                proc = Path(f"/proc/{pid}")
                print(
                    f"| {step} | {resident_mb(process.pid):.0f} | {resident_mb(pid):.0f} | {len(list((proc / 'fd').iterdir()))} "
                    f"| {len(list((proc / 'task').iterdir()))} | {size_mb(run / 'rollouts'):.1f} | {size_mb(run):.1f} "
                    f"| {time.monotonic() - began:.0f} |",
                    flush=True,
                )
                due = step + max(1, steps // 10)
            time.sleep(0.3)
        if process.returncode:
            print((folder / "log").read_text()[-3000:], file=sys.stderr)
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
