"""`appo-jax eval`: scores predictions on a benchmark set. They come from a file, or a policy with its tools draws them now."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from appo_jax.benchmark.predictions import Predictions, Sample, check_samples, read_predictions
from appo_jax.benchmark.report import score_all, summarize, write_report
from appo_jax.benchmark.sets import Item, benchmark, load_items
from appo_jax.components import build
from appo_jax.config import Config, JudgeConfig
from appo_jax.errors import ConfigError
from appo_jax.evaluate import Draws, draw_samples
from appo_jax.export import policy_params
from appo_jax.reward.language_judge import LanguageJudge

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


def evaluate_set(asked: Evaluation, config: Config | None = None, weights: Path | None = None) -> str:
    """Score a set and write its report. Returns the report's text.

    The predictions come from a file or are drawn now. In the second case, `config` gives policy, prompt and tools, and `weights`
    is the run whose newest checkpoint is used (None: the config's `policy.path`). Drawn samples are kept in the folder; the
    same command given again draws only the missing ones. Raises ConfigError and DataError.
    """
    items = load_items(asked.set, asked.data)[: asked.limit]
    if asked.predictions is not None:
        predictions = read_predictions(asked.predictions, items)
    elif config is not None:
        predictions = _draw(asked, items, config, weights)
    else:
        raise ConfigError("give --predictions FILE, --run RUN, or --config FILE: whose answers are to be scored?")
    judge = None
    if asked.judge is not None and benchmark(asked.set).scorer == "judge":
        judge = LanguageJudge(asked.judge, Path(asked.judge.cache or asked.out / "verdicts.sqlite"))
    try:
        scored = score_all(asked.set, items, predictions, judge)
    finally:
        if judge is not None:
            judge.close()
    record = summarize(asked.set, scored, predictions, ks=(1, 3, 5, 10))
    if judge is not None:
        record["judge"] = dataclasses.asdict(judge.counts) | {"model": judge.config.model}
    return write_report(asked.out, record, scored)


def _draw(asked: Evaluation, items: Sequence[Item], config: Config, weights: Path | None) -> Predictions:
    """Draw the samples that the folder does not hold yet. They are saved after every few rounds of rows."""
    if asked.samples > 1 and asked.temperature == 0:
        raise ConfigError("--samples above 1 needs --temperature above 0: greedy samples are all the same")
    file = asked.out / "generations.jsonl"
    asked.out.mkdir(parents=True, exist_ok=True)
    setting = {"set": asked.set, "samples": asked.samples, "temperature": asked.temperature, "run": str(weights)}
    samples = _kept(file, items, setting)
    left = [item for item in items if len(samples[item.id]) < asked.samples]
    if left:
        log.info("%d of %d questions are to be answered", len(left), len(items))
        with build(config) as components, file.open("a", encoding="utf-8") as out:
            params = policy_params(components, weights)
            size = max(1, ROUNDS_PER_SAVE * config.rollout.decode_rows // asked.samples)
            for first in range(0, len(left), size):
                some = left[first : first + size]
                draws = Draws(asked.samples, asked.temperature, min(size, len(left)))
                drawn = draw_samples(params, components, some, benchmark(asked.set).scorer, draws)
                for item, found in zip(some, drawn, strict=True):
                    samples[item.id] = found
                    for sample in found:
                        out.write(json.dumps({"id": item.id, "prediction": sample.text} | sample.rollout) + "\n")
                out.flush()
                log.info("%d of %d questions are answered", len(items) - len(left) + first + len(some), len(items))
    return check_samples(samples, [])


def _kept(file: Path, items: Sequence[Item], setting: dict[str, object]) -> dict[str, list[Sample]]:
    """The samples that an earlier start of the same command drew. Raises ConfigError if the settings were different."""
    samples: dict[str, list[Sample]] = {item.id: [] for item in items}
    head = json.dumps(setting)
    if not file.exists():
        file.write_text(head + "\n", encoding="utf-8")
        return samples
    lines = file.read_text(encoding="utf-8").splitlines()
    if not lines or lines[0] != head:
        raise ConfigError(
            f"{file} holds samples of another setting ({lines[0] if lines else 'none'}); give another --out"
        )
    for line in lines[1:]:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # an incomplete line, which a killed process left
        if record["id"] in samples:
            rest = {key: value for key, value in record.items() if key not in ("id", "prediction")}
            samples[record["id"]].append(Sample(record["prediction"], rest))
    return {id: found if len(found) == setting["samples"] else [] for id, found in samples.items()}
