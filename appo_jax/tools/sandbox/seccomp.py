"""The system-call filter of policy code: an allow-list, and three calls on which the supervisor decides.

All other calls fail with EPERM: sockets, exec, signals to others, ptrace, io_uring, new namespaces, mounts, threads, shared
memory (which a fork would not copy), and calls that Linux adds later. `fork` (as glibc makes it), `unshare(CLONE_NEWNS)` and
`move_mount` stop the caller until the supervisor, which holds the filter's listener, has decided (seccomp_unotify(2)). It may
allow the first two, each once. `move_mount` is never made: with it a new state asks for its /tmp, which the supervisor mounts.
"""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import errno
import fcntl
import platform
import struct
from collections.abc import Sequence

ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}.get(platform.machine(), 0)

# fmt: off
_X86_64 = {
    "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9,
    "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "ioctl": 16,
    "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20, "access": 21, "pipe": 22, "select": 23, "sched_yield": 24,
    "mremap": 25, "msync": 26, "madvise": 28, "dup": 32, "dup2": 33, "pause": 34, "nanosleep": 35,
    "getitimer": 36, "alarm": 37, "setitimer": 38, "getpid": 39, "sendfile": 40, "sendto": 44, "recvfrom": 45,
    "recvmsg": 47, "shutdown": 48, "getsockname": 51, "getpeername": 52, "socketpair": 53,
    "getsockopt": 55, "clone": 56, "exit": 60, "wait4": 61, "uname": 63, "fcntl": 72, "flock": 73, "fsync": 74,
    "fdatasync": 75, "truncate": 76, "ftruncate": 77, "getdents": 78, "getcwd": 79, "chdir": 80, "fchdir": 81,
    "rename": 82, "mkdir": 83, "rmdir": 84, "creat": 85, "link": 86, "unlink": 87, "symlink": 88, "readlink": 89,
    "chmod": 90, "fchmod": 91, "umask": 95, "gettimeofday": 96, "getrlimit": 97, "getrusage": 98,
    "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110, "getpgrp": 111,
    "getgroups": 115, "getresuid": 118, "getresgid": 120, "rt_sigpending": 127, "rt_sigtimedwait": 128,
    "rt_sigsuspend": 130, "sigaltstack": 131, "utime": 132, "statfs": 137, "fstatfs": 138, "prctl": 157, "arch_prctl": 158,
    "gettid": 186, "time": 201, "futex": 202, "sched_getaffinity": 204, "epoll_create": 213, "getdents64": 217,
    "set_tid_address": 218, "restart_syscall": 219, "fadvise64": 221, "clock_gettime": 228, "clock_getres": 229,
    "clock_nanosleep": 230, "exit_group": 231, "epoll_wait": 232, "epoll_ctl": 233, "utimes": 235, "waitid": 247,
    "openat": 257, "mkdirat": 258, "newfstatat": 262, "unlinkat": 263, "renameat": 264, "linkat": 265, "symlinkat": 266,
    "readlinkat": 267, "fchmodat": 268, "faccessat": 269, "pselect6": 270, "ppoll": 271, "unshare": 272,
    "set_robust_list": 273, "utimensat": 280, "epoll_pwait": 281, "eventfd": 284, "fallocate": 285, "eventfd2": 290,
    "epoll_create1": 291, "dup3": 292, "pipe2": 293, "preadv": 295, "pwritev": 296, "prlimit64": 302, "getcpu": 309,
    "renameat2": 316, "getrandom": 318, "statx": 332, "rseq": 334, "move_mount": 429, "clone3": 435, "close_range": 436,
    "openat2": 437, "faccessat2": 439, "epoll_pwait2": 441,
}
_AARCH64 = {
    "getcwd": 17, "eventfd2": 19, "epoll_create1": 20, "epoll_ctl": 21, "epoll_pwait": 22, "dup": 23, "dup3": 24,
    "fcntl": 25, "ioctl": 29, "flock": 32, "mkdirat": 34, "unlinkat": 35, "symlinkat": 36, "linkat": 37, "renameat": 38,
    "statfs": 43, "fstatfs": 44, "truncate": 45, "ftruncate": 46, "fallocate": 47, "faccessat": 48, "chdir": 49,
    "fchdir": 50, "fchmod": 52, "fchmodat": 53, "openat": 56, "close": 57, "pipe2": 59, "getdents64": 61, "lseek": 62,
    "read": 63, "write": 64, "readv": 65, "writev": 66, "pread64": 67, "pwrite64": 68, "preadv": 69, "pwritev": 70,
    "sendfile": 71, "pselect6": 72, "ppoll": 73, "readlinkat": 78, "newfstatat": 79, "fstat": 80, "fsync": 82,
    "fdatasync": 83, "utimensat": 88, "exit": 93, "exit_group": 94, "waitid": 95, "set_tid_address": 96, "unshare": 97,
    "futex": 98, "set_robust_list": 99, "nanosleep": 101, "getitimer": 102, "setitimer": 103, "clock_gettime": 113,
    "clock_getres": 114, "clock_nanosleep": 115, "sched_getaffinity": 123, "sched_yield": 124, "restart_syscall": 128,
    "sigaltstack": 132, "rt_sigsuspend": 133, "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigpending": 136,
    "rt_sigtimedwait": 137, "rt_sigreturn": 139, "getresuid": 148, "getresgid": 150, "times": 153, "getgroups": 158,
    "uname": 160, "getrlimit": 163, "getrusage": 165, "umask": 166, "prctl": 167, "getcpu": 168, "gettimeofday": 169, "getpid": 172,
    "getppid": 173, "getuid": 174, "geteuid": 175, "getgid": 176, "getegid": 177, "gettid": 178,
    "socketpair": 199, "getsockname": 204, "getpeername": 205, "sendto": 206, "recvfrom": 207, "getsockopt": 209,
    "shutdown": 210, "recvmsg": 212, "brk": 214, "munmap": 215, "mremap": 216, "clone": 220,
    "mmap": 222, "fadvise64": 223, "mprotect": 226, "msync": 227, "madvise": 233,
    "wait4": 260, "prlimit64": 261, "renameat2": 276, "getrandom": 278, "statx": 291, "rseq": 293, "move_mount": 429,
    "clone3": 435, "close_range": 436, "openat2": 437, "faccessat2": 439, "epoll_pwait2": 441,
}
# fmt: on
SYSCALLS = _AARCH64 if platform.machine() == "aarch64" else _X86_64

