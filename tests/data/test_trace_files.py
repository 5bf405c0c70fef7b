"""Published traces: every format gives the same trace, masked token by token; unusable records are reported."""

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
from test_pipeline import Letters

from appo_jax.config import ToolsConfig
from appo_jax.data.demonstrations import LeftOut
from appo_jax.data.examples import SYSTEM_PROMPT
from appo_jax.data.pipeline import encode_trace
from appo_jax.data.trace_files import read_traces
from appo_jax.errors import DataError
from appo_jax.rollout.tool_results import ToolResults
from appo_jax.tools.executor import ToolExecutor
from appo_jax.tools.wrap import FunctionTool
from appo_jax.types import Segment

WHOLE = "T<py>1+1</py><result>\n2\n</result>U<py>2+2</py> <result>4</result>\nA"
ANSWERED = {"role": "assistant", "content": "A"}


def called(text, argument):
    function = {"name": "py", "arguments": json.dumps({"code": argument})}
    return {"role": "assistant", "content": text, "tool_calls": [{"type": "function", "function": function}]}


SPELLINGS = {
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": WHOLE}],
        "system": "S",
    },
    "llama_factory": {
        "conversations": [
            {"from": "human", "value": "Q"},
            {"from": "gpt", "value": "T"},
            {"from": "function_call", "value": '{"name": "py", "arguments": {"code": "1+1"}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "U"},
            {"from": "function_call", "value": '{"name": "py", "arguments": {"code": "2+2"}}'},
            {"from": "observation", "value": "4"},
            {"from": "gpt", "value": "A"},
        ],
        "system": "S",
    },
    "instruction": {"instruction": "Q", "input": "", "output": WHOLE, "system": "S", "history": []},
    "messages": {
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "Q"},
            called("T", "1+1"),
            {"role": "tool", "content": "2"},
            called("U", "2+2"),
            {"role": "tool", "content": "4"},
            ANSWERED,
        ]
    },
    "messages_with_calls_in_the_text": {
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": 'T<tool_call>{"name": "py", "arguments": {"code": "1+1"}}</tool_call>'},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "U<py>2+2</py>"},
            {"role": "tool", "content": "4"},
            ANSWERED,
        ]
    },
}
SPELLINGS["hermes"] = {  # each result keeps the tags of its template
    "conversations": [
        {"from": "system", "value": "S"},
        {"from": "human", "value": "Q"},
        {"from": "gpt", "value": 'T<tool_call>\n{"name": "py", "arguments": {"code": "1+1"}}\n</tool_call>'},
        {"from": "tool", "value": "<tool_response>\n2\n</tool_response>"},
        {"from": "gpt", "value": 'U<tool_call>\n{"name": "py", "arguments": {"code": "2+2"}}\n</tool_call>'},
        {"from": "function_response", "value": "<result>4</result>\n"},
        {"from": "gpt", "value": "A"},
    ]
}
SPELLINGS["results_in_user_turns"] = {
    "messages": [
        {"role": "developer", "content": [{"type": "text", "text": "S"}]},
        {"role": "user", "content": [{"type": "text", "text": "Q"}]},
        {"role": "assistant", "content": "T<py>1+1</py>"},
        {"role": "user", "content": "<tool_response>\n2\n</tool_response>"},
        {"role": "assistant", "content": "U<py>2+2</py>"},
        {"role": "user", "content": "<result>4</result>"},
        ANSWERED,
    ]
}
SPELLINGS["functions"] = {  # OpenAI's older interface
    "messages": [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "T", "function_call": {"name": "py", "arguments": '{"code": "1+1"}'}},
        {"role": "function", "name": "py", "content": "2"},
        {"role": "assistant", "content": "U", "function_call": {"name": "py", "arguments": '{"code": "2+2"}'}},
        {"role": "function", "name": "py", "content": "4"},
        ANSWERED,
    ]
}
# S < Q > T<py>1+1</py> | _<result>\n2\n</result> | U<py>2+2</py> | _<result>\n4\n</result> | A eos
TAGS = [
    *[83, 2, 81, 3],
    *[84, 60, 112, 121, 62, 49, 43, 49, 60, 47, 112, 121, 62],
    *[32, 60, 114, 101, 115, 117, 108, 116, 62, 10, 50, 10, 60, 47, 114, 101, 115, 117, 108, 116, 62],
    *[85, 60, 112, 121, 62, 50, 43, 50, 60, 47, 112, 121, 62],
    *[32, 60, 114, 101, 115, 117, 108, 116, 62, 10, 52, 10, 60, 47, 114, 101, 115, 117, 108, 116, 62],
    *[65, 1],
]
TAGS_TRAINED = [4, 17, 38, 51, 72, 74]  # from, to; from, to; …
# S < Q > T<tool_call>\n{"name": "py", "arguments": {"code": "1+1"}}\n</tool_call> | \n<tool_response>\n2\n</tool_response>\n | …
CALL_HEAD = [
    60,
    116,
    111,
    111,
    108,
    95,
    99,
    97,
    108,
    108,
    62,
    10,
    123,
    34,
    110,
    97,
    109,
    101,
    34,
    58,
    32,
    34,
    112,
    121,
    34,
]
CALL_HEAD += [
    44,
    32,
    34,
    97,
    114,
    103,
    117,
    109,
    101,
    110,
    116,
    115,
    34,
    58,
    32,
    123,
    34,
    99,
    111,
    100,
    101,
    34,
    58,
    32,
    34,
]
CALL_TAIL = [34, 125, 125, 10, 60, 47, 116, 111, 111, 108, 95, 99, 97, 108, 108, 62]
RESPONSE_HEAD = [10, 60, 116, 111, 111, 108, 95, 114, 101, 115, 112, 111, 110, 115, 101, 62, 10]
RESPONSE_TAIL = [10, 60, 47, 116, 111, 111, 108, 95, 114, 101, 115, 112, 111, 110, 115, 101, 62, 10]
JSON = [
    *[83, 2, 81, 3],
    *[84, *CALL_HEAD, 49, 43, 49, *CALL_TAIL],
    *[*RESPONSE_HEAD, 50, *RESPONSE_TAIL],
    *[85, *CALL_HEAD, 50, 43, 50, *CALL_TAIL],
    *[*RESPONSE_HEAD, 52, *RESPONSE_TAIL],
    *[65, 1],
]
JSON_TRAINED = [4, 74, 110, 180, 216, 218]
EXPECTED = {"tags": (TAGS, TAGS_TRAINED), "json": (JSON, JSON_TRAINED)}


