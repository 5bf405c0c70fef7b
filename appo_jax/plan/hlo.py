"""What a compiled program moves, read from its HLO text: collectives by kind, and how often loops run.

XLA's own cost analysis counts the body of a loop once. The text says how often a loop runs where that is known (a scan);
the body of a loop of unknown length (decoding) counts once, so a decode program's numbers are those of one token.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter
from typing import Any

from jax.extend import core

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8,
    "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_CALLEES = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')
# Instructions that move nothing themselves.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    op: str
    size: float  # bytes of its result
    operands: tuple[str, ...]
    callees: tuple[str, ...]
    trips: int  # how often its callees run


@dataclasses.dataclass(frozen=True)
class Moved:
    """What one run of the program moves on one chip."""

    collective_bytes: dict[str, float]  # by kind: sizes of the results
    loop_factor: float  # memory traffic with every loop at its known length, over the traffic with each body once


def read(text: str) -> Moved:
    """Read the text of a compiled (partitioned) program, `Compiled.as_text()`."""
    computations, entry = _parse(text)
    times = Counter({entry: 1})
    traffic = once = 0.0
    collectives: dict[str, float] = {}
    fused = _fused(computations)
    for name in _callers_first(computations, entry):
        for instruction in computations[name]:
            for callee in instruction.callees:
                times[callee] += times[name] * instruction.trips
            kind = instruction.op.removesuffix("-done")
            if kind in COLLECTIVES:  # of an asynchronous pair, the end has the shape of the result
                collectives[kind] = collectives.get(kind, 0.0) + times[name] * instruction.size
            if name not in fused and instruction.op not in _FREE:
                size = _traffic(instruction, computations, name)
                traffic, once = traffic + times[name] * size, once + size
    return Moved(collectives, traffic / once if once else 1.0)


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
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
            trips = _TRIPS.search(rest) if op == "while" else None
            called = () if op.endswith(("-done", "-update")) else tuple(names)
            body.append(_Instruction(name, op, shape_bytes(shape), operands, called, int(trips[1]) if trips else 1))
    return computations, entry


def shape_bytes(shape: str) -> float:
    """Bytes of an HLO shape or tuple of shapes, layouts and all."""
    return sum(
        _BYTES.get(dtype, 1 if dtype.startswith("f8") else 0) * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in _SHAPE.findall(shape)
    )


def _callers_first(computations: dict[str, list[_Instruction]], entry: str) -> list[str]:
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str) -> None:
        if name in seen or name not in computations:
            return
        seen.add(name)
        for instruction in computations[name]:
            for callee in instruction.callees:
                visit(callee)
        order.append(name)

    visit(entry)
    return order[::-1]


def _fused(computations: dict[str, list[_Instruction]]) -> set[str]:
    """Computations whose instructions never touch memory: insides of fusions, and functions of reductions."""
    outer = ("while", "conditional", "call", "async-start")
    return {c for body in computations.values() for i in body if i.op not in outer for c in i.callees}


def _traffic(instruction: _Instruction, computations: dict[str, list[_Instruction]], name: str) -> float:
    """Bytes that an instruction reads and writes. Of what is sliced or updated in place only the slice counts."""
    sizes = _sizes(tuple(computations[name]))
    if instruction.op == "dynamic-slice":
        return 2 * instruction.size
    if instruction.op == "dynamic-update-slice":
        return 2 * sizes.get(instruction.operands[1], 0)
    read_whole = sum(sizes.get(operand, 0) for operand in instruction.operands)
    if instruction.op != "fusion":
        return read_whole + instruction.size
    inside = computations[instruction.callees[0]]
    written, inner = instruction.size, _sizes(tuple(inside))
    for part in inside:
        if part.op == "dynamic-update-slice":
            whole = inner.get(part.operands[0], 0)
            written -= max(0, min(written, whole) - inner.get(part.operands[1], 0))
    read_all = 0.0
    for parameter in (p for p in inside if p.op == "parameter"):
        users = [i for i in inside if parameter.name in i.operands]
        if users and all(u.op == "dynamic-slice" for u in users):
            read_all += sum(u.size for u in users)
        elif users and all(u.op == "dynamic-update-slice" and u.operands[0] == parameter.name for u in users):
            read_all += 0
        else:
            read_all += parameter.size
    return read_all + written


@functools.lru_cache(maxsize=4096)
def _sizes(body: tuple[_Instruction, ...]) -> dict[str, float]:
    return {i.name: i.size for i in body}


def matmul_flops(jaxpr: Any, loops: bool = True) -> float:
    """FLOPs of the matrix products of a program on all chips, scans at their length (`loops=False`: bodies once)."""
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
        inner = [matmul_flops(sub, loops) for sub in core.jaxprs_in_params(eqn.params)]
        total += times * (max(inner, default=0.0) if eqn.primitive.name == "cond" else sum(inner))
    return total
