"""What a run reports: metrics.jsonl, TensorBoard event files, summary.json and the dumps of rollout trees.

Names are `group/name`; `view/plots.py` draws each group. Times are in seconds, lengths in tokens.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from appo_jax import distributed
from appo_jax.storage import write_atomically
from appo_jax.types import Rollout

Value = float | int | str


class MetricsLogger:
    """Writes the metrics of the run in directory `run_dir`; with several hosts, the first one does.

    A step's line is on disk when `log` returns. JSON has no NaN and no infinities: metrics.jsonl holds null in their
    place, TensorBoard the value itself.
    """

    def __init__(self, run_dir: Path, name: str = "metrics") -> None:
        """`name`: of the file, for another phase than the main one ("sft" -> sft.jsonl, tensorboard/sft)."""
        self._run_dir = Path(run_dir)
        self._file = self._run_dir / f"{name}.jsonl"
        self._name = name
        self._last_step = -1
        self._board: SummaryWriter | None = None
        self._writes = distributed.host() == 0
        records = read_metrics(self._file)
        self.resume(records[-1]["step"] if records else -1)

    def log(self, step: int, metrics: Mapping[str, Value]) -> None:
        """Append one step. Raises ValueError unless steps grow: every step has exactly one line."""
        if step <= self._last_step:
            raise ValueError(f"step {step} was logged already (the last one is {self._last_step}); call resume first")
        self._last_step = step
        if not self._writes:
            return
        with self._file.open("a") as file:
            file.write(_to_json({"step": step} | dict(metrics)))
            file.flush()
            os.fsync(file.fileno())
        if self._board is None:  # purge_step: TensorBoard forgets what a killed process logged from here on
            self._board = SummaryWriter(str(self._run_dir / "tensorboard" / self._name), purge_step=step)
        for key, value in metrics.items():
            if not isinstance(value, str):
                self._board.add_scalar(key, float(value), step)
        self._board.flush()

    def resume(self, step: int) -> None:
        """Forget what was logged after `step`, and a last line cut short by a crash: the run goes on from `step`."""
        kept = [record for record in read_metrics(self._file) if record["step"] <= step]
        self._last_step = kept[-1]["step"] if kept else -1
        if not self._writes:
            return
        if self._file.exists():
            write_atomically(self._file, "".join(_to_json(record) for record in kept))
        if self._name == "metrics":
            for path in (self._run_dir / "rollouts").glob("step_*.jsonl"):
                if int(path.stem.removeprefix("step_")) > step:
                    path.unlink()

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json; a reader finds the old one or the new one, never half of one."""
        if self._writes:
            write_atomically(self._run_dir / "summary.json", _to_json(summary, indent=2))

    def dump_trees(self, step: int, trees: Sequence[Sequence[Rollout]], decode: Callable[[Sequence[int]], str]) -> Path:
        """Write rollouts/step_000012.jsonl, one prompt's tree a line (see `tree_record`). `decode`: ids to text."""
        path = self._run_dir / "rollouts" / f"step_{step:06d}.jsonl"
        if self._writes:
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, "".join(_to_json(tree_record(step, tree, decode)) for tree in trees))
        return path

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, in order; none where it does not exist. A last line cut short is left out."""
    if not path.exists():
        return []
    *lines, _ = path.read_text().split("\n")  # after the last newline: nothing, or a line cut short
    return [json.loads(line) for line in lines]


def tree_record(step: int, tree: Sequence[Rollout], decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    """One prompt's rollouts as plain JSON.

    A node's `segments` are its own tokens: all of the response for an initial rollout, those from `fork` on for a
    branch. They are cut where sampled text and tool results meet and at every branch position, so that a segment
    `start`s at each index in `branch_positions` (where another node was branched off this one).
    """
    example = tree[0].example
    return {
        "step": step,
        "id": example.id,
        "question": example.question,
        "golds": list(example.golds),
        "kind": example.kind,
        "nodes": [_node_record(rollout, tree, decode) for rollout in tree],
    }


def _node_record(rollout: Rollout, tree: Sequence[Rollout], decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    forks = sorted({other.fork for other in tree if other.parent == rollout.node and other.fork is not None})
    start = rollout.prompt_length if rollout.fork is None else rollout.fork
    turns = start + 1 + np.flatnonzero(np.diff(rollout.sampled[start:]))  # where sampled text and tool results meet
    cuts = sorted({start, *turns.tolist(), *(fork for fork in forks if fork > start), rollout.length})
    return {
        "node": rollout.node,
        "parent": rollout.parent,
        "fork": rollout.fork,
        "loop": rollout.loop,
        "prompt_tokens": rollout.prompt_length,
        "tokens": rollout.length,
        "sampled_tokens": int(rollout.sampled[start:].sum()),
        "reward": rollout.reward,
        "correct": bool(rollout.correct),
        "reward_detail": rollout.reward_detail,
        "reward_error": rollout.reward_error,
        "stop_reason": str(rollout.stop_reason),
        "branch_positions": forks,
        "calls": [call.to_json() for call in rollout.calls],
        "segments": [
            {"start": a, "sampled": bool(rollout.sampled[a]), "text": decode(rollout.tokens[a:b].tolist())}
            for a, b in itertools.pairwise(cuts)
        ],
    }


def _to_json(record: Mapping[str, Any], indent: int | None = None) -> str:
    """One line of strict JSON, or an indented document: array scalars as numbers, NaN and infinities as null."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if hasattr(value, "item"):
            value = value.item()
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(record), indent=indent, allow_nan=False) + "\n"
