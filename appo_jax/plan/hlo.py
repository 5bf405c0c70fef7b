"""The memory traffic of a compiled program, read from its HLO text: bytes to and from HBM, and collectives by kind and group.

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

from appo_jax.plan.network import Collective, parse_groups

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8,
    "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{[^}]*S\((\d+)\)[^}]*\})?")  # S(n), n > 0: on-chip memory
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_GROUPS = re.compile(  # of a collective, in three notations, or of a permute
    r"replica_groups=(\{\{[\d,{}]*\}\}|\[[\d,]*\]<=\[[\d,]*\](?:T\([\d,]*\))?|mesh\[[^\]]*\][^{]*\{[^}]*\})"
    r"|source_target_pairs=(\{\{[\d,{}]*\}\})"
)
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')  # of an array, between slices
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
    attributes: str  # what follows the operands

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

    collectives: tuple[Collective, ...]  # one for each kind and groups
    hbm: float  # bytes read from HBM and written to it


def read(text: str, steps: int = 1, seen: Mapping[str, float] = MappingProxyType({})) -> Moved:
    """Read the text of a compiled (partitioned) program, `Compiled.as_text()`.

    A loop of unknown length, such as decoding, is assumed to run `steps` times, and the result is divided by `steps`. `seen`:
    name of a kernel's calls -> how often it reads their last two operands (keys and values); below 1: the share that it reads.
    """
    computations, entry = _parse(text)
    times = defaultdict(float, {entry: 1 / steps})
    hbm = 0.0
    moved: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])  # kind, groups -> bytes, times
    fused, continued = _fused_computations(computations), _continued_collectives(computations)
    for name in _callers_first(computations, entry):
        by_name = {instruction.name: instruction for instruction in computations[name]}
        for instruction in computations[name]:
            trips = _trips(instruction, computations) if instruction.op == "while" else 1
            for callee in instruction.callees:
                times[callee] += times[name] * (steps if trips is None else trips)
            if name not in continued and (found := _collective(instruction, by_name, name)):
                kind, groups, size = found
                moved[kind, groups][0] += times[name] * size
                moved[kind, groups][1] += times[name]
            if name not in fused:
                hbm += times[name] * (
                    _traffic(instruction, by_name, computations) - _unread_bytes(instruction, by_name, seen)
                )
    collectives = [Collective(kind, parse_groups(groups), *sums) for (kind, groups), sums in moved.items()]
    return Moved(tuple(collectives), hbm)


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
            # The -start of an asynchronous pair names the same callees, and they run only once.
            called = () if op.endswith(("-done", "-update")) else tuple(names)
            body.append(_Instruction(name, op, shape, operands, called, rest))
    return computations, entry


def _trips(loop: _Instruction, computations: dict[str, list[_Instruction]]) -> int | None:
    """Iterations of a loop. None: they are not known before the program runs.

    The text states them, or they follow from the condition `counter < constant` of a loop whose counter begins at 0, such as a
    scan. In each iteration the counter rises by a constant that the body adds, or by 1.
    """
    if stated := _TRIPS.search(loop.attributes):
        return int(stated[1])
    condition, body = (
        {i.name: i for i in computations[re.search(rf"{part}=%?([\w.\-]+)", loop.attributes)[1]]}  # type: ignore[index]
        for part in ("condition", "body")
    )
    compare, result = list(condition.values())[-1], list(body.values())[-1]
    if compare.op != "compare" or "direction=LT" not in compare.attributes:
        return None
    counter, bound = (condition[operand] for operand in compare.operands)
    if (counter.op, bound.op) != ("get-tuple-element", "constant"):
        return None
    index = int(re.search(r"index=(\d+)", counter.attributes)[1])  # type: ignore[index]
    added = body[result.operands[index]]
    constants = [body[o].attributes for o in added.operands if o in body and body[o].op == "constant"]
    step = _number(constants[0]) if added.op == "add" and constants else 1
    return -(-_number(bound.attributes) // step)


def _number(attributes: str) -> int:
    """The value of an integer constant."""
    return int(attributes.split(")")[0])


def _collective(
    instruction: _Instruction, by_name: dict[str, _Instruction], computation: str
) -> tuple[str, str, float] | None:
    """Kind, groups (as text) and bytes of a collective, as in `network.Collective`. None: it is none.

    An asynchronous pair is counted at its -start. A fusion of an all-reduce and a slice is a reduce-scatter.
    """
    size = sum(by_name[operand].size for operand in instruction.operands if operand in by_name)
    if instruction.op == "send" and (transfer := _TRANSFER.search(instruction.attributes)):
        return f"{transfer[1].lower().replace('_', '-')} between slices", "", size
    kind = instruction.op.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    found = _GROUPS.search(instruction.attributes)
    groups = (found[1] or found[2]) if found else ""
    if kind == "all-gather":
        size *= max(map(len, parse_groups(groups)), default=1)
    scattered = kind == "all-reduce" and computation.startswith("all-reduce-scatter")
    return "reduce-scatter" if scattered else kind, groups, size


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


def _continued_collectives(computations: dict[str, list[_Instruction]]) -> set[str]:
    """Computations that go on with an asynchronous collective, or end it, and name it again. It is counted where it starts."""
    return {
        callee
        for body in computations.values()
        for i in body
        for callee in i.callees
        if callee.startswith("async_collective_fusion") or i.name.startswith("async-collective-done")
    }


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
    if instruction.name.startswith(
        "async-collective-start"
    ):  # a fusion whose result is the tuple of source and destination
        return instruction.hbm
    if instruction.name.startswith("async-collective-done"):
        return 0.0
    if op == "fusion":
        return _traffic_of_fusion(instruction, computations)
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
    """Bytes of its last two operands that a kernel does not read, according to `seen`; negative if it reads them again."""
    for name, share in seen.items():
        if instruction.op == "custom-call" and instruction.name.startswith(name):
            return (1 - share) * sum(by_name[operand].hbm for operand in instruction.operands[-2:])
    return 0.0


def _traffic_of_fusion(fusion: _Instruction, computations: dict[str, list[_Instruction]]) -> float:
    """`_traffic` of a fusion: its result and its parameters. Of those that it slices or updates in place, only the slice or the
    update counts; those that it only hands on, such as the arrays of an asynchronous collective, do not."""
    body = computations[fusion.callees[0]]
    by_name = {i.name: i for i in body}
    written, total, result = fusion.hbm, 0.0, body[-1]
    outputs = [by_name[operand] for operand in result.operands] if result.op == "tuple" else []
    handed_on = [output for output in outputs if output.op in ("parameter", *COLLECTIVES)]
    written -= sum(output.hbm for output in handed_on)
    for instruction in body:
        if instruction.op in _UPDATED and instruction.size <= written:
            written -= instruction.size - by_name[instruction.operands[_UPDATED[instruction.op]]].size
    for parameter in (i for i in body if i.op == "parameter" and i.hbm):
        _, users = _users(parameter, body)
        if not (handed_on and all(user is result or user in handed_on for user in users)):
            total += min(parameter.hbm, _bytes_read(parameter, body, computations))
    return total + written


def _users(array: _Instruction, body: list[_Instruction]) -> tuple[set[str], list[_Instruction]]:
    """The names of an array in a computation, which bitcasts give it, and the instructions that use it."""
    names = {array.name}
    for instruction in body:  # operands stand before their users
        if instruction.op == "bitcast" and instruction.operands[0] in names:
            names.add(instruction.name)
    return names, [i for i in body if i.op != "bitcast" and names & set(i.operands)]


def _bytes_read(
    parameter: _Instruction, body: list[_Instruction], computations: dict[str, list[_Instruction]]
) -> float:
    """Bytes that the body of a fusion reads of a parameter: of a slice the slice, of an update in place nothing, and of a fusion
    inside what that one reads."""
    names, users = _users(parameter, body)
    total = 0.0 if users else parameter.size
    for user in users:
        at = [i for i, operand in enumerate(user.operands) if operand in names]
        if user.op == "fusion":
            inner = computations[user.callees[0]]
            inputs = {int(i.attributes.split(")")[0]): i for i in inner if i.op == "parameter"}
            total += sum(_bytes_read(inputs[i], inner, computations) for i in at)
        elif at == [0] and user.op in _SLICED:
            total += user.size
        elif not (at == [0] and user.op in _UPDATED):
            total += parameter.size
    return total


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
