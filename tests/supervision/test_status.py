"""`appo-jax status` of damaged files, of folders that hold other things, and of machines whose clocks differ."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest

from appo_jax.commands import status_command
from appo_jax.errors import DataError
from appo_jax.supervision.status import Status, describe, note_failure, read_status, runs_under

BEAT = {"machine": "worker-0", "phase": "update", "step": 7, "silent_s": 2.0, "waiting": False}


def status(state: str = "running", age: float = 0.0) -> Status:
    return Status(state, 20, time.time() - age, {"0": BEAT, "1": BEAT | {"machine": "worker-1"}}, "host 1 is lost")


def damaged(**changes: object) -> str:
    return json.dumps(vars(status()) | changes)


@pytest.mark.parametrize(
    "content",
    [
        "", '{"state": "runn', "\0" * 64, "[]", "{}", '"text"', damaged(time="yesterday"), damaged(hosts=None),
        damaged(hosts=[BEAT]), damaged(hosts={"0": 3}), damaged(error=5), damaged(tiem=3), damaged(time=float("inf")),
    ],
)  # fmt: skip
def test_a_damaged_status_is_named_and_the_other_runs_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()
        status().write(tmp_path / name)
    (tmp_path / "b/status.json").write_text(content)
    with pytest.raises(DataError, match="the status of 1 of 3 runs cannot be read"):
        status_command([str(tmp_path)])
    out = capsys.readouterr().out
    assert f"{tmp_path / 'a'}: running, step 7 of 20" in out
    assert f"{tmp_path / 'b/status.json'}: cannot be read (" in out
    assert f"{tmp_path / 'c'}: running, step 7 of 20" in out


@pytest.mark.parametrize("beat", [{}, {"stop": 7}, {"silent_s": "long", "step": "seven", "phase": None}])
def test_a_heartbeat_without_some_of_its_values_is_shown(tmp_path: Path, beat: dict[str, object]) -> None:
    Status("running", 20, time.time(), {"0": beat, "1": beat}).write(tmp_path)
    assert describe(tmp_path).count("\n  host ") == 2


@pytest.mark.parametrize(
    ("age", "expected"),
    [
        (3, r": running, step 7 of 20, update for 5 s\n"),
        (60, r": no sign of life for 60 s: its process, its machine or its disk is gone, or the clocks differ, step 7"),
        (
            -3600,
            r": running \(or not: the clock of its machine was 60 min ahead of this one's\), step 7 .* update for 2 s\n",
        ),
    ],
)
def test_clocks_that_differ_are_thought_of(tmp_path: Path, age: float, expected: str) -> None:
    status(age=age).write(tmp_path)
    assert re.search(expected, describe(tmp_path))


def test_folders_of_other_things_are_no_runs(tmp_path: Path) -> None:
    for name in ("weights", "sweep/weights", "new", "sweep/trial", "old"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    for name in ("new", "sweep/trial"):  # runs that have not written a status yet
        (tmp_path / name / "lock").write_text("")
    status("done").write(tmp_path / "old")
    assert list(runs_under(tmp_path)) == [tmp_path / name for name in ("new", "old", "sweep/trial")]
    assert list(runs_under(tmp_path / "new")) == [tmp_path / "new"]
    assert list(runs_under(tmp_path / "weights")) == []


def test_a_folder_that_may_not_be_entered_hides_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As lost+found in the root of a disk, which every user but root meets."""
    for name in ("run", "lost+found/run"):
        (tmp_path / name).mkdir(parents=True)
        status().write(tmp_path / name)
    (tmp_path / "lost+found").chmod(0)
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    me = os.geteuid()
    os.seteuid(65534 if me == 0 else me)
    try:
        assert list(runs_under(Path())) == [Path("run")]
        with pytest.raises(DataError, match=r"lost\+found/status\.json: cannot be read \(.*Permission denied"):
            describe(*runs_under(Path("lost+found")))
    finally:
        os.seteuid(me)
        (tmp_path / "lost+found").chmod(0o700)


@pytest.mark.parametrize("damage", ["", '{"time": 17, "ho', "\0\n", "{}\n", "[1]\n", '{"host": [3], "machine": {}}\n'])
def test_a_failure_after_a_damaged_line_counts(tmp_path: Path, damage: str) -> None:
    (tmp_path / "failures.jsonl").write_text(damage)
    said = [note_failure(tmp_path, 3, "worker-3", 5, "ended by SIGKILL") for _ in range(3)]
    assert said[:2] == ["", ""]
    assert said[2].startswith("host 3 (worker-3) failed first the last 3 times")


def test_no_status_is_none(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
