"""Measures `appo-jax retriever` on random passages: time to build the index, its size, memory, and the time of a query.

    python benchmarks/retriever.py --pages 2000000 --folder /tmp/retriever

Passages have 100 words, like those of wiki-18. Words follow Zipf's law over a vocabulary of 500,000, without the 50 most frequent
words, which are stop words in English. A query is six words of a random passage. The folder is kept, so the same command measures
again without building the index.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import requests

WORDS, VOCABULARY, STOP_WORDS = 100, 500_000, 50
PORT = 8123


class Passages:
    """Random passages. The vocabulary is always the same; a seed determines the passages."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
        lengths = rng.integers(4, 10, VOCABULARY)
        text = "".join(letters[rng.integers(0, 26, lengths.sum())])
        ends = np.cumsum(lengths)
        self.vocabulary = [text[end - n : end] for end, n in zip(ends.tolist(), lengths.tolist(), strict=True)]
        weights = 1.0 / (np.arange(VOCABULARY) + 1 + STOP_WORDS)
        self.cumulative = np.cumsum(weights / weights.sum())

    def draw(self, count: int, seed: int) -> Iterator[list[str]]:
        """The words of `count` passages."""
        ids = np.searchsorted(self.cumulative, np.random.default_rng(seed).random((count, WORDS)))
        words = self.vocabulary
        return ([words[min(i, VOCABULARY - 1)] for i in row] for row in ids.tolist())


def write(path: Path, pages: int) -> None:
    """Write a corpus of `pages` passages, one JSON object per line."""
    passages, pages_per_part = Passages(), 10_000
    with path.with_suffix(".part").open("w") as file:
        for seed in range(-(-pages // pages_per_part)):
            count = min(pages_per_part, pages - seed * pages_per_part)
            file.writelines(
                f'{{"title": "{words[0]} {seed * pages_per_part + i}", "text": "{" ".join(words)}"}}\n'
                for i, words in enumerate(passages.draw(count, seed))
            )
    path.with_suffix(".part").rename(path)


def queries(count: int) -> list[str]:
    """`count` queries of six words of one passage each. Half of these passages are in the corpus."""
    rng = np.random.default_rng(1)
    drawn = [*Passages().draw(count // 2, 0), *Passages().draw(count - count // 2, 10**6)]
    return [" ".join(rng.choice(words, 6, replace=False)) for words in drawn]


def timed(all_queries: list[str], clients: int) -> dict[str, float]:
    """Percentiles of the time of a request with one query, in ms, and queries per second, with `clients` clients at a time."""
    milliseconds: list[float] = []

    def client(its_queries: list[str]) -> None:
        with requests.Session() as session:
            for query in its_queries:
                began = time.perf_counter()
                session.post(
                    f"http://127.0.0.1:{PORT}/retrieve", json={"queries": [query], "topk": 3}
                ).raise_for_status()
                milliseconds.append(1000 * (time.perf_counter() - began))

    threads = [threading.Thread(target=client, args=(all_queries[i::clients],)) for i in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rate = len(milliseconds) / (time.perf_counter() - began)
    p50, p90, p99 = np.percentile(milliseconds, (50, 90, 99))
    return {"p50_ms": float(p50), "p90_ms": float(p90), "p99_ms": float(p99), "queries_per_s": rate}


def own_bytes(process: psutil.Process) -> int:
    """The memory of a process that no file backs. Pages of the index that only this process has read do not count."""
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=2_000_000, help="number of passages")
    parser.add_argument("--folder", type=Path, default=Path("artifacts/retriever"), help="folder of corpus and index")
    parser.add_argument("--queries", type=int, default=2000, help="number of queries")
    parser.add_argument("--workers", type=int, default=2, help="processes of the server")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    corpus = options.folder / f"pages-{options.pages}.jsonl"
    if not corpus.exists():
        write(corpus, options.pages)
    report: dict[str, object] = {"pages": options.pages, "corpus_bytes": corpus.stat().st_size}
    build_figures = options.folder / f"built-{options.pages}.json"
    if not build_figures.exists():
        began = time.monotonic()
        code = (
            "from pathlib import Path; from appo_jax.retriever.index import build, folder_of; import sys, logging; "
            "logging.basicConfig(level=20); corpus = Path(sys.argv[1]); build(corpus, folder_of(corpus, corpus.parent))"
        )
        subprocess.run([sys.executable, "-c", code, str(corpus)], check=True)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        build_figures.write_text(json.dumps({"build_s": time.monotonic() - began, "build_peak_mib": peak}))
    report |= json.loads(build_figures.read_text())
    command = [sys.executable, "-m", "appo_jax", "retriever", "--corpus", str(corpus), "--index", str(options.folder)]
    began = time.monotonic()
    server = subprocess.Popen([*command, "--port", str(PORT), "--workers", str(options.workers), "--cached", "1"])
    try:
        while True:
            try:
                requests.get(f"http://127.0.0.1:{PORT}/health", timeout=5)
                break
            except requests.ConnectionError:
                assert server.poll() is None
                time.sleep(0.05)
        report["start_s"] = time.monotonic() - began
        all_queries = queries(options.queries)
        warm_up, measured = all_queries[:200], all_queries[200:]
        timed(warm_up, 2)  # reads the pages of the index into memory
        report["one_client"] = timed(measured[: len(measured) // 2], 1)
        report["eight_clients"] = timed(measured[len(measured) // 2 :], 8)
        processes = psutil.Process(server.pid).children(recursive=True)
        report["workers"] = options.workers
        report["own_mib_per_process"] = max(map(own_bytes, processes)) / 2**20
        report["resident_mib_per_process"] = max(process.memory_info().rss for process in processes) / 2**20
    finally:
        server.terminate()
        server.wait()
    index = next(path for path in options.folder.glob("tantivy-*") if corpus.name in (path / "corpus.json").read_text())
    report["index_bytes"] = sum(path.stat().st_size for path in index.iterdir())
    report["cpus"] = os.cpu_count()
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
