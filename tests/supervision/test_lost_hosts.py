"""One of two hosts fails: both end within 30 seconds, with the first cause as the last line and one exit code."""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from appo_jax.supervision import peers
from appo_jax.supervision.status import note_failure, read_status

PROGRAMS = str(Path(__file__).parent / "programs.py")
Variables = Callable[[int, int], dict[str, str]]


def together(
    run_dir: Path, count: int, one_of: Variables, fault: str, *settings: str, **more: str
) -> list[subprocess.Popen[str]]:
    """Start the hosts, each with a log run_dir.HOST.log."""
    processes = []
    for i in range(count):
        env = (
            os.environ
            | {"JAX_PLATFORMS": "cpu", "FAULT": fault, "AT_STEP": "2", "STEPS": "6"}
            | more
            | one_of(i, count)
        )
        with Path(f"{run_dir}.{i}.log").open("w") as log:
            command = [sys.executable, PROGRAMS, "hosts", str(run_dir), *settings]
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, text=True))
    return processes


def outcome(run_dir: Path, processes: list[subprocess.Popen[str]]) -> tuple[list[int], list[str], list[float]]:
    """Exit codes, logs, and the seconds from the fault to each host's end."""
    ends: dict[int, float] = {}
    deadline = time.monotonic() + 200
    try:
        while len(ends) < len(processes) and time.monotonic() < deadline:
            for i, process in enumerate(processes):
                if i not in ends and process.poll() is not None:
                    ends[i] = time.time()
            time.sleep(0.02)
    finally:
        for process in processes:
            process.kill()
    logs = [Path(f"{run_dir}.{i}.log").read_text() for i in range(len(processes))]
    marks = [float(line.split()[1]) for log in logs for line in log.splitlines() if line.startswith("FAULT")]
    began = marks[0] if marks else time.time()
    codes = [process.wait() for process in processes]
    return codes, logs, [ends.get(i, float("inf")) - began for i in range(len(processes))]


def last_line(log: str) -> str:
    return next(line for line in reversed(log.splitlines()) if line.startswith("appo-jax: "))


@pytest.mark.parametrize(
    ("fault", "host", "code", "cause"),
    [
        ("SIGKILL", 1, 75, "host 1 failed first: the process of host 1 was ended by SIGKILL"),
        ("SIGSTOP", 0, 75, "host 0 failed first: the process of host 0 was stopped"),
        ("exception", 1, 1, "host 1 failed first: ValueError in step 3, phase 'reward': the reward fell over"),
        ("error of ours", 0, 1, "host 0 failed first: train.jsonl: line 7 is not JSON"),
    ],
)
def test_one_host_ends_all_of_them(
    tmp_path: Path, one_of: Variables, fault: str, host: int, code: int, cause: str
) -> None:
    processes = together(tmp_path / "run", 2, one_of, fault, AT_HOST=str(host))
    codes, logs, seconds = outcome(tmp_path / "run", processes)
    assert codes == [code, code], logs
    assert max(seconds) < 30
    for log in logs:
        assert cause in last_line(log), log
    status = read_status(tmp_path / "run")
    assert status is not None
    assert status.state == "failed"
    assert status.error is not None
    assert status.error in cause or cause.removeprefix(f"host {host} failed first: ") in status.error
    if code == 75:  # the other host records it if it was the first one
        (record,) = (json.loads(line) for line in (tmp_path / "run" / "failures.jsonl").read_text().splitlines())
        assert (record["host"], record["machine"]) == (host, socket.gethostname())


