"""The checks of `appo-jax doctor`: what this machine can do."""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import os
import platform
import resource
import shutil
import subprocess
import sys
import time

import jax

from appo_jax.config import PythonToolConfig
from appo_jax.errors import ToolError
from appo_jax.tools.attacks import try_attacks
from appo_jax.tools.python import PythonTool
from appo_jax.tools.sandbox import seccomp
from appo_jax.types import Outcome

SECONDS = 10.0  # for a command that is tried
DOCKER = (
    "docker run --security-opt seccomp=unconfined --security-opt apparmor=unconfined "
    "--security-opt systempaths=unconfined"
)


@dataclasses.dataclass(frozen=True)
class Check:
    """A check. `detail` says what was found and, if it is not ok, what to do."""

    name: str
    ok: bool
    detail: str


def probe() -> list[Check]:
    """Check the devices and everything that the Python tool needs, call the tool, and try the critical attacks on it.
    Takes some seconds."""
    checks = [
        _devices(),
        _bubblewrap(),
        _namespaces(),
        _seccomp(),
        _limits(),
        _preload(),
        _try("bubblewrap"),
        _try("process"),
    ]
    if checks[-2].ok:
        checks += _attacks()
    return checks


def _devices() -> Check:
    """The devices that JAX uses."""
    try:
        devices = jax.devices()
    except Exception as error:  # JAX raises more than one type
        return Check(
            "devices", False, f"{error or type(error).__name__}; JAX_PLATFORMS is {os.environ.get('JAX_PLATFORMS')!r}"
        )
    kinds = collections.Counter(f"{device.platform} {device.device_kind}" for device in devices)
    detail = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    if "cpu" in {device.platform for device in devices}:
        detail += f", {len(os.sched_getaffinity(0))} cores"
    return Check("devices", True, f"{detail} (JAX {jax.__version__})")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """A command that should take a moment; one that hangs or cannot be started has failed."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no answer within {SECONDS:g} s")
    except OSError as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def _bubblewrap() -> Check:
    path = shutil.which("bwrap")
    if path is None:
        return Check("bubblewrap", False, "bwrap is not on the PATH: apt-get install bubblewrap")
    version = _run([path, "--version"]).stdout.strip()
    return Check("bubblewrap", True, f"{version} at {path}")


def _namespaces() -> Check:
    if shutil.which("bwrap") is None:
        return Check("user namespaces", False, "cannot be tried without bubblewrap")
    command = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"]
    tried = _run(command)
    if tried.returncode == 0:
        return Check("user namespaces", True, "a process without privileges may make them")
    advice = "allow them: sysctl -w kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu 23.10 and later), or "
    advice += f"kernel.unprivileged_userns_clone=1 (older Debian); in Docker: {DOCKER}"
    return Check("user namespaces", False, f"refused ({tried.stderr.strip()}); {advice}")


def _seccomp() -> Check:
    """Installs the filter in a child process, because it cannot be removed again."""
    release, machine = platform.release(), platform.machine()
    if not seccomp.ARCHITECTURE:
        return Check("seccomp", False, f"no system-call filter for {machine}; expected x86_64 or aarch64")
    code = "from sandbox import seccomp; print(seccomp.install())"
    folder = os.path.dirname(os.path.dirname(os.path.abspath(seccomp.__file__)))
    started = [sys.executable, "-S", "-B", "-c", f"import sys; sys.path.append({folder!r}); {code}"]
    tried = _run(started)
    if tried.returncode == 0:
        return Check("seccomp", True, f"filters with user notification on Linux {release}, {machine}")
    last = (tried.stderr.strip().splitlines() or ["no message"])[-1]
    return Check("seccomp", False, f"refused ({last}); Linux {release}: 5.5 or later is needed, outside of gVisor")


def _limits() -> Check:
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)  # the sandbox raises its own limit to the hard one
    enough = files >= 1024 or files == resource.RLIM_INFINITY
    detail = f"open files {'unlimited' if files == resource.RLIM_INFINITY else files}: a sandbox of n live states needs about 2n"
    return Check(
        "resource limits", enough, detail if enough else f"{detail}; raise the hard limit (ulimit -Hn, as root)"
    )


def _preload() -> Check:
    missing = [name for name in PythonToolConfig().preload if importlib.util.find_spec(name) is None]
    if missing:
        return Check("python modules", False, f"{', '.join(missing)}: pip install them, or change tools.python.preload")
    return Check("python modules", True, ", ".join(PythonToolConfig().preload))


def _attacks() -> list[Check]:
    try:
        return [
            Check(f"attack: {attack.name}", attack.held, attack.detail if attack.held else f"not held: {attack.detail}")
            for attack in try_attacks()
        ]
    except ToolError as error:
        return [Check("attacks", False, str(error))]


def _try(isolation: str) -> Check:
    name = f"python tool, isolation {isolation}"
    began = time.monotonic()
    try:
        tool = PythonTool(PythonToolConfig(isolation=isolation, preload=("math",)))  # type: ignore[arg-type]
    except (ToolError, OSError) as error:
        return Check(name, False, str(error))
    try:
        started = time.monotonic() - began
        result, _ = tool.call(tool.start(), "6 * 7")
        ok = result.outcome is Outcome.OK and result.text == "42"
        return Check(name, ok, f"started in {started:.2f} s" if ok else f"6 * 7 gave {result.text!r}")
    finally:
        tool.close()
