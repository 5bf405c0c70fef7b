"""Runs that are killed at random moments: `python tests/matrix/kill.py [--sigkill 60 --sigterm 20 --sigint 20] [--seed S]`.

The smallest run there is (tiny.py) is started by `appo-jax train`, killed or asked to stop, and started again by the same
command until it ends by itself. Three of four are struck in a random phase of a random step (aimed.py), the others at a
random moment between their first line and their end. (All but the latter are forked from a process that has imported
everything.) Each must have the parameters of an undisturbed run, bit for bit, every step on record once, every dump whole, and
a summary; a summary that was there before the end must be of a policy that is saved. Runs that had ended before they were
struck count nothing. Exit code 1 where one is not as it should be.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import aimed
from tiny import STEPS, last_arrays, records_complete, tiny_config

import appo_jax.__main__
import appo_jax.cli
import appo_jax.train
from appo_jax.config_io import save_config

# Phase -> how long it lasts at most, roughly: the blow falls so much later than its beginning.
PHASES = {
    "start": 1.5, "cold start": 1.0, "rollout": 0.1, "reward": 0.003, "score": 0.01, "branch": 0.05, "advantage": 0.003,
    "update": 0.05, "checkpoint": 0.1, "evaluate": 0.1,
}  # fmt: skip


def start(config_file: Path, log: Path) -> subprocess.Popen[bytes]:
    """`appo-jax train`, as a person starts it."""
    with log.open("ab") as out:
        command = [sys.executable, "-m", "appo_jax", "train", "--config", str(config_file)]
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)


def fork(body: Callable[[], object], log: Path) -> int:
    """Run `body` in a forked process, which has the same imports. Returns its exit code."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code: Any = 1
    try:
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        code = body()
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)


def train(config_file: Path, *aim: str) -> int:
    """The same command in a forked process. `aim`: arguments of aimed.py, which ends the run at a chosen moment."""
    sys.argv = ["appo-jax", *aim, "train", "--config", str(config_file)]
    return aimed.main() if aim else appo_jax.__main__.main()


def look(run: Path, file: Path) -> int:
    """Write the digests of the run's arrays to `file`. (In a forked process: what reads them starts threads.)"""
    file.write_text(json.dumps(last_arrays(run)))
    return 0


def struck(rng: random.Random, which: signal.Signals, took: float, config_file: Path, log: Path) -> tuple[str, int]:
    """Start a run and kill it once. Returns where it was killed, and its exit code."""
    if rng.random() < 0.25:
        process, moment = start(config_file, log), rng.uniform(0.0, took)
        time.sleep(moment)
        os.killpg(process.pid, which) if which != signal.SIGTERM else process.send_signal(which)
        return f"after {moment:.1f} s", process.wait(timeout=600)
    phase, step = rng.choice(list(PHASES)), rng.randrange(STEPS + 1)
    delay, alone, note = rng.uniform(0.0, PHASES[phase]), rng.random() < 0.5, log.with_name("struck")
    note.unlink(missing_ok=True)
    aim = [phase, str(step), str(delay), str(int(which)), str(int(alone)), str(note)]
    code = fork(lambda: train(config_file, *aim), log)
    return note.read_text() if note.exists() else f"missed {phase}", code


def faults(run: Path, codes: list[int], text: str) -> list[str]:
    """What is wrong with a run that was killed and started again, except its parameters."""
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
        run, file, log, took = folder / "run", folder / "config.json", folder / "log", 0.0
        assert fork(lambda: save_config(tiny_config(folder), file) or 0, log) == 0, log.read_text()[-3000:]
        os.environ["PYTHONPATH"] = str(Path(__file__).parent)
        for _ in range(2):  # the first one compiles, the second one says how long a run takes
            shutil.rmtree(run, ignore_errors=True)
            first = time.monotonic()
            assert start(file, log).wait() == 0, log.read_text()[-3000:]
            took = time.monotonic() - first
        seen = folder / "seen"
        assert fork(lambda: look(run, seen), log) == 0, log.read_text()[-3000:]
        truth = seen.read_text()
        print(f"an undisturbed run takes {took:.0f} s", flush=True)
        while signals:
            shutil.rmtree(run)
            log.write_text("")
            where, code = struck(rng, signals[-1], took, file, log)
            if code == 0:  # it had ended
                continue
            which = signals.pop()
            wrong = [] if code in allowed[which] else [f"exit code {code} after {which.name}"]
            if (run / "summary.json").exists() and fork(lambda: look(run, seen), log) != 0:
                wrong.append("a summary without its policy")
            codes = [code]
            while codes[-1] != 0 and len(codes) < 4:
                codes.append(fork(lambda: train(file), log))
            text = log.read_text(errors="replace")
            wrong += faults(run, codes, text)
            if codes[-1] == 0 and (fork(lambda: look(run, seen), log) != 0 or seen.read_text() != truth):
                wrong.append("other parameters")
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
