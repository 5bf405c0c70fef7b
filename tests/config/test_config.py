"""The config: every field has a docstring and bounds, and the same bounds and rules apply to every caller."""

import ast
import dataclasses
import inspect
import math
import threading
import typing
from contextlib import nullcontext
from pathlib import Path

import pytest

from appo_jax import algorithms, cli, config_io
from appo_jax.algorithms import ALGORITHMS
from appo_jax.config import (
    Architecture,
    Config,
    DataPart,
    EvalSetConfig,
    LoRAConfig,
    PolicyConfig,
    RopeScaling,
    YarnScaling,
    rules,
)
from appo_jax.errors import ConfigError
from appo_jax.eval_command import Evaluation

ROOT = Path(__file__).parents[2]
QUICKSTART = config_io.load_config(ROOT / "configs/quickstart.py")


def parts(cls=Config, prefix=""):
    """(dotted prefix, dataclass) of the config and of every part of it."""
    yield prefix, cls
    for name, hint in typing.get_type_hints(cls).items():
        for option in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(option):
                yield from parts(option, f"{prefix}{name}.")


def numbers():
    """(dotted name, declared type) of every number of the config."""
    for prefix, cls in parts():
        for name, hint in typing.get_type_hints(cls, include_extras=True).items():
            kind = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
            if kind in (int, float):
                yield prefix + name, hint


def replaced(config, name, value):
    """`config` with the field of a dotted name set, whatever its type allows."""
    first, _, rest = name.partition(".")
    return dataclasses.replace(config, **{first: replaced(getattr(config, first), rest, value) if rest else value})


def reaches(config, name):
    """Whether the config has the field of a dotted name. An optional part may be missing or of another type."""
    for part in name.split("."):
        if not hasattr(config, part):
            return False
        config = getattr(config, part)
    return True


# The quickstart has no rope scaling: a config with each kind of it.
COMPLETE = [
    replaced(QUICKSTART, "policy.architecture.rope_scaling", scaling)
    for scaling in (RopeScaling(8.0, 1.0, 4.0, 8192), YarnScaling(4.0, 32768, attention_factor=1.0))
]


@pytest.mark.parametrize(
    "cls", sorted({cls for _, cls in parts()}, key=lambda cls: cls.__name__), ids=lambda cls: cls.__name__
)
def test_every_field_is_explained(cls):
    (tree,) = ast.parse(inspect.getsource(cls)).body
    explained = {
        field.target.id
        for field, text in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }
    assert explained >= {field.name for field in dataclasses.fields(cls)}
    assert cls.__doc__


def test_every_number_has_a_lower_bound_in_its_type():
    unbounded = [name for name, hint in numbers() if typing.get_origin(hint) is not typing.Annotated]
    assert not unbounded


BOUNDED = ("seed", "data.seed", "tools.python.memory_mb")


@pytest.mark.parametrize("value", [-2, math.nan, math.inf, -math.inf, 10**400, True, "1"])
@pytest.mark.parametrize("config", COMPLETE, ids=["llama", "yarn"])
def test_no_number_takes_a_value_that_is_none(config, value):
    wrong = []
    for name, hint in numbers():
        if not reaches(config, name):
            continue
        if value != 10**400 or "float" in str(hint) or name in BOUNDED:  # other counts have no upper bound
            wrong.append(name)
            config = replaced(config, name, value)
    with pytest.raises(ConfigError) as error:
        config_io.check(config)
    assert {line.removeprefix("- ").split(" = ")[0] for line in str(error.value).splitlines()} == set(wrong)


# A value each that was accepted once and failed late, wrongly, or never.
FAULTS = {
    "seed": -1, "data.seed": 2**31, "optimizer.micro_batch": -1, "sft.micro_batch": -4, "optimizer.max_grad_norm": 0.0,
    "eval.num_prompts": -3, "eval.every": -1, "optimizer.b1": 1.5, "optimizer.b2": 1.0, "optimizer.warmup_steps": -1,
    "optimizer.weight_decay": -0.1, "sft.warmup_fraction": 1.5, "sft.steps": -1, "sft.max_tokens": 0,
    "max_sampled_tokens": -1, "rollout.max_tool_calls": -1, "rollout.top_p": 1.5,
    "tools.python.memory_mb": 0, "tools.search.top_k": 0, "tools.search.max_per_second": -1.0,
    "policy.architecture.num_layers": 0, "reward.overlong_buffer": -1, "reward.tool_bonus": -0.5,
    # above their bounds: no clock waits as long, float32 has no such number
    "rollout.max_seconds": 1e10, "reward.timeout": 1e10, "tools.python.timeout": 1e10, "tools.search.timeout": 1e10,
    "max_silent_seconds": 1e10, "stop_grace_seconds": 1e10, "tools.pause_seconds": 1e10, "rollout.temperature": 1e-40,
}  # fmt: skip


