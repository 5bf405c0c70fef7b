"""The processes that run policy code: one process for each interpreter state.

A process waits, frozen, for requests. For each request it forks; the child runs the code (a cell), reports, and becomes the
snapshot of the state after it. The parent does not change, so any state can be continued any number of times, and a cell that
crashes or is killed affects no other state. State 0 has only the preloaded modules.

After policy code has run in a process, the supervisor trusts nothing that the process says, except that its cell has ended.
"""

from __future__ import annotations

import _signal  # it has no enumerations, unlike `signal`; every fork would copy their pages, a tenth of a call's time
import contextlib
import gc
import importlib
import json
import os
import resource
import signal
import site
import socket
import sys
import types
from typing import Any

from . import cell, files, seccomp, system
from .cell import DONE, FAILED, OUT_OF_MEMORY

CHANNEL = 60  # the file descriptor of a snapshot's channel to the supervisor
FOLDER = 61  # with process isolation: the file descriptor of the state's folder
FIRST_FILE = 3
MAX_FILES = 64  # the limit of open file descriptors
SPARE_FILES = 8  # descriptors that must be free at the end of a call, because the next fork needs some
MAX_FILE_BYTES = 16 << 20  # of one file, and of a cell's output
MAX_REQUEST = 1000  # bytes of a request to fork
MAX_CALL = 150_000  # bytes of a call: its head and its code
PRIVATE = "/tmp"  # where a state's own files are mounted in a sandbox

NO_FORK, HELLO, REFUSED = b"n", b"h", b"r"  # reports in addition to those of `cell`
UNMAPPED = b"unmapped"  # state 0 asks the supervisor to map its user
READY = b"ready "  # state 0 is ready; the number of the descriptor with the filter's listener follows
_CONTINUE = {_signal.SIGCONT}
_mask: set[int] = set()  # the signals that the code has blocked; a snapshot blocks SIGCONT in addition
__all__ = ["DONE", "FAILED", "HELLO", "NO_FORK", "OUT_OF_MEMORY", "REFUSED", "main"]


def main(options: dict[str, Any]) -> None:
    """Become state 0, in a new program whose only descriptor above 2 is its channel; it holds nothing of any call."""
    channel = socket.socket(fileno=CHANNEL)
    try:
        _become_state_0(channel, options)
    except BaseException as error:
        with contextlib.suppress(OSError):
            channel.send(f"{type(error).__name__}: {error}".encode()[:4000])
    os._exit(1)


