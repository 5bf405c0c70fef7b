"""The command line: `appo-jax COMMAND ...`.

Commands that run something take `--config FILE` and dotted overrides of its fields. Mistakes in them are reported
before jax is imported: exit code 2 for a bad command line or config, 1 for errors found later.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import rich.console
import tyro
from rich.logging import RichHandler

from appo_jax import __version__, commands, distributed, failures, output
from appo_jax.algorithms import ALGORITHMS
from appo_jax.config import Config, JudgeConfig
from appo_jax.config.bounds import require_at_least
from appo_jax.config_io import check, load_config, require_own_folder
from appo_jax.errors import ConfigError, PlanError, did_you_mean
from appo_jax.overrides import expand_home, names_field, override, split_dotted
from appo_jax.supervision.supervisor import connect_supervisors, supervise

log = logging.getLogger("appo_jax.cli")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (failures.py says what each means)."""
    name, *args = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    verbose = "--verbose" in args
    args = [expand_home(arg) for arg in args if arg != "--verbose"]
    if name in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {key:{width}}  {(command.__doc__ or '').splitlines()[0]}" for key, command in COMMANDS.items()]
        more = "`appo-jax COMMAND --help` tells more. With --verbose every error comes with its traceback."
        print("usage: appo-jax COMMAND [...]\n\n" + "\n".join(lines) + f"\n\n{more}")
        return 0
    if name == "--version":
        print(f"appo-jax {__version__}")
        return 0
    try:
        if name not in COMMANDS:
            raise ConfigError(f"{name!r} is not a command; {did_you_mean(name, COMMANDS)}")
        _set_up_logging()
        if os.getcwd() not in sys.path:  # a user's tools, rewards and data sources, as `python -m` finds them
            sys.path.append(os.getcwd())
        COMMANDS[name](args)
    except KeyboardInterrupt:
        print(f"appo-jax {name}: interrupted", file=sys.stderr)
        return failures.INTERRUPTED
    except Exception as error:
        if verbose or not failures.is_understood(error):  # show the whole traceback, the summary last
            traceback.print_exc()
        command = "" if isinstance(error, ConfigError) else f" {name}"
        print(output.harmless(f"appo-jax{command}: {failures.explain(error)}"), file=sys.stderr)
        return failures.exit_code(error)
    return 0


def guard_output() -> None:
    """Say what happens when the reader of the output is gone: a command that only prints ends, one that does more goes on."""
    if LONG & set(sys.argv[1:2]) and not {"-h", "--help"} & set(sys.argv):
        output.outlive_reader()
    else:
        output.end_with_reader()


def _set_up_logging() -> None:
    """Log this program's messages from INFO on and those of libraries from WARNING on; above the live panel if there is
    one."""
    console = rich.get_console()
    handler = RichHandler(console=console, show_path=False) if console.is_terminal else logging.StreamHandler()
    # This applies also to libraries that set the levels of their own loggers.
    handler.addFilter(lambda record: record.levelno >= logging.WARNING or record.name.split(".")[0] == "appo_jax")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("appo_jax").setLevel(logging.INFO)
    # Orbax warns of things that are correct, and logs failed reads, which checkpoint.py reports anyway.
    logging.getLogger("absl").setLevel(logging.ERROR)
    logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())


