"""Sets from files: every form of gold, malformed files, and the real sets if they are available."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from appo_jax.benchmark.sets import BENCHMARKS, load_items
from appo_jax.errors import ConfigError, DataError


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_golds_of_every_form(tmp_path):
    records = [
        {"question": "a", "answer": "x"},
        {"question": "b", "answer": 70},
        {"question": "c", "golden_answers": ["x", "y", "x"]},
        {"question": "d", "answer": {"target": ["x", 3.5]}},
        {"problem": "e", "answer": "x", "answer_aliases": ["y"], "id": "q5"},
        {"Question": "f", "Final answer": "x", "task_id": "t", "Level": 2},
    ]
    items = load_items("hotpotqa", write(tmp_path / "a.jsonl", *records))
    assert [item.golds for item in items] == [("x",), ("70",), ("x", "y"), ("x", "3.5"), ("x", "y"), ("x",)]
    assert [item.id for item in items] == ["0", "1", "2", "3", "q5", "t"]
    assert items[5].level == "2"


def test_every_file_type_gives_the_same(tmp_path):
    rows = [{"id": "a", "question": "1+1?", "answer": "2"}, {"id": "b", "question": "2+2?", "answer": "4"}]
    write(tmp_path / "x.jsonl", *rows)
    (tmp_path / "x.json").write_text(json.dumps(rows))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    with (tmp_path / "x.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "question", "answer"])
        writer.writeheader()
        writer.writerows(rows)
    first, *others = (load_items("math500", tmp_path / f"x.{kind}") for kind in ("jsonl", "json", "parquet", "csv"))
    assert all(other == first for other in others)


def test_gsm8ks_answer_is_what_follows_the_mark(tmp_path):
    file = write(tmp_path / "test.jsonl", {"question": "?", "answer": "48/2 = <<48/2=24>>24\n#### 72"})
    assert load_items("gsm8k", file)[0].golds == ("72",)


def test_the_answer_of_a_solution_is_in_its_last_box(tmp_path):
    rows = [{"problem": "?", "solution": r"Not \boxed{1}, but \boxed{\frac{1}{2}}."}, {"problem": "?", "solution": 7}]
    items = load_items("math", write(tmp_path / "m.jsonl", *rows))
    assert [item.golds for item in items] == [(r"\frac{1}{2}",), ("7",)]
    file = write(tmp_path / "m.jsonl", {"problem": "?", "solution": "It is 1."})
    with pytest.raises(DataError, match=r"line 1: no answer, and no .boxed"):
        load_items("math", file)


def test_xbenchs_own_file_is_decrypted(tmp_path, caplog):
    """Encrypted by hand: "Wer?" is 57 65 72 3f; XOR with the key "ab", 61 62 61 62, it is 36 07 13 5d."""
    (tmp_path / "x.csv").write_text(
        "\ufeffid,prompt,answer,canary\n1,NgcTXQ==,MgE=,ab\n2,Wo?,da,ab\n", encoding="utf-8"
    )
    items = load_items("xbench", tmp_path / "x.csv")
    assert [(item.question, item.golds) for item in items] == [("Wer?", ("Sc",)), ("Wo?", ("da",))]
    assert "it has 2 questions, xbench-DeepSearch as the paper uses it 100" in caplog.text


def test_gaia_leaves_out_questions_with_a_file(tmp_path):
    rows = [{"Question": "a", "Final answer": "1", "Level": 1, "file_name": name} for name in ("", "x.png", "")]
    assert len(load_items("gaia", write(tmp_path / "g.jsonl", *rows))) == 2


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("aime24", "", "the file is empty; expected"),
        ("aime24", '{"question": "a"}', "line 1: no answer"),
        ("aime24", '{"question": "a", "answer": " "}', "line 1: no answer"),
        ("aime24", '{"answer": "a"}', "line 1: no question"),
        ("aime24", '{"question": "a", "answer": []}', "line 1: no answer"),
        ("aime24", '\n{"question": "a", "ans', "line 2: not valid JSON"),
        ("aime24", "[1]", "line 1: expected an object"),
        ("gaia", '{"Question": "a", "Final answer": "1", "Level": 4}', "level '4' is unknown"),
        ("aime24", '{"id": 1, "question": "a", "answer": 1}\n{"id": 1, "question": "b", "answer": 1}', "given twice"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path, name, lines, message):
    (tmp_path / "x.jsonl").write_text(lines)
    with pytest.raises(DataError, match=message):
        load_items(name, tmp_path / "x.jsonl")


def test_a_missing_set_says_where_it_comes_from(tmp_path):
    with pytest.raises(DataError, match=r"no such file; MATH-500 comes from HuggingFaceH4/MATH-500"):
        load_items("math500", tmp_path / "x.jsonl")
    with pytest.raises(ConfigError, match="expected one of aime24"):
        load_items("aime", tmp_path / "x.jsonl")


COUNTS = {"aime24": 30, "aime25": 30, "math500": 500, "hotpotqa": 200, "2wiki": 200, "bamboogle": 125, "webwalker": 680}


@pytest.mark.parametrize("name", COUNTS)
def test_the_official_files_load_whole(shared_data, name):
    items = load_items(name, shared_data / "eval" / f"{name}.jsonl")
    assert len(items) == COUNTS[name] == BENCHMARKS[name].count


def test_gsm8ks_test_file_loads_whole(shared_data):
    assert len(load_items("gsm8k", shared_data / "gsm8k" / "test.jsonl")) == BENCHMARKS["gsm8k"].count
