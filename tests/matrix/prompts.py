"""Runs that are killed and go on with other numbers of hosts: are the prompts right? `python tests/matrix/prompts.py [--kills 50]`.

Real processes on loopback are the hosts. Each reads the stream of prompts as the training loop does, saves its position with the
loop's checkpointer, and writes down what it drew, whole batches and its own share. All hosts are killed at a random
moment, and started again, one or two of them by turns, until all steps are made. Then every global step must have drawn the same
prompts in every life and on every host, the hosts' shares must make up the batch, and every prompt must be drawn once an epoch of
its source. Exit code 1 where that is not so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from cluster import variables_of_host

ROOT = Path(__file__).parents[2]
SIZE, STEPS = 4, 400
COUNTS, WEIGHTS = {"a": 7, "b": 5}, {"a": 2.0, "b": 1.0}
PROGRAM = """
import json, sys
from pathlib import Path
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from appo_jax import distributed
distributed.initialize()
from appo_jax.checkpoint import Checkpointer
from appo_jax.data.pipeline import prompt_batches
from appo_jax.types import Example
folder, counts, weights, size, steps, seed = Path(sys.argv[1]), *json.loads(sys.argv[2])
questions = [Example(f"{name}{i}", "?", ("1",), "qa", "", name) for name, count in counts.items() for i in range(count)]
prompts = prompt_batches(questions, size, seed, weights=weights)
checkpointer = Checkpointer(folder / "checkpoints", keep=2)
everywhere = NamedSharding(Mesh(jax.devices(), "x"), PartitionSpec())
state, step = {"x": jax.jit(lambda: jnp.zeros(()), out_shardings=everywhere)()}, 0
if (found := checkpointer.restore_latest(state, prompts)) is not None:
    step, state, _ = found
host, hosts = distributed.host(), distributed.num_hosts()
with (folder / f"drawn-{host}.jsonl").open("a") as file:
    while step < steps:
        drawn = [example.id for example in next(prompts)]
        file.write(json.dumps({"step": step, "hosts": hosts, "drawn": drawn, "own": drawn[host::hosts]}) + "\\n")
        file.flush()
        step += 1
        checkpointer.save(step, state, {}, prompts)
checkpointer.close()
"""


def variables(hosts: int) -> list[dict[str, str]]:
    """The variables of each host, at a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [variables_of_host(number, hosts, address) for number in range(hosts)]


def start(folder: Path, hosts: int, seed: int) -> list[subprocess.Popen[bytes]]:
    setting = json.dumps([COUNTS, WEIGHTS, SIZE, STEPS, seed])
    command = [sys.executable, "-c", PROGRAM, str(folder), setting]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    own = variables(hosts) if hosts > 1 else [{}]
    log = (folder / "log").open("ab")
    return [subprocess.Popen(command, env=env | more, stdout=log, stderr=log, process_group=0) for more in own]


def drawn(folder: Path) -> dict[int, list[dict[str, object]]]:
    """Step -> what every host wrote of it, in every process of the run. Incomplete lines of killed processes are left out."""
    found = defaultdict(list)
    for file in folder.glob("drawn-*.jsonl"):
        for line in file.read_text().split("\n"):
            try:
                record = json.loads(line)
            except ValueError:
                continue
            found[record["step"]].append(record | {"host": int(file.stem.rpartition("-")[2])})
    return found


def wrong(steps: dict[int, list[dict[str, object]]]) -> list[str]:
    """Descriptions of what is wrong."""
    problems = [f"step {step} was never made" for step in range(STEPS) if step not in steps]
    stream = []
    for step, records in sorted(steps.items()):
        if any(record["drawn"] != records[0]["drawn"] for record in records):
            problems.append(f"step {step} was drawn in several ways")
        for record in records:
            if record["own"] != record["drawn"][record["host"] :: record["hosts"]]:
                problems.append(f"step {step}: a host's share is not its own")
        stream += records[0]["drawn"]
    for name, count in COUNTS.items():
        own = [id for id in stream if id[0] == name]
        epochs = [own[first : first + count] for first in range(0, len(own) - count + 1, count)]
        problems += [f"epoch {i} of {name}: {epoch}" for i, epoch in enumerate(epochs) if len(set(epoch)) < count]
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, killed, lives = random.Random(options.seed), 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        while True:
            before = max(drawn(folder), default=-1)
            processes = start(folder, 1 + lives % 2, options.seed)
            lives += 1
            last = killed == options.kills
            if not last:
                # From its first step on: a life that draws nothing says nothing.
                deadline = time.monotonic() + 120
                while max(drawn(folder), default=-1) <= before and all(p.poll() is None for p in processes):
                    assert time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
                    time.sleep(0.02)
                time.sleep(rng.uniform(0.0, 0.3))
                for process in rng.sample(processes, len(processes)):
                    if process.poll() is None:
                        os.killpg(process.pid, signal.SIGKILL)
                killed += 1
            codes = [process.wait(timeout=300) for process in processes]
            if all(code == 0 for code in codes):
                break
            assert not last, (folder / "log").read_text()[-3000:]
        steps = drawn(folder)
        problems = wrong(steps)
    again = sum(
        len({(r["hosts"], i) for i, r in enumerate(records) if r["host"] == 0}) > 1 for records in steps.values()
    )
    print(
        f"{killed} kills, {lives} lives of one and two hosts, {len(steps)} steps, {again} of them drawn more than once"
    )
    print("\n".join(problems) or "every prompt once an epoch, the same order in every life")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
