"""Small programs under a supervisor, in processes of their own: `python programs.py NAME RUN_DIR [SETTING=VALUE ...]`.

They train nothing: what is tested is what becomes of them. On several hosts (APPO_DISTRIBUTED=1) they meet in `exchange`, as the
loop does; RUN_DIR/fault of a host makes it do something else at a step.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from appo_jax import distributed, heartbeat, interrupt, output
from appo_jax.config import Config, PolicyConfig
from appo_jax.errors import DataError
from appo_jax.run_dir import open_run
from appo_jax.supervision import records, supervisor

RUN_DIR = Path(sys.argv[2])


def hang() -> None:
    with heartbeat.phase("reward"):
        heartbeat.progress()
        time.sleep(1000)


def hold_the_lock() -> None:
    with heartbeat.phase("rollout"):
        ctypes.PyDLL(None).sleep(1000)  # PyDLL keeps the interpreter's lock


def fail() -> None:
    raise DataError("train.jsonl: line 7 is not JSON")


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def finish() -> None:
    heartbeat.at_step(3)


def start_up() -> None:
    print("starting", flush=True)
    time.sleep(1000)


def train() -> None:
    """Steps of a tenth of a second until asked to stop."""
    with interrupt.stop_requests() as stop:
        step = 0
        while not stop.agreed():
            step += 1
            time.sleep(0.1)
            heartbeat.at_step(step)
            print("step", step, flush=True)
        raise KeyboardInterrupt


def long_step() -> None:
    """A step of three seconds, which a request to stop lets end."""
    with interrupt.stop_requests() as stop:
        stop.agreed()
        print("training", flush=True)
        for _ in range(30):
            time.sleep(0.1)
        print("saved", flush=True)
        if stop.agreed():
            raise KeyboardInterrupt


def ignore() -> None:
    """Reports that it handles requests to stop, but ignores them."""
    heartbeat.stoppable(True)
    signal.signal(signal.SIGTERM, lambda *_: None)
    with heartbeat.phase("rollout"):
        print("training", flush=True)
        time.sleep(1000)


def leave_late() -> None:
    """Has stopped, but has not ended yet."""
    with interrupt.stop_requests() as stop:
        stop.agreed()
    print("left", flush=True)
    time.sleep(1000)


def write_slowly() -> None:
    """Writes a checkpoint for ten seconds, then reads it for ten seconds."""
    with heartbeat.phase("checkpoint"), (RUN_DIR / "step").open("wb", buffering=0) as file:
        for _ in range(20):
            time.sleep(0.5)
            file.write(bytes(2 << 20))
        print("written", flush=True)
    with heartbeat.phase("checkpoint"), (RUN_DIR / "step").open("rb", buffering=0) as file:
        while file.read(2 << 20):
            time.sleep(0.5)
        print("read", flush=True)


def stop_writing() -> None:
    """Writes a part of a checkpoint; then only lines of a log."""
    with heartbeat.phase("checkpoint"):
        (RUN_DIR / "step").write_bytes(bytes(4 << 20))
        while True:
            time.sleep(0.1)
            print("waiting", file=sys.stderr, flush=True)


def save() -> None:
    """Writes step 7 and does not end."""
    heartbeat.stoppable(True)
    heartbeat.at_step(6, on_disk=True)
    heartbeat.at_step(7)
    signal.signal(signal.SIGTERM, lambda *_: None)
    with heartbeat.phase("checkpoint"):
        print("writing", flush=True)
        time.sleep(1000)


def write_in_the_background() -> None:
    """Is $IN_PHASE after step 7, which is being written or is on disk. Before, the cold start has made 30 updates."""
    heartbeat.stoppable(True)
    heartbeat.at_update(25, on_disk=True)
    heartbeat.at_update(30)
    if os.environ["WRITTEN"] != "update 25":
        heartbeat.at_step(6, on_disk=True)
        heartbeat.at_step(7)
        heartbeat.saving(7)
    if os.environ["WRITTEN"] == "step 7":
        heartbeat.saved()
    signal.signal(signal.SIGTERM, lambda *_: None)
    with heartbeat.phase(os.environ["IN_PHASE"]):
        print("training", flush=True)
        time.sleep(1000)


def hosts() -> None:
    """Steps with five exchanges between all hosts. $FAULT says what host $AT_HOST does in step $AT_STEP, or at the "end", or before
    the supervisors "connect"."""
    fault, host, step = os.environ.get("FAULT", ""), int(os.environ["AT_HOST"]), int(os.environ["AT_STEP"])
    at_phase = os.environ.get("AT_PHASE", "reward")
    distributed.initialize()
    if (at_phase, distributed.joined()[1]) == ("connect", host):
        FAULTS[fault]()
    supervisor.connect_supervisors()
    open_run(config)
    with interrupt.stop_requests() as stop:
        for i in range(int(os.environ["STEPS"])):
            stop.agreed()
            if i == 1:  # the first step has compiled what all need
                heartbeat.expect_progress_within(float(os.environ.get("LIMIT_S", "600")))
            for phase in ("rollout", "reward", "score", "branch", "update"):
                with heartbeat.phase(phase):
                    if (i, phase, distributed.host()) == (step, at_phase, host):
                        print(f"FAULT {time.time()}", flush=True)
                        FAULTS[fault]()
                    distributed.exchange({"step": i, "phase": phase})
            heartbeat.at_step(i + 1)
            print("step", i + 1, flush=True)
    if at_phase == "end" and distributed.host() == host:
        time.sleep(3)  # the others have ended by then
        FAULTS[fault]()


def be_late() -> None:
    for _ in range(80):
        time.sleep(0.1)
        heartbeat.progress()


def wait_alone() -> None:
    with heartbeat.exchanging():
        time.sleep(1000)


def pause_supervisor() -> None:
    subprocess.Popen(["sh", "-c", f"sleep 3; kill -CONT {os.getppid()}"])
    os.kill(os.getppid(), signal.SIGSTOP)


def raise_error() -> None:
    raise ValueError("the reward fell over")


FAULTS = {
    "": lambda: None,
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGSTOP": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "stop both": lambda: (os.kill(os.getppid(), signal.SIGSTOP), os.kill(os.getpid(), signal.SIGSTOP)),
    "pause supervisor": pause_supervisor,
    "kill both": lambda: (os.kill(os.getppid(), signal.SIGKILL), time.sleep(1000)),
    "exception": raise_error,
    "error of ours": fail,
    "slow": lambda: time.sleep(25),
    "late": be_late,
    "waits": wait_alone,
    "partition": lambda: subprocess.run(
        os.environ["CUT"].split(), check=True
    ),  # then go on, until the others do not come
    "hang": lambda: time.sleep(1000),
}

if __name__ == "__main__":
    output.outlive_reader()
    RUN_DIR.mkdir(parents=True, exist_ok=True)
    config = Config(run_dir=str(RUN_DIR), steps=5, policy=PolicyConfig(path="weights"))
    for setting in sys.argv[3:]:
        name, value = setting.split("=")
        if name.isupper():
            module = next(module for module in (supervisor, records, distributed, heartbeat) if hasattr(module, name))
            setattr(module, name, type(getattr(module, name))(value))
        else:
            config = dataclasses.replace(config, **{name: float(value)})

    def body() -> None:
        if sys.argv[1] != "hosts":
            heartbeat.send(run_dir=str(RUN_DIR))
        globals()[sys.argv[1]]()

    try:
        supervisor.supervise(config, body)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
