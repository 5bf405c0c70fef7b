"""Compiles programs ahead of time for a TPU slice, and reads their memory and work. No TPU is needed."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib.util
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from appo_jax.config import Config
from appo_jax.config_io import flatten
from appo_jax.errors import ConfigError, PlanError
from appo_jax.plan import hlo
from appo_jax.plan.abstract import Arrays, in_all
from appo_jax.plan.lengths import RolloutLengths
from appo_jax.plan.network import Collective, Network, network_of
from appo_jax.plan.programs import Program, programs
from appo_jax.plan.report import Need, Plan, Sent
from appo_jax.plan.topology import Slice, parse_slice
from appo_jax.policy.architecture import architecture_of, check_positions
from appo_jax.policy.parameters import adapted
from appo_jax.policy.sharding import make_mesh, use_mesh


@dataclasses.dataclass(frozen=True)
class Compiler:
    """Compiles the programs of configs for one topology. A program that two configs share is compiled once."""

    described: Slice
    devices: Sequence[Any]
    lengths: Path | None = None
    """Directory of a run, from whose rollouts the lengths are taken. None: every rollout has the maximum length."""
    on_program: Callable[[str], None] = lambda name: None
    """Called with the name of each program before it is compiled."""
    compiled: dict[tuple[Any, ...], Need] = dataclasses.field(default_factory=dict)
    """What was compiled so far, by program and the values of the fields on which it depends."""

    def plan(self, config: Config) -> Plan:
        """Compile every program of `config`.

        Raises ConfigError if the mesh has another number of devices than the topology, or if the architecture has fewer
        positions than a rollout; DataError if `lengths` has no rollouts.
        """
        stated = config.policy.architecture
        arch = architecture_of(config.policy) if stated is None else adapted(stated, config.policy.lora)
        check_positions(arch, config)
        mesh = make_mesh(config.mesh, self.devices)
        network = network_of(self.described, list(mesh.devices.flat), dict(mesh.shape), config.mesh.slices)
        lengths = None if self.lengths is None else RolloutLengths.of_run(self.lengths, config.rollout)

        def need_of(program: Program) -> Need:
            key = (program.name, *(flatten(config)[field] for field in program.depends_on))
            if key not in self.compiled:
                self.on_program(program.name)
                with use_mesh(mesh):
                    self.compiled[key] = measure(program, network)
            looks = program.times / program.steps if program.steps > 1 else 0.0
            return dataclasses.replace(self.compiled[key], times=program.times, counted=program.counted, looks=looks)

        with use_mesh(mesh):
            all_programs = list(programs(config, arch, mesh, lengths))
            checkpoint = in_all(Arrays(config, arch, mesh).state())
        # One thread per core, because a compilation keeps one core busy.
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            needs = tuple(pool.map(need_of, all_programs))
        chips = self.described.num_chips * config.mesh.slices
        hosts = len({device.process_index for device in self.devices})
        return Plan(self.described.topology, chips, self.described.chip, needs, hosts, checkpoint)


def compiler_for(topology: str, slices: int = 1, **options: Any) -> Compiler:
    """The compiler for `slices` slices of the topology with this name. `options`: other fields of Compiler.

    Raises ConfigError for an unknown topology, and PlanError if the TPU compiler is not installed.
    """
    described = parse_slice(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise PlanError(
            "libtpu, the TPU compiler, is not installed; install it (no TPU is needed): pip install 'jax[tpu]'"
        )
    # Without these two, libtpu on a machine without TPUs asks the metadata server for its TPU and for the other hosts.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # libtpu takes a lock as if it used a TPU, which another `appo-jax plan` or a training may hold. This permits both.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    jax.config.update("jax_platforms", "cpu")
    # A program for devices that do not exist can be written to the cache of compiled programs, but not read back.
    jax.config.update("jax_enable_compilation_cache", False)
    from jax.experimental import topologies

    bounds: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if described.num_chips == 1:  # the default is a host with four chips
        bounds["chips_per_host_bounds"] = (1, 1, 1)
    if described.topology.startswith("v4:"):  # JAX treats both cores of a chip as one device
        bounds["chip_config_name"] = "megacore"
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=described.topology, **bounds).devices
    except Exception as error:  # the type of error differs from shape to shape
        raise ConfigError(
            f"--topology {topology}: the TPU compiler does not know this shape ({error}); give the shape of an existing slice, "
            "e.g. v5p:4x4x4"
        ) from error
    return Compiler(described, devices, **options)


def measure(program: Program, network: Network) -> Need:
    """Compile a program for the devices of a network and read what it needs on each.

    If the compiler refuses it for lack of memory, the result has `refused` and the compiler's figure for its memory. Raises
    PlanError for another error of the compiler.
    """
    began = time.perf_counter()
    traced = program.trace()
    try:
        compiled = traced.lower().compile()
    except Exception as error:  # kernels that cannot be compiled have errors of other types than XLA's
        used = hbm_of_refusal(str(error))
        if used is None:
            raise PlanError(
                f"{program.name}: the compiler failed with {type(error).__name__}: {error}; another mesh, or other values of "
                f"{program.fields or 'the architecture'}, may be compiled"
            ) from error
        return Need(
            program.name, used + program.resident, program.resident, 0, 0, 0, 0, 0, {}, 0, time.perf_counter() - began,
            program.times, program.counted, program.fields, program.kept, refused=True,
        )  # fmt: skip
    seconds = time.perf_counter() - began
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    moved = hlo.read(compiled.as_text(), program.steps, program.seen)
    jaxpr = traced.jaxpr.jaxpr
    flops = hlo.matmul_flops(jaxpr)
    # XLA counts the FLOPs of one chip, but the body of a loop only once. The ratio of matrix products corrects for this.
    xla_flops = cost.get("flops", 0.0) * flops / max(1.0, hlo.matmul_flops(jaxpr, loops=False))
    output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    program_bytes = (
        memory.argument_size_in_bytes + memory.temp_size_in_bytes + output + memory.generated_code_size_in_bytes
    )
    return Need(
        name=program.name,
        peak=program_bytes + program.resident,
        resident=program.resident,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        output=output,
        flops=max(xla_flops, flops / network.num_devices),
        traffic=moved.hbm,
        collectives=sent(moved.collectives, network),
        looks=0.0,
        compile_s=seconds,
        times=program.times,
        counted=program.counted,
        fields=program.fields,
        kept=program.kept,
    )


def sent(collectives: Iterable[Collective], network: Network) -> dict[str, Sent]:
    """The bytes and the seconds of collectives, by kind and axes of the mesh."""
    found: dict[str, Sent] = {}
    for collective in collectives:
        name = network.name(collective)
        before = found.get(name, Sent(0, 0))
        found[name] = Sent(before.size + collective.size, before.seconds + network.seconds(collective))
    return found


def hbm_of_refusal(message: str) -> float | None:
    """Bytes of HBM that a refused program needs, from the compiler's message. None: the message is not about lack of memory."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm|HLO temporaries \(([\d.]+)([KMGT])\)", message)
    if found is None:
        return None
    number, unit = found[1] or found[3], found[2] or found[4]
    return float(number) * {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}[unit]
