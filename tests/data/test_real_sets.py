"""The real sets, if APPO_JAX_DATA names their folder: counts, answers, overlaps. And the example of docs/data.md."""

import re
import shutil
from pathlib import Path

import pytest

from appo_jax.config import ColumnsConfig, DataConfig, ToolsConfig
from appo_jax.data.demonstrations import demonstrate
from appo_jax.data.repetitions import find_repetitions
from appo_jax.data.source import for_evaluation, load_dataset
from appo_jax.tools.executor import ToolExecutor
from appo_jax.tools.wrap import FunctionTool

DOCS = Path(__file__).parents[2] / "docs" / "data.md"


def test_the_example_of_the_docs_works(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(# my_data\.py\n.*?)```", DOCS.read_text(), re.DOTALL)
    (tmp_path / "my_data.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    dataset = load_dataset(DataConfig("my_data:load"))
    assert (len(dataset.train), len(dataset.held_out)) == (900, 100)
    calculator = FunctionTool(lambda text: str(sum(map(int, text.split("+")))), "calculator")
    calculator.skills = ("compute",)
    for call_format, closing in (("tags", "</calculator>"), ("json", "</tool_call>")):
        with ToolExecutor([calculator], ToolsConfig(call_format=call_format)) as executor:
            traces = demonstrate(dataset, executor)
        assert len(traces) == 100
        call, _, answer = traces[7].segments
        assert call.text.endswith(closing)
        assert answer.text == "<answer> \\boxed{14} </answer>"
        assert "calculator" in traces[7].example.system


def load_with_twin(source, file, folder, **options):
    """A data set whose held-out file has the content of its training file."""
    twin = shutil.copy(file, folder)
    return load_dataset(DataConfig(source, str(file), held_out=str(twin), **options))


@pytest.mark.parametrize(
    ("name", "count", "kind", "question"),
    [
        ("aime24", 30, "math", "problem"),
        ("aime25", 30, "math", "problem"),
        ("math500", 500, "math", "question"),
        ("hotpotqa", 200, "qa", "question"),
        ("2wiki", 200, "qa", "question"),
        ("bamboogle", 125, "qa", "question"),
        ("webwalker", 680, "qa", "question"),
    ],
)
def test_evaluation_sets(shared_data, tmp_path, name, count, kind, question):
    file = shared_data / "eval" / f"{name}.jsonl"
    examples = load_with_twin("files", file, tmp_path, kind=kind, columns=ColumnsConfig(question)).train
    assert len(examples) == count
    assert all(example.golds and example.kind == kind for example in examples)
    if name.startswith("aime"):  # answers are whole numbers from 0 to 999
        assert all(0 <= int(gold) <= 999 for example in examples for gold in example.golds)
    if name == "2wiki":  # lists of aliases
        assert sum(len(example.golds) for example in examples) > 600


def test_hotpotqa_paragraphs_are_a_corpus(shared_data, tmp_path):
    dataset = load_with_twin("hotpotqa", shared_data / "hotpotqa" / "dev_first300.jsonl", tmp_path)
    assert len(dataset.train) == 300
    assert len(dataset.documents) == 2972  # 2979 paragraphs, those that several questions share once
    assert sum(example.golds[0] in ("yes", "no") for example in dataset.train) == 21


def test_overlaps_of_the_official_prompts(shared_data):
    """Questions that occur twice in them, and questions that are in the evaluation, too."""
    names = ("hotpotqa", "2wiki", "bamboogle", "webwalker", "math500", "aime24", "aime25")
    files = tuple(str(shared_data / "eval" / f"{name}.jsonl") for name in names)
    config = DataConfig("appo_rl", str(shared_data / "appo_rl"), evaluation=files)
    dataset = load_dataset(config)
    found = find_repetitions(dataset.train, for_evaluation(dataset, config))
    exact = {}
    for example in dataset.train:
        exact.setdefault(" ".join(example.question.split()), []).append(example)
    assert sum(len(same) - 1 for same in exact.values()) <= len(found.duplicates) < 60
    assert 0 < len(found.overlaps) < 20
    assert len(found.near_duplicates) < 30
