"""A soak test of the Python tool through the executor, as a run uses it: `soak(calls)`; `python benchmarks/tools_soak.py KIND`.

Honest rollouts make ten calls, some of them from earlier states. At the same time, hostile rollouts of all kinds below run. The
test counts the honest calls that were lost (without the right answer), their rate compared with that without hostile rollouts,
and, for each minute, processes, descriptors and memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import random
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from appo_jax.config import PythonToolConfig, ToolsConfig
from appo_jax.tools.build import build_executor
from appo_jax.tools.executor import ToolExecutor
from appo_jax.tools.python import PythonTool
from appo_jax.tools.sandbox.system import descendants, parent_of
from appo_jax.types import Outcome

HOSTILE_SHARE = 0.05  # of the rollouts
LENGTH = 10  # calls of an honest rollout
CONCURRENT_ROLLOUTS = 16

_INNER = "import sys, os\ninner, system = sys.modules['sandbox.interpreter'], sys.modules['sandbox.system']\n"
# Kind of a hostile rollout -> the code of its calls, in their order.
KINDS: dict[str, Sequence[str]] = {
    "endless_loop": ("while True: pass",),
    "sleep": ("import time\ntime.sleep(100)",),
    "memory": ("x = []\nwhile True: x.append(bytearray(10**7))",),
    "memory_kept": ("x = bytearray(120 << 20)\nfor i in range(0, len(x), 4096): x[i] = 1", "y = 1", "z = 1"),
    "fork": ("import os\nos.fork()",),
    "exit": ("import os\nos._exit(1)", "import os\nos.abort()"),
    "crash": ("import ctypes\nctypes.string_at(0)",),
    "flood": ("while True: print('x' * 1000)",),
    "processor_limit": ("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 1))", "1 + 1"),
    "every_limit": (
        "import resource as r\nfor k in range(16):\n    try: r.setrlimit(k, (0, 0))\n    except (ValueError, OSError): pass",
        "1 + 1",
    ),
    "deaf": (
        "import os\nos.write(60, b'd')\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "#" + "x" * 95_000, "#" + "x" * 95_000, "#" + "x" * 95_000,
    ),
    "forged_reports": ("import os\nfor _ in range(10**4): os.write(60, b'd')", "1"),
    "closed_channel": ("import os\nos.closerange(3, 64)", "1", "1"),
    "no_files": (_INNER + "inner._take_files = lambda *_: None", "open('x', 'w').write('x')", "1"),
    "no_namespace": (_INNER + "inner._take_files = lambda *_: system.ask_for_mount()", "1"),
    "moved_proc": (
        _INNER + "import ctypes\nlibc = ctypes.CDLL(None)\ndef take(*_):\n    system.unshare(0x20000)\n    os.mkdir('/tmp/p')\n"
        "    libc.syscall(429, -100, b'/proc', -100, b'/tmp/p', 0)\ninner._take_files = take", "1",
    ),
    "no_child": (_INNER + "os.fork = lambda: 0", "1", "1"),
    "silent_child": (_INNER + "def evil(*_):\n    while True: pass\ninner._cell = evil", "1"),
    "dead_parent": (
        _INNER + "import ctypes\nfork = os.fork\nos.fork = lambda: fork() and ctypes.string_at(0)", "1", "1",
    ),
    "files": ("for i in range(100): open(str(i), 'wb').write(bytes(1 << 18))", "1"),
    "unreadable": ("import os\nopen('f', 'w').close(); os.chmod('f', 0)", "1"),
    "descriptors": ("f = [open('/dev/null') for _ in range(60)]", "1"),
    "sockets": ("import socket\nsocket.socket()", "import socket\ns = socket.socketpair()\ns[0].sendmsg([b'x'])"),
    "mounts": ("import ctypes\nl = ctypes.CDLL(None)\nl.mount(b'none', b'/tmp', b'tmpfs', 0, 0); l.umount2(b'/proc', 2)",),
    "finaliser": ("class A:\n    def __del__(self):\n        while True: pass\na = A()", "del a", "1"),
}  # fmt: skip


class Soak:
    """Runs rollouts on one executor and counts their results. `kinds`: of hostile rollouts; `share`: of hostile ones, 0 to 1."""

    def __init__(self, kinds: Sequence[str], share: float):
        config = PythonToolConfig(timeout=1.0, memory_mb=256)
        self.executor: ToolExecutor = build_executor(ToolsConfig(enabled=("python",), python=config))
        tool = self.executor._tools["python"]
        assert isinstance(tool, PythonTool)
        self.tool = tool
        self._kinds, self._share = kinds, share
        self._lock = threading.Lock()
        self.honest = self.hostile = self.hostile_rollouts = self.rollouts = 0
        self.lost: list[str] = []
        self.minutes: list[dict[str, float]] = []

    def run(self, calls: int, seed: int = 0) -> float:
        """Run rollouts until `calls` honest calls have been made. Returns the time in seconds."""
        stop = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(stop,))
        watcher.start()
        began = time.perf_counter()
        numbers = iter(range(10**9))

        def work(_: int) -> None:
            while self.honest < calls:
                with self._lock:
                    number = next(numbers)
                self._rollout(number, random.Random(seed * 10**9 + number))

        with ThreadPoolExecutor(CONCURRENT_ROLLOUTS) as pool:
            list(pool.map(work, range(CONCURRENT_ROLLOUTS)))
        seconds = time.perf_counter() - began
        stop.set()
        watcher.join()
        return seconds

    def _call(self, states: Any, code: str) -> Any:
        return self.executor.submit(states, f"<python>{code}</python>", bound=600.0).result()

    def _rollout(self, number: int, rng: random.Random) -> None:
        """Run rollout `number`, which is hostile or honest according to its number."""
        with self._lock:
            self.rollouts += 1
        hostile_before = math.ceil(number * self._share)
        if math.ceil((number + 1) * self._share) > hostile_before:
            with self._lock:
                self.hostile_rollouts += 1
            states = self.executor.start()
            for code in KINDS[self._kinds[hostile_before % len(self._kinds)]]:
                states = self._call(states, code).states
                with self._lock:
                    self.hostile += 1
            return
        states_and_values = [(self.executor.start(), 0)]  # states of the tools, and the value of x in each
        for i in range(LENGTH):
            states, value = rng.choice(states_and_values[-3:])
            step = rng.randrange(100)
            code = f"x = globals().get('x', 0) + {step}\nx"
            if i % 4 == 3:
                code = f"open('x', 'w').write(str(x))\n{code}"
            elif i == 0:
                code = f"import math\n{code}"
            if i % 4 == 3 and states is states_and_values[0][0]:
                code = f"x = 0\n{code}"
            record = self._call(states, code)
            right = record.outcome is Outcome.OK and record.result.split()[-1:] == [str(value + step)]
            with self._lock:
                self.honest += 1
                if not right:
                    self.lost.append(f"{record.outcome}: {record.result[-300:]}")
            if right:
                states_and_values.append((record.states, value + step))

    def _watch(self, stop: threading.Event) -> None:
        """Record the maximum of each count in every minute, until `stop` is set."""
        minute: list[dict[str, float]] = []
        began = time.monotonic()
        while True:
            stopped = stop.wait(5.0)
            minute.append(self.counts())
            if stopped or time.monotonic() - began >= 60.0:
                self.minutes.append({key: max(counts[key] for counts in minute) for key in minute[0]})
                minute, began = [], time.monotonic()
            if stopped:
                return

    def counts(self) -> dict[str, float]:
        """The current numbers of processes, descriptors and threads, and the memory of the sandbox in MiB."""
        sandbox_pids = descendants(self.tool.pid)
        supervisor = [pid for pid in sandbox_pids if parent_of(pid) == self.tool.pid]
        return {
            "processes": len(sandbox_pids),
            "sandbox_descriptors": sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in supervisor),
            "descriptors": len(os.listdir("/proc/self/fd")),
            "threads": threading.active_count(),
            "memory_mb": round(sum(map(pss, sandbox_pids)) / 2**20, 1),
        }

    def settled(self, limit: float = 10.0) -> dict[str, float]:
        """The counts when no rollout lives: then only two processes are left, the supervisor and state 0. Waits at most `limit`
        seconds for this."""
        gc.collect()
        end = time.monotonic() + limit
        while (counts := self.counts())["processes"] > 2 and time.monotonic() < end:
            time.sleep(0.2)
        return counts


def soak(calls: int, kinds: Sequence[str] = tuple(KINDS), share: float = HOSTILE_SHARE) -> dict[str, Any]:
    """Run the test with `calls` honest calls. Returns its figures for benchmarks/results/tools.json."""
    before = {"threads": threading.active_count(), "fds": len(os.listdir("/proc/self/fd")), "temp": _temporary()}
    plain = Soak(kinds, 0.0)
    plain.run(max(500, calls // 20), seed=1)  # warm-up
    plain.honest = 0
    plain_rate = calls // 4 / plain.run(calls // 4, seed=2)
    plain.executor.close()
    assert not plain.lost, plain.lost[:3]
    hostile = Soak(kinds, share)
    pid = hostile.tool.pid
    hostile.run(max(200, calls // 100), seed=3)
    start = hostile.settled()
    hostile.honest = hostile.hostile = hostile.rollouts = hostile.hostile_rollouts = 0
    hostile.minutes.clear()
    seconds = hostile.run(calls, seed=4)
    end = hostile.settled()
    figures: dict[str, Any] = {
        "soak_calls": hostile.honest + hostile.hostile,
        "honest_calls": hostile.honest,
        "honest_calls_lost": len(hostile.lost),
        "hostile_share": hostile.hostile_rollouts / hostile.rollouts,
        "hostile_kinds": len(kinds),
        "throughput_ratio": hostile.honest / seconds / plain_rate,
        "soak_calls_per_s": hostile.honest / seconds,
        "soak_sandbox_restarted": int(hostile.tool.pid != pid),
        "soak_minutes": hostile.minutes,
        "soak_left_processes": end["processes"] - 2,
        "soak_left_sandbox_fds": end["sandbox_descriptors"] - start["sandbox_descriptors"],
        "soak_memory_mb_start": start["memory_mb"],
        "soak_memory_mb_end": end["memory_mb"],
    }
    for line in hostile.lost[:10]:
        print("LOST", line)
    hostile.executor.close()
    time.sleep(0.5)
    return figures | {
        "soak_left_fds": len(os.listdir("/proc/self/fd")) - before["fds"],
        "soak_left_threads": threading.active_count() - before["threads"],
        "soak_left_temp_files": _temporary() - before["temp"],
    }


def pss(pid: int) -> int:
    """The proportional set size of a process in bytes; 0 if it has ended."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return 0


def _temporary() -> int:
    """The number of our files and folders in the folder of temporary files."""
    return len([name for name in os.listdir(tempfile.gettempdir()) if name.startswith("appo-")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []], help="kinds of hostile rollouts; by default all")
    parser.add_argument("--calls", type=int, default=2000, help="number of honest calls")
    parser.add_argument("--share", type=float, default=HOSTILE_SHARE, help="share of hostile rollouts, 0 to 1")
    arguments = parser.parse_args()
    print(json.dumps(soak(arguments.calls, arguments.kinds or tuple(KINDS), arguments.share), indent=2))


if __name__ == "__main__":
    main()
