"""Questions asked twice, by hand and against a brute-force comparison of all pairs."""

import dataclasses
import json
import random
import re

import pyarrow
import pyarrow.parquet
import pytest

from appo_jax.components import build
from appo_jax.config import Config, DataConfig
from appo_jax.data.demonstrations import LeftOut
from appo_jax.data.describe import describe
from appo_jax.data.repetitions import SIMILARITY, find_repetitions
from appo_jax.data.source import Dataset, for_evaluation, load_dataset
from appo_jax.data.trace_files import without_overlaps
from appo_jax.errors import DataError
from appo_jax.prepare import describe_data
from appo_jax.text.tokenizer import policy_tokenizer
from appo_jax.tools.build import build_executor
from appo_jax.types import Example, Segment, Trace

LONG = "In which town was the leader of the company born that the oldest brother of Ada Lovelace works for since he left home"


def asked(*questions, prefix="t"):
    return [Example(f"{prefix}{i}", question, ("a",), "qa", "") for i, question in enumerate(questions)]


def test_by_hand():
    train = asked(
        "Who wrote Emma?",
        "  who wrote “EMMA” ",  # the same, but for case, spaces and punctuation
        "Who wrote Persuasion?",
        LONG + "?",
        LONG + " again?",  # nearly the same
        f"{LONG} in 1990?",
        f"{LONG} in 1991?",  # another number: another question
        "What is 2+3?",
        "What is 2-3?",
        "What is 2 + 3 ?",
        "ｗｈｏ wrote emma",  # full-width letters
        "Is Bern a town?",
    )
    found = find_repetitions(train, asked("is Bern a town", LONG + " now?", prefix="e"))
    assert found.duplicates == [(1, "t0"), (9, "t7"), (10, "t0")]
    assert found.near_duplicates == [(4, "t3")]
    assert found.overlaps == [(3, "e1"), (4, "e1"), (11, "e0")]
    assert found.indices(("duplicates", "overlaps")) == {1, 9, 10, 3, 4, 11}


def test_punctuation_in_numbers_and_factorials_is_kept():
    others = [
        "1.5 times 4?",
        "15 times 4?",
        "5! + 2",
        "5 + 2",
        "Is it 1:2?",
        "Is it 12?",
        "2² + 1",
        "22 + 1",
        "2^3",
        "23",
    ]
    same = [("1,000 + 1?", "1000 + 1"), ("2²", "2^2"), ("Is it 1.5, or 2?", "is it “1.5” or 2")]
    found = find_repetitions(asked(*others, *(text for pair in same for text in pair)), [])
    assert found.duplicates == [(11, "t10"), (13, "t12"), (15, "t14")]
    assert found.near_duplicates == []


def test_near_duplicates_are_those_of_a_comparison_of_all_pairs():
    draw = random.Random(0)
    words = [f"w{chr(97 + i)}" for i in range(26)]
    questions = []
    for _ in range(60):
        base = draw.choices(words, k=40)
        questions.append(" ".join(base))
        for _ in range(draw.randint(0, 3)):
            changed = list(base)
            for _ in range(draw.randint(1, 4)):
                changed[draw.randrange(40)] = draw.choice(words)
            questions.append(" ".join(changed))

    def triples(text):
        parts = re.findall(r"\w+", text)
        return {tuple(parts[i : i + 3]) for i in range(len(parts) - 2)}

    expected, clear = set(), set()
    for i, question in enumerate(questions):
        scores = [
            len(triples(question) & triples(other)) / len(triples(question) | triples(other)) for other in questions[:i]
        ]
        if question in questions[:i]:
            continue
        if any(score >= SIMILARITY for score in scores):
            expected.add(i)
        if any(score >= SIMILARITY + 0.1 for score in scores):
            clear.add(i)
    found = {index for index, _ in find_repetitions(asked(*questions), []).near_duplicates}
    assert found <= expected  # what is found is checked exactly
    assert len(found) >= 0.9 * len(expected)  # hashing may miss one near the threshold
    assert clear <= found
    assert len(expected) > 20


