"""Demonstrations of the world: with a dictionary and a calculator for tools, and once with the real ones."""

import ast
import operator
import re
from collections import defaultdict

import pytest

from appo_jax.config import PythonToolConfig, SearchToolConfig, ToolsConfig
from appo_jax.data import traces
from appo_jax.data.world import generate
from appo_jax.text.tokenizer import load_tokenizer
from appo_jax.text.train_tokenizer import TAGS, train_tokenizer
from appo_jax.tools.build import build_executor

OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def calculator(code):
    def value(node):
        if isinstance(node, ast.BinOp):
            return OPERATIONS[type(node.op)](value(node.left), value(node.right))
        return node.value

    return str(value(ast.parse(code, mode="eval").body))


@pytest.fixture(scope="module")
def world():
    return generate(0)


@pytest.fixture(scope="module")
def pages(world):
    return {document.title: f"Page 1: {document.title}. {document.text}" for document in world.documents}


def demonstrate(world, pages, seed=0, limit=None, questions=None, python=calculator):
    return traces.demonstrate(questions or world.train, "", list(pages), pages.__getitem__, python, seed, limit)


@pytest.fixture(scope="module")
def demonstrations(world, pages):
    return demonstrate(world, pages)


def text_of(trace):
    return "".join(segment.text for segment in trace.segments)


def answer_of(trace):
    (boxed,) = re.findall(r"<answer>\\boxed\{ (.*?)\}</answer>$", text_of(trace))
    return boxed


def test_deterministic_and_limit_is_a_prefix(world, pages, demonstrations):
    assert demonstrate(world, pages, limit=40) == demonstrations[:40]
    assert demonstrate(world, pages, seed=1, limit=40) != demonstrations[:40]
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


def test_without_wrong_turns_every_answer_is_right(world, pages, monkeypatch):
    rates = ["OVERSHOOT", "MENTAL", "DROP_TERM", "GUESS_EARLY", "GUESS_LATE", "UNFINISHED", "REVERSED"]
    for rate in (*rates, "WRONG_ENTITY", "OPEN_CALL"):
        monkeypatch.setattr(traces, rate, 0.0)
    monkeypatch.setattr(traces, "GIVE_UP", dict.fromkeys(traces.GIVE_UP, 0.0))
    for trace in demonstrate(world, pages, questions=(*world.held_out, *world.train[:1000])):
        assert answer_of(trace) == trace.example.golds[0]


def test_script_is_imperfect_but_never_hopeless(world, demonstrations):
    right = defaultdict(list)
    for index, trace in enumerate(demonstrations):
        plan = world.train[index % len(world.train)].plan
        sort = tuple(path[1:] for path in plan.paths), re.sub(r"\b\d+\b(?!})", "n", plan.expression or "")
        well_formed = all(
            text_of(trace).count(tag) == text_of(trace).count(tag.replace("<", "</")) for tag in TAGS[::2]
        )
        right[sort].append(well_formed and answer_of(trace) == trace.example.golds[0])
    for (paths, expression), outcomes in right.items():
        share = sum(outcomes) / len(outcomes)
        one_hop = not expression and len(paths[0]) == 1
        assert (0.7 < share < 0.95) if one_hop else (0.2 < share < 0.5), (paths, expression, share)
    assert 0.35 < sum(map(sum, right.values())) / len(demonstrations) < 0.45


def test_a_failing_tool_does_not_break_the_script(world):
    made = traces.demonstrate(world.train[:300], "", ["Nobody"], lambda query: "No results.", lambda code: "Error", 0)
    assert all(answer_of(trace) != trace.example.golds[0] for trace in made)


def test_fits_the_quickstart_under_its_tokenizer(world, pages, demonstrations, tmp_path):
    texts = [*pages.values(), *(question.text for question in world.train), *map(text_of, demonstrations)]
    for name in ("a", "b"):
        train_tokenizer(texts, tmp_path / f"{name}.model")
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
    train_tokenizer(["one two three"], tmp_path / "small.model", vocab_size=400)
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

        def tool(name):
            start = executor.start()
            return lambda argument: executor.submit(start, f"<{name}>{argument}</{name}>").result().result

        search, python = tool("search"), tool("python")
        for document in world.documents:
            assert document.text in search(document.title)
        names = [document.title for document in world.documents]
        made = traces.demonstrate(world.held_out, "", names, search, python, 0, limit=150)
    right = sum(answer_of(trace) == trace.example.golds[0] for trace in made)
    assert 0.3 < right / len(made) < 0.55
