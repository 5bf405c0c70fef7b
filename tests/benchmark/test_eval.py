"""`appo-jax eval` on predictions: hand-computed figures, faulty files, a faulty judge."""

import dataclasses
import json
from datetime import date, datetime
from decimal import Decimal

import pyarrow
import pyarrow.parquet as parquet
import pytest
from faulty_judge import FaultyJudge

from appo_jax.benchmark.compare import compare
from appo_jax.cli import main
from appo_jax.config import Config, DataConfig, DataPart, JudgeConfig, PolicyConfig, ToolsConfig
from appo_jax.errors import ConfigError, DataError
from appo_jax.eval_command import Evaluation, _setting, evaluate_set


@pytest.fixture
def data(tmp_path):
    """Four questions whose answers are 1, 2, 3 and 4."""
    file = tmp_path / "set.jsonl"
    file.write_text(
        "".join(
            json.dumps({"id": i, "question": f"{i}?", "answer": i, "level": "ab"[i % 2]}) + "\n" for i in (1, 2, 3, 4)
        )
    )
    return file


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_predictions(path, *pairs):
    return write_lines(path, [{"id": id, "prediction": text} for id, text in pairs])


def report_of(asked):
    evaluate_set(asked)
    return json.loads((asked.out / "report.json").read_text())


def test_figures_by_hand(data, tmp_path):
    """Question 1: 3 of 3 right. 2: 2 of 3. 3: 0 of 3, three answers. 4: 1 of 3, and the vote is wrong."""
    pairs = [(1, "1"), (1, "1.0"), (1, "\\boxed{1}"), (2, "2"), (2, "7"), (2, "2"), (3, "5"), (3, "6"), (3, "7")]
    predictions = write_predictions(tmp_path / "p.jsonl", *pairs, (4, "9"), (4, "4"), (4, "9"))
    record = report_of(Evaluation("math500", data, tmp_path / "out", predictions))
    assert record["accuracy"][0] == pytest.approx((1 + 2 / 3 + 0 + 1 / 3) / 4)
    assert record["pass_at_k"]["1"][0] == pytest.approx(record["accuracy"][0])
    assert record["pass_at_k"]["3"][0] == pytest.approx(3 / 4)
    assert "5" not in record["pass_at_k"]
    assert record["majority"][0] == pytest.approx((1 + 1 + 0 + 0) / 4)
    assert record["by_level"]["a"]["accuracy"][0] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert not any([*record["counted_as_wrong"].values(), *record["unknown_ids"], *record["uneven_samples"]])
    assert record["majority_at_k"] == {}
    items = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").read_text().splitlines()]
    assert [[s["correct"] for s in item["samples"]] for item in items][1] == [True, False, True]


def test_what_is_missing_counts_as_wrong_and_is_listed(data, tmp_path):
    predictions = write_predictions(tmp_path / "p.jsonl", (1, "1"), (2, "2"), (2, "2"), (99, "1"), (3, " "))
    record = report_of(Evaluation("math500", data, tmp_path / "out", predictions))
    assert record["accuracy"][0] == pytest.approx(0.5)
    assert record["counted_as_wrong"]["without_prediction"] == ["4"]
    assert record["counted_as_wrong"]["without_answer"] == ["3"]
    assert record["unknown_ids"] == ["99"]
    assert record["uneven_samples"] == ["2"]
    wrong, others = (tmp_path / "out" / "report.md").read_text().split("Counted by their own number of samples")
    assert "Counted as wrong:\n\n- without prediction: 1 (4)\n- without answer: 1 (3)\n" in wrong
    assert (
        "- uneven samples: 1 (2)\n\nNot counted: these are no questions of the set:\n\n- unknown ids: 1 (99)" in others
    )


def test_questions_beyond_the_limit_are_no_unknown_ids(data, tmp_path):
    predictions = write_predictions(tmp_path / "p.jsonl", (1, "1"), (3, "3"), (4, "4"))
    record = report_of(Evaluation("math500", data, tmp_path / "out", predictions, limit=2))
    assert record["unknown_ids"] == []
    assert record["counted_as_wrong"]["without_prediction"] == ["2"]
    write_predictions(tmp_path / "p.jsonl", (3, "3"))
    with pytest.raises(DataError, match="has no prediction for the first 2 questions; raise --limit"):
        evaluate_set(Evaluation("math500", data, tmp_path / "out", predictions, limit=2))


