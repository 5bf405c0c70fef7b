"""The hosts of a pod: joining them before anything touches a device, and what they tell each other between programs.

All hosts run the same device programs in the same order, so all of them must decide alike. They do when a decision follows
from what is read off the devices, which is the same everywhere, and from what `exchange` returns, which is too. Tool calls,
rewards, clocks and signals are a host's own: their outcomes go through `exchange` before anything follows from them.
"""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from appo_jax import heartbeat
from appo_jax.errors import ConfigError

# Bytes of a message that one collective carries; longer ones take a second, of a power of two, so that programs stay few.
FRAME = 1 << 12


def initialize() -> None:
    """Join the other hosts when `APPO_DISTRIBUTED=1` is set, as launch/run.sh sets it; else this process is alone.

    A variable of the launch and not a field of the config: a run goes on with another number of hosts. Cloud TPU, Slurm
    and MPI tell JAX who the others are. Raises ConfigError when nothing does.
    """
    if os.environ.get("APPO_DISTRIBUTED") != "1":
        return
    try:
        _jax().distributed.initialize()
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"APPO_DISTRIBUTED = 1, but the other hosts cannot be joined: {error}. On one host leave it unset; on a pod "
            "start the command on all hosts (launch/run.sh)"
        ) from error


def joined() -> tuple[int, int, str, Any]:
    """Of hosts that have joined: their number, this one's index, the coordinator's address, JAX's key-value store."""
    from jax._src.distributed import global_state  # asks no device, which jax.process_index() would

    return (
        global_state.num_processes,
        global_state.process_id,
        str(global_state.coordinator_address),
        global_state.client,
    )


def host() -> int:
    """Index of this host."""
    return _jax().process_index() if num_hosts() > 1 else 0


def num_hosts() -> int:
    """How many hosts there are. Asks no device when this process never joined others."""
    return _jax().process_count() if _jax().distributed.is_initialized() else 1


def _jax() -> Any:
    import jax  # only in functions: the command line reports its own errors before jax is imported

    return jax


def exchange(message: Any) -> list[Any]:
    """Every host's `message` (plain JSON), in the order of the hosts. All hosts call it together; alone: `[message]`.

    Waits for the slowest host. A host that is lost does not come: JAX's heartbeat then ends the others.
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
