"""GSM8K and the official prompts: small files written here, and the real files in the folder APPO_JAX_DATA."""

import dataclasses
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from appo_jax.config import DataConfig, ToolsConfig
from appo_jax.data import sources
from appo_jax.data.demonstrations import demonstrate
from appo_jax.data.source import load_dataset, source_names
from appo_jax.data.sources import gsm8k
from appo_jax.data.sources.appo_rl import repair
from appo_jax.errors import ConfigError, DataError
from appo_jax.prepare import _texts
from appo_jax.tools.executor import ToolExecutor
from appo_jax.tools.wrap import FunctionTool

CLIPS = {
    "question": "Natalia sold clips to 48 friends in April, and half as many in May. How many altogether?",
    "answer": "She sold 48/2 = <<48/2=24>>24 clips in May.\nThat makes <<1048+24=1072>>1,072 altogether.\n#### 1,072",
}


def write_gsm8k(folder, train_lines):
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text("\n".join(train_lines))
    (folder / "test.jsonl").write_text(json.dumps(CLIPS | {"question": "Another?"}) + "\n")
    return DataConfig(source="gsm8k", path=str(folder))


def python_results(code):
    """The output of a real interpreter."""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return ran.stdout.strip() or ran.stderr.strip().splitlines()[-1]


@pytest.fixture
def executor():
    """A real interpreter as the python tool."""
    python = FunctionTool(python_results, "python")
    python.skills = ("run_python",)
    with ToolExecutor([python], ToolsConfig()) as executor:
        yield executor


def test_gsm8k_example_and_trace(tmp_path, executor):
    dataset = load_dataset(write_gsm8k(tmp_path, [json.dumps(CLIPS)]))
    (example,) = dataset.train
    assert (example.golds, example.kind, example.system) == (("1072",), "math", gsm8k.SYSTEM_PROMPT)
    assert example.question == CLIPS["question"]
    assert dataset.held_out[0].question == "Another?"
    assert dataset.documents is None
    (trace,) = demonstrate(dataset, executor)
    assert "<python>" in trace.example.system
    assert "{tools}" not in trace.example.system
    assert [(segment.text, segment.sampled) for segment in trace.segments] == [
        ("<think>She sold 48/2 =</think><python>\nprint(48/2)\n</python>", True),
        (" <result>\n24.0\n</result>", False),
        ("<think>24 clips in May.\nThat makes</think><python>\nprint(1048+24)\n</python>", True),
        (" <result>\n1072\n</result>", False),
        ("<think>1,072 altogether.</think><answer> \\boxed{1072} </answer>", True),
    ]


def test_gsm8k_wrong_or_missing_notes_make_no_trace(tmp_path, caplog, executor):
    wrong = CLIPS | {"answer": "It is <<48/2=25>>25.\n#### 25"}
    broken = CLIPS | {"answer": "It is <<48/=25>>25.\n#### 25"}
    none = CLIPS | {"answer": "It is 25.\n#### 25"}
    other = CLIPS | {"answer": "It is <<48/2=24>>24.\n#### 25"}
    near = CLIPS | {"answer": "It is <<2000+5=2005>>2005.\n#### 2000"}  # as one line of the real file
    comma = CLIPS | {"answer": "It is <<1000/3=333.33>>333.33, so <<3000/2=1,500>>1,500.\n#### 1500"}
    lines = (wrong, none, CLIPS, broken, comma, other, near)
    config = write_gsm8k(tmp_path, [json.dumps(line) for line in lines])

    with caplog.at_level(logging.INFO):
        assert len(demonstrate(load_dataset(config), executor)) == 2
    assert "5 of 7 demonstrations are left out" in caplog.text
    assert len(demonstrate(load_dataset(config), executor, limit=1)) == 1