def test_what_data_drop_names_is_left_out_and_described(tmp_path, caplog):
    rows = ["Who wrote Emma?", "who wrote emma", LONG + "?", LONG + " again?", "In an exam?", "Alone?"]
    lines = [f'{{"question": "{question}", "answer": "a"}}' for question in rows]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    (tmp_path / "test.jsonl").write_text('{"question": "Held out?", "answer": "a"}')
    (tmp_path / "exam.jsonl").write_text('{"problem": "In an exam", "answer": 3}')

    def config(*drop):
        return DataConfig("files", str(tmp_path), drop=drop, evaluation=(str(tmp_path / "exam.jsonl"),))

    def kept(*drop):
        return [int(example.id.removeprefix("train-")) for example in load_dataset(config(*drop)).train]

    assert kept() == [1, 2, 3, 4, 5, 6]
    assert kept("duplicates") == [1, 3, 4, 5, 6]
    assert kept("near_duplicates") == [1, 2, 3, 5, 6]
    assert kept("duplicates", "near_duplicates", "overlaps") == [1, 3, 6]
    assert "3 of 6 training questions are left out: 1 duplicates, 1 near duplicates, 1 overlaps" in caplog.text
    report = describe(load_dataset(config()), config("duplicates"), None, 0)
    assert "train: 6 questions" in report
    assert "duplicates: 1 of an earlier question, such as train-2 and train-1" in report
    assert "overlaps: 1 of a question for evaluation" in report
    assert "such as train-5 and exam, line 1" in report
    assert report.count("accepted: 'a'") == 6


def test_what_a_source_holds_does_not_control_the_terminal(tmp_path, monkeypatch):
    (tmp_path / "wild_source.py").write_text(
        "from appo_jax.data.source import Dataset\nfrom appo_jax.types import Example\n"
        "def load(config):\n"
        "    return Dataset([Example('a\\x1b[2J', 'Who\\x1b[31m?', ('x\\x07',), 'qa', '', 's\\x9b1m')], [])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    text = describe_data(Config(data=DataConfig(source="wild_source:load")))
    assert "a�[2J" in text
    assert "Who�[31m?" in text
    assert not {"\x1b", "\x07", "\x9b"} & set(text)


def test_traces_of_questions_for_evaluation_are_left_out_and_described(tiny, tmp_path):
    for name, question in (("train", "Alone?"), ("test", "Held out?"), ("exam", "In an exam?")):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"question": "{question}", "answer": "a"}}')
    data = DataConfig("files", str(tmp_path), evaluation=(str(tmp_path / "exam.jsonl"),))
    evaluation = for_evaluation(load_dataset(data), data)
    traces = [
        Trace(example, (Segment("a", True),)) for example in asked("held out", "Another?", "in an exam", "Alone?")
    ]
    left_out = LeftOut()
    kept = without_overlaps(traces, evaluation, left_out)
    assert [trace.example.question for trace in kept] == ["Another?", "Alone?"]
    assert left_out.to_json() == {
        "its question is in the evaluation (data.drop: overlaps)": {"count": 2, "first": ["t0", "t2"]}
    }
    with pytest.raises(DataError, match=r"sft\.traces: the questions of all 1 traces are in the evaluation"):
        without_overlaps(traces[:1], evaluation, left_out)
    (tmp_path / "t.jsonl").write_text(
        '{"instruction": "Held out", "output": "a"}\n{"instruction": "Else?", "output": "a"}'
    )
    sft = dataclasses.replace(tiny.sft, traces=(str(tmp_path / "t.jsonl"),))
    tools = dataclasses.replace(tiny.tools, enabled=("python",))
    report = describe_data(dataclasses.replace(tiny, data=data, sft=sft, tools=tools))
    assert "traces of sft.traces: 2 can be used, 0 cannot" in report
    assert "overlaps: the questions of 1 are questions for evaluation" in report


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.jsonl", '{"Question": "Where?", "Final answer": "a"}\n'),  # GAIA
        ("bamboogle.csv", "Question,Answer\nWhere?,a\n"),
        ("xbench.csv", "id,prompt,answer,canary\n1,NgoEEARd,MgE=,ab\n"),
        ("math/test/algebra/1.json", '{"problem": "Where?", "solution": "a"}'),
    ],
)
def test_questions_of_every_published_form_are_compared(tmp_path, name, content):
    for split, question in (("train", "where"), ("test", "Held out?")):
        (tmp_path / f"{split}.jsonl").write_text(f'{{"question": "{question}", "answer": "a"}}')
    (tmp_path / "eval" / name).parent.mkdir(parents=True)
    (tmp_path / "eval" / name).write_text(content)
    data = DataConfig("files", str(tmp_path), evaluation=(str(tmp_path / "eval" / name.partition("/")[0]),))
    evaluation = for_evaluation(load_dataset(data), data)
    assert [example.question for example in evaluation] == ["Held out?", "Where?"]
    (tmp_path / "eval" / name).write_text(
        content.lower().replace("question", "q").replace("prompt", "q").replace("problem", "q")
    )
    with pytest.raises(DataError, match=r"no question; expected .* under one of question, problem, .*prompt"):
        for_evaluation(load_dataset(data), data)


