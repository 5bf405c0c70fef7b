"""The time of a program's collectives on the links of a slice.

The formulas are those of "How to scale your model", chapters 2 and 3 (jax-ml.github.io/scaling-book), where V is the size of the
whole array, n the number of devices of a group, and W the bytes per second that a device receives over the links of the axes of
the torus along which the group lies:

    all-gather, reduce-scatter    V (n − 1)/n / W
    all-reduce                    twice that: a reduce-scatter and an all-gather
    all-to-all                    half of the group sends half of its parts to the other half, over the links between the halves
    collective-permute            what the busiest link carries, if every part takes the shortest way, one axis after the other
    between slices                what a device sends over the bandwidth of the data-centre network

Each adds 1 µs for every hop to the farthest device of the group, an all-reduce twice that.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from appo_jax.plan.topology import Chip, Slice

# Seconds of a hop: "about 1 µs", from the same chapters.
HOP_S = 1e-6

Groups = tuple[tuple[int, ...], ...]
"""Devices, as indices into the mesh in row-major order: the groups of a collective, or (source, target) of a permute."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind over the same groups, in one run of a program."""

    kind: str
    """One of `hlo.COLLECTIVES`, or the kind of a transfer between slices, e.g. "all-reduce between slices"."""
    groups: Groups
    """Of the devices of one slice; of transfers between slices: none."""
    size: float
    """Bytes of the arrays: of the gathered, reduced or scattered array; for the other kinds, of what one device sends."""
    times: float
    """Number of collectives."""


@dataclasses.dataclass(frozen=True)
class Line:
    """How groups lie along one axis of a torus."""

    links: int
    """Links at the end of a group's line: 1, or 2 on a ring."""
    shared: int
    """Largest number of groups whose lines use the same link."""
    places: int
    """Coordinates of a group on this axis."""


@dataclasses.dataclass(frozen=True)
class Network:
    """The links of a slice, and the places of a mesh's devices on them."""

    chip: Chip
    sizes: tuple[int, ...]
    """Devices along each axis of the slice."""
    rings: tuple[bool, ...]
    """For each axis, whether its ends are connected."""
    places: tuple[tuple[int, ...], ...]
    """Coordinates of each device of one slice, in the order of the mesh."""
    mesh: dict[str, int] = dataclasses.field(default_factory=dict, hash=False)
    """Sizes of the mesh's axes in one slice, by name."""
    slices: int = 1

    @property
    def num_devices(self) -> int:
        """Devices of all slices."""
        return len(self.places) * self.slices

    def seconds(self, collective: Collective) -> float:
        """Seconds of all these collectives, one after the other."""
        kind, groups = collective.kind, collective.groups
        if kind.endswith(" between slices"):
            k = self.slices
            sent = {"all-reduce": 2 * (k - 1) / k, "all-gather": k - 1}.get(kind.split()[0], 1)
            return collective.size * sent / self.chip.dcn_bandwidth
        if kind == "collective-permute":
            load, hops = self._routes(groups)
            return collective.size * load / self.chip.link_bandwidth + collective.times * hops * HOP_S
        n = max(map(len, groups), default=1)
        if n == 1:
            return 0.0
        passes = 2 if kind == "all-reduce" else 1
        latency = collective.times * passes * self._diameter(groups) * HOP_S
        lines, link = self._lines(groups), self.chip.link_bandwidth
        if kind == "all-to-all":
            # Of n devices, n / places send along each line of links; half of them send half of their array over the middle.
            return collective.size * max(x.places * x.shared / (4 * x.links) for x in lines) / link + latency
        rate = link * sum(x.links / x.shared for x in lines)
        return passes * collective.size * (n - 1) / n / rate + latency

    def name(self, collective: Collective) -> str:
        """The kind, and the axes of the mesh along which the groups lie."""
        indices = [range(size) for size in self.mesh.values()]
        at = list(itertools.product(*indices))
        axes = [
            axis
            for i, axis in enumerate(self.mesh)
            if any(len({at[device][i] for device in group}) > 1 for group in collective.groups)
        ]
        return " ".join((collective.kind, "×".join(axes))).strip()

    def _lines(self, groups: Groups) -> list[Line]:
        """For each axis along which groups have several devices in a row: how these rows use its links.

        If there is no such axis, one link.
        """
        found = []
        for axis, size in enumerate(self.sizes):
            rows: dict[tuple[Any, ...], list[int]] = defaultdict(list)  # (group, the other coordinates) -> coordinates
            for number, group in enumerate(groups):
                for device in group:
                    place = self.places[device]
                    rows[number, place[:axis] + place[axis + 1 :]].append(place[axis])
            used: Counter[tuple[Any, ...]] = Counter()  # (the other coordinates, link) -> groups
            links, longest = 2, 1
            for (_, others), row in rows.items():
                if len(row) == 1:
                    continue
                row.sort()
                longest = max(longest, len(row))
                # The row goes around the ring if the gaps between its devices are equal, that over the end included.
                around = self.rings[axis] and {b - a for a, b in itertools.pairwise([*row, row[0] + size])} == {
                    size // len(row)
                }
                links = 2 if around and links == 2 else 1
                used.update((others, link) for link in (range(size) if around else range(row[0], row[-1])))
            if used:
                found.append(Line(links, max(used.values()), longest))
        return found or [Line(1, 1, max(map(len, groups)))]

    def _diameter(self, groups: Groups) -> int:
        """Hops between the two devices of a group that are farthest from each other, for the longest group."""
        return max(self._hops(a, b) for group in groups for a, b in itertools.combinations(group, 2))

    def _hops(self, a: int, b: int) -> int:
        return sum(abs(step) for _, step in self._steps(a, b))

    def _steps(self, a: int, b: int) -> Iterable[tuple[int, int]]:
        """(axis, signed number of hops) of the shortest way from one device to another."""
        for axis, (size, x, y) in enumerate(zip(self.sizes, self.places[a], self.places[b], strict=True)):
            step = y - x
            if self.rings[axis] and abs(step) > size / 2:
                step -= size if step > 0 else -size
            yield axis, step

    def _routes(self, pairs: Groups) -> tuple[int, int]:
        """The parts that the busiest link carries in one direction, and the hops of the longest way."""
        carried: Counter[tuple[Any, ...]] = Counter()
        longest = 0
        for source, target in pairs:
            place = list(self.places[source])
            for axis, step in self._steps(source, target):
                direction = 1 if step > 0 else -1
                for _ in range(abs(step)):
                    carried[tuple(place), axis, direction] += 1
                    place[axis] = (place[axis] + direction) % self.sizes[axis]
            longest = max(longest, self._hops(source, target))
        return max(carried.values(), default=0), longest


