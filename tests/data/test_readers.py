"""Sources read their own formats into one schema. The files are written here as their publishers write them."""

import csv
import json
import logging
import math
import shutil
from datetime import UTC, date, datetime
from decimal import Decimal

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from appo_jax.config import ColumnsConfig, DataConfig, DataPart, ToolsConfig
from appo_jax.data.demonstrations import ToolKit
from appo_jax.data.examples import SYSTEM_PROMPT, system_prompt
from appo_jax.data.golds import accepted_answers
from appo_jax.data.source import load_dataset
from appo_jax.data.world import load_world
from appo_jax.errors import ConfigError, DataError
from appo_jax.tools.executor import ToolExecutor
from appo_jax.tools.wrap import FunctionTool
from appo_jax.types import Document

ROWS = [{"question": "Who?", "answer": "Ada"}, {"question": "How many?", "answer": "3"}]


@pytest.mark.parametrize(
    ("value", "answers"),
    [
        ("Ada", ("Ada",)),
        (" Ada \n", ("Ada",)),
        (3, ("3",)),
        (70.0, ("70",)),
        (0.5, ("0.5",)),
        (-2, ("-2",)),
        (True, ("yes",)),
        (["a", "b", "a", " "], ("a", "b")),
        (["a", ["b", 3]], ("a", "b", "3")),
        ({"target": ["a", "b"]}, ("a", "b")),
        ({"ground_truth": {"target": "a"}, "style": "rule"}, ("a",)),
        ('["a", "b"]', ("a", "b")),
        (' [ "a" ] ', ("a",)),
        ("['a', \"b's\"]", ("a", "b's")),  # as pandas writes a list into a CSV
        ("['New York' 'NYC'\n 'the city']", ("New York", "NYC", "the city")),  # and an array
        ("['a']['b']", ("['a']['b']",)),
        ('{{"a"}: 1}', ('{{"a"}: 1}',)),
        ("[1, 2]", ("[1, 2]",)),  # an interval, not two answers
        ('["a"', ('["a"',)),
        (np.array(["a", "b"], object), ("a", "b")),
        (np.float32(2), ("2",)),
        (float(np.float32(0.1)), ("0.1",)),  # as a column of 32-bit numbers gives it
        (np.array([0.1], np.float32), ("0.1",)),
        (float(np.float32(100000.1)), ("100000.1",)),
        (1250000.25, ("1250000.25",)),  # a 32-bit number holds it exactly, and would be shown as 1.2500002e+06
        (2400000.75, ("2400000.75",)),
        (250000.0625, ("250000.0625",)),
        (2.0**60, ("1152921504606846976",)),
        (1e23, ("1e+23",)),
        (1e300, ("1e+300",)),
        (1 / 3, ("0.3333333333333333",)),
        (1e15, ("1000000000000000",)),
        (Decimal("2.50"), ("2.5",)),
        (Decimal("300"), ("300",)),
        (date(2020, 5, 4), ("2020-05-04",)),
        (datetime(2020, 5, 5), ("2020-05-05",)),  # as a column of timestamps gives a day
        (datetime(2020, 5, 5, tzinfo=UTC), ("2020-05-05",)),
        (datetime(2020, 5, 5, 7, 30), ("2020-05-05T07:30:00",)),
        ({"value": "X", "aliases": []}, ("X",)),
        ({"value": "X", "aliases": ["Y", "X"]}, ("X", "Y")),  # TriviaQA
        ({"target": None, "ground_truth": "x"}, ("x",)),  # a struct of parquet has all fields
        ({"text": ["a", "a", "b"], "answer_start": [1, 5, 9]}, ("a", "b")),  # SQuAD
        ({"answer": "x"}, ("x",)),
        ('{"target": ["a"]}', ("a",)),
        ("{'target': ['a']}", ("a",)),
        ('["a", null]', ("a",)),
        ('["a", 1]', ("a", "1")),
        ("['a', None]", ("a",)),
        ("['don''t']", ("['don''t']",)),
        ("['', 'a']", ("a",)),
        ('["a \\"\\" b"]', ('a "" b',)),
        (r"['\frac{1}{2}', '\times']", (r"\frac{1}{2}", r"\times")),
        (r'["\frac{1}{2}", "\\beta"]', (r"\frac{1}{2}", r"\beta")),
        (r"['a\nb']", ("a\nb",)),
        ({"answer": "a", "text": "the whole explanation"}, ("a",)),
        ({"answer": None, "text": "a"}, ("a",)),
        (r"\{1, 2\}", (r"\{1, 2\}",)),
        ('{"x": 1}', ('{"x": 1}',)),
        (None, ()),
        ("", ()),
        ([], ()),
        ([None, ""], ()),
    ],
)
def test_accepted_answers(value, answers):
    assert accepted_answers(value) == answers


