"""Exit codes and messages of failures. A message says what failed, in which phase, and what to do.

0    done                              75   the process was lost, hung or crashed, could not join the other hosts, or
1    an error that a restart repeats            its disk did not answer: the supervisor starts it again
2    a bad command line or config      130  asked to stop, by Ctrl-C or SIGTERM
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import sys
import traceback

from appo_jax import heartbeat
from appo_jax.errors import AppoError, ConfigError, JoinError

FAILED, BAD_CONFIG, START_AGAIN, INTERRUPTED = 1, 2, 75, 130

# Parts of JAX's messages when another host disappeared while this one waited for it, and when memory ran out. Only JAX raises
# JaxRuntimeError. Its collectives on CPUs raise ValueError, as any code may.
_OTHER_HOST = re.compile(
    r"gloo|coordination (service|agent)|barrier timed out|connection (reset|closed|refused)"
    r"|^(UNAVAILABLE|CANCELLED|ABORTED|DEADLINE_EXCEEDED):",
    re.I,
)
_GLOO = re.compile(r"^[A-Z_]+: Gloo ")
_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|out of memory|failed to allocate|bad_alloc", re.I)
_SIZE = re.compile(r"[\d.,]+ ?(?:[KMGT]i?B|bytes)|allocat\w* (?:of )?\d+", re.I)
_EXPLAINED = "_appo_jax_explained"  # the attribute of a reported error that holds its explanation
_THREADS = re.compile(r"can't start new thread|pthread_create|Resource temporarily unavailable", re.I)

# Errors of a shared disk or of the network to it, which a later start may not meet again.
DISK = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOTCONN)
_NO_SOCKET = (errno.EIO, errno.ESTALE, errno.EREMOTEIO)
_TENSORSTORE = re.compile(r"\[os_error_code='(\d+)'\]")  # an error of a file is a ValueError with this in its text
# Errors of files and disks, which may come without the file's name.
_FILES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE, errno.ENOMEM)


def exit_code(error: BaseException) -> int:
    """The exit code of a process that ends with `error`."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, ConfigError):
        return BAD_CONFIG
    if isinstance(error, JoinError) or may_follow_from_another_host(error) or _is_of_the_disk(error):
        return START_AGAIN
    return FAILED


def is_understood(error: BaseException) -> bool:
    """Whether `explain` says everything that a user needs: what went wrong and what to do. For any other error the traceback
    is shown."""
    return (
        isinstance(error, AppoError)
        or is_out_of_memory(error)
        or _is_out_of_threads(error)
        or (isinstance(error, OSError) and _is_of_a_file(error))
        or _has_no_backend(error)
    )


def _is_out_of_threads(error: BaseException) -> bool:
    return isinstance(error, RuntimeError | OSError) and bool(_THREADS.search(str(error)))


def _is_of_a_file(error: OSError) -> bool:
    """Whether an error is about a file or the disk. Connections and time limits raise OSErrors, too."""
    return error.errno in _FILES or (error.errno is not None and isinstance(error.filename, str))


def _is_of_the_disk(error: BaseException) -> bool:
    """Whether a file could not be read or written because its disk, or the connection to it, failed."""
    for e in causes(error):
        if found := _TENSORSTORE.search(str(e)):
            return int(found[1]) in DISK
        # A socket's errors have no file name. A write to an open file has none either, but it raises other errors than a socket.
        if isinstance(e, OSError) and (isinstance(e.filename, str) or e.errno in _NO_SOCKET):
            return e.errno in DISK
    return False


def _has_no_backend(error: BaseException) -> bool:
    """Whether JAX could not start on the requested platform. It raises errors of several types then."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, RuntimeError | AssertionError) and bool(frames) and "xla_bridge" in frames[-1].filename


def causes(error: BaseException) -> list[BaseException]:
    """The error, the one that it was raised from, and so on."""
    found = [error]
    while (cause := _cause(found[-1])) is not None and cause not in found:
        found.append(cause)
    return found


def _cause(error: BaseException) -> BaseException | None:
    # If a platform does not start, JAX raises an error while it handles the reason, but not from the reason.
    return error.__cause__ or (error.__context__ if _has_no_backend(error) else None)


def may_follow_from_another_host(error: BaseException) -> bool:
    """Whether the error, or one that it was raised from, may be the consequence of another host's failure: JAX reports a broken
    connection or barrier, or devices that are not available now."""
    return any(
        (_is_of_jax(e) and _OTHER_HOST.search(str(e))) or (isinstance(e, ValueError) and _GLOO.search(str(e)))
        for e in causes(error)
    )


def _is_of_jax(error: BaseException) -> bool:
    jax = sys.modules.get("jax")  # if it was not imported, it has raised nothing
    return jax is not None and isinstance(error, jax.errors.JaxRuntimeError)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of a device or of the host ran out."""
    return any(
        isinstance(e, MemoryError)
        or (isinstance(e, RuntimeError) and _MEMORY.search(str(e)))
        or (isinstance(e, ValueError) and str(e).startswith("RESOURCE_EXHAUSTED"))  # tensorstore
        for e in causes(error)
    )


