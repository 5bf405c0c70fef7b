"""Search over HTTP: a retriever with Search-R1's protocol, or a web-search service. Requests are retried, rate-limited and
cached.

Text from the policy is used only in queries, never in addresses. exchange.py makes the requests; it checks deadlines, sizes
and addresses.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import random
import threading
import time
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

from appo_jax import distributed
from appo_jax.config import SearchToolConfig
from appo_jax.errors import ConfigError
from appo_jax.tools.cache import QueryCache
from appo_jax.tools.exchange import Fault, addresses, post, split_url
from appo_jax.tools.protocol import ToolResult, writable
from appo_jax.tools.search import format_pages, split_contents
from appo_jax.types import Document, Outcome

KEY_VARIABLE = "SERPER_API_KEY"


class WebSearch:
    """The `search` tool over HTTP, or over a cache alone. Stateless; safe to call from several threads.

    `provider` search_r1: POST {"queries", "topk", "return_scores"} to `url`, answered by {"result": [[{"document":
    {"contents"}}]]}. serper: google.serper.dev's protocol, with the key in the environment variable SERPER_API_KEY."""

    name = "search"
    argument_name = "query"
    description = "Finds pages about a query"
    skills = ("look_up",)

    def __init__(self, config: SearchToolConfig):
        self._config = config
        self._between = 0.0  # seconds from the start of one request to that of the next
        self.timeout = config.timeout
        if config.max_per_second > 0:
            self._between = distributed.num_hosts() / config.max_per_second  # each host has its share
            self.timeout += config.timeout  # a call waits as long for its turn as for its answer
        self._faults: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()
        self._next_turn = 0.0
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if config.url is not None:
            parts = split_url("tools.search.url", config.url)
            with contextlib.suppress(OSError):  # a name that cannot be resolved now may be resolved later
                addresses(str(parts.hostname), parts.port or 80, config.allow_private)
        if config.url is not None and config.provider == "serper":
            key = os.environ.get(KEY_VARIABLE)
            if not key:
                raise ConfigError(f"tools.search.provider = serper: set the environment variable {KEY_VARIABLE}")
            self._headers["X-API-KEY"] = key
        self._cache = QueryCache(config.cache, f"{config.url} {config.top_k}") if config.cache else None
        if self._cache is not None and config.cache_fill:
            self._cache.fill(config.cache_fill)

    def start(self) -> None:
        return None

    def call(self, state: None, argument: str) -> tuple[ToolResult, None]:
        """The pages for a query. Faults of the server are results, counted by kind in `faults`."""
        query = unicodedata.normalize("NFC", " ".join(argument.split()))
        text = self._cache.get(query) if self._cache else None
        if text is not None:
            return ToolResult(text, Outcome.OK), None
        if self._config.url is None:
            return ToolResult(format_pages([]), Outcome.OK), None
        try:
            text = writable(format_pages(self._pages(query)))
        except Fault as fault:
            outcomes = {
                "timeout": Outcome.TIMEOUT,
                "rate_limit": Outcome.LIMIT,
            }  # our own limit is no failure of the server
            return ToolResult(f"The search failed: {fault}.", outcomes.get(fault.kind, Outcome.UNAVAILABLE)), None
        if self._cache:
            self._cache.put(query, text)
        return ToolResult(text, Outcome.OK), None

    def faults(self) -> Mapping[str, int]:
        """Failed requests by kind since the last time they were read."""
        with self._lock:
            counted, self._faults = self._faults, collections.Counter()
        return counted

    def close(self) -> None:
        if self._cache is not None:
            self._cache.close()

    def _pages(self, query: str) -> list[Document]:
        """Wait for this query's turn, then ask the server, with retries after failures that may be temporary: each within
        `timeout` seconds in total."""
        if not self._wait_for_turn(time.monotonic() + self._config.timeout):
            self._count("rate_limit")
            raise Fault("rate_limit", "too many queries are waiting", retry=False)
        deadline = time.monotonic() + self._config.timeout
        attempt = 0
        while True:
            try:
                return self._ask(query, deadline)
            except Fault as fault:
                self._count(fault.kind)
                # Exponential back-off with jitter, or what the server asks for.
                pause = max(fault.wait, 0.1 * 2**attempt * random.uniform(0.5, 1.5))
                attempt += 1
                too_late = time.monotonic() + pause >= deadline
                if not fault.retry or attempt > self._config.max_retries or too_late:
                    raise
                time.sleep(pause)
                if not self._wait_for_turn(deadline):
                    raise

    def _wait_for_turn(self, deadline: float) -> bool:
        """Wait until the rate limit allows a request. Returns False if that is not before the deadline."""
        if not self._between:
            return True
        with self._lock:
            turn = max(self._next_turn, time.monotonic())
            if turn >= deadline:
                return False
            self._next_turn = turn + self._between
        time.sleep(max(0.0, turn - time.monotonic()))
        return True

    def _count(self, fault: str) -> None:
        with self._lock:
            self._faults[fault] += 1

    def _ask(self, query: str, deadline: float) -> list[Document]:
        config = self._config
        assert config.url is not None
        if config.provider == "serper":
            answer = self._post({"q": query, "num": config.top_k}, deadline)
            return _documents(lambda: answer["organic"], _web_page)[: config.top_k]
        answer = self._post({"queries": [query], "topk": config.top_k, "return_scores": True}, deadline)
        return _documents(lambda: answer["result"][0], _passage)[: config.top_k]

    def _post(self, body: dict[str, Any], deadline: float) -> Any:
        assert self._config.url is not None
        data = post(self._config.url, json.dumps(body).encode(), self._headers, deadline, self._config.allow_private)
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise Fault("garbage", "the server's answer is not JSON", retry=True) from None


def _documents(hits: Callable[[], Any], read: Callable[[dict[str, Any]], Document | None]) -> list[Document]:
    """The hits of an answer that can be read. Raises Fault if it has no list of hits, or none of them can be read."""
    try:
        listed = hits()
    except (KeyError, IndexError, TypeError):
        listed = None
    if isinstance(listed, list):
        pages = [page for hit in listed if isinstance(hit, dict) and (page := read(hit)) is not None]
        if pages or not listed:
            return pages
    raise Fault("garbage", "the server's answer has another form than expected", retry=True)


def _web_page(hit: dict[str, Any]) -> Document | None:
    return _document(hit.get("title"), hit.get("snippet"))


def _passage(hit: dict[str, Any]) -> Document | None:
    document = hit.get("document", hit)
    if not isinstance(document, dict):
        return None
    if isinstance(document.get("contents"), str):
        return split_contents(document["contents"])
    return _document(document.get("title"), document.get("text"))


def _document(title: Any, text: Any) -> Document | None:
    """A page of which either may be missing; None if both are, or if one is no text."""
    title, text = title or "", text or ""
    return Document(title, text) if isinstance(title, str) and isinstance(text, str) and (title or text) else None