def test_a_text_that_looks_like_a_list_and_is_none_is_told(caplog):
    assert accepted_answers('["a", "b"') == ('["a", "b"',)
    assert "looks like a list" in caplog.text


@pytest.mark.parametrize("value", [{"answer_text": "a"}, math.nan, math.inf, object(), [[[[[["a"]]]]]], b"a"])
def test_what_is_no_answer_is_refused(value):
    with pytest.raises(TypeError):
        accepted_answers(value)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("\n\n".join(map(json.dumps, rows)) + "\n  \n")  # blank lines stand anywhere
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv", ".tsv"])
def test_plain_files_of_every_kind(tmp_path, suffix):
    write(tmp_path / f"train{suffix}", ROWS)
    write(tmp_path / f"dev{suffix}", ROWS[:1])
    dataset = load_dataset(DataConfig("files", str(tmp_path)))
    assert [(e.question, e.golds, e.kind, e.source, e.system) for e in dataset.train] == [
        ("Who?", ("Ada",), "qa", "train", SYSTEM_PROMPT),
        ("How many?", ("3",), "qa", "train", SYSTEM_PROMPT),
    ]
    numbers = {".jsonl": (1, 3), ".csv": (2, 3), ".tsv": (2, 3)}.get(suffix, (1, 2))
    assert [e.id for e in dataset.train] == [f"train-{number}" for number in numbers]
    assert len(dataset.held_out) == 1


def twin(file):
    """A second file with the same content, because a training file cannot be held out."""
    return str(shutil.copy(file, file.with_name(f"twin_of_{file.name}")))


def test_a_training_file_is_not_held_out(tmp_path):
    file = write(tmp_path / "train.jsonl", ROWS)
    (tmp_path / "link.jsonl").symlink_to(file)
    for path, held_out in (
        (tmp_path, file),
        (file, tmp_path / "link.jsonl"),
        (tmp_path, tmp_path / "x" / ".." / file.name),
    ):
        with pytest.raises(ConfigError, match=r"(train|link)\.jsonl is the training file and"):
            load_dataset(DataConfig("files", str(path), held_out=str(held_out)))
    write(tmp_path / "test.jsonl", ROWS)
    with pytest.raises(ConfigError, match=r"test\.jsonl is the training file"):
        load_dataset(DataConfig("files", str(tmp_path / "test.jsonl")))


