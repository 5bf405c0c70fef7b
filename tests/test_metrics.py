"""What a run writes about itself, read back with strict JSON and TensorBoard's own record format."""

import json
import struct

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from appo_jax.metrics import MetricsLogger, read_metrics
from appo_jax.types import Example, Outcome, Rollout, StopReason, ToolCall


def strict(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def lines(path):
    return [strict(line) for line in path.read_text().splitlines()]


def scalars(folder):
    """[(step, tag, value)] of all event files: records of length, CRC, payload, CRC."""
    found = []
    for path in sorted(folder.glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            at += 12 + length + 4
    return found


def test_a_step_is_a_line_and_a_tensorboard_event(tmp_path):
    logger = MetricsLogger(tmp_path)
    logger.log(1, {"reward/initial": np.float32(0.5), "rollout/count": 3, "note": "first"})
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "reward/initial": 0.5, "rollout/count": 3, "note": "first"}
    ]
    logger.close()
    assert scalars(tmp_path / "tensorboard" / "metrics") == [(1, "reward/initial", 0.5), (1, "rollout/count", 3.0)]


def test_json_stays_strict_where_numbers_are_not_finite(tmp_path):
    logger = MetricsLogger(tmp_path)
    logger.log(1, {"a": float("nan"), "b": float("inf"), "c": np.float64("-inf"), "d": 1.5})
    logger.write_summary({"accuracy": float("nan"), "steps": np.int64(3), "by": {"x": np.float32("inf")}})
    logger.close()
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "a": None, "b": None, "c": None, "d": 1.5}]
    assert strict((tmp_path / "summary.json").read_text()) == {"accuracy": None, "steps": 3, "by": {"x": None}}
    assert [value for _, tag, value in scalars(tmp_path / "tensorboard" / "metrics") if tag == "b"] == [float("inf")]


@pytest.mark.parametrize("step", [2, 1])
def test_steps_only_grow(tmp_path, step):
    logger = MetricsLogger(tmp_path)
    logger.log(2, {"a": 1})
    with pytest.raises(ValueError, match=f"step {step} was logged already"):
        logger.log(step, {"a": 2})
    assert len(lines(tmp_path / "metrics.jsonl")) == 1


def test_a_resumed_run_has_every_step_once(tmp_path):
    """Killed while step 6 was written; the last checkpoint is of step 3."""
    logger = MetricsLogger(tmp_path)
    for step in range(1, 6):
        logger.log(step, {"value": step})
        logger.dump_trees(step, [], str)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "val')
    again = MetricsLogger(tmp_path)
    again.resume(3)
    assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == [
        f"step_00000{n}.jsonl" for n in (1, 2, 3)
    ]
    for step in range(4, 8):
        again.log(step, {"value": 10 * step})
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": step, "value": value} for step, value in enumerate([1, 2, 3, 40, 50, 60, 70], start=1)
    ]


def test_a_line_cut_short_is_neither_read_nor_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 2}\n{"step": 2, "a"')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 2}]
    MetricsLogger(tmp_path).log(2, {"a": 3})
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 2}, {"step": 2, "a": 3}]


def test_phases_keep_their_own_files(tmp_path):
    sft, main = MetricsLogger(tmp_path, "sft"), MetricsLogger(tmp_path)
    sft.log(1, {"sft/loss": 2.0})
    main.log(1, {"reward/initial": 1.0})
    main.dump_trees(1, [], str)
    sft.resume(0)
    assert lines(tmp_path / "sft.jsonl") == []
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "reward/initial": 1.0}]
    assert (tmp_path / "rollouts" / "step_000001.jsonl").exists()


PROMPT = "Q? "
CALL = ToolCall("python", "6*7", "42", Outcome.OK, 0.01234567, call_end=8, result_end=12, states={"python": object()})


def rollout(node, text, sampled, calls=(), **fields):
    """One character is one token. `sampled` is a picture of the response: s for sampled, . for a tool result."""
    assert len(text) == len(sampled)
    tokens = np.array([ord(char) for char in PROMPT + text], np.int32)
    mask = np.array([False] * len(PROMPT) + [mark == "s" for mark in sampled])
    zeros = np.zeros(len(tokens), np.float32)
    example = Example("q-1", "six times seven?", ("42", "forty-two"), "math", "")
    return Rollout(
        example, tokens, len(PROMPT), mask, zeros, zeros, StopReason.ANSWERED, tuple(calls), node,
        reward=fields.pop("reward", 1.1), correct=True, **fields,
    )  # fmt: skip


def test_a_dumped_tree_tells_text_tool_results_and_branches(tmp_path):
    tree = [
        rollout(0, "<6*7>=42|so 42", "sssss....sssss", [CALL], reward_detail={"format": np.float32(1.0)}),
        rollout(1, "no", "ss", reward=float("nan")),
        rollout(2, "<6*7>=42|is 42", "sssss....sssss", [CALL], parent=0, fork=len(PROMPT) + 10, loop=1),
        rollout(3, "<6+7", "ssss", parent=0, fork=len(PROMPT) + 2, loop=1),
        rollout(4, "<6+x", "ssss", parent=3, fork=len(PROMPT) + 3, loop=2),
    ]
    path = MetricsLogger(tmp_path).dump_trees(12, [tree], lambda ids: "".join(map(chr, ids)))
    assert path == tmp_path / "rollouts" / "step_000012.jsonl"
    (record,) = lines(path)
    nodes = record.pop("nodes")
    assert record == {
        "step": 12, "id": "q-1", "question": "six times seven?", "golds": ["42", "forty-two"], "kind": "math",
    }  # fmt: skip
    assert [node["branch_positions"] for node in nodes] == [[5, 13], [], [], [6], []]
    assert [(node["parent"], node["fork"], node["loop"]) for node in nodes] == [
        (None, None, 0), (None, None, 0), (0, 13, 1), (0, 5, 1), (3, 6, 2),
    ]  # fmt: skip
    assert nodes[0]["segments"] == [
        {"start": 3, "sampled": True, "text": "<6"},
        {"start": 5, "sampled": True, "text": "*7>"},
        {"start": 8, "sampled": False, "text": "=42|"},
        {"start": 12, "sampled": True, "text": "s"},
        {"start": 13, "sampled": True, "text": "o 42"},
    ]
    assert nodes[2]["segments"] == [{"start": 13, "sampled": True, "text": "s 42"}]
    assert [segment["text"] for segment in nodes[3]["segments"]] == ["+", "7"]
    assert nodes[0]["calls"] == [
        {
            "name": "python", "argument": "6*7", "result": "42", "outcome": "ok", "seconds": 0.0123, "call_end": 8,
            "result_end": 12,
        }
    ]  # fmt: skip
    assert (nodes[0]["tokens"], nodes[0]["sampled_tokens"], nodes[2]["sampled_tokens"]) == (17, 10, 4)
    assert (nodes[0]["reward"], nodes[1]["reward"], nodes[0]["reward_detail"]) == (1.1, None, {"format": 1.0})
    assert nodes[0]["stop_reason"] == "answered"
