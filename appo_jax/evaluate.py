"""Measures a policy: on held-out questions with greedy decoding, and on benchmark sets."""

from __future__ import annotations

import dataclasses
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from appo_jax import distributed, heartbeat
from appo_jax.benchmark.figures import grade_all, summarize
from appo_jax.benchmark.predictions import Sample, check_samples
from appo_jax.benchmark.questions import Questions, load_questions
from appo_jax.benchmark.report import write_report
from appo_jax.benchmark.sets import Item, Rule, benchmark
from appo_jax.components import Components, give_rewards, response_of
from appo_jax.config import EvalSetConfig
from appo_jax.data.examples import system_prompt
from appo_jax.errors import ConfigError, DataError
from appo_jax.policy.parameters import Params
from appo_jax.reward import require_rewards
from appo_jax.reward.language_judge import LanguageJudge
from appo_jax.rollout.sampler import GenerationStats, Purpose
from appo_jax.rollout.stats import accuracy
from appo_jax.text.tokenizer import Tokenizer
from appo_jax.tools.outage import Drawn, Stopping, with_tools
from appo_jax.types import Example, Kind, Rollout


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Greedy rollouts of the held-out questions."""

    rollouts: list[Rollout]
    seconds: float

    @property
    def accuracy(self) -> float:
        """The share of right answers among the rollouts that have a reward."""
        return accuracy(self.rollouts)

    @property
    def metrics(self) -> dict[str, float]:
        return {
            "eval/accuracy": self.accuracy,
            "eval/reward": float(np.nanmean([r.reward for r in self.rollouts])),
            "eval/failed": sum(r.reward_error is not None for r in self.rollouts),
            "eval/truncated": float(np.mean([r.truncated for r in self.rollouts])),
            "eval/calls": float(np.mean([len(r.calls) for r in self.rollouts])),
            "eval/seconds": self.seconds,
        }


def held_out_examples(components: Components) -> Sequence[Example]:
    """The first `eval.num_prompts` held-out questions; all if it is 0."""
    count = components.config.eval.num_prompts or len(components.held_out)
    return [components.held_out[i] for i in range(min(count, len(components.held_out)))]


@heartbeat.phase("evaluate")
def evaluate(params: Params, components: Components, stopping: Stopping | None = None) -> Evaluation:
    """Draw one greedy rollout, with tools, for every held-out question. Raises ToolsDown if a tool is down and stays down, or if
    the run is asked to stop (`stopping`) while it is down; TrainingError if no rollout has a reward."""
    began, questions = time.perf_counter(), held_out_examples(components)
    heartbeat.detail(f"{len(questions)} questions")
    rollouts = _with_tools(
        lambda: [
            rollout
            for tree in components.sampler.initial(params, questions, 1, draw_id=(Purpose.EVALUATION,), temperature=0.0)
            for rollout in tree
        ],
        components,
        stopping,
    )
    give_rewards(rollouts, components)
    require_rewards(rollouts)
    components.sampler.take_stats()  # calls and tokens of an evaluation must not count for a training step
    return Evaluation(rollouts, time.perf_counter() - began)


def _with_tools(draw: Callable[[], Drawn], components: Components, stopping: Stopping | None) -> Drawn:
    """The result of `draw`, during which the tools answered (`outage.with_tools`). Its calls do not count for a training step."""
    return with_tools(draw, components.executor.metrics, "an evaluation", components.config.tools, stopping)


@dataclasses.dataclass(frozen=True)
class Draws:
    """How the questions of a set are answered."""

    samples: int
    temperature: float  # 0: greedy
    max_items: int  # upper bound of the number of questions in one call


def draw_samples(
    params: Params,
    components: Components,
    items: Sequence[Item],
    rule: Rule,
    draws: Draws,
    stopping: Stopping | None = None,
) -> list[list[Sample]]:
    """Rollouts of every question of a set, under the system prompt of the first held-out question of its kind, or of the first.

    Every sample has its share of the time that the questions took together. Raises DataError for a question that is longer than
    `rollout.max_prompt_tokens`, ToolsDown as `evaluate`."""
    examples = _examples(components, items, rule)
    # The second number differs for each part of a set.
    draw_id = (Purpose.EVALUATION_SET, zlib.crc32(items[0].id.encode()) & 0x7FFFFFFF)

    def draw() -> tuple[list[list[Rollout]], GenerationStats, float]:
        began = time.perf_counter()
        trees = components.sampler.initial(params, examples, draws.samples, draw_id, draws.temperature, draws.max_items)
        return trees, components.sampler.take_stats(), time.perf_counter() - began

    trees, stats, seconds = _with_tools(draw, components, stopping)
    drawn = len(items) * draws.samples
    times = {"seconds": seconds / drawn, "decode_seconds": stats.decode_s / drawn}
    return [[_sample(rollout, components.tokenizer, times) for rollout in tree] for tree in trees]


def _examples(components: Components, items: Sequence[Item], rule: Rule) -> list[Example]:
    """The questions of a set as the policy sees them. Raises DataError for one that is too long."""
    kind: Kind = "math" if rule == "math" else "qa"
    system = system_prompt(components.held_out, kind)
    examples = [Example(item.id, item.question, item.golds, kind, system) for item in items]
    limit = components.config.rollout.max_prompt_tokens
    for example in examples:
        length = len(components.tokenizer.render_prompt(example.system, example.question))
        if length > limit:
            raise DataError(
                f"question {example.id!r} has {length} tokens: raise rollout.max_prompt_tokens = {limit} "
                "(for `appo-jax eval`: --rollout.max-prompt-tokens N at the end of the command, or a config with --config)"
            )
    return examples


def _sample(rollout: Rollout, tokenizer: Tokenizer, times: Mapping[str, float]) -> Sample:
    calls = [call.to_json() for call in rollout.calls]
    keep = ("name", "argument", "result", "outcome", "seconds")
    facts = {
        "calls": [{name: call[name] for name in keep} for call in calls],
        "tokens": int(rollout.sampled.sum()), "stop_reason": str(rollout.stop_reason),
        **times,
    }  # fmt: skip
    return Sample(response_of(rollout, tokenizer).sampled_text, facts)


Sets = Sequence[tuple[EvalSetConfig, Questions]]


def load_sets(components: Components) -> Sets:
    """The questions of `eval.sets`. Raises ConfigError or DataError for a set that cannot be read, asked or judged."""
    config = components.config
    sets: list[tuple[EvalSetConfig, Questions]] = []
    for chosen in config.eval.sets:
        rule = benchmark(chosen.set).rule
        if rule == "judge" and config.reward.judge is None:
            raise ConfigError(
                f"eval.sets: {chosen.set} is decided by a judge; give --reward.judge.url and --reward.judge.model"
            )
        questions = load_questions(chosen.set, Path(chosen.data)).first(chosen.limit or None)
        _examples(components, questions.items, rule)
        sets.append((chosen, questions))
    return sets


@heartbeat.phase("evaluate")
def evaluate_sets(
    params: Params, components: Components, sets: Sets, folder: Path, stopping: Stopping | None = None
) -> dict[str, float]:
    """The metrics of `eval.sets`. The first host writes a report of each set into `folder`, as `appo-jax eval` does. Raises
    ToolsDown as `evaluate`."""
    metrics: dict[str, float] = {}
    for chosen, questions in sets:
        began, name, items = time.perf_counter(), chosen.set, questions.items
        heartbeat.detail(f"{len(items)} questions of {name}")
        draws = Draws(chosen.samples, chosen.temperature, len(items))
        drawn = draw_samples(params, components, items, benchmark(name).rule, draws, stopping)
        samples = {item.id: found for item, found in zip(items, drawn, strict=True)}
        found = _report(components, name, questions, samples, folder / name) if distributed.host() == 0 else None
        figures = distributed.exchange(found)[0]
        metrics |= {f"eval/{name}/{figure}": value for figure, value in figures.items()}
        metrics[f"eval/{name}/seconds"] = time.perf_counter() - began
    return metrics


def _report(
    components: Components, name: str, questions: Questions, samples: dict[str, list[Sample]], folder: Path
) -> dict[str, Any]:
    """Grade a set, write its report, and return its figures. A judge is asked only about sets that it decides."""
    predictions = check_samples(samples, [])
    config, judge, opened = components.config, None, None
    if benchmark(name).rule == "judge":
        judge = components.reward.language
    if benchmark(name).rule == "judge" and judge is None:
        assert config.reward.judge is not None  # load_sets
        cache = config.reward.judge.cache or Path(config.run_dir) / "verdicts-eval.sqlite"
        judge = opened = LanguageJudge(config.reward.judge, Path(cache))
    try:
        graded = grade_all(name, questions.items, predictions, judge)
    finally:
        if opened is not None:
            opened.close()
    record = summarize(name, graded, predictions, ks=(1,)) | {"left_out": questions.left_out}
    write_report(folder, record, graded)
    return {
        "accuracy": record["accuracy"][0], "f1": record["f1"][0], "calls": record["rollouts"]["calls_per_prediction"],
        "without_verdict": len(record["counted_as_wrong"]["without_verdict"]),
    }  # fmt: skip
