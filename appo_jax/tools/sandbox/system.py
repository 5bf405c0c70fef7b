"""System calls that Python's os module lacks, and facts about processes and memory from /proc."""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import os
import resource
import socket
import termios
from collections.abc import Iterator

_libc = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 0x4000, 1 << 18
MS_REMOUNT, MS_BIND = 32, 4096
DEVICES = ("null", "zero", "random", "urandom")  # the devices in /dev that policy code sees
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 1, 4, 36
_FSOPEN, _FSCONFIG, _FSMOUNT, _MOVE_MOUNT, _PIDFD_GETFD = 430, 431, 432, 429, 438  # the same on x86_64 and aarch64
_CAP_SYS_ADMIN = 21
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE = 47, 2


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    _check(_libc.mount(source.encode(), target.encode(), kind.encode(), flags, data.encode()), f"mount {target}")


def prctl(option: int, value: int) -> None:
    _check(_libc.prctl(option, value, 0, 0, 0), "prctl")


def own_user_namespace() -> None:
    """Enter new user and mount namespaces, in which this process may mount. Earlier mounts can no longer be changed."""
    uid, gid = os.getuid(), os.getgid()
    unshare(CLONE_NEWUSER | CLONE_NEWNS)
    map_user("self", uid, gid)
    mount("none", "/", "", MS_REC | MS_PRIVATE)


def map_user(pid: int | str, uid: int, gid: int) -> None:
    """Give a process that has entered a new user namespace the same user there as before."""
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/{pid}/{name}", "w") as file:
            file.write(text)


def new_tmpfs(size: int, files: int) -> int:
    """The file descriptor of a new tmpfs that is not mounted yet, of at most `size` bytes and `files` files (fsmount(2))."""
    context = _check(_libc.syscall(_FSOPEN, b"tmpfs", 1), "fsopen")
    try:
        for key, value in ((b"size", b"%d" % size), (b"nr_inodes", b"%d" % files), (b"mode", b"0700")):
            _check(_libc.syscall(_FSCONFIG, context, 1, key, value, 0), "fsconfig")
        _check(_libc.syscall(_FSCONFIG, context, 6, None, None, 0), "fsconfig create")
        return _check(_libc.syscall(_FSMOUNT, context, 1, 2 | 4), "fsmount")  # nosuid, nodev
    finally:
        os.close(context)


def attach_mount(fd: int, target: str) -> None:
    """Mount a tmpfs of `new_tmpfs` at `target` (move_mount(2))."""
    _check(_libc.syscall(_MOVE_MOUNT, fd, b"", -100, target.encode(), 4), f"move_mount {target}")


def ask_for_mount() -> None:
    """Wait until the supervisor has mounted this process's /tmp. The filter passes this call to the supervisor, which never
    lets it through."""
    _check(_libc.syscall(_MOVE_MOUNT, -1, b"", -1, b"", 0), "move_mount")


def detach_mount(target: str) -> None:
    """Unmount the file system at `target`. Its open files stay usable."""
    _check(_libc.umount2(target.encode(), 2), f"umount {target}")  # MNT_DETACH


@contextlib.contextmanager
def inside_mounts(fd: int, home: int) -> Iterator[None]:
    """Enter the mount namespace `fd`, and return to `home` at the end. For processes with a single thread."""
    _check(_libc.setns(fd, CLONE_NEWNS), "setns")
    try:
        yield
    finally:
        _check(_libc.setns(home, CLONE_NEWNS), "setns back")


