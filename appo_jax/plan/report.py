"""`appo-jax plan`: does a config fit a pod, and how long would a step take at best? Answered without the pod.

Every program is compiled ahead of time for the topology; the compiler says what it needs. The time is a roofline: each
program as fast as the slowest of its matrix products, its memory traffic and its collectives allows, nothing else.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from appo_jax.config import Config
from appo_jax.plan.topology import GIB, Chip

log = logging.getLogger(__name__)

# Latency of a collective, for each device that it passes on its ring: "about 1 µs a hop", by the chapters on TPUs and on sharded
# matrices of "How to scale your model" (jax-ml.github.io/scaling-book).
HOP_S = 1e-6
# From the end of a decode segment to the start of the next one: small arrays are read, hosts exchange what has happened, rows are
# seated. An assumption; `time/decode_s` of a real run against its plan tells the true value.
HOST_LOOK_S = 2e-3
# Bytes a second at which a host writes to the run's storage. An assumption; measure yours (`dd`, on all hosts at once).
STORAGE_RATE = 200e6


@dataclasses.dataclass(frozen=True)
class Need:
    """What one program needs on one chip. Of a refused program only `peak` is known; the rest is 0."""

    name: str
    peak: float  # bytes of HBM, with what lies beside it
    beside: float  # of that: what the run keeps meanwhile
    arguments: float
    temporaries: float
    output: float  # not in the place of an argument
    flops: float
    traffic: float  # bytes to and from HBM
    collectives: dict[str, float]  # bytes by kind
    hops: float  # that its collectives take one after the other
    looks: float  # of the host, a step: between segments of decoding it sees who has stopped
    compile_s: float
    times: int  # a step
    counted: str
    fields: str  # of the config, whose lower values make it smaller
    kept: float  # bytes of weights and optimizer state, in `arguments` and `beside`
    refused: bool = False  # the compiler ran out of memory

    def seconds(self, chip: Chip) -> float:
        """Roofline time of one run: the slowest of matrix products, memory traffic and collectives."""
        return max(self._sides(chip).values())

    def bound(self, chip: Chip) -> str:
        """Which of the three the roofline is."""
        sides = self._sides(chip)
        return max(sides, key=lambda side: sides[side])

    def step_s(self, chip: Chip) -> float:
        """Seconds of one training step that its runs take, with the host's looks between them."""
        return self.times * self.seconds(chip) + self.looks * HOST_LOOK_S

    def _sides(self, chip: Chip) -> dict[str, float]:
        network = sum(self.collectives.values()) / chip.ici_bandwidth + self.hops * HOP_S
        return {"compute": self.flops / chip.flops, "memory": self.traffic / chip.hbm_bandwidth, "network": network}


@dataclasses.dataclass(frozen=True)
class Plan:
    topology: str
    chips: int  # not devices: a tpu7x is two
    chip: Chip
    needs: tuple[Need, ...]
    hosts: int = 1
    checkpoint: int = 0  # bytes: parameters and optimizer state, once

    @property
    def tightest(self) -> Need:
        return max(self.needs, key=lambda need: need.peak)

    @property
    def step_s(self) -> float | None:
        """Roofline seconds of one training step; None where a program was refused, whose work is not known."""
        if any(need.refused for need in self.needs):
            return None
        return sum(need.step_s(self.chip) for need in self.needs)

    def dollars(self, chip_hour: float) -> float | None:
        """What one training step costs at a price of a chip and hour."""
        return None if self.step_s is None else self.step_s / 3600 * self.chips * chip_hour

    @property
    def fits(self) -> bool:
        return self.tightest.peak <= self.chip.hbm

    def verdict(self) -> str:
        """One line: fits or not, by how much, and what would make it fit."""
        need, hbm = self.tightest, self.chip.hbm
        figures = f"{need.peak / GIB:.2f} of {hbm / GIB:.2f} GiB per chip ({need.name})"
        if self.fits:
            left = hbm - need.peak
            return f"fits {self.topology}: {figures}; {left / GIB:.2f} GiB left ({left / hbm:.0%})"
        programs: dict[str, list[str]] = {}  # by what helps them
        for n in self.needs:
            if n.peak > hbm:
                programs.setdefault(_advice(n, hbm), []).append(n.name)
        advice = "; ".join(f"{' and '.join(names)}: {what}" for what, names in programs.items())
        return f"does not fit {self.topology}: {figures}, {(need.peak - hbm) / GIB:.2f} GiB too much. {advice}"

    def storage(self) -> str:
        """One line: what a checkpoint takes, and how long a host writes its part."""
        share = self.checkpoint / self.hosts
        return (
            f"checkpoint: {self.checkpoint / 1e9:.1f} GB, {share / 1e9:.1f} GB a host ({self.hosts}), "
            f"{share / STORAGE_RATE:.0f} s at {STORAGE_RATE / 1e6:.0f} MB/s a host"
        )

    def to_json(self) -> dict[str, Any]:
        record = dataclasses.asdict(self) | {"fits": self.fits, "verdict": self.verdict(), "step_s": self.step_s}
        for entry, need in zip(record["needs"], self.needs, strict=True):
            known = not need.refused
            entry |= {
                "seconds": need.seconds(self.chip) if known else None,
                "bound": need.bound(self.chip) if known else None,
            }
        return record


