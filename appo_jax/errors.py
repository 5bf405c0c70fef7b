"""The errors a user can meet. Each message carries the field or file, what was given, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What to do about a name that is none of `known`: the most similar one, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(known)}"


class AppoError(Exception):
    """Base of all errors that the user can correct; the CLI prints them without a traceback."""


class ConfigError(AppoError):
    """A configuration that cannot run."""

    @classmethod
    def of(cls, problems: Sequence[str]) -> ConfigError:
        return cls("\n".join(f"- {problem}" for problem in problems) if len(problems) > 1 else problems[0])


class DataError(AppoError):
    """A data file that is missing, empty or malformed."""


class WeightsError(AppoError):
    """A weights folder or architecture that cannot be loaded."""


class ToolError(AppoError):
    """A tool that cannot be started on this machine."""


class CheckpointError(AppoError):
    """A run directory or checkpoint that cannot be used."""


class TrainingError(AppoError):
    """Training had to stop (a non-finite loss)."""


class JoinError(AppoError):
    """The other hosts could not be joined now. A later start may join them."""


class PlanError(AppoError):
    """A plan that cannot be made on this machine."""
