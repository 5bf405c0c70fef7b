"""Search over HTTP: a retriever with Search-R1's protocol, or a web-search service; retried, limited, cached.

Policy-chosen text goes into queries only, never into addresses. A server is reached at an address checked at connection
time, so that neither a name nor a redirect leads to the cloud's metadata service or into a private network.
"""

from __future__ import annotations

import collections
import contextlib
import http.client
import ipaddress
import json
import os
import random
import socket
import ssl
import threading
import time
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from appo_jax.config import SearchToolConfig
from appo_jax.errors import ConfigError
from appo_jax.tools.cache import QueryCache
from appo_jax.tools.protocol import ToolResult
from appo_jax.tools.search import format_pages, split_contents
from appo_jax.types import Document, Outcome

MAX_BYTES = 4 << 20  # of a response
KEY_VARIABLE = "SERPER_API_KEY"


class Fault(Exception):
    """A request that failed. `kind` is counted in the metrics; `retry` says whether another attempt may help."""

    def __init__(self, kind: str, detail: str, retry: bool, wait: float = 0.0):
        super().__init__(detail)
        self.kind = kind
        self.retry = retry
        self.wait = wait  # seconds the server asks for


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
        self.timeout = config.timeout
        self._faults: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()
        self._next_slot = 0.0
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if config.url is not None:
            parts = urlsplit(config.url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ConfigError(f"tools.search.url = {config.url!r}: expected http://host:port/path or https://…")
            with contextlib.suppress(OSError):  # a name that cannot be resolved now may be later
                addresses(parts.hostname, parts.port or 80, config.allow_private)
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
            text = format_pages(self._pages(query))
        except Fault as fault:
            outcome = Outcome.TIMEOUT if fault.kind == "timeout" else Outcome.UNAVAILABLE
            return ToolResult(f"The search failed: {fault}.", outcome), None
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
        """Ask the server, again after failures that may pass, within `timeout` seconds in all."""
        deadline = time.monotonic() + self._config.timeout
        attempt = 0
        while True:
            self._wait_for_slot(deadline)
            try:
                return self._ask(query, deadline)
            except Fault as fault:
                with self._lock:
                    self._faults[fault.kind] += 1
                # Exponential back-off with jitter, or what the server asks for.
                pause = max(fault.wait, 0.1 * 2**attempt * random.uniform(0.5, 1.5))
                attempt += 1
                too_late = time.monotonic() + pause >= deadline
                if not fault.retry or attempt > self._config.max_retries or too_late:
                    raise
                time.sleep(pause)

    def _wait_for_slot(self, deadline: float) -> None:
        if self._config.max_per_second <= 0:
            return
        with self._lock:
            slot = max(self._next_slot, time.monotonic())
            if slot >= deadline:
                self._faults["rate_limit"] += 1
                raise Fault("rate_limit", "too many queries are waiting", retry=False)
            self._next_slot = slot + 1.0 / self._config.max_per_second
        time.sleep(max(0.0, slot - time.monotonic()))

    def _ask(self, query: str, deadline: float) -> list[Document]:
        config = self._config
        assert config.url is not None
        if config.provider == "serper":
            answer = self._post({"q": query, "num": config.top_k}, deadline)
            return _read(lambda: [Document(hit["title"], hit["snippet"]) for hit in answer["organic"][: config.top_k]])
        answer = self._post({"queries": [query], "topk": config.top_k, "return_scores": True}, deadline)
        return _read(lambda: [_retrieved(hit) for hit in answer["result"][0][: config.top_k]])

    def _post(self, body: dict[str, Any], deadline: float) -> Any:
        assert self._config.url is not None
        data = post(self._config.url, json.dumps(body).encode(), self._headers, deadline, self._config.allow_private)
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise Fault("garbage", "the server's answer is not JSON", retry=True) from None


def _retrieved(hit: Any) -> Document:
    document = hit.get("document", hit)
    return (
        split_contents(document["contents"])
        if "contents" in document
        else Document(document["title"], document["text"])
    )


def _read(pages: Any) -> list[Document]:
    try:
        found = pages()
        for page in found:
            page.title + page.text  # both are strings
        return found
    except (KeyError, IndexError, TypeError, AttributeError):
        raise Fault("garbage", "the server's answer has another form than expected", retry=True) from None


def addresses(host: str, port: int, allow_private: bool) -> Sequence[tuple[str, int]]:
    """The host's addresses. Raises ConfigError when one is private, loopback, link-local or otherwise not public."""
    found = [info[4] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not allow_private:
        for address in found:
            ip = ipaddress.ip_address(str(address[0]).partition("%")[0])
            ip = getattr(ip, "ipv4_mapped", None) or ip
            if not ip.is_global or ip.is_multicast:
                raise ConfigError(
                    f"tools.search.url: {host} is at {ip}, which is not a public address; if that is meant, "
                    "give --tools.search.allow-private"
                )
    return [(str(address[0]), int(address[1])) for address in found]


def post(url: str, body: bytes, headers: Mapping[str, str], deadline: float, allow_private: bool) -> bytes:
    """POST, and read the whole answer before `deadline` (time.monotonic). No redirects, no proxies. Raises Fault."""
    parts = urlsplit(url)
    connection = _connect(parts.scheme, str(parts.hostname), parts.port, deadline, allow_private)
    try:
        connection.request(
            "POST", (parts.path or "/") + (f"?{parts.query}" if parts.query else ""), body, dict(headers)
        )
        response = connection.getresponse()
        if response.status != 200:
            passing = response.status == 429 or response.status >= 500
            wait = response.headers.get("Retry-After", "")
            detail = f"the server answered with status {response.status}"
            raise Fault(f"status_{response.status}", detail, passing, float(wait) if wait.isdigit() else 0.0)
        data = bytearray()
        while part := _read_part(connection, response, deadline):
            data += part
            if len(data) > MAX_BYTES:
                raise Fault("too_large", f"the server's answer is larger than {MAX_BYTES >> 20} MB", retry=False)
        if response.length:
            raise Fault("cut_off", "the server's answer ended too early", retry=True)
        return bytes(data)
    except TimeoutError:
        raise Fault("timeout", "the server did not answer in time", retry=False) from None
    except (http.client.IncompleteRead, http.client.RemoteDisconnected):
        raise Fault("cut_off", "the server's answer ended too early", retry=True) from None
    except http.client.HTTPException:
        raise Fault("garbage", "the server does not speak HTTP", retry=True) from None
    except OSError as error:
        raise Fault("connection", f"no connection to the server ({error})", retry=True) from None
    finally:
        connection.close()


def _read_part(connection: http.client.HTTPConnection, response: http.client.HTTPResponse, deadline: float) -> bytes:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    if connection.sock is not None:
        connection.sock.settimeout(left)
    return response.read1(1 << 16)


def _connect(
    scheme: str, host: str, port: int | None, deadline: float, allow_private: bool
) -> http.client.HTTPConnection:
    timeout = max(0.01, deadline - time.monotonic())
    connection: http.client.HTTPConnection
    if scheme == "https":
        connection = http.client.HTTPSConnection(host, port, timeout=timeout, context=ssl.create_default_context())
    else:
        connection = http.client.HTTPConnection(host, port, timeout=timeout)

    def checked(address: tuple[str, int], *arguments: Any) -> socket.socket:
        try:
            allowed = addresses(*address, allow_private)
        except ConfigError as error:
            raise Fault("refused", str(error), retry=False) from None
        return socket.create_connection(allowed[0], *arguments)

    connection._create_connection = checked  # type: ignore[attr-defined]
    return connection
