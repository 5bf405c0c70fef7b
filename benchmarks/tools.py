"""Measures the tools on this machine: `python benchmarks/tools.py [--data DIR] [--soak N] [--beside CHECKOUT]`.

Writes benchmarks/results/tools.json:

- calls of the Python tool per second; this includes the set-up of each rollout, and one call in six begins from an earlier state;
- their latency at half of this rate, and the memory of 300 live rollouts;
- speed and recall of the search tool (with --data);
- a soak test (tools_soak.py) of N calls through the executor, in which 5 % of the rollouts are hostile: how many honest calls are
  lost, and which processes, descriptors and files are left over.

With --beside, the Python tool of another checkout (after its `make setup`) and this one are measured in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tools_soak import pss, soak

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


def rollout(tool: PythonTool, n: int) -> list[float]:
    """Make five calls in a row and one from an earlier state. Returns their latencies in seconds."""
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
    """Calls per second of `rollouts` rollouts of six calls, of which `workers` run at a time."""
    began = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda n: rollout(tool, n), range(rollouts)))
    return 6 * rollouts / (time.perf_counter() - began)


def latency_at(tool: PythonTool, rate: float, seconds: float = 6.0) -> dict[str, float]:
    """Latencies in ms if rollouts begin at random times (a Poisson process), so that there are `rate` calls per second on average.

    `seconds`: duration of the measurement.
    """
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
    """Memory of the sandbox in MiB (proportional set size) while `rollouts` rollouts live, each with a state."""
    states = [tool.call(tool.start(), f"import math\nx = list(range({i} + 1000))")[1] for i in range(rollouts)]
    total = sum(pss(pid) for pid in descendants(tool.pid))
    assert len(states) == rollouts
    return total / 2**20


def search_figures(data: Path) -> dict[str, float]:
    """Speed of the search tool, and the share of HotpotQA questions with an answer among the first 10 results."""
    questions = [json.loads(line) for line in (data / "hotpotqa/dev_first300.jsonl").read_text().splitlines()]
    pages = load_corpus(data / "2wiki/corpus.json")
    pages = list(dict.fromkeys(pages + [Document(c["title"], c["text"]) for q in questions for c in q["context"]]))
    began = time.perf_counter()
    search = LocalSearch(pages, top_k=10)
    index_s = time.perf_counter() - began
    open_questions = [q for q in questions if not {answer.lower() for answer in q["answers"]} & {"yes", "no"}]
    queries = [q["question"] for q in open_questions]
    began = time.perf_counter()
    for _ in range(10):
        found = search.search(queries)
    rate = 10 * len(queries) / (time.perf_counter() - began)
    hits = sum(
        any(answer.lower() in " ".join(f"{p.title} {p.text}" for p in pages).lower() for answer in q["answers"])
        for q, pages in zip(open_questions, found, strict=True)
    )
    return {
        "search_documents": len(pages),
        "search_index_s": index_s,
        "search_queries_per_s": rate,
        "hotpot_questions": len(open_questions),
        "hotpot_recall10": hits / len(open_questions),
    }


def beside(other: Path, turns: int = 7) -> dict[str, Any]:
    """Medians of the Python tool's figures in the checkout `other` and in this one, measured in turns, `turns` times each."""
    here = Path(__file__).parents[1]
    runs: dict[Path, list[dict[str, Any]]] = {other: [], here: []}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "tools.json"
        for turn in range(turns):
            for checkout, figures in sorted(runs.items(), reverse=bool(turn % 2)):
                command = [checkout / ".venv/bin/python", "benchmarks/tools.py", "--soak", "0", "--out", out]
                subprocess.run(command, cwd=checkout, check=True, stdout=subprocess.DEVNULL)
                figures.append(json.loads(out.read_text()))
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=other, check=True, capture_output=True, text=True
    ).stdout.strip()
    keys = ("calls_per_s", "p50_ms", "p99_ms", "rss_mb_300")
    return {
        "beside": commit,
        "turns": turns,
        "medians": {
            key: {
                name: round(statistics.median(run[key] for run in runs[path]), 4)
                for name, path in (("before", other), ("now", here))
            }
            for key in keys
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="folder with hotpotqa/ and 2wiki/; without it, the search tool is not measured"
    )
    parser.add_argument("--soak", type=int, default=20_000, help="number of calls of the soak test; 0: no soak test")
    parser.add_argument(
        "--beside", type=Path, help="another checkout, whose Python tool is measured in turns with this one"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "tools.json", help="file of the figures"
    )
    arguments = parser.parse_args()
    figures: dict[str, Any] = {
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
    rounded: dict[str, Any] = {
        key: round(value, 4) if isinstance(value, float) else value for key, value in figures.items()
    }
    if arguments.beside:
        rounded["in_turns"] = beside(arguments.beside.resolve())
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(rounded, indent=2) + "\n")
    print(json.dumps(rounded, indent=2))


if __name__ == "__main__":
    main()
