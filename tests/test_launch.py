"""The launch scripts, run with a fake `gcloud` that records its arguments and gives prepared answers.

If $WORKERS names a folder, the fake also runs the commands for all workers: on two workers, whose homes are in that folder.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from appo_jax.config import Config
from appo_jax.config_io import save_config
from appo_jax.metrics import read_metrics
from appo_jax.supervision.status import Status

ROOT = Path(__file__).parents[1]
POD = {"TPU_PROJECT": "p", "TPU_ZONE": "z", "TPU_NAME": "pod"}
KIND = {"TPU_TYPE": "v5p-128", "TPU_RUNTIME": "v2-alpha-tpuv5"}
WHERE = "--project p --zone z"

# Writes each call on a line, spaces between arguments; `describe` answers the lines of $STATES, one a call (MISSING: there is no
# such request; OFFLINE: it fails). With $BY_NODE every node has lines, and a worker, of its own. The workers of node $STARTED have
# the command.
GCLOUD = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
if [[ $* == *" describe "* ]]; then
  exec 9>"$STATES.lock"; flock 9
  if [[ -n ${BY_NODE:-} ]]; then  # the lines of $STATES begin with the name that they are of
    state=$(grep -m 1 "^$5 " "$STATES" | cut -d ' ' -f 2); sed -i "0,/^$5 /{/^$5 /d}" "$STATES"
  else
    state=$(head -1 "$STATES"); sed -i 1d "$STATES"
  fi
  [[ $state != MISSING ]] || { echo "ERROR: NOT_FOUND: Resource was not found" >&2; exit 1; }
  [[ $state != OFFLINE ]] || { echo "ERROR: Unable to connect" >&2; exit 1; }
  echo "$state"
fi
if [[ $* == *" scp "* && $6 == *.tar.gz ]]; then
  tar -tzf "$5" > "$CALLS.files"
  [[ -z "${WORKERS:-}" ]] || for i in 0 1; do cp "$5" "$WORKERS/$i/${6#*:}"; done
fi
if [[ $* == *" scp "* && $6 == *.env.new && -n "${WORKERS:-}" ]]; then
  for i in 0 1; do cp "$5" "$WORKERS/$i/${6#*:}"; done
fi
if [[ $* == *not-started* && -z "${WORKERS:-}" && "$5" != "${STARTED:-}" ]]; then echo not-started; fi
if [[ $* == *" ssh "* && -n "${WORKERS:-}" && ( -z ${NO_SETUP:-} || $* != *tpu_setup.sh* ) ]]; then
  [[ -z ${BY_NODE:-} ]] || ONLY=${5##*-}  # node pod-1 is worker 1
  for i in ${ONLY:-0 1}; do (cd "$WORKERS/$i" && HOME=$PWD OMPI_COMM_WORLD_RANK=$i exec bash -c "${@: -1}") & workers+=($!); done
  for worker in "${workers[@]}"; do wait "$worker"; done
fi
"""

# systemd as far as run.sh uses it: a clean environment, and restarts by the unit's properties. One exit code a line in ~/exits.
SYSTEMD_RUN = r"""#!/usr/bin/env python3
import os, re, signal, subprocess, sys
arguments, options = sys.argv[1:], []
while arguments[0].startswith("--"):
    options.append((arguments.pop(0), arguments.pop(0)))
properties = dict(value.split("=", 1) for name, value in options if name == "--property")
cluster = {k: v for k, v in os.environ.items() if k.startswith(("OMPI_", "JAX_", "XLA_"))}  # Cloud TPU asks its metadata
environment = {"PATH": os.environ["PATH"]} | cluster | dict(v.split("=", 1) for n, v in options if n == "--setenv")
file = properties["EnvironmentFile"].removeprefix("-")
lines = open(file).read().splitlines() if os.path.exists(file) else ()
for name, quoted in (line.split("=", 1) for line in lines):
    environment[name] = re.sub(r"\\(.)", r"\1", quoted[1:-1])
(folder,) = (value for name, value in options if name == "--working-directory")
arguments = [re.sub(r"\$(?:(\$)|\w+|\{\w*\})", lambda match: match[1] or "", argument) for argument in arguments]
assert properties["Restart"] == "on-failure"
for _ in range(int(properties["StartLimitBurst"])):
    with open(os.environ["HOME"] + "/journal", "a") as journal:
        code = subprocess.run(arguments, env=environment, cwd=folder, stdout=journal, stderr=subprocess.STDOUT).returncode
    with open(os.environ["HOME"] + "/exits", "a") as exits:
        print(code, file=exits)
    clean = (0, *(-int(getattr(signal, name)) for name in ("SIGHUP", "SIGINT", "SIGTERM", "SIGPIPE")))
    if code in clean or str(code) in properties["RestartPreventExitStatus"].split():
        break
"""

