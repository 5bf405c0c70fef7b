"""Sets from files: every form of gold, malformed files, and the real sets if they are available."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from appo_jax.benchmark.questions import load_questions
from appo_jax.benchmark.sets import BENCHMARKS, Item
from appo_jax.errors import ConfigError, DataError


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def load_items(name, path):
    return list(load_questions(name, path).items)


def left_out(name, path):
    return load_questions(name, path).left_out


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


def test_two_files_of_the_same_questions_are_one_set(tmp_path):
    """As in the folder of GSM8K; a question that one file has twice is asked twice."""
    write(tmp_path / "test.jsonl", *[{"question": q, "answer": f"#### {q}"} for q in "1223"])
    write(tmp_path / "test_socratic.jsonl", *[{"question": q, "answer": f"Why?\n#### {q}"} for q in "12234"])
    assert [(item.id, item.question) for item in load_items("gsm8k", tmp_path)] == [*zip("01238", "12234", strict=True)]
    assert left_out("gsm8k", tmp_path) == {
        "it is in another file, too": [f"test_socratic.jsonl, line {number}" for number in (1, 2, 3, 4)]
    }


def test_the_answer_of_a_solution_is_in_its_last_box(tmp_path):
    rows = [{"problem": "?", "solution": r"Not \boxed{1}, but \boxed{\frac{1}{2}}."}, {"problem": "?", "solution": 7}]
    rows.append({"problem": "?", "solution": r"So it is $\boxed 2$."})
    items = load_items("math", write(tmp_path / "m.jsonl", *rows))
    assert [item.golds for item in items] == [(r"\frac{1}{2}",), ("7",), ("2",)]
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


def test_questions_that_are_none_of_the_set_are_left_out_and_counted(tmp_path, caplog):
    """Questions about files and images, unanswerable twins (which have the id of their sibling), and unknown answers."""
    gaia = [{"Question": "a", "Final answer": "1", "Level": 1, "file_name": name} for name in ("", "x.png", "")]
    gaia += [{"Question": "b", "Final answer": "?", "Level": 2}, {"Question": "b", "Final answer": "1", "Level": 4}]
    found = load_questions("gaia", write(tmp_path / "g.jsonl", *gaia))
    assert [item.id for item in found.items] == ["0", "2"]
    assert list(found.left_out.values()) == [["line 2"], ["line 4"], ["line 5"]]
    assert "left out 1: it asks about a file (line 2)" in caplog.text
    hle = [{"id": i, "question": "a", "answer": "1", "image": image} for i, image in enumerate(("", "data:image/png;"))]
    assert left_out("hle", write(tmp_path / "h.jsonl", *hle)) == {"it asks about an image": ["line 2"]}
    twins = [{"id": "2hop", "question": "a", "answer": "1", "answerable": answerable} for answerable in (True, False)]
    reason = "its paragraphs do not hold the answer (answerable = false)"
    assert left_out("musique", write(tmp_path / "m.jsonl", *twins)) == {reason: ["line 2"]}


@pytest.mark.parametrize(
    ("name", "line", "reason"),
    [
        ("aime24", '{"question": "a"}', "no answer"),
        ("aime24", '{"question": "a", "answer": " "}', "no answer"),
        ("aime24", '{"question": "a", "answer": []}', "no answer"),
        ("gsm8k", '{"question": "a", "answer": "x\\n####  "}', "no answer"),
        ("aime24", '{"answer": "a"}', "no question"),
        ("aime24", "[1]", "expected an object, got list"),
        ("gaia", '{"Question": "a", "Final answer": "1", "Level": 4}', "level '4' is unknown"),
        ("aime24", '{"id": 1, "question": "b", "answer": 1}', "its id is that of an earlier question"),
    ],
)
def test_a_faulty_record_costs_itself_and_is_named(tmp_path, name, line, reason):
    good = [json.dumps({"id": id, "question": "a", "answer": 1, "Level": 1}) for id in (1, 2)]
    (tmp_path / "x.jsonl").write_text("\n".join([good[0], line, good[1]]))
    found = load_questions(name, tmp_path / "x.jsonl")
    assert [item.id for item in found.items] == ["1", "2"]
    ((told, places),) = found.left_out.items()
    assert told.startswith(reason)
    assert places == ["line 2"]


def test_a_file_without_a_usable_question_says_why(tmp_path):
    file = write(tmp_path / "x.jsonl", {"question": "a"}, {"answer": "a"})
    with pytest.raises(DataError, match=r"holds no question of AIME 2024: line 1: no answer; .*; line 2: no question"):
        load_questions("aime24", file)


@pytest.mark.parametrize(
    ("lines", "message"),
    [("", "the file is empty; expected"), ('\n{"question": "a", "ans', "line 2: not valid JSON")],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, lines, message):
    (tmp_path / "x.jsonl").write_text(lines)
    with pytest.raises(DataError, match=message):
        load_items("aime24", tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("name", "fields", "id"),
    [
        ("bamboogle", {"Question": "Who?", "Answer": "x"}, "0"),  # the authors' csv
        ("aime24", {"ID": "2024-I-4", "Problem": "Who?", "Solution": "long", "Answer": "x"}, "2024-I-4"),
    ],
)
def test_names_of_fields_may_have_any_case(tmp_path, name, fields, id):
    with (tmp_path / "x.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerow(fields)
    (item,) = load_items(name, tmp_path / "x.csv")
    assert (item.id, item.question, item.golds) == (id, "Who?", ("x",))


def test_math_is_read_as_it_is_distributed(tmp_path):
    """One object per file, in folders; of a parquet file per subject and split, only those of the test split."""
    for split, subject, number in (("train", "algebra", 1), ("test", "algebra", 10), ("test", "geometry", 2)):
        folder = tmp_path / "MATH" / split / subject
        folder.mkdir(parents=True)
        record = {"problem": split, "level": "Level 5", "type": subject, "solution": rf"\boxed{{{number}}}"}
        (folder / f"{number}.json").write_text(json.dumps(record))
    for folder in (tmp_path / "MATH", tmp_path / "MATH" / "test"):
        items = load_items("math", folder)
        assert [(item.id, item.golds) for item in items] == [("algebra/10", ("10",)), ("geometry/2", ("2",))]
    for subject in ("algebra", "geometry"):
        (tmp_path / "hub" / subject).mkdir(parents=True)
        for split in ("train", "test"):
            rows = [{"problem": f"{split} {subject}", "solution": r"\boxed{1}"}]
            parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "hub" / subject / f"{split}-00000.parquet")
    assert [item.question for item in load_items("math", tmp_path / "hub")] == ["test algebra", "test geometry"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no question of MATH: there are no records"):
        load_items("math", tmp_path / "empty")


SPLITS = [
    (["musique_ans_v1.0_train.jsonl", "musique_ans_v1.0_dev.jsonl"], "musique_ans_v1.0_dev.jsonl"),
    (["train-00000-of-00002.jsonl", "validation-00000-of-00001.jsonl"], "validation-00000-of-00001.jsonl"),
    (["train.jsonl", "val.jsonl"], "val.jsonl"),
    (["data/Train/a.jsonl", "data/Valid/a.jsonl"], "data/Valid/a.jsonl"),
    (["dev.jsonl", "main/test-00000.jsonl", "train.jsonl"], "main/test-00000.jsonl"),
    (["train_test/train.jsonl", "train_test/test.jsonl"], "train_test/test.jsonl"),
    (["train.jsonl", "questions.jsonl"], "questions.jsonl"),
    (["latest.jsonl"], "latest.jsonl"),
]


@pytest.mark.parametrize(("names", "read"), SPLITS)
def test_of_a_folder_the_test_or_the_validation_split_is_read_and_never_the_training_split(tmp_path, names, read):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, {"question": name, "answer": "x"})
    assert [item.question for item in load_items("hotpotqa", tmp_path)] == [read]


def test_a_folder_with_nothing_but_a_training_split_is_refused(tmp_path):
    write(tmp_path / "train.jsonl", {"question": "?", "answer": "x"})
    write(tmp_path / "id_aliases.json", {"Q_id": "Q60", "aliases": ["NYC"]})
    with pytest.raises(
        DataError, match=r"holds only a training split \(train\.jsonl .*expected files of a test, valid"
    ):
        load_items("2wiki", tmp_path)


def write_2wiki(folder):
    """As it is distributed: the answers of the test split are not public."""
    dev = {"_id": "d", "question": "Dev?", "answer": "New York", "answer_id": "Q60"}
    test = {"_id": "t", "question": "Test?", "answer": "", "answer_id": None}
    for split, record in (("train", dev | {"question": "Train?"}), ("dev", dev), ("test", test)):
        (folder / f"{split}.json").write_text(json.dumps([record]))
    write(folder / "id_aliases.json", *[{"Q_id": f"Q{i}", "aliases": ["NYC"], "demonyms": []} for i in (60, 61)])


def test_a_test_split_without_answers_gives_way_to_the_validation_split(tmp_path, caplog):
    for name in ("2wiki", "gaia/test", "gaia/validation"):
        (tmp_path / name).mkdir(parents=True)
    write_2wiki(tmp_path / "2wiki")
    (item,) = load_items("2wiki", tmp_path / "2wiki")
    assert (item.question, item.golds) == ("Dev?", ("New York", "NYC"))
    assert "2wiki: its test split has no answers; its dev (validation) split is read" in caplog.text
    gaia = {"task_id": "a", "Question": "Test?", "Final answer": "?", "Level": 1, "file_name": ""}
    write(tmp_path / "gaia" / "test" / "metadata.jsonl", gaia)
    write(tmp_path / "gaia/validation/metadata.jsonl", gaia | {"Question": "Validation?", "Final answer": "7"})
    assert [item.question for item in load_items("gaia", tmp_path / "gaia")] == ["Validation?"]
    (tmp_path / "gaia/validation/metadata.jsonl").unlink()
    with pytest.raises(DataError, match="those of the test split are not public; give the validation split"):
        load_items("gaia", tmp_path / "gaia")


def test_numbers_and_missing_values_are_read_as_pandas_writes_them(tmp_path):
    """A column of integers with a gap, or of missing texts alone, is one of floats with NaN."""
    nan = float("nan")
    columns = {"Question": ["a", "b", "c"], "Final answer": ["x", "y", "z"], "file_name": [nan] * 3}
    parquet.write_table(pa.table(columns | {"Level": [1.0, 2.0, nan]}), tmp_path / "gaia.parquet")
    found = load_questions("gaia", tmp_path / "gaia.parquet")
    assert [(item.question, item.level) for item in found.items] == [("a", "1"), ("b", "2")]
    assert found.left_out == {"level '' is unknown; GAIA, text only has 1, 2, 3": ["row 3"]}
    columns = {"problem": ["a", "b", "c"], "answer": [1, 2, 3], "level": [0.0, 2.0, nan], "subject": [nan] * 3}
    parquet.write_table(pa.table(columns), tmp_path / "math.parquet")
    items = load_items("math500", tmp_path / "math.parquet")
    assert [(item.level, item.type) for item in items] == [("0", ""), ("2", ""), ("", "")]


def test_a_question_may_be_chat_messages(tmp_path):
    """As for sources, exactly one of them is the user's; another record is left out and named."""
    user, system = {"role": "user", "content": "Who?"}, {"role": "system", "content": "Think."}
    prompts = [[system, user], [user, user], [{"role": "user"}], "Who?"]
    file = write(tmp_path / "x.jsonl", *[{"prompt": prompt, "answer": "x"} for prompt in prompts])
    found = load_questions("bamboogle", file)
    assert [(item.id, item.question) for item in found.items] == [("0", "Who?"), ("3", "Who?")]
    assert found.left_out == {
        "field 'prompt': expected one user message, after at most one system message; got user, user": ["line 2"],
        "missing field 'content' (it has 'role')": ["line 3"],
    }


