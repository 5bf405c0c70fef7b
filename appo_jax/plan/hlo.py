"""The memory traffic of a compiled program, read from its HLO text: bytes to and from HBM, and collectives by kind.

XLA's cost analysis is not used, because it counts the body of a loop once, and counts a weight three times if it is
prefetched into the TPU's on-chip memory. The text gives the number of iterations of a loop if that is known (a scan).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jax.extend import core

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8,
    "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{[^}]*S\((\d+)\)[^}]*\})?")  # S(n), n > 0: on-chip memory
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_CALLEES = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')
# Instructions that move no data themselves.
_NO_TRAFFIC = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all", "async-start",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    op: str
    shape: str  # of its result
    operands: tuple[str, ...]
    callees: tuple[str, ...]
    trips: int | None  # number of runs of the called computations; None: a loop of unknown length
    group_size: int  # devices in one group of a collective

    @property
    def size(self) -> float:
        """Bytes of its result."""
        return shape_bytes(self.shape)

    @property
    def hbm(self) -> float:
        """Bytes of its result in HBM."""
        return shape_bytes(self.shape, hbm=True)


@dataclasses.dataclass(frozen=True)
class Moved:
    """The traffic of a program on one device. The body of a loop of known length is counted in every iteration."""

    collectives: dict[str, float]  # by kind: bytes of the results
    hbm: float  # bytes read from HBM and written to it
    hops: float  # hops between neighbours in rings, which the collectives make one after the other


def read(text: str, steps: int = 1, seen: Mapping[str, float] = MappingProxyType({})) -> Moved:
    """Read the text of a compiled (partitioned) program, `Compiled.as_text()`.

    A loop of unknown length, such as decoding, is assumed to run `steps` times, and the result is divided by `steps`. `seen`:
    name of a kernel's calls -> the share that it reads of their two largest operands (keys and values), 0 to 1.
    """
    computations, entry = _parse(text)
    times = defaultdict(float, {entry: 1 / steps})
    hbm = 0.0
    collectives: dict[str, float] = {}
    hops = 0.0
    fused = _fused_computations(computations)
    for name in _callers_first(computations, entry):
        by_name = {instruction.name: instruction for instruction in computations[name]}
        for instruction in computations[name]:
            for callee in instruction.callees:
                times[callee] += times[name] * (steps if instruction.trips is None else instruction.trips)
            kind = instruction.op.removesuffix("-done")
            if kind in COLLECTIVES:  # in an asynchronous pair, only the -done has the shape of the result
                collectives[kind] = collectives.get(kind, 0.0) + times[name] * instruction.size
            hops += times[name] * _hops(instruction)
            if name not in fused:
                hbm += times[name] * (
                    _traffic(instruction, by_name, computations) - _unread_bytes(instruction, by_name, seen)
                )
    return Moved(collectives, hbm, hops)


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """The instructions of each computation, by its name, and the name of the entry computation."""
    computations: dict[str, list[_Instruction]] = {}
    entry, body = "", list[_Instruction]()
    for line in text.splitlines():
        if not line.startswith(" ") and (head := _HEAD.match(line)):
            body = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif found := _INSTRUCTION.match(line):
            name, shape, op, rest = found.groups()
            operands = tuple(re.findall(r"%([\w.\-]+)", rest.split("), ")[0]))
            names = [n for pair in _CALLEES.findall(rest) for n in re.findall(r"[\w.\-]+", " ".join(pair))]
            trip_count = _TRIPS.search(rest)
            trips = (int(trip_count[1]) if trip_count else None) if op == "while" else 1
            # The -start of an asynchronous pair names the same callees, and they run only once.
            called = () if op.endswith(("-done", "-update")) else tuple(names)
            body.append(_Instruction(name, op, shape, operands, called, trips, _group_size(rest)))
    return computations, entry


def _group_size(rest: str) -> int:
    """Devices in one group of a collective. 1: the instruction has no groups.

    XLA writes groups in four ways: `{{0,1},{2,3}}`; `[2,4]<=[8]`, which is 2 groups of 4; `mesh['a'=2,'b'=4] {'b'}`, with the
    axes along which a group lies; and `{'b':(1)2}` for a part of an axis.
    """
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return 1


def _hops(instruction: _Instruction) -> float:
    """Hops that a collective makes one after the other.

    The group is taken as a ring that is used in both directions: n/2 hops for n devices, n for an all-reduce, 1 for a permute.
    A group that lies on several axes of a torus takes fewer.
    """
    kind = instruction.op.removesuffix("-start")  # an asynchronous pair is counted at its -start, which names the group
    if kind not in COLLECTIVES:
        return 0.0
    if kind == "collective-permute":
        return 1.0
    return instruction.group_size * (1.0 if kind == "all-reduce" else 0.5) if instruction.group_size > 1 else 0.0


def shape_bytes(shape: str, hbm: bool = False) -> float:
    """Bytes of an HLO shape or of a tuple of shapes, with or without layouts. `hbm`: count only the shapes that lie in HBM."""
    return sum(
        _BYTES.get(dtype, 1 if dtype.startswith("f8") else 0) * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims, space in _SHAPE.findall(shape)
        if not (hbm and space not in ("", "0"))
    )


def _callers_first(computations: dict[str, list[_Instruction]], entry: str) -> list[str]:
    """The names of the computations that `entry` reaches, each after all its callers."""
    callees_first: list[str] = []
    visited: set[str] = set()

    def visit(name: str) -> None:
        if name in visited or name not in computations:
            return
        visited.add(name)
        for instruction in computations[name]:
            for callee in instruction.callees:
                visit(callee)
        callees_first.append(name)

    visit(entry)
    return callees_first[::-1]


def _fused_computations(computations: dict[str, list[_Instruction]]) -> set[str]:
    """Computations whose instructions do not access memory: the bodies of fusions, and the functions of reductions."""
    with_traffic = ("while", "conditional", "call", "async-start")
    return {c for body in computations.values() for i in body if i.op not in with_traffic for c in i.callees}


# Instructions that read slices of their first operand, and those that update it in place -> the operand that is the update.
_SLICED = {"dynamic-slice", "gather"}
_UPDATED = {"dynamic-update-slice": 1, "scatter": 2}


def _traffic(
    instruction: _Instruction, by_name: dict[str, _Instruction], computations: dict[str, list[_Instruction]]
) -> float:
    """Bytes that an instruction reads from HBM and writes to it. For slices and updates in place only the slice counts.

    If the compiler prefetches an array into on-chip memory, the prefetch reads it from HBM, and its users do not.
    """
    op, operands = instruction.op, [by_name[name] for name in instruction.operands if name in by_name]
    if op in _NO_TRAFFIC or op.endswith(("-done", "-update")):
        return 0.0
    if op == "fusion":
        return _traffic_of_fusion(instruction, computations[instruction.callees[0]])
    if op in _SLICED:
        return min(instruction.size, operands[0].hbm) + instruction.hbm
    if op == "slice-start":  # ((operand), result, flag)
        result = instruction.shape.split("), ", 1)[1]
        return (shape_bytes(result) if operands[0].hbm else 0.0) + shape_bytes(result, hbm=True)
    if op in _UPDATED:
        return 2 * operands[_UPDATED[op]].size if instruction.hbm else 0.0
    if op.endswith("-start"):  # of a copy or a collective: the result is the tuple of source and destination
        return instruction.hbm
    return sum(operand.hbm for operand in operands) + instruction.hbm


def _unread_bytes(instruction: _Instruction, by_name: dict[str, _Instruction], seen: Mapping[str, float]) -> float:
    """Bytes of its two largest operands that a kernel does not read, according to `seen`."""
    for name, share in seen.items():
        if instruction.op == "custom-call" and instruction.name.startswith(name):
            sizes = sorted(by_name[operand].hbm for operand in instruction.operands if operand in by_name)
            return (1 - share) * sum(sizes[-2:])
    return 0.0


def _traffic_of_fusion(fusion: _Instruction, body: list[_Instruction]) -> float:
    """`_traffic` of a fusion: its result and its parameters. Of those that it slices or updates in place, only the slice or the
    update counts."""
    by_name = {i.name: i for i in body}
    written, total = fusion.hbm, 0.0
    for instruction in body:
        if instruction.op in _UPDATED and instruction.size <= written:
            written -= instruction.size - by_name[instruction.operands[_UPDATED[instruction.op]]].size
    for parameter in (i for i in body if i.op == "parameter" and i.hbm):
        names = {parameter.name}
        for instruction in body:  # operands stand before their users
            if instruction.op == "bitcast" and instruction.operands[0] in names:
                names.add(instruction.name)
        users = [i for i in body if i.op != "bitcast" and names & set(i.operands)]
        only_first_operand = all(u.operands[0] in names and not names & set(u.operands[1:]) for u in users)
        if users and only_first_operand and all(u.op in _SLICED for u in users):
            total += min(parameter.hbm, sum(u.size for u in users))
        elif not (users and only_first_operand and all(u.op in _UPDATED for u in users)):
            total += parameter.hbm
    return total + written


def matmul_flops(jaxpr: Any, loops: bool = True) -> float:
    """FLOPs of all matrix products of a program, on all devices together.

    The body of a scan counts in every iteration (`loops=False`: once), the longest branch of a cond counts alone, and a loop of
    unknown length counts once.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            lhs = eqn.invars[0].aval.shape
            total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[i] for i in contract)
            continue
        times = 1.0
        if eqn.primitive.name == "scan" and loops:
            times = eqn.params["length"]
        elif eqn.primitive.name == "pallas_call":
            times = math.prod(n for n in eqn.params["grid_mapping"].grid if isinstance(n, int))
        elif eqn.primitive.name == "shard_map":
            times = eqn.params["mesh"].size
        flops_inside = [matmul_flops(sub, loops) for sub in core.jaxprs_in_params(eqn.params)]
        total += times * (max(flops_inside, default=0.0) if eqn.primitive.name == "cond" else sum(flops_inside))
    return total
