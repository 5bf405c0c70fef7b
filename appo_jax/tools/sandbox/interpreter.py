"""The process that runs policy code, and the frozen snapshots it leaves behind.

Every interpreter state is one process. It waits, frozen, for requests; for each it forks, and the child runs the code
(a cell), reports, and becomes the snapshot of the state after it. The parent is untouched, so that any state can be
continued any number of times, and a cell that crashes or is killed takes nothing with it. State 0 has only the
preloaded modules.

Nothing here is trusted once policy code has run: the supervisor believes no more than that a cell has ended.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import fcntl
import gc
import importlib
import io
import json
import linecache
import os
import re
import resource
import signal
import site
import socket
import stat
import sys
import textwrap
import traceback
import types
from typing import Any

from . import seccomp, system

CHANNEL = 60  # the file descriptor of a snapshot's channel to the supervisor
FOLDER = 61  # and, with process isolation, of its own folder
MAX_FILES = 64
MAX_FILE_BYTES = 16 << 20  # of one file, and of what a cell writes to its output
MAX_REQUEST = 150_000
TRACE_FRAMES = 8
PRIVATE = "/tmp"  # where a cell's own files are mounted in a sandbox

DONE, FAILED, OUT_OF_MEMORY, NO_FORK, HELLO = b"d", b"f", b"m", b"n", b"h"
UNMAPPED = b"unmapped"  # state 0 wants its user mapped
READY = b"ready "  # and the number of the descriptor with the filter's listener


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
    _prepare_modules(options["preload"])
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
        try:
            child = os.fork()
        except OSError:
            os.write(fds[0], NO_FORK)
            child = -1
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
    _take_files(json.loads(head)["folder"], mount[0] if mount else None)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for fd in fds:
        os.close(fd)
    report = run(code.decode("utf-8", "replace"), filename, max_output)
    _settle()
    os.write(CHANNEL, report)


def run(code: str, filename: str, max_output: int) -> bytes:
    """Run a cell in `__main__`, show the value of a last expression, show errors as the policy's own lines."""
    out: Any = _Output(max_output)
    for name in ("stdout", "stderr", "__stdout__", "__stderr__"):
        setattr(sys, name, out)
    code = clean(code)
    linecache.cache[filename] = (len(code), None, code.splitlines(keepends=True), filename)
    space = sys.modules["__main__"].__dict__
    try:
        tree = ast.parse(code, filename)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, filename, "exec", dont_inherit=True), space)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), filename, "eval", dont_inherit=True), space)
            if value is not None:
                builtins.print(repr(value))
        return DONE
    except SystemExit as leave:
        if leave.code is None or leave.code == 0:
            return DONE
        _show(leave)
        return FAILED
    except MemoryError as error:
        _show(error)
        return OUT_OF_MEMORY
    except BaseException as error:
        _show(error)
        return FAILED


def clean(code: str) -> str:
    """Code as models write it: indented as a whole, or in a Markdown fence."""
    code = textwrap.dedent(code.strip("\n").rstrip())
    fenced = re.fullmatch(r"\s*```(?:python|py)?[ \t]*\n(.*?)\n?[ \t]*```\s*", code, re.DOTALL)
    return textwrap.dedent(fenced[1]) if fenced else code


class _Output(io.TextIOBase):
    """Standard output of a cell: keeps the first bytes and swallows the rest; a flood costs nothing and never fails."""

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, limit: int):
        self._room = limit

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        if self._room > 0:
            data = text[: self._room].encode("utf-8", "backslashreplace")[: self._room]
            self._room -= len(data)
            os.write(1, data)
        return len(text)

    @property
    def buffer(self) -> io.RawIOBase:
        return _Bytes(self)


class _Bytes(io.RawIOBase):
    """`sys.stdout.buffer`."""

    def __init__(self, text: _Output):
        self._text = text

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._text.write(bytes(data).decode("utf-8", "backslashreplace"))
        return len(data)


