"""The command line as a user meets it: real processes, their output and exit codes."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from appo_jax import cli
from appo_jax.config import Architecture, RopeScaling, YarnScaling
from appo_jax.config_io import flatten, load_config, save_config
from appo_jax.errors import ConfigError
from appo_jax.overrides import expand_home, split_dotted

QUICKSTART = str(Path(__file__).parents[1] / "configs" / "quickstart.py")


def appo_jax(*args):
    """Run the command in an environment where importing jax fails, because these commands must not need it."""
    code = "import sys; sys.modules['jax'] = None; from appo_jax.cli import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60)


def test_a_cold_start_on_several_hosts_is_one_run(tmp_path):
    """Without the other hosts it does not train alone."""
    done = subprocess.run(
        [sys.executable, "-m", "appo_jax", "sft", "--config", QUICKSTART, "--run-dir", str(tmp_path / "run")],
        env=os.environ | {"APPO_DISTRIBUTED": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert "APPO_DISTRIBUTED = 1, but the other hosts cannot be joined" in done.stderr
    assert not (tmp_path / "run/sft.jsonl").exists()


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--branching.num-branch-point", "2"], ["--branching.num-branch-point", "--branching.num-branch-points INT"]),
        (["--branching.num-branch-points", "two"], ["--branching.num-branch-points", "int", "'two'"]),
        (["--loss.aggregation", "sum"], ["--loss.aggregation", "'sum'", "'token_mean'"]),
        (["--rollout.budget", "4"], ["rollout.budget = 4 leaves no room for branches", "N·(B+1)^L = 16"]),
        (["--prompts-per-minibatch", "7"], ["prompts_per_minibatch = 7", "prompts_per_step = "]),
        (["--steps", "0"], ["steps = 0: should be greater than 0"]),
        (["--loss.dual-clip", "0.5"], ["loss.dual_clip = 0.5: must be above 1, or 0 (off)"]),
        (["--loss.max-dual-clipped", "1"], ["loss.max_dual_clipped = 1", "set loss.dual_clip too"]),
        (["--loss.sampler-cap", "-1"], ["loss.sampler_cap = -1.0: should be greater than or equal to 0"]),
        (["--loss.kl-estimator", "k4"], ["--loss.kl-estimator", "'k4'", "'k3'"]),
        (["--loss.surrogate", "cispo", "--loss.dual-clip", "3"], ["loss.dual_clip = 3.0: goes with", "'cispo'"]),
        (["--advantage.clip-low", "-1"], ["advantage.clip_low = -1.0: should be greater than or equal to 0"]),
        (
            ["--reward.overlong-buffer", "112"],
            ["reward.overlong_buffer = 112", "below rollout.max_response_tokens = 112"],
        ),
        (["--max-resamples", "-1"], ["max_resamples = -1"]),
        (
            ["--policy.lora.rank", "16", "--policy.lora.alpa", "3"],
            ["--policy.lora.alpa is not a field of the config; did you mean 'alpha'?"],
        ),
        (["--reward.judge.modle=x"], ["--reward.judge.modle is not a field of the config; did you mean 'model'?"]),
        (["--algorithm", "grpoo"], ["algorithm = 'grpoo': no algorithm has this name; did you mean 'grpo'?"]),
        (["--mesh.fsdp", "3", "--optimizer.micro-batch", "4"], ["optimizer.micro_batch = 4 rows cannot be split"]),
        (["--algorithm", "arpo", "--rollout.num-initial", "16"], ["rollout.budget = 16 leaves no room for branches"]),
        (
            ["--branching.score", "random_turn", "--branching.allocation", "pooled"],
            [
                "branching.allocation = 'pooled'",
                "does not use it, because it branches where a turn begins; set it to 'per_rollout'",
            ],
        ),
    ],
)
def test_a_bad_override_is_named_before_any_device_is_touched(args, expected):
    done = appo_jax("train", "--config", QUICKSTART, *args)
    assert done.returncode == 2
    for text in expected:
        assert text in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["trian"], "'trian' is not a command; did you mean 'train'?"),
        (["train"], "--config FILE is missing"),
        (["train", "--config", "configs/quikstart.py"], "configs/quikstart.py: no such file"),
        (["data", "word", "--config", QUICKSTART], "expected `appo-jax data world"),
        (["convert", "gpt", "--out", "x"], "smollm2"),
        (["convert", "smollm2", "--out", "x", "--adapter"], "it has no adapters; leave --adapter out"),
        (["sweep", "--config", "x.py", "--worker", "--report"], "sweep --worker with --report: give one of the two"),
        (["sweep", "--config", "x.py", "--worker", "--jobs", "2"], "sweep --worker with --jobs 2: give one of the two"),
        (["sft", "--config", QUICKSTART, "--samples", "2"], "--samples: goes with --collect FILE"),
        (
            ["train", "--config", QUICKSTART, "--data", "x", "--data.path", "y"],
            "--data x and --data.path: both set data.path",
        ),
        (
            ["plan", "--config", QUICKSTART, "--data.path=y", "--data", "x"],
            "--data x and --data.path: both set data.path",
        ),
        (["sft", "--config", QUICKSTART, "--run", "runs/a", "--questions", "2"], "--run: goes with --collect FILE"),
    ],
)
def test_a_bad_command_line_is_named(args, expected):
    done = appo_jax(*args)
    assert done.returncode == 2
    assert expected in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_help_of_everything():
    done = appo_jax("--help")
    assert done.returncode == 0
    for command in cli.COMMANDS:
        assert f"\n  {command} " in done.stdout
    for option in ("-h", "--help"):
        done = appo_jax("data", option)
        assert (done.returncode, done.stdout.startswith("usage: appo-jax data world --config FILE\n")) == (0, True)
    for config in ([], ["--config", QUICKSTART]):  # which has a policy.architecture
        shown = appo_jax("train", *config, "--help").stdout
        assert "--branching.num-branch-points INT" in shown
        assert ("--policy.architecture.width INT" in shown) == bool(config)
        assert ("--policy.architecture.{vocab-size,width,num-layers," in shown) == (not config)
        assert "--policy.lora.{rank,alpha,targets,base-dtype}" in shown
        assert "--reward.judge.{url,model," in shown


def test_overrides_stand_on_top_of_the_file():
    base = load_config(QUICKSTART)
    config = cli.config_from(
        "train", ["--config", QUICKSTART, "--branching.num-branch-points", "2", "--rollout.budget", "12", "--data", "D"]
    )
    assert (config.branching.num_branch_points, config.rollout.budget, config.data.path) == (2, 12, "D")
    assert config.policy == base.policy
    assert config.rollout.num_initial == base.rollout.num_initial


def test_dotted_options_are_told_from_a_commands_own():
    args = [
        "RUN",
        "Why a.b?",
        "--mesh.fsdp",
        "4",
        "--out",
        "a.b",
        "--tools.enabled",
        "python",
        "search",
        "--x=1.5",
        "-1",
    ]
    own, dotted = split_dotted(args)
    assert own == ["RUN", "Why a.b?", "--out", "a.b", "--x=1.5", "-1"]
    assert dotted == ["--mesh.fsdp", "4", "--tools.enabled", "python", "search"]


def test_a_nested_optional_part_of_the_file_can_be_overridden():
    config = cli.config_from("train", ["--config", QUICKSTART, "--policy.architecture.num-layers", "1"])
    assert config.policy.architecture.num_layers == 1


SHAPE = "vocab-size=10 width=8 num-layers=2 num-heads=2 num-kv-heads=1 head-dim=4 mlp-width=16"
ROPE = "factor=8.0 low-freq-factor=1.0 high-freq-factor=4.0 original-max-position=8192"


def options(part, fields):
    return [word for field in fields.split() for word in ("--" + part + field.split("=")[0], field.split("=")[1])]


def test_a_part_that_the_file_lacks_can_be_given(tmp_path):
    (tmp_path / "c.py").write_text("from appo_jax.config import *\nconfig = Config(policy=PolicyConfig(path='x'))")
    file = ["--config", str(tmp_path / "c.py")]
    shape = options("policy.architecture.", SHAPE)
    config = cli.config_from("train", [*file, *shape])
    assert config.policy.architecture == Architecture(10, 8, 2, 2, 1, 4, 16)
    rope = options("policy.architecture.rope-scaling.", ROPE)
    config = cli.config_from("train", [*file, *shape, *rope])
    assert config.policy.architecture.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
    yarn = options("policy.architecture.rope-scaling.", "factor=4.0 original-max-position=32768 beta-fast=16.0")
    config = cli.config_from("train", [*file, *shape, *yarn])
    assert config.policy.architecture.rope_scaling == YarnScaling(4.0, 32768, 16.0)
    for incomplete in (shape[2:], rope[2:] + shape, rope[:2]):
        with pytest.raises(SystemExit) as error:
            cli.config_from("train", [*file, *incomplete])
        assert error.value.code == 2


def test_an_optional_part_of_the_file_can_be_left_out():
    args = ["--config", QUICKSTART, "--policy.path", "x", "--policy.architecture", "None"]
    assert cli.config_from("train", args).policy.architecture is None
    scaled = [*args[:2], *options("policy.architecture.rope-scaling.", ROPE)]
    assert cli.config_from("train", scaled).policy.architecture.rope_scaling.factor == 8
    both = [*scaled, "--policy.architecture.rope-scaling", "None"]
    with pytest.raises(SystemExit):
        cli.config_from("train", both)


def test_every_field_has_an_option():
    """Also fields of optional parts, if at least one of the part's fields is given."""
    args = ["--config", QUICKSTART, *options("policy.architecture.rope-scaling.", ROPE)]
    config = cli.config_from("train", args)
    for name, value in flatten(config).items():
        *part, field = name.replace("_", "-").split(".")
        option = "--" + ".".join([*part, field if value is not False else "no-" + field])
        if value not in ((), {}):
            args += [
                option,
                *([] if isinstance(value, bool) else map(str, value if isinstance(value, tuple) else [value])),
            ]
    assert cli.config_from("train", args) == config


