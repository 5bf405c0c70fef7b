"""Commands on a policy and its tools: sets during training, questions of a person, traces for another cold start."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from appo_jax import sft
from appo_jax.cli import main
from appo_jax.collect import Collecting, collect, right
from appo_jax.components import build
from appo_jax.config import Config, EvalSetConfig, JudgeConfig
from appo_jax.config_io import load_config, save_config
from appo_jax.data.demonstrations import LeftOut
from appo_jax.data.source import load_dataset
from appo_jax.data.trace_files import read_traces
from appo_jax.errors import ConfigError, DataError, TrainingError
from appo_jax.evaluate import Sets, load_sets
from appo_jax.metrics import read_metrics
from appo_jax.tools.format import render_result
from appo_jax.train import train
from appo_jax.types import Example, Outcome, Rollout, Segment, StopReason, ToolCall


def write_set(path: Path, count: int) -> str:
    path.write_text("".join(json.dumps({"id": i, "question": "1+1?", "answer": 2}) + "\n" for i in range(count)))
    return str(path)


@pytest.fixture(scope="module")
def run(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, evaluated on two sets after each."""
    folder = tmp_path_factory.mktemp("sets")
    sets = (
        EvalSetConfig("math500", write_set(folder / "m.jsonl", 3), limit=2),
        EvalSetConfig("hotpotqa", write_set(folder / "h.jsonl", 1), samples=2, temperature=1.0),
    )
    config = dataclasses.replace(
        tiny, run_dir=str(folder / "run"), eval=dataclasses.replace(tiny.eval, every=1, sets=sets)
    )
    train(config)
    return folder / "run"


def test_sets_are_measured_during_training(run: Path) -> None:
    records = read_metrics(run / "metrics.jsonl")
    assert all(0 <= records[0][f"eval/{name}/accuracy"] <= 1 for name in ("math500", "hotpotqa"))
    summary = json.loads((run / "summary.json").read_text())
    for step, figures in ((1, records[0]), (2, summary)):
        for name, questions, samples in (("math500", 2, 1), ("hotpotqa", 1, 2)):
            report = json.loads((run / "eval" / f"step_{step:06d}" / name / "report.json").read_text())
            assert (report["questions"], report["samples"]) == (questions, samples)
            assert report["accuracy"][0] == figures[f"eval/{name}/accuracy"]
            assert figures[f"eval/{name}/without_verdict"] == 0
            speed = report["rollouts"]
            assert 0 < speed["seconds_per_question"] * questions < figures[f"eval/{name}/seconds"]
            assert speed["tokens_per_second_of_decoding"] > 0
    assert (run / "plots" / "sets.png").exists()


def test_sets_that_cannot_be_scored_are_refused_before_the_run(tiny: Config, tmp_path: Path) -> None:
    with build(tiny) as components:

        def loaded(name: str, **fields: object) -> Sets:
            file = str(tmp_path / "s.jsonl") if (tmp_path / "s.jsonl").exists() else write_set(tmp_path / "s.jsonl", 1)
            config = dataclasses.replace(
                tiny,
                eval=dataclasses.replace(tiny.eval, sets=(EvalSetConfig(name, file),)),
                reward=dataclasses.replace(tiny.reward, **fields),
            )
            return load_sets(dataclasses.replace(components, config=config))

        with pytest.raises(
            ConfigError, match=r"eval\.sets: webwalker is decided by a judge; give --reward\.judge\.url"
        ):
            loaded("webwalker")
        with pytest.raises(ConfigError, match=r"set = .mmlu.: expected aime24"):
            loaded("mmlu")
        ((_, questions),) = loaded("webwalker", judge=JudgeConfig("http://127.0.0.1:1/v1", "m"))
        assert [item.golds for item in questions.items] == [("2",)]
        (tmp_path / "s.jsonl").write_text(json.dumps({"id": "long", "question": "why? " * 500, "answer": 2}))
        with pytest.raises(DataError, match=r"question 'long' has \d+ tokens: raise rollout\.max_prompt_tokens"):
            loaded("math500")


