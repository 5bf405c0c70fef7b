"""`appo-jax eval`: grades predictions on a benchmark set. They come from a file, or a policy with its tools draws them now."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from appo_jax.benchmark.figures import grade_all, summarize
from appo_jax.benchmark.predictions import Predictions, Sample, check_samples, read_predictions
from appo_jax.benchmark.questions import load_questions
from appo_jax.benchmark.report import write_report
from appo_jax.benchmark.sets import Item, benchmark
from appo_jax.components import build
from appo_jax.config import Config, JudgeConfig
from appo_jax.config.bounds import require_at_least, temperature_problem
from appo_jax.errors import ConfigError
from appo_jax.evaluate import Draws, draw_samples
from appo_jax.export import policy_params
from appo_jax.provenance import changes, provenance
from appo_jax.reward.language_judge import LanguageJudge
from appo_jax.storage import read_resumable, write_atomically

log = logging.getLogger(__name__)

ROUNDS_PER_SAVE = 4  # rollouts are saved after this many times decode_rows were drawn


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The arguments of `evaluate_set`."""

    set: str
    data: Path
    out: Path
    predictions: Path | None = None
    limit: int | None = None  # the number of questions, from the beginning of the set; None: all
    samples: int = 1
    temperature: float = 0.0  # of the policy's draws; 0: greedy
    judge: JudgeConfig | None = None
    step: int | None = None  # the checkpoint of the run; None: the newest

    def __post_init__(self) -> None:
        require_at_least(
            {
                "--limit": (self.limit, 1),
                "--samples": (self.samples, 1),
                "--step": (self.step, 1),
            }
        )
        for problem in temperature_problem("--temperature", self.temperature):
            raise ConfigError(problem)


def evaluate_set(asked: Evaluation, config: Config | None = None, weights: Path | None = None) -> str:
    """Grade a set and write its report. Returns the report's text.

    The predictions come from a file or are drawn now. In the second case, `config` gives policy, prompt and tools, and `weights`
    is the run whose checkpoint is used (None: the config's `policy.path`). Drawn samples are kept in the folder; the
    same command given again draws only the missing ones. Raises ConfigError and DataError.
    """
    if asked.predictions is not None:
        _require_no_policy(asked, config)
    every = load_questions(asked.set, asked.data)
    questions = every.first(asked.limit)
    if asked.predictions is not None:
        predictions = read_predictions(asked.predictions, every.items, asked.limit)
    elif config is not None:
        predictions = _draw(asked, questions.items, config, weights)
    else:
        raise ConfigError("give --predictions FILE, --run RUN, or --config FILE: whose answers are to be graded?")
    judge = None
    if asked.judge is not None:
        judge = LanguageJudge(asked.judge, Path(asked.judge.cache or asked.out / "verdicts.sqlite"))
    try:
        graded = grade_all(asked.set, questions.items, predictions, judge)
    finally:
        if judge is not None:
            judge.close()
    record = summarize(asked.set, graded, predictions, ks=(1, 3, 5, 10)) | {"left_out": questions.left_out}
    if judge is not None:
        record["judge"] = dataclasses.asdict(judge.counts) | {"model": judge.config.model}
    return write_report(asked.out, record, graded)


def _require_no_policy(asked: Evaluation, config: Config | None) -> None:
    """Raises ConfigError if predictions from a file come with options that are about drawing."""
    options = {f"--{name}": getattr(asked, name) for name in ("samples", "temperature", "step")}
    given = [] if config is None else ["--run and --config"]
    given += [f"{option} {value}" for option, value in options.items() if value != getattr(Evaluation, option[2:])]
    if given:
        raise ConfigError(
            f"--predictions {asked.predictions}: the answers come from this file, so no policy is asked; leave out "
            f"{', '.join(given)}, or the file"
        )


def _draw(asked: Evaluation, items: Sequence[Item], config: Config, weights: Path | None) -> Predictions:
    """Draw the samples that the folder does not hold yet. They are saved after every few rounds of rows."""
    if asked.step is not None and weights is None:
        raise ConfigError(f"--step {asked.step} is a checkpoint of a run: give --run RUN")
    if asked.samples > 1 and asked.temperature == 0:
        raise ConfigError("--samples above 1 needs --temperature above 0: greedy samples are all the same")
    file = asked.out / "generations.jsonl"
    asked.out.mkdir(parents=True, exist_ok=True)
    samples = _kept(file, items, _setting(asked, config, weights))
    left = [item for item in items if not samples[item.id]]
    if left:
        log.info("%d of %d questions are to be answered", len(left), len(items))
        with build(config) as components, file.open("a", encoding="utf-8") as out:
            _, params = policy_params(components, weights, asked.step)
            size = max(1, ROUNDS_PER_SAVE * config.rollout.decode_rows // asked.samples)
            for first in range(0, len(left), size):
                some = left[first : first + size]
                draws = Draws(asked.samples, asked.temperature, min(size, len(left)))
                drawn = draw_samples(params, components, some, benchmark(asked.set).rule, draws)
                for item, found in zip(some, drawn, strict=True):
                    samples[item.id] = found
                    for sample in found:
                        record = {"id": item.id, "question": item.question, "prediction": sample.text} | sample.rollout
                        out.write(json.dumps(record) + "\n")
                out.flush()
                log.info("%d of %d questions are answered", len(items) - len(left) + first + len(some), len(items))
    return check_samples(samples, [])


def _setting(asked: Evaluation, config: Config, weights: Path | None) -> dict[str, Any]:
    """Everything that the samples of a question depend on, by name: samples of two settings must not be mixed."""
    asked_for = {"set": asked.set, "samples": asked.samples, "temperature": asked.temperature}
    return asked_for | provenance(config, weights, asked.step)


def _kept(file: Path, items: Sequence[Item], setting: Mapping[str, Any]) -> dict[str, list[Sample]]:
    """The samples of every question that an earlier start of the same command answered; none for the other questions.

    The file is written again with only these questions, so that what is appended is not mixed with the samples of a
    question that was interrupted. Raises ConfigError if the file holds samples of another setting or of other questions.
    """
    try:
        head, *records = read_resumable(file) or [setting]
        others = changes(head, setting)
        of_id: dict[str, list[dict[str, Any]]] = {}
        for record in () if others else records:
            of_id.setdefault(record["id"], []).append(record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file}: it is not a file of samples ({error}); give another --out") from error
    if others:
        raise ConfigError(f"{file} holds samples of another setting: {others}; give another --out")
    whole = {id: found for id, found in of_id.items() if len(found) == setting["samples"]}
    samples: dict[str, list[Sample]] = {}
    for item in items:
        found = whole.get(item.id, [])
        if any(record["question"] != item.question for record in found):
            raise ConfigError(f"{file} holds samples of another question with the id {item.id!r}; give another --out")
        own = ("id", "question", "prediction")
        samples[item.id] = [
            Sample.of_line(record["prediction"], {key: value for key, value in record.items() if key not in own})
            for record in found
        ]
    lines = [head, *(record for found in whole.values() for record in found)]
    write_atomically(file, "".join(json.dumps(line) + "\n" for line in lines))
    return samples