def test_a_shape_that_cannot_be_computed_is_refused():
    arch = Architecture(100, 33, 1, num_heads=3, num_kv_heads=2, head_dim=33, mlp_width=8)
    config = Config(policy=PolicyConfig(architecture=arch, tokenizer="t"))
    with pytest.raises(ConfigError) as error:
        config_io.check(config)
    assert "policy.architecture.num_heads = 3" in str(error.value)
    assert "policy.architecture.head_dim = 33: must be even" in str(error.value)
    square = dataclasses.replace(arch, width=8, num_heads=8, head_dim=8)
    with pytest.raises(ConfigError, match=r"policy\.architecture\.num_heads = 8: must not equal width"):
        config_io.check(Config(policy=PolicyConfig(architecture=square, tokenizer="t")))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 100, "num_tokens": 101}, "num_tokens = 101: must not exceed vocab_size = 100"),
        ({"num_tokens": 2, "missing_ids": (0, 1)}, "missing_ids holds 2 ids"),
        ({"rope_scaling": RopeScaling(8.0, 4.0, 4.0, 8192)}, "low_freq_factor = 4.0: must be below high_freq_factor"),
        ({"rope_scaling": RopeScaling(8.0, 4.0, 1.0, 8192)}, "low_freq_factor = 4.0: must be below high_freq_factor"),
        ({"rope_scaling": YarnScaling(4.0, 32768, beta_fast=1.0)}, "beta_slow = 1.0: must be below beta_fast = 1.0"),
    ],
)
def test_a_shape_whose_numbers_contradict_each_other_is_refused(fields, message):
    shape = dataclasses.replace(QUICKSTART.policy.architecture, **fields)
    assert any(message in problem for problem in rules.impossible(shape))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data.mixture": (DataPart("world"),)}, "data.mixture: only data.source = 'mixture' uses it, not 'world'"),
        ({"tools.search.corpus": "c", "tools.search.url": "http://h:1"}, "give one"),
        ({"tools.python.url": "http://h:1"}, "only isolation = 'remote' uses it"),
        (
            {"tools.search.provider": "serper"},
            r"tools\.search\.provider = 'serper': .* no url is given; .* to 'search_r1'",
        ),
        ({"tools.search.max_per_second": 5.0}, r"tools\.search\.max_per_second = 5\.0: .* no url is given"),
        ({"tools.search.timeout": 5.0}, r"tools\.search\.timeout = 5\.0: .* no url is given"),
        ({"tools.search.max_retries": 1}, r"tools\.search\.max_retries = 1: .* no url is given"),
        (
            {"tools.search.corpus": "c", "tools.search.cache": "a", "tools.search.cache_fill": "f"},
            r"tools\.search\.cache_fill = 'f': tools\.search\.corpus = 'c' answers every search",
        ),
        (
            {"tools.python.isolation": "remote", "tools.python.url": "http://h:1", "tools.python.memory_mb": 100},
            r"tools\.python\.memory_mb = 100: isolation = 'remote' does not use it",
        ),
        (
            {"tools.python.isolation": "remote", "tools.python.url": "http://h:1", "tools.python.modules": ("scipy",)},
            r"tools\.python\.modules = \('scipy',\): isolation = 'remote' does not use it",
        ),
        (
            {"data.source": "mixture", "data.mixture": (DataPart("world"),), "data.path": "d"},
            r"data\.path = 'd': data\.source = 'mixture' does not use it, .* set it there, and data\.path to None",
        ),
        ({"tools.enabled": ("python", "python")}, "a tool is given twice"),
        (
            {"policy.lora": LoRAConfig(targets=("q", "v", "q"))},
            r"policy\.lora\.targets: a matrix is given twice \(q, v, q\)",
        ),
        ({"max_resamples": 2}, "max_resamples = 2: algorithm = 'appo' branches, .* set it to 0"),
        ({"algorithm": "arpo", "max_resamples": 1}, "max_resamples = 1: algorithm = 'arpo' branches"),
        (
            {"branching.score": "random_turn", "branching.include_token": True},
            "'random_turn' does not use it.*to False",
        ),
        ({"algorithm": "tree_grpo", "branching.min_spacing": 4}, "'random_turn' does not use it.*to 1 "),
        (
            {"algorithm": "arpo", "branching.skip_blank": False},
            r"skip_blank = False: .*change' does not use it.*to True",
        ),
    ],
)
def test_what_would_have_no_effect_is_refused(fields, message):
    config = QUICKSTART
    for name, value in fields.items():
        config = replaced(config, name, value)
    with pytest.raises(ConfigError, match=message):
        config_io.check(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"advantage.scaling": "plain", "advantage.clip_low": 0.0, "advantage.clip_high": 0.0},
            "^advantage.clip_high = 0: with advantage.scaling = 'plain'",
        ),
        (
            {"algorithm": "fipo", "advantage.clip_low": 0.0, "advantage.clip_high": 0.0},
            r"^advantage.clip_high = 0: .*\(algorithm = 'fipo' sets .*advantage.scaling",
        ),
        ({"advantage.clip_low": 0.0, "advantage.clip_high": 0.0}, None),  # the factor is 1 + b·0
        (
            {"branching.score": "additive", "branching.entropy_weight": 0.0, "branching.future_weight": 0.0},
            "^branching.entropy_weight = 0 and branching.future_weight = 0",
        ),
        ({"branching.score": "additive", "branching.entropy_weight": 0.0}, None),
        (
            {"algorithm": "reinforce_pp", "prompts_per_minibatch": 1, "rollout.budget": 1},
            "^prompts_per_minibatch = 1 and rollout.budget = 1",
        ),
        ({"algorithm": "reinforce_pp", "prompts_per_minibatch": 2, "rollout.budget": 1}, None),
        ({"rollout.top_k": 1}, "^rollout.top_k = 1: .* nothing would be learnt; raise it, or set it to 0"),
        ({"rollout.top_k": 2}, None),
    ],
)
def test_a_config_by_which_nothing_is_learnt_is_refused(fields, message):
    config = QUICKSTART
    for name, value in fields.items():
        config = replaced(config, name, value)
    with nullcontext() if message is None else pytest.raises(ConfigError, match=message):
        config_io.check(config, trains=True)