@pytest.fixture(scope="module", params=["tags", "json"])
def call_format(request):
    tool = FunctionTool(str, "py")
    tool.argument_name = "code"
    with ToolExecutor([tool], ToolsConfig(call_format=request.param)) as executor:
        yield request.param, executor.call_format


def read(tmp_path: Path, call_format, *records, system_prompt=None):
    file = tmp_path / "traces.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    left_out = LeftOut()
    return read_traces([file], call_format, system_prompt, left_out), left_out


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_three_turns_in_every_spelling_are_these_tokens_under_this_mask(tmp_path, call_format, spelling):
    name, notation = call_format
    (trace,), left_out = read(tmp_path, notation, SPELLINGS[spelling])
    results = ToolResults(Letters(), notation, 100)
    tokens, sampled = encode_trace(trace, Letters(), results.encode_rendered)
    expected, trained = EXPECTED[name]
    assert tokens.tolist() == expected
    edges = np.flatnonzero(np.diff(sampled)) + 1
    assert [*edges.tolist(), len(tokens)] == trained
    assert left_out.total == 0


def test_a_long_result_is_cut_as_in_a_rollout(tmp_path, call_format):
    _, notation = call_format
    record = SPELLINGS["messages"] | {}
    record["messages"] = [*record["messages"][:3], {"role": "tool", "content": "x" * 500}, ANSWERED]
    (trace,), _ = read(tmp_path, notation, record)
    results = ToolResults(Letters(), notation, 60)
    tokens, sampled = encode_trace(trace, Letters(), results.encode_rendered)
    assert int((~sampled).sum()) == 4 + 60  # the prompt and the result
    assert tokens[~sampled][4:].tolist() == results.encode("x" * 500)