def test_columns_are_named_by_the_config(tmp_path):
    row = {
        "task": {"text": "1 + 1?"}, "solution": [2], "uid": 17, "how": "math", "set": "sums", "prompt": "Think.", "level": 3,
        "noise": None,
    }  # fmt: skip
    file = write(tmp_path / "sums.jsonl", [row])
    columns = ColumnsConfig("task.text", "solution", "uid", "how", "set", "prompt", ("level", "noise", "absent"))
    config = DataConfig("files", str(file), held_out=twin(file), columns=columns)
    (example,) = load_dataset(config).train
    assert (example.id, example.question, example.golds, example.kind) == ("17", "1 + 1?", ("2",), "math")
    assert (example.source, example.system, example.extra) == ("sums", "Think.", {"level": 3})
    config = DataConfig("files", str(file), held_out=twin(file), columns=columns, system_prompt="Be brief.")
    assert load_dataset(config).train[0].system == "Be brief."


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"answer": "a"}, "missing field 'question'"),
        (
            {"question": "?", "gold": "a"},
            r"missing field 'answer' \(it has 'gold', 'question'\); data.columns.golds says which field is read; correct it",
        ),
        ({"question": " ", "answer": "a"}, "'question' is blank"),
        ({"question": 3, "answer": "a"}, "expected text, got 3"),
        ({"question": "?", "answer": {"b": 1}}, "expected one of target"),
        ({"question": "?", "answer": "a", "kind": "code"}, "expected math or qa, got 'code'"),
        ({"question": "?", "answer": "a", "system": 3}, "'system': expected text, got 3"),
        ({"question": [], "answer": "a"}, "expected one user message"),
        ({"question": [{"role": "user"}], "answer": "a"}, "missing field 'content'"),
        ({"question": [{"role": "user", "content": "a"}] * 2, "answer": "a"}, "got user, user"),
        (
            {"question": [{"role": r, "content": "a"} for r in ("user", "assistant", "user")], "answer": "a"},
            "got user, assistant, user",
        ),
        (
            {"question": [{"role": r, "content": "a"} for r in ("system", "system", "user")], "answer": "a"},
            "got system, sys",
        ),
        ("text", "expected an object"),
    ],
)
def test_a_malformed_record_is_named_and_fatal_or_skipped(tmp_path, caplog, row, complaint):
    file = write(tmp_path / "train.jsonl", [ROWS[0], row, ROWS[1]])
    with pytest.raises(DataError, match=rf"train\.jsonl, line 3: .*{complaint}.*data\.malformed"):
        load_dataset(DataConfig("files", str(file), held_out=twin(file)))
    dataset = load_dataset(DataConfig("files", str(file), held_out=twin(file), malformed="skip"))
    assert [e.id for e in dataset.train] == ["train-1", "train-5"]
    assert "skipped 1 malformed of 3" in caplog.text


def test_cells_of_a_table(tmp_path, caplog):
    """A comma in a cell that is not quoted makes a cell too many; a blank cell is an absent value."""
    rows = [
        b"id,question,answer,kind,system",
        b"7,a?,1,math,S",
        b",b?,2,,",
        b'8,"c, d?","1,001",,',
        b"9,What is 1,000+1?,1001,,",
    ]
    (tmp_path / "train.csv").write_bytes(b"\n".join(rows))
    write(tmp_path / "test.jsonl", ROWS)
    with pytest.raises(DataError, match=r"line 5: it has 6 cells, the header 5 \(id, question.*data\.malformed"):
        load_dataset(DataConfig("files", str(tmp_path)))
    first, second, third = load_dataset(DataConfig("files", str(tmp_path), malformed="skip")).train
    assert (first.id, first.kind, first.system) == ("7", "math", "S")
    assert (second.id, second.kind, second.system, second.golds) == ("train-3", "qa", SYSTEM_PROMPT, ("2",))
    assert (third.question, third.golds) == ("c, d?", ("1,001",))


def test_a_quotation_mark_in_a_cell_without_quotes_is_named_by_its_line(tmp_path):
    rows = [
        "question\tanswer",
        '"a\nb"\t1',
        '"Hello" is a song by whom?\tAdele',
        '"""Hi"" by whom?"\tB',
        'Who says "c"?\tC',
    ]
    (tmp_path / "train.tsv").write_text("\n".join(rows))
    write(tmp_path / "test.jsonl", ROWS)
    with pytest.raises(DataError, match=r"train\.tsv, line 4: .*quote the whole of a cell.*data\.malformed"):
        load_dataset(DataConfig("files", str(tmp_path)))
    train = load_dataset(DataConfig("files", str(tmp_path), malformed="skip")).train
    assert [(e.id, e.question) for e in train] == [
        ("train-3", "a\nb"), ("train-5", '"Hi" by whom?'), ("train-6", 'Who says "c"?')
    ]  # fmt: skip