def test_questions_that_must_not_occur_in_training_need_to_be_left_out_of_it():
    """Once, --data.evaluation alone had no effect, in silence. `data describe` counts the overlaps before any is left out."""
    file = ["--config", str(ROOT / "configs/quickstart.py"), "--data.evaluation", "exam.jsonl"]
    told = r"data\.evaluation = \['exam\.jsonl'\]: .* add 'overlaps' to data\.drop"
    for drop in ([], ["--data.drop", "duplicates"]):
        with pytest.raises(ConfigError, match=told):
            cli.config_from("train", [*file, *drop], trains=True)
        assert cli.config_from("data describe", [*file, *drop]).data.evaluation == ("exam.jsonl",)
    cli.config_from("train", [*file, "--data.drop", "duplicates", "overlaps"], trains=True)
    assert cli.main(["train", *file]) == cli.main(["sft", *file]) == 2


@pytest.mark.parametrize("name", FAULTS)
def test_python_file_and_command_line_are_held_to_the_same_bounds(name, tmp_path, capsys):
    value = FAULTS[name]
    told = []
    with pytest.raises(ConfigError) as error:
        config_io.check(replaced(QUICKSTART, name, value))
    told.append(str(error.value))
    with pytest.raises(ConfigError) as error:
        cli.config_from(
            "train", ["--config", str(ROOT / "configs/quickstart.py"), "--" + name.replace("_", "-"), str(value)]
        )
    told.append(str(error.value))
    (tmp_path / "c.json").write_bytes(config_io._to_json(replaced(QUICKSTART, name, value)))
    with pytest.raises(ConfigError) as error:
        config_io.load_config(tmp_path / "c.json")
    told.append(str(error.value).removeprefix(f"{tmp_path}/c.json: "))
    assert told[0] == told[1] == told[2]
    assert told[0].startswith(f"{name} = {value}: should be ")


