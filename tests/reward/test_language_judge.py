"""A language model as the reward: a real endpoint that answers, is slow, fails or is verbose; and functions that hang."""

import dataclasses
import sqlite3
import threading
import time
from pathlib import Path

import pytest
from faulty_judge import WRONG, FaultyJudge

from appo_jax import heartbeat
from appo_jax.config import JudgeConfig, RewardConfig
from appo_jax.errors import AppoError, ConfigError, DataError
from appo_jax.reward import Judge, Response, make_reward
from appo_jax.reward.language_judge import UNDECIDED_IN_A_ROW, Counts, Decision, LanguageJudge, read_verdict
from appo_jax.tools.format import TagFormat
from appo_jax.tools.protocol import ToolSpec
from appo_jax.types import Example, RewardResult, Segment, StopReason

FORMAT = TagFormat((ToolSpec("search"),))


@pytest.fixture
def endpoint():
    with FaultyJudge() as server:
        yield server
        server.shutdown()


def answering(text, gold="x"):
    segments = (Segment(f"<think> </think> <answer> \\boxed{{{text}}} </answer>", True),)
    return Response(segments, (gold,), "qa", frozenset(), StopReason.ANSWERED, "What?")


def judge_at(server, folder: Path, **options):
    config = JudgeConfig(server.url, "m", **{"timeout": 1.0, "attempts": 2} | options)
    return make_reward(RewardConfig("judge", judge=config, tool_bonus=0.0), FORMAT, folder)


def test_each_rollout_has_its_own_fate(endpoint, tmp_path):
    reward = judge_at(endpoint, tmp_path)
    answers = ["good", "bad", "slow", "drip", "down", "limited", "prose", "garbage", "good"]
    judgements = reward.each([answering(answer) for answer in answers])
    assert [(j.reward, j.correct) for j in judgements if not j.error] == [(1, True), (0, False), (1, True), (1, True)]
    errors = {answer: j.error for answer, j in zip(answers, judgements, strict=True) if j.error}
    assert list(errors) == ["slow", "drip", "down", "prose", "garbage"]
    assert all("raised NoVerdict" in error for error in errors.values())
    assert judgements[0].detail == {"score": 1, "format": 1, "bonus": 0, "verify_timeout": 0}
    metrics = reward.metrics()
    assert metrics["judge/failed"] == 5
    assert metrics["judge/requests"] == 2 + 1 + 5 * 2 + 2 - metrics["judge/cached"]  # the second "good" may be cached
    assert metrics["judge/prompt_tokens"] > 0
    assert set(reward.metrics().values()) == {0}
    reward.close()
    again = judge_at(endpoint, tmp_path)  # as a run that goes on: verdicts are on disk
    assert [j.reward for j in again.each([answering("good"), answering("bad")])] == [1, 0]
    assert again.metrics()["judge/requests"] == 0
    again.close()


def test_every_verdict_is_progress(endpoint, tmp_path):
    """A set of many questions takes longer than a run may be silent; none of its verdicts does."""
    judge = LanguageJudge(JudgeConfig(endpoint.url, "m", timeout=0.5, attempts=1, concurrency=1), tmp_path / "v.sqlite")
    heartbeat.progress()
    began = time.monotonic()
    judge.decide([(f"{i}?", ("x",), "slow") for i in range(3)])
    took = time.monotonic() - began
    assert took > 1.4
    assert heartbeat._life.longest["start"] < took / 2
    judge.close()


def test_what_needs_no_judge_asks_none(endpoint, tmp_path):
    reward = judge_at(endpoint, tmp_path)
    empty = Response((), ("x",), "qa", frozenset(), StopReason.LENGTH, "What?")
    (judgement,) = reward.each([empty])
    assert (judgement.reward, judgement.correct) == (-1, False)
    assert endpoint.asked == []
    reward.close()


def test_verdicts_are_asked_for_at_the_same_time(endpoint, tmp_path):
    reward = judge_at(endpoint, tmp_path, timeout=20.0, concurrency=4)
    judgements = reward.each([answering("slow", str(i)) for i in range(6)])
    assert [j.reward for j in judgements] == [1] * 6
    assert endpoint.most == 4
    reward.close()


def test_a_judge_that_is_down_is_found_before_the_run_begins(endpoint, tmp_path):
    reward = judge_at(endpoint, tmp_path)
    with pytest.raises(ConfigError, match=r"reward\.function = 'judge'.*NoVerdict.*500"):
        reward.try_out(Example("q", "?", ("down",), "qa", ""))
    reward.close()