# The state of the unit: that in ~/state, else that after the last of ~/exits.
SYSTEMCTL = """#!/usr/bin/env bash
case $1 in
  is-active)
    state=$(cat "$HOME/state" 2>/dev/null || { [[ ! -e $HOME/exits ]] || echo failed; })
    [[ $2 == --quiet ]] || echo "$state"
    [[ $state == active ]] || exit 3
    ;;
  kill | stop) echo "$*" >>"$HOME/asked"; echo inactive >"$HOME/state" ;;
  show) printf 'Result=exit-code\\nExecMainStatus=%s\\n' "$(tail -1 "$HOME/exits")" ;;
esac
"""

# The last line of the unit's processes, or with --unit that of systemd about the unit, which comes after it.
JOURNALCTL = """#!/bin/sh
case "$*" in
  *_SYSTEMD_UNIT=appo.service*) tail -1 "$HOME/journal" ;;
  *) echo 'appo.service: Consumed 7.123s CPU time.' ;;
esac
"""


@pytest.fixture
def launch(tmp_path):
    (tmp_path / "bin").mkdir()
    programs = {"gcloud": GCLOUD, "systemd-run": SYSTEMD_RUN, "systemctl": SYSTEMCTL, "journalctl": JOURNALCTL}
    for name, text in (programs | {"sudo": '#!/bin/sh\nexec env "$@"\n'}).items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    calls, states = tmp_path / "calls", tmp_path / "states"

    def run(
        script: str, *args: str, states_told: str = "", **env: str
    ) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        calls.write_text("")
        states.write_text(states_told)
        variables = {k: v for k, v in os.environ.items() if not k.startswith("TPU_")} | env
        variables |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(calls), "STATES": str(states)}
        done = subprocess.run(
            ["bash", str(ROOT / "launch" / script), *args], env=variables, capture_output=True, text=True, timeout=500
        )  # fmt: skip
        return done, calls.read_text().splitlines()

    return run


@pytest.mark.parametrize("script", ["create.sh", "setup.sh", "run.sh", "logs.sh", "stop.sh", "resume.sh", "sweep.sh"])
def test_missing_variables_are_named_and_nothing_is_asked(launch, script):
    done, calls = launch(script, TPU_PROJECT="p")
    assert done.returncode == 2
    assert f"{script}: set TPU_ZONE TPU_NAME" in done.stderr
    assert calls == []


def test_create_asks_for_spot_capacity_and_waits_for_it(launch):
    states = "WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n"
    done, calls = launch("create.sh", states_told=states, TPU_SPOT="1", TPU_POLL="0", **POD, **KIND)
    assert done.returncode == 0, done.stderr
    kind = "--accelerator-type v5p-128 --runtime-version v2-alpha-tpuv5"
    assert calls[0] == f"compute tpus queued-resources create pod {WHERE} {kind} --node-id pod --spot"
    assert sum(" describe pod " in call for call in calls) == 3


def test_create_fails_when_the_request_does(launch):
    done, calls = launch("create.sh", states_told="FAILED\n", TPU_SLICES="2", **POD, **KIND)
    assert done.returncode == 1
    assert calls[0].endswith("--node-count 2 --node-prefix pod")
    assert "launch/stop.sh" in done.stderr


def test_create_needs_the_kind_of_pod(launch):
    done, _ = launch("create.sh", **POD)
    assert done.returncode == 2
    assert "set TPU_TYPE TPU_RUNTIME" in done.stderr