CLONE_NEWNS = 0x00020000
_FORK_FLAGS = 0x01000000 | 0x00200000 | 0xFF  # CLONE_CHILD_SETTID, CLONE_CHILD_CLEARTID, exit signal
_AF_UNIX = 1
# Terminal size and queries, bytes waiting, close-on-exec, non-blocking: Python's io and asyncio use these.
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
# Duplicates, flags, a pipe's size. Not F_SETOWN, with which a pipe can send any signal to any state, and not F_ADD_SEALS.
_FCNTLS = (0, 1, 2, 3, 4, 1030, 1032, 1034)
# Locks. No other process uses a state's files, so it gets every lock without a system call. A real lock on a system file or
# device would be visible to other states.
_FCNTL_LOCKS = (5, 6, 7, 36, 37, 38)
_MAP_SHARED = 1
_PR_SET_DUMPABLE = 4

_ALLOW, _NOTIFY, _KILL = 0x7FFF0000, 0x7FC00000, 0x80000000
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_NR, _ARCH, _ARGS = 0, 4, 16


def _errno(number: int) -> int:
    return 0x00050000 | number


def program() -> bytes:
    """The filter in classic BPF (struct sock_filter[])."""
    code: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, ARCHITECTURE),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NR),
    ]

    def rule(name: str, *body: tuple[int, int, int, int]) -> None:
        code.append((_EQUAL, 0, len(body), SYSCALLS[name]))
        code.extend(body)

    def argument(index: int) -> tuple[int, int, int, int]:
        return (_LOAD, 0, 0, _ARGS + 8 * index)  # its lower half

    refuse = (_RETURN, 0, 0, _errno(errno.EPERM))
    rule("clone", argument(0), (_ANY_BIT, 0, 1, 0xFFFFFFFF & ~_FORK_FLAGS), refuse, (_RETURN, 0, 0, _NOTIFY))
    rule("unshare", argument(0), (_EQUAL, 1, 0, CLONE_NEWNS), refuse, (_RETURN, 0, 0, _NOTIFY))
    rule("move_mount", (_RETURN, 0, 0, _NOTIFY))
    # A filter cannot read clone3's arguments. With ENOSYS, glibc uses clone instead.
    rule("clone3", (_RETURN, 0, 0, _errno(errno.ENOSYS)))
    rule("socketpair", argument(0), (_EQUAL, 1, 0, _AF_UNIX), refuse, (_RETURN, 0, 0, _ALLOW))
    rule("prlimit64", argument(0), (_EQUAL, 1, 0, 0), refuse, (_RETURN, 0, 0, _ALLOW))  # only for the caller itself
    # PR_SET_DUMPABLE 0 is allowed: state 0 forbids others to read its memory, after the supervisor has taken the listener
    # (it could not take it later).
    undumpable = ((_EQUAL, 1, 0, _PR_SET_DUMPABLE), refuse, argument(1), (_EQUAL, 1, 0, 0), refuse)
    rule("prctl", argument(0), *undumpable, (_RETURN, 0, 0, _ALLOW))
    rule("mmap", argument(3), (_ANY_BIT, 0, 1, _MAP_SHARED), refuse, (_RETURN, 0, 0, _ALLOW))
    done = (_RETURN, 0, 0, _errno(0))
    rule("flock", done)
    locks = [(_EQUAL, 0, 1, command) for command in _FCNTL_LOCKS]
    as_locks = [step for test in locks for step in (test, done)]
    rule("fcntl", argument(1), *as_locks, *_one_of(_FCNTLS), refuse, (_RETURN, 0, 0, _ALLOW))
    rule("ioctl", argument(1), *_one_of(_IOCTLS), refuse, (_RETURN, 0, 0, _ALLOW))
    ruled = {
        "clone",
        "unshare",
        "move_mount",
        "clone3",
        "flock",
        "socketpair",
        "prlimit64",
        "prctl",
        "mmap",
        "ioctl",
        "fcntl",
    }
    for name in sorted(SYSCALLS.keys() - ruled):
        rule(name, (_RETURN, 0, 0, _ALLOW))
    code.append(refuse)
    return b"".join(struct.pack("=HBBI", *step) for step in code)


