"""Configs in files: a written config is read back equal, and errors name what is wrong."""

import collections.abc
import dataclasses
import json
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appo_jax.config import (
    Architecture,
    BranchingConfig,
    Config,
    LoRAConfig,
    PolicyConfig,
    RolloutConfig,
    RopeScaling,
    ToolsConfig,
)
from appo_jax.config_io import PATHS, check, diff_configs, flatten, load_config, save_config, with_fields
from appo_jax.errors import ConfigError

ROOT = Path(__file__).parents[1]


def configs(cls=Config):
    """Any instance of a config dataclass: every field drawn from its declared type."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return st.builds(cls, **{field.name: values(hints[field.name]) for field in dataclasses.fields(cls)})


def range_of(hint):
    """Lower and upper end of a bounded number, and whether each is excluded."""
    bounds = [bound for part in hint.__metadata__ for bound in (part if hasattr(part, "__iter__") else [part])]
    ends = {kind: value for bound in bounds for kind, value in dataclasses.asdict(bound).items() if value is not None}
    limit = 2**53 if hint.__origin__ is int else None
    low, high = ends.get("gt", ends.get("ge")), ends.get("lt", ends.get("le", limit))
    return low, high, "gt" in ends, "lt" in ends


def values(hint):
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return configs(hint)
    if origin is typing.Annotated and parts[0] in (int, float):
        low, high, open_low, open_high = range_of(hint)
        if parts[0] is int:
            return st.integers(low + open_low, high - open_high)
        return st.floats(low, high, exclude_min=open_low, exclude_max=open_high, allow_infinity=False)
    if origin is typing.Annotated and typing.get_origin(parts[0]) is tuple:
        (length,) = hint.__metadata__
        return st.lists(values(typing.get_args(parts[0])[0]), min_size=length.min_length, max_size=3).map(tuple)
    if origin is typing.Annotated:  # a union, and how a file tells its kinds apart
        return values(parts[0])
    if origin is typing.Literal:
        return st.sampled_from(parts)
    if origin is tuple:
        return st.lists(values(parts[0]), max_size=3).map(tuple)
    if origin is collections.abc.Mapping:
        item = st.one_of(
            st.booleans(),
            st.integers(-(2**53), 2**53),
            st.floats(allow_infinity=False, allow_nan=False),
            st.text(max_size=8),
        )
        return st.dictionaries(st.text(max_size=8), item, max_size=3)
    if parts:
        return st.one_of(*(st.none() if part is type(None) else values(part) for part in parts))
    return {
        str: st.text(max_size=8),
        bool: st.booleans(),
    }[hint]


@settings(max_examples=60, deadline=None)
@given(config=configs())
def test_json_keeps_every_config_exactly(config, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "config.json"
    save_config(config, path)
    assert load_config(path) == config
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_configs_of_the_project_survive_the_run_directory(path, tmp_path):
    config = load_config(path)
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == config


def test_differences_are_dotted_fields():
    a = Config(seed=1, policy=PolicyConfig(path="here"))
    architecture = Architecture(10, 8, 1, 2, 1, 4, 16, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192))
    b = Config(seed=2, branching=BranchingConfig(tau=16.0), policy=PolicyConfig(architecture=architecture))
    assert diff_configs(a, a) == []
    assert {"seed", "branching.tau", "policy.path", "policy.architecture.rope_scaling.factor"} <= set(
        diff_configs(a, b)
    )
    assert "steps" not in diff_configs(a, b)
    assert flatten(b)["policy.architecture.width"] == 8


def edited(tmp_path, **changes):
    save_config(Config(policy=PolicyConfig(architecture=Architecture(10, 8, 1, 2, 1, 4, 16))), tmp_path / "c.json")
    record = json.loads((tmp_path / "c.json").read_text())
    for name, value in changes.items():
        *groups, field = name.split("__")
        node = record
        for group in groups:
            node = node[group]
        if value is ...:
            del node[field]
        else:
            node[field] = value
    (tmp_path / "c.json").write_text(json.dumps(record))
    return tmp_path / "c.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"branching__num_branch_point": 2}, "branching.num_branch_point is not .* mean 'num_branch_points'"),
        ({"branchin": {}}, "branchin is not a field of the config; did you mean 'branching'"),
        ({"policy__architecture__widht": 2}, "policy.architecture.widht is not .* mean 'width'"),
        ({"data__zzz": 2}, "data.zzz is not a field of the config; expected one of source, path, "),
        ({"policy__architecture__width": ...}, "policy.architecture.width is missing"),
        ({"steps": "3"}, "steps = '3': should be a valid integer"),
        ({"steps": True}, "steps = True: should be a valid integer"),
        ({"steps": 2.5}, "steps = 2.5: .* integer"),
        ({"loss__aggregation": "sum"}, "loss.aggregation = 'sum': should be 'paper', 'token_mean'"),
        ({"tools__enabled": ["python", 3]}, "tools.enabled.1 = 3: should be a valid string"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        load_config(edited(tmp_path, **change))


def test_all_problems_are_listed_at_once(tmp_path):
    with pytest.raises(ConfigError) as error:
        load_config(edited(tmp_path, steps="3", seed=None, loss__clip=1))
    assert [line.split(": ")[1] for line in str(error.value).splitlines()] == [
        "seed = None",
        "steps = '3'",
        "loss.clip is not a field of the config; did you mean 'clip_low'?",
    ]


IMPORT = "from appo_jax.config import *\n"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.py", "x = 1", "expected a module-level `config = Config.*found no `config`"),
        ("c.py", "config = 3", "found `config` of type int"),
        ("c.py", "\n\nx = (", "c.py:3: SyntaxError"),
        ("c.py", "\nx = undefined", "c.py:2: NameError: name 'undefined'"),
        (
            "c.py",
            IMPORT + "config = Config(branching=BranchingConfig(num_branch=2))",
            "c.py:2: .*mean 'num_branch_points'",
        ),
        ("c.py", IMPORT + "config = Config(steps='3')", "steps = '3': should be a valid integer"),
        ("c.py", "import sys\nsys.exit(0)", "c.py:2: SystemExit: 0"),
        ("c.json", "{", "not valid JSON"),
        ("c.json", "[]", "should be an object"),
        (
            "c.json",
            '{"architectures": ["Qwen3ForCausalLM"], "hidden_size": 8}',
            r"of a model's weights, .*policy\.path = ",
        ),
        ("c.json", '{"model_type": "llama"}', "is the config of a model's weights, not of a run"),
        ("c.py", "x = 1\0", r"c\.py: SyntaxError: source code (string )?cannot contain null bytes"),
        ("c.py", "\nexec('x = (')", "c.py:2: SyntaxError: '.' was never closed$"),
        (
            "c.py",
            IMPORT + "import numpy\nconfig = Config(steps=numpy.int64(3))",
            r"c\.py: steps = .*3.*: expected a plain number, .* not a value of type int64$",
        ),
        ("c.yaml", "", "ends in .py or .json"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_the_file_of_a_mistake_is_named_if_the_config_imports_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_helper.py").write_text("\n\nx = (\n")
    (tmp_path / "c.py").write_text("import my_helper\n")
    with pytest.raises(
        ConfigError, match=r"^\S+my_helper\.py:3: SyntaxError: .* never closed \(imported by \S+c\.py\)$"
    ):
        load_config(tmp_path / "c.py")


def test_a_missing_file_is_named(tmp_path):
    for name in ("nothing.py", "nothing.json"):
        with pytest.raises(ConfigError, match=f"{name}: no such file"):
            load_config(tmp_path / name)
    with pytest.raises(ConfigError, match=r"nothing: expected a config file, .* or the directory of a run"):
        load_config(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"config\.json: no such file; give the directory of a run"):
        load_config(tmp_path)


def test_the_directory_of_a_run_stands_for_its_config(tmp_path):
    config = Config(steps=7, run_dir=str(tmp_path))
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path) == config


def test_a_field_of_a_part_that_is_absent_is_told_from_an_unknown_field():
    with pytest.raises(ConfigError, match=r"^policy\.lora\.rank: the config has no policy\.lora; add it to the config"):
        with_fields(Config(), {"policy.lora.rank": 4})
    for name in ("policy.lroa.rank", "steps.rank"):
        with pytest.raises(ConfigError, match=f"^{name} is not a field of the config"):
            with_fields(Config(), {name: 4})
    assert with_fields(Config(), {"policy.lora": {}, "policy.lora.rank": 4}).policy.lora == LoRAConfig(rank=4)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
@pytest.mark.parametrize("name", ["c.py", "c.json"])
def test_a_file_that_may_not_be_read_is_a_mistake_in_the_command(tmp_path, name):
    (tmp_path / name).write_text("{}")
    (tmp_path / name).chmod(0)
    code = f"""
