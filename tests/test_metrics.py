"""The metrics that a run writes, read back as strict JSON and in TensorBoard's record format."""

import gzip
import json
import logging
import resource
import struct

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from appo_jax.dumps import spans
from appo_jax.errors import CheckpointError
from appo_jax.metrics import MetricsLogger, read_metrics
from appo_jax.types import Example, Outcome, Rollout, StopReason, ToolCall


def strict(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def lines(path):
    """The records of a file, without their checksums."""
    records = [strict(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "crc"} for record in records]


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


def test_json_stays_strict_and_tensorboard_silent_where_numbers_are_not_finite(tmp_path, caplog):
    logger = MetricsLogger(tmp_path)
    logger.log(1, {"a": float("nan"), "b": float("inf"), "c": np.float64("-inf"), "d": 1.5})
    logger.write_summary({"accuracy": float("nan"), "steps": np.int64(3), "by": {"x": np.float32("inf")}})
    logger.close()
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "a": None, "b": None, "c": None, "d": 1.5}]
    assert strict((tmp_path / "summary.json").read_text()) == {"accuracy": None, "steps": 3, "by": {"x": None}}
    assert scalars(tmp_path / "tensorboard" / "metrics") == [(1, "d", 1.5)]
    assert not caplog.records  # "NaN or Inf found in input tensor." of tensorboardX


def test_a_full_disk_ends_tensorboards_files_only_and_is_told_with_the_file(tmp_path, caplog):
    """Files may not grow beyond 300 bytes. The thread of tensorboardX's SummaryWriter would end there, and steps wait for it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    logger = MetricsLogger(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
    try:
        for step in range(1, 7):
            logger.log(step, {"a": step})
        with pytest.raises(OSError, match=r"File too large: .*/metrics\.jsonl"):
            logger.log(7, {"text": "x" * 300})
        with pytest.raises(OSError, match=r"File too large: .*/summary.json'"):
            logger.write_summary({"text": "x" * 300})
        logger.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caplog.text.count("the run goes on without TensorBoard's files") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


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
        f"step_00000{n}.jsonl.gz" for n in (1, 2, 3)
    ]
    for step in range(4, 8):
        again.log(step, {"value": 10 * step})
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": step, "value": value} for step, value in enumerate([1, 2, 3, 40, 50, 60, 70], start=1)
    ]


def test_a_line_cut_short_is_neither_read_nor_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 2}\n{"step": 2, "a"')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 2}]
    logger = MetricsLogger(tmp_path)
    logger.resume(1)
    logger.log(2, {"a": 3})
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 2}, {"step": 2, "a": 3}]


def logged(tmp_path, steps):
    """A run's metrics and dumps up to a step."""
    logger = MetricsLogger(tmp_path)
    for step in range(1, steps + 1):
        logger.log(step, {"value": step / 3, "note": "ä"})
        logger.dump_trees(step, [], str)
    logger.close()
    return tmp_path / "metrics.jsonl"


def cut_into_the_last_line(content):
    return content[:-5]


def cut_in_the_middle(content):
    return content[: content.index(b'"step": 3') + 4]


def blank_line(content):
    return content.replace(b"\n", b"\n\n", 1)


def nul_bytes(content):
    at = content.index(b'"step": 2')
    return content[:at] + bytes(16) + content[at + 16 :]


def bad_byte(content):
    return content[:30] + b"\xff" + content[31:]


def another_digit(content):
    return content.replace(b"0.6666666666666666", b"0.6666666666666667")


def repeated(content):
    return content + content


def emptied(content):
    return b""


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        (cut_into_the_last_line, []), (cut_in_the_middle, [3, 4]), (blank_line, []), (nul_bytes, [2]), (bad_byte, [1]),
        (another_digit, [2]), (repeated, []), (emptied, [1, 2, 3, 4]),
    ],
)  # fmt: skip
def test_a_damaged_file_keeps_what_it_can_and_says_what_is_lost(tmp_path, caplog, damage, lost):
    path = logged(tmp_path, 5)
    before = lines(path)
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    with caplog.at_level(logging.INFO):
        logger = MetricsLogger(tmp_path)
        logger.resume(5, {"value": 5 / 3, "note": "ä"})  # the checkpoint of step 5 holds its record
    expected = [{"step": r["step"], "lost": True} if r["step"] in lost else r for r in before]
    assert lines(path) == expected
    if lost:
        assert f"{spans(lost)} are lost" in caplog.text
    if lost or damage in (blank_line, repeated):
        assert (tmp_path / "metrics.damaged-1.jsonl").read_bytes() == damaged
        assert "metrics.damaged-1.jsonl" in caplog.text
    assert [r["step"] for r in read_metrics(path)] == [s for s in range(1, 6) if s not in lost]  # readers go on
    assert len(list((tmp_path / "rollouts").iterdir())) == 5  # no tree is removed for it
    logger.log(6, {"value": 2.0})
    MetricsLogger(tmp_path).resume(6)  # what is marked as lost stays so, and is told once
    assert lines(path) == [*expected, {"step": 6, "value": 2.0}]


def test_a_run_without_its_checkpoints_is_not_begun_anew_in_silence(tmp_path, caplog):
    path = logged(tmp_path, 5)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="records or trees of 5 steps, but there is no checkpoint"):
        MetricsLogger(tmp_path).resume(0, max_unsaved=4)
    assert path.read_bytes() == before
    path.unlink()  # trees are worth as much as records
    with pytest.raises(CheckpointError, match="records or trees of 5 steps"):
        MetricsLogger(tmp_path).resume(0, max_unsaved=4)
    assert len(list((tmp_path / "rollouts").iterdir())) == 5
    with caplog.at_level("INFO"):
        MetricsLogger(tmp_path).resume(0, max_unsaved=5)  # a kill before the first checkpoint
    assert "no checkpoint holds steps 1-5: they are made again" in caplog.text


