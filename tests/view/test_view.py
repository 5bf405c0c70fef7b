"""The displays of a run. Plots are checked by the numbers that are drawn and by the existence of the files."""

import contextlib
import io
import json
import shutil
import time

import pytest
from matplotlib import image
from rich.console import Console

from appo_jax import heartbeat
from appo_jax.ask import show_turns
from appo_jax.cli import main
from appo_jax.config import Config, PolicyConfig, SFTConfig
from appo_jax.config_io import save_config
from appo_jax.errors import DataError
from appo_jax.types import Outcome, ToolCall
from appo_jax.view import plots
from appo_jax.view.progress import PHASES, Progress
from appo_jax.view.tree import render_tree, show_tree

NODES = [
    {
        "node": 0, "parent": None, "fork": None, "prompt_tokens": 10, "tokens": 30, "reward": 1.1, "correct": True,
        "stop_reason": "answered", "calls": [{"name": "python", "outcome": "ok"}],
        "segments": [
            {"start": 10, "sampled": True, "text": "I [b]add[/b] "},
            {"start": 15, "sampled": True, "text": "it up"},
            {"start": 20, "sampled": False, "text": " RES\x1b[2JULT"},
        ],
    },
    {
        "node": 1, "parent": 0, "fork": 15, "prompt_tokens": 10, "tokens": 18, "reward": None, "correct": False,
        "stop_reason": "length", "calls": [], "segments": [{"start": 15, "sampled": True, "text": "them"}],
    },
]  # fmt: skip
TREE = {"step": 2, "id": "q-7", "question": "How many?", "golds": ["42", "forty-two"], "nodes": NODES}


def write_run(folder):
    folder.mkdir(parents=True)
    save_config(Config(policy=PolicyConfig(path="x")), folder / "config.json")
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 7):
            record = {
                "step": step, "accuracy/initial": 0.5, "rollout/sampled_tokens_total": 100 * step,
                "reward/initial": None if step == 3 else 0.1 * step, "calls/python/ok": step, "calls/search/ok": 2,
                "time/rollout_s": 1.0, "time/update_s": 2.0, "update/clip_fraction": 0.01, "update/grad_norm": 1.0,
            }  # fmt: skip
            file.write(json.dumps(record) + "\n")
    (folder / "rollouts").mkdir()
    (folder / "rollouts" / "step_000002.jsonl").write_text(json.dumps(TREE) + "\n")
    return folder


def shown(run, **arguments):
    console = Console(file=io.StringIO(), width=100)
    show_tree(run, console=console, **arguments)
    return console.file.getvalue()


def test_a_tree_shows_where_it_branched(tmp_path):
    text = shown(write_run(tmp_path / "run"))
    assert "step 2 · q-7" in text
    assert "gold: 42 | forty-two" in text
    assert "rollout 0 (initial) ✓ reward 1.10 · 30 tokens · answered · calls: python ok" in text
    assert "I [b]add[/b] ⑂1it up RES�[2JULT" in text  # text is never markup, and never steers the terminal
    assert "rollout 1 (branch of 0 at token 15) ✗ reward – · 18 tokens · length" in text
    lines = text.splitlines()
    assert lines[-1].index("them") > next(line.index("rollout 0") for line in lines if "rollout 0" in line)


def test_nothing_in_a_record_steers_the_terminal():
    """Neither the policy's texts nor the data set's ids, questions and answers can control the terminal."""
    evil = "\x1b[2J\x1b]0;title\x07\u202e\x9b31m"
    node = {"node": 0, "parent": None, "fork": None, "correct": True, "reward": 1.0, "tokens": 3, "stop_reason": "stop",
            "calls": [{"name": evil, "outcome": "ok"}], "segments": [{"start": 0, "text": evil, "sampled": True}]}  # fmt: skip
    record = {"step": 1, "id": evil, "question": evil, "golds": [evil, "a"], "nodes": [node]}
    console = Console(file=io.StringIO(), width=200)
    console.print(render_tree(record))
    shown = console.file.getvalue()
    assert not set(shown) & set("\x1b\x07\x9b\u202e")
    assert "gold: " in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"step": 5}, "no dump of step 5; there are 2"), ({"index": 1}, "no tree 1; give 0 to 0")],
)
def test_what_is_not_there_is_told(tmp_path, arguments, message):
    with pytest.raises(DataError, match=message):
        shown(write_run(tmp_path / "run"), **arguments)


def test_a_run_without_its_rollouts_is_drawn(tmp_path, capsys, caplog):
    """As `checkpoints --copy-to` copies it. A tree that was asked for is still missed."""
    run = write_run(tmp_path / "run")
    shutil.rmtree(run / "rollouts")
    assert main(["view", str(run)]) == 0
    drawn = {file.stem for file in (run / "plots").iterdir()}
    assert drawn == {"accuracy", "reward", "tools", "updates", "timings"}
    assert "no tree to show, although the run has made steps" in caplog.text + capsys.readouterr().err
    for option in ("--step", "--tree"):
        assert main(["view", str(run), option, "1"]) == 1
    (run / "metrics.jsonl").unlink()
    assert main(["view", str(run)]) == 1
    assert "give the directory of a run that has made a step" in capsys.readouterr().err


