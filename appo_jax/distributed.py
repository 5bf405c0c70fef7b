"""Joining the other hosts of a pod, before anything touches a device."""

from __future__ import annotations

import os

from appo_jax.errors import ConfigError


def initialize() -> None:
    """Join the other hosts when `APPO_DISTRIBUTED=1` is set, as launch/run.sh sets it; else this process is alone.

    A variable of the launch and not a field of the config: a run goes on with another number of hosts. Cloud TPU, Slurm
    and MPI tell JAX who the others are. Raises ConfigError when nothing does.
    """
    if os.environ.get("APPO_DISTRIBUTED") != "1":
        return
    import jax  # only here: the command line reports its own errors before jax is imported

    try:
        jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"APPO_DISTRIBUTED = 1, but the other hosts cannot be joined: {error}. On one host leave it unset; on a pod "
            "start the command on all hosts (launch/run.sh)"
        ) from error