def test_a_person_asks_a_policy(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["ask", str(run), "Where?"]) == 0
    out = capsys.readouterr().out
    assert "1. the policy" in out
    assert "answer" in out.splitlines()[-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", iter_lines("Where?\n", "why " * 500 + "\n", "Who?\n", "\n"))
        assert main(["ask", str(run)]) == 0
    out = capsys.readouterr().out
    assert out.count("1. the policy") == 2
    assert "more than rollout.max_prompt_tokens" in " ".join(out.split())
    assert main(["ask", str(run), "Where?", "--temperature", "-1"]) == 2
    assert "--temperature -1.0: expected 0 (greedy), or a number from 1e-6 to 1e6" in capsys.readouterr().err
    assert main(["ask", str(run), "why " * 500]) == 1
    assert "more than rollout.max_prompt_tokens" in capsys.readouterr().err
    assert main(["ask", str(run), "Where?", "--mesh.fsdp", "2"]) == 2  # a field of the run's config
    assert "= 1 × 2 × 1 = 2, but there are" in capsys.readouterr().err


# A machine with an accelerator: here a second CPU device, on which jax computes, while checkpoints are read on the first.
ON_AN_ACCELERATOR = """
import sys
import jax

jax.config.update("jax_num_cpu_devices", 2)
_, second = jax.devices()
every = jax.devices
jax.devices = lambda backend=None: [second] if backend is None else every(backend)
jax.config.update("jax_default_device", second)

from appo_jax.cli import main

run, out = sys.argv[1:]
few = ["--questions", "1", "--rollouts", "1", "--positions", "1", "--continuations", "2"]
sys.exit(main(["ask", run, "Where?"]) or main(["influence", run, "--out", out, *few]))
"""


def test_commands_on_a_policy_where_the_host_is_not_the_device_that_computes(run: Path, tmp_path: Path) -> None:
    config = load_config(run / "config.json")
    in_bfloat16 = dataclasses.replace(config.policy, compute_dtype="bfloat16")  # as `auto` is on accelerators
    (tmp_path / "run").mkdir()
    save_config(dataclasses.replace(config, policy=in_bfloat16), tmp_path / "run" / "config.json")
    (tmp_path / "run" / "checkpoints").symlink_to(run / "checkpoints")
    done = subprocess.run(
        [sys.executable, "-c", ON_AN_ACCELERATOR, tmp_path / "run", tmp_path / "out"],
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def iter_lines(*lines: str):
    import io

    return io.StringIO("".join(lines))


def test_samples_of_two_policies_or_sets_are_never_mixed(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "run"
    shutil.copytree(run, own)
    data, out = tmp_path / "s.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps({"question": f"{i}+1?", "answer": i + 1}) + "\n" for i in range(3)))
    command = ["eval", "--set", "math500", "--out", str(out), "--samples", "2", "--temperature", "1"]
    command += ["--run", str(own), "--data", str(data)]

    def refused(*more: str) -> str:
        assert main([*command, *more]) == 2
        return capsys.readouterr().err

    assert "= 1 × 2 × 1 = 2, but there are" in refused("--mesh.fsdp", "2", "--limit", "2")
    assert main([*command, "--limit", "2"]) == 0
    head, *lines = (out / "generations.jsonl").read_text().splitlines(keepends=True)
    (out / "generations.jsonl").write_text(
        "".join([head, *lines[:3]]) + lines[3][:30]
    )  # a kill in the middle of a line
    assert main(command) == 0
    found = [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()[1:]]
    assert [record["id"] for record in found] == ["0", "0", "1", "1", "2", "2"]
    assert "".join(lines[:2]) in (out / "generations.jsonl").read_text()  # those of question 0 are kept
    items = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    assert [len(item["samples"]) for item in items] == [2, 2, 2]
    assert "| calls per right answer | – |" in (out / "report.md").read_text()  # no answer is right

    other = json.loads((own / "config.json").read_text())
    other["rollout"]["max_response_tokens"] += 1
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert "rollout.max_response_tokens = 32 (now 33); give another --out" in refused(
        "--config", str(tmp_path / "other.json")
    )
    data.write_text(data.read_text().replace("0+1?", "5-4?"))
    assert "samples of another question with the id '0'" in refused()
    shutil.copytree(own / "checkpoints" / "rl" / "2", own / "checkpoints" / "rl" / "3")
    assert "checkpoint = 'rl/2 of " in (told := refused())
    assert "(now 'rl/3 of " in told


def test_collecting_goes_on_where_it_stopped(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "traces.jsonl"
    command = ["sft", "--collect", str(out), "--run", str(run), "--samples", "2", "--config", str(run / "config.json")]
    assert main([*command, "--questions", "-5"]) == 2
    assert "--questions -5: expected 0 or more" in capsys.readouterr().err
    assert main([*command, "--questions", "2"]) == 0
    first = out.read_bytes()
    assert first.count(b"\n") == 1 + 2
    # A separator that is no end of a line in JSON, and a kill in the middle of a line, in the middle of a character.
    first += '{"id": "mine", "question": "?", "left_out": "a\u2028b"}\n'.encode()
    out.write_bytes(first + '{"id": "ä'.encode()[:-1])
    assert main([*command, "--questions", "3"]) == 0
    assert out.read_bytes().startswith(first)
    assert len({json.loads(line)["id"] for line in out.read_bytes().split(b"\n")[1:-1]}) == 4
    assert "of 1 questions" in capsys.readouterr().out


def test_traces_of_two_settings_are_never_mixed(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ids of questions may coincide: those of plain files are train-1, train-2, …"""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"question": f"{i}+{name}?", "answer": i}) + "\n" for i in range(2)]
        (tmp_path / name / "train.jsonl").write_text("".join(lines))
        (tmp_path / name / "test.jsonl").write_text(json.dumps({"question": "Who?", "answer": "x"}) + "\n")
    out = tmp_path / "traces.jsonl"
    command = ["sft", "--collect", str(out), "--run", str(run), "--config", str(run / "config.json")]
    (tmp_path / "corpus.jsonl").write_text('{"title": "T", "text": "a page"}\n')
    command += [
        "--data.source",
        "files",
        "--data.system-prompt",
        "",
        "--tools.search.corpus",
        str(tmp_path / "corpus.jsonl"),
    ]

    def collected(*more: str) -> str:
        assert main([*command, *more]) == 0
        return capsys.readouterr().out

    def refused(*more: str) -> str:
        assert main([*command, *more]) == 2
        return " ".join(capsys.readouterr().err.split())

    first, second = (["--data.path", str(tmp_path / name)] for name in ("a", "b"))
    assert "of 2 questions" in collected(*first, "--samples", "1")
    kept = out.read_bytes()
    assert "data.path = " in (told := refused(*second, "--samples", "1"))
    assert "give another file to --collect" in told
    assert "samples = 1 (now 2)" in refused(*first, "--samples", "2")
    assert "rollout.temperature = 1.0 (now 0.5)" in refused(*first, "--samples", "1", "--rollout.temperature", "0.5")
    assert "reward.function = 'robust' (now 'official')" in refused(
        *first, "--samples", "1", "--reward.function", "official"
    )
    with (tmp_path / "a" / "train.jsonl").open("a") as file:
        file.write(json.dumps({"question": "more?", "answer": 1}) + "\n")
    assert "files = " in refused(*first, "--samples", "1")
    assert out.read_bytes() == kept
    out.write_bytes(kept[kept.index(b"\n") + 1 :])  # as an earlier version wrote it
    assert main([*command, *first]) == 1
    assert "it is not a file of traces that `sft --collect` of this version writes" in " ".join(
        capsys.readouterr().err.split()
    )


NO_REWARD = """
from appo_jax.types import RewardResult

def reward(response):
    if response.question in BAD and response.segments and response.stop_reason != "answered":
        raise ValueError("not this one")
    return RewardResult(0.0, False)

def always(response):
    if response.segments and response.stop_reason != "answered":
        raise ValueError("not any")
    return RewardResult(0.0, False)
"""


def test_a_question_without_a_reward_is_left_out_and_asked_again(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each chunk is one question, whose reward function fails for the second one."""
    monkeypatch.syspath_prepend(str(tmp_path))
    questions = [example.question for example in load_dataset(tiny.data).train[:3]]
    (tmp_path / "no_reward.py").write_text(f"BAD = {questions[1:2]!r}\n{NO_REWARD}")

    def collected(function: str, file: str) -> str:
        reward = dataclasses.replace(tiny.reward, function=f"no_reward:{function}")
        rollout = dataclasses.replace(tiny.rollout, decode_rows=1, max_response_tokens=2)
        config = dataclasses.replace(tiny, reward=reward, rollout=rollout)
        return collect(config, Collecting(tmp_path / file, samples=4, questions=3))

    assert "0 traces of 3 questions" in (told := collected("reward", "some.jsonl"))
    assert "8: its answer is wrong; 4: it has no reward" in told
    for _ in range(2):
        lines = (tmp_path / "some.jsonl").read_text().splitlines()[1:]
        assert [json.loads(line)["question"] for line in lines] == [questions[0], questions[2]]
        assert "0 traces of 1 questions" in (told := collected("reward", "some.jsonl"))
        assert "left out: 4: it has no reward" in told
    with pytest.raises(TrainingError, match=r"none of 4 rollouts has a reward: .*not any"):
        collected("always", "none.jsonl")


def test_traces_that_are_right_are_kept_once_and_read_back(tiny: Config, tmp_path: Path) -> None:
    example = Example("q", "Q?", ("7",), "math", "")
    with build(tiny) as components:
        notation = components.executor.call_format

        def rollout(
            answer: str, code: str, correct: bool = True, outcome: Outcome = Outcome.OK, end: str = "", first: str = ""
        ) -> Rollout:
            said = f"<think>T</think>{first}{notation.render_call('python', code)}"
            texts = [(said, True), (render_result(notation, "7"), False), (f"{answer}{end}", True)]
            pieces = [(components.tokenizer.encode(text), sampled) for text, sampled in texts if text]
            tokens = [0, *(token for ids, _ in pieces for token in ids)]
            sampled = [False, *(flag for ids, flag in pieces for _ in ids)]
            call = ToolCall("python", code, "7", outcome, 0.1, 1, 2, {})
            zeros = np.zeros(len(tokens), np.float32)
            return Rollout(
                example, np.array(tokens), 1, np.array(sampled), zeros, zeros, StopReason.ANSWERED, (call,), 0, correct=correct
            )  # fmt: skip

        good = "<answer> \\boxed{7} </answer>"
        tree = [
            rollout(good, "print(3+4)"),
            rollout(good, " print(3+4)\n", end=" "),  # the same call
            rollout(good, "print(7)"),
            rollout(good, "print(8)", correct=False),
            rollout("7", "print(9)"),
            rollout(good, "print(1/0)", outcome=Outcome.ERROR),
            rollout("", "print(10)", first=good),
        ]
        left_out = LeftOut()
        records = right(tree, components, left_out)
        head = {"collected": {"samples": 7}}
        (tmp_path / "t.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [head, *records]))
        traces = read_traces([tmp_path / "t.jsonl"], notation, "", of_file := LeftOut())
    assert of_file.total == 0
    assert {reason: told["count"] for reason, told in left_out.to_json().items()} == {
        "it makes the calls of another one": 1, "its answer is wrong": 1, "not exactly one <answer>…</answer>": 1,
        "a call of it failed": 1, "the policy writes nothing at its end": 1,
    }  # fmt: skip
    assert [trace.example.golds for trace in traces] == [("7",)] * 2
    assert traces[0].segments == (
        Segment("<think>T</think><python>print(3+4)</python>", True),
        Segment(" <result>\n7\n</result>", False),
        Segment(good, True),
    )


def test_a_cold_start_on_a_file_of_traces_says_what_it_left_out(tiny: Config, tmp_path: Path) -> None:
    def conversation(text: str) -> str:
        return (
            json.dumps({"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": text}]}) + "\n"
        )

    answer = "<think>Done.</think><answer>\\boxed{4}</answer>"
    good = conversation(f"<python>2+2</python><result>4</result>{answer}")
    (tmp_path / "t.jsonl").write_text(
        good + good + conversation(answer) + conversation("<rm>x</rm><result>4</result>A")
    )
    with (tmp_path / "t.jsonl").open("a") as file:
        file.write(conversation(answer * 50))
    cold = dataclasses.replace(tiny.sft, traces=(str(tmp_path / "t.jsonl"),))
    data = dataclasses.replace(tiny.data, system_prompt="")
    accuracies = sft.run(dataclasses.replace(tiny, run_dir=str(tmp_path / "run"), sft=cold, data=data))
    assert set(accuracies) == {"accuracy_base", "accuracy_sft"}
    told = json.loads((tmp_path / "run" / "traces.json").read_text())
    assert told["read"] == 3
    assert {reason: entry["first"] for reason, entry in told["left_out"].items()} == {
        "it repeats an earlier trace": ["t-2"],
        "it calls 'rm', which is no tool of the run": ["t-4"],
        f"it is longer than sft.max_tokens = {tiny.sft.max_tokens}": ["t-5"],
    }