def conversation(text, **more):
    return {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": text}], **more}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (conversation("<py>1</py>"), "a call has no result"),
        (conversation('<tool_call>{"name": "py", "arguments": {"code": "1"}}</tool_call>'), "a call has no result"),
        (conversation("T<result>1</result>A"), "a result follows no call"),
        (conversation("1</py><result>1</result>A"), "a call is malformed"),
        (conversation("<rm>1</rm><result>1</result>A"), "it calls 'rm', which is no tool of the run"),
        (conversation("<py>1</py><result>1</result>"), "the policy writes nothing at its end"),
        (conversation("<py>1</py><result>1</result><result>2</result>A"), "a result follows no call"),
        (conversation(""), "the policy writes nothing at its end"),
        (conversation("<py>1</py>U<py>2</py><result>2</result>A"), "a call has no result"),
        (conversation("<py>1</py><result>1</result>U<py>2</py>A"), "a call has no result"),
        (conversation("U</tool_call>A"), "a call has no result"),
        (conversation("T<rm>1</rm>"), "it ends in </rm>, as if it called a tool that the run does not have"),
        (conversation("A") | {"conversations": [{"from": "human", "value": " "}, ANSWERED]}, "the question is blank"),
        ({"conversations": []}, "expected one question, at the beginning; it has 0"),
        ({"conversations": [{"from": "gpt", "value": "A"}, {"from": "human", "value": "Q"}]}, "expected one question"),
        ({"instruction": "Q", "output": "A", "history": [["P", "B"]]}, "at the beginning; it has 2"),
        ({"messages": [{"role": "judge", "content": "x"}]}, "the role 'judge' is unknown"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a message's content must be text"),
        ({"text": "T"}, "it has no field 'conversations'"),
        ([1], "expected an object, got list"),
        ({"messages": ["Q"]}, "a message must be an object, not str"),
        ({"messages": None, "conversations": None}, "expected one question, at the beginning; it has 0"),
        ({"messages": [{"role": "user", "content": "Q"}, called("T", "1"), ANSWERED]}, "a call has no result"),
    ],
)
def test_what_cannot_be_used_is_left_out_with_its_reason(tmp_path, record, reason):
    with ToolExecutor([FunctionTool(str, "py")], ToolsConfig()) as executor:
        traces, left_out = read(tmp_path, executor.call_format, record, conversation("A"))
    assert [trace.segments for trace in traces] == [(Segment("A", True),)]
    ((found, told),) = left_out.to_json().items()
    assert reason in found
    assert told == {"count": 1, "first": ["traces-1"]}


RETOOL = "I compute.\n<code>\n```python\nprint(6*7)\n```\n</code>\n<interpreter>\n42\n</interpreter>\n<answer>\\boxed{42}</answer>"
SEARCH_R1 = (
    "<think>T</think>\n<search> who </search>\n\n<information>Doc 1: him</information>\n\n<answer> him </answer>"
)


def runs_code(**attributes):
    tool = FunctionTool(str, attributes.pop("name"))
    vars(tool).update(attributes)
    return ToolExecutor([tool], ToolsConfig())


def test_results_of_retool_and_search_r1_are_not_the_policys_text(tmp_path):
    with runs_code(name="py", skills=("run_python",)) as executor:
        (trace,), _ = read(tmp_path, executor.call_format, conversation(RETOOL))
    assert trace.segments == (
        Segment("I compute.\n<py>\n```python\nprint(6*7)\n```\n</py>", True),
        Segment(" <result>\n42\n</result>", False),
        Segment("<answer>\\boxed{42}</answer>", True),
    )
    with runs_code(name="search") as executor:
        (trace,), _ = read(tmp_path, executor.call_format, conversation(SEARCH_R1))
    assert trace.segments == (
        Segment("<think>T</think>\n<search> who </search>", True),
        Segment(" <result>\nDoc 1: him\n</result>", False),
        Segment("\n<answer> him </answer>", True),
    )


R1_SEARCHER = (
    "<think>T\n<|begin_of_query|> who <|end_of_query|>\n\n<|begin_of_documents|>\n(1) him\n<|end_of_documents|>\n\nU</think>"
    "\n<answer>\\boxed{him}</answer>"
)
SEARCH_O1 = (
    "<think>T\n\n<|begin_search_query|>who<|end_search_query|>\n\n<|begin_search_result|>him<|end_search_result|>\n\nU</think>"
    "\n\\boxed{him}"
)


