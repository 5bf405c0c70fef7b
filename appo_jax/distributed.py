"""The hosts of a pod: they join before any device is used, and exchange messages between device programs.

All hosts run the same device programs in the same order, so they must make the same decisions. A decision may depend on arrays
read from the devices and on what `exchange` returns, because these are the same on all hosts. Tool calls, rewards, clocks and
signals differ between hosts: their results must go through `exchange` before a decision depends on them.
"""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from appo_jax import heartbeat
from appo_jax.errors import ConfigError, JoinError

# Bytes of a message in the first collective. The rest of a longer message takes a second collective, whose size is a power of two
# so that few programs are compiled.
FRAME = 1 << 12
# All hosts must join within this time, in seconds. JAX ends the process if they do not.
JOIN_S = 120


def initialize() -> None:
    """Join the other hosts if `APPO_DISTRIBUTED=1` is set (launch/run.sh sets it); else this process is the only host.

    It is an environment variable and not a config field, because a run can continue on another number of hosts. JAX finds the
    other hosts on Cloud TPU, Slurm and MPI. Raises ConfigError if it finds no cluster, and JoinError for any other error: the name
    of a host may not be known yet, or the cloud's metadata server may not answer (on a TPU VM JAX then finds no cluster, too).
    """
    if os.environ.get("APPO_DISTRIBUTED") != "1":
        return
    try:
        with heartbeat.phase("join"):
            _jax().distributed.initialize(initialization_timeout=JOIN_S)
    except (ValueError, RuntimeError, OSError) as error:
        if isinstance(error, ValueError) and not _on_tpu_vm():
            raise ConfigError(
                f"APPO_DISTRIBUTED = 1, but the other hosts cannot be joined: {error}. On one host leave it unset; on a pod "
                "start the command on all hosts (launch/run.sh)"
            ) from error
        raise JoinError(
            f"the other hosts cannot be joined now: {type(error).__name__}: {error}; start again"
        ) from error


def joined() -> tuple[int, int, str, Any]:
    """After hosts have joined: their number, this host's index, the coordinator's address, JAX's key-value store."""
    from jax._src.distributed import global_state  # uses no device, unlike jax.process_index()

    return (
        global_state.num_processes,
        global_state.process_id,
        str(global_state.coordinator_address),
        global_state.client,
    )


def host() -> int:
    """The index of this host."""
    return _jax().process_index() if num_hosts() > 1 else 0


def num_hosts() -> int:
    """The number of hosts. It uses no device if this process has not joined others."""
    return _jax().process_count() if _jax().distributed.is_initialized() else 1


def _on_tpu_vm() -> bool:
    from jax._src import cloud_tpu_init

    return cloud_tpu_init.running_in_cloud_tpu_vm


def _jax() -> Any:
    import jax  # only in functions: the command line reports its own errors before jax is imported

    return jax


def exchange(message: Any) -> list[Any]:
    """Every host's `message` (plain JSON), in the order of the hosts. All hosts call it together. On one host: `[message]`.

    It waits for the slowest host. If a host is lost, the supervisors, or else JAX's heartbeat, end the waiting hosts.
    """
    with heartbeat.exchanging():
        return [message] if num_hosts() == 1 else _exchange(message)


def _exchange(message: Any) -> list[Any]:
    from jax.experimental.multihost_utils import process_allgather

    data = json.dumps(message).encode()
    head = np.zeros(FRAME, np.uint8)
    head[:8] = np.frombuffer(len(data).to_bytes(8, "little"), np.uint8)
    start = np.frombuffer(data[: FRAME - 8], np.uint8)
    head[8 : 8 + len(start)] = start
    heads = process_allgather(head)  # [hosts, FRAME]
    sizes = [int.from_bytes(row[:8].tobytes(), "little") for row in heads]
    parts = [row[8:].tobytes() for row in heads]
    if (rest := max(sizes) - (FRAME - 8)) > 0:
        tail = np.zeros(1 << (rest - 1).bit_length(), np.uint8)
        left = np.frombuffer(data[FRAME - 8 :], np.uint8)
        tail[: len(left)] = left
        parts = [part + row.tobytes() for part, row in zip(parts, process_allgather(tail), strict=True)]
    return [json.loads(part[:size]) for part, size in zip(parts, sizes, strict=True)]
