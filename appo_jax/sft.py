"""The cold start: supervised fine-tuning on tool-use traces, with tool results masked (paper, appendix)."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import numpy as np

from appo_jax import distributed, failures, heartbeat
from appo_jax.algorithms import make_algorithm
from appo_jax.checkpoint import Checkpointer
from appo_jax.checkpoint_read import require_meta, sha256
from appo_jax.components import Components, build, initial_params, require_vocabulary
from appo_jax.config import Config
from appo_jax.config.effects import Affects
from appo_jax.config_io import changed_effects, config_json, load_config
from appo_jax.data.demonstrations import LeftOut, demonstrations
from appo_jax.data.pipeline import TraceBatch, encode_traces, trace_batches
from appo_jax.data.source import for_evaluation
from appo_jax.data.trace_files import read_traces, without_overlaps
from appo_jax.errors import CheckpointError, ConfigError
from appo_jax.evaluate import evaluate
from appo_jax.interrupt import Stop, stop_requests
from appo_jax.learner.batch import cut
from appo_jax.learner.loss import Terms
from appo_jax.learner.optimizer import sft_optimizer
from appo_jax.learner.step import StepSpec, TrainBatch, init_state, make_train_step, require_finite
from appo_jax.metrics import MetricsLogger
from appo_jax.policy.parameters import Params, abstract_params
from appo_jax.policy.score import Rows
from appo_jax.policy.sharding import annotate, batch_shardings, param_shardings, place
from appo_jax.rollout.tool_results import ToolResults
from appo_jax.run_dir import RunDir, open_run
from appo_jax.storage import numbered_folders, to_json, write_atomically
from appo_jax.text.tokenizer import vocabulary
from appo_jax.types import Example, Segment, Trace
from appo_jax.view.progress import Progress

log = logging.getLogger(__name__)


# The policy that RL begins with, and its accuracy_base and accuracy_sft. They are equal if there was no cold start. For a policy
# from another run whose accuracies were measured differently, there is only accuracy_sft.
ColdStart = tuple[Params, dict[str, float]]
# At most this many traces are made per row of the cold start's batches, because each trace costs tool calls.
TRACES_PER_ROW = 8
# Demonstrations are sent to the other hosts in messages of this many, so that these make progress too.
TRACES_PER_MESSAGE = 64
OnStep = Callable[[int, dict[str, Any]], None]  # (steps done, metrics)


def cold_start(components: Components, run: RunDir, on_step: OnStep, stop: Stop) -> ColdStart:
    """The cold-started policy of a run: restored, taken from the run `init_from`, or trained now.

    Training is resumed from its checkpoints under checkpoints/sft. `on_step` is called after every step. If `stop` is requested,
    the step is saved and KeyboardInterrupt is raised. A run that has RL checkpoints does not need the cold start, unless its loss
    has a KL term or it trains adapters. If the cold start's checkpoint is then broken or missing, such a run goes on with
    initial parameters and no accuracies, because both are restored from the RL checkpoint.
    """
    config = components.config
    has_rl = bool(numbered_folders(run.checkpoints / "rl"))
    if not has_rl or config.policy.lora is not None or make_algorithm(config).keeps_reference:
        return _cold_start(components, run, on_step, stop)
    try:
        finished = _finished(components, run)
    except CheckpointError as error:
        log.warning("%s\nThe run's RL checkpoints do not need it: going on from them", error)
        finished = None
    return finished or (initial_params(config, components.arch, components.mesh), {})


def _cold_start(components: Components, run: RunDir, on_step: OnStep, stop: Stop) -> ColdStart:
    return _finished(components, run) or _train(components, run, on_step, stop)


def _finished(components: Components, run: RunDir) -> ColdStart | None:
    """The run's finished cold start, or that of `init_from`; None if there is neither."""
    config = components.config
    restored = _restore(run.checkpoints / "sft", components)
    if restored is not None and restored[2]["finished"]:
        MetricsLogger(run.path, "sft").resume(restored[0])  # it names records that are lost
        return restored[1], _accuracies(restored[1], restored[2]["accuracy_base"], components, run)
    if config.init_from is not None:
        return _take_over(Path(config.init_from), components)
    return None


def run(config: Config) -> dict[str, float]:
    """The `sft` command: measures the accuracy, runs the cold start, measures again. Returns and logs both accuracies."""
    with (
        open_run(config) as run_dir,
        build(config) as components,
        Progress(config) as progress,
        stop_requests() as stop,
    ):
        return cold_start(components, run_dir, progress.sft_step, stop)[1]


