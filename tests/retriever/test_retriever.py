"""`appo-jax retriever`: the index against the search tool's own, and real processes behind one port."""

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import requests

from appo_jax.config import SearchToolConfig
from appo_jax.errors import DataError
from appo_jax.retriever.index import Index, build, folder_of
from appo_jax.tools.search import LocalSearch, format_pages, load_corpus
from appo_jax.tools.web import WebSearch
from appo_jax.types import Document, Outcome

PAGES = [
    Document("The Who", "An English rock band from London."),
    Document("Who", "A word that asks for a person."),
    Document("Élan", "Vigour & style; naïve café owners have it."),
    Document("", "A page without a title, about running runners who ran."),
    Document("東京", "Tokyo is the capital of Japan."),
    Document("Capital", "London is the capital of the United Kingdom."),
]


def write(path, pages):
    path.write_text("".join(json.dumps({"title": p.title, "text": p.text}) + "\n" for p in pages))
    return path


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    corpus = write(folder / "corpus.jsonl", PAGES)
    build(corpus, folder / "built")
    return Index(folder / "built")


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("rock bands of London", 0), ("The Who", 0), ("ELAN", 2), ("cafe", 2), ("run", 3), ("京", 4), ("capital of Japan", 4),
    ],
)  # fmt: skip
def test_queries_find_what_the_search_tool_finds(index, query, first):
    found = index.search(query, 3)
    assert (found[0].page, found[0].id) == (PAGES[first], str(first))
    assert [hit.relevance for hit in found] == sorted((hit.relevance for hit in found), reverse=True)
    assert {hit.page for hit in index.search(query, 6)} == set(LocalSearch(PAGES).search([query], 6)[0])


@pytest.mark.parametrize("query", ["", "!!", "zzz", '"AND (zzz:q', "a" * 5000, "\ud800"])
def test_queries_that_find_nothing(index, query):
    assert index.search(query, 3) == []


def test_relevance_is_that_of_bm25(tmp_path):
    """Pages of few words: tantivy keeps their lengths exactly. Against bm25s, which leaves the factor k1 + 1 out."""
    rng = np.random.default_rng(0)
    names = [f"w{i}" for i in range(30)]
    pages = [Document(f"p{i}", " ".join(rng.choice(names, rng.integers(3, 30)))) for i in range(200)]
    build(write(tmp_path / "c.jsonl", pages), tmp_path / "i")
    index, local = Index(tmp_path / "i"), LocalSearch(pages)
    for _ in range(50):
        query = " ".join(rng.choice(names, 3, replace=False))
        expected = {pages[i].title: 2.2 * x for i, x in enumerate(local._relevance(query))}
        found = index.search(query, 10)
        relevances = [hit.relevance for hit in found]
        np.testing.assert_allclose(relevances, sorted(expected.values())[:-11:-1], rtol=1e-4)
        np.testing.assert_allclose(relevances, [expected[hit.page.title] for hit in found], rtol=1e-4)


def test_a_page_keeps_the_id_of_its_record(tmp_path):
    corpus = tmp_path / "c.jsonl"
    records = [
        {"id": id, "contents": f'"{name}"\nA page about {name}.'} for id, name in (("wiki-7", "Bern"), (9, "Chur"))
    ]
    corpus.write_text("".join(json.dumps(record) + "\n" for record in (*records, {"title": "Rome", "text": "A town"})))
    build(corpus, tmp_path / "i")
    index = Index(tmp_path / "i")
    assert [index.search(name, 1)[0].id for name in ("Bern", "Chur", "Rome")] == ["wiki-7", "9", "2"]


def test_a_repeated_page_is_indexed_once(tmp_path, caplog):
    """As by the search tool: a page that stands there k times would take k of the places of an answer."""
    repeated = [PAGES[0], *PAGES, PAGES[5], Document(PAGES[5].title, "Another text of a capital"), PAGES[5]]
    with caplog.at_level(logging.INFO):
        build(write(tmp_path / "c.jsonl", repeated), tmp_path / "i")
    assert "3 of 10 pages repeat earlier ones" in caplog.text
    index = Index(tmp_path / "i")
    assert index.pages == 7
    assert [hit.id for hit in index.search("rock band", 3)] == ["0"]
    assert {hit.id for hit in index.search("capital", 6)} == {"5", "6", "8"}
    assert index.pages == len(load_corpus(tmp_path / "c.jsonl"))