def test_what_is_left_out_of_the_set_is_in_the_report(data, tmp_path):
    data.write_text(data.read_text() + '{"id": 5, "question": "5?", "answer": ""}\n')
    predictions = write_predictions(tmp_path / "p.jsonl", (1, "1"))
    record = report_of(Evaluation("math500", data, tmp_path / "out", predictions))
    ((reason, places),) = record["left_out"].items()
    assert (record["questions"], places) == (4, ["line 5"])
    assert f"Left out of the set's file:\n\n- {reason}: 1 (line 5)" in (tmp_path / "out" / "report.md").read_text()


def test_numbers_that_pandas_made_floats_are_whole_and_nan_is_no_answer(tmp_path):
    """A column of integers with a gap is a column of floats."""
    data = tmp_path / "set.jsonl"
    golds = {1: 1990, 2: 7, 3: "nan", 4: 0.5}
    data.write_text("".join(json.dumps({"id": i, "question": f"{i}?", "answer": g}) + "\n" for i, g in golds.items()))
    file = tmp_path / "p.parquet"
    columns = {"id": [1.0, 2.0, 3.0, 4.0], "prediction": [1990.0, 8.0, float("nan"), 0.5]}
    parquet.write_table(pyarrow.table(columns), file)
    record = report_of(Evaluation("hotpotqa", data, tmp_path / "out", file))
    assert record["accuracy"][0] == 0.5
    assert record["counted_as_wrong"]["without_answer"] == ["3"]
    assert record["unknown_ids"] == []


