"""Bounds of numbers that pydantic has no name for. A field carries its bound in its type; `config_io.check` holds it to it."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Interval

Fraction = Annotated[float, Interval(ge=0, le=1)]
"""From 0 to 1, both included."""
BelowOne = Annotated[float, Interval(ge=0, lt=1)]
"""From 0, included, to 1, excluded."""
Seed = Annotated[int, Interval(ge=0, lt=2**31)]
"""What every random generator of the program takes as its seed."""
