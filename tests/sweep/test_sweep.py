"""A sweep of real runs: the command is killed on the way, started again, and loses nothing."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from matplotlib import image

from appo_jax.config_io import load_config, save_config
from appo_jax.metrics import read_metrics

pytestmark = pytest.mark.long

SWEEP = """
from appo_jax.config_io import load_config, with_fields
from appo_jax.sweep.definition import Sweep

base = load_config({base!r})
sweep = Sweep(
    out={out!r},
    base=with_fields(base, {{"sft.steps": 2, "eval.num_prompts": 8, "eval.every": 1}}),
    space={{"branching.tau": (8.0, 32.0)}},
    seeds=(0, 1),
    max_sampled_tokens=4000,
)
"""


@pytest.mark.timeout(1500)
def test_a_sweep_that_is_killed_again_and_again_loses_nothing(short_quickstart, tmp_path):
    save_config(short_quickstart(tmp_path), tmp_path / "base.json")
    file, out = tmp_path / "sweep.py", tmp_path / "out"
    file.write_text(SWEEP.format(base=str(tmp_path / "base.json"), out=str(out)))
    command = [sys.executable, "-m", "appo_jax", "sweep", "--config", str(file), "--jobs", "2"]
    with (tmp_path / "log").open("a") as log:
        for seconds in (7, 9, 11, 8, 10):
            process = subprocess.Popen(command, stdout=log, stderr=log)
            time.sleep(seconds)
            process.send_signal(signal.SIGKILL)
            process.wait()
        done = subprocess.run(command, stdout=log, stderr=log, timeout=900)
    assert done.returncode == 0, (tmp_path / "log").read_text()[-3000:]
    record = json.loads((out / "sweep.json").read_text())
    assert [trial["state"] for trial in record["trials"]] == ["COMPLETE"] * 2
    assert [sorted(trial["values"]) for trial in record["trials"]] == [["0", "1"]] * 2
    for trial in range(2):
        for seed in range(2):
            steps = Counter(r["step"] for r in read_metrics(out / "runs" / f"{trial:04d}-{seed}" / "metrics.jsonl"))
            assert set(steps.values()) == {1}
    assert image.imread(out / "sweep.png").std() > 0
    assert load_config(out / "best.json").branching.tau == record["trials"][0]["fields"]["branching.tau"]