def to_train_batch(batch: TraceBatch, at_once: int) -> TrainBatch:
    """Demonstrations as a train batch: the loss is the mean negative log-likelihood of the sampled tokens.

    `at_once`: rows of a micro-batch; 0: all.
    """
    index = np.arange(batch.tokens.shape[1])
    # A segment ends where the next begins. Padding (segment 0) comes last in a row and counts as one more segment.
    last = np.diff(batch.segments, append=-1) != 0
    ends = np.minimum.accumulate(np.where(last, index + 1, len(index))[:, ::-1], axis=1)[:, ::-1]

    def following(x: np.ndarray) -> np.ndarray:  # a slot holds the values of the token after it
        return np.where(last, 0, np.roll(x, -1, axis=1))

    rows = Rows(batch.tokens, following(batch.tokens), batch.positions, ends.astype(np.int32))
    weights = following(batch.loss_mask) / max(1, int(batch.loss_mask.sum()))
    ones = np.ones_like(weights, np.float32)
    at_once = at_once or len(batch.tokens)
    parts = len(batch.tokens) // at_once
    terms = Terms(weights.astype(np.float32)[None], ones[None], ones[None])
    return TrainBatch(cut(rows, at_once, parts), cut(terms, at_once, parts), np.int32(parts))


def _trace_batches(components: Components, run: RunDir) -> grain.DatasetIterator[TraceBatch]:
    """The batches of the cold start. Tool results are written as in a rollout. Writes traces.json: what was left out, and why."""
    config, left_out = components.config, LeftOut()
    call_format = components.executor.call_format
    if config.sft.traces:
        files = [Path(file) for file in config.sft.traces]
        traces = read_traces(files, call_format, config.data.system_prompt, left_out)
        if "overlaps" in config.data.drop:
            traces = without_overlaps(traces, for_evaluation(components.dataset, config.data), left_out)
        log.info(
            "%d traces read, %d left out%s", len(traces), left_out.total, f" ({left_out})" if left_out.total else ""
        )
    else:  # demonstrations with the real results of the tools
        limit = config.sft.steps * config.sft.batch_size * TRACES_PER_ROW
        traces = shared_demonstrations(components, limit, left_out)
    results = ToolResults(components.tokenizer, call_format, config.rollout.max_result_tokens)
    encoded = encode_traces(traces, components.tokenizer, config, results.encode_rendered, left_out)
    batches = trace_batches(
        encoded, config.sft.batch_size, config.sft.max_tokens, components.tokenizer.pad_id, config.seed
    )
    if distributed.host() == 0:
        record = {"read": len(traces), "left_out": left_out.to_json()}
        write_atomically(run.path / "traces.json", to_json(record, indent=2))
    return batches


@heartbeat.phase("demonstrations")  # its own, because waits of this phase say nothing about those of training
def shared_demonstrations(components: Components, limit: int, left_out: LeftOut) -> list[Trace]:
    """Demonstrations, the same on all hosts: the first host makes them and sends them to the others, because a call of a tool
    may end differently on each host. Only the first host counts in `left_out`."""
    first = distributed.host() == 0
    made = demonstrations(components.dataset, components.executor, limit, left_out) if first else iter(())
    traces: list[Trace] = []
    while part := distributed.exchange([_to_json(trace) for trace in itertools.islice(made, TRACES_PER_MESSAGE)])[0]:
        traces += map(_from_json, part)
    return traces


def _to_json(trace: Trace) -> dict[str, Any]:
    """What the cold start reads of a trace. `Example.extra` may hold what JSON cannot."""
    return dataclasses.asdict(dataclasses.replace(trace, example=dataclasses.replace(trace.example, extra={})))


def _from_json(record: dict[str, Any]) -> Trace:
    example = record["example"]
    segments = (Segment(**segment) for segment in record["segments"])
    return Trace(Example(**example | {"golds": tuple(example["golds"])}), tuple(segments))