def test_a_host_that_never_comes_is_told(tmp_path: Path, one_of: Variables) -> None:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "AT_HOST": "0", "AT_STEP": "2", "STEPS": "6"} | one_of(1, 2)
    command = [sys.executable, PROGRAMS, "hosts", str(tmp_path / "run"), "JOIN_S=2"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 75
    assert last_line(done.stderr).startswith("appo-jax: not all hosts have joined within 2 s: one has not started"), (
        done.stderr
    )


@pytest.mark.parametrize(
    ("fault", "host", "cause"),
    [
        ("hang", 1, "DEADLINE_EXCEEDED"),  # host 0 does not give its supervisor's address
        ("pause supervisor", 0, "the supervising process does not answer"),
    ],
)
def test_a_host_whose_supervisor_cannot_be_connected_is_started_again(
    tmp_path: Path, one_of: Variables, fault: str, host: int, cause: str
) -> None:
    processes = together(
        tmp_path / "run", 2, one_of, fault, "CONNECT_S=2", "ANSWER_S=1", AT_HOST="0", AT_PHASE="connect"
    )
    try:
        code = processes[host].wait(60)
    finally:
        for process in processes:
            process.kill()
    log = Path(f"{tmp_path}/run.{host}.log").read_text()
    assert re.search(f"the supervisors of the hosts cannot be connected now: .*{cause}.*; start again", log), log
    assert code == 75


@pytest.mark.parametrize(
    ("fault", "host", "code", "cause"),
    [
        ("late", 0, 0, ""),
        ("late", 1, 0, ""),
        ("hang", 1, 75, "host 1 failed first: the process of host 1 has made no progress"),
        ("waits", 1, 75, "all hosts wait for each other"),
    ],
)
def test_a_host_may_be_late_while_it_makes_progress(
    tmp_path: Path, one_of: Variables, fault: str, host: int, code: int, cause: str
) -> None:
    """The others wait for it for longer than the limit of silence."""
    processes = together(tmp_path / "run", 2, one_of, fault, AT_HOST=str(host), LIMIT_S="3")
    codes, logs, _ = outcome(tmp_path / "run", processes)
    assert codes == [code, code], logs
    for log in logs:
        assert code == 0 or cause in last_line(log), log


def test_any_program_may_connect_to_the_hub_and_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "HELLO_S", 1.0)
    selector = selectors.DefaultSelector()
    hub = peers.Peers(selector)
    port, token = hub.listen(2)

    def rounds(seconds: float) -> list[peers.Cause]:
        """What the hub finds out in this time, if it never waits for anybody."""
        causes, end = [], time.monotonic() + seconds
        while (began := time.monotonic()) < end:
            causes += [cause for key, _ in selector.select(0.05) if (cause := key.data())]
            causes += [cause for cause in [hub.lost()] if cause]
            assert time.monotonic() - began < 0.5
        return causes

    slow, large, wrong, right = (socket.create_connection(("127.0.0.1", port)) for _ in range(4))
    large.sendall(b"x" * 10_000)
    wrong.sendall(b'{"token": "guessed", "host": 1, "machine": "m"}\n')
    for _ in range(3):
        slow.send(b"{")
        assert rounds(0.1) == []
    hello = {"token": token, "host": 1, "machine": "worker-1"}
    failed = {"failed": {"host": 1, "text": "line 7 is not JSON", "code": 1}}
    right.sendall(b"".join(json.dumps(message).encode() + b"\n" for message in (hello, failed)))  # in one packet
    assert rounds(0.2) == [peers.Cause(1, "line 7 is not JSON", 1)]
    assert hub.beats[1]["machine"] == "worker-1"
    rounds(1.0)
    for dropped in (slow, large, wrong):
        dropped.settimeout(1.0)
        with contextlib.suppress(ConnectionResetError):
            assert dropped.recv(1) == b""
    hub.close()


def test_a_host_that_fails_again_and_again_is_named(tmp_path: Path) -> None:
    said = [note_failure(tmp_path, host, f"worker-{host}", 5, "ended by SIGKILL") for host in (1, 3, 3, 3, 2)]
    assert said[:3] == ["", "", ""]
    assert said[3].startswith("host 3 (worker-3) failed first the last 3 times")
    assert said[4] == ""
    (tmp_path / "failures.jsonl").write_bytes(b"\x00\xff\n{}\n")
    assert note_failure(tmp_path, 3, "worker-3", 5, "ended by SIGKILL") == ""


def test_hosts_that_end_well_end_together(tmp_path: Path, one_of: Variables) -> None:
    processes = together(tmp_path / "run", 2, one_of, "", AT_HOST="0")
    codes, logs, _ = outcome(tmp_path / "run", processes)
    assert codes == [0, 0], logs
    status = read_status(tmp_path / "run")
    assert status is not None
    assert status.state == "done"
    assert [status.hosts[i]["step"] for i in ("0", "1")] == [6, 6]


def test_a_failure_after_one_host_has_ended_is_that_of_all(tmp_path: Path, one_of: Variables) -> None:
    more = {"AT_HOST": "0", "AT_STEP": "6", "AT_PHASE": "end"}
    processes = together(tmp_path / "run", 2, one_of, "exception", **more)
    codes, logs, _ = outcome(tmp_path / "run", processes)
    assert codes == [1, 1], logs
    for log in logs:
        assert "host 0 failed first: ValueError in step 7" in last_line(log), log
