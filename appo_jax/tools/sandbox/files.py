"""A state's files. They are sealed when its call ends, and copied for every state that is forked from it.

After a call the supervisor makes the state's /tmp read-only, so that no fork can change the files from which another one
starts. `seal` prepares that: it reopens files that are open for writing, for reading. `take` gives a fork its own copy: names,
contents, holes, hard links, modes and times, and the open files as they were, including those without a name. If something
cannot be copied, the call ends with `Refused` and the reason, and the rollout continues from the state before the call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import select
import stat
from typing import Any

MAX_DEPTH = 250  # of folders in each other
MAX_PATH = 3800  # bytes of a path; a system call takes at most 4096
Identity = tuple[int, int]  # device and inode


class Refused(Exception):
    """No later call can be forked from this state. The text is for the policy."""


@dataclasses.dataclass
class Held:
    """An open file of a state, as it was open before `seal`."""

    fd: int
    flags: int
    same: int  # the descriptor of which this one is a duplicate; its own number for an original
    position: int


held: list[Held] = []  # the open files of this state, as `seal` found them
_watched: list[int] = []
_poll = select.poll()
kept = False  # whether this state has files that a fork must copy


def seal(folder: int, descriptors: list[int]) -> None:
    """Reopen for reading those of `descriptors` that are open for writing below `folder`. Raises Refused."""
    global kept
    kept = True
    held.clear()
    device = os.fstat(folder).st_dev
    names = _names(folder)
    for fd in descriptors:
        info = os.fstat(fd)
        known = (info.st_dev, info.st_ino) in names or info.st_nlink == 0
        if info.st_dev != device or not known:
            continue
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        if stat.S_ISDIR(info.st_mode):
            if os.lseek(fd, 0, os.SEEK_CUR):
                raise Refused("a folder is being listed (os.scandir); finish that, or close it, within one call")
            held.append(Held(fd, flags, fd, 0))
        elif stat.S_ISREG(info.st_mode):
            held.append(Held(fd, flags, _duplicate_of(fd, flags), os.lseek(fd, 0, os.SEEK_CUR)))
    for file in held:
        if file.flags & os.O_ACCMODE == os.O_RDONLY:
            continue
        if file.same != file.fd:
            os.dup2(file.same, file.fd, inheritable=False)
            continue
        info = os.fstat(file.fd)
        name = names.get((info.st_dev, info.st_ino))
        if name is not None:
            copy = os.open(name, os.O_RDONLY, dir_fd=folder)
        elif file.flags & os.O_ACCMODE == os.O_WRONLY:
            raise Refused("a file without a name is open for writing only; close it before the call ends")
        else:
            copy = _nameless_copy(file.fd, folder, os.O_RDONLY)
        os.lseek(copy, file.position, os.SEEK_SET)
        os.dup2(copy, file.fd, inheritable=False)
        os.close(copy)


def take(old: int, new: int) -> None:
    """Copy everything below the folder `old` to the empty folder `new`, and reopen the open files there. Raises OSError."""
    copied: dict[Identity, str] = {}
    _copy_folder(old, new, ".", copied)
    for file in held:
        info = os.fstat(file.fd)
        name = copied.get((info.st_dev, info.st_ino))
        if file.same != file.fd:
            copy = os.dup(file.same)
        elif name is not None:
            copy = os.open(name, file.flags & ~(os.O_CREAT | os.O_EXCL | os.O_TRUNC), dir_fd=new)
        else:
            copy = _nameless_copy(file.fd, new, file.flags)
        if file.same == file.fd and not stat.S_ISDIR(info.st_mode):
            os.lseek(copy, file.position, os.SEEK_SET)
        os.dup2(copy, file.fd, inheritable=False)
        os.close(copy)


def _check(path: str, info: os.stat_result, folder: int) -> None:
    """Check that a file or folder can be copied. Raises Refused."""
    if path.count("/") > MAX_DEPTH or len(os.fsencode(path)) > MAX_PATH:
        raise Refused("folders are nested too deeply to be copied for later calls")
    needed = {stat.S_IFREG: os.R_OK, stat.S_IFDIR: os.R_OK | os.X_OK}.get(stat.S_IFMT(info.st_mode), 0)
    if needed and not os.access(path, needed, dir_fd=folder):
        raise Refused(f"{path[2:]!r} may not be read (mode {stat.S_IMODE(info.st_mode):04o})")


def forget() -> None:
    """Record that the folder is empty and no file is open."""
    global kept
    kept = False
    held.clear()


def watch(first: int, last: int) -> None:
    """Set the descriptors that policy code may have: `first` to `last - 1`."""
    for fd in range(first, last):
        _watched.append(fd)
        _poll.register(fd, 0)


def open_descriptors() -> list[int]:
    """The watched descriptors that are open, found with one system call."""
    closed = [fd for fd, event in _poll.poll(0) if event & select.POLLNVAL]
    return [] if len(closed) == len(_watched) else sorted(set(_watched).difference(closed))


def _duplicate_of(fd: int, flags: int) -> int:
    """The earlier descriptor that shares its position with `fd`; `fd` itself if there is none."""
    info, position = os.fstat(fd), os.lseek(fd, 0, os.SEEK_CUR)
    for other in held:
        theirs = os.fstat(other.fd)
        if (
            other.same != other.fd
            or other.flags != flags
            or (theirs.st_dev, theirs.st_ino) != (info.st_dev, info.st_ino)
        ):
            continue
        os.lseek(fd, position + 1, os.SEEK_SET)
        shared = os.lseek(other.fd, 0, os.SEEK_CUR) == position + 1 != other.position
        os.lseek(fd, position, os.SEEK_SET)
        if shared:
            return other.fd
    return fd


def _nameless_copy(fd: int, folder: int, flags: int) -> int:
    """A nameless copy of an open file that has no name."""
    name = ".nameless"
    target = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder)
    try:
        _copy_content(fd, target)
        return os.open(name, flags & (os.O_ACCMODE | os.O_APPEND | os.O_NONBLOCK), dir_fd=folder)
    finally:
        os.close(target)
        os.unlink(name, dir_fd=folder)


def _walk(folder: int, path: str = ".") -> Any:
    """The paths below an open folder with their `stat` results; a folder comes before its contents."""
    todo = [path]
    while todo:
        here = todo.pop()
        below = os.open(here, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
        try:
            names = os.listdir(below)
        finally:
            os.close(below)
        for name in names:
            where = f"{here}/{name}"
            info = os.stat(where, dir_fd=folder, follow_symlinks=False)
            yield where, info
            if stat.S_ISDIR(info.st_mode):
                todo.append(where)


def _names(folder: int) -> dict[Identity, str]:
    """The paths of all files and folders, by inode. Raises Refused if one of them cannot be copied."""
    top = os.fstat(folder)
    names = {(top.st_dev, top.st_ino): "."}
    for path, info in _walk(folder):
        _check(path, info, folder)
        names[info.st_dev, info.st_ino] = path
    return names


def _copy_folder(old: int, new: int, top: str, copied: dict[Identity, str]) -> None:
    info = os.fstat(old)
    copied[info.st_dev, info.st_ino] = top
    folders: list[tuple[str, os.stat_result]] = [(top, info)]
    for path, info in _walk(old, top):
        identity = (info.st_dev, info.st_ino)
        if stat.S_ISLNK(info.st_mode):
            os.symlink(os.readlink(path, dir_fd=old), path, dir_fd=new)
            os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns), dir_fd=new, follow_symlinks=False)
        elif stat.S_ISDIR(info.st_mode):
            os.mkdir(path, 0o700, dir_fd=new)
            folders.append((path, info))
            copied[identity] = path
        elif stat.S_ISREG(info.st_mode) and identity in copied:
            os.link(copied[identity], path, src_dir_fd=new, dst_dir_fd=new)
        elif stat.S_ISREG(info.st_mode):
            _copy_file(old, new, path, info)
            copied[identity] = path
    for path, info in reversed(folders):  # set times last, because files made in a folder change its times
        os.chmod(path, stat.S_IMODE(info.st_mode), dir_fd=new)
        os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns), dir_fd=new)


def _copy_file(old: int, new: int, path: str, info: os.stat_result) -> None:
    source = os.open(path, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=old)
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=new)
    try:
        _copy_content(source, target)
        os.fchmod(target, stat.S_IMODE(info.st_mode))
    finally:
        os.close(source)
        os.close(target)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns), dir_fd=new)


def _copy_content(source: int, target: int) -> None:
    """Copy the data of a file and keep its holes."""
    position, end = os.lseek(source, 0, os.SEEK_CUR), os.fstat(source).st_size
    os.ftruncate(target, end)
    start = 0
    with contextlib.suppress(OSError):  # ENXIO: no more data
        while start < end:
            start = os.lseek(source, start, os.SEEK_DATA)
            stop = os.lseek(source, start, os.SEEK_HOLE)
            os.lseek(target, start, os.SEEK_SET)
            while start < stop:
                sent = os.sendfile(target, source, start, stop - start)
                if not sent:
                    raise EOFError("the file became shorter while it was copied")
                start += sent
    os.lseek(source, position, os.SEEK_SET)
