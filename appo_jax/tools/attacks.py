"""Tries the most critical attacks on the sandbox on this machine: the last checks of `appo-jax doctor`. They attack only a
sandbox that is started here, and processes of the same user.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from appo_jax.config import PythonToolConfig, ToolsConfig
from appo_jax.errors import ToolError
from appo_jax.tools.executor import ToolExecutor
from appo_jax.tools.python import PythonTool
from appo_jax.tools.sandbox.system import descendants, is_running
from appo_jax.types import Outcome

_PATCH = """
import ctypes, os, sys
inner, system = sys.modules["sandbox.interpreter"], sys.modules["sandbox.system"]
libc, take = ctypes.CDLL(None, use_errno=True), inner._take_files
def patched(*arguments):
    for attempt in (
        lambda: system.unshare(0x20000), lambda: os.mkdir("/tmp/p"),
        lambda: libc.syscall(429, -100, b"/proc", -100, b"/tmp/p", 0), lambda: libc.umount2(b"/proc", 2),
        lambda: libc.mount(b"", b"/dev/null", b"", 32 | 4096, 0), lambda: take(*arguments),
    ):
        try: attempt()
        except OSError: pass
inner._take_files = patched
"""
_HOST = """
import os
got = [path for path in ("/proc/sys", "/proc/1", "/tmp/p/1", "/sys", "/root/.ssh", "/etc/shadow") if os.path.exists(path)]
for path in ("/dev/null", "/dev/urandom"):
    for change in (lambda: os.chmod(path, 0o666), lambda: os.utime(path)):
        try: change(); got.append(path)
        except OSError: pass
print(got)
"""
_DEAF = "import os\nos.write(60, b'd')\nwhile True:\n    try: os.fork()\n    except OSError: pass"
_LIMIT = "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 1))"
_TRAINER = (
    "import sys, threading\nfrom appo_jax.config import PythonToolConfig\nfrom appo_jax.tools.python import PythonTool\n"
    "tool = PythonTool(PythonToolConfig(preload=('math',), timeout=60))\nprint(tool.pid, flush=True)\n"
    "threading.Thread(target=tool.call, args=(tool.start(), 'while True: pass'), daemon=True).start()\n"
    f"state = tool.call(tool.start(), {_DEAF!r})[1]\n"
    "for _ in range(8): threading.Thread(target=tool.call, args=(state, '#' + 'x' * 90_000), daemon=True).start()\n"
    "threading.Event().wait(60)"
)


@dataclasses.dataclass(frozen=True)
class Attack:
    """An attack and its outcome. `held`: the sandbox withstood it."""

    name: str
    held: bool
    detail: str


def try_attacks() -> list[Attack]:
    """Run the critical attacks. Takes some seconds. Raises ToolError if the sandbox does not start."""
    tried: dict[str, Callable[[PythonTool], str]] = {
        "a write to the host": _host,
        "a state that limits its own processor time": _limit,
        "a state that does not read its requests": _deaf,
        "a state that breaks its channel": _broken,
    }
    found = []
    for name, attack in tried.items():
        with _sandbox() as tool:
            pid, (_, victim) = tool.pid, tool.call(tool.start(), "secret = 42")
            problem = attack(tool)
            if not problem and tool.call(victim, "secret")[0].text != "42":
                problem = "another rollout has lost its state"
            if not problem and tool.pid != pid:
                problem = "the sandbox had to be restarted"
        found.append(Attack(name, not problem, problem or "held"))
    for name, check in (("rollouts that have ended", _released), ("a trainer that is killed", _killed)):
        problem = check()
        found.append(Attack(name, not problem, problem or "held"))
    return found


@contextlib.contextmanager
def _sandbox() -> Iterator[PythonTool]:
    tool = PythonTool(PythonToolConfig(preload=("math",), timeout=1.0))
    try:
        yield tool
    finally:
        tool.close()


def _host(tool: PythonTool) -> str:
    _, state = tool.call(tool.start(), _PATCH)
    for start in (state, tool.start()):
        result, _ = tool.call(start, _HOST)
        if result.outcome is Outcome.OK and result.text != "[]":
            return f"policy code got at {result.text}"
    return ""


def _limit(tool: PythonTool) -> str:
    result, _ = tool.call(tool.call(tool.start(), _LIMIT)[1], "1 + 1")
    return "" if result.text == "2" else f"the call after it gave {result.text!r}"


def _deaf(tool: PythonTool) -> str:
    _, state = tool.call(tool.start(), _DEAF)
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(tool.call, state, "#" + "x" * 95_000) for _ in range(8)]
        began = time.monotonic()
        result, _ = tool.call(tool.start(), "1 + 1")
        seconds = time.monotonic() - began
        for call in calls:
            call.result()
    return "" if result.text == "2" and seconds < 5.0 else f"another rollout waited {seconds:.1f} s: {result.text!r}"


def _broken(tool: PythonTool) -> str:
    _, state = tool.call(tool.start(), "import os\nos.closerange(3, 64)")
    outcomes = {tool.call(state, "1")[0].outcome for _ in range(6)}
    return "it counts as a failure of the tool" if Outcome.UNAVAILABLE in outcomes else ""


def _released() -> str:
    config = ToolsConfig(enabled=("python",))
    with _sandbox() as tool, ToolExecutor([tool], config) as executor:
        alone = len(descendants(tool.pid))
        for i in range(8):
            executor.submit(
                executor.start(), executor.call_format.render_call("python", f"x = {i}"), bound=600.0
            ).result()
        gc.collect()
        return _until(
            lambda: len(descendants(tool.pid)) <= alone, "interpreters of rollouts that have ended stay alive"
        )


def _killed() -> str:
    trainer = subprocess.Popen(
        [sys.executable, "-c", _TRAINER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert trainer.stdout is not None
    assert trainer.stderr is not None
    with trainer, trainer.stdout as out:
        line = out.readline()
        if not line:
            raise ToolError(f"a trainer does not start: {trainer.stderr.read()[-1000:]}")
        time.sleep(1.0)
        left = descendants(int(line)) | {int(line)}
        trainer.send_signal(signal.SIGKILL)
    return _until(lambda: not any(map(is_running, left)), "processes of its sandbox outlive it")


def _until(condition: Callable[[], bool], problem: str) -> str:
    end = time.monotonic() + 5.0
    while not condition():
        if time.monotonic() > end:
            return problem
        time.sleep(0.05)
    return ""