def test_a_gold_in_a_file_of_predictions_is_no_prediction(data, tmp_path):
    """If no field for predictions has a value, it is a sample without an answer, whatever else the line holds."""
    lines = [{"id": 1, "prediction": None, "answer": "1"}, {"id": 2, "output": None, "response": "2", "answer": "7"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = report_of(Evaluation("math500", data, tmp_path / "out", tmp_path / "p.jsonl"))
    assert record["accuracy"][0] == pytest.approx(1 / 4)
    assert record["counted_as_wrong"]["without_answer"] == ["1"]
    assert record["counted_as_wrong"]["without_prediction"] == ["3", "4"]
    with pytest.raises(DataError, match="line 1: expected fields id and prediction, found id, question, answer"):
        evaluate_set(Evaluation("math500", data, tmp_path / "out", data))


def test_the_first_field_with_a_value_holds_the_prediction(data, tmp_path):
    """Files of two programs that were joined have the fields of both, null (or NaN, as pandas writes it) where a line has none."""
    pairs = [("1", None), (None, "2"), (float("nan"), "3"), (None, None)]
    lines = [{"id": id, "prediction": p, "response": r} for id, (p, r) in enumerate(pairs, start=1)]
    record = report_of(
        Evaluation("math500", data, tmp_path / "out", write_lines(tmp_path / "p.jsonl", lines)),
    )
    assert record["accuracy"][0] == 3 / 4
    assert record["counted_as_wrong"]["without_answer"] == ["4"]


def test_an_empty_list_is_no_sample_and_truth_values_are_yes_or_no(tmp_path):
    """As in golds; a date is one, too."""
    golds = {1: "yes", 2: False, 3: "2020-05-04", 4: "x"}
    data = write_lines(tmp_path / "set.jsonl", [{"id": i, "question": f"{i}?", "answer": g} for i, g in golds.items()])
    lines = [{"id": 1, "prediction": True}, {"id": 2, "prediction": ["no", False]}, {"id": 4, "prediction": []}]
    record = report_of(Evaluation("hotpotqa", data, tmp_path / "out", write_lines(tmp_path / "p.jsonl", lines)))
    assert record["accuracy"][0] == 2 / 4
    assert record["counted_as_wrong"]["without_prediction"] == ["3", "4"]
    assert record["uneven_samples"] == ["2"]
    parquet.write_table(pyarrow.table({"id": [3], "prediction": [date(2020, 5, 4)]}), tmp_path / "p.parquet")
    assert report_of(Evaluation("hotpotqa", data, tmp_path / "out", tmp_path / "p.parquet"))["accuracy"][0] == 1 / 4
    write_lines(tmp_path / "p.jsonl", lines[2:])
    with pytest.raises(DataError, match=r"p\.jsonl: has no prediction for any question of the set$"):
        evaluate_set(Evaluation("hotpotqa", data, tmp_path / "out", tmp_path / "p.jsonl"))


def test_files_of_other_programs(data, tmp_path):
    """A list is the samples of a question; fields that rollouts of ours have mean nothing in a file from elsewhere."""
    lines = [
        {"id": 1, "prediction": ["1", 7, None], "calls": 2},
        {"id": 2, "prediction": 2, "calls": [{}], "correct": 0},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = report_of(Evaluation("math500", data, tmp_path / "out", tmp_path / "p.jsonl"))
    assert record["accuracy"][0] == pytest.approx((1 / 3 + 1) / 4)
    assert record["rollouts"] == {}
    items = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").read_text().splitlines()]
    (sample,) = items[1]["samples"]
    assert (sample["correct"], sample["record"]) == (True, {"calls": [{}], "correct": 0})


def test_rollouts_of_ours_in_a_file_of_predictions_keep_their_figures(data, tmp_path):
    """Files of several evaluations may be joined. Prose is no answer of a rollout."""
    call = {"name": "search", "argument": "1", "result": "one", "outcome": "ok", "seconds": 0.1}
    facts = {"stop_reason": "answer", "seconds": 2.0, "decode_seconds": 0.5}
    lines = [
        {"id": 1, "prediction": "\\boxed{1}", "calls": [call, call], "tokens": 30} | facts,
        {"id": 2, "prediction": "2", "calls": [call], "tokens": 10} | facts | {"stop_reason": "time"},
        {"id": 3, "prediction": "3", "calls": 7, "tokens": 10},  # made elsewhere
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = report_of(Evaluation("math500", data, tmp_path / "out", tmp_path / "p.jsonl"))
    assert record["accuracy"][0] == 2 / 4  # questions 1 and 3
    assert record["rollouts"] == {
        "calls_per_prediction": 1.5, "calls_per_right_answer": 3.0, "calls": {"search/ok": 3},
        "tokens_per_prediction": 20.0, "seconds_per_question": 2.0, "tokens_per_second_of_decoding": 40.0,
        "stop_reasons": {"answer": 1, "time": 1},
    }  # fmt: skip
    assert "1 rollouts ended because `rollout.max_seconds` was over" in (tmp_path / "out/report.md").read_text()


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens": None}, {"tokens": True}, {"tokens": "9"}, {"stop_reason": None}, {"seconds": float("nan")},
        {"decode_seconds": float("inf")}, {"calls": None}, {"calls": ["search"]}, {"calls": [{"name": "search"}]},
    ],
)  # fmt: skip
def test_a_line_with_facts_of_other_types_is_a_prediction_without_them(data, tmp_path, wrong):
    """The mean tokens and seconds are those of the other line; the odd one is graded as a prediction from elsewhere."""
    facts = {"calls": [], "tokens": 30, "stop_reason": "answered", "seconds": 2.0, "decode_seconds": 0.5}
    lines = [{"id": 1, "prediction": "\\boxed{1}"} | facts, {"id": 2, "prediction": "2"} | facts | wrong]
    record = report_of(Evaluation("math500", data, tmp_path / "out", write_lines(tmp_path / "p.jsonl", lines)))
    assert record["accuracy"][0] == 2 / 4
    assert record["rollouts"] == {
        "calls_per_prediction": 0.0, "calls_per_right_answer": 0.0, "calls": {}, "tokens_per_prediction": 30.0,
        "seconds_per_question": 2.0, "tokens_per_second_of_decoding": 60.0, "stop_reasons": {"answered": 1},
    }  # fmt: skip


def test_files_of_predictions_that_cannot_be_graded_are_named(data, tmp_path):
    for lines, message in [
        ("", "the file is empty; expected one JSON object a line"),
        ('{"prediction": "1"}', "line 1: expected fields id and prediction"),
        (
            '{"id": 7, "prediction": "1"}',
            r"none of its ids \(7 …\) is a question of the set \(1 …\); .*whose `prepare` leaves it out",
        ),
        ("{", "line 1: not valid JSON"),
        ('{"id": 1, "prediction": {"text": "1"}}', r"line 1: field prediction: expected a text, .*, got {'text': '1'}"),
        (
            '{"id": 1, "prediction": ["1", ["2"]]}',
            r"line 1: field prediction: expected a text, a number, .*got \['2'\]",
        ),
    ]:
        (tmp_path / "p.jsonl").write_text(lines)
        with pytest.raises(DataError, match=message):
            evaluate_set(Evaluation("math500", data, tmp_path / "out", tmp_path / "p.jsonl"))
    with pytest.raises(DataError, match="no such file"):
        evaluate_set(Evaluation("math500", data, tmp_path / "out", tmp_path / "q.jsonl"))
    with pytest.raises(ConfigError, match="whose answers"):
        evaluate_set(Evaluation("math500", data, tmp_path / "out"))


def test_two_reports_are_compared_question_by_question(data, tmp_path):
    before = write_predictions(tmp_path / "a.jsonl", (1, "1"), (2, "0"), (3, "0"), (4, "4"))
    after = write_predictions(tmp_path / "b.jsonl", (1, "1"), (2, "2"), (3, "3"), (4, "0"))
    for name, file in (("a", before), ("b", after)):
        evaluate_set(Evaluation("math500", data, tmp_path / name, file))
    text = compare(tmp_path / "a", tmp_path / "b")
    assert "50.0 % -> 75.0 %; difference +25.0 points" in text
    assert "3 questions changed" in text
    assert "| 4 | 100 % | 0 % | 4? |" in text
    with pytest.raises(DataError, match=r"report\.json: no such file"):
        compare(tmp_path / "a", tmp_path / "c")
    items = tmp_path / "a" / "items.jsonl"
    items.write_text(items.read_text().replace('"judge_reason"', '"an_older_name"'))
    with pytest.raises(
        DataError, match=r"or of another version \(KeyError: 'judge_reason'\); let `appo-jax eval` write it"
    ):
        compare(tmp_path / "a", tmp_path / "b")


def test_reports_of_two_sets_or_two_versions_of_a_set_are_not_compared(data, tmp_path):
    """Official files have no ids, so question 1 of one set is not question 1 of another."""
    predictions = write_predictions(tmp_path / "p.jsonl", (1, "1"))
    for name, set in (("a", "math500"), ("b", "aime24")):
        evaluate_set(Evaluation(set, data, tmp_path / name, predictions))
    with pytest.raises(DataError, match=r"is a report of math500, .* of aime24"):
        compare(tmp_path / "a", tmp_path / "b")
    for old, new, field in (("2?", "2 + 0?", "question"), ('"answer": 2', '"answer": 3', "golds")):
        (tmp_path / "other.jsonl").write_text(data.read_text().replace(old, new))
        evaluate_set(Evaluation("math500", tmp_path / "other.jsonl", tmp_path / "c", predictions))
        with pytest.raises(DataError, match=f"question 2 has another {field} in .*one version of the set's file"):
            compare(tmp_path / "a", tmp_path / "c")


def test_the_published_figure_is_marked_and_compared(data, tmp_path):
    """Half of the official token F1 of question 1 is gained: 12.5 points of 4 questions. Exact match stays as it is."""
    for name, text in (("a", "x"), ("b", "1 x x")):
        evaluate_set(Evaluation("hotpotqa", data, tmp_path / name, write_predictions(tmp_path / "p.jsonl", (1, text))))
    assert "| official token F1: the published figure | 12.5 %" in (tmp_path / "b" / "report.md").read_text()
    text = compare(tmp_path / "a", tmp_path / "b")
    assert "Accuracy: 0.0 % -> 0.0 %; difference +0.0 points" in text
    assert "Official token F1: 0.0 % -> 12.5 %; difference +12.5 points" in text


def test_what_a_set_holds_neither_controls_the_terminal_nor_breaks_a_table(tmp_path):
    record = {"id": "q|\x1b[31m", "question": "Is |x|\n= \x1b[2Jx?", "answer": "1", "level": "hard|\x1b]0;title\x07"}
    (tmp_path / "m.jsonl").write_text(
        json.dumps(record) + "\n" + json.dumps({"id": "n\x1b[1m", "question": "?"}) + "\n"
    )
    texts = []
    for name, answer in (("a", "0"), ("b", "1")):
        predictions = write_predictions(tmp_path / "p.jsonl", (record["id"], answer), ("z\x1b[1m", "1"))
        texts.append(evaluate_set(Evaluation("math500", tmp_path / "m.jsonl", tmp_path / name, predictions)))
    texts.append(compare(tmp_path / "a", tmp_path / "b"))
    assert not any(character in text for text in texts for character in "\x1b\x07")
    assert r"| level hard\|�]0;title� (1) | 100.0 %" in texts[1]
    assert texts[2].splitlines()[-1] == r"| q\|�[31m | 0 % | 100 % | Is \|x\| = �[2Jx? |"


def test_a_report_is_read_back_whatever_its_texts_hold(data, tmp_path):
    """U+2028 ends no line of JSON; half of a surrogate pair, which JSON can write, is no text in UTF-8."""
    lines = ['{"id": 1, "prediction": "1 \u2028 \x85"}', '{"id": 2, "prediction": "\\ud800"}']
    (tmp_path / "p.jsonl").write_text("\n".join(lines), encoding="utf-8")
    evaluate_set(Evaluation("math500", data, tmp_path / "out", tmp_path / "p.jsonl"))
    assert "4 questions are in both" in compare(tmp_path / "out", tmp_path / "out")
    (tmp_path / "out" / "items.jsonl").write_bytes('{"id": "ä'.encode()[:-1])
    with pytest.raises(DataError, match=r"items\.jsonl: it is not complete"):
        compare(tmp_path / "out", tmp_path / "out")


def test_the_other_fields_of_a_parquet_file_of_predictions_may_be_dates(data, tmp_path):
    row = {"id": 1, "prediction": "1", "time": datetime(2024, 5, 6, 7), "cost": Decimal("0.10"), "key": b"k"}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "p.parquet")
    evaluate_set(Evaluation("math500", data, tmp_path / "out", tmp_path / "p.parquet"))
    first = json.loads((tmp_path / "out" / "items.jsonl").read_text().splitlines()[0])
    assert first["samples"][0]["record"] == {"time": "2024-05-06 07:00:00", "cost": "0.10", "key": "b'k'"}


@pytest.fixture
def judge():
    with FaultyJudge() as server:
        yield server
        server.shutdown()


def test_a_faulty_judge_leaves_a_report_that_says_what_has_no_verdict(judge, tmp_path):
    answers = ["good", "bad", "slow", "drip", "down", "limited", "prose", "garbage", "good"]
    data = tmp_path / "set.jsonl"
    data.write_text("".join(json.dumps({"id": i, "question": "?", "answer": "x"}) + "\n" for i in range(len(answers))))
    predictions = write_predictions(tmp_path / "p.jsonl", *enumerate(answers))
    config = JudgeConfig(f"http://127.0.0.1:{judge.server_address[1]}/v1", "m", timeout=1.0, attempts=2)
    asked = Evaluation("webwalker", data, tmp_path / "out", predictions, judge=config)
    record = report_of(asked)
    assert record["counted_as_wrong"]["without_verdict"] == ["2", "3", "4", "6", "7"]
    assert record["accuracy"][0] == pytest.approx(3 / 9)  # good, limited (at the second try), good
    assert record["accuracy_if_open_are_right"] == pytest.approx(8 / 9)
    assert record["judge"]["failed"] == 5
    assert record["judge"]["prompt_tokens"] > 0
    before = len(judge.asked)
    again = report_of(asked)  # verdicts are kept: only the open ones are asked again
    assert set(judge.asked[before:]) == {"slow", "drip", "down", "prose", "garbage"}
    assert again["accuracy"] == record["accuracy"]


def test_a_judge_gives_every_set_a_second_verdict(judge, tmp_path):
    """The set's own rule decides `correct`. An answer that equals a gold, or is none, is not asked about."""
    data = tmp_path / "set.jsonl"
    data.write_text("".join(json.dumps({"question": "?", "answer": "7"}) + "\n" for _ in range(5)))
    answers = ["7", "good", "bad", "prose", ""]
    config = JudgeConfig(judge.url, "m", attempts=1)
    for name, found in (("a", answers), ("b", ["good"] * 5)):
        predictions = write_predictions(tmp_path / "p.jsonl", *enumerate(found))
        record = report_of(Evaluation("math500", data, tmp_path / name, predictions, judge=config))
        if name == "a":
            assert sorted(judge.asked) == ["bad", "good", "prose"]
            assert (record["accuracy"][0], record["judged"][0]) == (1 / 5, 2 / 5)
            assert record["counted_as_wrong"]["without_verdict_of_the_judge"] == ["3"]
            assert record["counted_as_wrong"]["without_verdict"] == []
            text = (tmp_path / name / "report.md").read_text()
            assert "| accuracy by the judge: the published figure | 40.0 %" in text
            assert "If all questions without verdict of the judge were right: 60.0 %." in text
    assert "Accuracy by the judge: 40.0 % -> 100.0 %; difference +60.0 points" in compare(
        tmp_path / "a", tmp_path / "b"
    )


@pytest.mark.parametrize(("name", "right"), [("hle", 1.0), ("xbench", 1.0), ("webwalker", 0.0), ("math500", 0.0)])
def test_the_judge_may_forgive_rounding_where_a_set_s_own_judge_does(judge, tmp_path, name, right):
    """Humanity's Last Exam and xbench-DeepSearch: "within a small margin of error" is right."""
    data = tmp_path / "set.jsonl"
    data.write_text(json.dumps({"question": "?", "answer": "3.14159"}) + "\n")
    predictions = write_predictions(tmp_path / "p.jsonl", (0, "rounded"))
    evaluation = Evaluation(name, data, tmp_path / "out", predictions, judge=JudgeConfig(judge.url, "m", attempts=1))
    assert report_of(evaluation)["judged"][0] == right


def test_a_judged_set_without_a_judge_says_so(data, tmp_path):
    record = report_of(Evaluation("hle", data, tmp_path / "out", write_predictions(tmp_path / "p.jsonl", (1, "1"))))
    assert record["counted_as_wrong"]["without_verdict"] == ["1"]
    assert "no judge was given" in (tmp_path / "out" / "items.jsonl").read_text()
    assert "a judge's: give --judge-url" in (tmp_path / "out" / "report.md").read_text()


def test_the_command(data, tmp_path, capsys):
    predictions = write_predictions(tmp_path / "p.jsonl", (1, "1"), (2, "2"), (3, "3"), (4, "0"))
    out = tmp_path / "out"
    command = ["eval", "--set", "math500", "--data", str(data), "--out", str(out), "--predictions", str(predictions)]
    assert main(command) == 0
    assert "| accuracy (mean over samples) | 75.0 %" in capsys.readouterr().out
    assert main(["eval", "--compare", str(out), str(out)]) == 0
    assert "0 questions changed" in capsys.readouterr().out
    assert main(["eval", "--set", "mmlu", "--data", str(data), "--out", str(out)]) == 2


@pytest.mark.parametrize("wrong", ["--limit 0", "--limit -1", "--samples 0", "--temperature -1", "--temperature nan"])
def test_numbers_that_mean_nothing_are_refused(data, tmp_path, capsys, wrong):
    predictions = write_predictions(tmp_path / "p.jsonl", (1, "1"))
    command = ["eval", "--set", "math500", "--data", str(data), "--out", str(tmp_path / "out")]
    assert main([*command, "--predictions", str(predictions), *wrong.split()]) == 2
    assert f"{wrong.replace('-1', '-1.0') if 'temp' in wrong else wrong}: expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--predictions", "p", "--samples", "8"], "no policy is asked; leave out --samples 8, or the file"),
        (
            ["--predictions", "p", "--temperature", "0.5"],
            "no policy is asked; leave out --temperature 0.5, or the file",
        ),
        (["--predictions", "p", "--step", "5"], "no policy is asked; leave out --step 5, or the file"),
        (["--predictions", "p", "--judge-model", "x"], "--judge-model x: goes with --judge-url URL"),
    ],
)
def test_an_option_without_an_effect_is_refused(data, tmp_path, capsys, options, said):
    assert main(["eval", "--set", "math500", "--data", str(data), "--out", str(tmp_path / "out"), *options]) == 2
    assert said in capsys.readouterr().err


