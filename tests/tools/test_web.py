"""Search over HTTP against a real server on loopback that hangs, fails, lies, floods and stops half-way."""

import json
import multiprocessing
import socket
import sqlite3
import threading
import time

import jax
import pytest
from faulty_server import Server

from appo_jax.config import SearchToolConfig, ToolsConfig
from appo_jax.errors import ConfigError, DataError
from appo_jax.tools.build import build_executor
from appo_jax.tools.cache import QueryCache
from appo_jax.tools.exchange import is_public
from appo_jax.tools.protocol import ToolResult
from appo_jax.tools.search import format_pages
from appo_jax.tools.web import WebSearch
from appo_jax.types import Outcome


@pytest.fixture
def server():
    server = Server()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()


def config(server, **options):
    return SearchToolConfig(**{"url": server.url, "allow_private": True, "timeout": 1.0, "max_retries": 2, **options})


FAULTS = {
    "hang": ("timeout", 1),
    "drip": ("timeout", 1),
    "429": ("status_429", 3),
    "500": ("status_500", 3),
    "404": ("status_404", 1),
    "redirect": ("status_302", 1),
    "garbage": ("garbage", 3),
    "shape": ("garbage", 3),
    "nohttp": ("garbage", 3),
    "flood": ("too_large", 1),
    "half": ("cut_off", 3),
    "chunks": ("cut_off", 3),
}
ENDLESS = {  # what surrounds a body goes on for ever
    "continue": ("too_large", 1),
    "headers": ("garbage", 3),
    "headerdrip": ("timeout", 1),
    "statusdrip": ("timeout", 1),
    "trailers": ("too_large", 1),
    "trailerdrip": ("timeout", 1),
    "extension": ("garbage", 3),
    "chunkdrip": ("timeout", 1),
    "squared": ("status_503", 3),
}


def test_search_r1_protocol(server):
    tool = WebSearch(config(server, top_k=2))
    result, _ = tool.call(None, " who\nis  Ada ")
    assert result.outcome is Outcome.OK
    assert result.text == "Page 1: Title 0. about who is Ada\nPage 2: Title 1. more about who is Ada"
    assert server.bodies == [{"queries": ["who is Ada"], "topk": 2, "return_scores": True}]
    assert tool.faults() == {}


@pytest.mark.parametrize("fault", [*FAULTS, *ENDLESS])
def test_faults_are_text_in_time_and_counted(server, fault):
    tool = WebSearch(config(server, timeout=1.0 if fault in FAULTS else 1.5))
    began = time.monotonic()
    result, _ = tool.call(None, f"{fault} x")
    assert time.monotonic() - began < 4
    kind, attempts = (FAULTS | ENDLESS)[fault]
    assert result.outcome is (Outcome.TIMEOUT if kind == "timeout" else Outcome.UNAVAILABLE)
    assert "The search failed" in result.text
    assert "no." not in result.text  # the body of the server's errors: its words are not for the policy
    assert len(server.asked) == attempts
    assert tool.faults() == {kind: attempts}
    assert tool.faults() == {}


def test_a_passing_failure_is_retried(server):
    server.fails = 2
    tool = WebSearch(config(server))
    assert tool.call(None, "Ada")[0].outcome is Outcome.OK
    assert tool.faults() == {"status_500": 2}


def test_nobody_listens(server):
    server.server_close()
    tool = WebSearch(config(server))
    result, _ = tool.call(None, "Ada")
    assert result.outcome in (Outcome.UNAVAILABLE, Outcome.TIMEOUT)
    assert set(tool.faults()) <= {"connection", "timeout"}


