"""`appo-jax plan`: does a config fit a pod, and how long would a step take at best? Answered without the pod.

Every program is compiled ahead of time for the topology; the compiler says what it needs. The time is a roofline: each
program as fast as the slowest of its matrix products, its memory traffic and its collectives allows, nothing else.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib.util
import os
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from appo_jax.config import Config
from appo_jax.errors import ConfigError, PlanError
from appo_jax.plan import hlo
from appo_jax.plan.programs import Program, programs
from appo_jax.plan.topology import GIB, Chip, parse_slice
from appo_jax.policy.architecture import architecture_of, check_positions
from appo_jax.policy.sharding import make_mesh, use_mesh


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
    compile_s: float
    times: int  # a step
    counted: str
    fields: str
    refused: bool = False  # the compiler ran out of memory

    def seconds(self, chip: Chip) -> float:
        """Roofline time of one run."""
        network = sum(self.collectives.values()) / chip.ici_bandwidth
        return max(self.flops / chip.flops, self.traffic / chip.hbm_bandwidth, network)

    def bound(self, chip: Chip) -> str:
        """Which of the three the roofline is."""
        network = sum(self.collectives.values()) / chip.ici_bandwidth
        sides = {"compute": self.flops / chip.flops, "memory": self.traffic / chip.hbm_bandwidth, "network": network}
        return max(sides, key=lambda side: sides[side])


@dataclasses.dataclass(frozen=True)
class Plan:
    topology: str
    chips: int
    chip: Chip
    needs: tuple[Need, ...]

    @property
    def tightest(self) -> Need:
        return max(self.needs, key=lambda need: need.peak)

    @property
    def step_s(self) -> float | None:
        """Roofline seconds of one training step; None where a program was refused, whose work is not known."""
        if any(need.refused for need in self.needs):
            return None
        return sum(need.times * need.seconds(self.chip) for need in self.needs)

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
        advice = "; ".join(f"{n.name}: {_advice(n.fields)}" for n in self.needs if n.peak > hbm)
        return f"does not fit {self.topology}: {figures}, {(need.peak - hbm) / GIB:.2f} GiB too much. {advice}"

    def to_json(self) -> dict[str, Any]:
        record = dataclasses.asdict(self) | {"fits": self.fits, "verdict": self.verdict(), "step_s": self.step_s}
        for entry, need in zip(record["needs"], self.needs, strict=True):
            known = not need.refused
            entry |= {
                "seconds": need.seconds(self.chip) if known else None,
                "bound": need.bound(self.chip) if known else None,
            }
        return record


def _advice(fields: str) -> str:
    """What to do with the fields that a program's memory depends on: more devices along an axis of the mesh hold less each."""
    names = [name.strip() for name in fields.split(",") if name.strip()]
    raised = [name for name in names if name.startswith("mesh.")]
    lowered = [name for name in names if name not in raised]
    parts = [f"lower {', '.join(lowered)}"] * bool(lowered) + [f"raise {', '.join(raised)}"] * bool(raised)
    return " or ".join(parts)


def make_plan(config: Config, topology: str, on_program: Any = lambda name: None) -> Plan:
    """Compile every program of `config` for `topology`, the name of one slice (there are `mesh.slices`).

    `on_program` is called with the name of each program before it is compiled. Raises ConfigError for a topology that is
    none or whose chips are not those of the mesh, PlanError without the TPU compiler.
    """
    described = parse_slice(topology)
    topology = described.topology
    if importlib.util.find_spec("libtpu") is None:
        raise PlanError("libtpu, the TPU compiler, is not installed (no TPU is needed): pip install 'jax[tpu]'")
    # Where there is no TPU: no metadata server is asked, and libtpu does not wonder who its neighbours are.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # It takes a lock, as if it were to use a TPU; another plan, or a training, may hold it.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    slices: dict[str, Any] = {"num_slices": config.mesh.slices} if config.mesh.slices > 1 else {}
    if described.num_chips == 1:  # a host has four by default
        slices["chips_per_host_bounds"] = (1, 1, 1)
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **slices).devices
    except Exception as error:  # whatever libtpu makes of an unknown shape
        raise ConfigError(f"--topology {topology}: the TPU compiler does not know it: {error}") from error
    arch = config.policy.architecture or architecture_of(config.policy)
    check_positions(arch, config)
    mesh = make_mesh(config.mesh, devices)

    def one(program: Program) -> Need:
        on_program(program.name)
        with use_mesh(mesh):
            return measure(program, mesh.size)

    with use_mesh(mesh):
        all_programs = list(programs(config, arch, mesh))
    # A compilation keeps one core busy.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        needs = tuple(pool.map(one, all_programs))
    return Plan(topology, described.num_chips * config.mesh.slices, described.chip, needs)


def measure(program: Program, chips: int) -> Need:
    """Compile one program and read what it needs."""
    began = time.perf_counter()
    traced = program.trace()
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        used = hbm_of_refusal(str(error))
        if used is None:
            raise
        return Need(
            program.name, used + program.beside, program.beside, 0, 0, 0, 0, 0, {}, time.perf_counter() - began,
            program.times, program.counted, program.fields, refused=True,
        )  # fmt: skip
    seconds = time.perf_counter() - began
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    moved = hlo.read(compiled.as_text(), program.steps)
    jaxpr = traced.jaxpr.jaxpr
    flops = hlo.matmul_flops(jaxpr)
    # XLA counts what each chip really does, but the bodies of loops once.
    counted = cost.get("flops", 0.0) * flops / max(1.0, hlo.matmul_flops(jaxpr, loops=False))
    output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    own = memory.argument_size_in_bytes + memory.temp_size_in_bytes + output + memory.generated_code_size_in_bytes
    return Need(
        name=program.name,
        peak=own + program.beside,
        beside=program.beside,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        output=output,
        flops=max(counted, flops / chips),
        traffic=moved.hbm,
        collectives=moved.collectives,
        compile_s=seconds,
        times=program.times,
        counted=program.counted,
        fields=program.fields,
    )


def hbm_of_refusal(message: str) -> float | None:
    """Bytes of HBM a program would have needed, from the compiler's message when it ran out; None for other messages."""
    found = re.search(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm|HLO temporaries \(([\d.]+)([KMG])\)", message)
    if found is None:
        return None
    number, unit = found[1] or found[3], found[2] or found[4]
    return float(number) * {"K": 2**10, "M": 2**20, "G": 2**30}[unit]


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
            n.bound(plan.chip), times, f"{n.times * seconds:.1f}",
        )  # fmt: skip
    return memory, work


def show(plan: Plan, console: Console) -> None:
    """Print the tables, and the verdict where the plan fits. A terminal folds what is too wide for it; a file gets whole lines."""
    if not console.is_terminal:
        console.width = 1000  # no table is so wide
    for table in tables(plan):
        console.print(table)
    if plan.fits:
        console.print(plan.verdict(), soft_wrap=True, highlight=False)
