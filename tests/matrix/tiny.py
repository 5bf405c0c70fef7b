"""The smallest run that the matrices damage, kill and grow, and what its end must look like.

Its data is a corner of the embedded world, made in memory: a start takes as little time as can be.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from appo_jax.checkpoint_read import verify
from appo_jax.config import Config, DataConfig
from appo_jax.config_io import load_config
from appo_jax.data.source import Dataset
from appo_jax.data.traces import WorldScript
from appo_jax.data.world import generate
from appo_jax.dumps import dumped_steps, read_dump
from appo_jax.errors import DataError
from appo_jax.prepare import prepare_world

STEPS = 6


def load(config: DataConfig) -> Dataset:
    """`data.source = "tiny:load"`: 40 questions of the world that are answered by looking things up."""
    world = generate(config.seed)
    train, held_out = ([q for q in part if q.solution.paths][:40] for part in (world.train, world.held_out))
    script = WorldScript(dataclasses.replace(world, train=tuple(train)), "", config.seed)
    examples = ([question.example("") for question in part] for part in (train, held_out))
    return Dataset(*examples, world.documents, script.demonstration, len(script))


def tiny_config(folder: Path) -> Config:
    """The tests' smallest run (tests/conftest.py) on this data, with two steps between checkpoints; its tokenizer is made."""
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # so that programs that are started find `tiny:load`
    c = load_config(Path(__file__).parents[2] / "configs/quickstart.py")
    shape = dataclasses.replace(
        c.policy.architecture, width=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, mlp_width=32
    )
    config = dataclasses.replace(
        c, run_dir=str(folder / "run"), steps=STEPS, prompts_per_step=2, prompts_per_minibatch=2, checkpoint_every=2,
        policy=dataclasses.replace(c.policy, architecture=shape, tokenizer=str(folder / "world.model")),
        data=dataclasses.replace(c.data, source="tiny:load", path=None),
        tools=dataclasses.replace(c.tools, enabled=("search",)),
        rollout=dataclasses.replace(
            c.rollout, num_initial=2, budget=4, max_response_tokens=48, max_result_tokens=16, decode_rows=8
        ),
        branching=dataclasses.replace(c.branching, num_branch_points=1),
        sft=dataclasses.replace(c.sft, steps=1, batch_size=2), eval=dataclasses.replace(c.eval, num_prompts=2),
    )  # fmt: skip
    prepare_world(config)
    return config


def last_arrays(run: Path) -> dict[str, object]:
    """Digest of every array of a run's last step, by name. The arrays are read, and must be those of the digests."""
    step = run / f"checkpoints/rl/{STEPS}"
    if (said := verify(step)) != "sound":
        raise ValueError(f"{step}: {said}")
    return json.loads((step / "meta/metadata").read_text())["record"]["arrays"]


def records_complete(run: Path, log: str) -> str | None:
    """What is missing in the records of a run and is not reported by it; None: nothing."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    if [line["step"] for line in lines] != list(range(1, STEPS + 1)):
        return f"steps on record: {[line['step'] for line in lines]}"
    cold = [json.loads(line) for line in (run / "sft.jsonl").read_text().splitlines()]
    if [line["step"] for line in cold] != [1]:
        return f"steps of the cold start on record: {[line['step'] for line in cold]}"
    if any(line.get("lost") for line in lines + cold) and "are lost" not in log:
        return "records are lost, and nothing says so"
    whole = []
    for step, path in dumped_steps(run / "rollouts").items():
        try:
            whole += [step] if len(list(read_dump(path))) == 2 else []
        except DataError:
            if f"{path.name} cannot be read" not in log:
                return f"{path.name} is damaged, and nothing says so"
            whole.append(step)  # the disk does not give it
    if whole != list(range(1, STEPS + 1)) and "are lost" not in log:
        return f"trees of steps {whole}, and nothing says so"
    return None
