"""A supervised process is killed, stopped, hung and interrupted. Checks its supervisor's messages, files and exit codes."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from appo_jax.supervision.status import describe, read_status

PROGRAMS = str(Path(__file__).parent / "programs.py")
Start = Callable[..., subprocess.Popen[str]]
PTRACE_SEIZE, WALL = 0x4206, 0x40000000  # from linux/ptrace.h and linux/wait.h


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a program of programs.py; the run directory is tmp_path / "run"."""
    started: list[subprocess.Popen[str]] = []
    # Tests that are started under nohup ignore this signal, and so would the programs.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)

    def run(name: str, *settings: str) -> subprocess.Popen[str]:
        command = [sys.executable, PROGRAMS, name, str(tmp_path / "run"), *settings]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield run
    signal.signal(signal.SIGHUP, before)
    for process in started:
        process.kill()


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def child_of(process: subprocess.Popen[str]) -> int:
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


def gone(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def test_a_run_that_ends_well(start: Start, tmp_path: Path) -> None:
    code, _, err = end(start("finish"))
    assert (code, err) == (0, "")
    status = read_status(tmp_path / "run")
    assert status is not None
    assert (status.state, status.hosts["0"]["step"], status.error) == ("done", 3, None)
    assert "done, step 3 of 5" in describe(tmp_path / "run")


@pytest.mark.parametrize(
    ("program", "settings", "expected"),
    [
        (
            "hang",
            ["max_silent_seconds=2"],
            ["has made no progress for", "phase 'reward'", "its limit is 2 s", "in hang"],
        ),
        (
            "stop_writing",
            ["max_silent_seconds=1"],
            ["has made no progress for", "phase 'checkpoint'", "in stop_writing"],
        ),
        ("hold_the_lock", ["LOCKED_S=3"], ["has run no Python", "phase 'rollout'", "in hold_the_lock"]),
        ("crash", [], ["SIGSEGV", "in crash"]),
    ],
)
def test_a_run_that_hangs_or_crashes_ends_with_its_stacks_and_is_started_again(
    start: Start, tmp_path: Path, program: str, settings: list[str], expected: list[str]
) -> None:
    began = time.monotonic()
    code, _, err = end(start(program, *settings))
    assert code == 75
    assert time.monotonic() - began < 20
    for text in expected:
        assert text in err
    assert err.splitlines()[-1].startswith("appo-jax: the run's process")
    status = read_status(tmp_path / "run")
    assert status is not None
    assert status.state == "failed"
    assert f"last error: {status.error}" in describe(tmp_path / "run")


def test_a_slow_disk_is_not_a_hang(start: Start) -> None:
    """A checkpoint that takes longer to write or to read than the limit, 9 s at first and 3 s later."""
    code, out, err = end(start("write_slowly", "max_silent_seconds=3"))
    assert (code, out, err) == (0, "written\nread\n", "")


def test_the_last_error_is_shown_while_the_next_start_runs(start: Start, tmp_path: Path) -> None:
    for _ in range(2):
        end(start("fail"))
    process = start("train")
    assert process.stdout is not None
    deadline = time.monotonic() + 20
    while "running" not in describe(tmp_path / "run"):
        assert time.monotonic() < deadline
        process.stdout.readline()
    told = describe(tmp_path / "run", time.time() + 3 * 60)
    assert "last error, 3 min ago, failure 2: train.jsonl: line 7 is not JSON" in told
    process.send_signal(signal.SIGINT)
    assert end(process)[0] == 130
    assert "failure 2: train.jsonl" in describe(tmp_path / "run")
    end(start("finish"))
    assert "last error" not in describe(tmp_path / "run")


def test_a_disk_that_does_not_answer_does_not_hold_the_supervisor_up(start: Start, tmp_path: Path) -> None:
    """status.json.tmp, under which status.json is written, is a pipe without a reader: opening it waits for ever."""
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / "status.json.tmp")
    process = start("train", "LAST_S=1")
    assert process.stdout is not None
    while process.stdout.readline() != "step 2\n":
        pass
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 130
    assert time.monotonic() - began < 4