@heartbeat.phase("cold start")
def _train(components: Components, run: RunDir, on_step: OnStep, stop: Stop) -> ColdStart:
    config = components.config
    params = initial_params(config, components.arch, components.mesh)
    base = evaluate(params, components).accuracy
    log.info("held-out accuracy before the cold start: %.3f", base)
    if config.sft.steps == 0:
        if config.sft.traces:
            log.warning("sft.traces is given, but sft.steps = 0: there is no cold start, and the traces are not used")
        return params, {"accuracy_base": base, "accuracy_sft": base}
    optimizer = sft_optimizer(config.sft, config.optimizer)
    state = init_state(params, optimizer, components.arch, components.mesh)
    del params
    batches = _trace_batches(components, run)
    checkpointer = Checkpointer(run.checkpoints / "sft", keep=1)
    metrics = MetricsLogger(run.path, "sft")
    try:
        step = 0
        if (restored := checkpointer.restore_latest(state, batches)) is not None:
            step, state, meta = restored
            require_vocabulary(meta, components.tokenizer, run.checkpoints / "sft")
            base = meta["accuracy_base"]
        heartbeat.at_update(step, on_disk=True)
        metrics.resume(step)
        token_ids = vocabulary(components.tokenizer)
        spec = StepSpec.of_cold_start(config, components.arch, components.dtype)
        train_step = make_train_step(optimizer, spec)
        while step < config.sft.steps:
            began = time.perf_counter()
            batch = to_train_batch(next(batches), config.sft.micro_batch)
            batch = place(batch, batch_shardings(batch, components.mesh), components.mesh)
            state, results = train_step(state, batch)
            step += 1
            heartbeat.at_update(step)
            record = {f"sft/{k}": float(v) for k, v in results.items()} | {"sft/seconds": time.perf_counter() - began}
            require_finite(record, "sft", step, "sft.learning_rate")
            metrics.log(step, record)
            on_step(step, record)
            stopping, finished = stop.agreed(), step == config.sft.steps
            if step % config.sft.checkpoint_every == 0 or stopping or finished:
                known = {
                    "accuracy_base": base,
                    "finished": finished,
                    "tokenizer": token_ids,
                    "config": config_json(config, run.config).decode(),
                }
                checkpointer.save(step, state, known, batches)
            if stopping:
                checkpointer.wait()  # while an error is raised, several hosts read no checkpoint back
                raise KeyboardInterrupt
        checkpointer.wait()
        heartbeat.stoppable(False)  # the last step is on disk; the next start measures its accuracy
        accuracies = _accuracies(state.params, base, components, run)
    except Exception as error:
        failures.report(error)
        raise
    finally:
        checkpointer.close()
        metrics.close()
    return state.params, accuracies


def _accuracies(params: Params, base: float, components: Components, run: RunDir) -> dict[str, float]:
    """Both accuracies of a finished cold start. They are measured once and then read from sft.json."""
    if (known := _measured(run.path)) is not None:
        return known
    accuracies = {"accuracy_base": base, "accuracy_sft": evaluate(params, components).accuracy}
    log.info("held-out accuracy after the cold start: %.3f", accuracies["accuracy_sft"])
    if distributed.host() == 0:
        record = {"record": accuracies, "sha256": sha256(accuracies)}
        write_atomically(run.path / "sft.json", to_json(record, indent=2))
    return accuracies


def _measured(folder: Path) -> dict[str, float] | None:
    """The accuracies in sft.json of a run, as the first host reads them; None if there are none, or if they are damaged."""

    def read() -> dict[str, float] | None:
        file = folder / "sft.json"
        if not file.exists():
            return None
        try:
            content = json.loads(file.read_text())
            if sha256(content["record"]) != content["sha256"]:
                raise ValueError("it is not what was written")
            return content["record"]
        except (ValueError, LookupError, TypeError) as error:
            log.warning("%s: is damaged (%s): the accuracy after the cold start is measured again", file, error)
            return None

    return distributed.exchange(read() if distributed.host() == 0 else None)[0]


def _restore(folder: Path, components: Components) -> tuple[int, Params, dict[str, Any]] | None:
    """(step, parameters, meta) of the newest cold-start checkpoint in a folder, or None. The optimizer's state is not read."""
    if not folder.exists():
        return None
    arch, mesh = components.arch, components.mesh
    abstract = annotate(abstract_params(arch), param_shardings(arch, mesh, "train"), mesh)
    checkpointer = Checkpointer(folder, keep=1, read_only=True)
    try:
        found = checkpointer.restore_latest({"params": abstract}, None, partial=True)
    finally:
        checkpointer.close()
    if found is None:
        return None
    require_meta(found[2], ("accuracy_base", "finished"), folder)
    require_vocabulary(found[2], components.tokenizer, folder)
    return found[0], found[1]["params"], found[2]


def _take_over(other: Path, components: Components) -> ColdStart:
    """The finished cold start of another run, with its accuracies if they were measured as this run measures its own.

    Otherwise the policy's accuracy is measured again on this run's questions, and accuracy_base is left out.
    """
    config = components.config
    found = _restore(other / "checkpoints" / "sft", components)
    if found is None or not found[2]["finished"]:
        raise CheckpointError(
            f"init_from = {str(other)!r}: no finished cold start there (expected a checkpoint under "
            f"{other / 'checkpoints' / 'sft'}); run `appo-jax sft` with --run-dir {other} first"
        )
    params, accuracies = found[1], _measured(other)
    if accuracies is None or not _measures_alike(other, config):
        accuracies = {"accuracy_sft": evaluate(params, components).accuracy}
        log.info("held-out accuracy of the policy of init_from: %.3f", accuracies["accuracy_sft"])
    return params, accuracies


def _measures_alike(other: Path, config: Config) -> bool:
    """Whether another run measures held-out accuracy as `config` does: same questions, tools, lengths, reward and policy."""
    try:
        effects = changed_effects(load_config(other / "config.json"), config)
    except ConfigError:  # the config of an older program, which cannot be compared
        return False
    return not any(effect & Affects.ACCURACY for effect in effects.values())
