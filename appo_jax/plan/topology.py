"""Slices of TPU chips, by the TPU compiler's names (`v5p:4x4x4`) and by Google Cloud's names (`v5litepod-64`)."""

from __future__ import annotations

import dataclasses
import math
import re

from appo_jax.errors import ConfigError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """The figures of one device. The rates are from cloud.google.com/tpu/docs; `hbm` is what the compiler lets programs use.

    The documentation gives the bandwidth of all links of a chip together: 4 on v5e and v6e, 6 on the others. The bandwidth of v4
    between slices is that of jax-ml.github.io/scaling-book: 25 GB/s for a host of 4 chips. A device is one chip, except that a
    tpu7x chip is two devices with half of its figures each.
    """

    flops: float  # bfloat16, per second
    hbm_bandwidth: float  # bytes per second
    link_bandwidth: float  # bytes per second of one link to a neighbour, in one direction
    dcn_bandwidth: float  # bytes per second to other slices, in one direction
    hbm: float  # bytes
    per_chip: int = 1  # devices per chip


CHIPS = {
    "v4": Chip(275e12, 1200e9, 50e9, 6.25e9, 30.75 * GIB),
    "v5e": Chip(197e12, 819e9, 50e9, 3.125e9, 15.75 * GIB),
    "v5p": Chip(459e12, 2765e9, 100e9, 6.25e9, 95.74 * GIB),
    "v6e": Chip(918e12, 1638e9, 100e9, 12.5e9, 31.25 * GIB),
    "tpu7x": Chip(2307e12 / 2, 7380e9 / 2, 100e9 / 2, 12.5e9 / 2, 94.74 * GIB, per_chip=2),
}

# Shapes of the slices that Google Cloud offers, by chip.
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
SHAPES = {"v4": CUBES, "v5e": FLAT, "v6e": FLAT, "v5p": CUBES, "tpu7x": CUBES}
# The first part of Google Cloud's name of a slice -> the chip, and what one chip adds to the number in the name. For v4, v5p and
# tpu7x this number counts TensorCores, of which a chip has two.
CLOUD_NAMES = {
    "v4": ("v4", 2), "v5litepod": ("v5e", 1), "v5e": ("v5e", 1), "v6e": ("v6e", 1), "v5p": ("v5p", 2), "tpu7x": ("tpu7x", 2),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Slice:
    """One slice of a pod."""

    topology: str
    """The TPU compiler's name of it, such as v5p:4x4x4."""
    chip: Chip
    num_chips: int

    @property
    def sides(self) -> tuple[int, ...]:
        """Chips along each axis."""
        return tuple(map(int, self.topology.split(":")[1].split("x")))

    def is_ring(self, axis: int) -> bool:
        """Whether the ends of an axis are connected, so that its chips form a ring (scaling-book, chapter 2).

        On v5e and v6e an axis of 16 chips is a ring; on the others all axes are, if the slice consists of cubes of 4x4x4.
        """
        sides = self.sides
        return sides[axis] >= 16 if len(sides) == 2 else all(side % 4 == 0 for side in sides)


def parse_slice(name: str) -> Slice:
    """The slice with this name: `v5p:4x4x4`, or Google Cloud's `v5litepod-64`, `v6e-256`, `v5p-128` (128 cores, 64 chips).

    Raises ConfigError, with the possible names, for an unknown name.
    """
    if found := re.fullmatch(r"(\w+)-(\d+)", name):
        kind, per_chip = CLOUD_NAMES.get(found[1], ("", 1))
        by_number = {per_chip * _num_chips(shape): shape for shape in SHAPES.get(kind, ())}
        if shape := by_number.get(int(found[2])):
            return Slice(f"{kind}:{shape}", CHIPS[kind], _num_chips(shape))
        if by_number:
            names = ", ".join(f"{found[1]}-{number}" for number in by_number)
            raise ConfigError(f"--topology {name}: the cloud has no slice of that size; expected one of {names}")
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", name)
    if found is None or found[1] not in CHIPS:
        raise ConfigError(
            f"--topology {name}: expected CHIP:AxB or CHIP:AxBxC with CHIP one of {', '.join(CHIPS)}, e.g. v5p:4x4x4, v6e:8x8, "
            "or a slice as the cloud names it, e.g. v5litepod-64, v6e-64, v5p-128"
        )
    return Slice(name, CHIPS[found[1]], _num_chips(found[2]))


def _num_chips(shape: str) -> int:
    """The number of chips of a shape such as 4x4x8."""
    return math.prod(int(side) for side in shape.split("x"))