@pytest.mark.parametrize("name", ["search", "wiki"])  # the run's search tool may have another name
def test_marks_of_r1_searcher_and_search_o1_are_calls_of_search_and_results(tmp_path, name):
    with runs_code(name=name, skills=("look_up",)) as executor:
        traces, left_out = read(tmp_path, executor.call_format, conversation(R1_SEARCHER), conversation(SEARCH_O1))
    assert [trace.segments for trace in traces] == [
        (
            Segment(f"<think>T\n<{name}> who </{name}>", True),
            Segment(" <result>\n(1) him\n</result>", False),
            Segment("\nU</think>\n<answer>\\boxed{him}</answer>", True),
        ),
        (
            Segment(f"<think>T\n\n<{name}>who</{name}>", True),
            Segment(" <result>\nhim\n</result>", False),
            Segment("\nU</think>\n\\boxed{him}", True),
        ),
    ]
    assert left_out.total == 0


REACT = "Thought: I compute.\nAction: python\nAction Input: 2+2\nObservation: 4\nFinal Answer: 4"


@pytest.mark.parametrize(
    ("text", "skills", "reason"),
    [
        (R1_SEARCHER, (), "it calls 'search', which is no tool of the run"),
        (SEARCH_O1, (), "it calls 'search', which is no tool of the run"),
        (
            SEARCH_O1.replace("_search_", "_click_"),
            (),
            "a result stands in the policy's text, after <|begin_click_result|>",
        ),
        ("T\n```python\n2+2\n```\nOutput:\n4\nA", (), "a result stands in the policy's text, after Output"),
        ("T\n```python\n2+2\n```\n\n**Output:** 4\nA", (), "a result stands in the policy's text, after Output"),
        (REACT, (), "a result stands in the policy's text, after Observation"),
        ("Action 1: Search[x]\nObservation 1: y", (), "a result stands in the policy's text, after Observation"),
        (RETOOL, (), "it calls 'code', which is no tool of the run"),
        (RETOOL.partition("<interpreter>")[0] + "A", ("run_python",), "a call has no result"),
        (SEARCH_R1, (), "it calls 'search', which is no tool of the run"),
        (SEARCH_R1.replace("information", "observation"), (), "it calls 'search', which is no tool of the run"),
        ("```python\n1\n```\n```output\n1\n```\nA", (), "a result stands in the policy's text, after ```output"),
    ],
)
def test_such_traces_are_left_out_if_the_run_lacks_the_tool(tmp_path, text, skills, reason):
    with runs_code(name="py", skills=skills) as executor:
        traces, left_out = read(tmp_path, executor.call_format, conversation(text), conversation("B"))
    assert [trace.segments for trace in traces] == [(Segment("B", True),)]
    assert str(left_out) == f"1: {reason}"


@pytest.mark.parametrize(
    "text", ["My Observation: it is even.", "It prints this.\nOutput:\n4", "```python\n2+2\n```\nOutputs vary"]
)
def test_words_of_the_policy_are_no_result(tmp_path, text):
    with runs_code(name="py") as executor:
        (trace,), _ = read(tmp_path, executor.call_format, conversation(text))
    assert trace.segments == (Segment(text, True),)


def chat(**fields):
    return {"messages": [{"role": "user", "content": "Q", "weight": 0}, ANSWERED | fields]}


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_is_read_in_all_spellings(tmp_path, name):
    with runs_code(name="py") as executor:
        (trace,), _ = read(tmp_path, executor.call_format, chat(**{name: "T", "reasoning_content": "T"}))
        (other,), _ = read(tmp_path, executor.call_format, chat(**{"reasoning_content": None, name: "T"}))
    assert trace.segments == other.segments == (Segment("<think>T</think>A", True),)


def test_a_message_that_is_not_to_be_trained_on_leaves_its_trace_out(tmp_path):
    """OpenAI's `weight`. That of a question says nothing."""
    with runs_code(name="py") as executor:
        traces, left_out = read(tmp_path, executor.call_format, chat(weight=0), chat(weight=1, content="B"))
    assert [trace.segments for trace in traces] == [(Segment("B", True),)]
    assert str(left_out) == "1: a message of the policy has weight 0, so it is not to be trained on"


@pytest.mark.parametrize("said", ["I write <tool_call> and then ", "Is <py> better? "])
def test_a_tag_before_a_call_belongs_to_the_text(tmp_path, call_format, said):
    """In tags, two opening tags make the call malformed."""
    name, notation = call_format
    called = '<tool_call>{"name": "py", "arguments": {"code": "1+1"}}</tool_call>'
    traces, left_out = read(tmp_path, notation, conversation(f"{said}{called}<result>2</result>A"), conversation("B"))
    if name == "tags" and "<py>" in said:
        assert "the text before a call makes it malformed" in str(left_out)
    else:
        assert traces[0].segments[0].text == said + notation.render_call("py", "1+1")


