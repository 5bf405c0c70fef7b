"""Demonstrations of the world: with a dictionary and a calculator as tools, and once with the real tools."""

import ast
import dataclasses
import json
import operator
import re
from collections import defaultdict

import pytest

from appo_jax.config import PythonToolConfig, SearchToolConfig, ToolsConfig
from appo_jax.data import traces
from appo_jax.data.demonstrations import CannotDemonstrate, ToolKit, introduce
from appo_jax.data.demonstrations import demonstrate as data_demonstrate
from appo_jax.data.examples import SYSTEM_PROMPT
from appo_jax.data.source import Dataset
from appo_jax.data.sources import gsm8k
from appo_jax.data.world import generate
from appo_jax.errors import DataError
from appo_jax.text.tokenizer import load_tokenizer
from appo_jax.text.train_tokenizer import structure, train_tokenizer
from appo_jax.tools.build import build_executor
from appo_jax.tools.executor import ToolExecutor
from appo_jax.tools.format import Call, make_format
from appo_jax.tools.protocol import ToolExample
from appo_jax.tools.python import PythonTool
from appo_jax.tools.search import LocalSearch
from appo_jax.tools.wrap import FunctionTool
from appo_jax.types import Example

OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
CALL_PIECES = make_format("tags", [LocalSearch, PythonTool]).pieces
TAGS = [piece for piece in structure(CALL_PIECES) if piece.startswith("<")]


def calculator(code):
    def value(node):
        if isinstance(node, ast.BinOp):
            return OPERATIONS[type(node.op)](value(node.left), value(node.right))
        return node.value

    return str(value(ast.parse(code, mode="eval").body))


def tool(function, name, *skills, **attributes):
    made = FunctionTool(function, name)
    made.skills = skills
    for key, value in attributes.items():
        setattr(made, key, value)
    return made


def kit_of(*tools, call_format="tags"):
    """The tools with a real executor, whose threads only wait for work."""
    return ToolKit(ToolExecutor(tools, ToolsConfig(call_format=call_format)))


@pytest.fixture(scope="module")
def world():
    return generate(0)


@pytest.fixture(scope="module")
def pages(world):
    return {document.title: f"Page 1: {document.title}. {document.text}" for document in world.documents}


@pytest.fixture(scope="module")
def kit(pages):
    return kit_of(tool(pages.__getitem__, "search", "look_up"), tool(calculator, "python", "compute"))


def demonstrate(world, kit, seed=0, limit=None, questions=None):
    if questions is not None:
        world = dataclasses.replace(world, train=tuple(questions))
    script = traces.WorldScript(world, "", seed)
    return [script.demonstration(i, kit) for i in range(len(script))[:limit]]


@pytest.fixture(scope="module")
def demonstrations(world, kit):
    return demonstrate(world, kit)


def text_of(trace):
    return "".join(segment.text for segment in trace.segments)


def answer_of(trace):
    (boxed,) = re.findall(r"<answer>\\boxed\{ (.*?)\}</answer>$", text_of(trace))
    return boxed


def test_deterministic_and_limit_is_a_prefix(world, kit, demonstrations):
    assert demonstrate(world, kit, limit=40) == demonstrations[:40]
    assert demonstrate(world, kit, seed=1, limit=40) != demonstrations[:40]
    assert len(demonstrations) == traces.TRACES_PER_QUESTION * len(world.train)


