"""Position limits: yarn's numbers, and configs with longer rollouts than the policy was made for."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from appo_jax.config import Architecture, Config, PolicyConfig, RolloutConfig, RopeScaling, SFTConfig, YarnScaling
from appo_jax.config_io import load_config, save_config
from appo_jax.errors import ConfigError
from appo_jax.policy.architecture import architecture_of, check_positions, from_hf, to_hf
from appo_jax.policy.transformer import rope_frequencies, rotations

QWEN = Architecture(96, 32, 2, 4, 2, 128, 48, rope_theta=1e6, max_positions=32768, family="qwen2")
LLAMA = dataclasses.replace(QWEN, max_positions=131_072, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192))
YARN = dataclasses.replace(QWEN, rope_scaling=YarnScaling(4.0, 32768))


def test_yarn_as_qwen_publishes_it() -> None:
    """Computed by hand: pairs up to 23 turn more than 32 times in 32768 tokens, pairs from 40 on less than once."""
    plain, scaled = rope_frequencies(QWEN), rope_frequencies(YARN)
    turns = 32768 * plain / (2 * math.pi)
    assert turns[23] > 32 > turns[24]
    assert turns[39] > 1 > turns[40]
    np.testing.assert_array_equal(scaled[:24], plain[:24])
    np.testing.assert_allclose(scaled[40:], plain[40:] / 4, rtol=1e-12)
    between = scaled[24:40] / plain[24:40]
    np.testing.assert_allclose(np.diff(between), -0.75 / 17, rtol=1e-9)  # a straight line from pair 23 to pair 40
    cos, sin = rotations(np.arange(5), YARN)
    np.testing.assert_allclose(np.hypot(cos, sin), 0.1 * math.log(4) + 1, rtol=1e-6)
    given = dataclasses.replace(QWEN, rope_scaling=YarnScaling(4.0, 32768, attention_factor=1.5))
    np.testing.assert_allclose(np.hypot(*rotations(np.arange(5), given)), 1.5, rtol=1e-6)


def test_the_original_context_is_the_models_where_it_is_not_given() -> None:
    config = to_hf(QWEN) | {"rope_scaling": {"type": "yarn", "factor": 4.0}}
    assert from_hf(config).rope_scaling == YarnScaling(4.0, 32768)


def config_of(prompt: int, response: int, path: str | None = "weights", **sft: int) -> Config:
    rollout = RolloutConfig(max_prompt_tokens=prompt, max_response_tokens=response)
    return Config(rollout=rollout, sft=SFTConfig(**sft), policy=PolicyConfig(path=path))


@pytest.mark.parametrize(
    ("arch", "config", "message"),
    [
        (QWEN, config_of(1024, 31744), None),
        (QWEN, config_of(1024, 31745), r"max_response_tokens = 32769 exceeds the 32768 positions.*\"factor\": 2\.0"),
        (QWEN, config_of(1024, 98305), r"= 99329 exceeds the 32768 positions .*\"factor\": 4\.0, .*: 32768"),
        (QWEN, config_of(1024, 1024, steps=1, max_tokens=40000), r"sft\.max_tokens = 40000 exceeds"),
        (QWEN, config_of(1024, 1024, max_tokens=40000), None),  # no cold start
        (YARN, config_of(1024, 130048), None),
        (YARN, config_of(1024, 130049), r"exceeds the 131072 positions .*, extended by yarn.*\"factor\": 5\.0"),
        (QWEN, config_of(1024, 31745, None), r"lower it, or raise policy\.architecture\.max_positions$"),
        (
            LLAMA,
            config_of(1024, 200_000),
            r"= 201024 exceeds the 131072 positions .*: lower it \(rope_type llama3 cannot",
        ),
        (dataclasses.replace(QWEN, max_positions=None), config_of(10**6, 10**6), None),
    ],
)
def test_longer_rollouts_than_the_policy_was_made_for_are_refused(
    arch: Architecture, config: Config, message: str | None
) -> None:
    if message is None:
        check_positions(arch, config)
        return
    with pytest.raises(ConfigError, match=message):
        check_positions(arch, config)


def test_what_a_stated_shape_may_leave_out(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(to_hf(YARN)))

    def policy(arch: Architecture | None) -> PolicyConfig:
        return PolicyConfig(path=str(tmp_path), architecture=arch)

    assert architecture_of(policy(None)) == YARN
    assert architecture_of(policy(dataclasses.replace(YARN, max_positions=None))) == YARN  # the limit is the folder's
    with pytest.raises(ConfigError, match=r"policy\.architecture\.rope_scaling = None, but .*YarnScaling"):
        architecture_of(policy(QWEN))
    with pytest.raises(ConfigError, match=r"policy\.architecture\.max_positions = 5, but"):
        architecture_of(policy(dataclasses.replace(YARN, max_positions=5)))


@pytest.mark.parametrize("arch", [QWEN, YARN])
def test_scalings_survive_a_runs_config(tmp_path: Path, arch: Architecture) -> None:
    policy = PolicyConfig(architecture=arch, tokenizer="x", template_variables={"enable_thinking": False})
    save_config(Config(policy=policy), tmp_path / "config.json")
    assert load_config(tmp_path / "config.json").policy == policy