def _become_state_0(channel: socket.socket, options: dict[str, Any]) -> None:
    """Give up privileges, import modules, install the filter, report that it is ready, serve."""
    sandboxed = options["isolation"] == "bubblewrap"
    maps = open("/proc/self/maps")  # noqa: SIM115 - opened before /proc is hidden, read below
    if sandboxed:
        _hide_proc(channel)
        system.keep_only_sys_admin()  # each fork needs it to make its mount namespace, with the supervisor's permission
    else:
        os.dup2(os.open(os.path.join(options["folder"], "0"), os.O_RDONLY), FOLDER)
    os.chdir(PRIVATE if sandboxed else os.path.join(options["folder"], "0"))
    _prepare_modules(options["preload"])
    files.watch(FIRST_FILE, CHANNEL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.collect()
    gc.freeze()  # the collector must not write to the preloaded pages: a fork would then copy them
    with maps:
        size = system.collapse_memory(maps.read())
    limits = {
        resource.RLIMIT_AS: size + (options["memory_mb"] << 20),
        resource.RLIMIT_FSIZE: MAX_FILE_BYTES,
        resource.RLIMIT_NOFILE: MAX_FILES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    listener = -1
    try:
        listener = seccomp.install()
    except OSError:
        if sandboxed:
            raise
    channel.send(READY + str(listener).encode())
    channel.recv(16)  # the supervisor has taken the listener
    if listener >= 0:
        os.close(listener)
    if not sandboxed:
        system.prctl(system.PR_SET_DUMPABLE, 0)  # no state may read another's memory in /proc
    serve(options["max_output_bytes"])


def _hide_proc(channel: socket.socket) -> None:
    """Cover /proc and make the devices read-only. Then enter user and mount namespaces in which no mount can be removed."""
    system.unshare(system.CLONE_NEWNS)
    hidden = system.MS_RDONLY | system.MS_NOSUID | system.MS_NODEV | system.MS_NOEXEC
    system.mount("none", "/proc", "tmpfs", hidden, "size=4k,mode=0555")
    system.lock_devices()
    system.unshare(system.CLONE_NEWUSER | system.CLONE_NEWNS)
    channel.send(UNMAPPED)
    channel.recv(16)  # the supervisor, which sees /proc, has mapped the user


def _prepare_modules(preload: list[str]) -> None:
    # `random` would reseed itself in every fork, but a state's random numbers must continue those of its parent.
    register, os.register_at_fork = os.register_at_fork, lambda **_: None
    try:
        random = importlib.import_module("random")
    finally:
        os.register_at_fork = register
    site.setquit()
    site.sethelper()
    for name in preload:
        importlib.import_module(name)
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    sys.modules["__main__"] = types.ModuleType("__main__")
    sys.argv = [""]


def serve(max_output: int) -> None:
    """Serve requests as a snapshot, for ever. A request is one message: a JSON line, and file descriptors for the child.

    The child receives its code itself, from its own channel. So this process never holds the code of a call that is forked
    from it, and later children do not inherit it: state 0 is forked for all rollouts.
    """
    channel = socket.socket(fileno=CHANNEL)
    number = 0
    while True:
        message, fds, _, _ = socket.recv_fds(channel, MAX_REQUEST, 3)
        if not message:
            os._exit(0)
        child = -1
        if len(fds) == json.loads(message)["descriptors"]:
            with contextlib.suppress(OSError):
                child = os.fork()
        if child == -1 and fds:
            os.write(fds[0], NO_FORK)
        if child:
            for fd in fds:
                os.close(fd)
            continue
        number += 1
        try:
            _cell(channel, fds, f"<call {number}>", max_output)
        except BaseException:
            os._exit(1)


def _cell(channel: socket.socket, fds: list[int], filename: str, max_output: int) -> None:
    """Receive and run one call in the process that was forked for it, and report. Then the process is a snapshot."""
    report_to, output, *mount = fds
    os.dup2(report_to, CHANNEL)  # from here on, `channel` is this process's own
    if not mount:  # process isolation: tell the supervisor, and lead a group that it can kill with all descendants
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        os.write(CHANNEL, HELLO)
    head, _, code = channel.recv(MAX_CALL).partition(b"\n")
    for fd in (1, 2):
        os.dup2(output, fd)
    for fd in fds:
        os.close(fd)
    null = os.open("/dev/null", os.O_RDWR)  # opened again, because states must not share its file flags
    os.dup2(null, 0)
    os.close(null)
    try:
        _take_files(json.loads(head)["folder"], bool(mount))
        _signal.pthread_sigmask(_signal.SIG_SETMASK, _mask)
        report = cell.run(code.decode("utf-8", "replace"), filename, max_output)
        _stop_timers()
        _settle_files(bool(mount))
    except files.Refused as reason:
        report = _refuse(str(reason))
    except (
        OSError
    ) as error:  # the code's own errors are shown by `cell.run`; this one comes from copying or sealing files
        report = _refuse(f"its files cannot be copied ({error})")
    _close_output()
    os.write(CHANNEL, report)


def _refuse(reason: str) -> bytes:
    with contextlib.suppress(OSError):
        os.write(1, f"\nThe state after this call cannot be kept: {reason}.".encode("utf-8", "replace"))
    return REFUSED


def _settle_files(mounted: bool) -> None:
    """Check that later calls can be forked from this state, and seal its files. Raises Refused."""
    opened = files.open_descriptors()
    if len(opened) > CHANNEL - FIRST_FILE - SPARE_FILES:
        raise files.Refused(f"{len(opened)} files are open; close some before the call ends")
    if not opened and not os.listdir(PRIVATE if mounted else FOLDER):
        files.forget()
        return
    folder = os.open(PRIVATE, os.O_RDONLY) if mounted else os.dup(FOLDER)
    try:
        files.seal(folder, opened)
    finally:
        os.close(folder)


def _stop_timers() -> None:
    """Stop the timers and tracing of a finished cell, and block SIGCONT: its handler would run at every fork."""
    _mask.clear()
    _mask.update(_signal.pthread_sigmask(_signal.SIG_BLOCK, _CONTINUE))
    for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
        signal.setitimer(timer, 0)
    sys.settrace(None)
    sys.setprofile(None)


def _close_output() -> None:
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (1, 2):
        os.dup2(null, fd)
    os.close(null)


def _take_files(folder: str, mounted: bool) -> None:
    """Give this state its own copy of its parent's files, including open files. Raises OSError."""
    try:
        here = os.getcwd()
    except FileNotFoundError:  # the folder was removed
        here = ""
    if mounted and here == PRIVATE and not files.kept:
        system.unshare(system.CLONE_NEWNS)
        system.ask_for_mount()
        os.chdir(PRIVATE)
        return
    if mounted:
        old = os.open(PRIVATE, os.O_RDONLY)
        top = PRIVATE
        system.unshare(system.CLONE_NEWNS)
        system.ask_for_mount()
        new = os.open(PRIVATE, os.O_RDONLY)
    else:
        old, new = os.dup(FOLDER), os.open(folder, os.O_RDONLY)
        top = os.readlink(f"/proc/self/fd/{FOLDER}")
        os.dup2(new, FOLDER)
        os.environ["TMPDIR"] = os.environ["HOME"] = folder
    files.take(old, new)
    os.fchdir(new)
    if not here:
        os.mkdir(".gone")
        os.chdir(".gone")
        os.rmdir("../.gone")
    elif here != top:
        with contextlib.suppress(OSError):
            os.chdir(os.path.relpath(here, top) if here.startswith(top + "/") else here)
    os.close(old)
    os.close(new)