def test_what_data_drop_leaves_out_is_not_demonstrated(tmp_path, caplog, executor):
    rows = [CLIPS | {"question": text} for text in ("Another?", "A third?", "A fourth?", "a third")]
    config = write_gsm8k(tmp_path, [json.dumps(row) for row in rows])
    dataset = load_dataset(dataclasses.replace(config, drop=("duplicates", "overlaps")))
    expected = ["A third?", "A fourth?"]
    assert [example.question for example in dataset.train] == expected
    assert [trace.example.question for trace in demonstrate(dataset, executor)] == expected
    assert "2: data.drop leaves its question out" in caplog.text


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{not json", "Expecting property name"),
        ('{"question": "Q?"}', "missing field 'answer'"),
        ('{"question": "Q?", "answer": "no mark"}', "#### number"),
        ('{"question": "Q?", "answer": "#### many"}', "#### number"),
        ('{"question": " ", "answer": "#### 1"}', "'question' is blank"),
        ('{"question": 7, "answer": "#### 1"}', "expected text, got 7"),
        ("[1, 2]", "expected an object"),
    ],
)
def test_malformed_line_is_named_and_fatal_or_skipped(tmp_path, caplog, line, complaint):
    config = write_gsm8k(tmp_path, [json.dumps(CLIPS), line, json.dumps(CLIPS)])
    with pytest.raises(DataError, match=rf"train\.jsonl, line 2: .*{re.escape(complaint)}.*data\.malformed"):
        load_dataset(config)
    dataset = load_dataset(DataConfig(source="gsm8k", path=config.path, malformed="skip"))
    assert [example.id for example in dataset.train] == ["gsm8k-train-1", "gsm8k-train-3"]
    assert "train.jsonl, line 2" in caplog.text
    assert "skipped 1 malformed of 3" in caplog.text


def test_bytes_that_are_no_text(tmp_path):
    config = write_gsm8k(tmp_path, [])
    (tmp_path / "train.jsonl").write_bytes(json.dumps(CLIPS).encode() + b"\n\xff\xfe\n")
    with pytest.raises(DataError, match=r"line 2"):
        load_dataset(config)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such file or folder.*--data"):
        load_dataset(DataConfig(source="gsm8k", path=str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match=r"train\.jsonl: no such file"):
        load_dataset(DataConfig(source="gsm8k", path=str(tmp_path)))
    with pytest.raises(DataError, match=r"train_10k\.parquet: no such file"):
        load_dataset(DataConfig(source="appo_rl", path=str(tmp_path)))
    config = write_gsm8k(tmp_path, [])
    with pytest.raises(DataError, match=r"train\.jsonl: the file is empty"):
        load_dataset(config)
    (tmp_path / "train.jsonl").write_text("{\n{\n")
    with pytest.raises(DataError, match=r"no usable record \(2 malformed, 0 left out\)"):
        load_dataset(DataConfig(source="gsm8k", path=str(tmp_path), malformed="skip"))


def row(question="Who?", gold="Andre", ability="qa", system="Put it in \x08oxed{}."):
    prompt = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    return {"prompt": prompt, "ability": ability, "reward_model": {"ground_truth": gold}}


def write_appo_rl(folder, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train_10k.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row("Held out?")]), folder / "valid.parquet")
    return DataConfig(source="appo_rl", path=str(folder))


def test_official_prompts_are_repaired(tmp_path):
    config = write_appo_rl(tmp_path, [row(), row("Form \x0crac{m}{n}?", "3", "math"), row("Unsolvable?", " ")])
    dataset = load_dataset(config)
    assert [(e.question, e.golds, e.kind, e.system) for e in dataset.train] == [
        ("Who?", ("Andre",), "qa", "Put it in \\boxed{}."),
        ("Form \\frac{m}{n}?", ("3",), "math", "Put it in \\boxed{}."),
    ]
    assert [e.id for e in dataset.held_out] == ["valid-1"]
    assert dataset.demonstration is None
    ours = load_dataset(DataConfig(source="appo_rl", path=config.path, system_prompt="Be brief."))
    assert {e.system for e in ours.train} == {"Be brief."}


def test_a_command_that_is_not_repaired_is_told(tmp_path, caplog):
    load_dataset(write_appo_rl(tmp_path, [row(), row("A page.\x0c Who?", "\x08lubb{1}")]))
    (told,) = caplog.messages
    assert "train_10k.parquet, row 2: the character before 'lubb' may be a LaTeX command" in told


def test_official_prompts_malformed(tmp_path):
    config = write_appo_rl(tmp_path, [row(), row(question=None)])
    with pytest.raises(DataError, match=r"train_10k\.parquet, row 2: field 'prompt.user': expected text, got None"):
        load_dataset(config)
    (tmp_path / "train_10k.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(DataError, match="expected a parquet file"):
        load_dataset(config)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "train_10k.parquet")
    with pytest.raises(DataError, match=r"row 1: missing field 'prompt'"):
        load_dataset(config)


def test_repair_touches_broken_escapes_only():
    assert repair("\x08oxed \x0crac \x0barphi") == r"\boxed \frac \varphi"
    assert (
        repair("\x08igcup \x08f \x08ecause \x0barnothing \x0bspace \x0cbox")
        == r"\bigcup \bf \because \varnothing \vspace \fbox"
    )
    plain = "a\tb\r\n\\boxed \x0c \x08 a page\x0cthe next \x0bold"
    assert repair(plain) == plain
    # As in rows of train_10k.parquet: TeX's ligatures are no escapes.
    assert repair("He \x0cfinds in\x0cfinite di\x0bfferences \x0cfirst") == "He finds infinite differences first"


