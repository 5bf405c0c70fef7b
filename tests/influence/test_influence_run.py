"""`appo-jax influence` on a real run, the smallest there is."""

import dataclasses
import json
from typing import get_args

import jax
import numpy as np
import pytest
from matplotlib import image

from appo_jax.cli import main
from appo_jax.components import build, initial_params
from appo_jax.config import Config, LoRAConfig
from appo_jax.config.method import Score
from appo_jax.config_io import save_config
from appo_jax.errors import ConfigError
from appo_jax.influence.run import Asked, config_of, decision_tokens
from appo_jax.train import begin, train
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


def test_the_policy_of_a_run_with_adapters_is_not_rounded(tiny: Config, tmp_path) -> None:
    policy = dataclasses.replace(tiny.policy, lora=LoRAConfig(rank=2))
    save_config(dataclasses.replace(tiny, policy=policy), tmp_path / "config.json")
    with build(config_of(tmp_path)) as components:
        params = initial_params(
            components.config, components.arch, components.mesh
        )  # drawn in float32: more bits than bfloat16 has
        before = jax.tree.map(np.asarray, params)
        trainer, state = begin(components, params)
        found = trainer.policy(state)
    for i, layer in before["layers"].items():
        for name, values in layer.items():
            np.testing.assert_array_equal(found["layers"][i][name], values)


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