@pytest.mark.parametrize("thread", [False, True])
def test_training_from_python_checks_as_the_command_does(thread, tmp_path):
    from appo_jax.train import train

    wrong = replaced(replaced(QUICKSTART, "optimizer.b1", 1.5), "run_dir", str(tmp_path / "run"))
    unruly = replaced(replaced(QUICKSTART, "prompts_per_minibatch", 7), "run_dir", str(tmp_path / "run"))
    told = []

    def run():
        for config in (wrong, unruly):
            with pytest.raises(ConfigError) as error:
                train(config)
            told.append(str(error.value))

    if thread:
        worker = threading.Thread(target=run)
        worker.start()
        worker.join(60)
    else:
        run()
    assert told[0] == "optimizer.b1 = 1.5: should be less than 1"
    assert told[1].startswith("prompts_per_step = 16 is not a multiple of prompts_per_minibatch = 7")
    assert not (tmp_path / "run").exists()


def test_a_value_that_is_neither_number_nor_text_is_named():
    with pytest.raises(
        ConfigError, match=r"^run_dir = <object .*expected a plain number, .* not a value of type object$"
    ):
        config_io.check(dataclasses.replace(QUICKSTART, run_dir=object()))


def test_all_broken_rules_are_listed_at_once():
    config = replaced(replaced(QUICKSTART, "loss.dual_clip", 0.5), "rollout.budget", 2)
    with pytest.raises(ConfigError) as error:
        config_io.check(config)
    assert [line.split(" ")[1] for line in str(error.value).splitlines()] == ["loss.dual_clip", "rollout.budget"]


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.py")), ids=lambda file: file.stem)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_config_may_be_trained_by_every_algorithm(file, name):
    config_io.check(replaced(config_io.load_config(file), "algorithm", name))


@pytest.mark.parametrize(
    ("name", "field", "given", "sets"),
    [
        ("dapo", "loss.clip_high", 0.4, 0.28),
        ("gppo", "loss.dual_clip", 3.0, 0.0),
        ("grpo", "advantage.base", "joint", "init_only"),
        ("grpo", "advantage.future_weight", 1.0, 0.0),
        ("arpo", "branching.score", "entropy", "entropy_change"),
        ("reinforce_pp", "loss.kl_weight", 0.01, None),  # used as it is given
        ("dapo", "max_resamples", 5, None),
        ("dapo", "reward.overlong_buffer", 5, None),
        ("dapo", "loss.clip_high", 0.28, None),
        ("appo", "loss.clip_high", 0.4, None),
    ],
)
def test_a_value_that_an_algorithm_would_overwrite_is_refused(name, field, given, sets):
    config = replaced(replaced(QUICKSTART, "algorithm", name), field, given)
    found = [text for text in algorithms.broken(config) if text.startswith(field)]
    option = "--" + field.replace("_", "-")
    told = f"{field} = {given!r}: algorithm = {name!r} sets it to {sets!r}; leave it out (if a file gives it: {option} {sets})"
    assert found == ([] if sets is None else [told])


@pytest.mark.parametrize(
    ("part", "sets", "given", "told"),
    [
        ("loss", {"surrogate": "nope"}, {}, r"algorithm = 'new': loss\.surrogate = 'nope': .*'clip'"),
        ("loss", {"clip_high": -1.0}, {}, r"algorithm = 'new': loss\.clip_high = -1\.0: .*greater"),
        (
            "loss",
            {"surrogate": "gppo"},
            {"loss.dual_clip": 3.0},
            r"loss\.dual_clip = 3\.0: .*'new' sets loss\.surrogate\)",
        ),
        ("branching", {"clip_high": 0.9}, {}, r"clip_low = 1\.0 must be below .*'new' sets branching\.clip_high\)"),
        (
            "branching",
            {"score": "random_turn"},
            {"branching.allocation": "pooled"},
            r"allocation = 'pooled': .*score\)",
        ),
        ("branching", {"clip_high": 2.0}, {"branching.clip_low": 1.5}, None),
    ],
)
def test_the_rules_hold_for_the_values_that_an_algorithm_sets(monkeypatch, part, sets, given, told):
    monkeypatch.setitem(
        ALGORITHMS, "new", lambda config: algorithms._varied(ALGORITHMS["appo"](config), **{part: sets})
    )
    config = replaced(QUICKSTART, "algorithm", "new")
    for field, value in given.items():
        config = replaced(config, field, value)
    with nullcontext() if told is None else pytest.raises(ConfigError, match=told):
        config_io.check(config)