def test_an_error_keeps_its_code_and_is_told_once(start: Start, tmp_path: Path) -> None:
    code, _, err = end(start("fail"))
    assert (code, err) == (1, "error: train.jsonl: line 7 is not JSON\n")
    status = read_status(tmp_path / "run")
    assert status is not None
    assert (status.state, status.error) == ("failed", "train.jsonl: line 7 is not JSON")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_is_killed_or_stopped_is_told(start: Start, number: signal.Signals) -> None:
    process = start("train", "STOPPED_S=2")
    assert process.stdout is not None
    process.stdout.readline()
    child = child_of(process)
    os.kill(child, number)
    code, _, err = end(process)
    assert code == 75
    assert number.name in err
    assert gone(child)


def test_a_process_that_cannot_be_ended_is_named_and_left(start: Start) -> None:
    """Its tracer keeps a killed process from its parent, as the kernel does with one that waits for a disk."""
    process = start("start_up", "KILLED_S=1")
    assert process.stdout is not None
    process.stdout.readline()
    child = child_of(process)
    if ctypes.CDLL(None).ptrace(PTRACE_SEIZE, child, None, None):
        pytest.skip("this user may trace no process")
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    try:
        code, _, err = end(process)
    finally:
        os.waitpid(child, WALL)
    assert code == 130
    assert 1 <= time.monotonic() - began < 10
    first, last = err.splitlines()
    assert first.startswith(f"appo-jax: the run's process (pid {child}) cannot be ended: the kernel holds it")
    assert last == "appo-jax: interrupted"