def test_plots_of_what_the_run_has_numbers_for(tmp_path):
    written = plots.draw_plots(write_run(tmp_path / "run"))
    names = {"accuracy", "reward", "tools", "updates", "timings", "branch_positions"}
    assert {path.stem for path in written} == names
    for path in written:
        assert image.imread(path)[..., :3].std() > 0.01  # something is drawn


def test_plots_need_metrics(tmp_path):
    with pytest.raises(DataError, match="no metrics"):
        plots.draw_plots(tmp_path)


def test_series_leave_out_what_was_not_finite(tmp_path):
    records = [{"step": 1, "a/x": 1.0, "b": 3}, {"step": 2, "a/x": None}, {"step": 3, "a/x": 2.0, "a/y": 5.0}]
    series = plots._series(records, ["a/*"])
    assert {name: (s.tolist(), v.tolist()) for name, (s, v) in series.items()} == {
        "a/x": ([1, 3], [1.0, 2.0]),
        "a/y": ([3], [5.0]),
    }


def test_branch_points_are_shares_of_the_parents_response(tmp_path):
    assert plots._branch_points(write_run(tmp_path / "run") / "rollouts") == [(2, (15 - 10) / (30 - 10))]


CONFIG = Config(steps=3, sft=SFTConfig(steps=1), policy=PolicyConfig(path="x"))


def test_progress_off_a_terminal_is_plain_lines():
    console = Console(file=io.StringIO(), width=40)
    with Progress(CONFIG, console) as progress:
        progress.sft_step(1, {"sft/loss": 2.0})
        progress.accuracies({"accuracy_base": 0.0, "accuracy_sft": 0.425})
        progress.step(1, {"reward/initial": 0.5, "update/loss": 3.0})
        progress.done({"accuracy_sft": 0.425, "accuracy_final": 0.75, "sampled_tokens": 1234567, "wall_s": 61.2})
    text = console.file.getvalue()
    assert "cold start 1/1  loss 2\n" in text
    assert "held-out accuracy: 0.0 % before the cold start, 42.5 % after it\n" in text
    assert "appo 1/3  reward 0.5\n" in text
    assert "75.0 %" in text
    assert "1,234,567 tokens sampled, 61 s" in text
    assert "\x1b" not in text


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_that_nobody_can_read_ends_no_run(terminal):
    """The file says that its disk is full."""
    with contextlib.suppress(OSError), open("/dev/full", "w") as full:  # closing the file fails, too
        console = Console(file=full, width=40, force_terminal=terminal)
        try:
            with Progress(CONFIG, console) as progress:
                progress.sft_step(1, {"sft/loss": 2.0})
                progress.step(1, {"reward/initial": 0.5})
                progress.done({"accuracy_final": 0.75, "sampled_tokens": 1, "wall_s": 61.2})
        except OSError as error:
            pytest.fail(repr(error))


def panel(progress, console):
    """The panel as a reader sees it at this moment."""
    seen = Console(file=io.StringIO(), width=100)
    seen.print(progress._render())
    return seen.file.getvalue()


def test_the_panel_says_from_the_first_second_what_the_run_does():
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with Progress(CONFIG, console) as progress:
        assert "0:00:0" in panel(progress, console)
        assert "reading data, starting tools" in panel(progress, console)
        with heartbeat.phase("evaluate"):
            assert "evaluating (compiling its programs)" in panel(progress, console)
            heartbeat.detail("192 questions")
            assert "evaluating, 192 questions (compiling its programs)" in panel(progress, console)
            heartbeat.detail("40 of 192 rollouts")
            assert "evaluating, 40 of 192 rollouts" in panel(progress, console)
        with heartbeat.phase("evaluate"):  # compiled by now
            assert "compiling" not in panel(progress, console)
            with heartbeat.phase("reward"):
                assert "giving rewards" in panel(progress, console)
                assert "compiling" not in panel(progress, console)
            assert "evaluating" in panel(progress, console)
        for phase in ("rollout", "score", "branch", "update", "checkpoint"):
            with heartbeat.phase(phase):
                assert PHASES[phase] in panel(progress, console)


def test_a_line_printed_above_the_panel_does_not_change_its_looks():
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with Progress(CONFIG, console) as progress:
        progress.step(1, {"reward/initial": 0.5})
        progress.accuracies({"accuracy_base": 0.0})
    assert "[dim]" not in console.file.getvalue()


def test_the_time_that_is_left_is_known_after_the_second_step():
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with Progress(CONFIG, console) as progress:
        progress.step(1, {})
        assert "-:--:--" in panel(progress, console)
        time.sleep(0.1)
        progress.step(2, {})
        assert "-:--:--" not in panel(progress, console)


def test_progress_on_a_terminal_is_a_live_panel():
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with Progress(CONFIG, console) as progress:
        progress.step(2, {"reward/initial": 0.5})
        console.print(progress._render())
    text = console.file.getvalue()
    assert "2/3" in text
    assert "reward" in text
    assert "\x1b[?25h" in text  # the cursor is given back


def test_what_a_policy_and_a_page_write_does_not_reach_the_terminal():
    out = io.StringIO()
    call = ToolCall("[/x]\x1b[2J", "q", "a\x1b]0;title\x07b", Outcome.OK, 0.5, 1, 2, {})
    show_turns(["think\x1b[31m", "done"], [call], Console(file=out, width=80))
    assert "\x1b" not in out.getvalue()
    assert "[/x]" in out.getvalue()