def test_a_bound_of_another_estimator_is_refused():
    config = replaced(replaced(QUICKSTART, "algorithm", "reinforce_pp"), "loss.max_k3", 10.0)
    told = r"loss\.max_k3 = 10\.0: .*not 'k1'; set it to 0 \(algorithm = 'reinforce_pp' sets loss\.kl_estimator\)"
    with pytest.raises(ConfigError, match=told):
        config_io.check(config)


@pytest.mark.parametrize(
    ("name", "changes", "field"),
    [
        ("grpo", {"rollout.budget": 1}, "rollout.budget"),
        ("gigpo", {"rollout.budget": 1}, "rollout.budget"),
        ("reinforce_pp", {"rollout.budget": 1}, None),  # normalised over the mini-batch
        ("grpo", {"rollout.budget": 2}, None),
        ("appo", {"advantage.base": "init_only", "rollout.num_initial": 1}, "rollout.num_initial"),
        ("appo", {"rollout.num_initial": 1, "rollout.budget": 2}, "rollout.budget"),
        ("appo", {"rollout.num_initial": 1, "rollout.budget": 3}, None),  # a group of two branches
        ("tree_grpo", {"rollout.num_initial": 1, "rollout.budget": 2}, None),
    ],
)
def test_groups_of_one_rollout_are_refused(name, changes, field):
    config = replaced(QUICKSTART, "algorithm", name)
    for changed, value in changes.items():
        config = replaced(config, changed, value)
    found = list(algorithms.broken(config))
    assert len(found) == (field is not None)
    assert all(text.startswith(f"{field} = ") and "nothing would be learnt" in text for text in found)


def test_answers_need_a_cache():
    config = replaced(QUICKSTART, "tools.search.cache_fill", "answers.json")
    with pytest.raises(
        ConfigError, match=r"tools\.search\.cache_fill = 'answers\.json': .* tools\.search\.cache, which"
    ):
        config_io.check(config)
    config_io.check(replaced(config, "tools.search.cache", "answers.sqlite"))


@pytest.mark.parametrize(("every", "fits"), [(0, False), (15, False), (20, True)])
def test_the_best_checkpoints_are_those_that_are_judged_and_saved(every, fits):
    config = replaced(replaced(QUICKSTART, "keep_best_checkpoints", 2), "eval.every", every)
    found = [text for text in rules.broken(config) if "keep_best_checkpoints" in text]
    assert len(found) == (not fits)
    assert all(f"needs eval.every (given: {every}) to be a multiple of checkpoint_every = 10" in text for text in found)


def test_sets_whose_figures_mean_nothing_are_refused():
    sets = (EvalSetConfig("aime24", "a"), EvalSetConfig("aime24", "b"), EvalSetConfig("gsm8k", "c", samples=4))
    found = [text for text in rules.broken(replaced(QUICKSTART, "eval.sets", sets)) if text.startswith("eval.sets")]
    assert "a set is given twice (aime24, aime24, gsm8k)" in found[0]
    assert "gsm8k has samples = 4 at temperature = 0, where all samples are the same" in found[1]
    for temperature in (-1.0, 1e-30, 1e7):  # float32 has no such logits
        with pytest.raises(ConfigError, match="temperature"):
            config_io.check(replaced(QUICKSTART, "eval.sets", (EvalSetConfig("a", "a", temperature=temperature),)))
        with pytest.raises(ConfigError, match=r"--temperature .*: expected 0"):
            Evaluation("aime24", Path("a"), Path("out"), temperature=temperature)
    good = (EvalSetConfig("aime24", "a", samples=4, temperature=0.6), EvalSetConfig("gsm8k", "c"))
    config_io.check(replaced(QUICKSTART, "eval.sets", good))
