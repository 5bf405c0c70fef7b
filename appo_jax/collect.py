"""`appo-jax sft --collect FILE`: samples traces for a cold start from a policy with its tools.

A trace is kept if its answer is right, its format is correct, all of its calls succeeded, and no kept trace of the same question
makes the same calls.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from appo_jax.components import Components, build, give_rewards, response_of
from appo_jax.config import Config
from appo_jax.config.bounds import require_at_least
from appo_jax.config.effects import Affects, affects
from appo_jax.config_io import flatten
from appo_jax.data.demonstrations import LeftOut
from appo_jax.errors import ConfigError, DataError
from appo_jax.export import policy_params
from appo_jax.provenance import changes, provenance
from appo_jax.reward import require_rewards
from appo_jax.reward.format import format_error
from appo_jax.rollout.sampler import Purpose
from appo_jax.storage import read_resumable
from appo_jax.types import Outcome, Rollout

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Collecting:
    """The arguments of `collect`."""

    out: Path  # the file of traces
    run: Path | None = None  # the run whose newest policy is sampled; None: the config's `policy.path`
    samples: int = 4  # rollouts of every question
    questions: int = 0  # the number of questions, from the beginning of the training split; 0: all

    def __post_init__(self) -> None:
        require_at_least({"--samples": (self.samples, 1), "--questions": (self.questions, 0)})


def collect(config: Config, asked: Collecting) -> str:
    """Sample rollouts, and write the traces that are kept to the file. Returns a line with the counts.

    If the file exists, questions that it holds are skipped. A question without a reward is left out, and asked again by the next
    start. Raises DataError if the file is not one of collected traces, ConfigError if they were collected with another setting,
    and TrainingError if no question has a reward."""
    setting = _setting(config, asked)
    done = _answered(asked.out, setting)
    left_out, kept, rewarded = LeftOut(), 0, len(done)
    with build(config) as components:
        _, params = policy_params(components, asked.run)
        examples = [e for e in components.train[: asked.questions or None] if (e.id, e.question) not in done]
        # The system prompts of the data source still hold `{tools}`, so that a trace can be used with other tools.
        systems = {example.id: example.system for example in components.dataset.train}
        size = max(1, 4 * config.rollout.decode_rows // asked.samples)
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        with asked.out.open("a", encoding="utf-8") as file:
            if file.tell() == 0:
                file.write(json.dumps({"collected": setting}) + "\n")
            for first in range(0, len(examples), size):
                some = examples[first : first + size]
                trees = components.sampler.initial(
                    params,
                    some,
                    asked.samples,
                    (Purpose.COLLECT, len(done) + first),
                    max_examples=min(size, len(examples)),
                )
                rollouts = [rollout for tree in trees for rollout in tree]
                give_rewards(rollouts, components)
                for example, tree in zip(some, trees, strict=True):
                    records = right(tree, components, left_out)
                    if all(rollout.reward_error is not None for rollout in tree):
                        continue
                    rewarded += 1
                    kept += len(records)
                    asked_as = {"id": example.id, "question": example.question, "system": systems[example.id]}
                    # A question without a kept trace gets a line too, so that it is not asked again.
                    for record in records or [{"left_out": "none of its answers was kept"}]:
                        file.write(json.dumps(asked_as | record, ensure_ascii=False) + "\n")
                file.flush()
                log.info("%d of %d questions answered, %d traces kept", first + len(some), len(examples), kept)
        if not rewarded:
            require_rewards(rollouts)  # it raises, with the reason of the last questions
    return (
        f"{kept} traces of {len(examples)} questions in {asked.out}; left out: {left_out if left_out.total else 'none'}"
    )


def right(tree: Sequence[Rollout], components: Components, left_out: LeftOut) -> list[dict[str, Any]]:
    """The records of the kept traces of one question. The others are counted in `left_out`."""
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
        elif not response.segments[-1].sampled:  # it answered, called once more, and was stopped
            left_out.add("the policy writes nothing at its end", example.id)
        elif calls in kept:
            left_out.add("it makes the calls of another one", example.id)
        else:
            kept[calls] = to_record(rollout, response.framed_turns)
    return list(kept.values())


def to_record(rollout: Rollout, turns: Sequence[str]) -> dict[str, Any]:
    """A rollout as a record of chat messages (docs/traces.md). turns: the policy's texts
    between tool results, with the thoughts that the template opened for it."""
    example = rollout.example
    messages = [{"role": "user", "content": example.question}]
    for text, call in zip(turns, (*rollout.calls, None), strict=True):
        messages.append({"role": "assistant", "content": text})
        if call is not None:
            messages.append({"role": "tool", "content": call.result})
    return {"id": example.id, "messages": messages, "answer": list(example.golds), "kind": example.kind}


def _setting(config: Config, asked: Collecting) -> dict[str, Any]:
    """Everything that the traces of a question depend on, by name: traces of two settings must not be mixed."""
    kept_by = {
        name: value
        for name, value in flatten(config).items()
        if name == "rollout.temperature" or (name.startswith("reward.") and affects(name) & Affects.ACCURACY)
    }
    return {"samples": asked.samples} | provenance(config, asked.run) | kept_by


def _answered(file: Path, setting: Mapping[str, Any]) -> set[tuple[str, str]]:
    """(id, question) of the questions in a file of traces. Its first line is the setting with which they were collected."""
    try:
        head, *records = read_resumable(file) or [{"collected": setting}]
        others = changes(head["collected"], setting)
        done = {(record["id"], record["question"]) for record in records}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file}: it is not a file of traces that `sft --collect` of this version writes ({type(error).__name__}: {error}); "
            "give another file"
        ) from error
    if others:
        raise ConfigError(f"{file} holds traces of another setting: {others}; give another file to --collect")
    return done