@pytest.fixture(scope="module")
def data():
    if "APPO_JAX_DATA" not in os.environ:
        pytest.skip("APPO_JAX_DATA does not name the folder of real data")
    return Path(os.environ["APPO_JAX_DATA"])


def test_real_gsm8k(data, executor):
    dataset = load_dataset(DataConfig(source="gsm8k", path=str(data / "gsm8k")))
    assert (len(dataset.train), len(dataset.held_out)) == (7473, 1319)
    assert not {e.question for e in dataset.train} & {e.question for e in dataset.held_out}
    made = demonstrate(dataset, executor, limit=8)
    assert len(made) == 8
    assert all(trace.segments[-1].text.endswith(f"\\boxed{{{trace.example.golds[0]}}} </answer>") for trace in made)


def test_real_official_prompts(data):
    dataset = load_dataset(DataConfig(source="appo_rl", path=str(data / "appo_rl")))
    assert (len(dataset.train), len(dataset.held_out)) == (9999, 180)  # one row has no accepted answer
    assert sum(e.kind == "math" for e in dataset.train) == 4999
    assert all("\\boxed{" in e.system and not re.search(r"[\b\f\v]", e.system + e.question) for e in dataset.train)
    hard = load_dataset(DataConfig(source="appo_rl", path=str(data / "appo_rl" / "hard_search_1k.parquet")))
    assert len(hard.train) == 1071
    assert {e.kind for e in hard.train} == {"qa"}


MY_SOURCE = """
from appo_jax.data.source import Dataset
from appo_jax.types import Example, Segment, Trace

def load(config):
    asked = Example("mine-1", "What is 2 + 3?", ("5",), "math", config.system_prompt or "Use {tools}")
    def demonstration(index, kit):
        call = kit.write_call("python", "print(2 + 3)")
        result = kit.write_result(kit.run("python", "print(2 + 3)"))
        return Trace(asked, (Segment(call, True), Segment(result, False), Segment("5", True)))
    return Dataset([asked], [asked], None, demonstration, 1)

def wrong(config): return [1]
def ends(config): raise SystemExit(0)
def wrong_examples(config): return Dataset([{"question": "?"}], [])
def one(*fields): return Dataset([Example("a", "?", ("1",), "math", "")], [Example(*fields)])
def no_comma(config): return one("q7", "What is 6 * 7?", ("42"), "math", "")
def numbers(config): return one("q7", "What is 6 * 7?", (42,), "math", "")
def no_golds(config): return one("q7", "What is 6 * 7?", (), "math", "")
def other_kind(config): return one("q7", "What is 6 * 7?", ("42",), "maths", "")
def no_question(config): return one("q7", None, ("42",), "math", "")
def no_system(config): return one("q7", "What is 6 * 7?", ("42",), "math", None)
def number_as_id(config): return one(7, "What is 6 * 7?", ("42",), "math", "")
def no_sequence(config): return Dataset([], (example for example in ()))
CONSTANT = 3
"""


@pytest.fixture
def my_source(tmp_path, monkeypatch):
    (tmp_path / "my_source.py").write_text(MY_SOURCE)
    (tmp_path / "my_script.py").write_text("import sys\nsys.exit(0)")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("my_source")
def test_a_source_of_your_own(executor):
    dataset = load_dataset(DataConfig(source="my_source:load"))
    assert dataset.train[0].golds == ("5",)
    (trace,) = demonstrate(dataset, executor)
    assert [segment.text for segment in trace.segments] == [
        "<python>print(2 + 3)</python>",
        " <result>\n5\n</result>",
        "5",
    ]


@pytest.mark.usefixtures("my_source")
@pytest.mark.parametrize("prompt", ["Mind the gap. {tools}", "Mind the gap."])
def test_a_tokenizer_is_trained_on_the_prompts_as_the_policy_reads_them(executor, prompt):
    """Each prompt once, however many questions have it."""
    dataset = load_dataset(DataConfig(source="my_source:load", system_prompt=prompt))
    texts = list(_texts(dataclasses.replace(dataset, train=[*dataset.train] * 3), executor))
    assert texts.count(prompt.replace("{tools}", executor.call_format.instructions())) == 1


