"""From the configuration to the tools of a run."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from appo_jax.config import ToolsConfig
from appo_jax.errors import ConfigError
from appo_jax.tools.executor import ToolExecutor
from appo_jax.tools.format import make_format
from appo_jax.tools.protocol import Tool
from appo_jax.tools.python import PythonTool
from appo_jax.tools.search import Document, LocalSearch
from appo_jax.tools.web import WebSearch


def build_executor(config: ToolsConfig, documents: Sequence[Document] | None = None) -> ToolExecutor:
    """Start the enabled tools. `documents` is the corpus a data source brings with it (the embedded world); without it
    search uses `search.corpus`, `search.url` or `search.cache`. Raises ConfigError, DataError, or ToolError when a tool
    cannot run on this machine."""
    tools: list[Tool] = []
    try:
        for name in config.enabled:
            tools.append(_build(name, config, documents))
    except BaseException:
        for tool in tools:
            tool.close()
        raise
    return ToolExecutor(tools, make_format(config.call_format), config)


def _build(name: str, config: ToolsConfig, documents: Sequence[Document] | None) -> Tool:
    if name == "python":
        return PythonTool(config.python)
    if name == "search":
        return _search(config, documents)
    if ":" in name:
        return import_tool(name)
    raise ConfigError(f"tools.enabled: unknown tool {name!r}; expected python, search or `package.module:factory`")


def _search(config: ToolsConfig, documents: Sequence[Document] | None) -> Tool:
    search = config.search
    if search.corpus is not None:
        return LocalSearch.from_file(search.corpus, search.top_k)
    if search.url is not None:
        return WebSearch(search)
    if documents is not None:
        return LocalSearch(documents, search.top_k)
    if search.cache is not None:
        return WebSearch(search)
    raise ConfigError(
        "tools.search.corpus: the search tool needs a corpus (or tools.search.url, tools.search.cache, or a data "
        "source that brings documents)"
    )


def import_tool(path: str) -> Tool:
    """The tool that `package.module:factory` returns when called without arguments."""
    module, _, attribute = path.partition(":")
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"tools.enabled: {path!r} cannot be imported ({error}); expected `package.module:factory`"
        ) from error
    tool = factory()
    missing = [need for need in ("name", "start", "call", "close") if not hasattr(tool, need)]
    if missing:
        raise ConfigError(
            f"tools.enabled: {path!r} gave a {type(tool).__name__} without {', '.join(missing)} (tools/protocol.py)"
        )
    return tool