def test_the_config_of_a_run_can_be_trained_from_again(tmp_path):
    config = cli.config_from("train", ["--config", QUICKSTART, "--seed", "5"])
    save_config(config, tmp_path / "config.json")
    assert cli.config_from("train", ["--config", str(tmp_path / "config.json")]) == config


@pytest.mark.parametrize("command", ["train", "sft"])
def test_a_run_that_was_moved_begins_no_new_run_where_it_was(tmp_path, monkeypatch, capsys, command):
    """Once, `cp -r run moved; rm -r run; appo-jax train --config moved` trained from the beginning in `run`."""
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(load_config(QUICKSTART), run_dir="run", steps=1)
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    save_config(config, tmp_path / "run/config.json")
    shutil.copytree(tmp_path / "run", tmp_path / "moved")
    for gone in (False, True):
        for given in ("moved", "moved/config.json", str(tmp_path / "moved")):
            assert cli.main([command, "--config", given, "--steps", "5"]) == 2
            told = capsys.readouterr().err
            assert f"--config {given}: this run was copied or moved: its config has run_dir = 'run'" in told
            folder = given.removesuffix("/config.json")
            assert f"to continue the run in this one, give --config {given} --run-dir {folder};" in told
        if not gone:
            shutil.rmtree(tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moved"]


def test_a_run_is_trained_from_its_config_by_whatever_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(load_config(QUICKSTART), run_dir="run")
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    save_config(config, tmp_path / "run/config.json")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for path in ("run", "run/", "run/config.json", str(tmp_path / "run"), "link"):
        assert cli.config_from("train", ["--config", path], trains=True) == config
    shutil.copytree(tmp_path / "run", tmp_path / "moved")
    for option in (["--run-dir", "moved"], ["--run_dir=moved"], ["--run-dir", "run"]):
        run_dir = cli.config_from("train", ["--config", "moved", *option], trains=True).run_dir
        assert run_dir == option[-1].removeprefix("--run_dir=")
    assert cli.config_from("data describe", ["--config", "moved"]) == config  # it writes no run
    (tmp_path / "configs").mkdir()
    save_config(config, tmp_path / "configs/config.json")  # a config that somebody keeps under this name, and no run
    assert cli.config_from("train", ["--config", "configs/config.json"], trains=True) == config


def test_a_tilde_in_a_path_of_the_command_line_is_the_users_home(tmp_path, monkeypatch, capsys):
    """The shell leaves it in `--out=~/r` and in quotes, and a folder named `~` was made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "q.py"
    shutil.copy(QUICKSTART, file)
    args = ["--config", str(file), "--run-dir=~/r", "--data", "~/d", "--sft.traces", "~/a", "b~", "~"]
    config = cli.config_from("train", args)
    assert (config.run_dir, config.data.path) == (f"{tmp_path}/r", f"{tmp_path}/d")
    assert config.sft.traces == (f"{tmp_path}/a", "b~", str(tmp_path))
    for args in (
        ["status", "~/none"],
        ["train", "--config=~/none.py"],
        ["view", "~/none"],
        ["convert", "~/none", "--out=~/o"],
    ):
        assert cli.main(args) != 0
        assert f"{tmp_path}/none" in capsys.readouterr().err
    assert [expand_home(arg) for arg in ("~/a", "--a=~", "--a=~b", "a~/b", "--a", "--~/a", "~a/b", "--a=b=~/c")] == [
        f"{tmp_path}/a", f"--a={tmp_path}", "--a=~b", "a~/b", "--a", "--~/a", "~a/b", "--a=b=~/c",
    ]  # fmt: skip


def test_the_two_spellings_of_data_cannot_hide_a_typo():
    with pytest.raises(SystemExit) as error:
        cli.config_from("train", ["--config", QUICKSTART, "--dat", "D"])
    assert error.value.code == 2


def test_cross_field_rules_hold_for_the_file_itself(tmp_path):
    (tmp_path / "c.py").write_text("from appo_jax.config import Config\nconfig = Config()")
    with pytest.raises(ConfigError, match=r"policy\.path, policy\.architecture: give one"):
        cli.config_from("train", ["--config", str(tmp_path / "c.py")])


def test_what_fails_later_is_told_without_a_traceback(tmp_path):
    done = appo_jax("view", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith(f"appo-jax view: {tmp_path}/rollouts: no rollout dumps")
    assert "Traceback" not in done.stderr


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    (tmp_path / "rollouts").mkdir()
    tree = {"step": 1, "id": "x", "question": "line\n" * 100_000, "golds": ["1"], "nodes": []}
    (tmp_path / "rollouts" / "step_000001.jsonl").write_text(json.dumps(tree) + "\n")
    command = [sys.executable, "-m", "appo_jax.cli", "view", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as reader:
        assert reader.stdout.readline() == b"step 1 \xc2\xb7 x\n"
        reader.stdout.close()
        assert reader.stderr.read() == b""


@pytest.mark.parametrize("args", [["train", "--help"], ["data", "describe", "--config", "{config}"]])
def test_a_reader_that_left_before_the_output_came_is_no_error(tmp_path, args):
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text('{"question": "1+1?", "answer": 2}')
    parts = f"policy=PolicyConfig(path='none'), data=DataConfig('files', {str(tmp_path)!r})"
    (tmp_path / "c.py").write_text(f"from appo_jax.config import *\nconfig = Config({parts})")
    command = [sys.executable, "-m", "appo_jax", *(arg.format(config=tmp_path / "c.py") for arg in args)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
