"""Damage to every file of a run, and what the run makes of it: `python tests/matrix/damage.py [--cases N] [--seed S]`.

A run of four steps is made, with an evaluated checkpoint after every second. For each case it is copied, and one of its files (or
folders) is damaged. The commands that read such a file (status, study, view, checkpoints, convert) come first, and must change
nothing; then the run goes on to six steps. Allowed ends: the parameters of an undisturbed run with every step on record once (or
marked as lost, and said so), or one message of ours that says what to do. A traceback, a wrong array or silence is a failure.
Exit code 1 when there was one.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import io
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

from tiny import STEPS, last_arrays, records_complete, tiny_config

from appo_jax import checkpoint_read, commands, failures
from appo_jax.config import Config
from appo_jax.errors import AppoError
from appo_jax.metrics import read_metrics
from appo_jax.study.definition import Study
from appo_jax.study.report import write_report
from appo_jax.supervision.status import Status, note_failure
from appo_jax.train import train
from appo_jax.view.tree import show_tree

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


def not_given(path: Path, rng: random.Random) -> None:
    """The disk does not give the file: the first page of a process's memory cannot be read (EIO)."""
    path.unlink()
    path.symlink_to("/proc/self/mem")


FILE_DAMAGES: tuple[Damage, ...] = (cut, cut_last, nul, flip, empty, delete, duplicate, repeat, stray)
FOLDER_DAMAGES: tuple[Damage, ...] = (delete, duplicate, stray)
# The files that only a supervisor writes: a run without one does not read them.
SUPERVISOR = ("status.json", "failures.jsonl")
# The run that is damaged, in a study of two seeds; the other run stays sound.
RUN, SOUND = "runs/appo-0", "runs/appo-1"


def status(run: Path) -> None:
    commands.status_command([str(run.parent)])


def study(run: Path) -> None:
    write_report(Study(str(run.parent.parent), {"appo": Config()}, seeds=(0, 1), max_sampled_tokens=1))


def view(run: Path) -> None:
    show_tree(run)


def checkpoints(run: Path) -> None:
    commands.checkpoints_command([str(run), "--verify"])


def convert(run: Path) -> None:
    with tempfile.TemporaryDirectory() as out:
        commands.convert_command([str(run), "--out", f"{out}/policy"])


def failure(run: Path) -> None:
    note_failure(run, 0, "worker-0", 3, "the process was ended by SIGKILL")


# What reads a file, by the beginning of the file's name.
READERS: dict[str, tuple[Callable[[Path], None], ...]] = {
    "status.json": (status,),
    "failures.jsonl": (status, failure),
    "summary.json": (study,),
    "metrics.jsonl": (study, view),
    "rollouts": (view,),
    "config.json": (status, checkpoints, convert),
    "checkpoints": (checkpoints, convert),
}


def contents(run: Path) -> dict[str, bytes]:
    """What a reader may not change. Only supervisors note failures, and writers lock."""
    return {
        str(path.relative_to(run)): b"" if path.is_symlink() else path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and path.name not in ("lock", "failures.jsonl")
    }


def read_all(run: Path, target: str) -> tuple[str, str]:
    """(outcome, detail) of the commands that read `target`. The outcome begins with BAD if one of them did something forbidden."""
    before, told = contents(run), []
    for name, readers in READERS.items():
        for reader in readers if target.startswith(name) else ():
            out = io.StringIO()
            try:
                with contextlib.redirect_stdout(out):
                    reader(run)
            except Exception as error:
                if not failures.is_understood(error):
                    return "BAD traceback", f"{reader.__name__}: {type(error).__name__}: {error}"[:200]
                told.append(f"{reader.__name__}: {error}")
            if reader is status and f"{run.parent.parent / SOUND}: " not in out.getvalue():
                return "BAD status", "the sound run is not shown"
    if contents(run) != before:
        return "BAD reader", "it changed the run"
    return ("read, and told" if told else "read"), (told[0].splitlines()[0][:160] if told else "")


