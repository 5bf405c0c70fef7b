"""The report of `appo-jax plan`: whether a config fits a pod, and how long a step takes at least. No pod is needed.

Every program is compiled ahead of time for the topology, and the compiler gives its memory. Times are rooflines: the time of a
program is the longest of three times, those of its matrix products, of its memory traffic and of its collectives.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from appo_jax.config import Config
from appo_jax.plan.topology import GIB, Chip

log = logging.getLogger(__name__)

# Seconds from the end of a decode segment to the start of the next one, in which the host reads small arrays, exchanges them with
# other hosts and gives rows to rollouts. An assumption; compare `time/decode_s` of a real run with its plan to correct it.
HOST_LOOK_S = 2e-3
# Bytes per second at which a host writes to the run's storage. An assumption; measure yours with `dd` on all hosts at once.
STORAGE_RATE = 200e6
# Columns of the narrowest table. A narrower terminal wraps its lines.
MIN_WIDTH = 60


@dataclasses.dataclass(frozen=True)
class Sent:
    """What the collectives of one kind along the same axes of the mesh send in one run of a program."""

    size: float  # bytes, see network.Collective
    seconds: float


@dataclasses.dataclass(frozen=True)
class Need:
    """What one program needs on one device. Sizes are in bytes. For a refused program only `peak` and `resident` are known; the
    other measured figures are 0."""

    name: str
    peak: float  # HBM, `resident` included
    resident: float  # HBM of what the run holds at the same time and the program does not take as an argument
    arguments: float
    temporaries: float
    output: float  # without output that takes the place of a donated argument
    flops: float
    traffic: float  # read from HBM and written to it
    collectives: dict[str, Sent]  # by kind and axes of the mesh
    looks: float  # how often a step the host reads the state of the rows, between segments of decoding
    compile_s: float
    times: int  # runs in one training step
    counted: str  # the calculation of `times`, in words
    fields: str  # config fields whose lower values make the program's memory smaller
    kept: float  # weights and optimizer state, in `arguments` and `resident`
    refused: bool = False  # the compiler ran out of memory

    def seconds(self, chip: Chip) -> float:
        """Roofline time of one run: the longest of the times of matrix products, memory traffic and collectives."""
        return max(self._times(chip).values())

    def bound(self, chip: Chip) -> str:
        """Which of the three times is the longest: compute, memory or network."""
        times = self._times(chip)
        return max(times, key=lambda name: times[name])

    def step_s(self, chip: Chip) -> float:
        """Seconds of one training step for all runs of the program, and for the host between segments of decoding."""
        return self.times * self.seconds(chip) + self.looks * HOST_LOOK_S

    def _times(self, chip: Chip) -> dict[str, float]:
        network = sum(sent.seconds for sent in self.collectives.values())
        return {"compute": self.flops / chip.flops, "memory": self.traffic / chip.hbm_bandwidth, "network": network}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a training step of a config needs on a topology."""

    topology: str
    chips: int  # a tpu7x chip counts once, though it is two devices
    chip: Chip
    needs: tuple[Need, ...]
    hosts: int = 1
    checkpoint: int = 0  # bytes of a checkpoint: parameters and optimizer state, each array once

    @property
    def tightest(self) -> Need:
        """The program with the highest peak."""
        return max(self.needs, key=lambda need: need.peak)

    @property
    def step_s(self) -> float | None:
        """Roofline seconds of one training step. None: a program was refused, so its work is not known."""
        if any(need.refused for need in self.needs):
            return None
        return sum(need.step_s(self.chip) for need in self.needs)

    def dollars(self, chip_hour: float) -> float | None:
        """Dollars for one training step at `chip_hour` dollars per chip and hour. None: the time is not known."""
        return None if self.step_s is None else self.step_s / 3600 * self.chips * chip_hour

    @property
    def fits(self) -> bool:
        """Whether every program fits the HBM of a device, and the compiler refused none."""
        return not self._too_large

    @property
    def _too_large(self) -> tuple[Need, ...]:
        # A refused program may need more than the figures of the compiler's message, of which there may be only one.
        return tuple(need for need in self.needs if need.refused or need.peak > self.chip.hbm)

    @property
    def unit(self) -> str:
        """What the figures are of."""
        return "chip" if self.chip.per_chip == 1 else "device"

    def verdict(self) -> str:
        """One line: whether the config fits, how much memory is left or lacking, and what makes it fit."""
        need, hbm = self.tightest, self.chip.hbm
        figures = f"{need.peak / GIB:.2f} of {hbm / GIB:.2f} GiB per {self.unit} ({need.name})"
        if self.fits:
            left = hbm - need.peak
            return f"fits {self.topology}: {figures}; {left / GIB:.2f} GiB left ({left / hbm:.0%})"
        too_much = f", {(need.peak - hbm) / GIB:.2f} GiB too much" if need.peak > hbm else ""
        refused = " and ".join(other.name for other in self.needs if other.refused)
        programs: dict[str, list[str]] = {}  # advice -> the programs that need it
        for other in self._too_large:
            programs.setdefault(_advice(other, hbm), []).append(other.name)
        all_advice = "; ".join(f"{' and '.join(names)}: {advice}" for advice, names in programs.items())
        return (
            f"does not fit {self.topology}: {figures}{too_much}"
            f"{f'; the compiler refused {refused} for lack of memory' if refused else ''}. {all_advice}"
        )

    def storage(self) -> str:
        """One line: the size of a checkpoint, and how long a host writes its part of it."""
        host_bytes = self.checkpoint / self.hosts
        return (
            f"checkpoint: {self.checkpoint / 1e9:.1f} GB, {host_bytes / 1e9:.1f} GB a host ({self.hosts}), "
            f"{host_bytes / STORAGE_RATE:.0f} s at {STORAGE_RATE / 1e6:.0f} MB/s a host"
        )

    def to_json(self) -> dict[str, Any]:
        """All figures, for `--json`."""
        record = dataclasses.asdict(self) | {"fits": self.fits, "verdict": self.verdict(), "step_s": self.step_s}
        for entry, need in zip(record["needs"], self.needs, strict=True):
            known = not need.refused
            entry |= {
                "seconds": need.seconds(self.chip) if known else None,
                "bound": need.bound(self.chip) if known else None,
            }
        return record