def test_setup_copies_the_commit_to_every_worker_of_every_slice(launch, tmp_path):
    done, calls = launch("setup.sh", TPU_SLICES="2", TPU_SHARED="10.0.0.2:/share", **POD)
    assert done.returncode == 0, done.stderr
    copies = [call for call in calls if " scp " in call]
    assert [call.split()[5] for call in copies] == ["pod-0:appo_jax.tar.gz", "pod-1:appo_jax.tar.gz"]
    assert all("--worker all" in call for call in calls)
    commands = [call for call in calls if "TPU_SHARED=10.0.0.2:/share bash tpu_setup.sh" in call]
    assert sorted(call.split()[4] for call in commands) == ["pod-0", "pod-1"]
    assert {"tpu_setup.sh", "pyproject.toml", "appo_jax/cli.py"} <= set((tmp_path / "calls.files").read_text().split())


# A worker's own python. It lets setuptools build the package where it lies, as pip does, and installs what was built.
PYTHON = """#!/bin/sh
echo "$*" >> pip.calls
case "$*" in *.\\[tpu\\]*)
  "{python}" -c 'import setuptools; setuptools.setup()' --quiet egg_info build && rm -rf installed && cp -r build/lib installed ;;
esac
"""


def test_setup_goes_back_to_an_earlier_commit(launch, workers, tmp_path):
    """Once, modules of a later commit were installed again: the newer files in build/ won, and so did those deleted since."""
    pytest.importorskip("setuptools")
    folder, variables = workers
    (tmp_path / "bin/apt-get").symlink_to("/bin/true")
    for i in range(2):
        python = folder / str(i) / "appo_jax/.venv/bin/python"
        python.write_text(PYTHON.format(python=sys.executable))
        python.chmod(0o755)
        (python.parent / "pip").symlink_to("/bin/true")
        (python.parent / "appo-jax").unlink()
        (python.parent / "appo-jax").symlink_to("/bin/true")
        (folder / str(i) / "appo_jax/runs").mkdir()
    repository = tmp_path / "repository"
    shutil.copytree(ROOT / "launch", repository / "launch")
    shutil.copy(ROOT / "tpu_setup.sh", repository)
    (repository / "setup.cfg").write_text("[metadata]\nname = toy\n[options]\npackages = appo_jax\n")
    package = repository / "appo_jax"
    package.mkdir()

    def git(*args: str, at: str) -> None:
        who = [x for name in ("user.name=t", "user.email=t@t") for x in ("-c", name)]
        dates = {"GIT_COMMITTER_DATE": at, "GIT_AUTHOR_DATE": at}
        subprocess.run(["git", *who, *args], cwd=repository, env=os.environ | dates, check=True)

    git("init", "--quiet", "--initial-branch", "main", at="2026-01-01T00:00:00")
    for day, text in ((1, "first"), (2, "second")):
        at = f"2026-01-0{day}T00:00:00"
        (package / "__init__.py").write_text(text)
        (package / f"only_{text}.py").write_text("")
        (package / "only_first.py").unlink() if day == 2 else None
        git("add", "-A", at=at)
        git("commit", "--quiet", "--message", text, at=at)
    for commit, text in (("main", "second"), ("main~", "first")):
        git("checkout", "--quiet", commit, at="2026-01-03T00:00:00")
        done, _ = launch(str(repository / "launch/setup.sh"), **variables)
        assert done.returncode == 0, done.stderr
        for i in range(2):
            installed = folder / str(i) / "appo_jax/installed/appo_jax"
            assert (installed / "__init__.py").read_text() == text
            assert sorted(file.name for file in installed.iterdir()) == ["__init__.py", f"only_{text}.py"]
            assert (folder / str(i) / "appo_jax/runs").is_dir()
    asked = (folder / "0/appo_jax/pip.calls").read_text().splitlines()
    assert asked[-1] == "-m pip install --quiet --constraint requirements.txt .[tpu]"  # the tested versions