def test_a_mix_of_faults_through_the_executor(server, monkeypatch):
    """Every call of every rollout ends, and the metrics count each fault."""
    monkeypatch.setattr("appo_jax.tools.lanes.TRIP_AFTER", 10**6)
    tools = ToolsConfig(enabled=("search",), max_concurrency=16, search=config(server, max_retries=1))
    expected = {}
    with build_executor(tools) as executor:
        futures = []
        for rollout in range(4):
            for fault in ("fine", *FAULTS):
                text = f"<think>t</think><search>{fault} {rollout}</search>"
                futures.append(executor.submit(executor.start(), text, bound=5.0))
        records = [future.result(10) for future in futures]
        metrics = executor.metrics()
    for record in records:
        fault = record.argument.split()[0]
        kind, attempts = FAULTS.get(fault, (None, 0))
        assert record.outcome is (Outcome.UNAVAILABLE if kind else Outcome.OK), record
        if kind:
            key = f"tools/search/fault_{kind}"
            expected[key] = expected.get(key, 0) + min(attempts, 2)
    assert {key: count for key, count in metrics.items() if "fault_" in key} == expected
    assert metrics["tools/search/calls"] == len(records)
    assert metrics["tools/search/ok"] == 4
    assert metrics["tools/search/unavailable"] == len(records) - 4


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "169.254.169.254", "10.0.0.1", "192.168.1.1", "[::1]", "[fe80::1]", "0.0.0.0",
     "[::ffff:169.254.169.254]", "100.64.0.1", "224.0.0.1"],
)  # fmt: skip
def test_private_addresses_are_refused(host):
    with pytest.raises(ConfigError, match=r"tools\.search\.url: .* --tools\.search\.allow-private$"):
        WebSearch(SearchToolConfig(url=f"http://{host}:9/x"))


@pytest.mark.parametrize(
    "address",
    ["::7f00:1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2002:a9fe:a9fe::1", "192.0.0.8", "192.0.0.170",
     "168.63.129.16", "64:ff9b:1::1", "fec0::1", "2001:0:7f00:1::", "::ffff:7f00:1", "fd00:ec2::254", "100.100.100.200",
     "192.88.99.1", "2001:db8::1", "::", "::1", "0.0.0.1", "255.255.255.255", "240.0.0.1", "ff02::1", "fe80::1%1", "198.18.0.1"],
)  # fmt: skip
def test_addresses_that_are_or_carry_private_ones(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "2001:4860:4860::8888", "64:ff9b::808:808", "2002:808:808::1", "1.1.1.1"]
)
def test_public_addresses_are_public(address):
    assert is_public(address)


def test_an_ipv6_literal_is_an_address():
    """Earlier, the last group of such an address was taken for a port."""
    tool = WebSearch(SearchToolConfig(url="http://[::1]/x", allow_private=True, timeout=0.5, max_retries=0))
    result, _ = tool.call(None, "q")
    assert result.outcome is Outcome.UNAVAILABLE
    assert set(tool.faults()) == {"connection"}


def test_every_address_of_a_name_is_tried(server, monkeypatch):
    """As for localhost, whose first address may be ::1 while the server listens on 127.0.0.1; and one that never answers."""
    with socket.socket() as free, socket.socket() as full, socket.socket() as waits, socket.socket() as lost:
        free.bind(("127.0.0.1", 0))
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for client in (waits, lost):  # the queue has room for one; further attempts get no reply
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        places = [free.getsockname(), full.getsockname(), server.server_address]
        found, resolve = [(2, 1, 6, "", place) for place in places], socket.getaddrinfo
        monkeypatch.setattr(
            "socket.getaddrinfo", lambda host, *a, **b: found if host == "three.example" else resolve(host, *a, **b)
        )
        tool = WebSearch(SearchToolConfig(url="http://three.example:80/", allow_private=True, timeout=2.0))
        assert tool.call(None, "Ada")[0].outcome is Outcome.OK
    assert server.asked == ["Ada"]


def test_an_overlong_title_is_cut(server):
    result, _ = WebSearch(config(server, timeout=5.0)).call(None, "title")
    assert result.outcome is Outcome.OK
    assert result.text.startswith("Page 1: TTT")
    assert len(result.text) < 10_000


def test_lone_surrogates_are_no_failure_of_the_tool(server, tmp_path):
    """Lone surrogates in a query, as JSON can contain them, and in an answer; with the cache, which stores UTF-8."""
    search = config(server, cache=str(tmp_path / "c.sqlite"))
    with build_executor(ToolsConfig(enabled=("search",), search=search, call_format="json")) as executor:
        for query in ("\\ud800 who", "surrogate"):
            call = f'<tool_call>{{"name": "search", "arguments": {{"query": "{query}"}}}}</tool_call>'
            record = executor.submit(executor.start(), call).result(10)
            assert record.outcome is Outcome.OK, record.result
            record.result.encode()
            record.argument.encode()


