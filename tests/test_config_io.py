"""Configs in files: a written config is read back equal, and errors name what is wrong."""

import collections.abc
import dataclasses
import json
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appo_jax.config import Architecture, BranchingConfig, Config, PolicyConfig, RolloutConfig, RopeScaling, ToolsConfig
from appo_jax.config_io import diff_configs, flatten, load_config, save_config
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
        ("c.yaml", "", "ends in .py or .json"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "nothing.py")


def test_a_list_in_a_python_file_becomes_the_declared_tuple(tmp_path):
    (tmp_path / "c.py").write_text(IMPORT + "config = Config(tools=ToolsConfig(enabled=['python']))")
    assert load_config(tmp_path / "c.py").tools == ToolsConfig(enabled=("python",))


def test_what_json_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"rollout\.max_seconds"):
        save_config(Config(rollout=RolloutConfig(max_seconds=float("inf"))), tmp_path / "c.json")


def test_reading_configs_needs_no_jax():
    code = "import sys, appo_jax.cli, appo_jax.config_io; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