@pytest.mark.parametrize(
    ("mounted", "said"),
    [
        (None, ["mkdir -p /mnt/shared", "mount -t nfs 10.0.0.2:/share /mnt/shared"]),
        ("10.0.0.2:/share", []),
        ("10.0.0.2:/share/", []),
        ("10.0.0.9:/wrong", None),
    ],
)
def test_another_share_than_the_one_asked_for_is_not_kept(tmp_path, mounted, said):
    (tmp_path / "bin").mkdir()
    (tmp_path / "vm/.venv/bin").mkdir(parents=True)
    shutil.copy(ROOT / "tpu_setup.sh", tmp_path / "vm")
    found = f"echo {mounted}" if mounted else "exit 1"  # as findmnt, which cannot see a share here
    programs = {"sudo": 'exec env "$@"', "apt-get": "", "findmnt": found}
    programs |= {name: f'echo "{name} $*" >>{tmp_path}/said' for name in ("mkdir", "mount")}
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    for name in ("pip", "python", "appo-jax"):
        (tmp_path / "vm/.venv/bin" / name).symlink_to("/bin/true")
    variables = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "TPU_SHARED": "10.0.0.2:/share", "PYTHON": "true"}
    done = subprocess.run(
        ["bash", str(tmp_path / "vm/tpu_setup.sh")], env=os.environ | variables, capture_output=True, text=True
    )
    if said is None:
        assert done.returncode == 1
        assert "10.0.0.9:/wrong is mounted at /mnt/shared, but TPU_SHARED is 10.0.0.2:/share" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert ((tmp_path / "said").read_text().splitlines() if (tmp_path / "said").exists() else []) == said


def test_run_starts_the_same_command_on_all_workers_under_a_supervisor(launch):
    done, calls = launch("run.sh", "--config", "configs/a b.py", "--steps", "3", TPU_RETRIES="7", **POD)
    assert done.returncode == 0, done.stderr
    (call,) = calls
    assert call.startswith(f"compute tpus tpu-vm ssh pod {WHERE} --worker all --command ")
    assert "appo-jax train --config configs/a\\ b.py --steps 3" in call  # quoted for the shell over there
    assert "APPO_DISTRIBUTED=1" in call
    assert "Restart=on-failure" in call
    assert "StartLimitBurst=8" in call  # the first start, and 7 restarts
    assert "TimeoutStopSec=infinity" in call  # a step takes longer than any limit
    assert "OOMPolicy=continue" in call  # a tool's process that the kernel ends for its memory is one failed call
    assert "$HOME/appo_jax" in call  # the worker's home, not ours
    done, (call,) = launch("run.sh", "--config", "a.py", TPU_COMMAND="sft", **POD)
    assert "appo-jax sft --config a.py" in call
    assert "APPO_DISTRIBUTED=1" in call


@pytest.fixture
def workers(tmp_path: Path, one_of: Callable[[int, int], dict[str, str]]) -> tuple[Path, dict[str, str]]:
    """A folder of two workers' homes as setup.sh leaves them, and the variables of a launch on them."""
    folder = tmp_path / "workers"
    for i in range(2):
        program = folder / str(i) / "appo_jax/.venv/bin/appo-jax"
        program.parent.mkdir(parents=True)
        program.symlink_to(Path(sys.executable).parent / "appo-jax")
    return folder, one_of(0, 2) | {"WORKERS": str(folder)} | POD


def printing(workers: Path, value: str) -> None:
    """Replace the workers' command by one that prints a value."""
    for i in range(2):
        program = workers / str(i) / "appo_jax/.venv/bin/appo-jax"
        program.unlink()
        program.write_text(f"#!{sys.executable}\nimport os, sys\nprint({value})\n")
        program.chmod(0o755)


def told(workers: Path, i: int) -> tuple[list[str], str]:
    """Exit codes of worker `i`'s processes, and what they printed."""
    return (workers / str(i) / "exits").read_text().split(), (workers / str(i) / "journal").read_text()


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_very_command_trains_on_two_workers(launch, workers, tiny: Config, tmp_path: Path):
    folder, variables = workers
    config = dataclasses.replace(
        tiny, steps=1, sft=dataclasses.replace(tiny.sft, steps=0), mesh=dataclasses.replace(tiny.mesh, fsdp=2)
    )
    save_config(config, tmp_path / "tiny.json")
    done, _ = launch(
        "run.sh", "--config", str(tmp_path / "tiny.json"), "--run-dir", str(tmp_path / "a run"), **variables
    )
    assert done.returncode == 0, done.stderr
    for i in range(2):
        assert told(folder, i)[0] == ["0"], told(folder, i)[1][-4000:]
    assert [record["step"] for record in read_metrics(tmp_path / "a run/metrics.jsonl")] == [1]
    assert (tmp_path / "a run/summary.json").exists()