def test_a_machine_with_many_cores_builds_an_index(tmp_path, monkeypatch):
    """TPU hosts have 96 and more; tantivy refuses to divide its memory among as many threads."""
    monkeypatch.setattr(os, "cpu_count", lambda: 240)
    build(write(tmp_path / "corpus.jsonl", PAGES), tmp_path / "built")
    assert Index(tmp_path / "built").search("rock bands of London", 1)[0].page == PAGES[0]


def test_an_index_belongs_to_one_state_of_a_file(tmp_path):
    corpus = write(tmp_path / "corpus.jsonl", PAGES)
    first = folder_of(corpus, tmp_path)
    assert folder_of(corpus, tmp_path) == first
    os.utime(corpus, ns=(1, 1))
    assert folder_of(corpus, tmp_path) != first
    (tmp_path / "bad.jsonl").write_text('{"title": "a", "text": "b"}\n{"title": 1}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl, line 2: expected an object with `title` and `text`"):
        build(tmp_path / "bad.jsonl", tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "corpus.jsonl"]
    with pytest.raises(DataError, match="holds no index of a corpus"):
        Index(tmp_path / "none")


class Running:
    """`appo-jax retriever` as a user starts it."""

    def __init__(self, folder, *options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "appo_jax", "retriever", "--corpus", str(folder / "corpus.jsonl")]
        command += ["--index", str(folder), "--port", str(self.port), *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.url = f"http://127.0.0.1:{self.port}"
        for _ in range(300):
            try:
                requests.get(f"{self.url}/health", timeout=5)
                return
            except requests.ConnectionError:
                assert self.process.poll() is None, self.process.stdout.read()
                time.sleep(0.1)
        raise AssertionError("it does not answer")

    def ask(self, body, **options):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return requests.post(f"{self.url}/retrieve", data=data, timeout=20, **options)

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        return self.process.communicate(timeout=20)[0], self.process.returncode


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    write(folder / "corpus.jsonl", PAGES)
    running = Running(folder, "--workers", "2")
    yield running
    running.stop()


def test_the_search_tool_reads_what_it_serves(server):
    tool = WebSearch(SearchToolConfig(url=f"{server.url}/retrieve", top_k=2, allow_private=True))
    result, _ = tool.call(None, "capital of Japan")
    tool.close()
    assert (result.outcome, result.text) == (Outcome.OK, format_pages([PAGES[4], PAGES[5]]))


def test_the_protocol_is_search_r1s(server):
    """As retrieval_server.py of Search-R1 answers: a list for every query, documents with contents, scores where asked for."""
    answer = server.ask({"queries": ["Tokyo", "zzz"], "topk": 2, "return_scores": True}).json()
    (first,), second = answer["result"]
    assert second == []
    assert first["document"]["id"] == "4"
    assert first["document"]["contents"] == '"東京"\nTokyo is the capital of Japan.'
    assert first["score"] > 0
    ((bare,), _) = server.ask({"queries": ["Tokyo", "zzz"]}).json()["result"]
    assert bare == first["document"]


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"{", 400, "not JSON"),
        (b"[1]", 400, "expected an object with queries"),
        ({"queries": "one"}, 400, "a list of texts"),
        ({"queries": [1]}, 400, "a list of texts"),
        ({"queries": ["a"], "topk": 1000}, 400, "topk from 1 to 100"),
        ({"queries": ["a"], "topk": "2"}, 400, "topk from 1 to 100"),
        ({"queries": ["a"] * 600}, 400, "at most 512 queries"),
        (b"x" * 2_000_000, 413, "at most"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_the_reason(server, body, status, reason):
    answer = server.ask(body)
    assert (answer.status_code, reason in answer.json()["error"]) == (status, True)
    assert requests.get(f"{server.url}/nothing", timeout=5).status_code == 404


def test_an_address_that_cannot_be_used_is_refused_before_it_is_told(tmp_path):
    write(tmp_path / "corpus.jsonl", PAGES)
    command = [sys.executable, "-m", "appo_jax", "retriever", "--corpus", str(tmp_path / "corpus.jsonl")]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for options, complaint in (
            (["--port", "99999"], "--port 99999: expected a port from 1 to 65535"),
            (["--port", str(port)], f"--port {port}: Address already in use; give another port"),
            (["--port", str(port), "--workers", "2"], f"--port {port}: Address already in use; give another port"),
            (["--host", "192.0.2.1"], "--host 192.0.2.1: Cannot assign requested address; give an address of this"),
            (["--host", "no.such.host.invalid"], "--host no.such.host.invalid: "),
        ):
            ran = subprocess.run([*command, *options], capture_output=True, text=True, timeout=60)
            assert (ran.returncode, ran.stdout) == (2, "")
            assert complaint in ran.stderr


def test_clients_that_hang_up_do_not_end_it(tmp_path):
    write(tmp_path / "corpus.jsonl", PAGES)
    server = Running(tmp_path)
    request = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    for _ in range(50):
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(request * 200)
    answer = server.ask({"queries": ["who"]})
    assert answer.status_code == 200
    server.stop()


def test_processes_share_the_port_and_keep_answers(server):
    seen = {}

    def keep_asking():
        for _ in range(20):
            assert server.ask({"queries": ["Tokyo"] * 200}).status_code == 200
            told = requests.get(f"{server.url}/health", timeout=20).json()
            seen[told["process"]] = told

    for _ in range(10):  # whichever process is free takes a request
        threads = [threading.Thread(target=keep_asking) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if len(seen) == 2:
            break
    assert all(told["status"] == "ok" and told["pages"] == len(PAGES) for told in seen.values())
    assert sum(told["cached"] for told in seen.values()) >= 1000
    assert len(seen) == 2


def test_too_many_queries_are_told_to_wait_and_the_tool_does(tmp_path):
    write(tmp_path / "corpus.jsonl", PAGES)
    running = Running(tmp_path, "--max-per-second", "5")
    answers = [running.ask({"queries": [f"Tokyo {i}"]}) for i in range(30)]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert 0 < len(refused) < 30
    assert refused[0].headers["Retry-After"] == "1"
    tool = WebSearch(SearchToolConfig(url=f"{running.url}/retrieve", top_k=1, allow_private=True, timeout=20))
    results = []
    threads = [
        threading.Thread(target=lambda i=i: results.append(tool.call(None, f"Japan {i}")[0].outcome)) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tool.close()
    assert results == [Outcome.OK] * 4
    out, code = running.stop()
    assert re.search(r"6 pages of .*corpus\.jsonl at http://127\.0\.0\.1:\d+/retrieve", out)
    assert "Traceback" not in out
    assert code in (0, 130)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--corpus", "none.jsonl"], "search corpus none.jsonl: No such file or directory; expected a jsonl"),
        (["--corpus", "corpus.jsonl", "--workers", "0"], "--workers 0: expected 1 or more"),
        (["--corpus", "corpus.jsonl", "--max-per-second", "-1"], "--max-per-second -1.0: expected 0 or more"),
    ],
)
def test_what_cannot_be_served_is_explained(tmp_path, options, reason):
    write(tmp_path / "corpus.jsonl", PAGES)
    command = [sys.executable, "-m", "appo_jax", "retriever", "--index", str(tmp_path), *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
    assert "checkpoint" not in done.stderr


def test_lone_surrogates_in_a_corpus_are_indexed(tmp_path):
    (tmp_path / "corpus.jsonl").write_text('{"title": "x \\ud800", "text": "\\udfff rivers"}\n')
    build(tmp_path / "corpus.jsonl", tmp_path / "built")
    assert Index(tmp_path / "built").search("river", 1)[0].page == Document("x ?", "? rivers")


def test_the_index_equals_the_corpus_that_the_tool_would_load(tmp_path, index):
    assert index.pages == len(load_corpus(write(tmp_path / "corpus.jsonl", PAGES)))
