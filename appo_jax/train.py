"""The training loop: cold start, then APPO (or a baseline) step by step, then the result."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp

from appo_jax import distributed, failures, heartbeat
from appo_jax.algorithms import make_algorithm
from appo_jax.checkpoint import Checkpointer
from appo_jax.checkpoint_read import require_meta
from appo_jax.components import Components, build, require_vocabulary
from appo_jax.config import Config
from appo_jax.config_io import check, config_json
from appo_jax.data.pipeline import prompt_batches
from appo_jax.errors import CheckpointError
from appo_jax.evaluate import Sets, evaluate, evaluate_sets, load_sets
from appo_jax.interrupt import Stop, stop_requests
from appo_jax.learner.optimizer import rl_optimizer
from appo_jax.learner.step import StepSpec, TrainState, init_state, make_train_step, require_finite
from appo_jax.metrics import MetricsLogger
from appo_jax.policy.adapters import abstract_adapters, frozen, init_adapters
from appo_jax.policy.parameters import Params
from appo_jax.policy.sharding import param_shardings
from appo_jax.rollout.growth import TreeGrower
from appo_jax.run_dir import RunDir, open_run
from appo_jax.sft import cold_start
from appo_jax.storage import plain
from appo_jax.timing import Clock
from appo_jax.tools.outage import OutageWatch, Stopping, ToolsDown
from appo_jax.train_step import Trainer, train_step
from appo_jax.view.plots import try_to_draw_plots
from appo_jax.view.progress import Progress

log = logging.getLogger(__name__)


def train(config: Config) -> None:
    """Run `config` to its end, or continue the run in `config.run_dir`.

    Raises ConfigError for a config that breaks a bound or a rule, KeyboardInterrupt if the run was asked to stop (after
    saving), and TrainingError for a loss that is not finite.
    """
    config = check(config, trains=True)
    with open_run(config) as run, Progress(config) as progress, build(config) as components, stop_requests() as stop:
        _train(config, run, components, progress, stop)


def _train(config: Config, run: RunDir, components: Components, progress: Progress, stop: Stop) -> None:
    clock, sets = Clock(), load_sets(components)
    params, accuracies = cold_start(components, run, progress.sft_step, stop)
    trainer, state = begin(components, params)
    del params
    prompts = prompt_batches(components.train, config.prompts_per_step, config.seed, weights=components.dataset.weights)
    checkpointer = Checkpointer(run.checkpoints / "rl", config.keep_checkpoints, config.keep_best_checkpoints)
    metrics = MetricsLogger(run.path, keep_rollouts=config.keep_rollouts)
    outages = OutageWatch(config.tools, stop.agreed)
    try:
        reached, last = Reached(), None
        if (restored := restore(checkpointer, trainer, state, prompts, run.checkpoints)) is not None:
            step, state, meta = restored
            reached, clock.before = Reached(step, meta["sampled_tokens"]), meta["wall_s"]
            last, accuracies = meta["record"], meta["accuracies"]
            log.info("going on from step %d", step)
        heartbeat.at_step(reached.step, on_disk=True)
        progress.accuracies(accuracies)
        metrics.resume(reached.step, last, run.max_unsaved)
        run.keep(config)

        stopping, down, evaluated = stop.agreed(), None, dict[str, float]()
        while not (reached.end(config) or stopping or down):
            state, record, trees = train_step(trainer, reached.step, state, next(prompts), prompts)
            reached = reached.after(record)
            heartbeat.at_step(reached.step)
            checkpointer.wait()  # until the checkpoint of the previous step is on disk and has been read back
            outages.see(reached.step, record)
            require_finite(record, "update", reached.step, "optimizer.learning_rate")
            evaluated = {}
            if config.eval.every and reached.step % config.eval.every == 0:
                folder = run.evaluations(reached.step)
                down = _evaluate_into(evaluated, trainer.policy(state), components, sets, folder, stop.agreed)
            record |= evaluated | {"rollout/sampled_tokens_total": reached.sampled_tokens} | clock.metrics()
            metrics.dump_trees(reached.step, trees, components.tokenizer.decode)
            del trees  # otherwise they would live through the next step
            metrics.log(reached.step, record)
            progress.step(reached.step, record)
            stopping = stop.agreed()
            if reached.step % config.checkpoint_every == 0 or reached.end(config) or stopping or down:
                meta = _meta(config, run, reached, record, accuracies) | trainer.origin
                checkpointer.save(reached.step, state, meta, prompts, record.get("eval/accuracy"))
        checkpointer.wait()
        if down or not reached.end(config):
            log.warning("stopped after step %d, which is saved; the same command goes on from there", reached.step)
            raise down if down and not stopping else KeyboardInterrupt
        heartbeat.stoppable(False)  # the last step is on disk
        final = evaluated or _evaluated(trainer.policy(state), components, sets, run.evaluations(reached.step))
        summary = _summary(accuracies, final, config, reached) | {"wall_s": clock.wall_s()}
        metrics.write_summary(summary)
        if distributed.host() == 0:
            try_to_draw_plots(run.path)
        progress.done(summary)
    except Exception as error:
        failures.report(error)  # here already, because the clean-up below may wait for other hosts
        raise
    finally:
        checkpointer.close()
        metrics.close()


def _evaluated(
    params: Params, components: Components, sets: Sets, reports: Path, stopping: Stopping | None = None
) -> dict[str, float]:
    """The metrics of the held-out questions and of `eval.sets`."""
    held_out = evaluate(params, components, stopping).metrics
    return held_out | evaluate_sets(params, components, sets, reports, stopping)


def _evaluate_into(
    record: dict[str, Any], params: Params, components: Components, sets: Sets, reports: Path, stopping: Stopping
) -> ToolsDown | None:
    """Add `_evaluated` to the record of a step. Returns the error if a tool is down, because the step must be saved first."""
    try:
        record |= _evaluated(params, components, sets, reports, stopping)
    except ToolsDown as error:
        return error
    return None


def _meta(
    config: Config, run: RunDir, reached: Reached, record: Mapping[str, Any], accuracies: Mapping[str, float]
) -> dict[str, Any]:
    """What a checkpoint holds of a run besides its state and the `Trainer.origin`."""
    return {
        "sampled_tokens": reached.sampled_tokens, "wall_s": record["time/wall_s"], "accuracies": dict(accuracies),
        "record": plain(record), "config": config_json(config, run.config).decode(),
    }  # fmt: skip


def _summary(
    accuracies: Mapping[str, float], final: Mapping[str, float], config: Config, reached: Reached
) -> dict[str, Any]:
    """summary.json: accuracies before and after, questions without a reward in the last, and the final figures of `eval.sets`."""
    return {
        **accuracies, "accuracy_final": final["eval/accuracy"], "failed_final": final["eval/failed"], "steps": reached.step,
        "sampled_tokens": reached.sampled_tokens, "seed": config.seed, "algorithm": config.algorithm,
        **{name: value for name, value in final.items() if name.count("/") == 2},
    }  # fmt: skip


def restore(
    checkpointer: Checkpointer, trainer: Trainer, state: TrainState, prompts: grain.DatasetIterator, checkpoints: Path
) -> tuple[int, TrainState, dict[str, Any]] | None:
    """The newest RL checkpoint of a run, as `Checkpointer.restore_latest` gives it; `trainer` and `state` are those of `begin`.

    Raises CheckpointError if the run began with other weights, or was trained with another tokenizer."""
    restored = checkpointer.restore_latest(state, prompts)
    if restored is not None:
        require_vocabulary(restored[2], trainer.components.tokenizer, checkpoints / "rl")
        _require_same_origin(restored[2], trainer.origin, checkpoints)
    return restored


def _require_same_origin(saved: Mapping[str, Any], now: Mapping[str, str], checkpoints: Path) -> None:
    """Compares what a checkpoint and this start begin with (`Trainer.origin`). Raises CheckpointError for other frozen weights or
    another π_ref, and for checkpoints of another version of the program; warns of another precision."""
    require_meta(saved, ("sampled_tokens", "wall_s", "record", "accuracies", *now), checkpoints / "rl")
    what = {"base": "its adapters were trained with other frozen weights", "reference": "its KL is from another π_ref"}
    for name, problem in what.items():
        if saved[name] != now[name]:
            raise CheckpointError(
                f"{checkpoints / 'rl'}: {problem} ({saved[name]}) than this run has now ({now[name]}): policy.path, init_from or "
                f"{checkpoints / 'sft'} has changed since; put the old weights back"
            )
    if saved["dtype"] != now["dtype"]:
        log.warning(
            "the run was computed in %s and goes on in %s, because policy.compute_dtype = 'auto' follows the machine; continue it "
            "on a machine of the first kind to keep the precision",
            saved["dtype"],
            now["dtype"],
        )


@dataclasses.dataclass(frozen=True)
class Reached:
    """The progress of a run."""

    step: int = 0
    sampled_tokens: int = 0

    def after(self, record: Mapping[str, Any]) -> Reached:
        """The progress after one more step, whose metrics are `record`."""
        return Reached(self.step + 1, self.sampled_tokens + int(record["rollout/sampled_tokens"]))

    def end(self, config: Config) -> bool:
        """Whether the run has done its steps or used its budget of tokens."""
        return self.step >= config.steps or 0 < config.max_sampled_tokens <= self.sampled_tokens


def begin(components: Components, params: Params) -> tuple[Trainer, TrainState]:
    """The trainer and the state for the first step. Consumes `params`."""
    config, algorithm, base = components.config, make_algorithm(components.config), None
    if config.policy.lora is not None:
        base = frozen(params, components.arch)
        shardings = param_shardings(components.arch, components.mesh, "train", abstract_adapters(components.arch))
        params = init_adapters(components.arch, config.seed, shardings if components.mesh.size > 1 else None)
    # π_ref is the policy that RL begins with. Every step donates the state, so a copy must be kept.
    reference = (base or jax.tree.map(jnp.copy, params)) if algorithm.keeps_reference else None
    optimizer = rl_optimizer(config.optimizer)
    state = init_state(params, optimizer, components.arch, components.mesh)
    spec = StepSpec.of_update(config, algorithm.loss, components.arch, components.dtype)
    grower = TreeGrower(
        components.sampler, components.tokenizer, algorithm.rollout, algorithm.branching, components.arch.vocab_size,
        config.seed,
    )  # fmt: skip
    update = functools.partial(make_train_step(optimizer, spec), base=base)
    return Trainer(components, algorithm, grower, update, reference, base), state
