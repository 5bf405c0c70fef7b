"""The tools that a rollout may call."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from annotated_types import Interval
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from appo_jax.config.bounds import Fraction, Pause, Seconds


@dataclasses.dataclass(frozen=True)
class PythonToolConfig:
    """The python tool: one interpreter per rollout; a branch gets a fork of its parent's interpreter."""

    isolation: Literal["bubblewrap", "process", "remote"] = "bubblewrap"
    """bubblewrap: namespaces, seccomp, no network. process: resource limits only, for policies that are trusted.
    remote: the server at `url`; every call runs the rollout's earlier calls again."""
    url: str | None = None
    """Server for isolation remote, which speaks SandboxFusion's protocol: http://host:port, without /run_code."""
    allow_private: bool = False
    """Whether `url` may be a private, link-local or loopback address."""
    timeout: Seconds = 5.0
    """Seconds of wall time per call. With isolation remote, a call and the earlier ones, which run again, have twice as long
    in all."""
    memory_mb: Annotated[int, Interval(ge=1, le=2**30)] = 512
    """MiB that a rollout's code may take beyond what the preloaded interpreter has."""
    max_output_chars: PositiveInt = 4096
    """Bounds the output of a call that is kept: its last lines, and four times this many of its first bytes. The policy
    reads at most rollout.max_result_tokens of it."""
    preload: tuple[str, ...] = ("math", "numpy", "sympy")
    """Modules imported once, before the first rollout is forked: no call waits for their import."""
    modules: tuple[str, ...] = ()
    """Further installed modules that policy code may import. With bubblewrap it sees these, `preload`, what either
    requires, and the standard library; nothing else that is installed."""

    @property
    def max_output_bytes(self) -> int:
        """The first bytes of a call's output that are kept."""
        return 4 * self.max_output_chars


@dataclasses.dataclass(frozen=True)
class SearchToolConfig:
    """The search tool: a local index, a server, or a file of known answers."""

    corpus: str | None = None
    """File of documents for the local index (BM25): jsonl, json or parquet with `title` and `text`. None: the data
    source's own documents; the embedded world has some."""
    url: str | None = None
    """URL of an HTTP retriever or web-search service, used instead of a local index."""
    provider: Literal["search_r1", "serper"] = "search_r1"
    """What `url` speaks: Search-R1's retriever protocol, or Serper's web search (key in SERPER_API_KEY)."""
    max_per_second: NonNegativeFloat = 0.0
    """Requests to `url` per second, by all hosts of the run together: each has an equal share. 0: no limit."""
    cache: str | None = None
    """SQLite file of answered queries, shared between processes. Without corpus and url, only its answers are found."""
    cache_fill: str | None = None
    """JSON file `{query: text}` whose answers are put into `cache` at start."""
    top_k: PositiveInt = 3
    """Documents in one answer. Official code: 10 (pages of Bing); the paper gives no number."""
    timeout: Seconds = 10.0
    """Seconds of wall time per request to `url`, retries included. With max_per_second, a call may wait as long for its
    turn."""
    max_retries: NonNegativeInt = 3
    """Retries of a request to `url` after a failure that may be temporary."""
    allow_private: bool = False
    """Whether `url` may be a private, link-local or loopback address."""


@dataclasses.dataclass(frozen=True)
class ToolsConfig:
    """Tools in general, and each built-in one."""

    enabled: tuple[str, ...] = ("python", "search")
    """Tools a rollout may call: the names of built-in ones (docs/tools.md), or your tool as `package.module:factory`."""
    call_format: Literal["tags", "json", "chat"] = "tags"
    """How calls are written (tools/format.py). tags: in tags of the tool's name, as in the paper. json: a JSON object with
    name and arguments, as Qwen and Hermes models write it. chat: the same calls; the model's chat template writes the tools into
    the system prompt and results into separate turns."""
    max_concurrency: PositiveInt = 8
    """Calls of one tool that run at the same time, on one host."""
    max_unavailable: Fraction = 0.5
    """Share of a tool's calls in a step or an evaluation that may go unanswered. Above it the run pauses; if the next step, or
    the same evaluation, is also above it, the run stops."""
    pause_seconds: Pause = 60.0
    """Seconds of that pause."""
    python: PythonToolConfig = PythonToolConfig()
    """The python tool."""
    search: SearchToolConfig = SearchToolConfig()
    """The search tool."""