def test_webwalkers_nested_fields_are_its_groups(tmp_path):
    info = {"difficulty_level": "hard", "type": "multi_source", "lang": "zh", "domain": "game"}
    (item,) = load_items("webwalker", write(tmp_path / "w.jsonl", {"question": "?", "answer": "x", "info": info}))
    assert (item.level, item.type, item.language) == ("hard", "multi_source", "zh")


def test_2wikis_aliases_are_in_the_file_beside_it(tmp_path):
    dev = write(tmp_path / "dev.json")
    dev.write_text(json.dumps([{"_id": "a", "question": "?", "answer": "New York", "answer_id": "Q60"}]))
    assert load_items("2wiki", dev)[0].golds == ("New York",)
    (tmp_path / "other").mkdir()
    write(tmp_path / "other" / "id_aliases.json", {"Q_id": "Q60", "aliases": ["NYC"], "demonyms": []})
    dev = dev.rename(tmp_path / "other" / "dev.json")
    assert load_items("2wiki", dev)[0].golds == ("New York", "NYC")


def test_a_set_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "own_sets.py").write_text(
        "from appo_jax.benchmark.sets import Benchmark\n"
        "def prepare(record, path):\n"
        "    if record['q'] == 'no': raise ValueError('not mine')\n"
        "    return {'question': record['q'], 'answer': record['a']}\n"
        "mine = Benchmark('Mine', 'qa', prepare=prepare)\n"
        "other = 3\n"
        "ruled = Benchmark('Mine', 'qq', prepare=prepare)\n"
        "headed = Benchmark('Mine', 'qa', 'F1', prepare=prepare)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    file = write(tmp_path / "x.jsonl", {"Q": "Who?", "A": "x"}, {"Q": "no", "A": "x"}, {"A": "x"})
    found = load_questions("own_sets:mine", file)
    assert [(item.question, item.golds) for item in found.items] == [("Who?", ("x",))]
    assert found.left_out == {"not mine": ["line 2"], "the set's `prepare` raised KeyError: 'q'": ["line 3"]}
    with pytest.raises(ConfigError, match="set = 'own_sets:ruled': rule = 'qq'; expected one of math, qa, gaia, judge"):
        load_questions("own_sets:ruled", file)
    with pytest.raises(ConfigError, match="set = 'own_sets:headed': headline = 'F1'; expected one of accuracy, f1"):
        load_questions("own_sets:headed", file)
    for name in ("own_sets:other", "own_sets:missing", "aime"):
        with pytest.raises(ConfigError, match=rf"set = '{name}'.*expected aime24, .* or `package.module:set`"):
            load_questions(name, file)


def test_the_set_of_the_page_on_evaluation_keeps_what_predictions_and_reports_need(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "eval.md").read_text()
    (tmp_path / "my_sets.py").write_text("# my_sets.py" + page.partition("# my_sets.py")[2].partition("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    file = write(tmp_path / "x.jsonl", {"id": "q7", "text": "Who?", "answers": ["x", "y"], "round": 3})
    [item] = load_items("my_sets:trivia", file)
    assert item == Item("q7", "Who?", ("x", "y"), "3")


def test_a_set_whose_function_returns_nothing_is_told(tmp_path, monkeypatch):
    (tmp_path / "empty_sets.py").write_text(
        "from appo_jax.benchmark.sets import Benchmark\nmine = Benchmark('Mine', 'qa', prepare=lambda r, path: None)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    file = write(tmp_path / "x.jsonl", {"q": "Who?", "a": "x"})
    with pytest.raises(DataError, match="line 1: the set's `prepare` returned a NoneType; expected"):
        load_questions("empty_sets:mine", file)


def test_a_missing_set_says_where_it_comes_from(tmp_path):
    with pytest.raises(DataError, match=r"no such file; MATH-500 comes from HuggingFaceH4/MATH-500"):
        load_items("math500", tmp_path / "x.jsonl")


COUNTS = {"aime24": 30, "aime25": 30, "math500": 500, "hotpotqa": 200, "2wiki": 200, "bamboogle": 125, "webwalker": 680}


@pytest.mark.parametrize("name", COUNTS)
def test_the_official_files_load_whole(shared_data, name):
    found = load_questions(name, shared_data / "eval" / f"{name}.jsonl")
    assert len(found.items) == COUNTS[name] == BENCHMARKS[name].count
    assert not found.left_out
    if name == "webwalker":
        assert {item.language for item in found.items} == {"en", "zh", ""}


def test_gsm8ks_test_file_loads_whole(shared_data):
    assert len(load_items("gsm8k", shared_data / "gsm8k" / "test.jsonl")) == BENCHMARKS["gsm8k"].count
