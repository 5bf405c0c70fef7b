"""A user's modules that fail: $FAULT happens on host $AT_HOST, from step $AT_STEP on. For the host matrix (hosts.py)."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time

import tiny

from appo_jax import distributed, heartbeat
from appo_jax.config import DataConfig
from appo_jax.data.source import Dataset
from appo_jax.errors import TrainingError
from appo_jax.reward.response import Response
from appo_jax.tools.wrap import FunctionTool
from appo_jax.types import RewardResult

_struck = False


def strike() -> None:
    """Print the time of the fault, the first time that it happens."""
    global _struck
    if not _struck:
        print(f"FAULT {time.time()}", flush=True)
    _struck = True


def due(fault: str, phase: str) -> bool:
    now, step = heartbeat.now()
    here = os.environ["FAULT"] == fault and distributed.host() == int(os.environ["AT_HOST"])
    return here and now == phase and step >= int(os.environ["AT_STEP"])


def load(config: DataConfig) -> Dataset:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # here, in the main thread, for "checkpoint cannot be written"
    if due("data raises", "start"):
        strike()
        raise ValueError("the questions' server has gone away")
    return tiny.load(config)


def tool() -> FunctionTool:
    if due("tool raises", "start"):
        strike()
        raise ValueError("the tool's server has gone away")
    return FunctionTool(lambda text: text, name="echo")


def reward(response: Response) -> RewardResult:
    """The length of the response, if the fault does not happen."""
    if due("reward raises", "reward"):  # a rollout without a reward is left out of its group: the run goes on
        strike()
        raise ValueError("the judge has gone away")
    if due("reward ends the run", "reward"):
        strike()
        raise TrainingError("the judge has gone away for good; start it again")
    if due("SIGKILL in training", "reward"):
        strike()
        os.kill(os.getpid(), signal.SIGKILL)
    if due("SIGSTOP in training", "reward"):
        strike()
        os.kill(os.getpid(), signal.SIGSTOP)
    if due("checkpoint cannot be written", "reward"):  # no file of this process may grow beyond this: as on a full disk
        strike()
        sys.stdout.flush()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, resource.RLIM_INFINITY))
    return RewardResult(float(len(response.text)), False, {})
