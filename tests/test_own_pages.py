"""The examples of the pages on traces, rewards and models of one's own work as they are written there."""

import re
import shlex
from pathlib import Path

import pytest

from appo_jax.cli import config_from
from appo_jax.config import Config, PythonToolConfig, RewardConfig, ToolsConfig
from appo_jax.config_io import check, load_config
from appo_jax.data.demonstrations import LeftOut
from appo_jax.data.trace_files import read_traces
from appo_jax.overrides import override, split_dotted
from appo_jax.policy.parameters import FAMILIES
from appo_jax.reward import Response, make_reward
from appo_jax.tools.build import build_executor
from appo_jax.tools.format import make_format
from appo_jax.types import Segment, StopReason

ROOT = Path(__file__).parents[1]


def example(page: str, language: str) -> str:
    (code,) = re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    return code


def test_the_traces_of_the_page_are_read(tmp_path: Path) -> None:
    (tmp_path / "traces.jsonl").write_text(example("traces.md", "jsonl"))
    tools = ToolsConfig(enabled=("python",), python=PythonToolConfig(isolation="process", preload=()))
    left_out = LeftOut()
    with build_executor(tools) as executor:
        traces = read_traces([tmp_path / "traces.jsonl"], executor.call_format, None, left_out)
    assert left_out.total == 0
    for number, trace in zip((2, 3, 4, 5), traces, strict=True):
        call, result, answer = trace.segments
        assert call.text.endswith(f"<python>print({number}+{number})</python>")
        assert result.text == f" <result>\n{2 * number}\n</result>"
        assert answer.text == f"<answer> \\boxed{{{2 * number}}} </answer>"
        assert "<python>" in trace.example.system


def test_the_rewards_of_the_page_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(example("rewards.md", "python"))
    monkeypatch.syspath_prepend(tmp_path)
    config = RewardConfig("my_rewards:brief", terms=("my_rewards:few_calls",))
    reward = make_reward(config, make_format("tags"), tmp_path)
    segments = (Segment("<python>1</python>", True), Segment("1", False), Segment("<answer>\\boxed{7}</answer>", True))
    response = Response(segments, ("7",), "math", frozenset({"python"}), StopReason.ANSWERED)
    (judgement,) = reward.each([response])
    assert judgement.reward == pytest.approx(1 - 0.01)
    assert judgement.detail == {"short": 1.0, "few_calls": -0.01}


def test_the_model_of_the_page_is_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_config.py").write_text(example("models.md", "python"))
    monkeypatch.chdir(ROOT)
    config: Config = check(load_config(tmp_path / "my_config.py"))
    assert config.policy.architecture is not None
    assert config.policy.architecture.width == 128


def test_the_page_on_models_names_every_family() -> None:
    text = (ROOT / "docs" / "models.md").read_text()
    assert set(re.findall(r"`(\w+ForCausalLM)`", text)) == {family.hf for family in FAMILIES.values()}


def test_the_commands_of_the_page_on_the_paper_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every config that docs/reproduce.md names is there, and its overrides are fields that keep the rules. What a command reads
    was written by an earlier one, in the folder that all machines share."""
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / "reproduce.md").read_text().replace("\\\n", " ")
    commands = re.findall(
        r"^(?:TPU_COMMAND=sft )?(?:launch/run\.sh|appo-jax data describe) ([^\n#]*)", text, re.MULTILINE
    )
    described, cold, trained = [config_from("train", command.split()) for command in commands]
    assert described.sft.traces == cold.sft.traces == ("/mnt/shared/traces/traces.json",)
    assert (described.sft.steps, cold.sft.steps, trained.sft.steps) == (0, 1266, 0)
    assert cold.run_dir in re.findall(r"^appo-jax convert (\S+) --out " + str(trained.policy.path), text, re.MULTILINE)
    assert {described.policy.path, cold.policy.path} == {"/mnt/shared/qwen2_5_7b"}
    assert {config.data.path for config in (described, cold, trained)} == {"/mnt/shared/appo_rl"}
    asked = re.findall(r"^appo-jax (?:eval|ask) ([^\n]*mesh[^\n]*)", text, re.MULTILINE)
    for own, dotted in (split_dotted(shlex.split(command)) for command in asked):
        assert trained.run_dir in own
        check(override(trained, dotted, "eval", ""))
    assert len(asked) == 3
    for name in re.findall(r"`(configs/\w+\.py)`", text):
        check(load_config(ROOT / name))