import os
from appo_jax.cli import main
os.setuid(65533)
raise SystemExit(main(["train", "--config", {str(tmp_path / name)!r}]))
"""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == "root" and folder.is_relative_to("/tmp/"):
            folder.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert f"{name}: Permission denied; give this user permission to read it" in done.stderr


def test_a_list_in_a_python_file_becomes_the_declared_tuple(tmp_path):
    (tmp_path / "c.py").write_text(IMPORT + "config = Config(tools=ToolsConfig(enabled=['python']))")
    assert load_config(tmp_path / "c.py").tools == ToolsConfig(enabled=("python",))


# The fields that are texts, and no paths.
TEXTS = {
    "algorithm", "source", "system_prompt", "question", "golds", "id", "kind", "system", "extra", "enabled", "preload",
    "modules", "url", "function", "terms", "model", "key_variable", "set", "family",
}  # fmt: skip


def texts(hint):
    """The names of the fields that hold texts, or tuples of them, in a config and in all its parts."""
    if dataclasses.is_dataclass(hint):
        for name, declared in typing.get_type_hints(hint).items():
            parts = {declared, *typing.get_args(declared)}
            yield from [name] if str in parts and typing.get_origin(declared) is not collections.abc.Mapping else []
            yield from texts(declared)
    for part in typing.get_args(hint):
        yield from texts(part)


def test_every_text_of_a_config_is_a_path_or_is_none():
    found = set(texts(Config))
    assert found - TEXTS == set(PATHS) - {"out", "cold_starts"}  # which a study and a sweep have
    assert found >= TEXTS - {"kind"}


def test_a_tilde_at_the_beginning_of_a_path_is_the_users_home(monkeypatch):
    """Once, run_dir="~/r" made a folder named `~`, and policy.path="~/m" was not found."""
    monkeypatch.setenv("HOME", "/home/u")
    quickstart = load_config(ROOT / "configs/quickstart.py")
    paths = {
        "run_dir": "r", "init_from": "i", "policy.path": "m", "policy.tokenizer": "t", "data.path": "d", "data.held_out": "h",
        "tools.search.cache": "c", "tools.search.cache_fill": "f",
    }  # fmt: skip
    fields = {name: f"~/{value}" for name, value in paths.items()}
    several = {"data.evaluation": ["~/a", "b"], "sft.traces": ["~"], "eval.sets": [{"set": "aime24", "data": "~/e"}]}
    judge = {"reward.judge": {"url": "http://h", "model": "~/model", "cache": "~/j"}}
    found = check(with_fields(quickstart, fields | several | judge))
    assert {name: flatten(found)[name] for name in paths} == {name: f"/home/u/{value}" for name, value in paths.items()}
    assert (found.data.evaluation, found.sft.traces) == (("/home/u/a", "b"), ("/home/u",))
    assert found.eval.sets[0].data == "/home/u/e"
    assert (found.reward.judge.cache, found.reward.judge.model) == ("/home/u/j", "~/model")
    parts = [{"source": "files", "path": "~/p", "held_out": "x/~"}]
    mixture = check(with_fields(quickstart, {"data.source": "mixture", "data.path": None, "data.mixture": parts}))
    assert (mixture.data.mixture[0].path, mixture.data.mixture[0].held_out) == ("/home/u/p", "x/~")
    assert check(with_fields(quickstart, {"tools.search.corpus": "~/w"})).tools.search.corpus == "/home/u/w"


def test_what_json_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"rollout\.max_seconds"):
        save_config(Config(rollout=RolloutConfig(max_seconds=float("inf"))), tmp_path / "c.json")


def test_reading_configs_needs_no_jax():
    code = "import sys, appo_jax.cli, appo_jax.config_io; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
