"""Damage to every file of a run, and what the run makes of it: `python tests/matrix/damage.py [--cases N] [--seed S]`.

A run of four steps is made, with a checkpoint after every second. For each case it is copied, one of its files (or folders) is
damaged, and the run goes on to six steps. Allowed ends: the parameters of an undisturbed run with every step on record once (or
marked as lost, and said so), or one message of ours that says what to do. A traceback, a wrong array or silence is a failure.
Exit code 1 when there was one.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import io
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from appo_jax.checkpoint import Checkpointer
from appo_jax.components import build, initial_params
from appo_jax.config import Config
from appo_jax.config_io import load_config
from appo_jax.dumps import dumped_steps, read_dump
from appo_jax.errors import AppoError, DataError
from appo_jax.learner.optimizer import rl_optimizer
from appo_jax.learner.step import init_state
from appo_jax.metrics import read_metrics
from appo_jax.prepare import prepare_world
from appo_jax.train import train

STEPS = 6
Damage = Callable[[Path, random.Random], None]


def cut(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(max(1, len(content)))])


def cut_last(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: -rng.randrange(1, min(len(content), 40))] if len(content) > 1 else b"")


def nul(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    at = rng.randrange(max(1, len(content)))
    content[at : at + 64] = bytes(len(content[at : at + 64]))
    path.write_bytes(content)


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def delete(path: Path, rng: random.Random) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def duplicate(path: Path, rng: random.Random) -> None:
    target = path.with_name(f"{path.stem}_final{path.suffix}" if rng.random() < 0.5 else f"{path.name} (1)")
    shutil.copytree(path, target) if path.is_dir() else shutil.copy(path, target)


def repeat(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content + content)


def stray(path: Path, rng: random.Random) -> None:
    name = rng.choice(["step_final.jsonl", "step_000003.jsonl~", "99", "notes.txt", ".nfs0001", "step_abc.jsonl.gz"])
    folder = path if path.is_dir() else path.parent
    (folder / name).mkdir() if name == "99" else (folder / name).write_text("stray\n")


def blank_line(path: Path, rng: random.Random) -> None:
    lines = path.read_bytes().split(b"\n")
    lines.insert(rng.randrange(len(lines)), b"")
    path.write_bytes(b"\n".join(lines))


FILE_DAMAGES: tuple[Damage, ...] = (cut, cut_last, nul, flip, empty, delete, duplicate, repeat, stray)
FOLDER_DAMAGES: tuple[Damage, ...] = (delete, duplicate, stray)


def tiny_config(folder: Path) -> Config:
    """The tests' smallest run (tests/conftest.py), with two steps between checkpoints."""
    c = load_config(Path(__file__).parents[2] / "configs/quickstart.py")
    shape = dataclasses.replace(
        c.policy.architecture, width=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, mlp_width=32
    )
    config = dataclasses.replace(
        c, run_dir=str(folder / "run"), steps=4, prompts_per_step=2, prompts_per_minibatch=2, checkpoint_every=2,
        policy=dataclasses.replace(c.policy, architecture=shape, tokenizer=str(folder / "world.model")),
        data=dataclasses.replace(c.data, path=str(folder / "world")),
        tools=dataclasses.replace(c.tools, enabled=("search",)),
        rollout=dataclasses.replace(
            c.rollout, num_initial=2, budget=4, max_response_tokens=32, max_result_tokens=16, decode_rows=8
        ),
        branching=dataclasses.replace(c.branching, num_branch_points=1),
        sft=dataclasses.replace(c.sft, steps=1, batch_size=2), eval=dataclasses.replace(c.eval, num_prompts=2),
    )  # fmt: skip
    prepare_world(config)
    return config


def parameters(config: Config, run: Path) -> dict[str, np.ndarray]:
    """The arrays of a run's newest checkpoint, by name."""
    with build(config) as components:
        params = initial_params(config, components.arch, components.mesh)
        state = init_state(params, rl_optimizer(config.optimizer), components.arch, components.mesh)
        checkpointer = Checkpointer(run / "checkpoints/rl", keep=3, read_only=True)
        try:
            restored = checkpointer.restore_latest(state, None)
        finally:
            checkpointer.close()
    assert restored is not None
    assert restored[0] == STEPS, restored[0]
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(restored[1])}


