"""The display of a running training: a live panel on a terminal, else plain lines."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import rich
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from appo_jax import distributed, heartbeat
from appo_jax.config import Config

# Metric -> its label.
SHOWN = {
    "sft/loss": "loss",
    "reward/initial": "reward",
    "reward/branch": "branch reward",
    "accuracy/initial": "accuracy",
    "eval/accuracy": "held-out",
    "rollout/entropy": "entropy",
    "rollout/response_tokens": "tokens",
    "rollout/truncated": "truncated",
    "update/clip_fraction": "clipped",
    "time/step_s": "s/step",
    "time/tokens_per_s": "tokens/s",
}


# Phase of the run (heartbeat.phase) -> its label.
PHASES = {
    "start": "reading data, starting tools",
    "index": "building the search index",
    "index columns": "building the search index",
    "demonstrations": "making demonstrations",
    "cold start": "cold start",
    "evaluate": "evaluating",
    "rollout": "sampling",
    "reward": "giving rewards",
    "score": "scoring",
    "branch": "drawing branches",
    "update": "updating",
    "checkpoint": "saving",
}


COMPILING = ("cold start", "evaluate", "rollout", "score", "branch", "update")  # phases that compile programs


class Progress:
    """A context manager that is called at every step of a run. It shows the metrics, the current phase and the time since the
    start, on the first host only.
    """

    def __init__(self, config: Config, console: Console | None = None) -> None:
        self._config = config
        self._console = console or (rich.get_console() if distributed.host() == 0 else Console(quiet=True))
        self._bars = Bars(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("· left"), TimeRemainingColumn(), console=self._console,
        )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}
        self._last_line = -float("inf")
        self._began = time.monotonic()
        self._metrics: dict[str, str] = {}
        self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=2, transient=True)
        self._is_live = False

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            with self._drawing():
                self._live.start()
                self._is_live = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._is_live:
            with self._drawing():
                self._live.stop()

    def sft_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """`step` steps of the cold start are done. They are short, so without a terminal a line is printed only every
        10 s."""
        self._update("cold start", step, self._config.sft.steps, metrics, every=10.0)

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """`step` steps of the algorithm are done."""
        self._update(self._config.algorithm, step, self._config.steps, metrics)

    def accuracies(self, accuracies: Mapping[str, float]) -> None:
        """Held-out accuracies known so far, by the names they have in summary.json."""
        names = {"accuracy_base": "before the cold start", "accuracy_sft": "after it"}
        known = [f"{100 * accuracies[name]:.1f} % {words}" for name, words in names.items() if name in accuracies]
        self._print("held-out accuracy: " + ", ".join(known))

    def done(self, summary: Mapping[str, Any]) -> None:
        """Print the run's result."""
        table = Table(title="held-out accuracy, greedy decoding", title_justify="left")
        stages = {"accuracy_base": "before SFT", "accuracy_sft": "after SFT"}
        for name, stage in (stages | {"accuracy_final": f"after {self._config.algorithm.upper()}"}).items():
            if name in summary:
                table.add_column(stage, justify="right")
        table.add_row(*(f"{100 * summary[n]:.1f} %" for n in (*stages, "accuracy_final") if n in summary))
        with self._drawing():
            self._console.print(table)
        self._print(f"{summary['sampled_tokens']:,} tokens sampled, {summary['wall_s']:.0f} s, {self._config.run_dir}")

    def _update(self, phase: str, step: int, total: int, metrics: Mapping[str, Any], every: float = 0.0) -> None:
        self._metrics = {word: _format(metrics[name]) for name, word in SHOWN.items() if name in metrics}
        now = time.monotonic()
        if self._console.is_terminal:
            if phase not in self._tasks:
                # The bar computes the speed from one update to the next; with an update at the first step it shows a
                # speed after the second.
                self._tasks[phase] = self._bars.add_task(phase, total=total, completed=step - 1)
            self._bars.update(self._tasks[phase], completed=step)
        elif now - self._last_line >= every or step == total:
            values = "  ".join(f"{word} {value}" for word, value in self._metrics.items())
            self._print(f"{phase} {step}/{total}  {values}")
            self._last_line = now

    def _render(self) -> Panel:
        table = Table.grid(padding=(0, 3))
        items = [Text.assemble((word, "dim"), f" {value}") for word, value in self._metrics.items()]
        for row in range(0, len(items), 4):
            table.add_row(*items[row : row + 4])
        return Panel(Group(self._bars, self._doing(), table), title=self._config.run_dir, title_align="left")

    def _doing(self) -> Text:
        """The current phase of the run, and the time since its start."""
        phase, detail, first = heartbeat.doing()
        words = PHASES.get(phase, phase) + (f", {detail}" if detail else "")
        if first and phase in COMPILING and " of " not in detail:  # the phase has made no progress yet
            words += " (compiling its programs)"
        elapsed = datetime.timedelta(seconds=int(time.monotonic() - self._began))
        return Text.assemble((str(elapsed), "dim"), f" {words}")

    def _print(self, text: str) -> None:
        with self._drawing():
            self._console.print(text, soft_wrap=True, highlight=False, markup=False)

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[None]:
        """A context in which output that nobody can read any more does not end the run: the rest is not printed."""
        try:
            yield
        except (OSError, SystemExit):  # rich raises SystemExit when the reader of a pipe is gone
            self._console.quiet = True


def _format(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
