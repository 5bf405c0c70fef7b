"""Imports what users name by `package.module:name`: tools, rewards, data sources and benchmark sets of their own."""

from __future__ import annotations

import importlib
from typing import Any

from appo_jax.errors import ConfigError


def imported(field: str, path: str, expected: str) -> Any:
    """What `path` names. Raises ConfigError with the field, the path, what went wrong and what is expected."""
    module, _, name = path.partition(":")
    if not module or not name:
        raise ConfigError(f"{field} = {path!r}: expected {expected}")
    try:
        return getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # importing a user's module may raise anything
        raise ConfigError(
            f"{field} = {path!r} cannot be imported ({type(error).__name__}: {error}); expected {expected}, of a package or of a "
            "file in the working directory"
        ) from error