@pytest.mark.long
def test_a_run_that_cannot_go_on_is_not_started_again(launch, workers, tiny: Config, tmp_path: Path):
    folder, variables = workers
    save_config(tiny, tmp_path / "tiny.json")  # its mesh is of one device, and there are two
    launch("run.sh", "--config", str(tmp_path / "tiny.json"), "--run-dir", str(tmp_path / "run"), **variables)
    launch("run.sh", "--config", str(tmp_path / "gone.json"), **variables)
    for i in range(2):
        exits, journal = told(folder, i)
        assert exits == ["2", "2"], journal
        assert "mesh" in journal
        assert "gone.json: no such file" in journal
        assert "Traceback" not in journal


def test_variables_reach_the_command_but_no_command_line(launch, workers):
    folder, variables = workers
    secret = """a "b" $HOME `c` \\d 'e' =f"""
    printing(folder, "[os.environ.get(n) for n in ('KEY', 'XLA_FLAGS')]")
    extra = {"TPU_ENV": "KEY XLA_FLAGS", "KEY": secret, "XLA_FLAGS": "--xla_a=1 --xla_b"}
    done, calls = launch("run.sh", "--config", "c.py", **(variables | extra))
    assert done.returncode == 0, done.stderr
    assert "xla_b" not in "".join(calls) + done.stdout
    for i in range(2):
        assert told(folder, i)[1] == f"{[secret, '--xla_a=1 --xla_b']}\n"
        assert (folder / str(i) / "appo_jax.env").stat().st_mode & 0o777 == 0o600
    launch("run.sh", "--config", "c.py", **variables)
    assert not (folder / "0/appo_jax.env").exists()
    done, calls = launch("run.sh", "--config", "c.py", TPU_ENV="KEY", **POD)
    assert (done.returncode, calls) == (2, [])
    assert "set KEY" in done.stderr


def test_arguments_reach_the_command_as_they_are(launch, workers):
    folder, variables = workers
    printing(folder, "sys.argv[1:]")
    given = ["--config", "c.py", "--data.system-prompt", "Write $$x^2$$, ${HOME} or `ls`.", "$PATH", "100 %", "'\"\\ "]
    done, _ = launch("run.sh", *given, **variables)
    assert done.returncode == 0, done.stderr
    assert told(folder, 1)[1] == f"{['train', *given]}\n"


def test_a_running_unit_keeps_its_variables(launch, workers):
    folder, variables = workers
    for i in range(2):
        (folder / str(i) / "state").write_text("activating\n")
        (folder / str(i) / "appo_jax.env").write_text('KEY="secret"\n')
    for extra in ({}, {"TPU_ENV": "KEY", "KEY": "another"}):
        done, _ = launch("run.sh", "--config", "c.py", **(variables | extra))
        assert done.returncode == 1
        assert "the unit appo runs" in done.stderr
    for i in range(2):
        assert (folder / str(i) / "appo_jax.env").read_text() == 'KEY="secret"\n'
        assert not list((folder / str(i)).glob("exits"))
        assert not list((folder / str(i)).glob("*.new"))


@pytest.mark.parametrize("state", ["active", "activating", "deactivating"])
def test_setup_leaves_the_package_of_a_running_unit_alone(launch, workers, state):
    """A unit that restarted in between could not import its package, and ended for good. If one of two workers runs, none is set
    up."""
    folder, variables = workers
    for i in range(2):
        (folder / str(i) / "appo_jax/appo_jax").mkdir()
    (folder / "1" / "state").write_text(f"{state}\n")
    done, calls = launch("setup.sh", **variables)
    assert done.returncode == 1
    assert "the unit appo runs; 'launch/stop.sh' ends it" in done.stderr
    assert not [call for call in calls if " scp " in call]
    assert all((folder / str(i) / "appo_jax/appo_jax").is_dir() for i in range(2))


def test_run_needs_a_command(launch):
    done, calls = launch("run.sh", **POD)
    assert (done.returncode, calls) == (2, [])
    assert "--config" in done.stderr


def test_stop_ends_the_run_or_gives_the_pod_back(launch):
    _, (call,) = launch("stop.sh", **POD)
    assert call.startswith(f"compute tpus tpu-vm ssh pod {WHERE} --worker all --command ")
    _, calls = launch("stop.sh", "delete", **POD)
    assert calls == [f"compute tpus queued-resources delete pod {WHERE} --force --quiet"]
    done, calls = launch("stop.sh", "destroy", **POD)
    assert (done.returncode, calls) == (2, [])


