"""`appo-jax influence` on a real run, the smallest there is."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from matplotlib import image

from appo_jax.cli import main
from appo_jax.config import Config, LoRAConfig
from appo_jax.config.method import Score
from appo_jax.config_io import save_config
from appo_jax.errors import ConfigError
from appo_jax.influence.measure import Influence
from appo_jax.influence.ranking import Ranked
from appo_jax.influence.run import Asked, decision_tokens, summarize
from appo_jax.train import train
from appo_jax.types import Example, Rollout, StopReason


@pytest.mark.parametrize(
    ("name", "given", "least"),
    [("questions", 0, 1), ("rollouts", 0, 1), ("positions", -1, 0), ("continuations", 1, 2), ("draws", 1, 2)],
)
def test_a_size_that_measures_nothing_is_refused(name: str, given: int, least: int) -> None:
    with pytest.raises(ConfigError, match=rf"--{name} {given}: expected {least} or more"):
        Asked(**{"questions": 1, "rollouts": 1, "positions": 1, "continuations": 2} | {name: given})


def test_a_folder_that_cannot_be_written_is_told_first(tiny: Config, tmp_path, capsys) -> None:
    save_config(tiny, tmp_path / "config.json")  # a run without data and checkpoint, which building it would miss
    (tmp_path / "file").touch()
    asked = ["--questions", "1", "--rollouts", "1", "--positions", "1", "--continuations", "2"]
    assert main(["influence", str(tmp_path), "--out", str(tmp_path / "file"), *asked]) != 0
    assert str(tmp_path / "file") in capsys.readouterr().err
    assert main(["influence", str(tmp_path), "--out", str(tmp_path / "out"), *asked]) != 0
    assert not list((tmp_path / "out").iterdir())  # an empty report would look like a finished one


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2)])
def test_the_step_is_the_next_step_of_the_run(tiny: Config, tmp_path: Path, lora: LoRAConfig | None) -> None:
    """The step's metrics are those that training recorded: of the second step where the checkpoint of the first is the newest, and
    of the first where there is only a cold start. Each step has two updates of the warm-up."""
    config = dataclasses.replace(
        tiny,
        run_dir=str(tmp_path / "run"),
        prompts_per_minibatch=1,
        keep_checkpoints=2,
        policy=dataclasses.replace(tiny.policy, lora=lora),
        # No reward differs from another; so the entropy bonus and the distance from π_ref move the policy.
        loss=dataclasses.replace(tiny.loss, entropy_weight=0.1, kl_weight=0.01),
        optimizer=dataclasses.replace(tiny.optimizer, learning_rate=1e-2, warmup_steps=4),
    )
    train(config)
    trained = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in trained] == [1, 2]
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.rmtree(checkpoints / "rl" / "2")
    sizes = ["--questions", "1", "--rollouts", "1", "--positions", "1", "--continuations", "2"]
    for record, newest in ((trained[1], checkpoints / "rl"), (trained[0], checkpoints / "sft")):
        assert main(["influence", config.run_dir, "--out", str(tmp_path / "out"), *sizes]) == 0
        figures = json.loads((tmp_path / "out" / "influence.json").read_text())
        assert figures["policy"] == f"step 1 of {newest}"
        assert figures["step"]["update/grad_norm"] > 0
        assert figures["step"] == {name: pytest.approx(record[name], rel=1e-6) for name in figures["step"]}
        shutil.rmtree(checkpoints / "rl", ignore_errors=True)
    interval = figures["scatter"]["variance"]["per_rollout"]
    assert interval["high"] is None, "one question does not say how large the variance of others is"
    assert "inf]" in (tmp_path / "out" / "influence.md").read_text()


def test_decisions_after_bytes_that_are_no_text_are_found() -> None:
    words = [b"<think> ", *[b"\xf0"] * 5, b" ", b"people", b" and more"]
    count = len(words)
    zeros, sampled = np.zeros(count), np.ones(count, bool)
    rollout = Rollout(
        Example("q", "?", ("1",), "qa", ""), np.arange(count), 0, sampled, zeros, zeros, StopReason.ANSWERED, (), 0
    )
    found = decision_tokens(rollout, words, lambda text: [(text.index("people"), text.index(" and"))])
    assert np.flatnonzero(found).tolist() == [7]


def test_the_report_of_a_run(tiny: Config, tmp_path) -> None:
    # No reward differs from another, so the entropy bonus alone moves the policy.
    loss = dataclasses.replace(tiny.loss, entropy_weight=0.1)
    train(dataclasses.replace(tiny, loss=loss, optimizer=dataclasses.replace(tiny.optimizer, learning_rate=1e-3)))
    out = tmp_path / "influence"
    sizes = ["--questions", "2", "--rollouts", "2", "--positions", "2", "--continuations", "2"]
    assert main(["influence", tiny.run_dir, "--out", str(out), *sizes]) == 0
    figures = json.loads((out / "influence.json").read_text())
    assert figures["rollouts"] == 4
    assert figures["positions_without_value"] == 0
    # of Ω, which one small step moves little; that of its z-scores is about 0.9
    assert 0 < figures["future_std"] < 0.3
    assert set(figures["scores"]) == {*get_args(Score), "random", "turn start"}
    assert set(figures["scatter"]["variance"]) == {"per_rollout", "proportional"}
    text = (out / "influence.md").read_text()
    assert "4 rollouts of" in text
    assert "Variance of A_base" in text
    assert image.imread(out / "influence.png")[..., :3].std() > 0.01


def test_the_correlation_is_of_the_ranking_that_branches() -> None:
    """Position 0 has Z(H) = Z(Ω) = -2: the highest product, behind all preferred positions. Influence falls along the rule's order
    (2, 1, 3, 0), so the correlation is 1; that with the product alone is -0.2 (squared differences of ranks: 9, 1, 1, 1)."""
    true = np.ones(4, bool)
    one = Ranked(
        "?", {"product": np.array([4.0, 2.0, 3.0, 1.0])}, {"product": np.array([False, True, True, True])}, np.ones(4), true,
        true, None, ~true, list("abcd"),
    )  # fmt: skip
    assert one.top("product", 4) == [2, 1, 3, 0]
    measured = [Influence(0, t, influence) for t, influence in enumerate([0.1, 0.3, 0.4, 0.2])]
    found = summarize([one], measured, {0: [0, 1, 2, 3]})["scores"]["product"]["correlation"]
    assert found.value == pytest.approx(1.0)
