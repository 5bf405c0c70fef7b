"""`appo-jax retriever` on made-up passages: build time, size, memory, and how long a query takes.

    python benchmarks/retriever.py --pages 2000000 --folder /tmp/retriever

Passages have 100 words, as those of wiki-18; words follow Zipf's law over a vocabulary of 500,000, without the 50 most
frequent ones, which are stop words in English. A query is six words of a random passage. The folder is kept: the same command
measures again without building.
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
    """Random passages; the same for the same seed."""

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
        ids = np.searchsorted(self.cumulative, np.random.default_rng(seed).random((count, WORDS)))
        words = self.vocabulary
        return ([words[min(i, VOCABULARY - 1)] for i in row] for row in ids.tolist())


def write(path: Path, pages: int) -> None:
    passages, part = Passages(), 10_000
    with path.with_suffix(".part").open("w") as file:
        for seed in range(-(-pages // part)):
            count = min(part, pages - seed * part)
            file.writelines(
                f'{{"title": "{words[0]} {seed * part + i}", "text": "{" ".join(words)}"}}\n'
                for i, words in enumerate(passages.draw(count, seed))
            )
    path.with_suffix(".part").rename(path)


def queries(count: int) -> list[str]:
    """Six words of a passage each; half of them are of passages that the corpus holds."""
    rng = np.random.default_rng(1)
    drawn = [*Passages().draw(count // 2, 0), *Passages().draw(count - count // 2, 10**6)]
    return [" ".join(rng.choice(words, 6, replace=False)) for words in drawn]


def timed(asked: list[str], clients: int) -> dict[str, float]:
    """Percentiles in ms of one query a request, and queries a second, with so many clients at a time."""
    took: list[float] = []

    def client(own: list[str]) -> None:
        with requests.Session() as session:
            for query in own:
                began = time.perf_counter()
                session.post(
                    f"http://127.0.0.1:{PORT}/retrieve", json={"queries": [query], "topk": 3}
                ).raise_for_status()
                took.append(1000 * (time.perf_counter() - began))

    threads = [threading.Thread(target=client, args=(asked[i::clients],)) for i in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rate = len(took) / (time.perf_counter() - began)
    p50, p90, p99 = np.percentile(took, (50, 90, 99))
    return {"p50_ms": float(p50), "p90_ms": float(p90), "p99_ms": float(p99), "queries_per_s": rate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=2_000_000)
    parser.add_argument("--folder", type=Path, default=Path("artifacts/retriever"))
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    corpus = options.folder / f"pages-{options.pages}.jsonl"
    if not corpus.exists():
        write(corpus, options.pages)
    report: dict[str, object] = {"pages": options.pages, "corpus_bytes": corpus.stat().st_size}
    made = options.folder / f"built-{options.pages}.json"
    if not made.exists():
        began = time.monotonic()
        code = (
            "from pathlib import Path; from appo_jax.retriever.index import build, folder_of; import sys, logging; "
            "logging.basicConfig(level=20); corpus = Path(sys.argv[1]); build(corpus, folder_of(corpus, corpus.parent))"
        )
        subprocess.run([sys.executable, "-c", code, str(corpus)], check=True)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        made.write_text(json.dumps({"build_s": time.monotonic() - began, "build_peak_mib": peak}))
    report |= json.loads(made.read_text())
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
        asked = queries(options.queries)
        timed(asked[:200], 2)  # the first look at the index's pages
        report["one_client"] = timed(asked[200 : 200 + (len(asked) - 200) // 2], 1)
        report["eight_clients"] = timed(asked[200 + (len(asked) - 200) // 2 :], 8)
        processes = psutil.Process(server.pid).children(recursive=True)
        memory = [process.memory_full_info() for process in processes]
        report["workers"] = options.workers
        report["own_mib_per_process"] = max(m.uss for m in memory) / 2**20
        report["resident_mib_per_process"] = max(m.rss for m in memory) / 2**20
    finally:
        server.terminate()
        server.wait()
    index = next(path for path in options.folder.glob("tantivy-*") if corpus.name in (path / "corpus.json").read_text())
    report["index_bytes"] = sum(path.stat().st_size for path in index.iterdir())
    report["cpus"] = os.cpu_count()
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
