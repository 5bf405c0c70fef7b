"""Messages when a resource of the machine is exhausted. The errors are real ones of the system, which are provoked here."""

from __future__ import annotations

import errno
import http.server
import json
import os
import re
import resource
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tensorstore
from jax.errors import JaxRuntimeError

from appo_jax import distributed, failures, heartbeat
from appo_jax.checkpoint_items import not_written
from appo_jax.errors import AppoError, ConfigError, DataError


def caught(action) -> Exception:
    with pytest.raises(Exception) as error, heartbeat.phase("branch"):  # noqa: PT011
        action()
    return error.value


def fill_a_disk() -> None:
    with open("/dev/full", "w") as file:
        file.write("x")


def open_too_many(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 20, hard))
    try:
        files += [open(tmp_path / str(i), "w") for i in range(1000)]  # noqa: SIM115
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for file in files:
            file.close()


def because(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def of_tensorstore(number: int) -> Exception:
    """The error of a file that cannot be opened, with another number."""
    with pytest.raises(ValueError, match="os_error_code='2'") as error:
        tensorstore.KvStore.open({"driver": "file", "path": "/proc/self/"}).result().write("x", b"").result()
    return ValueError(str(error.value).replace("code='2'", f"code='{number}'"))


def test_memory_of_a_device() -> None:
    said = failures.explain(caught(lambda: jnp.zeros((1 << 45,), jnp.float32).block_until_ready()))
    for part in (
        "out of memory",
        "phase 'branch'",
        "requested",
        "GiB left",
        "rollout.decode_rows",
        "optimizer.micro_batch",
    ):
        assert part in said


def test_memory_of_the_host() -> None:
    assert "out of memory" in failures.explain(caught(lambda: bytearray(1 << 55)))


def test_a_failure_keeps_the_phase_in_which_it_was_raised() -> None:
    error = caught(lambda: jnp.zeros((1 << 45,), jnp.float32).block_until_ready())
    failures.report(error)
    with heartbeat.phase("checkpoint"):  # the clean-up
        pass
    assert "phase 'branch'" in failures.explain(error)


def test_an_error_of_a_connection_is_not_one_of_a_file() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = free.getsockname()
    for action in (
        lambda: socket.create_connection(closed),
        lambda: urllib.request.urlopen("http://{}:{}/".format(*closed)),
        lambda: socket.getaddrinfo("host.invalid", 80),
    ):
        error = caught(action)
        assert not failures.is_understood(error)
        said = failures.explain(error)
        assert said.startswith(f"{type(error).__name__} in step 1, phase 'branch': ")
        assert "disk" not in said
    assert not failures.is_understood(TimeoutError())


def test_a_full_disk() -> None:
    said = failures.explain(caught(fill_a_disk))
    assert "No space left on device in step" in said
    assert "free some space, or give --run-dir on another disk" in said
    assert "The run goes on" not in said  # nobody starts it again


def test_too_many_open_files(tmp_path: Path) -> None:
    said = failures.explain(caught(lambda: open_too_many(tmp_path)))
    assert "Too many open files" in said
    assert "raise the limit on open files (ulimit -n" in said


@pytest.mark.parametrize("path", ["/proc/1/mem/x", "/sys/kernel/x", "/nowhere/x"])
def test_a_file_that_cannot_be_written_is_named(path: str) -> None:
    error = caught(lambda: Path(path).write_text("x"))
    assert path in failures.explain(error)
    assert failures.exit_code(error) == 1


@pytest.mark.parametrize(
    ("action", "said"),
    [
        (
            lambda file: file.mkdir(exist_ok=True),
            "File exists; expected a folder, or a name that is free: give another",
        ),
        (lambda file: (file / "x").write_text(""), "Not a directory; a part of the path is a file; expected folders"),
        (lambda file: file.parent.read_text(), "Is a directory; expected a file, not a folder: give another path"),
        (lambda file: (file.parent / "nothing").read_text(), "No such file or directory; check the path"),
    ],
)
def test_a_path_of_a_command_without_steps_is_told_without_a_step(action, said, tmp_path: Path) -> None:
    file = tmp_path / "pred.jsonl"
    file.touch()
    with pytest.raises(OSError) as error:  # noqa: PT011
        action(file)
    assert failures.explain(error.value).partition(": ")[2].startswith(said)


def test_too_many_threads() -> None:
    """Run as a user that has a limit, because root has none."""
    program = """
import os, resource, threading
from appo_jax import failures
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
os.setuid(65533)
try:
    for _ in range(100):
        threading.Thread(target=threading.Event().wait, daemon=True).start()
except RuntimeError as error:
    print(failures.explain(error), failures.exit_code(error), flush=True)
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "no more threads or processes: " in done.stdout, done
    assert "tools.max_concurrency" in done.stdout
    assert done.stdout.rstrip().endswith(" 1")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2), (DataError("x"), 1), (ValueError("a reward's own"), 1), (KeyboardInterrupt(), 130),
        (JaxRuntimeError("UNAVAILABLE: connection to the coordinator"), 75),
        (JaxRuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out with key: appo_jax/supervisor"), 75),
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"), 75),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"), 1),
        (ValueError("the barrier of language, said the heartbeat"), 1),
        (not_written(Path("c"), JaxRuntimeError("UNAVAILABLE: connection to the coordinator")), 75),
        (not_written(Path("c"), OSError(28, "No space left on device")), 1),
        (not_written(Path("c"), OSError(errno.EIO, "Input/output error")), 75),
        (not_written(Path("c"), of_tensorstore(errno.EIO)), 75),
        (not_written(Path("c"), of_tensorstore(errno.ENOSPC)), 1),
        (OSError(errno.ESTALE, "Stale file handle"), 75),
        (OSError(errno.ETIMEDOUT, "Connection timed out", "/mnt/shared/runs/metrics.jsonl"), 75),
        (TimeoutError(errno.ETIMEDOUT, "Connection timed out"), 1),  # of a socket
        # Errors of a user's data source, reward or tool that read like those of JAX.
        (RuntimeError("Connection refused by hub.example"), 1),
        (RuntimeError("UNAVAILABLE: connection to the coordinator"), 1),
        (ValueError("UNAVAILABLE: try later"), 1),
        (because(DataError("the data source raises"), RuntimeError("connection reset by peer")), 1),
    ],
)  # fmt: skip
def test_exit_codes(error: BaseException, code: int) -> None:
    assert failures.exit_code(error) == code


NO_TPU = """
import json, sys
import jax
from jax._src import xla_bridge
from appo_jax import failures

reasons = json.loads(sys.argv[1])

def start():
    raise jax.errors.JaxRuntimeError(reason)

xla_bridge.register_backend_factory("fake_tpu", start)
jax.config.update("jax_platforms", "fake_tpu,cpu")  # as jax does on a TPU VM, with "tpu"
said = []
for reason in reasons:
    try:
        jax.devices()
    except RuntimeError as error:
        said.append((failures.exit_code(error), failures.may_follow_from_another_host(error), failures.explain(error)))
print(json.dumps(said))
"""


def test_a_device_that_does_not_start_for_the_moment_is_tried_again() -> None:
    """JAX's own error names neither the type nor the cause of what the TPU's driver raised."""
    for_now = [
        "UNAVAILABLE: TPU initialization failed: Barrier timed out",
        "ABORTED: The TPU is already in use by process with pid 4711",
        "DEADLINE_EXCEEDED: the other hosts did not answer",
    ]
    for_good = "NOT_FOUND: No TPU platform available"
    env = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-c", NO_TPU, json.dumps([*for_now, for_good])], capture_output=True, text=True, timeout=100,
        env=env,
    )  # fmt: skip
    *found, last = json.loads(done.stdout)
    for reason, (code, secondary, said) in zip(for_now, found, strict=True):
        assert (code, secondary) == (75, True)
        assert reason in said
        assert "install" not in said
    assert last[:2] == [1, False]
    assert "JAX has no such device on this machine" in last[2]
    assert "install JAX for it" in last[2]


JOIN = """
import os
import jax  # takes this for a TPU VM, because JAX_FORCE_TPU_INIT is set
os.environ.pop("TPU_SKIP_MDS_QUERY", None)  # jax sets it where it sees no chip
from appo_jax import distributed, failures
try:
    distributed.initialize()
except Exception as error:
    print(failures.exit_code(error), error)
"""


def test_a_metadata_server_that_does_not_answer_for_the_moment_is_asked_again() -> None:
    """JAX then finds no cluster, as on a machine that is not part of one."""
    pytest.importorskip("requests")  # with which jax asks
    asked = []

    class Unavailable(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(503)

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Unavailable) as server:
        threading.Thread(target=server.serve_forever).start()
        address = f"127.0.0.1:{server.server_port}"
        variables = {"APPO_DISTRIBUTED": "1", "JAX_FORCE_TPU_INIT": "1", "GCE_METADATA_IP": address}
        done = subprocess.run(
            [sys.executable, "-c", JOIN], capture_output=True, text=True, timeout=100, env=os.environ | variables
        )
        server.shutdown()
    assert any("agent-worker-number" in path for path in asked)
    assert done.stdout.startswith("75 the other hosts cannot be joined now"), done


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("coordinator_address should be defined."), 2),
        (RuntimeError("Failed to recognize coordinator address t1v-n-0"), 75),  # its name is not known yet
        (ConnectionError("HTTPConnectionPool(host='metadata.google.internal', port=80): Max retries exceeded"), 75),
    ],
)  # fmt: skip
def test_a_host_that_cannot_join_yet_is_started_again(monkeypatch, error, code):
    """`error` is what JAX raises. Each was final, so the host was not started again, and the others waited for it in vain."""

    def initialize(**_):
        raise error

    monkeypatch.setenv("APPO_DISTRIBUTED", "1")
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(AppoError, match=r"other hosts cannot be joined.*" + re.escape(str(error))) as told:
        distributed.initialize()
    assert failures.exit_code(told.value) == code


def test_an_error_is_explained_where_the_working_directory_is_gone(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert "ZeroDivisionError" in failures.explain(caught(lambda: 1 // 0))