def test_stop_gives_a_run_the_time_that_it_needs(launch, workers):
    """The signal of a shutdown, which it sent before, begins stop_grace_seconds: the run gave up its step after 20 s."""
    folder, variables = workers
    for i, state in enumerate(("active", "activating")):  # the second waits for a restart, and hears no signal
        (folder / str(i) / "state").write_text(state)
    for _ in range(2):
        done, _ = launch("stop.sh", **variables)
        assert done.returncode == 0, done.stderr
        asked = [(folder / str(i) / "asked").read_text() for i in range(2)]
        assert asked == ["kill --kill-who main --signal HUP appo\n", "stop appo\n"]


def test_logs_follow_the_first_worker(launch):
    _, (call,) = launch("logs.sh", TPU_SLICES="2", **POD)
    assert call.startswith(f"compute tpus tpu-vm ssh pod-0 {WHERE} --worker 0 --command journalctl")
    assert call.endswith("--follow")


def test_logs_show_the_status_of_a_run(launch, workers, tmp_path):
    _, variables = workers
    run = tmp_path / "runs" / "a b"
    run.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    Status("failed", 20, time.time() - 130, {"0": {"step": 7, "phase": "update"}}, "host 3 is lost").write(run)
    done, (call,) = launch("logs.sh", "status", str(run.parent), **(variables | {"ONLY": "0"}))
    assert "--worker 0" in call
    assert f"{run}: failed, step 7 of 20, 2 min ago" in done.stdout, done.stderr
    assert "last error: host 3 is lost" in done.stdout
    (workers[0] / "0/appo_jax/here").symlink_to(run)
    done, _ = launch("logs.sh", "status", "here", **(variables | {"ONLY": "0"}))
    assert "here: failed, step 7 of 20" in done.stdout, done.stderr
    done, _ = launch("logs.sh", "status", **POD)
    assert done.returncode == 2


# asked, stopped, asked whether a unit runs, given the files, set up, started
STARTED = [f"tpu-vm {what}" for what in ("ssh", "ssh", "ssh", "scp", "ssh", "ssh")]


def verbs(calls: list[str]) -> list[str]:
    return [" ".join(call.split()[2:4]).removeprefix("queued-resources ") for call in calls]


