"""The training loop: cold start, then APPO (or a baseline) step by step. It reads top to bottom.

One step (paper, algorithm 1): N rollouts per prompt from π_old; then, mini-batch by mini-batch, score them under the
current π_θ, branch where the Branching Score is highest, reward, turn rewards into procedural advantages, update.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from appo_jax import distributed, failures, heartbeat
from appo_jax.advantage.groups import without_spread
from appo_jax.advantage.procedural import uses_future
from appo_jax.algorithms import Algorithm, make_algorithm, make_batch
from appo_jax.checkpoint import Checkpointer
from appo_jax.components import Components, build, give_rewards
from appo_jax.config import Config, LossConfig
from appo_jax.config_io import check
from appo_jax.data.pipeline import prompt_batches
from appo_jax.evaluate import evaluate
from appo_jax.interrupt import Stop, stop_requests
from appo_jax.learner.loss import kl_estimate
from appo_jax.learner.optimizer import rl_optimizer
from appo_jax.learner.step import StepSpec, TrainBatch, TrainState, init_state, make_train_step, require_finite
from appo_jax.metrics import MetricsLogger
from appo_jax.policy.parameters import Params
from appo_jax.policy.sharding import batch_sharding, place
from appo_jax.rollout.growth import Growth, TreeGrower
from appo_jax.rollout.sampler import Sampler
from appo_jax.rollout.scoring import future_values, inherit, log_probs
from appo_jax.rollout.stats import rollout_metrics, update_metrics
from appo_jax.run_dir import RunDir, open_run
from appo_jax.sft import cold_start
from appo_jax.storage import plain
from appo_jax.tools.outage import OutageWatch
from appo_jax.types import Example, Rollout, Tree
from appo_jax.view.plots import try_to_draw_plots
from appo_jax.view.progress import Progress

log = logging.getLogger(__name__)

# First number of every draw_id: what the draws are for. (Evaluation is greedy; its number is 2.)
INITIAL, BRANCH, RESAMPLE = 0, 1, 3

Update = Callable[[TrainState, TrainBatch], tuple[TrainState, dict[str, jax.Array]]]


def train(config: Config) -> None:
    """Run `config` to its end, or go on with the run that `config.run_dir` holds.

    Raises ConfigError for a config that breaks a bound or a rule, KeyboardInterrupt when it was asked to stop (and has
    saved), TrainingError on a loss that is not finite.
    """
    config = check(config)
    with open_run(config) as run, build(config) as components, Progress(config) as progress, stop_requests() as stop:
        _train(config, run, components, progress, stop)


def _train(config: Config, run: RunDir, components: Components, progress: Progress, stop: Stop) -> None:
    began = time.perf_counter()

    compilations = Compilations()

    # ---- policy
    params, accuracies = cold_start(components, run, progress.sft_step, stop)

    # ---- learner
    algorithm = make_algorithm(config)
    optimizer = rl_optimizer(config.optimizer)
    state = init_state(params, optimizer, components.arch, components.mesh)
    # The KL term's reference is the policy that RL begins with. The state is donated: a copy must be kept.
    reference = jax.tree.map(jnp.copy, params) if algorithm.loss.kl_weight > 0 else None
    del params
    spec = StepSpec(
        components.arch,
        algorithm.loss,
        config.rollout.temperature,
        config.optimizer.micro_batch,
        components.dtype,
        config.optimizer.remat,
    )
    update = make_train_step(optimizer, spec)
    grower = TreeGrower(
        components.sampler,
        components.tokenizer,
        config.rollout,
        algorithm.branching,
        components.arch.vocab_size,
        config.seed,
    )
    prompts = prompt_batches(components.train, config.prompts_per_step, config.seed, weights=components.dataset.weights)

    # ---- where the run left off
    checkpointer = Checkpointer(run.checkpoints / "rl", config.keep_checkpoints)
    metrics = MetricsLogger(run.path, keep_rollouts=config.keep_rollouts)
    step, sampled_tokens, wall_before, last = 0, 0, 0.0, None
    if (restored := checkpointer.restore_latest(state, prompts)) is not None:
        step, state, meta = restored
        sampled_tokens, wall_before, last = meta["sampled_tokens"], meta["wall_s"], meta["record"]
        accuracies = meta["accuracies"]
        log.info("going on from step %d", step)
    progress.accuracies(accuracies)
    metrics.resume(step, last, config.checkpoint_every)

    def over() -> bool:
        return step >= config.steps or 0 < config.max_sampled_tokens <= sampled_tokens

    outages = OutageWatch(config.tools)

    # ---- the loop
    try:
        stopping = stop.agreed()
        while not over() and not stopping:
            state, record, trees = train_step(
                step, next(prompts), state, reference, update, algorithm, grower, components, prompts
            )
            step += 1
            heartbeat.at_step(step)
            checkpointer.wait()  # what the step before this one saved is on disk, and reads back
            outages.see(step, record)
            require_finite(record, "update", step, "optimizer.learning_rate")
            sampled_tokens += int(record["rollout/sampled_tokens"])
            if config.eval.every and step % config.eval.every == 0 and not over():
                record |= evaluate(state.params, components).metrics
            wall_s = wall_before + time.perf_counter() - began
            record |= {
                "rollout/sampled_tokens_total": sampled_tokens, "time/wall_s": wall_s,
                "time/compiled_programs": compilations.take(),
            }  # fmt: skip
            metrics.dump_trees(step, trees, components.tokenizer.decode)
            metrics.log(step, record)
            progress.step(step, record)
            stopping = stop.agreed()
            if step % config.checkpoint_every == 0 or over() or stopping:
                meta = {
                    "sampled_tokens": sampled_tokens,
                    "wall_s": wall_s,
                    "record": plain(record),
                    "accuracies": accuracies,
                }
                checkpointer.save(step, state, meta, prompts)
        if not over():
            log.warning("stopped after step %d, which is saved; the same command goes on from there", step)
            raise KeyboardInterrupt

        # ---- the result
        heartbeat.stoppable(False)  # the last step is saved
        final = evaluate(state.params, components)
        summary = accuracies | {
            "accuracy_final": final.accuracy, "steps": step, "sampled_tokens": sampled_tokens,
            "wall_s": wall_before + time.perf_counter() - began, "seed": config.seed, "algorithm": config.algorithm,
        }  # fmt: skip
        checkpointer.wait()  # who finds a summary finds the policy it speaks of
        metrics.write_summary(summary)
        if distributed.host() == 0:
            try_to_draw_plots(run.path)
        progress.done(summary)
    except Exception as error:
        failures.report(error)  # before it unwinds: on the way out it may wait for other hosts
        raise
    finally:
        checkpointer.close()
        metrics.close()


def train_step(
    step: int, examples: Sequence[Example], state: TrainState, reference: Params | None, update: Update,
    algorithm: Algorithm, grower: TreeGrower, components: Components, more: Iterator[Sequence[Example]] | None = None,
) -> tuple[TrainState, dict[str, Any], list[Tree]]:  # fmt: skip
    """One step on `examples`: rollouts from π_old = the policy now, and an update per mini-batch. Consumes `state`.

    `reference`: parameters of π_ref, for a KL term. `more`: batches of prompts that dynamic sampling may draw on.
    """
    config, sampler, timer = components.config, components.sampler, Timer()
    length = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens

    def draw(examples: Sequence[Example], phase: int) -> list[Tree]:
        with timer("rollout"):
            trees = sampler.initial(
                state.params, examples, algorithm.initial, (phase, step), max_examples=config.prompts_per_step
            )
        with timer("reward"):
            give_rewards([rollout for tree in trees for rollout in tree], components, algorithm.overlong_buffer)
        return trees

    trees = draw(examples, INITIAL)
    resampled = 0
    for attempt in range(algorithm.max_resamples):  # dynamic sampling: prompts without spread make room for others
        flat = [i for i, tree in enumerate(trees) if without_spread(np.array([r.reward for r in tree]))]
        others = next(more, ()) if flat and more is not None else ()
        drawn = draw(others[: len(flat)], RESAMPLE + attempt) if others else []
        for i, tree in zip(flat, drawn, strict=False):
            trees[i] = tree
        resampled += len(drawn)
    size = config.prompts_per_minibatch
    minibatches = [trees[i : i + size] for i in range(0, len(trees), size)]
    with timer("score"):
        # log π_old is computed here once, by the program that will compute log π_θ: their difference is the policy's
        # movement alone, without the noise between two ways of computing the same number.
        old = [log_probs(sampler, state.params, minibatch) for minibatch in minibatches]

    def grow(i: int) -> Growth:
        with timer("branch"):
            growth = grower.grow(state.params, minibatches[i], old[i], (BRANCH, step, i))
        with timer("reward"):
            branches = [r for tree in growth.trees for r in tree if not r.is_initial]
            give_rewards(branches, components, algorithm.overlong_buffer)
        return growth

    growths: list[Growth] = []
    if algorithm.branches and algorithm.branching.refresh == "step":  # every tree under the policy of the step's start
        growths = [grow(i) for i in range(len(minibatches))]
    if algorithm.train_branches:
        with timer("score"):
            old = [log_probs(sampler, state.params, growth.trees) for growth in growths]
    updates: list[dict[str, Any]] = []
    grown: list[Tree] = []
    for i, minibatch in enumerate(minibatches):
        growth = growths[i] if growths else grow(i) if algorithm.branches else None
        if growth is not None:
            minibatch = growth.trees
        grown += minibatch
        trained = [list(algorithm.trained(tree)) for tree in minibatch]
        future = ref = penalties = None
        with timer("score"):
            if uses_future(algorithm.advantage):
                if growth is not None and not growths:  # scored under the policy as it is now
                    future = [[s.future_value for s in scores] for scores in growth.scores]
                else:
                    future = future_values(sampler, state.params, trained, old[i], algorithm.branching.tau, length)
            if reference is not None and algorithm.loss.kl_in == "loss":
                ref = log_probs(sampler, reference, trained)
            elif reference is not None:
                penalties = _kl_penalties(sampler, state.params, reference, minibatch, old[i], algorithm.loss, length)
        with timer("update"):
            batch, base = make_batch(minibatch, old[i], ref, future, algorithm, config, length, penalties)
            batch = place(batch, batch_sharding(components.mesh), components.mesh)
            state, results = update(state, batch)
            updates.append(update_metrics(jax.device_get(results), base, growth, algorithm.initial))
    record = rollout_metrics(grown, sampler.take_stats()) | components.executor.metrics()
    if algorithm.max_resamples:
        record["rollout/resampled_prompts"] = resampled
    record |= {name: float(np.mean([u[name] for u in updates])) for name in updates[0]} | timer.metrics()
    record["time/tokens_per_s"] = record["rollout/sampled_tokens"] / record["time/step_s"]
    return state, record, grown


def _kl_penalties(
    sampler: Sampler, params: Params, reference: Params, trees: Sequence[Tree], old: Sequence[Sequence[np.ndarray]],
    loss: LossConfig, length: int,
) -> list[list[np.ndarray]]:  # fmt: skip
    """β·KL(π‖π_ref) at each sampled token `[T]` of every rollout, π being the policy that drew it.

    `old`: of each tree's first rollouts, their log-probs under π_old. The branches beyond them were drawn by `params`
    from their fork on; what they have from their parent was drawn as the parent was.
    """
    branches = log_probs(sampler, params, [tree[len(known) :] for tree, known in zip(trees, old, strict=True)])
    by_drawer = [list(known) for known in old]
    for tree, known, scored in zip(trees, by_drawer, branches, strict=True):
        for rollout, values in zip(tree[len(known) :], scored, strict=True):
            known.append(inherit(rollout, known, values))
    by_reference = log_probs(sampler, reference, trees)

    def penalty(rollout: Rollout, drawn: np.ndarray, ref: np.ndarray) -> np.ndarray:
        padding = (0, length - rollout.length)  # one shape, one program
        drawn, ref = (np.pad(x, padding) for x in (drawn, ref))
        kl = kl_estimate(jnp.asarray(drawn), jnp.asarray(ref), loss.kl_estimator)
        return np.where(rollout.sampled, loss.kl_weight * np.asarray(kl)[: rollout.length], 0.0)

    return [
        [penalty(*x) for x in zip(tree, drawn, refs, strict=True)]
        for tree, drawn, refs in zip(trees, by_drawer, by_reference, strict=True)
    ]


class Compilations:
    """Counts the programs that are compiled or taken from the compilation cache: none after a run's first steps, or a
    shape has changed that should not."""

    def __init__(self) -> None:
        self._count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        self._count += event == "/jax/core/compile/backend_compile_duration"

    def take(self) -> int:
        """The count since the last time it was taken."""
        count, self._count = self._count, 0
        return count


class Timer:
    """Seconds by phase. `with timer("rollout"): …`, as often as one likes."""

    def __init__(self) -> None:
        self._began, self._seconds = time.perf_counter(), dict[str, float]()

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        with heartbeat.phase(phase):
            yield
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - began

    def metrics(self) -> dict[str, float]:
        phases = {f"time/{phase}_s": seconds for phase, seconds in self._seconds.items()}
        return phases | {"time/step_s": time.perf_counter() - self._began}