def _advice(need: Need, hbm: float) -> str:
    """What makes a program fit: larger axes of the mesh, over which arrays are split, or lower values of its fields.

    If weights and optimizer state alone do not fit, only the mesh helps.
    """
    if need.kept > hbm:
        return f"raise mesh.fsdp or mesh.tensor: weights and optimizer state alone take {need.kept / GIB:.2f} GiB"
    return (
        f"lower {need.fields}, or raise mesh.fsdp or mesh.tensor" if need.fields else "raise mesh.fsdp or mesh.tensor"
    )


TEXTS = ("program", "collectives: MB, ms", "times a step")  # columns of text; the others hold numbers, or one word


def tables(plan: Plan, width: int) -> Sequence[Table]:
    """The two tables for a terminal of this width: memory in GiB, and work and time."""
    names = ("program", "arguments", "temporaries", "output", "resident", "peak", "left", "compile s")
    rows = []
    for n in plan.needs:
        sizes = (n.arguments, n.temporaries, n.output, n.resident, n.peak, plan.chip.hbm - n.peak)
        cells = [f"{size / GIB:.2f}" for size in sizes]
        rows.append([n.name, *(["?"] * 3 if n.refused else cells[:3]), *cells[3:], f"{n.compile_s:.0f}"])
    memory = _table(f"memory per {plan.unit} of {plan.topology}, {plan.chips} chips, GiB", names, rows, width)
    total = "not known, a program does not fit" if plan.step_s is None else f"{plan.step_s:.0f} s"
    names = ("program", "TFLOP", "HBM GB", "collectives: MB, ms", "ms", "bound", "times a step", "s a step")
    rows = []
    for n in plan.needs:
        times = f"{n.times} = {n.counted}"
        if n.refused:
            rows.append([n.name, *["?"] * 4, "does not fit", times, "?"])
            continue
        seconds = n.seconds(plan.chip)
        rows.append([
            n.name, f"{n.flops / 1e12:.3f}", f"{n.traffic / 1e9:.2f}", _collectives(n), f"{1000 * seconds:.1f}",
            n.bound(plan.chip), times, f"{n.step_s(plan.chip):.1f}",
        ])  # fmt: skip
    return memory, _table(f"work per {plan.unit}, and a step's roofline: {total}", names, rows, width)


def _table(title: str, names: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> Table:
    """A table for a terminal of this width. If it is too wide, it has no lines between columns and text is folded; in less than 80
    columns the names of columns are, too. Numbers are never cut off."""
    columns = list(zip(*rows, strict=True))
    fits = 1 + sum(3 + max(map(len, (name, *cells))) for name, cells in zip(names, columns, strict=True)) <= width
    table = Table(title=title, title_justify="left")
    if not fits:
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for name, cells in zip(names, columns, strict=True):
        text = name in TEXTS
        longest = max(len(word) for cell in (*cells, name if width >= 80 else "") for word in cell.split())
        table.add_column(
            name, justify="left" if text else "right", overflow="fold", width=None if text or fits else longest
        )
    for row in rows:
        table.add_row(*row)
    return table


def _collectives(need: Need) -> str:
    """The collectives of a program, the longest first. Those that take less than a hundredth of their time are left out."""
    in_all = sum(sent.seconds for sent in need.collectives.values())
    longest_first = sorted(need.collectives.items(), key=lambda item: -item[1].seconds)
    return ", ".join(
        f"{name} {sent.size / 1e6:.0f}, {1e3 * sent.seconds:.2f}"
        for name, sent in longest_first
        if sent.seconds >= in_all / 100 > 0
    ) or "none"  # fmt: skip


def log_better(config: Config, plan: Plan) -> None:
    """Log a better config that the search has found."""
    m, o = config.mesh, config.optimizer
    log.info(
        "better: mesh %d x %d x %d, decode_rows %d, micro_batch %d, remat %s: %s",
        m.data, m.fsdp, m.tensor, config.rollout.decode_rows, o.micro_batch, o.remat,
        f"{plan.step_s:.0f} s a step" if plan.fits and plan.step_s is not None else plan.verdict(),
    )  # fmt: skip


def show(plan: Plan, console: Console, more: Mapping[str, Any]) -> None:
    """Print the tables, the verdict if the plan fits, the size of a checkpoint, and `more`: results of a search, the price.

    On a terminal, wide tables are folded. In a file, no line is folded.
    """
    console.width = max(console.width, MIN_WIDTH) if console.is_terminal else 1000  # wider than any table
    for table in tables(plan, console.width):
        console.print(table)
    if plan.fits:
        console.print(plan.verdict(), soft_wrap=True, highlight=False)
    console.print(plan.storage(), soft_wrap=True, highlight=False)
    for name, value in more.items():
        console.print(f"{name}: {'not known' if value is None else value}", soft_wrap=True, highlight=False)