def test_results_are_the_tools_own(pages, demonstrations):
    tools = {"search": pages.__getitem__, "python": calculator}
    calls = 0
    for trace in demonstrations:
        assert [segment.sampled for segment in trace.segments] == [True, False] * (len(trace.segments) // 2) + [True]
        for call, result in zip(trace.segments[:-1:2], trace.segments[1::2], strict=True):
            tool, argument = re.search(r"<(search|python)>([^<]*)</\1>$", call.text).groups()
            assert result.text == f" <result>\n{tools[tool](argument.strip())}\n</result>"
            calls += 1
    assert calls > len(demonstrations)


def test_without_wrong_turns_every_answer_is_right(world, kit, monkeypatch):
    rates = ["OVERSHOOT", "MENTAL", "DROP_TERM", "GUESS_EARLY", "GUESS_LATE", "UNFINISHED", "REVERSED"]
    for rate in (*rates, "WRONG_ENTITY", "OPEN_CALL"):
        monkeypatch.setattr(traces, rate, 0.0)
    monkeypatch.setattr(traces, "GIVE_UP", dict.fromkeys(traces.GIVE_UP, 0.0))
    for trace in demonstrate(world, kit, questions=(*world.held_out, *world.train[:1000])):
        assert answer_of(trace) == trace.example.golds[0]


def test_script_is_imperfect_but_never_hopeless(world, demonstrations):
    right = defaultdict(list)
    for index, trace in enumerate(demonstrations):
        solution = world.train[index % len(world.train)].solution
        sort = tuple(path[1:] for path in solution.paths), re.sub(r"\b\d+\b(?!})", "n", solution.expression or "")
        well_formed = all(
            text_of(trace).count(tag) == text_of(trace).count(tag.replace("<", "</")) for tag in TAGS[::2]
        )
        right[sort].append(well_formed and answer_of(trace) == trace.example.golds[0])
    for (paths, expression), outcomes in right.items():
        share = sum(outcomes) / len(outcomes)
        one_hop = not expression and len(paths[0]) == 1
        assert (0.7 < share < 0.95) if one_hop else (0.2 < share < 0.5), (paths, expression, share)
    assert 0.35 < sum(map(sum, right.values())) / len(demonstrations) < 0.45


def test_a_tool_that_finds_nothing_does_not_break_the_script(world):
    useless = kit_of(
        tool(lambda query: "No results.", "search", "look_up"), tool(lambda code: "Error", "python", "compute")
    )
    made = demonstrate(world, useless, questions=world.train[:300])
    assert all(answer_of(trace) != trace.example.golds[0] for trace in made)


def test_fits_the_quickstart_under_its_tokenizer(world, pages, demonstrations, tmp_path):
    texts = [*pages.values(), *(question.text for question in world.train), *map(text_of, demonstrations)]
    for name in ("a", "b"):
        train_tokenizer(texts, tmp_path / f"{name}.model", CALL_PIECES)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    tokenizer = load_tokenizer(tmp_path / "a.model")
    assert [name for name in pages if len(tokenizer.encode(f" {name}")) != 1] == []
    assert [tag for tag in (*TAGS, "\\boxed{", "\n", "7") if len(tokenizer.encode(tag)) != 1] == []
    for trace in demonstrations[:1500]:
        pieces = [tokenizer.encode(segment.text) for segment in trace.segments]
        assert tokenizer.decode([token for piece in pieces for token in piece]) == text_of(trace)
        assert sum(map(len, pieces)) < 128
        assert len(tokenizer.render_prompt("", trace.example.question)) <= 32


def test_tokenizer_can_write_what_it_never_saw(tmp_path):
    train_tokenizer(["one two three"], tmp_path / "small.model", CALL_PIECES, vocab_size=400)
    tokenizer = load_tokenizer(tmp_path / "small.model")
    for text in ("  λ→π\n\t<|user|></s> 12", "", "日本", "a  b\n\n"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not set(ids) & {0, 1, 2, 3, 4, 5, 6}  # pad, bos, eos, unk, control symbols


def test_real_tools_give_what_the_script_expects(world):
    config = ToolsConfig(
        python=PythonToolConfig(isolation="process", preload=("math",)), search=SearchToolConfig(top_k=1)
    )
    with build_executor(config, world.documents) as executor:
        kit = ToolKit(executor)
        for document in world.documents:
            assert document.text in kit.run("search", document.title)
        made = demonstrate(world, kit, questions=world.held_out[:150])
    right = sum(answer_of(trace) == trace.example.golds[0] for trace in made)
    assert 0.3 < right / len(made) < 0.55


def test_json_says_the_same_in_other_words(world, pages, demonstrations):
    """The script draws the same turns in every call format: only calls and results are written differently."""
    search = tool(pages.__getitem__, "search", "look_up", argument_name="query")
    python = tool(calculator, "python", "compute", argument_name="code")
    made = demonstrate(world, kit_of(search, python, call_format="json"), limit=500)
    for ours, theirs in zip(made, demonstrations, strict=False):
        text = text_of(ours)
        assert not any(tag in text for tag in CALL_PIECES)
        calls = [json.loads(call) for call in re.findall(r"<tool_call>\n(.*?)\n</tool_call>", text)]
        written = [(call["name"], *call["arguments"].items()) for call in calls]
        expected = re.findall(r"<(search|python)>([^<]*)</", text_of(theirs))
        assert written == [(name, ({"search": "query", "python": "code"}[name], text)) for name, text in expected]
        for result in (segment.text for segment in ours.segments if not segment.sampled):
            assert re.fullmatch(r"\n<tool_response>\n.*\n</tool_response>\n", result, re.DOTALL)
        assert answer_of(ours) == answer_of(theirs)


def dataset_of(world):
    script = traces.WorldScript(world, "Use {tools}", 0)
    return Dataset([q.example("Use {tools}") for q in world.train], [], None, script.demonstration, len(script))


def test_what_the_tools_cannot_do_is_left_out_and_counted(world, pages, caplog):
    small = dataclasses.replace(world, train=world.train[:200])
    search = tool(pages.__getitem__, "search", "look_up")
    with ToolExecutor([search], ToolsConfig()) as executor:
        made = data_demonstrate(dataset_of(small), executor)
    look_ups = [question for question in small.train if question.solution.expression is None]
    assert len(made) == 2 * len(look_ups) > 0
    assert {trace.example.question for trace in made} == {question.text for question in look_ups}
    assert f"{400 - len(made)} of 400 demonstrations are left out" in caplog.text
    assert "takes an arithmetic expression and returns its value (compute)" in caplog.text
    assert "python" not in "".join(map(text_of, made))
    assert all("<search>" in trace.example.system and "{tools}" not in trace.example.system for trace in made)


def test_a_run_whose_tools_demonstrate_nothing_is_refused(world):
    with (
        ToolExecutor([tool(str, "echo")], ToolsConfig()) as executor,
        pytest.raises(DataError, match=r"6000 of 6000 .* left out \(.*look_up.*\); change tools\.enabled"),
    ):
        data_demonstrate(dataset_of(world), executor)
    with (
        ToolExecutor([tool(str, "echo")], ToolsConfig()) as executor,
        pytest.raises(DataError, match=r"set sft\.steps to 0"),
    ):
        data_demonstrate(Dataset([], []), executor)


def test_a_call_that_fails_is_not_demonstrated(world, caplog):
    def broken(query):
        raise OSError("the index is gone")

    small = dataclasses.replace(world, train=[q for q in world.train if q.solution.expression is None][:5])
    with (
        ToolExecutor([tool(broken, "search", "look_up")], ToolsConfig()) as executor,
        pytest.raises(DataError) as raised,
    ):
        data_demonstrate(dataset_of(small), executor)
    assert "a call of search ended as unavailable" in str(raised.value)


@pytest.mark.parametrize("call_format", ["tags", "json"])
def test_a_tool_brings_demonstrations_of_its_own(world, pages, call_format):
    examples = [
        ToolExample("How many centimetres are 3 inches?", "3", answer=lambda result: result.split()[0]),
        ToolExample("And 10?", "10", answer="25.4", thought="I convert."),
    ]
    inches = tool(lambda text: f"{float(text) * 2.54:g} cm", "inches_to_cm", examples=examples, argument_name="inches")
    with ToolExecutor([inches], ToolsConfig(call_format=call_format)) as executor:
        first, second = data_demonstrate(Dataset([], []), executor)
        call, result, answer = first.segments
        thought, text = call.text.split("</think>")
        assert thought == "<think>I use inches_to_cm."
        assert executor.call_format.parse(call.text) == Call("inches_to_cm", "3")
        assert text == executor.call_format.render_call("inches_to_cm", "3")
        assert "7.62 cm" in result.text
        assert (result.sampled, answer.text) == (False, "<answer>\\boxed{7.62}</answer>")
        assert second.segments[0].text.startswith("<think>I convert.</think>")
        (told,) = data_demonstrate(dataset_of(world), executor, limit=1)
        assert told.segments == first.segments
        assert told.example.system == f"Use {executor.call_format.instructions()}"


@pytest.mark.parametrize(
    ("system", "alone"),
    [
        (
            SYSTEM_PROMPT,
            "Answer the question step by step. Put your reasoning between <think> and </think>. When you are done, write "
            "<answer> \\boxed{answer} </answer>.",
        ),
        (
            gsm8k.SYSTEM_PROMPT,
            "Solve the problem step by step. Put your reasoning between <think> and </think>. For every calculation write "
            "Python code that prints the result. When you are done, write <answer> \\boxed{number} </answer>.",
        ),
        ("Be brief.\n\nYour tools:\n{tools}\n\nAnswer in one word.", "Be brief.\n\nAnswer in one word."),
        ("Your tools:\n{tools}", ""),
        ("Mind the gap. {tools}", "Mind the gap. "),
        ("Be brief.", "Be brief."),
    ],
)
@pytest.mark.parametrize(("call_format", "tools"), [("chat", [str]), ("tags", []), ("json", []), ("chat", [])])
def test_a_prompt_without_instructions_does_not_announce_tools(system, alone, call_format, tools):
    notation = make_format(call_format, [tool(function, "echo") for function in tools])
    assert introduce(Example("a", "b?", ("c",), "qa", system), notation.instructions()).system == alone


@pytest.mark.parametrize("call_format", ["tags", "json"])
def test_a_prompt_with_instructions_is_as_it_always_was(call_format):
    """Policies were trained with these prompts."""
    instructions = make_format(call_format, [tool(str, "echo")]).instructions()
    assert instructions
    for system, before, after in (
        (
            SYSTEM_PROMPT,
            "Answer the question step by step. Put your reasoning between <think> and </think>. Your tools:\n",
            "\nWhen you are done, write <answer> \\boxed{answer} </answer>.",
        ),
        (
            gsm8k.SYSTEM_PROMPT,
            "Solve the problem step by step. Put your reasoning between <think> and </think>. For every calculation write "
            "Python code that prints the result. Your tools:\n",
            "\nWhen you are done, write <answer> \\boxed{number} </answer>.",
        ),
    ):
        example = introduce(Example("a", "b?", ("c",), "qa", system), instructions)
        assert example.system == before + instructions + after


def test_a_skill_of_ones_own_finds_its_tool_or_leaves_the_demonstration_out():
    translator = ToolKit(ToolExecutor([tool(str.upper, "shout", "translate")], ToolsConfig()))
    assert translator.tool_for("translate") == "shout"
    with pytest.raises(CannotDemonstrate, match=r"no tool of the run has this skill \(sing\)"):
        translator.tool_for("sing")