def resume(launch, states: str, **env: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    return launch(
        "resume.sh", "--config", "c.py", states_told=states.replace(" ", "\n"), TPU_POLL="0", **POD, **KIND, **env
    )


def test_resume_leaves_a_living_pod_alone(launch):
    done, calls = resume(launch, "ACTIVE ", STARTED="pod")
    assert done.returncode == 0
    assert verbs(calls) == ["describe", "tpu-vm ssh"]
    assert "nothing to do" in done.stdout


def test_resume_starts_what_was_not_started_yet(launch):
    """An earlier call ended while the pod was being set up."""
    done, calls = resume(launch, "ACTIVE ")
    assert done.returncode == 0, done.stderr
    assert verbs(calls) == ["describe", *STARTED]
    assert "train --config c.py" in calls[-1]


def test_a_worker_is_given_the_command_once_a_boot(launch, workers):
    folder, variables = workers
    states = {"states_told": "ACTIVE\n", "NO_SETUP": "1", "TPU_POLL": "0"} | KIND | variables
    done, calls = launch("resume.sh", "--config", "gone.json", **states)
    assert done.returncode == 0, done.stderr
    done, calls = launch("resume.sh", "--config", "gone.json", **states)
    assert done.returncode == 3, done.stderr
    assert verbs(calls) == ["describe", "tpu-vm ssh"]
    assert "Result=exit-code ExecMainStatus=2" in done.stdout
    assert "gone.json: no such file" in done.stdout
    assert "CPU time" not in done.stdout  # which systemd says
    assert "the run has ended" in done.stderr
    assert [told(folder, i)[0] for i in range(2)] == [["2"], ["2"]]
    for i in range(2):
        (folder / str(i) / "state").write_text("activating\n")  # it waits for a restart
    done, _ = launch("resume.sh", "--config", "gone.json", **states)
    assert (done.returncode, "nothing to do" in done.stdout) == (0, True)
    for i in range(2):
        (folder / str(i) / "state").unlink()
    (folder / "1/appo_jax.started").write_text("another boot\n")
    _, calls = launch("resume.sh", "--config", "gone.json", **states)
    assert verbs(calls) == ["describe", *STARTED]


@pytest.mark.parametrize("state", ["active", "activating", "deactivating"])
@pytest.mark.parametrize("started", [None, "another boot\n"])
def test_a_unit_that_runs_is_left_alone_whoever_started_it(launch, workers, state, started):
    """~/appo_jax.started is missing for another user, or if ssh failed just after the start."""
    folder, variables = workers
    for i in range(2):
        (folder / str(i) / "state").write_text(f"{state}\n")
        if started:
            (folder / str(i) / "appo_jax.started").write_text(started)
    states = {"states_told": "ACTIVE\n", "NO_SETUP": "1", "TPU_POLL": "0"} | KIND | variables
    done, calls = launch("resume.sh", "--config", "c.py", **states)
    assert (done.returncode, "nothing to do" in done.stdout) == (0, True), done.stderr
    assert verbs(calls) == ["describe", "tpu-vm ssh"]
    assert not list(folder.glob("*/asked"))  # to stop


@pytest.mark.parametrize("state", ["WAITING_FOR_RESOURCES", "ACCEPTED", "CREATING", "PROVISIONING"])
def test_resume_keeps_the_place_of_a_request(launch, state):
    done, calls = resume(launch, f"{state} OFFLINE OFFLINE {state} ACTIVE ")
    assert done.returncode == 0, done.stderr
    assert verbs(calls) == ["describe"] * 5 + STARTED
    assert "Unable to connect" in done.stderr


def test_a_request_that_is_being_deleted_is_waited_for(launch):
    done, calls = resume(launch, "DELETING DELETING MISSING ACTIVE ")
    assert done.returncode == 0, done.stderr
    assert verbs(calls) == ["describe"] * 3 + ["create", "describe", *STARTED]


def test_a_cloud_that_never_answers_is_told(launch):
    done, calls = resume(launch, "OFFLINE " * 30)
    assert done.returncode == 1
    assert verbs(calls) == ["describe"] * 20


def test_resume_replaces_a_pod_that_was_taken_away(launch):
    done, calls = resume(launch, "SUSPENDED ACTIVE ", TPU_SPOT="1")
    assert done.returncode == 0, done.stderr
    assert verbs(calls) == ["describe", "delete", "create", "describe", *STARTED]
    assert "train --config c.py" in calls[-1]


def test_resume_makes_the_pod_that_is_not_there(launch):
    done, calls = resume(launch, "MISSING ACTIVE ")
    assert done.returncode == 0, done.stderr
    assert " create " in calls[1]


def test_a_sweep_has_a_worker_on_every_slice(launch):
    """One of three slices is active, one was taken away, and one was never created."""
    names = {"pod-0": "ACTIVE", "pod-1": "SUSPENDED", "pod-2": "MISSING"}
    states = "".join(f"{name} {state}\n{name} ACTIVE\n" for name, state in names.items())
    done, calls = launch(
        "sweep.sh",
        "--config",
        "a b.py",
        states_told=states,
        TPU_WORKERS="3",
        BY_NODE="1",
        STARTED="pod-0",
        **POD,
        **KIND,
    )
    assert done.returncode == 0, done.stderr
    asked = {name: verbs([call for call in calls if f" {name}" in call]) for name in names}
    assert asked["pod-0"] == ["describe", "tpu-vm ssh"]
    assert asked["pod-1"] == ["describe", "delete", "create", "describe", *STARTED]
    assert asked["pod-2"] == ["describe", "create", "describe", *STARTED]
    started = [call for call in calls if "systemd-run" in call]
    assert len(started) == 2
    assert all("appo-jax sweep --worker --config a\\ b.py" in call for call in started)
    assert all("APPO_DISTRIBUTED" not in call for call in started)  # each by itself


def test_a_sweep_names_the_slices_that_it_does_not_get(launch):
    states = "pod-0 ACTIVE\npod-1 MISSING\npod-1 FAILED\n"
    given = {"BY_NODE": "1", "TPU_WORKERS": "2"} | POD | KIND
    done, _ = launch("sweep.sh", "--config", "s.py", states_told=states, **given)
    assert done.returncode == 1
    assert "failed: pod-1;" in done.stderr


def test_a_sweep_that_lacks_a_variable_does_not_try_for_ever(launch):
    """Once, its exit code was 1, at which the loop in sweep.sh's header tries again."""
    done, calls = launch("sweep.sh", "--config", "s.py", **POD)
    assert (done.returncode, calls) == (2, [])
    assert done.stderr.count("set TPU_TYPE TPU_RUNTIME TPU_WORKERS") == 1
    states = "pod-0 ACTIVE\npod-1 ACTIVE\n"
    given = {"BY_NODE": "1", "TPU_ENV": "MISSING", "TPU_WORKERS": "2"} | POD | KIND
    done, _ = launch("sweep.sh", "--config", "s.py", states_told=states, **given)
    assert done.returncode == 2, done.stderr


def test_a_sweep_whose_workers_have_ended_has_ended(launch, workers):
    folder, variables = workers
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    for i, code in enumerate((0, 1)):
        (folder / str(i) / "appo_jax.started").write_text(boot)
        (folder / str(i) / "exits").write_text(f"{code}\n")
    states = {"states_told": "pod-0 ACTIVE\npod-1 ACTIVE\n", "BY_NODE": "1", "TPU_WORKERS": "2"} | KIND | variables
    done, _ = launch("sweep.sh", "--config", "s.py", **states)
    assert done.returncode == 3, done.stderr
    (folder / "1/state").write_text("active\n")
    done, _ = launch("sweep.sh", "--config", "s.py", **states)
    assert done.returncode == 0, done.stderr


def test_a_sweep_gives_its_slices_back(launch):
    _, calls = launch("sweep.sh", "delete", TPU_WORKERS="3", **POD, **KIND)
    assert sorted(calls) == [
        f"compute tpus queued-resources delete pod-{i} {WHERE} --force --quiet" for i in range(3)
    ]  # fmt: skip
    done, calls = launch("sweep.sh", "delete", **POD)  # of four slices, two would stay, and cost
    assert (done.returncode, calls) == (2, [])
    assert "set TPU_WORKERS" in done.stderr


def test_a_sweep_does_not_join_slices(launch):
    done, calls = launch("sweep.sh", "--config", "s.py", TPU_SLICES="2", **POD, **KIND)
    assert (done.returncode, calls) == (2, [])
    assert "TPU_WORKERS" in done.stderr


SWEEP = """
import dataclasses
from appo_jax.config_io import load_config
from appo_jax.sweep.definition import Sweep

base = load_config({base!r})
sweep = Sweep(
    out={out!r}, base=dataclasses.replace(base, eval=dataclasses.replace(base.eval, num_prompts=2, every=1)),
    space={{"branching.tau": (8.0, 32.0)}}, seeds=(0,), max_sampled_tokens=500,
)
"""


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_very_command_sweeps_on_two_slices(launch, workers, tiny: Config, tmp_path: Path):
    folder, variables = workers
    save_config(tiny, tmp_path / "base.json")
    out = tmp_path / "sweep"
    (tmp_path / "sweep.py").write_text(SWEEP.format(base=str(tmp_path / "base.json"), out=str(out)))
    alone = {name: value for name, value in variables.items() if not name.startswith(("OMPI_", "APPO_", "JAX_COORD"))}
    states = "".join(f"pod-{i} MISSING\npod-{i} ACTIVE\n" for i in range(2))
    done, _ = launch(
        "sweep.sh",
        "--config",
        str(tmp_path / "sweep.py"),
        states_told=states,
        BY_NODE="1",
        NO_SETUP="1",
        TPU_WORKERS="2",
        **alone,
        **KIND,
    )
    assert done.returncode == 0, done.stderr
    for i in range(2):
        assert told(folder, i)[0] == ["0"], told(folder, i)[1][-4000:]
    command = [sys.executable, "-m", "appo_jax", "sweep", "--config", str(tmp_path / "sweep.py"), "--report"]
    subprocess.run(command, check=True, timeout=100, stdout=subprocess.DEVNULL)
    report = json.loads((out / "sweep.json").read_text())
    assert [trial["state"] for trial in report["trials"]] == ["COMPLETE"] * 2
