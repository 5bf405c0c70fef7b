"""`appo-jax influence RUN`: measures whether the Branching Score finds influential positions (the paper's pilot study).

The run's newest policy, π_old, draws rollouts. The run's next training step, on other prompts, gives π_θ, so that Ω is as in
training after a step's updates. Then every score ranks the positions, and Monte Carlo measures the influence of some of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from grain import DatasetIterator
from matplotlib import rc_context
from matplotlib.figure import Figure

from appo_jax.algorithms import make_algorithm
from appo_jax.branching.rule import ByScore
from appo_jax.branching.rules import RULES
from appo_jax.checkpoint import Checkpointer
from appo_jax.components import Components, build, give_rewards
from appo_jax.config.bounds import require_at_least
from appo_jax.config_io import load_config
from appo_jax.data.pipeline import prompt_batches
from appo_jax.errors import CheckpointError
from appo_jax.export import policy_params, starting_params
from appo_jax.influence.allocation import Scatter, advantage_scatter
from appo_jax.influence.measure import Influence, measure
from appo_jax.influence.ranking import (
    Interval,
    Place,
    Ranked,
    chance,
    correlation,
    mean_over_questions,
    precision,
    share_after_tools,
    top_words,
)
from appo_jax.learner.step import TrainState
from appo_jax.output import cell
from appo_jax.policy.parameters import Params
from appo_jax.policy.sharding import param_shardings
from appo_jax.reward import require_rewards
from appo_jax.rollout.growth import blank_tokens, score_positions, valid_positions
from appo_jax.rollout.sampler import Branch, Purpose, ScorePass
from appo_jax.rollout.scoring import log_probs
from appo_jax.storage import numbered_folders, to_json
from appo_jax.train import begin, restore
from appo_jax.train_step import Trainer, train_step
from appo_jax.types import Example, Rollout, turn_starts
from appo_jax.view.plots import STYLE

RANDOM, TURN_START = "random", "turn start"
COUNTS = (1, 3, 5)  # numbers of best positions (B) at which precision is reported


@dataclasses.dataclass(frozen=True)
class Asked:
    """The size of the measurement: the options of `appo-jax influence`, and one more."""

    questions: int
    rollouts: int
    """Rollouts of each question."""
    positions: int
    """Random positions of each rollout. The first three positions by every score are measured, too."""
    continuations: int
    """K: the number of draws at each cut."""
    draws: int = 16
    """How often the branches of a prompt are drawn under each allocation, for Theorem 1."""

    def __post_init__(self) -> None:
        # One draw has no variance.
        least = {"questions": 1, "rollouts": 1, "positions": 0, "continuations": 2, "draws": 2}
        require_at_least({f"--{name}": (getattr(self, name), bound) for name, bound in least.items()})


def study_influence(run: Path, out: Path, asked: Asked) -> str:
    """Measure, write influence.md, influence.json and influence.png into `out`, and return the text of influence.md."""
    config = load_config(run / "config.json")
    out.mkdir(parents=True, exist_ok=True)
    # A folder that cannot be written is an error before the measurement, not after it.
    with tempfile.TemporaryFile(dir=out):
        pass
    with build(config) as components:
        where, step, trainer, state, prompts = _reached(components, run)
        others = next(prompts)
        examples = list(itertools.islice(itertools.chain.from_iterable(prompts), asked.questions))
        trees = components.sampler.initial(trainer.policy(state), examples, asked.rollouts, (Purpose.INFLUENCE, 0))
        rollouts = [rollout for tree in trees for rollout in tree]
        give_rewards(rollouts, components)
        require_rewards(rollouts)
        old = [values for tree in log_probs(components.sampler, trainer.policy(state), trees) for values in tree]
        state, record, _ = train_step(trainer, step, state, others, prompts)
        policy = trainer.policy(state)
        scored = components.sampler.score(policy, rollouts, to_branch=True)
        ranked = rank(components, scored, old)
        rng = np.random.default_rng(config.seed)
        random = {
            i: sorted(rng.choice(p, min(asked.positions, len(p)), replace=False).tolist())
            for i, r in enumerate(ranked)
            if len(p := np.flatnonzero(r.valid))
        }
        chosen = {
            i: sorted({*random[i], *(t for name in ranked[i].scores for t in ranked[i].top(name, 3))}) for i in random
        }
        measured = measure(
            components.sampler, policy, scored, chosen, asked.continuations, lambda some: give_rewards(some, components),
            (Purpose.INFLUENCE, 1),
        )  # fmt: skip
        scatter = _scatter(components, policy, scored, ranked, asked)
    figures = summarize(ranked, measured, random)
    figures |= {
        "policy": where, "rollouts": len(rollouts), "positions": len(measured), "continuations": asked.continuations,
        "positions_without_value": sum(map(len, chosen.values())) - len(measured),
        "future_std": float(np.std(np.concatenate([r.future_value[r.valid] for r in ranked]))),
        "scatter": scatter,
        "step": {name: value for name, value in record.items() if name.startswith(("branching/", "update/"))},
    }  # fmt: skip
    (out / "influence.json").write_text(to_json(json.loads(json.dumps(figures, default=dataclasses.asdict)), indent=2))
    text = to_markdown(figures)
    (out / "influence.md").write_text(text + "\n", encoding="utf-8")
    draw(figures, out / "influence.png")
    return text


class Reached(NamedTuple):
    """What the next training step of a run begins with."""

    policy: str  # a text that names it
    step: int  # the number of earlier steps
    trainer: Trainer
    state: TrainState
    prompts: DatasetIterator[list[Example]]


def _reached(components: Components, run: Path) -> Reached:
    """Where a run has arrived: its newest RL checkpoint, or its first step if it has none."""
    config, checkpoints = components.config, run / "checkpoints"
    trained = bool(numbered_folders(checkpoints / "rl"))
    where = ""
    if trained and (config.policy.lora is not None or make_algorithm(config).keeps_reference):
        # The frozen weights and π_ref are those with which RL began.
        params = jax.device_put(
            starting_params(run, config, components.tokenizer)[1],
            param_shardings(components.arch, components.mesh, "train"),
        )
    else:
        where, params = policy_params(components, run)
    trainer, state = begin(components, params)
    del params
    prompts = prompt_batches(components.train, config.prompts_per_step, config.seed, weights=components.dataset.weights)
    if not trained:
        return Reached(where, 0, trainer, state, prompts)
    checkpointer = Checkpointer(checkpoints / "rl", keep=1, read_only=True)
    try:
        restored = restore(checkpointer, trainer, state, prompts, checkpoints)
    finally:
        checkpointer.close()
    if restored is None:
        raise CheckpointError(f"{checkpoints / 'rl'}: its checkpoints were removed while they were read; try again")
    step, state, _ = restored
    return Reached(f"step {step} of {checkpoints / 'rl'}", step, trainer, state, prompts)


def _scatter(
    components: Components, params: Params, scored: ScorePass, ranked: Sequence[Ranked], asked: Asked
) -> Scatter:
    """Theorem 1: the scatter of A_base over branches that `params` draws again and again."""
    branching = make_algorithm(components.config).branching

    def draw_branches(branches: Sequence[Sequence[Branch]], number: int) -> Sequence[Sequence[Rollout]]:
        drawn = components.sampler.branches(params, scored, branches, (Purpose.INFLUENCE, 2 + number))
        give_rewards([rollout for of_rollout in drawn for rollout in of_rollout], components)
        return drawn

    budget = asked.rollouts * (branching.num_branch_points + 1)
    return advantage_scatter(scored.rollouts, ranked, branching, asked.rollouts, budget, asked.draws, draw_branches)


def rank(components: Components, scored: ScorePass, old: Sequence[np.ndarray]) -> list[Ranked]:
    """The scores of every rollout's positions under the policy that scored them. `old`: log-probs `[T]` under the policy that
    drew the rollouts."""
    config, tokenizer, rollouts = components.config, components.tokenizer, scored.rollouts
    branching = make_algorithm(config).branching
    shape = len(rollouts), max(rollout.length for rollout in rollouts)
    blank = blank_tokens(tokenizer)
    replaced: Any = dataclasses.replace  # the registry's names are the field's choices
    valid = [valid_positions(r, blank, branching, tokenizer.eos_ids) for r in rollouts]
    results = {
        name: score_positions(scored, scored.log_probs, old, valid, replaced(branching, score=name), shape)
        for name, rule in RULES.items()
        if isinstance(rule, ByScore)
    }
    rng = np.random.default_rng(config.seed)
    pieces = tokenizer.token_bytes()
    out = []
    for i, r in enumerate(rollouts):
        t = r.length
        after_tool = np.zeros(t, bool)
        after_tool[turn_starts(r.sampled)[1:]] = True
        scores = {name: nodes[i].score for name, nodes in results.items()}
        preferred = {name: nodes[i].preferred for name, nodes in results.items()}
        scores |= {RANDOM: rng.random(t), TURN_START: after_tool + 1e-3 * rng.random(t)}
        preferred |= {RANDOM: valid[i], TURN_START: valid[i]}
        words = [pieces[token] if token < len(pieces) else b"" for token in r.tokens]
        known = components.dataset.decisions
        out.append(
            Ranked(
                r.example.question, scores, preferred, results["future"][i].future_value, valid[i], r.sampled,
                None if known is None else decision_tokens(r, words, known),
                after_tool, [word.decode(errors="replace") for word in words],
            )
        )  # fmt: skip
    return out


def decision_tokens(rollout: Rollout, words: Sequence[bytes], known: Any) -> np.ndarray:
    """`[T]` bool: tokens in which a decision of the response begins, according to the data source."""
    start = rollout.prompt_length
    ends = np.cumsum([len(word) for word in words[start:]])
    # Each byte that is not UTF-8 is one character, which becomes that byte again.
    text = b"".join(words[start:]).decode(errors="surrogateescape")
    out = np.zeros(rollout.length, bool)
    for begin_at, _ in known(text):
        byte = len(text[:begin_at].encode(errors="surrogateescape"))
        out[start + int(np.searchsorted(ends, byte, side="right"))] = True
    return out & rollout.sampled


def summarize(ranked: Sequence[Ranked], measured: Sequence[Influence], random: dict[int, list[int]]) -> dict[str, Any]:
    """The statistics of all scores. Positions without a measured influence are left out."""
    influence = {(m.rollout, m.position): m.influence for m in measured}
    random = {i: [t for t in chosen if (i, t) in influence] for i, chosen in random.items()}

    questions = [ranked[i].question for i in random]

    def mean_of(chosen: dict[int, list[int]]) -> Interval:
        rows = [[influence[i, t] for t in chosen[i] if (i, t) in influence] for i in random]
        return mean_over_questions(rows, questions)

    known = any(r.decisions is not None for r in ranked)
    figures: dict[str, Any] = {"scores": {}, "chance": chance(ranked) if known else None}
    for name in ranked[0].scores:
        places = [
            [Place(bool(r.preferred[name][t]), float(r.scores[name][t]), influence[i, t]) for t in random[i]]
            for i, r in ((i, ranked[i]) for i in random)
        ]
        figures["scores"][name] = {
            "correlation": correlation(places, questions),
            "influence_of_top_3": mean_of({i: ranked[i].top(name, 3) for i in random}),
            "precision": {count: precision(ranked, name, count) for count in COUNTS} if known else None,
            "after_tools": share_after_tools(ranked, name, 3),
            "words": top_words(ranked, name, 3),
        }
    figures["influence_of_random"] = mean_of(random)
    return figures


def to_markdown(figures: dict[str, Any]) -> str:
    lines = [
        f"{figures['rollouts']} rollouts of {figures['policy']}, {figures['positions']} positions, "
        f"{figures['continuations']} continuations at each cut. Standard deviation of Ω after one step: "
        f"{figures['future_std']:.3f}. Means and 95 % intervals are over questions.",
        "",
        "| score | rank correlation with influence | influence of its best 3 | precision at 1 | at 3 | at 5 | begin a turn "
        "after a tool | words on top |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, f in figures["scores"].items():
        hits = [_shown(f["precision"][count], 2) for count in COUNTS] if f["precision"] else [""] * len(COUNTS)
        words = cell(", ".join(f"{word} {count}" for word, count in f["words"][:8]))
        cells = [
            name, _shown(f["correlation"], 2), _shown(f["influence_of_top_3"], 4), *hits, f"{100 * f['after_tools']:.0f} %", words,
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    if lost := figures["positions_without_value"]:
        lines += ["", f"{lost} more positions have no value, because rewards of their continuations failed."]
    lines += ["", f"Mean influence of a random position: {_shown(figures['influence_of_random'], 4)}."]
    if figures["chance"] is not None:
        lines.append(f"Share of positions that are decisions by construction: {_shown(figures['chance'], 2)}.")
    scatter: Scatter = figures["scatter"]
    means = ", ".join(f"{name} {_shown(value, 4)}" for name, value in scatter.variance.items())
    lines += [
        "",
        f"Variance of A_base when the branches are drawn again (Theorem 1): {means}. proportional minus "
        f"per_rollout: {_shown(scatter.difference, 4)}.",
    ]
    return "\n".join(lines)


def _shown(x: Interval, digits: int) -> str:
    if np.isnan(x.value):
        return "–"  # nothing was measured
    return f"{x.value:.{digits}f} [{x.low:.{digits}f}, {x.high:.{digits}f}]"


def draw(figures: dict[str, Any], path: Path) -> None:
    """Draw bars with intervals: rank correlation, influence of the best three, and precision if decisions are known."""
    panels: list[tuple[str, Callable[[Any], Interval], float]] = [
        ("rank correlation with influence", lambda f: f["correlation"], 0.0),
        ("influence of the best 3", lambda f: f["influence_of_top_3"], figures["influence_of_random"].value),
    ]
    if figures["chance"] is not None:
        panels.append(("precision at 3", lambda f: f["precision"][3], figures["chance"].value))
    names = list(figures["scores"])
    with rc_context(STYLE):
        figure = Figure(figsize=(3.6 * len(panels), 3.2), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True)
        for ax, (title, get, reference) in zip(axes, panels, strict=True):
            found = [get(figures["scores"][name]) for name in names]
            errors = np.array([[x.value - x.low for x in found], [x.high - x.value for x in found]])
            errors = np.where(np.isfinite(errors), errors, np.nan)  # an interval without ends is not drawn
            ax.barh(names, [x.value for x in found], xerr=np.maximum(errors, 0), color="C0", ecolor="0.3", capsize=2)
            ax.axvline(reference, color="C3", linewidth=1)
            ax.set_title(title)
            ax.locator_params(axis="x", nbins=5)
        axes[0].invert_yaxis()
        figure.savefig(path)
