"""Bounds of numbers that pydantic has no name for. The type of a field states its bound, and `config_io.check` enforces it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated

from annotated_types import Interval

from appo_jax.errors import ConfigError

Fraction = Annotated[float, Interval(ge=0, le=1)]
"""From 0 to 1, both included."""
BelowOne = Annotated[float, Interval(ge=0, lt=1)]
"""From 0, included, to 1, excluded."""
Seconds = Annotated[float, Interval(gt=0, le=1e9)]
"""A time limit. No clock of the operating system waits longer than some 9e9 s."""
Pause = Annotated[float, Interval(ge=0, le=1e9)]
"""A wait, in seconds, which may be 0."""
Seed = Annotated[int, Interval(ge=0, lt=2**31)]
"""What every random generator of the program takes as its seed."""


def temperature_problem(what: str, temperature: float) -> Iterator[str]:
    """A sentence if a temperature is neither 0 (greedy) nor one that logits can be divided by. `what`: the words before it."""
    if temperature != 0 and not 1e-6 <= temperature <= 1e6:  # NaN too
        yield f"{what} {temperature}: expected 0 (greedy), or a number from 1e-6 to 1e6"


def require_at_least(bounds: Mapping[str, tuple[float | None, float]]) -> None:
    """Raises ConfigError for an argument of a command that is below its bound, or infinite.

    bounds: option -> (given, least); given None: the option was left out."""
    for option, (given, least) in bounds.items():
        if given is not None and not least <= given < math.inf:  # NaN too
            raise ConfigError(
                f"{option} {given}: expected {least} or more{', but a finite number' if given == math.inf else ''}"
            )