def test_a_function_that_hangs_costs_its_own_rollout():
    forever = threading.Event()

    def hangs(response):
        if response.golds == ("hang",):
            forever.wait()
        return RewardResult(1.0, True)

    judge = Judge("mine:hangs", hangs, timeout=0.3)
    judgements = judge.each([answering("a", gold) for gold in ("x", "hang", "y", "hang", "z")])
    assert [j.reward for j in judgements if not j.error] == [1.0] * 3
    assert [j.error for j in judgements if j.error] == [
        "reward.function = 'mine:hangs' did not return within reward.timeout = 0.3 s"
    ] * 2
    forever.set()


def test_what_is_no_fault_of_the_function_ends_the_run():
    def broken(response):
        raise AppoError("the disk is full")

    with pytest.raises(AppoError, match="the disk is full"):
        Judge("mine:broken", broken, timeout=1.0).each([answering("a")])


def test_results_keep_the_order_of_the_rollouts():
    judge = Judge("mine:f", lambda response: RewardResult(float(response.golds[0]), False), timeout=5.0)
    assert [j.reward for j in judge.each([answering("a", str(i)) for i in range(50)])] == list(range(50))


@pytest.mark.parametrize("answer", WRONG)
def test_replies_of_any_form_are_read_or_named(endpoint, tmp_path, answer):
    judge = LanguageJudge(JudgeConfig(endpoint.url, "m", attempts=1), tmp_path / "v.sqlite")
    (decision,) = judge.decide([("What?", ("x",), answer)])
    if answer in ("no usage", "null usage", "odd usage", "surrogate"):
        assert decision.correct
        assert judge.decide([("What?", ("x",), answer)]) == [decision]
        assert judge.take_counts() == Counts(requests=1, cached=1)
    else:
        assert decision.correct is None
        assert "its reply is no chat completion" in decision.reason
    judge.close()


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("correct: yes", True),
        ("The wording differs.\n**Correct: No**", False),
        ('{"correct": "yes"}', True),
        ("Correct.", True),
        ("Verdict: incorrect", False),
        ("correct: yes, it is the same town", True),
        ("1. correct: yes", True),
        ("Answer: correct: yes", True),
        ("Final verdict: **correct: no**", False),
        ("<answer>correct: yes</answer>", True),
        ("correct: yes (no doubt)", True),
        ("correct: yes. The answer is not no.", True),
        ("correct: no, yes would be wrong", False),
        ('{"correct": true}', True),
        ('{\n  "correct": false\n}', False),
        ("Judgement: correct", True),
        ("Verdict: yes", True),
        ("Verdict: no.", False),
        ("**Correct:** yes", True),
        ("correct: [yes]", True),
        ("correct：no", False),
        ("correct: no, correct answer is Paris", False),
        ("correct: no (correct answer: Paris)", False),
        ("Correct (no doubt about it).", None),
        ("correct: [yes/no]", None),
        ("correct: [yes] or [no]", None),
        ("**Correct:** yes, **correct:** no", None),
        ("Answer: yes", None),  # the graded answer may be yes
        ("Correct. No doubt about it.", None),
        ("correct: yes/no", None),
        ("correct: yes or no", None),
        ("correct: yes, correct: no", None),
        ("correct: notably not", None),
        ("Incorrect: yes, it differs.", None),
        ("Not correct", None),
        ('I must reply "correct: yes" or "correct: no". The answer matches.', None),
        ('"correct: yes" or "correct: no"', None),
        ("correct: yes\ncorrect: no", None),
        ("<think>correct: no\nor rather</think>\ncorrect: yes", True),
        ('{"reason": "same", "correct": "no"}', False),
        ('{"reason": "correct: no would be too strict", "Correct": true}', True),
        ('```json\n{"reason": "same", "correct": "yes"}\n```', True),
        ('{"reason": "same", "correct": "yes/no"}', None),
        ('{"reason": "correct: yes"}', None),
        ("correct: no (but arguably correct: yes)", None),
        ("correct: yes. An exact match would be correct: yes too.", True),
        ("The answer is correct", None),
        ("", None),
    ],
)
def test_a_verdict_is_a_line_of_its_own(reply, verdict):
    assert read_verdict(reply) is verdict


def test_a_judge_that_refuses_is_not_asked_again_and_one_that_is_busy_when_it_says(endpoint, tmp_path):
    """The wait that a busy server asks for, 20 s, is cut to the time limit of a request."""
    judge = LanguageJudge(JudgeConfig(endpoint.url, "m", attempts=2, timeout=0.7), tmp_path / "v.sqlite")
    assert judge.verdict("?", ("x",), "denied") == Decision(None, "the server answered with status 401")
    began = time.monotonic()
    assert judge.verdict("?", ("x",), "busy").correct is None
    assert 0.65 < time.monotonic() - began < 2
    assert endpoint.asked == ["denied", "busy", "busy"]
    judge.close()


