"""Slices of TPU chips: by the names that the TPU compiler takes (`v5p:4x4x4`) and by those of the cloud (`v5litepod-64`)."""

from __future__ import annotations

import dataclasses
import math
import re

from appo_jax.errors import ConfigError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device: figures of cloud.google.com/tpu/docs, and the HBM that the compiler lets programs use.

    A device is a chip, but for the two halves of a tpu7x, which are devices of their own: each has half of the chip.
    """

    flops: float  # bfloat16, per second
    hbm_bandwidth: float  # bytes per second
    ici_bandwidth: float  # bytes per second, one way, all links together
    hbm: float  # bytes
    per_chip: int = 1  # devices


CHIPS = {
    "v4": Chip(275e12, 1200e9, 300e9, 30.75 * GIB),
    "v5e": Chip(197e12, 819e9, 200e9, 15.75 * GIB),
    "v5p": Chip(459e12, 2765e9, 600e9, 95.74 * GIB),
    "v6e": Chip(918e12, 1638e9, 400e9, 31.25 * GIB),
    "tpu7x": Chip(2307e12 / 2, 7380e9 / 2, 600e9 / 2, 94.74 * GIB, per_chip=2),
}

# Shapes of the slices that the cloud rents, by chip.
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
SHAPES = {"v4": CUBES, "v5e": FLAT, "v6e": FLAT, "v5p": CUBES, "tpu7x": CUBES}
# How the cloud calls a chip in the name of a slice, and what the number after it counts for each chip.
CLOUD_NAMES = {  # v4, v5p, tpu7x: TensorCores, two to a chip
    "v4": ("v4", 2), "v5litepod": ("v5e", 1), "v5e": ("v5e", 1), "v6e": ("v6e", 1), "v5p": ("v5p", 2), "tpu7x": ("tpu7x", 2),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Slice:
    """One slice."""

    topology: str
    """As the TPU compiler names it."""
    chip: Chip
    num_chips: int


def parse_slice(name: str) -> Slice:
    """The slice of `v5p:4x4x4`, or of the cloud's `v5litepod-64`, `v6e-256`, `v5p-128` (128 cores: 64 chips).

    Raises ConfigError that says which names there are.
    """
    if found := re.fullmatch(r"(\w+)-(\d+)", name):
        kind, per_chip = CLOUD_NAMES.get(found[1], ("", 1))
        by_number = {per_chip * _count(shape): shape for shape in SHAPES.get(kind, ())}
        if shape := by_number.get(int(found[2])):
            return Slice(f"{kind}:{shape}", CHIPS[kind], _count(shape))
        if by_number:
            names = ", ".join(f"{found[1]}-{number}" for number in by_number)
            raise ConfigError(f"--topology {name}: the cloud has no slice of that size; expected one of {names}")
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", name)
    if found is None or found[1] not in CHIPS:
        raise ConfigError(
            f"--topology {name}: expected CHIP:AxB or CHIP:AxBxC with CHIP one of {', '.join(CHIPS)}, e.g. v5p:4x4x4, v6e:8x8, "
            "or a slice as the cloud names it, e.g. v5litepod-64, v6e-64, v5p-128"
        )
    return Slice(name, CHIPS[found[1]], _count(found[2]))


def _count(shape: str) -> int:
    return math.prod(int(side) for side in shape.split("x"))
