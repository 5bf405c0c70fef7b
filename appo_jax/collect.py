"""`appo-jax sft --collect FILE`: traces for a cold start, sampled from a policy with its tools; those that are right are kept.

A trace is kept where its answer is right, its format is whole and every call in it was answered, and where no kept trace of
its question makes the same calls.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from appo_jax.components import Components, build, give_rewards, response_of
from appo_jax.config import Config
from appo_jax.data.demonstrations import LeftOut
from appo_jax.errors import DataError
from appo_jax.export import policy_params
from appo_jax.reward.format import format_error
from appo_jax.types import Outcome, Rollout

log = logging.getLogger(__name__)

COLLECT = 5  # first number of the identity of every draw


@dataclasses.dataclass(frozen=True)
class Collecting:
    """What is asked for."""

    out: Path  # the file of traces
    run: Path | None = None  # whose newest policy draws; None: the config's `policy.path`
    samples: int = 4  # answers to every question
    questions: int = 0  # of the training split, the first so many; 0: all


def collect(config: Config, asked: Collecting) -> str:
    """Draw, keep what is right, and write it; returns a line that says how much that is. The same command goes on with a
    file that it was stopped at. Raises DataError where the file holds something else."""
    done = _answered(asked.out)
    left_out, kept = LeftOut(), 0
    with build(config) as components:
        params = policy_params(components, asked.run)
        examples = [example for example in components.train[: asked.questions or None] if example.id not in done]
        # As the data source has it, with the place for the tools of whatever run learns from the trace.
        systems = {example.id: example.system for example in components.dataset.train}
        size = max(1, 4 * config.rollout.decode_rows // asked.samples)
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        with asked.out.open("a", encoding="utf-8") as file:
            for first in range(0, len(examples), size):
                some = examples[first : first + size]
                trees = components.sampler.initial(
                    params, some, asked.samples, (COLLECT, len(done) + first), max_examples=min(size, len(examples))
                )
                give_rewards([rollout for tree in trees for rollout in tree], components)
                for example, tree in zip(some, trees, strict=True):
                    records = right(tree, components, left_out)
                    records = [record | {"system": systems[example.id]} for record in records]
                    kept += len(records)
                    # A question without a right answer has a line too: it was asked.
                    for record in records or [{"id": example.id, "left_out": "none of its answers was kept"}]:
                        file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
                log.info("%d of %d questions answered, %d traces kept", first + len(some), len(examples), kept)
    return (
        f"{kept} traces of {len(examples)} questions in {asked.out}; left out: {left_out if left_out.total else 'none'}"
    )


def right(tree: Sequence[Rollout], components: Components, left_out: LeftOut) -> list[dict[str, Any]]:
    """The traces of one question that are kept; the others are counted in `left_out`."""
    kept: dict[tuple[tuple[str, str], ...], dict[str, Any]] = {}
    for rollout in tree:
        example = rollout.example
        calls = tuple((call.name, " ".join(call.argument.split())) for call in rollout.calls)
        response = response_of(rollout, components.tokenizer)
        problem = format_error(response, components.executor.call_format)
        if rollout.reward_error is not None:
            left_out.add("it has no reward", example.id)
        elif not rollout.correct:
            left_out.add("its answer is wrong", example.id)
        elif problem is not None:
            left_out.add(problem, example.id)
        elif any(call.outcome is not Outcome.OK for call in rollout.calls):
            left_out.add("a call of it failed", example.id)
        elif calls in kept:
            left_out.add("it makes the calls of another one", example.id)
        else:
            kept[calls] = to_record(rollout, [text for text, _ in response.turns])
    return list(kept.values())


def to_record(rollout: Rollout, turns: Sequence[str]) -> dict[str, Any]:
    """A rollout as a record of chat messages (docs/traces.md). turns: what the policy wrote between results."""
    example = rollout.example
    messages = [{"role": "user", "content": example.question}]
    for text, call in zip(turns, (*rollout.calls, None), strict=True):
        messages.append({"role": "assistant", "content": text})
        if call is not None:
            messages.append({"role": "tool", "content": call.result})
    return {"id": example.id, "messages": messages, "answer": list(example.golds), "kind": example.kind}


def _answered(file: Path) -> set[str]:
    """Ids of the questions that a file of traces has asked already; the line that a kill cut off is taken away."""
    if not file.exists():
        return set()
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        file.write_text("".join(lines[:-1]), encoding="utf-8")
        lines.pop()
    try:
        return {json.loads(line)["id"] for line in lines}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: holds something else than collected traces ({error}); give another file") from error