def make_read_only(target: str) -> None:
    """Make the mount at `target` read-only; fails with EBUSY while a file in it is open for writing."""
    mount("", target, "", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def mounted_devices(pid: int) -> set[int]:
    """The device numbers of the file systems that a process sees."""
    found = set()
    with open(f"/proc/{pid}/mountinfo") as file:
        for line in file:
            major, minor = line.split()[2].split(":")
            found.add(os.makedev(int(major), int(minor)))
    return found


def descriptors(pid: int) -> list[int]:
    """The open descriptors of a process except 0, 1 and 2."""
    return [int(name) for name in os.listdir(f"/proc/{pid}/fd") if int(name) > 2]


def lock_devices() -> None:
    """Make the mounts of the device files read-only. The devices still work, but their modes and times, which are the host's,
    cannot be changed. (With bubblewrap's --remount-ro they would no longer work as devices.)"""
    for device in DEVICES:
        mount("", f"/dev/{device}", "", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NOEXEC)


def take_descriptor(pidfd: int, fd: int) -> int:
    """A copy of another process's descriptor (pidfd_getfd(2)). Sending descriptors in a message would count against the limit
    of descriptors in flight, which all processes of a user share."""
    return _check(_libc.syscall(_PIDFD_GETFD, pidfd, fd, 0), "pidfd_getfd")


def unread(channel: socket.socket) -> int:
    """The number of bytes sent over a UNIX socket that the other end has not received yet (SIOCOUTQ)."""
    waiting = array.array("i", [0])
    fcntl.ioctl(channel, termios.TIOCOUTQ, waiting)
    return waiting[0]


def new_output() -> int:
    """The descriptor of a file in memory for a cell's output."""
    return os.memfd_create("output", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def take_output(fd: int, max_head: int, tail: int) -> bytes:
    """Read and close an output. A long output is cut to its first `max_head + tail` and its last `tail` bytes.

    Code may still hold it open, so it is emptied and sealed against writing."""
    size = os.fstat(fd).st_size
    data = os.pread(fd, max_head + tail, 0)
    if size > max_head + tail:
        data += os.pread(fd, tail, max(size - tail, max_head + tail))
    os.ftruncate(fd, 0)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    os.close(fd)
    return data


def keep_only_sys_admin() -> None:
    """Give up every capability except CAP_SYS_ADMIN in this process's user namespace."""
    _set_capabilities(1 << _CAP_SYS_ADMIN, inheritable=0)


def pass_on_sys_admin() -> None:
    """Give up every capability except CAP_SYS_ADMIN, which the next program of this process keeps."""
    _set_capabilities(1 << _CAP_SYS_ADMIN, inheritable=1 << _CAP_SYS_ADMIN)
    _check(_libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, _CAP_SYS_ADMIN, 0, 0), "prctl")


def _set_capabilities(kept: int, inheritable: int) -> None:
    number = {"x86_64": 126, "aarch64": 91}[os.uname().machine]
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)(kept, kept, inheritable, 0, 0, 0)  # effective, permitted; low and high words
    _check(_libc.syscall(number, header, sets), "capset")


def collapse_memory(maps: str) -> int:
    """Move the private memory listed in `maps` (/proc/self/maps) into huge pages if the kernel can (Linux 6.1). A fork then
    copies fewer page-table entries, which saves a quarter of a call's time. Returns the size of the address space."""
    huge, collapse, size = 2 << 20, 25, 0
    for line in maps.splitlines():
        span, permissions, *rest = line.split()
        start, end = (int(address, 16) for address in span.split("-"))
        size += end - start
        if permissions == "rw-p" and (len(rest) < 4 or rest[3] == "[heap]"):
            first, last = -(-start // huge) * huge, end // huge * huge
            if first < last:
                _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), collapse)
    return size


def _of_process(pid: int, name: str) -> bytes:
    """A short file of /proc/PID, with a single read. Every call reads two of them, and a text file object would take ten times
    as long. Raises OSError."""
    fd = os.open(f"/proc/{pid}/{name}", os.O_RDONLY)
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)


def parent_of(pid: int) -> int:
    """The parent process of `pid`; -1 if `pid` does not exist."""
    return _state_and_parent(pid)[1]


def is_running(pid: int) -> bool:
    """Whether the process `pid` exists and has not ended (a zombie has)."""
    return _state_and_parent(pid)[0] not in (b"", b"Z")


def _state_and_parent(pid: int) -> tuple[bytes, int]:
    try:
        state, parent, *_ = _of_process(pid, "stat").rpartition(b")")[2].split()
        return state, int(parent)
    except (OSError, ValueError):
        return b"", -1


def descendants(pid: int) -> set[int]:
    """All descendants of the process `pid`, including zombies."""
    parents = {int(name): parent_of(int(name)) for name in os.listdir("/proc") if name.isdigit()}
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def private_memory(pid: int) -> int:
    """Bytes of a process's memory that is not backed by files, including pages shared with its ancestors; 0 if it does not
    exist."""
    try:
        _, resident, shared, *_ = map(int, _of_process(pid, "statm").split())
    except OSError:
        return 0
    return (resident - shared) * resource.getpagesize()


def folder_usage(path: str) -> tuple[int, int]:
    """The bytes on disk and the number of files and folders below a folder. The bytes of a file with several names count
    once."""
    sizes, number = {}, 0
    for folder, below, files in os.walk(path):
        number += len(below) + len(files)
        for name in files:
            with contextlib.suppress(OSError):
                info = os.lstat(os.path.join(folder, name))
                sizes[info.st_ino] = 512 * info.st_blocks
    return sum(sizes.values()), number


def available_memory() -> int:
    """Bytes of memory that are available without swapping."""
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return 4 << 30