def _show(error: BaseException) -> None:
    """Write a short traceback: the policy's own lines only. Goes past the limit of the output, which may be full."""
    try:
        summary = traceback.TracebackException(type(error), error, error.__traceback__, limit=-200, compact=True)
        own = [
            traceback.FrameSummary(frame.filename, frame.lineno, frame.name)
            for frame in summary.stack
            if frame.filename.startswith("<call ")
        ]
        if len(own) > TRACE_FRAMES:
            own = own[: TRACE_FRAMES // 2] + own[-TRACE_FRAMES // 2 :]
        lines = ["Traceback (most recent call last):\n", *traceback.StackSummary.from_list(own).format()] if own else []
        text = "".join([*lines, *summary.format_exception_only()])
    except BaseException:  # hostile exceptions
        text = f"{type(error).__name__}\n"
    with contextlib.suppress(BaseException):
        os.write(1, text[:4000].encode("utf-8", "backslashreplace"))


def _settle() -> None:
    """Leave nothing of a finished cell running: timers, tracers, its output."""
    for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
        signal.setitimer(timer, 0)
    sys.settrace(None)
    sys.setprofile(None)
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (1, 2):
        os.dup2(null, fd)
    os.close(null)


def _take_files(folder: str, mount: int | None) -> None:
    """Give this state its own copy of the files of the one it was forked from, open files included."""
    if mount is None:
        old, new = os.dup(FOLDER), os.open(folder, os.O_RDONLY)
        os.dup2(new, FOLDER)
        inside = "."
        os.environ["TMPDIR"] = os.environ["HOME"] = folder
    else:
        old, new = os.open(PRIVATE, os.O_RDONLY), os.open(".", os.O_RDONLY, dir_fd=mount)
        here = os.getcwd()
        inside = os.path.relpath(here, PRIVATE) if here.startswith(PRIVATE) else "."
        system.unshare(system.CLONE_NEWNS)
        system.ask_for_mount()
    moved: dict[tuple[int, int], str] = {}
    _copy_folder(old, new, ".", moved)
    if moved:
        _reopen(moved, new)
    os.fchdir(new)
    if inside != ".":
        with contextlib.suppress(OSError):
            os.chdir(inside)
    os.close(old)
    os.close(new)


def _copy_folder(old: int, new: int, path: str, moved: dict[tuple[int, int], str]) -> None:
    for name in os.listdir(old):
        info = os.stat(name, dir_fd=old, follow_symlinks=False)
        where = f"{path}/{name}"
        if stat.S_ISLNK(info.st_mode):
            os.symlink(os.readlink(name, dir_fd=old), name, dir_fd=new)
        elif stat.S_ISDIR(info.st_mode):
            os.mkdir(name, 0o700, dir_fd=new)
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
            below, copy = os.open(name, flags, dir_fd=old), os.open(name, flags, dir_fd=new)
            _copy_folder(below, copy, where, moved)
            os.close(below)
            os.close(copy)
        elif stat.S_ISREG(info.st_mode):
            source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=old)
            target = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, stat.S_IMODE(info.st_mode) | 0o600, dir_fd=new)
            while os.sendfile(target, source, None, 1 << 20):
                pass
            os.close(source)
            os.close(target)
            moved[info.st_dev, info.st_ino] = where


def _reopen(moved: dict[tuple[int, int], str], new: int) -> None:
    """Point files that the code holds open at the copies, at the same place."""
    for fd in range(3, CHANNEL):
        try:
            info = os.fstat(fd)
            where = moved.get((info.st_dev, info.st_ino))
            if where is None:
                continue
            flags = fcntl.fcntl(fd, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_APPEND | os.O_NONBLOCK)
            copy = os.open(where, flags, dir_fd=new)
            os.lseek(copy, os.lseek(fd, 0, os.SEEK_CUR), os.SEEK_SET)
            os.dup2(copy, fd, inheritable=False)
            os.close(copy)
        except OSError:
            continue