@functools.lru_cache(1024)
def parse_groups(text: str) -> Groups:
    """The groups of devices in XLA's notations. No text: no groups.

    `{{0,1},{2,3}}` lists them. `[4,2]<=[2,4]T(1,0)` numbers the devices in the shape [2,4], transposes, and has 4 groups of 2.
    `mesh['a'=2,'b'=4] {'b'}` numbers them on a mesh, and a group lies along b; `{'b':(1)2}`: along the second of the axes of sizes
    1, 2 and 2 into which b is split. `mesh[…], device_ids=([4,2]T(1,0)) {…}` transposes first.
    """
    if text.startswith("{") or not text:
        return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", text))
    if found := re.match(r"\[([\d,]+)\]<=(.*)", text):
        return tuple(map(tuple, _numbered(found[2]).reshape(_sizes(found[1])).tolist()))
    head, along = text.rsplit("{", 1)
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", head)}
    order = re.search(r"device_ids=\((.*)\)", head)
    devices = _numbered(order[1] if order else f"[{math.prod(sizes.values())}]")
    shape, grouped = list[int](), list[int]()
    parts = {name: (before, part) for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", along)}
    for name, size in sizes.items():
        before, part = parts.get(name, ("", ""))
        split = (int(before), int(part), size // int(before) // int(part)) if part else (1, size, 1)
        grouped += [len(shape) + 1] if name in parts else []
        shape += split
    kept = [axis for axis in range(len(shape)) if axis not in grouped]
    devices = devices.reshape(shape).transpose(kept + grouped)
    return tuple(map(tuple, devices.reshape(-1, math.prod(shape[axis] for axis in grouped)).tolist()))


def _sizes(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _numbered(text: str) -> np.ndarray:
    """Device numbers in the order `[2,4]T(1,0)`."""
    found = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    assert found is not None, text
    devices = np.arange(math.prod(_sizes(found[1]))).reshape(_sizes(found[1]))
    return devices.transpose(_sizes(found[2])) if found[2] else devices


def network_of(described: Slice, devices: Sequence[Any], mesh: dict[str, int], slices: int) -> Network:
    """The network under a mesh. `devices`: those of the mesh, in row-major order; the devices of a slice follow each other.

    The two devices of a tpu7x chip are taken as one more axis, whose links are as fast as the others.
    """
    own = devices[: len(devices) // slices]
    places = tuple((*device.coords, device.core_on_chip) for device in own)
    sizes = tuple(max(along) + 1 for along in zip(*places, strict=True))
    rings = tuple(axis < len(described.sides) and described.is_ring(axis) for axis in range(len(sizes)))
    return Network(described.chip, sizes, rings, places, mesh | {"data": mesh["data"] // slices}, slices)
