"""Each call format from end to end: its tokenizer, its cold start, APPO. And only one file contains the tags."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

import appo_jax
from appo_jax.components import build
from appo_jax.config_io import check, load_config
from appo_jax.errors import ConfigError
from appo_jax.metrics import read_metrics
from appo_jax.prepare import prepare_world
from appo_jax.text.tokenizer import load_tokenizer
from appo_jax.text.train_tokenizer import train_tokenizer
from appo_jax.train import train

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.py"


@pytest.mark.long
@pytest.mark.timeout(900)  # a cold start and six steps: a minute of an idle core, many of a busy machine
@pytest.mark.parametrize("call_format", ["json", "tags"])
def test_the_world_learns_in_either_format(tmp_path, monkeypatch, call_format):
    """This network cannot compute with three numbers, so it answers correctly only with the tool."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    c = load_config(QUICKSTART)
    change = dataclasses.replace
    policy = change(
        c.policy,
        tokenizer=str(tmp_path / "world.model"),
        architecture=change(c.policy.architecture, vocab_size=468, width=128, num_layers=2, head_dim=32, mlp_width=256),
    )
    config = change(
        c, run_dir=str(tmp_path / "run"), steps=6, prompts_per_step=8, prompts_per_minibatch=8, policy=policy,
        data=change(c.data, source="small_world:load"),
        tools=change(c.tools, enabled=("python",), call_format=call_format),
        rollout=change(
            c.rollout, num_initial=4, budget=8, max_prompt_tokens=24, max_response_tokens=56, max_result_tokens=24,
            max_tool_calls=2, decode_rows=32,
        ),
        branching=change(c.branching, num_branch_points=1),
        sft=change(c.sft, steps=350, batch_size=16, max_tokens=72),
        eval=change(c.eval, num_prompts=32),
    )  # fmt: skip
    prepare_world(config)
    size = load_tokenizer(policy.tokenizer).vocab_size
    config = change(config, policy=change(policy, architecture=change(policy.architecture, vocab_size=size)))
    check(config)
    train(config)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["accuracy_base"] == 0
    assert summary["accuracy_final"] >= 0.3
    assert summary["accuracy_final"] > summary["accuracy_sft"]
    steps = [record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "tools/python/ok" in record]
    assert len(steps) >= 5
    # A call of the other format would be none at all: no result, no stop.
    assert sum(record["tools/python/ok"] for record in steps) > 50


def test_a_tokenizer_of_another_format_still_writes_every_call(tmp_path, monkeypatch, caplog):
    """It needs more tokens, of which the run warns, but everything works."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    c = load_config(QUICKSTART)
    policy = dataclasses.replace(c.policy, tokenizer=str(tmp_path / "tags.model"))
    config = dataclasses.replace(
        c, policy=policy, data=dataclasses.replace(c.data, source="small_world:load"),
        tools=dataclasses.replace(c.tools, enabled=("python",)),
    )  # fmt: skip
    prepare_world(config)
    config = dataclasses.replace(config, tools=dataclasses.replace(config.tools, call_format="json"))
    size = load_tokenizer(policy.tokenizer).vocab_size
    architecture = dataclasses.replace(policy.architecture, vocab_size=size, width=32, mlp_width=64)
    with build(
        dataclasses.replace(config, policy=dataclasses.replace(policy, architecture=architecture))
    ) as components:
        call = components.executor.call_format.render_call("python", "12*3")
        tokenizer = components.tokenizer
        assert tokenizer.decode(tokenizer.encode(call)) == call
    assert "train one for this format" in caplog.text


def test_a_vocabulary_too_small_for_the_text_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"policy\.architecture\.vocab_size = 300: .*[Vv]ocab"):
        train_tokenizer(["one two three"], tmp_path / "small.model", ("<a>",), vocab_size=300)


def test_tags_are_written_in_one_file_alone():
    """The official reward has tags of its own, because it copies the official code."""
    package = Path(appo_jax.__file__).parent
    tag = re.compile(r"</?(?:python|search|result|tool_call|tool_response)>")
    found = [
        f"{path.relative_to(package)}:{number}"
        for path in sorted(package.rglob("*.py"))
        if path.relative_to(package).as_posix() not in ("tools/format.py", "reward/official.py")
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if tag.search(line)
    ]
    assert found == []
