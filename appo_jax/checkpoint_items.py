"""Orbax's handlers for the items of a checkpoint, changed to report failures when they happen.

Orbax writes in background threads. If a write fails on one host, the main threads of all hosts would wait at barriers for up to
twenty minutes before they notice it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from appo_jax import failures
from appo_jax.errors import CheckpointError


def items(directory: Path) -> dict[str, Any]:
    """The handlers of a checkpoint's items in `directory`, by the item's name."""
    handlers = {"state": ocp.PyTreeCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
    for handler in handlers.values():
        handler.async_save = _watched(handler.async_save, directory)
    return handlers


def not_written(directory: Path, error: BaseException) -> CheckpointError:
    """The error for a checkpoint that could not be written."""
    wrong = CheckpointError(
        f"{directory}: a checkpoint could not be written ({type(error).__name__}: {error}); "
        "check the disk's free space and permissions, then start again: the run goes on from its last good step"
    )
    wrong.__cause__ = error  # `failures` looks there for the loss of another host
    return wrong


def _watched(async_save: Callable[..., Awaitable[Any]], directory: Path) -> Callable[..., Awaitable[Any]]:
    async def save(*args: Any, **kwargs: Any) -> Any:
        futures = await async_save(*args, **kwargs)
        return None if futures is None else [_Watched(future, directory) for future in futures]

    return save


class _Watched:
    """A write in the background. Its failure is reported to the supervisor, which ends all hosts."""

    def __init__(self, future: Any, directory: Path) -> None:
        self._future, self._directory = future, directory

    def result(self, timeout: float | None = None) -> Any:
        try:
            return self._future.result(timeout)
        except Exception as error:
            failures.report(not_written(self._directory, error))
            raise

    def cancel(self) -> Any:
        return self._future.cancel()