def config_from(command: str, args: Sequence[str], trains: bool = False) -> Config:
    """The config of `--config FILE`, with `--data DIR` (short for `--data.path DIR`) and dotted overrides on top. `trains`: it is
    that of a training in its `run_dir`.

    Raises ConfigError for a bad file or a broken rule between fields; a bad override exits with code 2 (tyro's message
    names the field, what it takes, and the nearest field for one that does not exist).
    """
    first = argparse.ArgumentParser(prog=f"appo-jax {command}", add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    first.add_argument("--data")
    known, overrides = first.parse_known_args(args)
    if known.config is None and not {"-h", "--help"} & set(overrides):
        raise ConfigError("--config FILE is missing: a file of configs/, or the config.json of a run")
    if known.data is not None and names_field(overrides, "data.path"):
        raise ConfigError(f"--data {known.data} and --data.path: both set data.path; give one of the two")
    overrides += [] if known.data is None else ["--data.path", known.data]
    about = "--config FILE is required; it sets the defaults below. --data DIR is short for --data.path DIR. --algorithm takes "
    base = load_config(known.config) if known.config else Config()
    config = check(override(base, overrides, f"appo-jax {command}", f"{about}{', '.join(ALGORITHMS)}."), trains)
    if trains and not names_field(overrides, "run_dir"):
        require_own_folder(known.config, config)
    return config


def _train(args: Sequence[str]) -> None:
    """Train a policy: cold start (if the config has one), then APPO or a baseline; goes on with a run that exists."""
    config = config_from("train", args, trains=True)

    def run() -> None:
        from appo_jax.train import train

        train(config)

    _supervised(config, run)


def _supervised(config: Config, body: Callable[[], None]) -> None:
    """Run `body` under a supervisor, together with the other hosts if there are any."""

    def run() -> None:
        distributed.initialize()  # before any import that might touch a device
        connect_supervisors()
        body()

    supervise(config, run)


def _study(args: Sequence[str]) -> None:
    """Run a study: arms × seeds at an equal budget of sampled tokens, then one table and one figure; goes on if stopped."""

    def study(
        config: Path, arms: tuple[str, ...] = (), seeds: tuple[int, ...] = (), jobs: int = 1, report: bool = False
    ) -> None:
        """Do the runs of a study that are not finished, then write its table and figure.

        Args:
            config: A python file with `study = Study(...)`: see configs/studies/.
            arms: Only these arms; the others are compared with the first. By default all.
            seeds: Seeds instead of those in the file.
            jobs: Number of runs at a time, each on its share of the cores. A small policy does not fill several cores:
            use one job per core.
            report: Start no runs; only write the table and the figure of the finished ones.
        """
        from appo_jax.study.definition import check_kept_runs, load_study

        chosen = load_study(config, arms, seeds)
        check_kept_runs(chosen)
        from appo_jax.study.report import write_report
        from appo_jax.study.run import run_study

        print(write_report(chosen) if report else run_study(chosen, jobs))

    tyro.cli(study, prog="appo-jax study", args=list(args))


def _sweep(args: Sequence[str]) -> None:
    """Sweep over config fields: trials on shared seeds and cold starts, on this machine or by workers on many."""

    def sweep(config: Path, jobs: int = 1, worker: bool = False, report: bool = False) -> None:
        """Run the unfinished trials of a sweep, then write its report.

        Args:
            config: A python file with `sweep = Sweep(...)`: see configs/sweeps/.
            jobs: Number of trials at a time, each on its share of this machine's cores.
            worker: Be one worker: take trials from the sweep's folder, which workers on other machines may share, until
                all are done. Writes no report, and does not try failed trials again.
            report: Run nothing; only write the report of the finished trials.
        """
        if worker and (report or jobs != 1):
            raise ConfigError(f"sweep --worker with {'--report' if report else f'--jobs {jobs}'}: give one of the two")
        from appo_jax.sweep.definition import load_sweep

        chosen = load_sweep(config)
        if worker:
            from appo_jax.sweep.worker import work

            work(chosen)
        elif report:
            from appo_jax.sweep.report import write_report

            print(write_report(chosen))
        else:
            from appo_jax.sweep.run import run_sweep

            print(run_sweep(chosen, config, jobs))

    tyro.cli(sweep, prog="appo-jax sweep", args=list(args))


def _eval(args: Sequence[str]) -> None:
    """Evaluate a policy, or predictions made elsewhere, on a benchmark: AIME, MATH, GSM8K, HotpotQA, GAIA and others."""
    from appo_jax.eval_command import Evaluation, evaluate_set

    if args and args[0] == "--compare":
        from appo_jax.benchmark.compare import compare

        about, places = "Compare two folders that `appo-jax eval` wrote, question by question.", (tyro.conf.Positional,)
        print(tyro.cli(compare, prog="appo-jax eval --compare", description=about, args=args[1:], config=places))
        return

    def evaluate(
        set: str, data: Path, out: Path, predictions: Path | None = None, run: Path | None = None, config: Path | None = None,
        limit: int | None = None, samples: int = 1, temperature: float = 0.0, judge_url: str | None = None,
        judge_model: str | None = None, step: int | None = None,
    ) -> None:  # fmt: skip
        """Evaluate one set. `appo-jax eval --compare A B` compares two reports, question by question. With --run or --config,
        fields of the config may follow: --mesh.fsdp 4 for four devices.

        Args:
            set: Name of the set, or `package.module:set` of your own: see docs/eval.md.
            data: The set's file or folder, as its authors or the official APPO repository have it.
            out: Folder of the report. The samples of a policy are kept there, and the same command goes on from them.
            predictions: Grade this file, without a policy: one JSON object per line with id and prediction. Lines of the same
                id are samples.
            run: Draw with the newest policy of this run, its prompt and its tools.
            config: Draw with `policy.path`, the prompt and the tools of this config (with --run: other tools and limits).
            limit: Use only this many questions, from the beginning of the set.
            samples: Number of samples of every question.
            temperature: Sampling temperature; 0 is greedy.
            judge_url: Base URL of an OpenAI-compatible endpoint that judges every answer, too (key in OPENAI_API_KEY).
            judge_model: The judge's model; Qwen/Qwen2.5-72B-Instruct if it is left out.
            step: Draw with this checkpoint of the run instead of its newest.
        """
        if judge_model and not judge_url:
            raise ConfigError(f"--judge-model {judge_model}: goes with --judge-url URL, the judge's endpoint")
        judge = JudgeConfig(judge_url, judge_model or "Qwen/Qwen2.5-72B-Instruct") if judge_url else None
        asked = Evaluation(set, data, out, predictions, limit, samples, temperature, judge, step)
        file = config or (run / "config.json" if run else None)
        if dotted and file is None:
            raise ConfigError(f"{dotted[0]}: a field of a config goes with --run RUN or --config FILE")
        print(evaluate_set(asked, commands.overridden(file, dotted, "eval") if file else None, run))

    own, dotted = split_dotted(args)
    tyro.cli(evaluate, prog="appo-jax eval", args=own)


def _sft(args: Sequence[str]) -> None:
    """Run only the cold start: fine-tuning on tool-use traces. --collect FILE: sample such traces from a policy."""
    parser = argparse.ArgumentParser(prog="appo-jax sft", add_help=False, allow_abbrev=False)
    parser.add_argument("--collect", type=Path)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--questions", type=int)
    known, rest = parser.parse_known_args(args)
    usage = "sft [--collect FILE [--run RUN] [--samples 4] [--questions N]]"
    config = config_from(usage, rest, trains=known.collect is None)
    given = {name: value for name, value in vars(known).items() if value is not None}
    if known.collect is not None:
        from appo_jax.collect import Collecting, collect

        print(collect(config, Collecting(given.pop("collect"), **given)))
        return
    if given:
        raise ConfigError(
            f"--{next(iter(given))}: goes with --collect FILE; the cold start itself takes fields of the config"
        )

    def run() -> None:
        from appo_jax import sft

        accuracies = sft.run(config)
        for name, value in accuracies.items() if distributed.host() == 0 else ():
            print(f"{name}: {value:.4f}")

    _supervised(config, run)


def _data(args: Sequence[str]) -> None:
    """`data world`: make the embedded world's dataset and train its tokenizer. `data describe`: what a config's data holds."""
    kind, expected = args[0] if args else "", [f"appo-jax data {kind} --config FILE" for kind in ("world", "describe")]
    if kind in ("-h", "--help"):
        print("usage: {}\n       {}".format(*expected), _data.__doc__, sep="\n\n")
        return
    if kind not in ("world", "describe"):
        raise ConfigError("data {}: expected `{}` or `{}`".format(kind, *expected))
    config = config_from(f"data {kind}", args[1:])
    from appo_jax.prepare import describe_data, prepare_world

    print(prepare_world(config) if kind == "world" else describe_data(config))


def _plan(args: Sequence[str]) -> None:
    """Compile every program of a config for a TPU topology, without the TPU: does it fit, how fast could it be?"""
    parser = argparse.ArgumentParser(prog="appo-jax plan", add_help=False, allow_abbrev=False)
    parser.add_argument("--topology")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--lengths", type=Path)
    parser.add_argument("--price", type=float)
    parser.add_argument("--search", nargs="?", const=25.0, type=float)
    known, rest = parser.parse_known_args(args)
    config = config_from(
        "plan --topology v5p:4x4x4 [--search [MINUTES]] [--lengths RUN] [--price DOLLARS_A_CHIP_HOUR] [--json]", rest
    )
    require_at_least({"--price": (known.price, 0), "--search": (known.search, 0)})
    if known.topology is None:
        raise ConfigError("--topology is missing: chip and shape of a slice, e.g. --topology v5p:4x4x4")
    from appo_jax.plan import report
    from appo_jax.plan.compiler import compiler_for
    from appo_jax.plan.search import search

    tell = functools.partial(log.info, "compiling: %s")
    compiler = compiler_for(known.topology, config.mesh.slices, lengths=known.lengths, on_program=tell)
    if known.search is None:
        plan, more = compiler.plan(config), dict[str, Any]()
    else:
        found = search(config, compiler.plan, 60 * known.search, report.log_better)
        plan, more = found.plan, found.report(config)
    if known.price is not None:
        more["dollars_a_step"] = plan.dollars(known.price)
    if known.json:
        print(json.dumps(plan.to_json() | more, indent=2))
    else:
        report.show(plan, rich.get_console(), more)
    if not plan.fits:
        raise PlanError(plan.verdict())


LONG = {"train", "sft", "study", "sweep"}  # these do more than print
COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": _train,
    "sft": _sft,
    "study": _study,
    "sweep": _sweep,
    "eval": _eval,
    "ask": commands.ask_command,
    "retriever": commands.retriever_command,
    "influence": commands.influence_command,
    "status": commands.status_command,
    "checkpoints": commands.checkpoints_command,
    "view": commands.view_command,
    "data": _data,
    "convert": commands.convert_command,
    "plan": _plan,
    "doctor": commands.doctor_command,
}

if __name__ == "__main__":
    guard_output()
    sys.exit(main())
