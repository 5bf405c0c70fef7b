"""Runs of a study or a sweep as separate processes: `appo-jax COMMAND` on a config, with its output in a log file."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

from appo_jax.config import Config
from appo_jax.config_io import save_config
from appo_jax.storage import lock

_PR_SET_PDEATHSIG = 1  # from linux/prctl.h
_libc = ctypes.CDLL(None, use_errno=True)


def start_run(command: str, config: Config, folder: Path, cores: list[int] | None = None) -> subprocess.Popen[bytes]:
    """Start `appo-jax COMMAND` on `config`. Its config file and its log are in `folder` and have the name of its run directory.

    The process has its own process group. A Ctrl-C at the terminal therefore reaches only the parent, which passes it on as one
    SIGTERM; a second signal would end the process before it has saved its run. If the parent dies, even by SIGKILL, the
    process gets SIGTERM, too.

    `cores`: the cores on which it may run; None: those of the parent.
    """
    name = Path(config.run_dir).name
    file = folder / f"{name}.json"
    save_config(config, file)
    # All runs share the compiled programs.
    environment = {"JAX_COMPILATION_CACHE_DIR": str((folder.parent / "xla").absolute())} | os.environ
    with log_file(folder, name).open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "appo_jax.cli", *command.split(), "--config", str(file)],
            stdout=log, stderr=subprocess.STDOUT, env=environment, process_group=0,
            preexec_fn=functools.partial(end_with_parent, os.getpid()),
        )  # fmt: skip
    if cores is not None:
        os.sched_setaffinity(process.pid, cores)
    return process


def end_with_parent(parent: int) -> None:
    """Called in a new process: ask the kernel to send it SIGTERM when its parent, the process `parent`, ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before the call of prctl
        os._exit(128 + signal.SIGTERM)


def in_use(run_dir: Path) -> bool:
    """Whether a living process writes the run in a directory: that of another study or sweep which shares a cold start."""
    with contextlib.suppress(OSError):  # no directory yet, or none that this user can write, which the run itself tells
        if (held := lock(run_dir / "lock")) is None:
            return True
        os.close(held)
    return False


def log_file(folder: Path, name: str) -> Path:
    """The log of the run whose directory has this name."""
    return folder / f"{name}.log"
