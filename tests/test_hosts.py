"""Two real processes as two hosts of one mesh: complete runs, and messages between hosts."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from appo_jax.config import Config, MeshConfig
from appo_jax.config_io import check, save_config
from appo_jax.dumps import read_dump
from appo_jax.metrics import read_metrics
from appo_jax.prepare import prepare_world

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.py"
JOIN = "import sys, jax; jax.distributed.initialize(sys.argv.pop(1), int(sys.argv.pop(1)), int(sys.argv.pop(1)))\n"
EXCHANGE = (
    JOIN
    + """
import json
from appo_jax.distributed import exchange, host
said = [{"from": host(), "text": "ä" * size * host()} for size in (0, 1, 2038, 2040, 100_000)]
heard = [exchange(message) for message in said]
for message, answers in zip(said, heard):
    assert answers[host()] == message
    assert [a["from"] for a in answers] == [0, 1], answers
print(json.dumps([[len(a["text"]) for a in answers] for answers in heard]))
"""
)
OPEN = (
    JOIN
    + """
import os
from appo_jax import run_dir
from appo_jax.config import Config, PolicyConfig
from appo_jax.distributed import host
from appo_jax.errors import CheckpointError
os.makedirs(f"{sys.argv[1]}/{host()}")
os.chdir(f"{sys.argv[1]}/{host()}")  # the run directory is a relative path
run_dir.SHARED_S = 1.0
try:
    run_dir.open_run(Config(run_dir="run", policy=PolicyConfig(path="x")))
except CheckpointError as error:
    print(error)
"""
)
REWARDS = (
    JOIN
    + """
import dataclasses, json, math
import numpy as np
from appo_jax.components import Components, give_rewards
from appo_jax.config_io import load_config
from appo_jax.distributed import num_hosts
from appo_jax.errors import TrainingError
from appo_jax.reward import Judge, require_rewards
from appo_jax.text.tokenizer import load_tokenizer
from appo_jax.types import Example, RewardResult, Rollout, StopReason

config = load_config(sys.argv[1])
tokenizer = load_tokenizer(sys.argv[2])
prompt = tokenizer.render_prompt("", "?")
def rollout(i):
    tokens = np.array([*prompt, *tokenizer.encode("x" * i)], np.int32)
    sampled = np.arange(len(tokens)) >= len(prompt)
    empty = np.zeros(len(tokens), np.float32)
    return Rollout(Example(f"q{i}", "?", ("5",), "math", ""), tokens, len(prompt), sampled, empty, empty,
                   StopReason.ANSWERED, (), i, host=i % num_hosts())
parts = dict.fromkeys(field.name for field in dataclasses.fields(Components))
def judged(function):
    rollouts = [rollout(i) for i in range(6)]
    reward = Judge("mine:f", function)
    try:
        give_rewards(rollouts, Components(**parts | {"config": config, "tokenizer": tokenizer, "reward": reward}))
        require_rewards(rollouts)
    except TrainingError as error:
        return str(error)
    return [[None if math.isnan(r.reward) else r.reward, r.reward_detail, r.reward_error] for r in rollouts]
nan = lambda response: RewardResult(np.float32("nan") if len(response.text) == 3 else np.float32(len(response.text)), np.bool_(1),
                                    {"length": np.int64(len(response.text))})
print(json.dumps([judged(nan), judged(lambda response: 1.0)]))
"""
)

STATE = (
    JOIN
    + """
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from appo_jax.checkpoint import Checkpointer

sharding = NamedSharding(jax.make_mesh((2,), ("x",)), PartitionSpec("x"))
def state(step):
    values = np.random.default_rng(step).normal(size=(64, 32)).astype(np.float32)
    return {"w": jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])}
"""
)

CHECKPOINTS = (
    STATE
    + """
checkpointer = Checkpointer(sys.argv[1], 3)
if (found := checkpointer.restore_latest(state(0), None)) is None:
    for step in (1, 2):
        checkpointer.save(step, state(step), {}, None)
else:
    step, restored, _ = found
    part, expected = (tree["w"].addressable_data(0) for tree in (restored, state(step)))
    print("restored", step, bool((part == expected).all()))
    checkpointer.save(2, state(2), {}, None)
checkpointer.close()
"""
)

WITHOUT_RIGHTS = (
    STATE
    + """
import grp, os, pwd  # orbax imports these late
from appo_jax.distributed import exchange, host
from appo_jax.errors import CheckpointError