def compared(tmp_path, *evaluation):
    """The questions of the files for evaluation of a run that trains on "Train?"."""
    (tmp_path / "run").mkdir(exist_ok=True)
    for split in ("train", "test"):
        (tmp_path / "run" / f"{split}.jsonl").write_text(f'{{"question": "{split}?", "answer": "a"}}')
    data = DataConfig("files", str(tmp_path / "run"), evaluation=tuple(map(str, evaluation)), drop=("overlaps",))
    dataset = load_dataset(data)
    assert [example.question for example in dataset.train] == ["train?"]
    return [example.question for example in for_evaluation(dataset, data)][1:]


def test_a_folder_for_evaluation_is_compared_without_its_training_split(tmp_path):
    """As 2WikiMultihopQA is distributed: the test split has no answers, so `eval` asks the questions of dev.json."""
    folder = tmp_path / "2wiki"
    folder.mkdir()
    for split, answer in (("train", "a"), ("dev", "a"), ("test", "")):
        (folder / f"{split}.json").write_text(json.dumps([{"_id": split, "question": f"{split}?", "answer": answer}]))
    (folder / "id_aliases.json").write_text('{"Q_id": "Q1", "aliases": []}\n{"Q_id": "Q2", "aliases": []}\n')
    assert compared(tmp_path, folder) == ["dev?"]


def test_a_record_that_is_no_question_is_left_out_as_in_an_evaluation(tmp_path, caplog):
    rows = [{"question": "Where?", "answer": "a"}, {"answer": "a"}, [1], {"question": "When?"}]
    (tmp_path / "exam.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert compared(tmp_path, tmp_path / "exam.jsonl") == ["Where?", "When?"]
    assert "exam.jsonl, line 2: no question; expected" in caplog.text
    assert "exam.jsonl, line 3: expected an object, got list" in caplog.text


def test_prompts_that_are_chat_messages_are_compared(tmp_path):
    """veRL's prompt asks for a format, so the question alone is compared if the record has it."""
    prompt = [{"role": "system", "content": "Think."}, {"role": "user", "content": "Where? Answer after ####."}]
    rows = [{"prompt": prompt, "extra_info": {"question": question}} for question in ("Where?", None)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "exam.parquet")
    assert compared(tmp_path, tmp_path / "exam.parquet") == ["Where?", "Where? Answer after ####."]


def test_a_run_without_questions_says_why(tiny, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"question": "Who?", "answer": "a"}')
    (tmp_path / "test.jsonl").write_text('{"question": "who", "answer": "a"}')
    data = DataConfig("files", str(tmp_path), drop=("overlaps",))
    with pytest.raises(DataError, match=r"'files' has no training question .*data\.drop = \['overlaps'\]"):
        build(dataclasses.replace(tiny, data=data))
    report = describe(Dataset(asked("Who?"), []), data, None, 0)
    assert "held out: 0 questions" in report


def test_prompts_are_counted_as_the_policy_sees_them(tiny, tmp_path):
    """With the tools described where the system prompt has a place for them."""
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"question": "{name}?", "answer": "a"}}')
    data = DataConfig("files", str(tmp_path), system_prompt="Your tools:\n{tools}")
    config = dataclasses.replace(tiny, data=data, tools=dataclasses.replace(tiny.tools, enabled=("python",)))
    with build_executor(config.tools, None) as executor:
        system = "Your tools:\n" + executor.call_format.instructions()
    length = len(policy_tokenizer(config.policy).render_prompt(system, "train?"))
    report = describe_data(config)
    assert f"longest {length}; 1 above rollout.max_prompt_tokens = {config.rollout.max_prompt_tokens}" in report