def records_complete(run: Path, log: str) -> str | None:
    """What is missing in the records of a run without a word about it; None: nothing."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    if [line["step"] for line in lines] != list(range(1, STEPS + 1)):
        return f"steps on record: {[line['step'] for line in lines]}"
    if any(line.get("lost") for line in lines) and "are lost" not in log:
        return "records are lost, and nothing says so"
    dumps = dumped_steps(run / "rollouts")
    whole = []
    for step, path in dumps.items():
        try:
            whole += [step] if len(list(read_dump(path))) == 2 else []
        except DataError:
            return f"{path.name} is damaged, and nothing says so"
    if whole != list(range(1, STEPS + 1)) and "are lost" not in log:
        return f"trees of steps {whole}, and nothing says so"
    return None


def one_case(
    config: Config, pristine: Path, target: str, damage: Damage, rng: random.Random, truth: dict
) -> tuple[str, str]:
    """(outcome, detail) of a case; the outcome begins with BAD where the run did what it must not."""
    run = Path(config.run_dir)
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(pristine, run)
    damage(run / target, rng)
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    logging.getLogger("appo_jax").addHandler(handler)
    try:
        train(dataclasses.replace(config, steps=STEPS))
    except AppoError as error:
        return ("message" if len(str(error)) > 40 else "BAD message", str(error).splitlines()[0][:160])
    except Exception as error:
        return "BAD traceback", f"{type(error).__name__}: {error}"[:200]
    finally:
        logging.getLogger("appo_jax").removeHandler(handler)
    found = parameters(config, run)
    if wrong := [name for name in truth if not np.array_equal(truth[name], found[name])]:
        return "BAD parameters", wrong[0]
    if missing := records_complete(run, log.getvalue()):
        return "BAD records", missing
    told = [line for line in log.getvalue().splitlines() if "lost" in line or "damaged" in line or "refused" in line]
    return ("same, and told" if told else "same"), (told[0][-160:] if told else "")


def cases(pristine: Path, count: int, rng: random.Random) -> list[tuple[str, Damage]]:
    """Every file and folder with every damage, in an order that begins with one of each kind of file."""
    entries = sorted(path for path in pristine.rglob("*") if path.name != "lock")
    every = [
        (str(path.relative_to(pristine)), damage)
        for path in entries
        for damage in (FOLDER_DAMAGES if path.is_dir() else FILE_DAMAGES)
    ]
    every += [("metrics.jsonl", blank_line), ("sft.jsonl", blank_line)]
    rng.shuffle(every)
    must = [
        (t, d)
        for t, d in every
        if t in ("metrics.jsonl", "checkpoints", "checkpoints/rl", "checkpoints/sft", "rollouts")
    ]
    dumps = [(t, d) for t, d in every if t.startswith("rollouts/")][:12]
    rest = [case for case in every if case not in must and case not in dumps]
    return (must + dumps + rest)[:count]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=120)
    parser.add_argument("--skip", type=int, default=0, help="begin after so many of them")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.getLogger("appo_jax").setLevel(logging.INFO)
    logging.getLogger("appo_jax").propagate = False
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = tiny_config(folder)
        run, pristine, began = Path(config.run_dir), folder / "pristine", time.monotonic()
        train(config)
        shutil.copytree(run, pristine)
        train(dataclasses.replace(config, steps=STEPS))
        truth = parameters(config, run)
        assert len(read_metrics(run / "metrics.jsonl")) == STEPS
        tally: collections.Counter[str] = collections.Counter()
        for target, damage in cases(pristine, options.cases, rng)[options.skip :]:
            outcome, detail = one_case(config, pristine, target, damage, rng, truth)
            tally[outcome] += 1
            print(f"{outcome:15} {damage.__name__:10} {target}  {detail}", flush=True)
    print(f"{sum(tally.values())} cases in {time.monotonic() - began:.0f} s: {dict(tally)}")
    return int(any(outcome.startswith("BAD") for outcome in tally))


if __name__ == "__main__":
    sys.exit(main())