checkpointer = Checkpointer(sys.argv[1], 3, read_only=True)
if host() == 1:
    os.seteuid(65534)
try:
    checkpointer.restore_latest(state(0), None)
except CheckpointError as error:
    print("CheckpointError", error)
print("next", exchange(f"from {host()}"))
"""
)

DEMONSTRATIONS = (
    JOIN
    + """
import dataclasses, json
from appo_jax.components import Components
from appo_jax.config import ToolsConfig
from appo_jax.data.demonstrations import LeftOut
from appo_jax.data.source import Dataset
from appo_jax.distributed import exchange, host
from appo_jax.sft import shared_demonstrations
from appo_jax.tools.executor import ToolExecutor
from appo_jax.tools.wrap import FunctionTool
from appo_jax.types import Example, Segment, Trace

def add(code: str) -> str:
    if host() == 1 and code.startswith("3"):
        raise OSError("this host cannot reach the tool")
    return f"{eval(code)} by host {host()}"

def demonstration(i, kit):
    result = kit.run("add", f"{i}+1")
    example = Example(f"q{i}", f"{i}+1?", ("1", "2"), "math", "S", "set", {"what JSON cannot hold": {1}})
    return Trace(example, (Segment(kit.write_call("add", f"{i}+1"), True), Segment(result, False)))

parts = dict.fromkeys(field.name for field in dataclasses.fields(Components))
with ToolExecutor([FunctionTool(add, "add")], ToolsConfig()) as executor:
    dataset = Dataset([], [], None, demonstration, 200)
    traces = shared_demonstrations(Components(**parts | {"dataset": dataset, "executor": executor}), 150, LeftOut())
assert traces[0].example == Example("q0", "0+1?", ("1", "2"), "math", "S", "set")
exchange(None)
print(json.dumps([[trace.example.id, trace.segments[1].text] for trace in traces]))
"""
)


def together(program: str, hosts: int, arguments: list[str], devices: int, cache: Path) -> list[str]:
    """Run `program` on `hosts` processes of `devices` CPU devices each; what each printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    commands = [["-c", program, address, str(hosts), str(i), *arguments] for i in range(hosts)]
    return at_once(commands, [{}] * hosts, devices, cache)


def at_once(commands: list[list[str]], variables: list[dict[str, str]], devices: int, cache: Path) -> list[str]:
    """Run Python with each of `commands` at the same time, on `devices` CPU devices each; what each printed."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, *command], env=env | own, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for command, own in zip(commands, variables, strict=True)
    ]  # fmt: skip
    try:
        printed = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, printed, strict=True):
        assert process.returncode == 0, text[-4000:]
    return printed


def test_hosts_hear_each_other(tmp_path: Path) -> None:
    told = together(EXCHANGE, 2, [], 1, tmp_path)
    lengths = [json.loads(text.splitlines()[-1]) for text in told]
    assert lengths[0] == lengths[1] == [[0, 0], [0, 1], [0, 2038], [0, 2040], [0, 100_000]]


def test_hosts_that_do_not_share_the_run_directory_are_told(tmp_path: Path) -> None:
    told = together(OPEN, 2, [str(tmp_path)], 1, tmp_path / "cache")
    name = socket.gethostname()
    for text in told:
        assert (
            f"run_dir: {tmp_path}/1/run on host 1 ({name}) is not the folder {tmp_path}/0/run on host 0 ({name}); all hosts must"
            in text
        )


def test_hosts_have_the_first_hosts_demonstrations_though_their_tools_differ(tmp_path: Path) -> None:
    first, second = (json.loads(text.splitlines()[-1]) for text in together(DEMONSTRATIONS, 2, [], 1, tmp_path))
    assert first == second == [[f"q{i}", f"{i + 1} by host 0"] for i in range(150)]


def test_rewards_mean_the_same_on_one_host_and_on_two(tmp_path: Path) -> None:
    """Array scalars are exchanged; a host knows of the other's failure; a failure on both hosts ends both."""
    sentences = ["x xx xxx xxxx xxxxx ?"] * 9
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_prefix=str(tmp_path / "x"), vocab_size=20, hard_vocab_limit=False,
        control_symbols=["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], pad_id=3, minloglevel=2,
    )  # fmt: skip
    arguments = [str(QUICKSTART), str(tmp_path / "x.model")]
    alone = subprocess.run(
        [sys.executable, "-c", "import sys" + REWARDS.removeprefix(JOIN), *arguments],
        env=os.environ | {"JAX_PLATFORMS": "cpu"}, text=True, capture_output=True, check=True,
    )  # fmt: skip
    for text in (alone.stdout, *together(REWARDS, 2, arguments, 1, tmp_path)):
        some, none = json.loads(text.splitlines()[-1])
        assert [reward for reward, *_ in some] == [0, 1, 2, None, 4, 5]
        assert [detail.get("length") for _, detail, _ in some] == [0, 1, 2, None, 4, 5]
        assert some[3][2] == "reward.function = 'mine:f' returned the reward np.float32(nan)"
        assert none == (
            "none of 6 rollouts has a reward: reward.function = 'mine:f' returned 1.0, a float (6 times, first for 'q0'); "
            "correct the function"
        )


