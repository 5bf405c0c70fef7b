"""One host of a pod fails: `python tests/matrix/hosts.py [--hosts 2 4] [--moments 20] [--faults SIGKILL ...]`.

Processes stand for hosts. In the faults of PROGRAM they meet as the loop does and train nothing (tests/supervision/programs.py);
in those of TRAINING they are `appo-jax train` of the smallest run (tiny.py), whose data, tool or reward fail (faults.py). Each
fault is made to happen at so many moments, of a random host in a random step (and phase). For a partition, every host is in a
network namespace of its own (this takes root), and its cable is cut. Printed: the seconds from the fault to the end of the last
host, and whether every host gave the right exit code and said the first cause last.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import multiprocessing
import os
import random
import runpy
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Runs of training compile far more than they compute: quickly, as in tests/conftest.py, and once for all cases (main).
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import tiny
from cluster import variables_of_host

import appo_jax.train  # noqa: F401 - what hosts import, once for all of them: they are forked
from appo_jax.config import MeshConfig
from appo_jax.config_io import save_config
from appo_jax.timing import Phase

PROGRAMS = Path(__file__).parents[1] / "supervision/programs.py"
PHASES = get_args(Phase)
STEPS = 6
# Fault -> the exit code of all hosts, and what the last line of each says. {h}: the host it happened on.
PROGRAM = {
    "SIGKILL": (75, "the process of host {h} was ended by SIGKILL"),
    "SIGSTOP": (75, "the process of host {h} was stopped"),
    "kill both": (75, "host {h}"),  # the supervisor too: a machine that is switched off
    "stop both": (75, "host {h}"),  # a machine that stands still
    "exception": (1, "ValueError in step"),
    "error of ours": (1, "line 7 is not JSON"),
    "partition": (75, "the host or its network is lost"),
    "slow": (0, ""),  # 25 s late: nobody is ended for that
}
TRAINING = {
    "SIGKILL in training": (75, "the process of host {h} was ended by SIGKILL"),
    "SIGSTOP in training": (75, "the process of host {h} was stopped"),
    "data raises": (1, "the questions' server has gone away"),
    "tool raises": (1, "the tool's server has gone away"),
    "reward ends the run": (1, "the judge has gone away for good"),
    "checkpoint cannot be written": (1, "a checkpoint could not be written"),
    "reward raises": (0, ""),
}
FAULTS = PROGRAM | TRAINING
IN_PLACES = ("data raises", "tool raises")  # at the start of the run
CLONE_NEWNET, CLONE_NEWUTS = 0x40000000, 0x04000000


@dataclasses.dataclass(frozen=True)
class Case:
    fault: str
    hosts: int
    host: int
    step: int
    phase: str
    folder: Path
    config: Path | None  # of a run that trains


@contextlib.contextmanager
def network(hosts: int) -> Iterator[list[str]]:
    """Names of network namespaces 10.77.0.1, 10.77.1.1, …, each connected to a router in another one, whose name comes last."""
    names = [f"appo{os.getpid()}n{i}" for i in range(hosts + 1)]
    router = names[-1]

    def ip(command: str) -> None:
        subprocess.run(["ip", *command.split()], check=True)

    try:
        for name in names:
            ip(f"netns add {name}")
            ip(f"-n {name} link set lo up")
        subprocess.run(
            ["ip", "netns", "exec", router, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"], check=True
        )
        for i, name in enumerate(names[:-1]):
            ip(f"-n {name} link add eth0 type veth peer name port{i} netns {router}")
            ip(f"-n {name} addr add 10.77.{i}.1/24 dev eth0")
            ip(f"-n {router} addr add 10.77.{i}.254/24 dev port{i}")
            ip(f"-n {router} link set port{i} up")
            ip(f"-n {name} link set eth0 up")
            ip(f"-n {name} route add default via 10.77.{i}.254")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)


def enter(namespace: str, address: str) -> None:
    """Join a network namespace, in which this host's name is its address."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}") as file:
        joined = libc.setns(file.fileno(), CLONE_NEWNET)
    if joined or libc.unshare(CLONE_NEWUTS):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), namespace)
    socket.sethostname(address)


