"""Runs that are killed at random moments: `python tests/matrix/kill.py [--sigkill 60 --sigterm 20 --sigint 20] [--seed S]`.

The smallest run there is (tiny.py) is started by `appo-jax train`, killed or asked to stop, and started again by the same
command until it ends by itself. Three of four are struck in a random phase of a random step (aimed.py), the others at a
random moment between their first line and their end. Each must have the parameters of an undisturbed run, bit for bit, every
step on record once, every dump whole, and a summary; a summary that was there before the end must be of a policy that is
saved. Runs that had ended before they were struck count nothing. Exit code 1 where one is not as it should be.
"""

from __future__ import annotations

import argparse
import collections
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
from tiny import STEPS, parameters, records_complete, tiny_config

from appo_jax.checkpoint import verify
from appo_jax.config_io import save_config

# Phase -> how long it lasts at most, roughly: the blow falls so much later than its beginning.
PHASES = {
    "start": 1.5, "cold start": 1.0, "rollout": 0.1, "reward": 0.003, "score": 0.01, "branch": 0.05, "advantage": 0.003,
    "update": 0.05, "checkpoint": 0.1, "evaluate": 0.1,
}  # fmt: skip
AIMED = Path(__file__).with_name("aimed.py")


def start(command: list[str], config_file: Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as out:
        command = [sys.executable, *command, "train", "--config", str(config_file)]
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)


def struck(rng: random.Random, which: signal.Signals, took: float, config_file: Path, log: Path) -> tuple[str, int]:
    """Start a run and strike it once. Where, and its exit code."""
    if rng.random() < 0.25:
        process, moment = start(["-m", "appo_jax"], config_file, log), rng.uniform(0.0, took)
        time.sleep(moment)
        os.killpg(process.pid, which) if which != signal.SIGTERM else process.send_signal(which)
        return f"after {moment:.1f} s", process.wait(timeout=600)
    phase, step = rng.choice(list(PHASES)), rng.randrange(STEPS + 1)
    delay, alone, note = rng.uniform(0.0, PHASES[phase]), rng.random() < 0.5, log.with_name("struck")
    note.unlink(missing_ok=True)
    aim = [str(AIMED), phase, str(step), str(delay), str(int(which)), str(int(alone)), str(note)]
    code = start(aim, config_file, log).wait(timeout=600)
    return note.read_text() if note.exists() else f"missed {phase}", code


def faults(run: Path, codes: list[int], text: str) -> list[str]:
    """What is wrong with a run that was struck and started again, but for its parameters."""
    found = [f"exit codes {codes}"] if codes[-1] != 0 else []
    found += ["a traceback"] if "Traceback" in text else []
    if codes[-1] == 0:
        found += [missing] if (missing := records_complete(run, "")) else []
        found += [] if (run / "summary.json").exists() else ["no summary"]
        found += [] if len((run / "sft.jsonl").read_text().splitlines()) == 1 else ["sft.jsonl"]
        left = [path.name for path in run.rglob("*") if "tmp" in path.name]
        found += [f"left behind: {left}"] if left else []
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, count in (("sigkill", 60), ("sigterm", 20), ("sigint", 20)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, failed, began = random.Random(options.seed), 0, time.monotonic()
    signals = [signal.SIGKILL] * options.sigkill + [signal.SIGTERM] * options.sigterm + [signal.SIGINT] * options.sigint
    rng.shuffle(signals)
    allowed = {signal.SIGKILL: (-9, 75), signal.SIGTERM: (130, -15), signal.SIGINT: (130, -2)}
    tally: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "xla"))
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        config = tiny_config(folder)
        run, file, log, took = Path(config.run_dir), folder / "config.json", folder / "log", 0.0
        save_config(config, file)
        for _ in range(2):  # the first one compiles, the second one says how long a run takes
            shutil.rmtree(run, ignore_errors=True)
            first = time.monotonic()
            assert start(["-m", "appo_jax"], file, log).wait() == 0, log.read_text()[-3000:]
            took = time.monotonic() - first
        truth = parameters(config, run)
        print(f"an undisturbed run takes {took:.0f} s", flush=True)
        while signals:
            shutil.rmtree(run)
            log.write_text("")
            where, code = struck(rng, signals[-1], took, file, log)
            if code == 0:  # it had ended
                continue
            which = signals.pop()
            wrong = [] if code in allowed[which] else [f"exit code {code} after {which.name}"]
            if (run / "summary.json").exists() and (said := verify(run / f"checkpoints/rl/{STEPS}")) != "sound":
                wrong.append(f"a summary without its policy: {said}")
            codes = [code]
            while codes[-1] != 0 and len(codes) < 4:
                codes.append(start(["-m", "appo_jax"], file, log).wait(timeout=600))
            text = log.read_text(errors="replace")
            wrong += faults(run, codes, text)
            if codes[-1] == 0:
                found = parameters(config, run)
                wrong += [f"{name} differs" for name in truth if not np.array_equal(truth[name], found[name])][:1]
            failed += bool(wrong)
            tally[where.partition(", ")[2] or "any moment"] += 1
            print(f"{which.name:8} {where:22} codes {codes}  {'; '.join(wrong) or 'right'}", flush=True)
            if wrong:
                print(text[-2000:], flush=True)
    print(f"{sum(tally.values())} runs in {time.monotonic() - began:.0f} s, struck in {dict(tally)}")
    print(f"{failed} not as they should be")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
