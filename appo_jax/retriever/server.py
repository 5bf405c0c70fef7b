"""`appo-jax retriever`: serves an index on disk with Search-R1's retriever protocol, from several processes on one port.

POST /retrieve {"queries": [text, …], "topk": 3, "return_scores": true} is answered by {"result": [[{"document": {"id",
"contents"}, "score"}, …], …]}; without return_scores each page is only its document. GET /health reports the process's state.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import functools
import json
import os
import socket
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.supervisors import Multiprocess

from appo_jax.config.bounds import require_at_least
from appo_jax.errors import ConfigError
from appo_jax.retriever.index import Index, build, folder_of
from appo_jax.tools.search import join_contents

MAX_BODY = 1 << 20  # bytes
MAX_QUERIES, MAX_TOP_K = 512, 100  # of one request
MAX_QUERY = 4096  # characters of a query; the rest is ignored
_SETTING = "APPO_JAX_RETRIEVER"  # the environment variable that passes the settings to uvicorn's processes

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


@dataclasses.dataclass(frozen=True)
class Serving:
    """The settings of a server: the options of `appo-jax retriever`."""

    corpus: Path
    port: int
    host: str
    workers: int
    index: Path | None
    max_per_second: float
    cached: int


def serve(serving: Serving) -> None:
    """Build the index if it is missing, and serve until the process is asked to stop. Raises ConfigError, DataError."""
    require_at_least({
        "--workers": (serving.workers, 1), "--max-per-second": (serving.max_per_second, 0), "--cached": (serving.cached, 0),
    })  # fmt: skip
    with _bound(serving.host, serving.port) as address:  # before the index is built, which may take an hour
        folder = folder_of(serving.corpus, serving.index)
        build(serving.corpus, folder)
        pages = Index(folder).pages  # an error is raised here, before any process is started
        os.environ[_SETTING] = json.dumps([str(folder), serving.max_per_second / serving.workers, serving.cached])
        config = uvicorn.Config(
            f"{__name__}:app", factory=True, workers=serving.workers, log_level="warning", access_log=False,
            limit_concurrency=1024, timeout_keep_alive=30,
        )  # fmt: skip
        print(f"{pages} pages of {serving.corpus} at http://{serving.host}:{serving.port}/retrieve", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            if serving.workers > 1:
                Multiprocess(config, sockets=[address]).run()
            else:
                uvicorn.Server(config).run(sockets=[address])


def _bound(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address of this machine. Raises ConfigError that names the option that is wrong."""
    if not 1 <= port <= 65535:
        raise ConfigError(f"--port {port}: expected a port from 1 to 65535")
    address = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    address.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the port of a server that has just ended is free
    try:
        address.bind((host, port))
    except OSError as error:
        address.close()
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise ConfigError(f"--port {port}: {error.strerror}; give another port") from error
        raise ConfigError(
            f"--host {host}: {error.strerror}; give an address of this machine, or 0.0.0.0 for all of them"
        ) from error
    return address


def app() -> Retriever:
    """The application of one process, with the settings of `serve`."""
    folder, rate, cached = json.loads(os.environ[_SETTING])
    return Retriever(Index(Path(folder)), rate, cached)


class Refused(Exception):
    """A request is refused: (status, reason, headers)."""


class Retriever:
    """An ASGI application over an index. rate: maximum of queries per second; 0: none. cached: number of kept answers."""

    def __init__(self, index: Index, rate: float, cached: int):
        self.index, self.rate = index, rate
        self.began, self.queries = time.monotonic(), 0
        self._next = 0.0  # the time from which the next query may be answered
        self._found = functools.lru_cache(maxsize=cached)(self._search)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            while (message := await receive())["type"] != "lifespan.shutdown":
                await send({"type": message["type"] + ".complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        status, headers = 200, []
        try:
            body = await self._answer(scope["method"], scope["path"], receive)
        except Refused as refused:
            status, reason, headers = refused.args
            body = json.dumps({"error": reason}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *headers]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, method: str, path: str, receive: Receive) -> bytes:
        if (method, path) == ("GET", "/health"):
            return json.dumps(self.health()).encode()
        if (method, path) != ("POST", "/retrieve"):
            raise Refused(404, "expected POST /retrieve or GET /health", [])
        queries, k, return_scores = _read(await _body(receive))
        self._allow(len(queries))
        results = await asyncio.to_thread(lambda: [self._found(query, k) for query in queries])
        return _written(results, return_scores)

    def health(self) -> dict[str, Any]:
        """The state of this process: the pages it serves and the queries it has answered."""
        cache = self._found.cache_info()
        return {
            "status": "ok", "pages": self.index.pages, "process": os.getpid(), "queries": self.queries,
            "cached": cache.hits, "seconds": round(time.monotonic() - self.began, 1),
        }  # fmt: skip

    def _allow(self, count: int) -> None:
        """Count queries. Raises Refused if they exceed `rate` per second; a burst of one second's queries is allowed."""
        if self.rate > 0:
            now = time.monotonic()
            start = max(self._next, now - 1.0)
            if start + count / self.rate > now + max(0.0, (count - self.rate) / self.rate):
                raise Refused(429, "too many queries", [(b"retry-after", b"1")])
            self._next = start + count / self.rate
        self.queries += count

    def _search(self, query: str, k: int) -> list[tuple[dict[str, str], float]]:
        hits = self.index.search(query, k)
        return [({"id": hit.id, "contents": join_contents(hit.page)}, hit.relevance) for hit in hits]


async def _body(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            raise Refused(413, f"a request has at most {MAX_BODY} bytes", [])
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            return body


def _read(body: bytes) -> tuple[list[str], int, bool]:
    """(queries, topk, return_scores). Raises Refused that says what is wrong."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON", []) from None
    queries = request.get("queries") if isinstance(request, dict) else None
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise Refused(400, "expected an object with queries: a list of texts", [])
    k = request.get("topk") or 3
    if not isinstance(k, int) or not 1 <= k <= MAX_TOP_K or len(queries) > MAX_QUERIES:
        raise Refused(400, f"expected topk from 1 to {MAX_TOP_K}, and at most {MAX_QUERIES} queries", [])
    return [" ".join(query[:MAX_QUERY].split()) for query in queries], k, bool(request.get("return_scores"))


def _written(results: list[list[tuple[dict[str, str], float]]], return_scores: bool) -> bytes:
    listed = [
        [{"document": document, "score": relevance} if return_scores else document for document, relevance in found]
        for found in results
    ]
    return json.dumps({"result": listed}).encode()
