"""The process that runs policy code, and the frozen snapshots it leaves behind.

Every interpreter state is one process. It waits, frozen, for requests; for each it forks, and the child runs the code
(a cell), reports, and becomes the snapshot of the state after it. The parent is untouched, so that any state can be
continued any number of times, and a cell that crashes or is killed takes nothing with it. State 0 has only the
preloaded modules.

Nothing here is trusted once policy code has run: the supervisor believes no more than that a cell has ended.
"""

from __future__ import annotations

import _signal  # without the enumerations of `signal`, whose pages every fork would copy: a tenth of a call's time
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
FOLDER = 61  # and, with process isolation, of its own folder
FIRST_FILE = 3
MAX_FILES = 64
SPARE_FILES = 8  # of these must be free at the end of a call, for what is done between it and the next
MAX_FILE_BYTES = 16 << 20  # of one file, and of what a cell writes to its output
MAX_REQUEST = 150_000
PRIVATE = "/tmp"  # where a state's own files are mounted in a sandbox

NO_FORK, HELLO, REFUSED = b"n", b"h", b"r"  # further reports: besides those of `cell`
UNMAPPED = b"unmapped"  # state 0 wants its user mapped
READY = b"ready "  # and the number of the descriptor with the filter's listener
_CONTINUE = {_signal.SIGCONT}
_mask: set[int] = set()  # the signals that the code has blocked, while a snapshot blocks SIGCONT too
__all__ = ["DONE", "FAILED", "HELLO", "NO_FORK", "OUT_OF_MEMORY", "REFUSED", "main"]


def main(channel: socket.socket, options: dict[str, Any]) -> None:
    """Become state 0: import, give up privileges, report readiness with the filter's listener, serve."""
    os.dup2(channel.fileno(), CHANNEL)
    channel.close()
    os.closerange(3, CHANNEL)  # whatever else was inherited
    channel = socket.socket(fileno=CHANNEL)
    sandboxed = options["isolation"] == "bubblewrap"
    maps = open("/proc/self/maps")  # noqa: SIM115 - read below, when /proc is hidden
    if sandboxed:
        _hide_proc(channel)
        system.keep_only_sys_admin()  # for a mount namespace of its own at each fork, under the supervisor's eyes
    else:
        os.dup2(os.open(os.path.join(options["folder"], "0"), os.O_RDONLY), FOLDER)
    os.chdir(PRIVATE if sandboxed else os.path.join(options["folder"], "0"))
    _prepare_modules(options["preload"])
    files.watch(FIRST_FILE, CHANNEL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.collect()
    gc.freeze()  # keeps the collector from touching, and so copying, the preloaded pages
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
    """Cover /proc and make the devices read-only, then enter user and mount namespaces in which no mount can be taken away."""
    system.unshare(system.CLONE_NEWNS)
    hidden = system.MS_RDONLY | system.MS_NOSUID | system.MS_NODEV | system.MS_NOEXEC
    system.mount("none", "/proc", "tmpfs", hidden, "size=4k,mode=0555")
    system.lock_devices()
    system.unshare(system.CLONE_NEWUSER | system.CLONE_NEWNS)
    channel.send(UNMAPPED)
    channel.recv(16)  # the supervisor, which sees /proc, has mapped the user


def _prepare_modules(preload: list[str]) -> None:
    # `random` would reseed itself in every fork; a state's draws must go on where they were.
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
    """Wait as a snapshot; never return. A request is one message: a JSON line, then the code, with its descriptors."""
    channel = socket.socket(fileno=CHANNEL)
    number = 0
    while True:
        message, fds, _, _ = socket.recv_fds(channel, MAX_REQUEST, 3)
        if not message:
            os._exit(0)
        child = -1
        if len(fds) == json.loads(message.partition(b"\n")[0])["descriptors"]:
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
            _cell(message, fds, f"<call {number}>", max_output)
        except BaseException:
            os._exit(1)


def _cell(message: bytes, fds: list[int], filename: str, max_output: int) -> None:
    """Run one request in the process just forked for it, up to the report; then it is a snapshot."""
    head, _, code = message.partition(b"\n")
    report_to, output, *mount = fds
    os.dup2(report_to, CHANNEL)
    if not mount:  # process isolation: be known to the supervisor, and killable with all that it may start
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        os.write(CHANNEL, HELLO)
    for fd in (1, 2):
        os.dup2(output, fd)
    for fd in fds:
        os.close(fd)
    null = os.open("/dev/null", os.O_RDWR)  # its flags would be shared with every other state
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
    except OSError as error:  # not of the code, which has its errors shown: its files cannot be copied or kept
        report = _refuse(f"its files cannot be copied ({error})")
    _close_output()
    os.write(CHANNEL, report)


def _refuse(reason: str) -> bytes:
    with contextlib.suppress(OSError):
        os.write(1, f"\nThe state after this call cannot be kept: {reason}.".encode("utf-8", "replace"))
    return REFUSED


def _settle_files(mounted: bool) -> None:
    """See that later calls can be forked from here, and make no file writable to them."""
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
    """Leave nothing of a finished cell running. A handler of SIGCONT would run whenever the snapshot is woken for a fork."""
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
    """Give this state its own copy of the files of the one it was forked from, open files included. Raises OSError."""
    try:
        here = os.getcwd()
    except FileNotFoundError:  # removed
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