@pytest.mark.usefixtures("my_source")
@pytest.mark.parametrize(
    ("source", "error", "complaint"),
    [
        ("gsm9k", ConfigError, r"data\.source = 'gsm9k': expected .*gsm8k.*world"),
        ("no_such_module:load", ConfigError, r"data\.source = .*cannot be imported .*a file in the working directory"),
        ("my_source:nothing", ConfigError, "cannot be imported"),
        ("my_source:CONSTANT", ConfigError, "is a int, not a function"),
        ("my_source:ends", DataError, "raised SystemExit: 0"),
        ("my_script:load", ConfigError, r"cannot be imported \(SystemExit"),
        ("my_source:wrong", ConfigError, "returned a list; expected an appo_jax.data.source.Dataset"),
        ("my_source:wrong_examples", DataError, "train holds a dict; expected appo_jax.types.Example"),
        (
            "my_source:no_comma",
            DataError,
            "held_out holds the example 'q7' with golds = '42'; expected a tuple of texts",
        ),
        ("my_source:numbers", DataError, r"'q7' with golds = \(42,\); expected a tuple of texts"),
        ("my_source:no_golds", DataError, r"'q7' with golds = \(\); expected a tuple of texts"),
        ("my_source:other_kind", DataError, "'q7' with kind = 'maths'; expected 'math' or 'qa'"),
        ("my_source:no_question", DataError, "'q7' with question = None; expected a text"),
        ("my_source:no_system", DataError, "'q7' with system = None; expected a text"),
        ("my_source:number_as_id", DataError, "example 7 with id = 7; expected a text"),
        ("my_source:no_sequence", DataError, "held_out is a generator; expected a list of appo_jax.types.Example"),
        ("gsm8k", ConfigError, r"data\.path: needed for data\.source = 'gsm8k'"),
    ],
)
def test_an_unusable_source_is_refused_by_name(source, error, complaint):
    with pytest.raises(error, match=complaint):
        load_dataset(DataConfig(source=source))


def test_a_file_without_load_is_named(monkeypatch, tmp_path):
    (tmp_path / "without_load.py").touch()
    monkeypatch.setattr(sources, "__path__", [*sources.__path__, str(tmp_path)])
    with pytest.raises(ConfigError, match=r"'without_load': data/sources/without_load\.py defines no `load`"):
        load_dataset(DataConfig(source="without_load"))


def test_source_names():
    assert set(source_names()) >= {"world", "gsm8k", "appo_rl"}


def test_hotpotqa_is_demonstrated_where_the_tool_finds_the_answer(caplog, tmp_path):
    """A question that names one of two pages; one that names none; one whose page is not found; questions with yes and no."""
    pages = [
        {"title": "Ed Wood", "text": "Ed Wood is a film. It was directed by Tim Burton."},
        {"title": "Tim Burton", "text": "Tim Burton was born in Burbank. He draws."},
        {"title": "Lost", "text": "Nobody finds it."},
    ]
    rows = [
        {"id": 1, "question": "Where was the director of Ed Wood born?", "answers": ["Burbank"], "context": pages},
        {"id": 2, "question": "Where was he born?", "answers": ["Burbank"], "context": pages},
        {"id": 3, "question": "Who finds what is Lost?", "answers": ["nobody"], "context": pages},
        {"id": 4, "question": "Are Ed Wood and Tim Burton films?", "answers": ["no"], "context": pages},
        {"id": 5, "question": "Is Ed Wood a film?", "answers": ["yes"], "context": pages},
    ]
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = load_dataset(DataConfig("hotpotqa", str(tmp_path)))
    texts = {page["title"]: page["text"] for page in pages[:2]}
    search = FunctionTool(lambda query: texts.get(query, "No page."), "search")
    search.skills = ("look_up",)
    with ToolExecutor([search], ToolsConfig()) as made:
        first, second = demonstrate(dataset, made)
    assert [(segment.text, segment.sampled) for segment in first.segments] == [
        ("<think>I look up Ed Wood.</think><search>Ed Wood</search>", True),
        (" <result>\nEd Wood is a film. It was directed by Tim Burton.\n</result>", False),
        ("<think>I look up Tim Burton.</think><search>Tim Burton</search>", True),
        (" <result>\nTim Burton was born in Burbank. He draws.\n</result>", False),
        (
            "<think>Tim Burton was born in Burbank. So the answer is Burbank.</think><answer> \\boxed{Burbank} </answer>",
            True,
        ),
    ]
    assert second.segments[-1].text == (
        "<think>Ed Wood is a film. Tim Burton was born in Burbank. So the answer is no.</think><answer> \\boxed{no} </answer>"
    )
    assert "2: the question does not name what is to be looked up" in caplog.text
    assert "1: the tool does not find what is to be looked up" in caplog.text