def explain(error: BaseException) -> str:
    """What went wrong, in which phase, and what to do. For this program's own errors, it is the error's message."""
    if isinstance(error, AppoError):
        return str(error)
    if (explained := getattr(error, _EXPLAINED, None)) is not None:
        return explained
    phase, step = heartbeat.now()
    inside = "" if phase == "start" else f", phase {phase!r}"
    where = f" in step {step + 1}{inside}" if inside or step else ""  # few commands make steps
    text = " ".join(str(error).split()) or type(error).__name__
    if is_out_of_memory(error):
        asked = _SIZE.search(text)
        return (
            f"out of memory{where}{f' ({asked.group()} requested)' if asked else ''}; {_memory()}. Lower what the phase holds "
            "in memory: optimizer.micro_batch and sft.micro_batch (update, score), rollout.decode_rows (rollout, branch), set "
            f"optimizer.remat = 'layers', or take more devices (mesh.fsdp); `appo-jax plan` says what fits. JAX: {text[:300]}"
        )
    if _is_out_of_threads(error):
        return (
            f"no more threads or processes{where}: {text}; this user may have {_limit('RLIMIT_NPROC')} of them, and "
            f"this process has {len(os.listdir('/proc/self/task'))}. Raise the limit (ulimit -u, pids.max of the "
            "container), or lower tools.max_concurrency and rollout.decode_rows"
        )
    if _has_no_backend(error) and may_follow_from_another_host(error):
        reason = " ".join(str(causes(error)[-1]).split())
        return f"JAX cannot start on the devices of this machine now ({reason[:500]}); start again"
    if _has_no_backend(error):
        wanted = os.environ.get("JAX_PLATFORMS")
        how = f"JAX_PLATFORMS = {wanted!r} asks for it: unset it, or" if wanted else "Unset JAX_PLATFORMS, or"
        install = "install JAX for it: pip install 'jax[tpu]' or 'jax[cuda13]'"
        return f"JAX has no such device on this machine ({text[:300]}). {how} {install}"
    if isinstance(error, OSError) and _is_of_a_file(error):
        return _explain_os_error(error, where)
    return f"{type(error).__name__}{where}: {text[:2000]}{_place(error)}"


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return ""
    file = frames[-1].filename
    with contextlib.suppress(OSError, ValueError):  # the working directory is gone
        file = os.path.relpath(file)
    return f" ({file}:{frames[-1].lineno})"


def report(error: BaseException) -> None:
    """Report to the supervisor why this process fails; only the first report counts. `explain` says the same of `error` later,
    when the phases of the clean-up have hidden the one in which it was raised."""
    setattr(error, _EXPLAINED, explain(error))
    heartbeat.send(failed=explain(error), code=exit_code(error), secondary=may_follow_from_another_host(error))


def _explain_os_error(error: OSError, where: str) -> str:
    file = error.filename if isinstance(error.filename, str) else None
    folder = os.path.dirname(os.path.abspath(file)) if file else os.getcwd()
    advice = {
        errno.ENOSPC: "free some space, or give --run-dir on another disk",
        errno.EDQUOT: "the quota is used up: free some space, or give --run-dir on another disk",
        errno.EACCES: "give this user permission for it, or give another folder",
        errno.EPERM: "give this user permission for it, or give another folder",
        errno.ENOENT: "check the path",
        errno.EEXIST: "expected a folder, or a name that is free: give another path",
        errno.ENOTDIR: "a part of the path is a file; expected folders: give another path",
        errno.EISDIR: "expected a file, not a folder: give another path",
        errno.EROFS: "the file system is mounted read-only: mount it again, or give another folder",
        errno.EMFILE: f"raise the limit on open files (ulimit -n, now {_limit('RLIMIT_NOFILE')})",
        errno.ENOMEM: _memory(),
    }.get(error.errno or 0, "check the file and its disk, then start again")
    space = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        with contextlib.suppress(OSError):
            space = f" ({shutil.disk_usage(folder).free / 1e6:.0f} MB are free)"
    goes_on = ". The run goes on from its last checkpoint" if heartbeat.supervised() else ""
    return f"{file or 'a file'}: {error.strerror or error}{where}{space}; {advice}{goes_on}"


def _memory() -> str:
    """The free and total memory of this machine, in words."""
    with contextlib.suppress(OSError), open("/proc/meminfo") as file:
        kib = {line.split(":")[0]: int(line.split()[1]) for line in file}
        return f"the host has {kib['MemAvailable'] / 2**20:.1f} of {kib['MemTotal'] / 2**20:.1f} GiB left"
    return "the host's memory is not known"


def _limit(name: str) -> str:
    import resource

    soft = resource.getrlimit(getattr(resource, name))[0]
    return "any number" if soft == resource.RLIM_INFINITY else str(soft)