def test_a_name_that_is_not_resolved_in_time_is_a_timeout(monkeypatch):
    tool = WebSearch(SearchToolConfig(url="http://slow.example:80/", timeout=0.4, max_retries=0))
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: time.sleep(3))
    began = time.monotonic()
    assert tool.call(None, "q")[0].outcome is Outcome.TIMEOUT
    assert time.monotonic() - began < 2


def test_an_address_is_checked_when_it_is_used(server, monkeypatch):
    """A name that was public at start and points into the private network later (DNS rebinding)."""
    tool = WebSearch(SearchToolConfig(url="http://rebound.example:80/", timeout=1.0))
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("127.0.0.1", server.server_address[1]))])
    assert tool.call(None, "q")[0].outcome is Outcome.UNAVAILABLE
    assert tool.faults() == {"refused": 1}
    assert server.asked == []


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://a/b", "http://", "nonsense", "http://host:port/x", "http://h:99999/x", "http://[::1/x",
     "http://h:0/"],
)  # fmt: skip
def test_bad_urls_are_refused(url):
    with pytest.raises(ConfigError, match=r"tools\.search\.url"):
        WebSearch(SearchToolConfig(url=url))


def test_serper_takes_its_key_from_the_environment(server, monkeypatch):
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="SERPER_API_KEY"):
        WebSearch(config(server, provider="serper"))
    monkeypatch.setenv("SERPER_API_KEY", "k1")
    assert WebSearch(config(server, provider="serper")).call(None, "q")[0].text == "Page 1: T. S"
    assert server.headers[0]["X-API-KEY"] == "k1"


@pytest.mark.parametrize(
    ("provider", "found"),
    [("serper", "Page 1: no text. \nPage 2: a"), ("search_r1", "Page 1: no text. \nPage 2: T. b\nPage 3: c")],
)
def test_hits_that_cannot_be_read_are_left_out(server, monkeypatch, provider, found):
    """A web page may have no description; an answer of which nothing can be read is a fault."""
    monkeypatch.setenv("SERPER_API_KEY", "k1")
    tool = WebSearch(config(server, provider=provider))
    assert tool.call(None, "mixed")[0] == ToolResult(found, Outcome.OK)
    assert tool.call(None, "none")[0] == ToolResult(format_pages([]), Outcome.OK)
    assert tool.faults() == {}
    assert tool.call(None, "unread")[0].outcome is Outcome.UNAVAILABLE
    assert tool.faults() == {"garbage": 3}