def test_a_file_that_one_host_cannot_read_sends_all_to_the_step_before(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    together(CHECKPOINTS, 2, [str(folder)], 1, tmp_path / "xla")
    for path in (folder / "2/state/ocdbt.process_1/d").iterdir():
        path.write_bytes(b"")
    for text in together(CHECKPOINTS, 2, [str(folder)], 1, tmp_path / "xla"):
        assert "restored 1 True" in text
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "refused_2"]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become a user without rights")
def test_a_file_that_one_host_may_not_read_is_an_error_of_all(tmp_path: Path) -> None:
    """sft.cold_start goes on after it. Only the host without rights did, so its next message met another one of the others."""
    with tempfile.TemporaryDirectory() as name:  # pytest keeps its folders to their user
        Path(name).chmod(0o755)
        folder = Path(name, "c")
        together(CHECKPOINTS, 2, [str(folder)], 1, tmp_path / "xla")
        (folder / "2/meta/metadata").chmod(0o000)
        for text in together(WITHOUT_RIGHTS, 2, [str(folder)], 1, tmp_path / "xla"):
            assert f"CheckpointError host 1: {folder}/2/meta/metadata: this user may not read it; grant the" in text
            assert "next ['from 0', 'from 1']" in text


@pytest.mark.long
@pytest.mark.timeout(600)
def test_two_hosts_train_as_one_does(
    tmp_path: Path, short_quickstart: Callable[[Path], Config], one_of: Callable[[int, int], dict[str, str]]
) -> None:
    c = short_quickstart(tmp_path)
    config = dataclasses.replace(
        c,
        steps=2,
        mesh=MeshConfig(data=1, fsdp=2, tensor=1),
        sft=dataclasses.replace(c.sft, steps=20),
        eval=dataclasses.replace(c.eval, num_prompts=2),
    )
    check(config)
    prepare_world(config)

    def run(name: str, hosts: int, config: Config = config) -> Path:
        run_dir, file = tmp_path / name, tmp_path / f"{name}.json"
        save_config(dataclasses.replace(config, run_dir=str(run_dir)), file)
        command = ["-m", "appo_jax", "train", "--config", str(file)]
        variables = [one_of(i, hosts) for i in range(hosts)]
        printed = at_once([command] * hosts, variables, 2 // hosts, tmp_path / "xla")
        assert all("cold start 20/20" not in text for text in printed[1:])  # the first host speaks for all
        return run_dir

    # Two steps on one host; one on two hosts, and then one more on one host, from the checkpoint that the two wrote.
    alone = run("alone", 1)
    both = run("both", 2, dataclasses.replace(config, steps=1))
    assert [record["step"] for record in read_metrics(both / "metrics.jsonl")] == [1]
    run("both", 1)
    expected, found = (read_metrics(folder / "metrics.jsonl") for folder in (alone, both))
    assert [record["step"] for record in found] == [1, 2]

    def measured(record: dict[str, Any]) -> dict[str, Any]:
        timed = ("time/", "rollout/useful_rows")
        return {k: v for k, v in record.items() if not k.startswith(timed) and "seconds" not in k and "queue" not in k}

    called = any(key.startswith("tools/") for record in expected for key in record)
    assert called, "no rollout called a tool: nothing was exchanged"
    for a, b in zip(expected, found, strict=True):
        assert measured(b) == pytest.approx(measured(a), rel=1e-4, abs=1e-6)
    for step in (1, 2):
        for a, b in zip(
            *(read_dump(folder / f"rollouts/step_{step:06d}.jsonl.gz") for folder in (alone, both)), strict=True
        ):
            assert [(n["segments"], n["stop_reason"], n["reward"]) for n in a["nodes"]] == [
                (n["segments"], n["stop_reason"], n["reward"]) for n in b["nodes"]
            ]
