"""status.json of a run: what it does now, on every host, and how it ended. `appo-jax status RUN` reads it."""

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
# Written at least so often while the run lives; a file three times as old is that of a run whose machine is gone.
WRITE_S = 5.0


@dataclasses.dataclass(frozen=True)
class Status:
    """A run as its supervisor saw it last."""

    state: str  # running, done, stopped, failed
    steps: int  # that the config asks for
    time: float  # Unix time of the last writing
    hosts: Mapping[str, Mapping[str, Any]]  # "0", "1" …: the host's last beat
    error: str | None = None  # the last failure

    def write(self, run_dir: Path) -> None:
        write_atomically(run_dir / FILE, json.dumps(dataclasses.asdict(self), indent=1) + "\n", durable=False)


def note_failure(run_dir: Path, host: int, machine: str, step: int, text: str) -> str:
    """Add a failure to failures.jsonl; returns a sentence when the same host failed each of the last three times, else "".

    Failures between which the run made steps count, too: a host that is sick now and then is sick.
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
    return f"host {host} ({machine}) failed first the last {IN_A_ROW} times (see {path}): look at it, or replace it"


def read_status(run_dir: Path) -> Status | None:
    """The status of a run, or None where it has none yet. Raises DataError for a file that cannot be read."""
    try:
        return Status(**json.loads((run_dir / FILE).read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{run_dir / FILE}: cannot be read ({error}); the run writes it anew while it lives") from error


def runs_under(folder: Path) -> Iterator[Path]:
    """The run directories in a folder: itself, or those below it."""
    if (folder / "config.json").exists() or (folder / FILE).exists():
        yield folder
        return
    found = {path.parent for pattern in ("*/config.json", "*/*/config.json") for path in folder.glob(pattern)}
    yield from sorted(found)


def describe(run_dir: Path, now: float | None = None) -> str:
    """Lines for a person: one for the run, one for each host that is not where the others are."""
    status = read_status(run_dir)
    if status is None:
        return f"{run_dir}: no status yet"
    age = (now or time.time()) - status.time
    state = status.state
    if state == "running" and age > 3 * WRITE_S:
        state = f"no sign of life for {_span(age)}: its machine is gone, or the disk is"
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