def test_the_comparison_has_a_help(capsys):
    with pytest.raises(SystemExit) as end:
        main(["eval", "--compare", "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("usage: appo-jax eval --compare ")


def test_the_config_of_an_evaluation_is_checked(data, tmp_path, capsys):
    (tmp_path / "c.py").write_text("from appo_jax.config import *\nconfig = Config()")
    command = ["eval", "--set", "math500", "--data", str(data), "--out", str(tmp_path / "out")]
    assert main([*command, "--config", str(tmp_path / "c.py")]) == 2
    assert "policy.path, policy.architecture: give one" in capsys.readouterr().err
    assert main([*command, "--step", "0"]) == 2
    assert "--step 0: expected 1 or more" in capsys.readouterr().err
    assert main([*command, "--run", str(tmp_path / "typo")]) == 2
    assert "typo/config.json: no such file; give the directory of a run" in capsys.readouterr().err


def test_samples_of_weights_or_tools_that_were_replaced_are_refused(data, tmp_path, monkeypatch):
    """Nothing is drawn: the head of the file of samples is that of the same command before the change."""
    (tmp_path / "policy").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    names = ("policy/w.safetensors", "policy/chat_template.jinja", "a_tool.py", "q.jsonl", "a_source.py", "b_source.py")
    files = [tmp_path / name for name in names]
    for file in files:
        file.write_text("old")
    tools = dataclasses.replace(Config().tools, enabled=("a_tool:make",))
    parts = (DataPart("files", path=str(tmp_path / "q.jsonl")), DataPart("a_source:load"))
    questions = DataConfig(source="mixture", mixture=parts)
    mixed = Config(policy=PolicyConfig(path=str(tmp_path / "policy")), tools=tools, data=questions)
    asked = Evaluation("math500", data, tmp_path / "out")
    asked.out.mkdir()
    for file in files:
        config = dataclasses.replace(mixed, data=DataConfig("b_source:load")) if file.stem == "b_source" else mixed
        (asked.out / "generations.jsonl").write_text(json.dumps(_setting(asked, config, None)) + "\n")
        assert _setting(asked, config, None) == _setting(asked, config, None)
        file.write_text("newer")
        with pytest.raises(
            ConfigError, match=r"holds samples of another setting: files = .* bytes.* \(now .*another --out"
        ):
            evaluate_set(asked, config)


def test_files_that_a_source_makes_at_the_first_start_are_no_other_setting(tmp_path):
    config = Config(data=DataConfig("world", str(tmp_path / "world")))
    before = _setting(Evaluation("math500", tmp_path, tmp_path), config, None)
    (tmp_path / "world").mkdir()
    (tmp_path / "world" / "features.json").write_text("{}")
    assert _setting(Evaluation("math500", tmp_path, tmp_path), config, None) == before


def test_a_package_of_tools_that_exits_when_it_is_imported_ends_no_listing_of_files(tmp_path, monkeypatch):
    (tmp_path / "exits_at_once").mkdir()
    (tmp_path / "exits_at_once" / "__init__.py").write_text("raise SystemExit(0)")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = Config(tools=ToolsConfig(enabled=("exits_at_once.tools:look_up",)))
    assert "exits_at_once" not in str(_setting(Evaluation("math500", tmp_path, tmp_path), config, None)["files"])


def test_open_verdicts_count_as_accuracy_counts_them(judge, tmp_path):
    """Question 0 is right, and all three samples of question 1 are open: with them right, accuracy is 1."""
    (tmp_path / "set.jsonl").write_text('{"question": "?", "answer": "x"}\n' * 2)
    predictions = write_predictions(tmp_path / "p.jsonl", (0, "good"), *[(1, "prose")] * 3)
    config = JudgeConfig(judge.url, "m", attempts=1)
    record = report_of(Evaluation("webwalker", tmp_path / "set.jsonl", tmp_path / "out", predictions, judge=config))
    assert (record["accuracy"][0], record["accuracy_if_open_are_right"]) == (0.5, 1.0)


def test_predictions_and_a_policy_exclude_each_other(tmp_path):
    with pytest.raises(ConfigError, match="no policy is asked"):
        evaluate_set(Evaluation("math500", tmp_path, tmp_path, tmp_path / "p.jsonl"), Config())
