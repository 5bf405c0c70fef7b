"""status.json of a run: what every host does now, and how the run ended. `appo-jax status RUN` reads it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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

    state: str  # running, done, stopped, failed
    steps: int  # the number of steps in the config
    time: float  # Unix time at which this was written
    hosts: Mapping[str, Mapping[str, Any]]  # "0", "1" …: the host's last heartbeat
    error: str | None = None  # the last failure

    def write(self, run_dir: Path) -> None:
        write_atomically(run_dir / FILE, json.dumps(dataclasses.asdict(self), indent=1) + "\n", durable=False)


def note_failure(run_dir: Path, host: int, machine: str, step: int, text: str) -> str:
    """Add a failure to failures.jsonl. Returns a warning if the last three failures were on the same host, else "".

    They count even if the run made steps between them: a host that fails now and then is faulty, too.
    """
    path = run_dir / FAILURES
    with path.open("a") as file:
        record = {"time": round(time.time()), "host": host, "machine": machine, "step": step, "error": text}
        file.write(json.dumps(record) + "\n")
    last = []
    for line in path.read_text(errors="replace").splitlines()[-IN_A_ROW:]:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            last.append((json.loads(line)["host"], json.loads(line)["machine"]))
    if len(last) < IN_A_ROW or len(set(last)) > 1:
        return ""
    return f"host {host} ({machine}) failed first the last {IN_A_ROW} times (see {path}): examine it, or replace it"


def read_status(run_dir: Path) -> Status | None:
    """The status of a run; None if it has none yet. Raises DataError for a file that cannot be read."""
    try:
        return Status(**json.loads((run_dir / FILE).read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{run_dir / FILE}: cannot be read ({error}); a live run writes it again within seconds"
        ) from error


def runs_under(folder: Path) -> Iterator[Path]:
    """The run directories in a folder: the folder itself if it is one, else those one or two levels below it."""
    if (folder / "config.json").exists() or (folder / FILE).exists():
        yield folder
        return
    found = {path.parent for pattern in ("*/config.json", "*/*/config.json") for path in folder.glob(pattern)}
    yield from sorted(found)


def describe(run_dir: Path, now: float | None = None) -> str:
    """The text of `appo-jax status`: a line for the run and, while several hosts run, a line for each of them."""
    status = read_status(run_dir)
    if status is None:
        return f"{run_dir}: no status yet"
    age = (now or time.time()) - status.time
    state = status.state
    if state == "running" and age > 3 * WRITE_S:
        state = f"no sign of life for {_span(age)}: its machine or its disk is gone"
    first = status.hosts.get("0", {})
    line = f"{run_dir}: {state}, step {first.get('step', 0)} of {status.steps}"
    if status.state == "running":
        line += f", {first.get('phase', 'start')} for {_span(float(first.get('silent_s', 0)) + age)}"
    else:
        line += f", {_span(age)} ago"
    lines = [line]
    for host, beat in status.hosts.items():
        if status.state == "running" and len(status.hosts) > 1:
            waits = ", waits for the others" if beat.get("waiting") else ""
            lines.append(f"  host {host} ({beat.get('machine', '?')}): step {beat['step']}, {beat['phase']}{waits}")
    if status.error:
        lines.append("  last error: " + status.error.replace("\n", "\n    "))
    return "\n".join(lines)


def _span(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