@pytest.mark.parametrize(
    "name", ["step_final.jsonl", "step_3.jsonl", "notes", "step_000002.jsonl~", "step_abc.jsonl.gz"]
)
def test_files_of_other_names_are_left_alone(tmp_path, name):
    logged(tmp_path, 3)
    (tmp_path / "rollouts" / name).write_text("mine")
    MetricsLogger(tmp_path).resume(2)
    assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == sorted(
        ["step_000001.jsonl.gz", "step_000002.jsonl.gz", name]
    )


def test_a_dump_that_only_cannot_be_read_now_is_left_as_it_is(tmp_path, caplog):
    logged(tmp_path, 2)
    path = tmp_path / "rollouts/step_000001.jsonl.gz"
    path.unlink()
    path.symlink_to("/proc/self/mem")  # a page that the system does not give (EIO)
    MetricsLogger(tmp_path).resume(2)
    assert "step_000001.jsonl.gz cannot be read (Input/output error), and is left as it is" in caplog.text
    assert len(list((tmp_path / "rollouts").iterdir())) == 2
    assert "lost" not in caplog.text


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "twice", "missing"])
def test_a_damaged_dump_is_set_aside_and_told(tmp_path, caplog, damage):
    logged(tmp_path, 3)
    path = tmp_path / "rollouts" / "step_000002.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"step": 2}\n', mtime=0))
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        content[14] ^= 16
        path.write_bytes({"cut": content[:-9], "flip": content, "empty": b"", "twice": path.read_bytes() * 2}[damage])
    MetricsLogger(tmp_path).resume(3)
    assert "step 2 are lost" in caplog.text
    assert not path.exists()
    assert (tmp_path / "rollouts" / "step_000002.damaged-1.jsonl.gz").exists() == (damage != "missing")


@pytest.mark.parametrize(
    ("keep", "every", "kept"),
    [(2, 1, [3, 4, 5]), (1, 2, [4, 5]), (2, 3, [2, 3, 4, 5]), (1, 10, [1, 2, 3, 4, 5])],
)
def test_old_dumps_are_removed_but_none_that_a_resumed_run_has(tmp_path, caplog, keep, every, kept):
    """Killed after the dump of step 5. Every `every`th step was saved: the run goes on from there with its `keep` newest dumps."""
    logger = MetricsLogger(tmp_path, keep_rollouts=keep)
    for step in range(1, 6):
        logger.dump_trees(step, [], str)
        if step % every == 0 and step < 5:
            (tmp_path / f"checkpoints/rl/{step}").mkdir(parents=True)
    assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == [f"step_00000{n}.jsonl.gz" for n in kept]
    saved = 4 // every * every
    MetricsLogger(tmp_path, keep_rollouts=keep).resume(saved, {"value": 0.0})
    assert "trees" not in caplog.text
    left = len([n for n in kept if n <= saved])
    assert left == len(list((tmp_path / "rollouts").iterdir())) == min(keep, saved)


def unpack(path):
    """As `gunzip -k`."""
    path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))


def test_a_dump_that_a_user_has_unpacked_is_removed_with_it(tmp_path):
    logger = MetricsLogger(tmp_path, keep_rollouts=1)
    for step in range(1, 5):
        logger.dump_trees(step, [], str)
        unpack(tmp_path / f"rollouts/step_00000{step}.jsonl.gz")
    (tmp_path / "checkpoints/rl/3").mkdir(parents=True)
    logger.dump_trees(5, [], str)
    assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == [
        "step_000003.jsonl", "step_000003.jsonl.gz", "step_000004.jsonl", "step_000004.jsonl.gz", "step_000005.jsonl.gz",
    ]  # fmt: skip
    logger.resume(3)
    assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == [
        "step_000003.jsonl",
        "step_000003.jsonl.gz",
    ]


def test_a_damaged_dump_is_not_lost_if_a_user_has_unpacked_it(tmp_path, caplog):
    logged(tmp_path, 2)
    path = tmp_path / "rollouts/step_000001.jsonl.gz"
    unpack(path)
    path.write_bytes(b"")
    MetricsLogger(tmp_path).resume(2)
    assert "step_000001.jsonl.gz is damaged and set aside as step_000001.damaged-1.jsonl.gz" in caplog.text
    assert "lost" not in caplog.text
    assert (tmp_path / "rollouts/step_000001.jsonl").exists()


def test_phases_keep_their_own_files(tmp_path):
    sft, main = MetricsLogger(tmp_path, "sft"), MetricsLogger(tmp_path)
    sft.log(1, {"sft/loss": 2.0})
    main.log(1, {"reward/initial": 1.0})
    main.dump_trees(1, [], str)
    sft.resume(0)
    assert lines(tmp_path / "sft.jsonl") == []
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "reward/initial": 1.0}]
    assert (tmp_path / "rollouts" / "step_000001.jsonl.gz").exists()


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
    MetricsLogger(tmp_path).dump_trees(12, [tree], lambda ids: "".join(map(chr, ids)))
    (record,) = strict(f"[{gzip.decompress((tmp_path / 'rollouts/step_000012.jsonl.gz').read_bytes()).decode()}]")
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
