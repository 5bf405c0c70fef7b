"""What becomes of a pod when one host fails: `python tests/matrix/hosts.py [--hosts 2 4] [--moments 20] [--faults SIGKILL ...]`.

Processes on loopback stand for hosts (tests/supervision/programs.py: they meet as the loop does, and train nothing). For each
fault and number of hosts it is made to happen at so many moments, of a random host in a random phase and step. Printed: the seconds
from the fault to the end of the last host, and whether every host said the first cause last and gave the right exit code.
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = ROOT / "tests/supervision/programs.py"
PHASES = ("rollout", "reward", "score", "branch", "update")
STEPS = 6
# Fault -> the exit code of all hosts, and what the last line of each says. {h}: the host it happened on.
FAULTS = {
    "SIGKILL": (75, "the process of host {h} was ended by SIGKILL"),
    "SIGSTOP": (75, "the process of host {h} was stopped"),
    "kill both": (75, "host {h}"),  # the supervisor too: a machine that is switched off
    "stop both": (75, "host {h}"),  # a machine that stands still
    "exception": (1, "ValueError in step"),
    "error of ours": (1, "line 7 is not JSON"),
    "slow": (0, ""),  # 25 s late: nobody is ended for that
}


def variables(hosts: int) -> list[dict[str, str]]:
    """For each host, how it finds the others: as Open MPI would say it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    common = {
        "JAX_PLATFORMS": "cpu", "APPO_DISTRIBUTED": "1", "JAX_COORDINATOR_ADDRESS": address,
        "OMPI_MCA_orte_hnp_uri": "0.0;tcp://127.0.0.1:1", "OMPI_COMM_WORLD_SIZE": str(hosts), "OMPI_COMM_WORLD_LOCAL_RANK": "0",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    return [common | {"OMPI_COMM_WORLD_RANK": str(i)} for i in range(hosts)]


def one_case(folder: Path, fault: str, hosts: int, rng: random.Random) -> tuple[float, str]:
    """(seconds until all hosts were gone, what was not as it should be)."""
    host, step, phase = rng.randrange(hosts), rng.randrange(1, STEPS), rng.choice(PHASES)
    folder.mkdir()
    processes = []
    for i, own in enumerate(variables(hosts)):
        env = os.environ | own
        env |= {"FAULT": fault, "AT_HOST": str(host), "AT_STEP": str(step), "AT_PHASE": phase, "STEPS": str(STEPS)}
        with (folder / f"{i}.log").open("w") as log:
            command = [sys.executable, str(PROGRAMS), "hosts", str(folder / "run")]
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, process_group=0))
    frozen = (
        {host} if fault in ("stop both", "kill both") else set()
    )  # what is stopped outlives; what is killed says nothing
    waiting, deadline, ended = set(range(hosts)) - frozen, time.monotonic() + 150, time.time()
    while waiting and time.monotonic() < deadline:
        waiting -= {i for i in waiting if processes[i].poll() is not None}
        ended = time.time()
        time.sleep(0.02)
    codes = {i: processes[i].poll() for i in set(range(hosts)) - frozen}
    for process in processes:
        process.kill()
        os.killpg(process.pid, 9) if process.poll() is None else None
        process.wait()
    logs = [(folder / f"{i}.log").read_text() for i in range(hosts)]
    marks = [float(line.split()[1]) for log in logs for line in log.splitlines() if line.startswith("FAULT")]
    code, words = FAULTS[fault]
    wrong = []
    if waiting:
        wrong.append(f"hosts {sorted(waiting)} still there after 150 s")
    if any(found != code for found in codes.values()):
        wrong.append(f"exit codes {codes}")
    for i in codes:
        last = logs[i].strip().splitlines()[-1] if logs[i].strip() else ""
        if words and (words.format(h=host) not in last or f"host {host} failed first" not in last):
            wrong.append(f"host {i} said last: {last[-200:]}")
    return ended - marks[0] if marks else float("nan"), "; ".join(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--faults", nargs="+", default=list(FAULTS), choices=list(FAULTS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, failed = random.Random(options.seed), 0
    print(
        "| fault | hosts | moments | median s | longest s | right exit code and last line |\n|---|---:|---:|---:|---:|---:|"
    )
    with tempfile.TemporaryDirectory() as name:
        for fault in options.faults:
            for hosts in options.hosts:
                seconds, right = [], 0
                for moment in range(options.moments):
                    took, wrong = one_case(
                        Path(name) / f"{fault}-{hosts}-{moment}".replace(" ", "-"), fault, hosts, rng
                    )
                    seconds.append(took)
                    right += not wrong
                    if wrong:
                        print(f"{fault}, {hosts} hosts, moment {moment}: {wrong}", file=sys.stderr, flush=True)
                failed += options.moments - right
                print(
                    f"| {fault} | {hosts} | {options.moments} | {statistics.median(seconds):.1f} | {max(seconds):.1f} | {right} |",
                    flush=True,
                )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