EMPTY_MESSAGE = {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "Q"}, ANSWERED]}


@pytest.mark.parametrize(
    ("record", "system"),
    [
        (conversation("A", system=""), ""),  # as `sft --collect` writes it for the embedded world
        (EMPTY_MESSAGE, ""),
        ({"instruction": "Q", "output": "A", "system": ""}, ""),
        (conversation("A", system=None), SYSTEM_PROMPT),
        (conversation("A"), SYSTEM_PROMPT),
    ],
)
def test_an_empty_system_prompt_stays_empty_and_a_missing_one_is_the_default(tmp_path, call_format, record, system):
    _, notation = call_format
    (trace,), _ = read(tmp_path, notation, record)
    assert trace.example.system == system.replace("{tools}", notation.instructions())


def test_parquet_gives_every_record_the_fields_of_all_others(tmp_path):
    """Arrow has one schema for all records: fields that one has are null in the others, and so are arguments of other tools."""
    names = {"code": "py", "query": "search"}
    messages = {
        key: [
            {"role": "user", "content": "Q"},
            {
                "role": "assistant",
                "content": "T",
                "tool_calls": [{"function": {"name": name, "arguments": {key: "1"}}}],
            },
            {"role": "tool", "content": "2"},
            ANSWERED,
        ]
        for key, name in names.items()
    }
    table = pyarrow.Table.from_pylist(
        [{"messages": turns, "left_out": None} for turns in messages.values()]
        + [
            {"collected": {"samples": 4}},
            {"messages": None, "left_out": "none of its answers was kept"},
            {"instruction": "Q", "output": "B"},
            conversation("C"),
        ],
        pyarrow.schema(
            {
                "messages": pyarrow.array(list(messages.values())).type,
                "collected": pyarrow.struct({"samples": pyarrow.int64()}),
                "left_out": pyarrow.string(), "instruction": pyarrow.string(), "output": pyarrow.string(),
                "conversations": pyarrow.array([conversation("C")["conversations"]]).type,
            }
        ),
    )  # fmt: skip
    assert table["messages"][0][1]["tool_calls"][0]["function"]["arguments"].as_py() == {"code": "1", "query": None}
    parquet.write_table(table, tmp_path / "traces.parquet")
    tools = [FunctionTool(str, name) for name in names.values()]
    for tool, key in zip(tools, names, strict=True):
        tool.argument_name = key
    left_out = LeftOut()
    with ToolExecutor(tools, ToolsConfig()) as executor:
        traces = read_traces([tmp_path / "traces.parquet"], executor.call_format, None, left_out)
    assert [trace.segments[0].text for trace in traces] == ["T<py>1</py>", "T<search>1</search>", "B", "C"]
    assert str(left_out) == "1: none of its answers was kept"


def test_repeated_traces_system_prompts_and_golds(tmp_path):
    with ToolExecutor([FunctionTool(str, "py")], ToolsConfig()) as executor:
        notation = executor.call_format
        records = [conversation("A", system="{tools}", answer=7, kind="math", id="x"), conversation("A")]
        (trace,), left_out = read(tmp_path, notation, *records)
        assert (trace.example.id, trace.example.golds, trace.example.kind) == ("x", ("7",), "math")
        assert trace.example.system == notation.instructions()
        assert str(left_out) == "1: it repeats an earlier trace"
        (trace,), _ = read(tmp_path, notation, conversation("A", system="S", tools='[{"name": "py"}]'))
        assert trace.example.system == f"S\n{notation.instructions()}"
        (trace,), _ = read(tmp_path, notation, conversation("A", system="", tools='[{"name": "py"}]'))
        assert trace.example.system == notation.instructions()
        (trace,), _ = read(tmp_path, notation, *records, system_prompt="mine")
        assert trace.example.system == "mine"
    with pytest.raises(DataError, match=r"no trace in them can be used \(1: it has no field 'conversations'\)"):
        read(tmp_path, notation, {})
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"line 1: not valid JSON"):
        read_traces([tmp_path / "bad.jsonl"], notation, None, LeftOut())
