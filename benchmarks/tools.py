"""Figures of the tools on this machine: `python benchmarks/tools.py [--data DIR] [--soak N]`.

Writes benchmarks/results/tools.json: python calls per second (set-up of each rollout and one fork in six calls
included), latency at half that load, memory of 300 live rollouts, search speed and recall, and a soak of N calls, 5% of
them hostile, with what is left over afterwards.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from appo_jax.config import PythonToolConfig
from appo_jax.tools.python import PythonTool
from appo_jax.tools.sandbox.system import descendants
from appo_jax.tools.search import LocalSearch, load_corpus
from appo_jax.types import Document, Outcome

CELLS = (
    "import math\nx = math.comb({n}, 3)\nprint(x)",
    "values = [x * i % 97 for i in range({n})]\nsum(values)",
    "from fractions import Fraction\ny = Fraction(x, {n})\nprint(y)",
    "def f(k):\n    return k * y\nf({n})",
    "sorted(values)[:5]",
)
HOSTILE = (
    "while True: pass", "import os\nos.fork()", "x = []\nwhile True: x.append(bytearray(10**7))",
    "import os\nos._exit(1)", "import ctypes\nctypes.string_at(0)", "while True: print('x' * 1000)",
    "import os\nos.write(60, b'd')\nwhile True: pass",
    "open('f', 'wb').write(bytes(1 << 22))", "import socket\nsocket.socket()", "import os\nos.closerange(3, 64)",
)  # fmt: skip


def rollout(tool: PythonTool, n: int) -> list[float]:
    """Five calls in a row and one from an earlier state; returns their latencies in seconds."""
    seconds, states = [], [tool.start()]
    for i in range(6):
        began = time.perf_counter()
        start = states[2] if i == 5 else states[i]
        result, state = tool.call(start, CELLS[i % 5 if i < 5 else 2].format(n=n % 90 + 5))
        seconds.append(time.perf_counter() - began)
        assert result.outcome is Outcome.OK, result
        states.append(state)
    return seconds


def calls_per_second(tool: PythonTool, rollouts: int = 300, workers: int = 4) -> float:
    began = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda n: rollout(tool, n), range(rollouts)))
    return 6 * rollouts / (time.perf_counter() - began)


def latency_at(tool: PythonTool, rate: float, seconds: float = 6.0) -> dict[str, float]:
    """Latencies when rollouts arrive at random times (a Poisson process) that make `rate` calls a second."""
    rng, latencies = random.Random(0), []
    with ThreadPoolExecutor(64) as pool:
        futures, next_start, end = [], time.perf_counter(), time.perf_counter() + seconds
        while next_start < end:
            time.sleep(max(0.0, next_start - time.perf_counter()))
            futures.append(pool.submit(rollout, tool, len(futures)))
            next_start += rng.expovariate(rate / 6)
        for future in futures:
            latencies += future.result()
    p50, p99 = np.percentile(latencies, [50, 99])
    return {"p50_ms": 1000 * p50, "p99_ms": 1000 * p99, "rate": rate, "calls": len(latencies)}


def live_memory(tool: PythonTool, rollouts: int = 300) -> float:
    """Proportional memory (MB) of the sandbox with that many rollouts alive, each with state."""
    states = [tool.call(tool.start(), f"import math\nx = list(range({i} + 1000))")[1] for i in range(rollouts)]
    total = sum(_pss(pid) for pid in descendants(tool.pid))
    assert len(states) == rollouts
    return total / 2**20


def soak(calls: int) -> dict[str, float]:
    """Random rollouts, 5% hostile calls; what is left afterwards."""
    before = {"threads": threading.active_count(), "fds": len(os.listdir("/proc/self/fd")), "temp": _temp_entries()}
    tool = PythonTool(PythonToolConfig(timeout=0.2, memory_mb=256))
    rng, lock, done = random.Random(0), threading.Lock(), 0
    memory: list[float] = []
    base, base_fds = len(descendants(tool.pid)), _fds(tool)

    def one(seed: int) -> None:
        nonlocal done
        mine, states = random.Random(seed), [tool.start()]
        for _ in range(10):
            code = mine.choice(HOSTILE) if mine.random() < 0.05 else f"z = {mine.randrange(100)}\nz * 2"
            states.append(tool.call(mine.choice(states), code)[1])
        with lock:
            done += 1
            if done % max(1, calls // 200) == 0:
                memory.append(sum(_pss(pid) for pid in descendants(tool.pid)) / 2**20)

    began = time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, [rng.randrange(10**9) for _ in range(calls // 10)]))
    seconds = time.perf_counter() - began
    gc.collect()
    time.sleep(2.0)
    left_processes, inner = len(descendants(tool.pid)) - base, _fds(tool) - base_fds
    tool.close()
    time.sleep(0.5)
    return {
        "soak_calls": calls,
        "soak_calls_per_s": calls / seconds,
        "soak_left_processes": left_processes,
        "soak_left_sandbox_fds": inner,
        "soak_left_fds": len(os.listdir("/proc/self/fd")) - before["fds"],
        "soak_left_threads": threading.active_count() - before["threads"],
        "soak_left_temp_files": _temp_entries() - before["temp"],
        "soak_memory_mb_first": statistics.mean(memory[: len(memory) // 4 or 1]),
        "soak_memory_mb_last": statistics.mean(memory[-(len(memory) // 4 or 1) :]),
    }


def search_figures(data: Path) -> dict[str, float]:
    questions = [json.loads(line) for line in (data / "hotpotqa/dev_first300.jsonl").read_text().splitlines()]
    pages = load_corpus(data / "2wiki/corpus.json")
    pages = list(dict.fromkeys(pages + [Document(c["title"], c["text"]) for q in questions for c in q["context"]]))
    began = time.perf_counter()
    search = LocalSearch(pages, top_k=10)
    index_s = time.perf_counter() - began
    asked = [q for q in questions if not {answer.lower() for answer in q["answers"]} & {"yes", "no"}]
    queries = [q["question"] for q in asked]
    began = time.perf_counter()
    for _ in range(10):
        found = search.search(queries)
    rate = 10 * len(queries) / (time.perf_counter() - began)
    hits = sum(
        any(answer.lower() in " ".join(f"{p.title} {p.text}" for p in pages).lower() for answer in q["answers"])
        for q, pages in zip(asked, found, strict=True)
    )
    return {
        "search_documents": len(pages),
        "search_index_s": index_s,
        "search_queries_per_s": rate,
        "hotpot_questions": len(asked),
        "hotpot_recall10": hits / len(asked),
    }


def _pss(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return 0


def _fds(tool: PythonTool) -> int:
    """Descriptors open in the sandbox's first process."""
    supervisor = min(descendants(tool.pid))
    try:
        return len(os.listdir(f"/proc/{supervisor}/fd"))
    except OSError:
        return 0


def _temp_entries() -> int:
    return len([name for name in os.listdir(tempfile.gettempdir()) if name.startswith("appo-")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with hotpotqa and 2wiki")
    parser.add_argument("--soak", type=int, default=20_000, help="calls of the soak; 0: none")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "tools.json")
    arguments = parser.parse_args()
    figures: dict[str, float | str | int] = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {sys.version.split()[0]}"
    }
    began = time.perf_counter()
    tool = PythonTool(PythonToolConfig())
    try:
        figures["start_s"] = time.perf_counter() - began
        calls_per_second(tool, 20)
        figures["calls_per_s"] = calls_per_second(tool)
        figures |= latency_at(tool, float(figures["calls_per_s"]) / 2)
        figures["rss_mb_300"] = live_memory(tool)
    finally:
        tool.close()
    if arguments.data:
        figures |= search_figures(arguments.data)
    if arguments.soak:
        figures |= soak(arguments.soak)
    arguments.out.parent.mkdir(exist_ok=True)
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in figures.items()}
    arguments.out.write_text(json.dumps(rounded, indent=2) + "\n")
    print(json.dumps(rounded, indent=2))


if __name__ == "__main__":
    main()
