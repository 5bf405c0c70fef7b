"""Runs that are killed at random moments: `python tests/matrix/kill.py [--sigkill 60 --sigterm 20 --sigint 20] [--seed S]`.

The smallest run there is (tests/matrix/damage.py) is started by `appo-jax train`, killed or asked to stop at a random moment
between its first line and its end, and started again by the same command, until it ends by itself. It must have the parameters
of an undisturbed run, bit for bit, every step on record once, every dump whole, and a summary. Exit code 1 where one has not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from damage import STEPS, parameters, records_complete, tiny_config

from appo_jax.config_io import save_config


def start(config_file: Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as out:
        command = [sys.executable, "-m", "appo_jax", "train", "--config", str(config_file)]
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)


def phase_of(run: Path) -> str:
    """What the run did when it was killed, as its status said last."""
    try:
        beat = json.loads((run / "status.json").read_text())["hosts"]["0"]
        return f"step {beat['step'] + 1}, {beat['phase']}"
    except (OSError, ValueError, KeyError):
        return "before its first sign of life"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, count in (("sigkill", 60), ("sigterm", 20), ("sigint", 20)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, failed = random.Random(options.seed), 0
    signals = [signal.SIGKILL] * options.sigkill + [signal.SIGTERM] * options.sigterm + [signal.SIGINT] * options.sigint
    rng.shuffle(signals)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "xla"))
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        config = dataclasses.replace(tiny_config(folder), steps=STEPS)
        run, file, log = Path(config.run_dir), folder / "config.json", folder / "log"
        save_config(config, file)
        for _ in range(2):  # the first one compiles, the second one says how long a run takes
            shutil.rmtree(run, ignore_errors=True)
            began = time.monotonic()
            assert start(file, log).wait() == 0, log.read_text()[-3000:]
            took = time.monotonic() - began
        truth = parameters(config, run)
        print(f"an undisturbed run takes {took:.0f} s", flush=True)
        for number, which in enumerate(signals):
            shutil.rmtree(run)
            log.write_text("")
            process = start(file, log)
            time.sleep(rng.uniform(0.0, took))
            where = phase_of(run)
            ended = process.poll() is not None
            os.killpg(process.pid, which) if which == signal.SIGKILL and not ended else process.send_signal(which)
            codes = [process.wait(timeout=600)]
            while codes[-1] != 0 and len(codes) < 4:
                codes.append(start(file, log).wait(timeout=600))
            expected = {signal.SIGKILL: -9, signal.SIGTERM: 130, signal.SIGINT: 130}[which]
            wrong = [] if codes[0] in (0, expected) and codes[-1] == 0 else [f"exit codes {codes}"]
            text = log.read_text(errors="replace")
            if codes[-1] == 0:
                found = parameters(config, run)
                wrong += [f"{name} differs" for name in truth if not np.array_equal(truth[name], found[name])][:1]
                wrong += [missing] if (missing := records_complete(run, "")) else []
                wrong += [] if (run / "summary.json").exists() else ["no summary"]
            wrong += ["a traceback"] if "Traceback" in text else []
            failed += bool(wrong)
            outcome = "; ".join(wrong) or ("right" if codes[0] else "had ended")
            print(f"{number:3} {which.name:8} {where:30} codes {codes}  {outcome}", flush=True)
    print(f"{len(signals)} runs, {failed} not as they should be")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