def one_case(
    config: Config, pristine: Path, target: str, damage: Damage, rng: random.Random, truth: dict
) -> tuple[str, str]:
    """(outcome, detail) of a case; the outcome begins with BAD if the run did something forbidden."""
    run = Path(config.run_dir)
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(pristine, run)
    damage(run / target, rng)
    found = read_all(run, target)
    if found[0].startswith("BAD") or target in SUPERVISOR:
        return found
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    logging.getLogger("appo_jax").addHandler(handler)
    try:
        train(config)
    except AppoError as error:
        return ("message" if len(str(error)) > 40 else "BAD message", str(error).splitlines()[0][:160])
    except Exception as error:
        return "BAD traceback", f"{type(error).__name__}: {error}"[:200]
    finally:
        logging.getLogger("appo_jax").removeHandler(handler)
    if (size := (run / "lock").stat().st_size) != 16:
        return "BAD lock", f"{size} bytes: the other hosts expect the mark of this start alone"
    if last_arrays(run) != truth:
        return "BAD parameters", "not those of an undisturbed run"
    if missing := records_complete(run, log.getvalue()):
        return "BAD records", missing
    words = ("lost", "damaged", "refused", "cannot be read")
    told = [line for line in log.getvalue().splitlines() if any(word in line for word in words)]
    return ("same, and told" if told else "same"), (told[0][-160:] if told else "")


def cases(pristine: Path, rng: random.Random) -> list[tuple[str, Damage]]:
    """Every file and folder with every damage. The files from which a run goes on and its records come first."""
    entries = sorted(pristine.rglob("*"))
    every = [
        (str(path.relative_to(pristine)), damage)
        for path in entries
        for damage in (FOLDER_DAMAGES if path.is_dir() else FILE_DAMAGES)
    ]
    every += [("metrics.jsonl", blank_line), ("sft.jsonl", blank_line)]
    every += [
        (str(path.relative_to(pristine)), not_given)
        for path in entries
        if path.is_file() and path.relative_to(pristine).parts[0] in ("checkpoints", "rollouts")
    ]
    rng.shuffle(every)
    first = (
        "metrics.jsonl",
        "config.json",
        "summary.json",
        "sft.json",
        "sft.jsonl",
        *SUPERVISOR,
        "checkpoints",
        "checkpoints/rl",
        "checkpoints/sft",
        "rollouts",
    )
    must = [case for case in every if case[0] in first]
    some = [case for case in every if case[0].startswith("rollouts/")][:12]
    some += [case for case in every if case[0].startswith("checkpoints/") and case[1] is not_given][:6]
    some += [case for case in every if case[0].endswith("/meta/metadata") and case not in some]
    chosen = must + some
    rng.shuffle(chosen)
    return chosen + [case for case in every if case not in chosen]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=120)
    parser.add_argument("--skip", type=int, default=0, help="begin after so many of them")
    parser.add_argument("--of", help="only damage to this file or folder of the run, and what is in it")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.getLogger("appo_jax").setLevel(logging.INFO)
    logging.getLogger("appo_jax").propagate = False
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = tiny_config(folder)
        config = dataclasses.replace(
            config, run_dir=str(folder / RUN), eval=dataclasses.replace(config.eval, every=2), keep_checkpoints=2,
            keep_best_checkpoints=1,
        )  # fmt: skip
        run, pristine, began = Path(config.run_dir), folder / "pristine", time.monotonic()
        checkpoint_read.READ_AGAIN_S = (0.01,)  # a disk that gives nothing here never will
        train(dataclasses.replace(config, steps=4))
        Status("running", STEPS, time.time(), {"0": {"machine": "worker-0", "step": 4, "phase": "update"}}).write(run)
        failure(run)
        failure(run)
        shutil.copytree(run, pristine)
        shutil.copytree(run, folder / SOUND)
        train(config)
        truth = last_arrays(run)
        assert len(read_metrics(run / "metrics.jsonl")) == STEPS
        tally: collections.Counter[str] = collections.Counter()
        chosen = [case for case in cases(pristine, rng) if options.of is None or case[0].startswith(options.of)]
        for target, damage in chosen[options.skip : options.cases]:
            outcome, detail = one_case(config, pristine, target, damage, rng, truth)
            tally[outcome] += 1
            print(f"{outcome:15} {damage.__name__:10} {target}  {detail}", flush=True)
    print(f"{sum(tally.values())} cases in {time.monotonic() - began:.0f} s: {dict(tally)}")
    return int(any(outcome.startswith("BAD") for outcome in tally))


if __name__ == "__main__":
    sys.exit(main())