def test_a_run_that_was_paused_as_a_whole_goes_on(start: Start) -> None:
    """Ctrl-Z, and fg after more than the longest allowed silence."""
    process = start("train", "STOPPED_S=4", "LOCKED_S=6", "PAUSED_S=4")
    assert process.stdout is not None
    while process.stdout.readline() != "step 2\n":
        pass
    child = child_of(process)
    for pid in (process.pid, child):
        os.kill(pid, signal.SIGSTOP)
    time.sleep(8)
    for pid in (process.pid, child):
        os.kill(pid, signal.SIGCONT)
    time.sleep(2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert end(process)[0] == 130


def test_nothing_outlives_a_supervisor_that_is_killed(start: Start) -> None:
    process = start("start_up")
    assert process.stdout is not None
    process.stdout.readline()
    child = child_of(process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 5
    while not gone(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("delay", [0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0])
def test_one_request_ends_a_run_at_any_moment_of_its_start(start: Start, number: signal.Signals, delay: float) -> None:
    process = start("start_up")
    assert process.stdout is not None
    if delay:
        process.stdout.readline()  # until then it is the interpreter's own start
        time.sleep(delay)
    else:
        while not Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text():
            time.sleep(0.001)
    began = time.monotonic()
    process.send_signal(number)
    code, _, err = end(process)
    assert time.monotonic() - began < 3
    assert code == 130
    assert "interrupted" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("numbers", [[signal.SIGINT], [signal.SIGTERM, signal.SIGHUP], [signal.SIGHUP]])
def test_a_request_lets_the_step_end(start: Start, numbers: list[signal.Signals]) -> None:
    """systemd ends a login session with two signals."""
    process = start("train")
    assert process.stdout is not None
    while process.stdout.readline() != "step 2\n":
        pass
    for number in numbers:
        process.send_signal(number)
    code, out, err = end(process)
    assert code == 130
    assert "Traceback" not in err
    assert "interrupted" not in err
    assert len(out.splitlines()) <= 3  # the step it was in


def test_a_request_that_comes_after_the_run_has_stopped_is_no_failure(start: Start, tmp_path: Path) -> None:
    """On several hosts, one hears a request, and all stop; then it reaches the next host."""
    process = start("leave_late")
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    code, _, err = end(process)
    assert (code, err) == (130, "appo-jax: interrupted\n")
    status = read_status(tmp_path / "run")
    assert status is not None
    assert (status.state, status.error) == ("stopped", None)


def test_a_run_outlives_the_readers_of_its_output(start: Start, tmp_path: Path) -> None:
    """As with `| tee log`, where Ctrl-C ends tee too."""
    process = start("train")
    assert process.stdout is not None
    assert process.stderr is not None
    while process.stdout.readline() != "step 2\n":
        pass
    process.stdout.close()
    process.stderr.close()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    status = read_status(tmp_path / "run")
    assert status is not None
    assert (status.state, status.error) == ("stopped", None)
    assert status.hosts["0"]["step"] > 2


def test_a_step_that_is_longer_than_the_grace_is_given_up(start: Start) -> None:
    process = start("ignore", "stop_grace_seconds=2")
    assert process.stdout is not None
    process.stdout.readline()
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code, _, err = end(process)
    assert code == 130
    assert 2 <= time.monotonic() - began < 8
    assert "within stop_grace_seconds, step 1 could not be saved; a restart makes it again" in err


INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


@pytest.mark.parametrize(
    ("numbers", "grace", "saved"),  # None: a pause
    [
        ([HUP], 1, True), ([INT], 1, False), ([TERM], 1, False), ([HUP, TERM], 1, False),
        ([HUP, None, INT], 1, False), ([HUP, None, INT], 20, True), ([HUP, None, INT, None, INT], 20, False),
    ],
)  # fmt: skip
def test_the_grace_begins_with_the_signal_of_a_shutdown(
    start: Start, numbers: list[signal.Signals | None], grace: int, saved: bool
) -> None:
    """launch/stop.sh sends SIGHUP. A run of the paper's configs, whose steps take minutes, gave up its step after 20 s; and at once
    if the machine was shut down meanwhile."""
    process = start("long_step", f"stop_grace_seconds={grace}")
    assert process.stdout is not None
    process.stdout.readline()
    for number in numbers:
        time.sleep(0.5) if number is None else process.send_signal(number)
    code, out, _ = end(process)
    assert code == 130
    assert ("saved" in out) == saved


def test_a_step_that_could_not_be_written_within_the_grace_is_named(start: Start) -> None:
    process = start("save", "stop_grace_seconds=1")
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    code, _, err = end(process)
    assert code == 130
    assert "within stop_grace_seconds, step 7 could not be saved; a restart makes it again" in err


@pytest.mark.parametrize(
    ("written", "phase", "lost"),
    [
        ("step 6", "rollout", "steps 7 and 8 could not be saved; a restart makes "),
        ("step 7", "rollout", "step 8 could not be saved; a restart makes "),
        ("update 25", "cold start", "updates 26 to 31 could not be saved; a restart makes "),
        # The next step has not begun.
        ("step 6", "evaluate", "step 7 could not be saved; a restart makes "),
        ("update 25", "checkpoint", "updates 26 to 30 could not be saved; a restart makes "),
        ("step 7", "start", "but everything is saved"),  # the clean-up
    ],
)
def test_all_that_is_lost_is_named(
    start: Start, monkeypatch: pytest.MonkeyPatch, written: str, phase: str, lost: str
) -> None:
    """The step before is lost, too, while it is being written; in the cold start, all updates since the last checkpoint."""
    monkeypatch.setenv("WRITTEN", written)
    monkeypatch.setenv("IN_PHASE", phase)
    process = start("write_in_the_background", "stop_grace_seconds=1")
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    code, _, err = end(process)
    assert code == 130
    assert f"within stop_grace_seconds, {lost}" in err


def test_asked_again_it_ends_at_once(start: Start) -> None:
    process = start("ignore")
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    code, _, err = end(process)
    assert code == 130
    assert "interrupted" in err


def test_a_status_that_has_grown_old_is_that_of_a_run_that_is_gone(start: Start, tmp_path: Path) -> None:
    process = start("train")
    assert process.stdout is not None
    while not (tmp_path / "run/status.json").exists():
        process.stdout.readline()
    assert "running, step" in describe(tmp_path / "run")
    later = describe(tmp_path / "run", time.time() + 100)
    assert re.search(r"no sign of life for 10\d s: its process, its machine or its disk is gone", later)
    assert json.loads((tmp_path / "run/status.json").read_text())["hosts"]["0"]["phase"] == "start"