def test_records_without_an_answer_are_left_out_by_name(tmp_path, caplog):
    file = write(
        tmp_path / "train.jsonl",
        [{"question": "?", "answer": answer} for answer in (None, "", [], {"target": []}, "a")],
    )
    with caplog.at_level(logging.WARNING):
        assert len(load_dataset(DataConfig("files", str(file), held_out=twin(file))).train) == 1
    assert caplog.text.count("no accepted answer; left out") == 8


def test_nan_is_a_missing_value(tmp_path):
    """As pandas writes it: a column of integers with a gap is one of floats, and so is a column without any value."""
    nan = math.nan
    table = {
        "question": ["a", "b", "c"], "answer": [1990.0, nan, 0.5], "id": [7.0, 8.0, nan], "system": [nan] * 3, "kind": [nan] * 3,
        "source": [nan] * 3, "level": [[1.0, nan], [], []],
    }  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "train.parquet")
    write(tmp_path / "test.jsonl", [{"question": "a", "answer": ["1", nan], "id": nan, "level": nan}])
    dataset = load_dataset(DataConfig("files", str(tmp_path), columns=ColumnsConfig(extra=("level",))))
    assert [(e.id, e.question, e.golds, e.system, e.source) for e in dataset.train] == [
        ("7", "a", ("1990",), SYSTEM_PROMPT, "train"),
        ("train-3", "c", ("0.5",), SYSTEM_PROMPT, "train"),
    ]
    assert [e.extra for e in (*dataset.train, *dataset.held_out)] == [{"level": [1.0, None]}, {"level": []}, {}]
    assert [(e.id, e.golds) for e in dataset.held_out] == [("test-1", ("1",))]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("train.jsonl", b"", "the file is empty"),
        ("train.json", b'{"a": 1}', "expected a list of records"),
        ("train.json", b"[1", "expected a json file"),
        ("train.parquet", b"PAR1 no parquet", "expected a parquet file"),
        ("train.csv", b'question,answer\n"a,b', "expected a csv file.*begins at line 2"),
        ("train.csv", b"question,answer\n\xff,b", "expected a csv file"),
        ("train.txt", b"a", "expected a file that ends in .jsonl"),
    ],
)
def test_unreadable_files(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        load_dataset(DataConfig("files", str(tmp_path / name), held_out=twin(tmp_path / name)))


@pytest.mark.parametrize(
    "source", ["files", "verl", "hotpotqa", "wiki2", "musique", "math", "gsm8k", "appo_rl", "tfds"]
)
def test_a_missing_set_says_what_and_where(tmp_path, source):
    with pytest.raises(ConfigError, match=rf"data\.path: needed for data\.source = '{source}'"):
        load_dataset(DataConfig(source))
    with pytest.raises(DataError, match=r"nowhere: no such file or folder"):
        load_dataset(DataConfig(source, str(tmp_path / "nowhere")))
    where = {
        "files": "a file of questions", "hotpotqa": r"hotpotqa\.github\.io", "tfds": "dataset_info.json",
        "verl": "Search-R1",
    }.get(source, r"github\.com")  # fmt: skip
    with pytest.raises(DataError, match=where):
        load_dataset(DataConfig(source, str(tmp_path)))


def test_official_prompts_without_a_system_message_name_the_way_out(tmp_path):
    row = {
        "prompt": [{"role": "user", "content": "Who?"}],
        "ability": "qa",
        "reward_model": {"ground_truth": ["Ada", "A. L."]},
    }
    write(tmp_path / "train_10k.parquet", [row])
    write(tmp_path / "valid.parquet", [row])
    with pytest.raises(DataError, match=r"row 1: it has no system message; give one with data\.system_prompt"):
        load_dataset(DataConfig("appo_rl", str(tmp_path)))
    (example,) = load_dataset(DataConfig("appo_rl", str(tmp_path), system_prompt="")).train
    assert (example.system, example.golds) == ("", ("Ada", "A. L."))


def test_verl_and_search_r1(tmp_path, caplog):
    search_r1 = {
        "id": "nq_7", "question": "who sings it", "golden_answers": ["A", "B"], "data_source": "nq", "ability": "fact-reasoning",
        "prompt": [{"role": "user", "content": "Use <information>. Question: who sings it"}],
        "reward_model": {"style": "rule", "ground_truth": {"target": ["A", "B"]}}, "extra_info": {"index": 7, "split": "train"},
    }  # fmt: skip
    write(tmp_path / "train.parquet", [search_r1])
    write(
        tmp_path / "test.parquet",
        [
            {
                "data_source": "gsm8k", "prompt": [{"role": "user", "content": prompt}], "ability": ability,
                "reward_model": {"style": "rule", "ground_truth": "2"}, "extra_info": {"question": question},
            }
            for prompt, ability, question in (
                ("1 + 1?", "math", None), ("1 + 1? Answer after ####.", "MATH", "1 + 1?"), ("1 + 1?", "code", None),
                ("2 + 0?", "code", None),
            )
        ],
    )  # fmt: skip
    dataset = load_dataset(DataConfig("verl", str(tmp_path)))
    (example,), (sums, wrapped, code, _) = dataset.train, dataset.held_out
    assert (wrapped.question, wrapped.kind, wrapped.system) == ("1 + 1?", "math", SYSTEM_PROMPT)
    assert code.kind == "qa"
    assert (example.id, example.question, example.golds, example.kind) == ("nq_7", "who sings it", ("A", "B"), "qa")
    assert (example.source, example.system) == ("nq", SYSTEM_PROMPT)
    assert example.extra == {"ability": "fact-reasoning", "extra_info.index": 7}
    assert (sums.id, sums.question, sums.golds, sums.kind) == ("test-1", "1 + 1?", ("2",), "math")
    assert "ability 'code' is unknown: its questions are graded as data.kind = qa" in caplog.text
    assert caplog.text.count("ability") == 1
    bare = {key: search_r1[key] for key in ("id", "question", "golden_answers")}
    write(tmp_path / "train.parquet", [bare])
    assert load_dataset(DataConfig("verl", str(tmp_path))).train[0].golds == ("A", "B")


BERN = ["Bern", ["Bern is a town. ", "It lies on the Aare."]]
HOTPOT = {
    "_id": "5a", "question": "On what?", "answer": "Aare", "type": "bridge", "level": "hard", "supporting_facts": [["Bern", 1]],
    "context": [BERN, ["Ada", ["Ada."]]],
}  # fmt: skip


def test_hotpotqa_and_2wiki(tmp_path):
    write(tmp_path / "hotpot_train_v1.1.json", [HOTPOT])
    write(tmp_path / "hotpot_dev_distractor_v1.json", [HOTPOT | {"_id": "5b", "context": [BERN]}])
    dataset = load_dataset(DataConfig("hotpotqa", str(tmp_path)))
    (example,) = dataset.train
    assert (example.id, example.golds, example.extra) == ("5a", ("Aare",), {"type": "bridge", "level": "hard"})
    assert dataset.documents == (Document("Bern", "Bern is a town. It lies on the Aare."), Document("Ada", "Ada."))

    spelled = {
        "id": 0,
        "question": "On what?",
        "answers": ["Aare", "the Aare"],
        "context": [{"title": "Bern", "text": "A town."}],
    }
    file = write(tmp_path / "some.jsonl", [spelled])
    dataset = load_dataset(DataConfig("hotpotqa", str(file), held_out=twin(file)))
    assert (dataset.train[0].id, dataset.train[0].golds) == ("0", ("Aare", "the Aare"))
    assert dataset.documents == (Document("Bern", "A town."),)

    flash_rag = {"id": "dev_0", "question": "On what?", "golden_answers": ["Aare"]}
    hugging_face = {k: v for k, v in HOTPOT.items() if k != "_id"} | {
        "id": "5c",
        "context": {"title": ["Bern", "Ada"], "sentences": [BERN[1], ["Ada."]]},
    }
    pages = (Document("Bern", "Bern is a town. It lies on the Aare."), Document("Ada", "Ada."))
    as_text = hugging_face | {"context": json.dumps(HOTPOT["context"])}
    for record, documents in ((flash_rag, None), (hugging_face, pages), (as_text, pages)):
        file = write(tmp_path / "other.jsonl", [record])
        for source in ("hotpotqa", "wiki2", "musique")[: 1 if documents else 3]:
            dataset = load_dataset(DataConfig(source, str(file), held_out=twin(file)))
            assert (dataset.train[0].id, dataset.train[0].golds, dataset.documents) == (
                record["id"],
                ("Aare",),
                documents,
            )

    for split in ("train", "dev"):
        write(tmp_path / f"flash/{split}.jsonl", [flash_rag | {"id": split}])
    for source in ("hotpotqa", "wiki2", "musique"):
        dataset = load_dataset(DataConfig(source, str(tmp_path / "flash")))
        assert [example.id for example in (*dataset.train, *dataset.held_out)] == ["train", "dev"]

    glued = [["Bern", ["Bern is a town.", "It lies on the Aare. ", "Yes.", ""]]]
    for name in ("train.json", "dev.json"):
        write(tmp_path / name, [HOTPOT | {"answer_id": "Q1", "context": glued}, HOTPOT | {"answer_id": None}])
    whole = load_dataset(DataConfig("wiki2", str(tmp_path))).documents[0].text
    assert whole == "Bern is a town. It lies on the Aare. Yes."
    assert load_dataset(DataConfig("wiki2", str(tmp_path))).train[0].golds == ("Aare",)
    file = tmp_path / "id_aliases.json"
    file.write_text('{"Q_id": "Q1", "aliases": ["A\u2028r", "Aare"], "demonyms": null}\n')
    assert [e.golds for e in load_dataset(DataConfig("wiki2", str(tmp_path))).train] == [
        ("Aare", "A\u2028r"),
        ("Aare",),
    ]
    file.write_bytes(file.read_bytes() + '{"Q_id": "ä'.encode()[:-1])
    with pytest.raises(DataError, match=r"id_aliases\.json, line 2: "):
        load_dataset(DataConfig("wiki2", str(tmp_path)))


def test_a_question_is_demonstrated_from_its_own_paragraphs(tmp_path):
    """Also if both files number their questions alike; and a title inside a word of the question is not named by it."""
    row = {
        "id": 0, "question": "On which river in the Aargau is Bern?", "answers": ["Aare"],
        "context": [{"title": "It", "text": "Wrong."}, {"title": "Bern", "text": "Bern lies on the Aare."}],
    }  # fmt: skip
    other = row | {"question": "Who is Ada?", "context": [{"title": "Ada", "text": "Ada."}]}
    train, held_out = write(tmp_path / "train.jsonl", [row]), write(tmp_path / "dev.jsonl", [other])
    dataset = load_dataset(DataConfig("hotpotqa", str(train), held_out=str(held_out)))
    pages = FunctionTool(lambda title: {"Bern": "Bern lies on the Aare."}.get(title, "nothing"), "search")
    pages.skills = ("look_up",)
    with ToolExecutor([pages], ToolsConfig()) as executor:
        first, _, last = dataset.demonstration(0, ToolKit(executor)).segments
    assert first.text == "<think>I look up Bern.</think><search>Bern</search>"
    assert last.text.startswith("<think>Bern lies on the Aare. So the answer is Aare.</think>")


PAGE = {"title": "Bern", "text": None, "sentences": ["A town."]}


@pytest.mark.parametrize(
    ("source", "record"),
    [
        ("math", {"problem": "1+2?", "answer": None, "solution": r"\boxed{3}"}),
        ("math", {"problem": None, "question": "1+2?", "answer": "3"}),
        ("hotpotqa", {"_id": None, "id": "a", "question": "1+2?", "answer": None, "golden_answers": ["3"]}),
        ("hotpotqa", {"question": "1+2?", "answer": "3", "answers": None, "context": [PAGE]}),
        ("musique", {"question": "1+2?", "answer": None, "answers": ["3"], "answerable": None, "answer_aliases": None}),
        ("verl", {"question": "1+2?", "reward_model": None, "golden_answers": ["3"]}),
        (
            "verl",
            {"question": "1+2?", "reward_model": {"ground_truth": None, "style": "rule"}, "golden_answers": ["3"]},
        ),
        ("verl", {"question": None, "prompt": "1+2?", "golden_answers": None, "reward_model": {"ground_truth": "3"}}),
    ],
)
def test_a_null_field_is_a_missing_one(tmp_path, source, record):
    """Files of several sets have the fields of all of them, null where a record has none."""
    file = write(tmp_path / "train.jsonl", [record])
    dataset = load_dataset(DataConfig(source, str(file), held_out=twin(file)))
    (example,) = dataset.train
    assert (example.question, example.golds) == ("1+2?", ("3",))
    assert example.id == (record.get("id") or "train-1")
    assert dataset.documents == ((Document("Bern", "A town."),) if "context" in record else None)


def test_musique(tmp_path, caplog):
    row = {
        "id": "2hop__1", "question": "On what?", "answer": "Aare", "answer_aliases": ["Aar"], "answerable": True,
        "paragraphs": [{"idx": 0, "title": "Bern", "paragraph_text": "A town.", "is_supporting": True}],
    }  # fmt: skip
    write(tmp_path / "musique_ans_v1.0_train.jsonl", [row, row | {"answerable": False}])
    write(tmp_path / "musique_ans_v1.0_dev.jsonl", [row])
    dataset = load_dataset(DataConfig("musique", str(tmp_path)))
    assert [(e.id, e.golds) for e in dataset.train] == [("2hop__1", ("Aare", "Aar"))]
    assert "train.jsonl: 1 of 2 records are left out" in caplog.text
    assert dataset.documents == (Document("Bern", "A town."),)


def test_math_as_folders_and_as_files(tmp_path):
    problem = {"problem": "1 + 1?", "level": "Level 1", "type": "Algebra", "solution": r"It is $\boxed{\frac{4}{2}}$."}
    for split, number in (("train", 1), ("train", 2), ("test", 5)):
        path = tmp_path / split / "algebra" / f"{number}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(problem))
    dataset = load_dataset(DataConfig("math", str(tmp_path)))
    assert [(e.id, e.golds, e.kind) for e in dataset.train] == [
        ("algebra/1", (r"\frac{4}{2}",), "math"), ("algebra/2", (r"\frac{4}{2}",), "math"),
    ]  # fmt: skip
    assert dataset.held_out[0].extra == {"level": "Level 1", "type": "Algebra"}
    file = write(tmp_path / "math500.jsonl", [{"question": "1 + 1?", "answer": "2"}])
    assert load_dataset(DataConfig("math", str(file), held_out=twin(file))).train[0].golds == ("2",)
    (tmp_path / "test" / "algebra" / "5.json").write_text("{")
    with pytest.raises(DataError, match=r"5\.json.*data\.malformed"):
        load_dataset(DataConfig("math", str(tmp_path)))
    with pytest.raises(DataError, match=r"test: holds no usable record \(1 malformed"):  # and not 0 questions
        load_dataset(DataConfig("math", str(tmp_path), malformed="skip"))
    (tmp_path / "train" / "algebra" / "2.json").write_text("[]")
    with pytest.raises(DataError, match=r"2\.json: expected an object, got list"):
        load_dataset(DataConfig("math", str(tmp_path)))


def test_tfds_builders_without_tensorflow(tmp_path):
    """The embedded world is such a builder. Read by columns, it gives the same questions."""
    world = load_world(tmp_path, 0)
    (folder,) = [path.parent for path in tmp_path.rglob("dataset_info.json")]
    columns = ColumnsConfig("text", "gold")
    dataset = load_dataset(DataConfig("tfds", str(folder), columns=columns))
    assert [(e.id, e.question, e.golds) for e in dataset.train] == [(q.id, q.text, (q.gold,)) for q in world.train]
    assert len(dataset.held_out) == len(world.held_out)
    with pytest.raises(DataError, match=r"no split 'other'; it has .*train"):
        load_dataset(DataConfig("tfds", str(folder), held_out="other", columns=columns))
    whole = json.loads((folder / "dataset_info.json").read_text())
    (alone := tmp_path / "alone").mkdir()
    whole["splits"] = [split for split in whole["splits"] if split["name"] == "train"]
    (alone / "dataset_info.json").write_text(json.dumps(whole))
    (alone / "features.json").write_bytes((folder / "features.json").read_bytes())
    with pytest.raises(DataError, match=r"no split for evaluation \(test, .*; it has train; name one with"):
        load_dataset(DataConfig("tfds", str(alone), columns=columns))
    with pytest.raises(ConfigError, match="'train' is the split for training"):
        load_dataset(DataConfig("tfds", str(folder), held_out="train", columns=columns))
    with pytest.raises(DataError, match=r"split train, record 1: missing field 'question'"):
        load_dataset(DataConfig("tfds", str(folder)))


def test_a_mixture_keeps_each_parts_own(tmp_path):
    sums = write(tmp_path / "sums.jsonl", [{"question": f"{i} + 1?", "answer": i + 1, "s": "Sums."} for i in range(5)])
    hotpot = write(tmp_path / "hotpot.json", [HOTPOT])
    parts = (
        DataPart("files", str(sums), twin(sums), kind="math", columns=ColumnsConfig(system="s"), weight=3.0),
        DataPart("hotpotqa", str(hotpot), twin(hotpot)),
        DataPart("files", str(sums), twin(sums), kind="math", weight=2.0),
    )
    dataset = load_dataset(DataConfig("mixture", mixture=parts))
    assert dataset.weights == {"files": 3.0, "hotpotqa": 1.0, "files-2": 2.0}
    # Of the first six, each part has as many as its weight; then the longer ones follow.
    order = ["files", "files-2", "files", "files", "hotpotqa", "files-2", "files", "files-2", "files"]
    assert [e.source for e in dataset.train] == [*order, "files-2", "files-2"]
    assert [e.source for e in dataset.held_out][:6] == order[:6]
    assert len({e.id for e in dataset.train}) == 11
    assert {(e.source, e.kind) for e in dataset.held_out} == {
        ("files", "math"),
        ("hotpotqa", "qa"),
        ("files-2", "math"),
    }
    qa = next(e.system for e in dataset.held_out if e.source == "hotpotqa")
    assert (system_prompt(dataset.held_out, "qa"), system_prompt(dataset.held_out, "math")) == (qa, "Sums.")
    assert len(dataset.documents) == 2
    assert dataset.num_demonstrations == 1  # of HotpotQA: the files have none
    with pytest.raises(ConfigError, match=r"data\.mixture: empty"):
        load_dataset(DataConfig("mixture"))
    with pytest.raises(ConfigError, match="cannot be a mixture"):
        load_dataset(DataConfig("mixture", mixture=(DataPart("mixture"),)))


def test_demonstrations_of_a_mixture_are_those_of_its_parts(tmp_path):
    line = {"question": "Q?", "answer": "It is <<1+1=2>>2.\n#### 2"}
    for name in ("train", "test"):
        write(tmp_path / "gsm8k" / f"{name}.jsonl", [line, line, line])
    write(tmp_path / "files" / "train.jsonl", ROWS)
    write(tmp_path / "files" / "test.jsonl", ROWS)
    parts = (
        DataPart("gsm8k", str(tmp_path / "gsm8k")), DataPart("files", str(tmp_path / "files")),
        DataPart("gsm8k", str(tmp_path / "gsm8k")),
    )  # fmt: skip
    dataset = load_dataset(DataConfig("mixture", mixture=parts))
    assert dataset.num_demonstrations == 6

    class Kit:
        def tool_for(self, skill):
            return "python"

        def run(self, tool, argument):
            return "2"

        def write_call(self, tool, argument):
            return "call"

        def write_result(self, text):
            return text

    ids = [dataset.demonstration(i, Kit()).example.id for i in range(6)]
    assert ids == [id for number in (1, 3, 5) for id in [f"gsm8k-train-{number}"] * 2]  # interleaved, too