def test_the_rate_limit_holds(server):
    tool = WebSearch(config(server, max_per_second=20.0, timeout=5.0))
    began = time.monotonic()
    threads = [threading.Thread(target=tool.call, args=(None, f"q {i}")) for i in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - began >= 0.4
    assert len(server.asked) == 9


def test_waiting_for_ones_turn_is_no_failure_of_the_server(server):
    """Queries that wait too long are refused, the others have their whole time, and the circuit stays closed."""
    search = config(server, max_per_second=2.5, timeout=0.6)
    with build_executor(ToolsConfig(enabled=("search",), max_concurrency=16, search=search)) as executor:
        calls = [executor.submit(executor.start(), f"<search>slow {i}</search>") for i in range(12)]
        outcomes = [call.result(5).outcome for call in calls]
        refused = outcomes.count(Outcome.LIMIT)
        assert refused >= 6  # two turns come soon enough, and more only if the machine is slow to ask
        assert outcomes.count(Outcome.OK) == len(server.asked) == 12 - refused >= 2
        assert executor.metrics()["tools/search/fault_rate_limit"] == refused
        time.sleep(0.5)
        assert executor.submit(executor.start(), "<search>Ada</search>").result(5).outcome is Outcome.OK


def test_hosts_share_the_rate_limit(server, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    tool = WebSearch(config(server, max_per_second=20.0))
    began = time.monotonic()
    for i in range(3):
        assert tool.call(None, f"q {i}")[0].outcome is Outcome.OK
    assert time.monotonic() - began >= 0.4


def test_answers_are_cached_and_failures_are_not(server, tmp_path):
    options = config(server, cache=str(tmp_path / "cache.sqlite"))
    first = WebSearch(options).call(None, "Who is Ada")[0]
    assert WebSearch(options).call(None, "who  is ada")[0] == first
    assert server.asked == ["Who is Ada"]
    server.fails = 3
    assert WebSearch(options).call(None, "other")[0].outcome is Outcome.UNAVAILABLE
    assert WebSearch(options).call(None, "other")[0].outcome is Outcome.OK


def test_another_server_or_page_count_has_its_own_answers(server, tmp_path):
    cache = str(tmp_path / "cache.sqlite")
    WebSearch(config(server, cache=cache, top_k=1)).call(None, "q")
    WebSearch(config(server, cache=cache, top_k=2)).call(None, "q")
    assert server.asked == ["q", "q"]


def test_a_cache_filled_from_json_answers_alone(tmp_path):
    (tmp_path / "answers.json").write_text(json.dumps({"Who is Ada": "Page 1: a person"}))
    tool = WebSearch(SearchToolConfig(cache=str(tmp_path / "c.sqlite"), cache_fill=str(tmp_path / "answers.json")))
    assert tool.call(None, "who is ada")[0].text == "Page 1: a person"
    assert "No page" in tool.call(None, "unknown")[0].text


def test_answers_with_lone_surrogates_are_stored(tmp_path):
    (tmp_path / "answers.json").write_text('{"who \\ud800": "Page 1: \\udfff"}')
    cache = QueryCache(tmp_path / "c.sqlite")
    assert cache.fill(tmp_path / "answers.json") == 1
    assert cache.get("who \ud800") == "Page 1: ?"
    cache.close()


@pytest.mark.parametrize("content", ["[1]", '{"a": 1}', "{", "[" * 100_000, None])
def test_bad_answer_files_are_named(tmp_path, content):
    path = tmp_path / "answers.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=r"answers\.json"):
        QueryCache(tmp_path / "c.sqlite").fill(path)


def test_a_file_that_is_no_cache_is_named(tmp_path):
    (tmp_path / "c.sqlite").write_text("not a database" * 100)
    with pytest.raises(DataError, match=r"c\.sqlite"):
        QueryCache(tmp_path / "c.sqlite")


def test_a_full_disk_costs_only_the_use_of_the_cache(tmp_path, caplog):
    cache = QueryCache(tmp_path / "c.sqlite")
    cache.put("a", "before")
    cache._database().execute("PRAGMA max_page_count = 1")  # SQLite says "database or disk is full"
    for _ in range(2):
        cache.put("b", "text" * 100_000)
    assert (cache.get("a"), cache.get("b")) == ("before", None)
    assert caplog.text.count("c.sqlite: going on without this cache where it fails (database or disk is full)") == 1
    (tmp_path / "answers.json").write_text(json.dumps({"c": "text" * 100_000}))
    with pytest.raises(DataError, match="cannot be stored in it"):
        cache.fill(tmp_path / "answers.json")
    cache.close()


def _write(path, start):
    cache = QueryCache(path, "b")
    for i in range(start, start + 50):
        cache.put(f"q{i}", f"t{i}")
        cache.get(f"q{i - 1}")
    cache.close()


def test_a_new_cache_waits_for_the_process_that_is_making_the_file(tmp_path):
    path = tmp_path / "c.sqlite"
    with sqlite3.connect(path, check_same_thread=False, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("CREATE TABLE t (x)")
        threading.Timer(0.3, lambda: other.execute("COMMIT")).start()
        cache = QueryCache(path, "b")
    other.close()
    cache.put("q", "t")
    assert cache.get("q") == "t"
    cache.close()


def test_processes_share_a_cache(tmp_path):
    path = tmp_path / "c.sqlite"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(path, 50 * i)) for i in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    cache = QueryCache(path, "b")
    assert [cache.get(f"q{i}") for i in range(100)] == [f"t{i}" for i in range(100)]
    assert sqlite3.connect(path).execute("PRAGMA journal_mode").fetchone() == ("wal",)