def test_a_judge_that_refuses_a_temperature_says_so_and_is_asked_without_one(endpoint, tmp_path):
    config = JudgeConfig(endpoint.url, "m", attempts=1)
    judge = LanguageJudge(config, tmp_path / "v.sqlite")
    (decision,) = judge.decide([("?", ("x",), "no temperature")])
    said = '{"error": { "message": "Unsupported parameter: \'temperature\'�[2J"}} end'
    assert decision == Decision(None, f"the server answered with status 400: {said}")
    assert judge.verdict("?", ("x",), "good").correct
    judge.close()
    judge = LanguageJudge(dataclasses.replace(config, temperature=None), tmp_path / "v.sqlite")
    assert judge.verdict("?", ("x",), "no temperature").correct
    assert judge.verdict("?", ("x",), "good").correct  # asked again: it is another judge
    assert judge.take_counts() == Counts(requests=2, prompt_tokens=20, completion_tokens=6)
    judge.close()
    assert endpoint.temperatures == [0.0, 0.0, None, None]


@pytest.mark.parametrize("answer", ["mute", "long"])
def test_the_words_of_an_error_are_cut_and_may_be_missing(endpoint, tmp_path, answer):
    judge = LanguageJudge(JudgeConfig(endpoint.url, "m", attempts=1, timeout=0.4), tmp_path / "v.sqlite")
    (decision,) = judge.decide([("?", ("x",), answer)])
    said = {"mute": "", "long": ": " + "é" * 200}[answer]
    assert decision == Decision(None, f"the server answered with status 400{said}")
    judge.close()


def test_a_judge_that_decides_nothing_is_left_alone(endpoint, tmp_path):
    """Verdicts that it gave before are still used."""
    judge = LanguageJudge(JudgeConfig(endpoint.url, "m", attempts=1, concurrency=1), tmp_path / "v.sqlite")
    assert judge.verdict("kept", ("x",), "good").correct
    questions = [(str(i), ("x",), "denied") for i in range(UNDECIDED_IN_A_ROW + 4)]
    decisions = judge.decide([*questions, ("kept", ("x",), "good")])
    assert endpoint.asked.count("denied") == UNDECIDED_IN_A_ROW
    assert [d.correct for d in decisions] == [None] * len(questions) + [True]
    assert decisions[-2].reason == "not asked: the judge decided none of the last 16 answers"
    judge.close()


def test_a_cache_that_fails_costs_no_verdict(endpoint, tmp_path, caplog):
    judge = LanguageJudge(JudgeConfig(endpoint.url, "m", attempts=1), tmp_path / "v.sqlite")
    with sqlite3.connect(tmp_path / "v.sqlite") as other:
        other.execute("DROP TABLE verdicts")
    other.close()
    assert [judge.verdict(question, ("x",), "good").correct for question in ("a", "a", "b")] == [True] * 3
    assert judge.take_counts().requests == 3
    assert caplog.text.count("going on without this cache") == 1
    judge.close()


@pytest.mark.parametrize("answer", ["drip", "long drip", "header drip"])
def test_a_reply_that_drips_is_cut_off(endpoint, tmp_path, answer):
    judge = LanguageJudge(JudgeConfig(endpoint.url, "m", attempts=1, timeout=0.4), tmp_path / "v.sqlite")
    began = time.monotonic()
    assert judge.decide([("What?", ("x",), answer)])[0] == Decision(None, "the server did not answer in time")
    assert time.monotonic() - began < 1.5
    judge.close()


def test_a_file_or_an_address_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "text").write_text("not a database" * 100)
    for path in (tmp_path / "text", tmp_path, tmp_path / "text" / "v.sqlite"):
        with pytest.raises(DataError, match=r"reward\.judge\.cache = .*; give another file"):
            LanguageJudge(JudgeConfig(url="http://127.0.0.1:9", model="m"), path)
    with pytest.raises(ConfigError, match=r"reward\.judge\.url = 'localhost:9': expected http://"):
        LanguageJudge(JudgeConfig(url="localhost:9", model="m"), tmp_path / "v.sqlite")


def test_a_new_cache_waits_for_the_process_that_is_making_the_file(tmp_path):
    """Hosts and runs open one file at the same time."""
    path = tmp_path / "verdicts.sqlite"
    with sqlite3.connect(path, check_same_thread=False, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("CREATE TABLE t (x)")
        threading.Timer(0.3, lambda: other.execute("COMMIT")).start()
        LanguageJudge(JudgeConfig(url="http://127.0.0.1:9", model="m"), path).close()
    other.close()
