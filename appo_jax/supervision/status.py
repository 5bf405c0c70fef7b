"""status.json of a run: what every host does now, and how the run ended. `appo-jax status RUN` reads it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pydantic

from appo_jax.errors import DataError
from appo_jax.storage import write_atomically

FILE = "status.json"
FAILURES = "failures.jsonl"
IN_A_ROW = 3
# A live run writes the file at least this often. If the file is three times as old, the run's machine is lost.
WRITE_S = 5.0


@dataclasses.dataclass(frozen=True)
class Status:
    """The last known state of a run."""

    # How `read_status` checks it.
    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}  # noqa: RUF012

    state: str  # running, done, stopped, failed
    steps: int  # the number of steps in the config
    time: float  # Unix time at which this was written
    hosts: Mapping[str, Mapping[str, Any]]  # "0", "1" …: the host's last heartbeat
    error: str | None = None  # the last failure, which may be that of an earlier start
    error_time: float = 0.0  # Unix time of that failure
    failures: int = 0  # how often the run has failed

    def write(self, run_dir: Path) -> None:
        write_atomically(run_dir / FILE, json.dumps(dataclasses.asdict(self), indent=1) + "\n", durable=False)


def note_failure(run_dir: Path, host: int, machine: str, step: int, text: str) -> str:
    """Add a failure to failures.jsonl. Returns a warning if the last three failures were on the same host, else "".

    They count even if the run made steps between them: a host that fails now and then is faulty, too.
    """
    path = run_dir / FAILURES
    before = path.read_text(errors="replace") if path.exists() else ""
    record = {"time": round(time.time()), "host": host, "machine": machine, "step": step, "error": text}
    with path.open("a") as file:  # the line before may have been cut
        file.write(("\n" if before and not before.endswith("\n") else "") + json.dumps(record) + "\n")
    hosts = []
    for line in before.splitlines():
        with contextlib.suppress(ValueError, LookupError, TypeError):
            hosts.append(f"{json.loads(line)['host']} {json.loads(line)['machine']}")
    last = [*hosts, f"{host} {machine}"][-IN_A_ROW:]
    if len(last) < IN_A_ROW or len(set(last)) > 1:
        return ""
    return f"host {host} ({machine}) failed first the last {IN_A_ROW} times (see {path}): examine it, or replace it"


def read_status(run_dir: Path) -> Status | None:
    """The status of a run; None if it has none yet. Raises DataError for a file that cannot be read."""
    try:
        return pydantic.TypeAdapter(Status).validate_json((run_dir / FILE).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, pydantic.ValidationError) as error:
        reason = str(error)
        if isinstance(error, pydantic.ValidationError):
            problem = error.errors()[0]
            reason = " ".join([*map(str, problem["loc"]), problem["msg"]])
        raise DataError(f"{run_dir / FILE}: cannot be read ({reason}); a run that goes on writes it again") from error


def runs_under(folder: Path) -> Iterator[Path]:
    """The run directories in a folder: the folder itself if it is one, else those one or two levels below it.

    A folder below it that this user may not enter, such as lost+found, is passed over. One that the disk does not give counts
    as a run: `read_status` says what is wrong with it.
    """

    def is_run(path: Path) -> bool:
        try:
            return _is_run(path)
        except OSError as error:
            return path == folder or not isinstance(error, PermissionError)

    if is_run(folder):
        yield folder
        return
    yield from sorted(path for child in _entries(folder) for path in (child, *_entries(child)) if is_run(path))


def _is_run(folder: Path) -> bool:
    """Whether a folder is a run's. Folders of weights have a config.json, too, but no lock."""
    return (folder / FILE).exists() or ((folder / "config.json").exists() and (folder / "lock").exists())


def _entries(folder: Path) -> list[Path]:
    """What is in a folder; nothing if it is none, or cannot be read."""
    with contextlib.suppress(OSError):
        return list(folder.iterdir())
    return []


def describe(run_dir: Path, now: float | None = None) -> str:
    """The text of `appo-jax status`: a line for the run and, while several hosts run, a line for each of them."""
    status = read_status(run_dir)
    if status is None:
        return f"{run_dir}: no status yet"
    now = now or time.time()
    age, ahead = max(0.0, now - status.time), status.time - now
    state = status.state
    if state == "running" and age > 3 * WRITE_S:
        state = f"no sign of life for {_span(age)}: its process, its machine or its disk is gone, or the clocks differ"
    elif state == "running" and ahead > 3 * WRITE_S:
        state += f" (or not: the clock of its machine was {_span(ahead)} ahead of this one's)"
    first = status.hosts.get("0", {})
    line = f"{run_dir}: {state}, step {first.get('step', 0)} of {status.steps}"
    if status.state == "running":
        silent = first.get("silent_s")
        line += (
            f", {first.get('phase', 'start')} for {_span(age + (silent if isinstance(silent, int | float) else 0.0))}"
        )
    else:
        line += f", {_span(age)} ago"
    lines = [line]
    for host, beat in status.hosts.items():
        if status.state == "running" and len(status.hosts) > 1:
            waits = ", waits for the others" if beat.get("waiting") else ""
            machine, step, phase = (beat.get(name, "?") for name in ("machine", "step", "phase"))
            lines.append(f"  host {host} ({machine}): step {step}, {phase}{waits}")
    if status.error:
        when = ""
        if status.state != "failed":  # the error is that of an earlier start
            ago = max(0.0, now - status.error_time)
            when = f", {_span(ago)} ago, failure {status.failures}"
        lines.append(f"  last error{when}: " + status.error.replace("\n", "\n    "))
    return "\n".join(lines)


def _span(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