def start(case: Case, number: int, variables: dict[str, str], namespaces: list[str]) -> int:
    """Start a host, with a log case.folder/NUMBER.log and a separate process group. Returns its process id."""
    if pid := os.fork():
        return pid
    code: Any = 1
    try:
        os.setpgid(0, 0)
        log = os.open(case.folder / f"{number}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(variables)
        if namespaces:
            enter(namespaces[number], f"10.77.{number}.1")
        if case.config is None:
            sys.argv = [str(PROGRAMS), "hosts", str(case.folder / "run")]
            runpy.run_path(str(PROGRAMS), run_name="__main__")
        else:
            sys.argv = ["appo-jax", "train", "--config", str(case.config), "--run-dir", str(case.folder / "run")]
            runpy.run_module("appo_jax", run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def variables(case: Case, number: int, address: str, router: str | None) -> dict[str, str]:
    """The environment of a host: how it finds the others (as Open MPI sets it), and its fault."""
    return variables_of_host(number, case.hosts, address) | {
        "FAULT": case.fault, "AT_HOST": str(case.host), "AT_STEP": str(case.step), "AT_PHASE": case.phase, "STEPS": str(STEPS),
        "CUT": f"ip -n {router} link set port{case.host} down",
    }  # fmt: skip


def one_case(case: Case) -> tuple[float, str]:
    """(seconds until all hosts had ended, descriptions of what was wrong)."""
    case.folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with network(case.hosts) if case.fault == "partition" else contextlib.nullcontext([]) as namespaces:
        address = f"{'10.77.0.1' if namespaces else '127.0.0.1'}:{port}"
        router = namespaces[-1] if namespaces else None
        pids = [start(case, i, variables(case, i, address, router), namespaces) for i in range(case.hosts)]
        # The processes of a stopped machine outlive the others; those of a machine that is switched off print nothing.
        frozen = {case.host} if case.fault in ("stop both", "kill both") else set()
        codes, deadline, ended = dict[int, int](), time.monotonic() + 240, time.time()
        while len(codes.keys() - frozen) < case.hosts - len(frozen) and time.monotonic() < deadline:
            for i, pid in enumerate(pids):
                if i not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                    codes[i], ended = os.waitstatus_to_exitcode(found[1]), time.time()
            time.sleep(0.02)
        for i, pid in enumerate(pids):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, 9)
            if i not in codes:
                os.waitpid(pid, 0)
    logs = [(case.folder / f"{i}.log").read_text(errors="replace") for i in range(case.hosts)]
    marks = [float(line.split()[1]) for log in logs for line in log.splitlines() if line.startswith("FAULT")]
    wrong = [] if marks else ["the fault did not happen"]
    code, words = FAULTS[case.fault]
    for i in set(range(case.hosts)) - frozen:
        last = logs[i].strip().splitlines()[-1] if logs[i].strip() else ""
        cause = words.format(h=case.host) in last and (
            case.fault == "partition" or f"host {case.host} failed first" in last
        )
        if codes.get(i) != code or (words and not cause):
            wrong.append(f"host {i}: exit code {codes.get(i, 'still there after 240 s')}, said last: {last[-200:]}")
    return ended - marks[0] if marks else float("nan"), "; ".join(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--faults", nargs="+", default=list(FAULTS), choices=list(FAULTS))
    parser.add_argument(
        "--at-once", type=int, default=4, help="cases that are tried at the same time: most of their time is waiting"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, failed = random.Random(options.seed), 0
    print(
        "| fault | hosts | moments | median s | longest s | as it should be |\n|---|---:|---:|---:|---:|---:|",
        flush=True,
    )
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.environ["PYTHONPATH"] = f"{Path(__file__).parent}:{Path(__file__).parents[2]}"
        jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
        pool = stack.enter_context(multiprocessing.get_context("fork").Pool(options.at_once))
        for fault in options.faults:
            for hosts in options.hosts:
                config = training(folder, hosts) if fault in TRAINING else None
                cases = [
                    Case(fault, hosts, rng.randrange(hosts), 0 if fault in IN_PLACES else rng.randrange(1, STEPS - 1),
                         rng.choice(PHASES), folder / f"{fault}-{hosts}-{moment}".replace(" ", "-"), config)
                    for moment in range(options.moments)
                ]  # fmt: skip
                results = []
                for case, (seconds, wrong) in zip(cases, pool.imap(one_case, cases, chunksize=1), strict=True):
                    results.append((seconds, wrong))
                    if wrong:
                        print(f"{case}: {wrong}", file=sys.stderr, flush=True)
                        for log in sorted(case.folder.glob("*.log")):
                            print(
                                f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}",
                                file=sys.stderr,
                                flush=True,
                            )
                right = sum(not wrong for _, wrong in results)
                failed += len(results) - right
                times = [seconds for seconds, _ in results]
                print(
                    f"| {fault} | {hosts} | {len(results)} | {statistics.median(times):.1f} | {max(times):.1f} | {right} |",
                    flush=True,
                )
    return int(failed > 0)


def training(folder: Path, hosts: int) -> Path:
    """The config of a run on so many hosts, with a user's modules that fail (faults.py)."""
    home = folder / f"{hosts}-hosts"
    if not home.exists():
        home.mkdir()
        config = tiny.tiny_config(home)
        config = dataclasses.replace(
            config, checkpoint_every=1, mesh=MeshConfig(fsdp=hosts), sft=dataclasses.replace(config.sft, batch_size=hosts),
            prompts_per_step=hosts, prompts_per_minibatch=hosts,  # so that every host judges rollouts
            data=dataclasses.replace(config.data, source="faults:load"),
            tools=dataclasses.replace(config.tools, enabled=("search", "faults:tool")),
            reward=dataclasses.replace(config.reward, function="faults:reward"),
        )  # fmt: skip
        save_config(config, home / "config.json")
    return home / "config.json"


if __name__ == "__main__":
    sys.exit(main())