def _one_of(values: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """Instructions that skip the instruction after them if the loaded word equals one of the values."""
    return [(_EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def install() -> int:
    """Install the filter for this process and its descendants. Returns the listener's descriptor. Raises OSError."""
    if not ARCHITECTURE:
        raise OSError(errno.ENOSYS, f"no system-call filter for the machine type {platform.machine()}")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) != 0:  # PR_SET_NO_NEW_PRIVS
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS)")
    code = program()
    number = {"x86_64": 317, "aarch64": 277}[platform.machine()]
    program_struct = _Program(len(code) // 8, code)
    listener = libc.syscall(number, 1, 8, ctypes.byref(program_struct))  # SECCOMP_SET_MODE_FILTER, FLAG_NEW_LISTENER
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp(SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER)")
    return listener


class Verdict(enum.Enum):
    """The decision on a supervised call."""

    GO_ON = enum.auto()
    DONE = enum.auto()
    REFUSED = enum.auto()


@dataclasses.dataclass(frozen=True)
class Notification:
    """A process that waits for the decision on a system call."""

    id: int
    pid: int
    syscall: int


_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_RECV, SECCOMP_IOCTL_NOTIF_SEND
_CONTINUE = 1


def receive(listener: int) -> Notification | None:
    """The next call to decide on; None if its caller has ended."""
    buffer = bytearray(80)
    try:
        fcntl.ioctl(listener, _RECEIVE, buffer)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINTR):
            return None
        raise
    identity, pid, _, syscall = struct.unpack_from("=QIIi", buffer)
    return Notification(identity, pid, syscall)


def decide(listener: int, notification: Notification, verdict: Verdict) -> None:
    """Let the call go on, report it as done without making it, or fail it with EAGAIN (fork's error for too many processes)."""
    answer = {Verdict.GO_ON: (0, 0, _CONTINUE), Verdict.DONE: (0, 0, 0), Verdict.REFUSED: (0, -errno.EAGAIN, 0)}[
        verdict
    ]
    try:
        fcntl.ioctl(listener, _SEND, struct.pack("=QqiI", notification.id, *answer))
    except OSError as error:
        if error.errno != errno.ENOENT:  # ENOENT: the caller has died in the meantime
            raise
