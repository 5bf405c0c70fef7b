from pathlib import Path

import pytest

from appo_jax.config import RewardConfig
from appo_jax.errors import ConfigError
from appo_jax.reward import Response
from appo_jax.reward import make_reward as make
from appo_jax.tools.format import TagFormat
from appo_jax.tools.protocol import ToolSpec
from appo_jax.types import Segment, StopReason

FORMAT = TagFormat((ToolSpec("python"), ToolSpec("search")))

TEXT = r"<think> </think> <answer> \boxed{-5} </answer>"
RESPONSE = Response((Segment(TEXT, True),), ("5",), "math", frozenset(), StopReason.ANSWERED)


# A term that goes wrong, and what is told of it.
TERMS = {
    "nonsense": "returned 'good'",
    "none": "returned None",
    "nan": "returned nan",
    "huge": "returned -1e+31",
    "listed": "returned [1.0]",
    "fails": "raised ZeroDivisionError",
    "format": "has the name of a part of reward.function = 'robust'; give it another name",
}


def make_reward(name, bonus, call_format, *terms):
    return make(RewardConfig(name, tool_bonus=bonus, terms=terms), call_format, Path("unused"))


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    source = """
        from appo_jax.types import RewardResult
        def length(response): return RewardResult(float(len(response.text)), False)
        def tenth(response): return len(response.text) / 10
        def nonsense(response): return "good"
        def none(response): return None
        def nan(response): return float("nan")
        def huge(response): return -1e31
        def listed(response): return [1.0]
        def fails(response): return 1 / 0
        def format(response): return 1.0
        CONSTANT = 3
    """
    (tmp_path / "own_rewards.py").write_text("\n".join(line.strip() for line in source.splitlines()))
    (tmp_path / "my_broken.py").write_text("def f(response):\n    return\nNone.missing\n")
    (tmp_path / "my_syntax.py").write_text("def f(response:\n")
    (tmp_path / "my_script.py").write_text("raise SystemExit(2)\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_robust_and_official_by_name():
    assert make_reward("robust", 0.1, FORMAT)(RESPONSE).reward == 0
    assert make_reward("official", 0.1, FORMAT)(RESPONSE).reward == 1  # its "-5" equals "5"


@pytest.mark.parametrize("name", ["robust", "official"])
def test_bonus_is_the_given_one(name):
    segments = (
        Segment("<think> </think> <search> q </search>", True),
        Segment("<result> </result>", False),
        Segment("<python> 1 </python>", True),
        Segment("<result> </result>", False),
        Segment(r"<answer> \boxed{5} </answer>", True),
    )
    tools = frozenset({"python", "search"})
    given = Response(segments, ("5",), "math", tools, StopReason.ANSWERED)
    assert make_reward(name, 0.5, FORMAT)(given).reward == 1.5


@pytest.mark.usefixtures("user_module")
def test_user_function():
    assert make_reward("own_rewards:length", 0.1, FORMAT)(RESPONSE).reward == len(TEXT)


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("robst", "expected robust, official, judge or package.module:function"),
        ("own_rewards:", "expected robust"),
        (":length", "expected robust"),
        ("no_such_module:length", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("own_rewards:no_such_function", "module 'own_rewards' has no attribute 'no_such_function'"),
        ("my_broken:f", "'NoneType' object has no attribute 'missing'"),
        ("my_syntax:f", "SyntaxError: .*my_syntax.py, line 1"),
        ("my_script:f", "SystemExit: 2"),
        ("own_rewards:CONSTANT", "is a int, not a function"),
    ],
)
def test_bad_names_are_config_errors(name, complaint):
    with pytest.raises(ConfigError, match=complaint) as caught:
        make_reward(name, 0.1, FORMAT)
    assert f"reward.function = {name!r}" in str(caught.value)


@pytest.mark.usefixtures("user_module")
def test_terms_are_added_and_stand_among_the_parts():
    judgement = make_reward("robust", 0.1, FORMAT, "own_rewards:tenth")(RESPONSE)
    assert judgement.reward == judgement.detail["tenth"] == len(TEXT) / 10
    assert judgement.detail["format"] == 1
    for name, problem in TERMS.items():
        found = make_reward("robust", 0.1, FORMAT, "own_rewards:tenth", f"own_rewards:{name}")(RESPONSE)
        assert f"reward.terms = 'own_rewards:{name}' {problem}" in found.error
    with pytest.raises(ConfigError, match=r"reward\.terms = 'own_rewards:absent' .* has no attribute 'absent'"):
        make_reward("robust", 0.1, FORMAT, "own_rewards:absent")