def _advice(need: Need, hbm: float) -> str:
    """What makes a program fit: more devices along an axis of the mesh hold less each, lower fields need less.

    Where weights and optimizer state alone are too much, only the mesh helps.
    """
    if need.kept > hbm:
        return f"raise mesh.fsdp or mesh.tensor: weights and optimizer state alone take {need.kept / GIB:.2f} GiB"
    return (
        f"lower {need.fields}, or raise mesh.fsdp or mesh.tensor" if need.fields else "raise mesh.fsdp or mesh.tensor"
    )


def tables(plan: Plan) -> Sequence[Table]:
    """What the terminal shows: memory, and time."""
    memory = Table(title=f"memory per chip of {plan.topology}, {plan.chips} chips, GiB", title_justify="left")
    for column in ("program", "arguments", "temporaries", "output", "beside", "peak", "left", "compile s"):
        memory.add_column(column, justify="left" if column == "program" else "right")
    for n in plan.needs:
        sizes = (n.arguments, n.temporaries, n.output, n.beside, n.peak, plan.chip.hbm - n.peak)
        cells = [f"{size / GIB:.2f}" for size in sizes]
        memory.add_row(n.name, *(["?"] * 3 if n.refused else cells[:3]), *cells[3:], f"{n.compile_s:.0f}")
    total = "not known, a program does not fit" if plan.step_s is None else f"{plan.step_s:.0f} s"
    work = Table(title=f"work per chip, and a step's roofline: {total}", title_justify="left")
    for column in ("program", "TFLOP", "HBM GB", "collectives MB", "ms", "bound", "times a step", "s a step"):
        work.add_column(column, justify="left" if column in ("program", "collectives MB", "times a step") else "right")
    for n in plan.needs:
        times = f"{n.times} = {n.counted}"
        if n.refused:
            work.add_row(n.name, *["?"] * 4, "does not fit", times, "?")
            continue
        seconds = n.seconds(plan.chip)
        kinds = ", ".join(f"{kind} {size / 1e6:.0f}" for kind, size in sorted(n.collectives.items()))
        work.add_row(
            n.name, f"{n.flops / 1e12:.3f}", f"{n.traffic / 1e9:.2f}", kinds or "none", f"{1000 * seconds:.1f}",
            n.bound(plan.chip), times, f"{n.step_s(plan.chip):.1f}",
        )  # fmt: skip
    return memory, work


def log_better(config: Config, plan: Plan) -> None:
    """Tell of a better config on the way."""
    m, o = config.mesh, config.optimizer
    log.info(
        "better: mesh %d x %d x %d, decode_rows %d, micro_batch %d, remat %s: %s",
        m.data, m.fsdp, m.tensor, config.rollout.decode_rows, o.micro_batch, o.remat,
        f"{plan.step_s:.0f} s a step" if plan.fits and plan.step_s is not None else plan.verdict(),
    )  # fmt: skip


def show(plan: Plan, console: Console, more: Mapping[str, Any]) -> None:
    """Print the tables, the verdict where the plan fits, and what else is known (of a search, of the price).

    A terminal folds what is too wide for it; a file gets whole lines.
    """
    if not console.is_terminal:
        console.width = 1000  # no table is so wide
    for table in tables(plan):
        console.print(table)
    if plan.fits:
        console.print(plan.verdict(), soft_wrap=True, highlight=False)
    console.print(plan.storage(), soft_wrap=True, highlight=False)
    for name, value in more.items():
        console.print(f"{name}: {'not known' if value is None else value}", soft_wrap=True, highlight=False)
