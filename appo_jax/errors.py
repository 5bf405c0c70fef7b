"""The errors a user can meet. Each message carries the field or file, what was given, what was expected, what to do."""

from __future__ import annotations

from collections.abc import Sequence


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


class PlanError(AppoError):
    """A plan that cannot be made on this machine."""
