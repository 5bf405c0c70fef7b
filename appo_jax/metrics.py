"""Writes a run's metrics.jsonl, TensorBoard event files, summary.json and dumps of rollout trees.

Names are `group/name`; `view/plots.py` draws each group. Times are in seconds, lengths in tokens.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.summary import scalar

from appo_jax import distributed
from appo_jax.dumps import Decode, dump_files, dumped_steps, settle_dumps, spans, write_dump
from appo_jax.errors import CheckpointError
from appo_jax.storage import naming, numbered_folders, set_aside, to_json, write_atomically
from appo_jax.types import Rollout

Value = float | int | str
_log = logging.getLogger(__name__)


class MetricsLogger:
    """Writes the metrics of the run in directory `run_dir`; with several hosts, the first one does.

    A step's line is on disk when `log` returns, and ends with a checksum of the rest of the line. JSON has no NaN and
    no infinities: metrics.jsonl has null instead, and TensorBoard has no point.
    """

    def __init__(self, run_dir: Path, name: str = "metrics", keep_rollouts: int = 0) -> None:
        """`name`: the name of the files, which differs for the cold start ("sft" -> sft.jsonl, tensorboard/sft).

        `keep_rollouts`: the dumps of this many steps up to the newest checkpoint, and of all later steps, are kept; 0: all.
        """
        self._run_dir = Path(run_dir)
        self._file = self._run_dir / f"{name}.jsonl"
        self._name, self._keep_rollouts = name, keep_rollouts
        self._last_step: int | None = None  # not known before `resume` or the first `log`
        self._board: EventsWriter | None = None
        self._draws = True  # False when TensorBoard's file could not be written
        self._writes = distributed.host() == 0

    def log(self, step: int, metrics: Mapping[str, Value]) -> None:
        """Append the metrics of a step. Raises ValueError if the step is not greater than the last one."""
        if not self._writes:
            return
        if self._last_step is None:
            records = _read(self._file)[0]
            self._last_step = records[-1]["step"] if records else -1
        if step <= self._last_step:
            raise ValueError(f"step {step} was logged already (the last one is {self._last_step}); call resume first")
        self._last_step = step
        with naming(self._file), self._file.open("a") as file:
            file.write(_sealed({"step": step} | dict(metrics)))
            file.flush()
            os.fsync(file.fileno())
        if self._draws:
            numbers = {name: float(value) for name, value in metrics.items() if not isinstance(value, str)}
            # tensorboardX warns of each NaN without its name; a metric is NaN where nothing was measured.
            self._draw(step, {name: value for name, value in numbers.items() if math.isfinite(value)})

    def _draw(self, step: int, values: Mapping[str, float]) -> None:
        """Write TensorBoard's event of a step in this thread: the thread of tensorboardX's SummaryWriter ends at the first error,
        and then every call waits for ever. If the file cannot be written, the run goes on without it."""
        folder = self._run_dir / "tensorboard" / self._name
        try:
            if self._board is None:
                folder.mkdir(parents=True, exist_ok=True)
                self._board = EventsWriter(str(folder / "events"))
                # TensorBoard drops what a killed process logged for this step and later ones.
                self._board.write_event(Event(step=step, file_version="brain.Event:2"))
                self._board.write_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
            found = [value for name in values for value in scalar(name, values[name]).value]
            self._board.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=found)))
            self._board.flush()
        except OSError as error:
            self._draws = False
            self.close()
            _log.warning("%s: cannot be written (%s): the run goes on without TensorBoard's files", folder, error)

    def resume(self, step: int, last: Mapping[str, Value] | None = None, max_unsaved: int | None = None) -> None:
        """Prepare the records for a run that goes on from `step`, so that every step has one record.

        Later steps are made again, so their records and trees are removed. `last`: the record of `step` itself, if the checkpoint
        holds it. Lost records are named in the log and marked by a line `{"step": …, "lost": true}`; a damaged file is kept under
        another name. `max_unsaved`: a run makes at most this many steps without a checkpoint. If more are on record or in
        rollouts/ and `step` is 0, raises CheckpointError and changes nothing.
        """
        if not self._writes:
            return
        records, damage, cut = _read(self._file)
        dumped = dumped_steps(self._run_dir / "rollouts") if self._name == "metrics" else {}
        again = sorted(s for s in {*dumped, *(record["step"] for record in records)} if s > step)
        if step == 0 and max_unsaved is not None and again and again[-1] > max_unsaved:
            raise CheckpointError(
                f"{self._run_dir} holds records or trees of {again[-1]} steps, but there is no checkpoint of any; put the folder "
                "checkpoints back, or delete the run's folder to start from the beginning"
            )
        kept = {record["step"]: record for record in records if record["step"] <= step}
        if last is not None and step > 0:
            kept.setdefault(step, {"step": step} | dict(last))
        lost = [s for s in range(1, step + 1) if s not in kept]
        self._last_step = step if kept or lost else -1
        if cut and (damage or lost):  # by itself, it is what a killed process leaves; that step is done again
            damage.append(cut)
        if self._file.exists() and (damage or lost):
            damage.append(f"the file as it was is kept as {set_aside(self._file, copy=True).name}")
        if lost:
            damage.append(
                f"the records of {'steps' if len(lost) > 1 else 'step'} {spans(lost)} are lost, and marked so"
            )
        if self._file.exists() or lost:
            complete = {s: {"step": s, "lost": True} for s in lost} | kept
            write_atomically(self._file, "".join(_sealed(complete[s]) for s in sorted(complete)))
        if damage:
            _log.warning("%s: %s", self._file, "; ".join(damage))
        if self._name == "metrics" and (damage := settle_dumps(self._run_dir / "rollouts", step, self._keep_rollouts)):
            _log.warning("%s: %s", self._run_dir / "rollouts", "; ".join(damage))
        if again:
            _log.info("%s: no checkpoint holds steps %s: they are made again", self._file.name, spans(again))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json atomically."""
        if self._writes:
            write_atomically(self._run_dir / "summary.json", to_json(summary, indent=2))

    def dump_trees(self, step: int, trees: Sequence[Sequence[Rollout]], decode: Decode) -> None:
        """Write rollouts/step_000012.jsonl.gz, one prompt's tree per line. `decode`: from ids to text."""
        if not self._writes:
            return
        write_dump(self._run_dir / "rollouts", step, trees, decode)
        if self._keep_rollouts:
            # A later start goes on from the newest checkpoint, and later steps are made again.
            steps = numbered_folders(self._run_dir / "checkpoints/rl")
            saved = int(steps[-1].name) if steps else 0
            for old, paths in dump_files(self._run_dir / "rollouts").items():
                for path in paths if old <= saved - self._keep_rollouts else ():
                    path.unlink()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            if self._board is not None:
                self._board.close()
        self._board = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file in the order of their steps, without damaged lines; none if it does not exist."""
    records, damage, cut = _read(path)
    if damage:
        _log.warning("%s: %s; these are left out", path, "; ".join([*damage, *([cut] if cut else [])][:5]))
    return [record for record in records if not record.get("lost")]


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """The figures of a finished run; None if it has no summary.json, or a damaged one, which is logged."""
    path = run_dir / "summary.json"
    try:
        summary = json.loads(path.read_text())
        for name in ("accuracy_sft", "accuracy_final", "sampled_tokens", "wall_s"):
            float(summary[name])
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError) as error:
        _log.warning(
            "%s: is damaged (%s: %s); train the run again: only its end is repeated", path, type(error).__name__, error
        )
        return None
    return summary


def _sealed(record: Mapping[str, Any]) -> str:
    """A record as a line that ends with its checksum."""
    text = to_json(record)
    return f'{text[:-2]}, "crc": {zlib.crc32(text.encode())}}}\n'


def _read(path: Path) -> tuple[list[dict[str, Any]], list[str], str]:
    """The readable records, with increasing steps; descriptions of what is wrong with lines; and one of the last line if it is
    incomplete, else ""."""
    if not path.exists():
        return [], [], ""
    records: list[dict[str, Any]] = []
    damage: list[str] = []
    *lines, rest = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            step, crc = record["step"], record.pop("crc", None)
            if crc is not None and _sealed(record) != line.decode() + "\n":
                raise ValueError("not what was written")
        except (ValueError, TypeError, KeyError, AttributeError):
            damage.append(f"line {number} is not the record of a step")
            continue
        if not isinstance(step, int) or (records and step <= records[-1]["step"]):
            damage.append(f"line {number} repeats an earlier step")
            continue
        records.append(record)
    return records, damage, f"line {len(lines) + 1} is cut short" if rest else ""
