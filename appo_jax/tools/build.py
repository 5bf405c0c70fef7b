"""Makes the tools of a run from the config.

A built-in tool is a file of this folder with a function `make_tool(config: ToolsConfig, documents) -> Tool`; the file's name
is the tool's name in `tools.enabled`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from appo_jax import tools as package
from appo_jax.config import ToolsConfig
from appo_jax.errors import AppoError, ConfigError, ToolError
from appo_jax.tools.executor import ToolExecutor
from appo_jax.tools.protocol import Tool, ToolExample
from appo_jax.tools.user_code import imported
from appo_jax.types import Document


def build_executor(config: ToolsConfig, documents: Sequence[Document] | None = None) -> ToolExecutor:
    """Start the enabled tools. `documents`: the corpus of the data source, if it has one (the embedded world has).

    Raises ConfigError, DataError, or ToolError if a tool cannot run on this machine."""
    tools: list[Tool] = []
    try:
        for name in config.enabled:
            tools.append(_build(name, config, documents))
            _try_out(name, tools[-1])
        return ToolExecutor(tools, config)
    except BaseException:
        for tool in tools:
            with contextlib.suppress(Exception):  # the first error is the one to report
                tool.close()
        raise


def _try_out(name: str, tool: Tool) -> None:
    """Make a state, as every rollout does. In a run, a failure of this only makes a rollout's calls unavailable."""
    try:
        tool.start()
    except AppoError:
        raise
    except (Exception, SystemExit) as error:
        raise ToolError(
            f"tools.enabled = {name!r}: start() raised {type(error).__name__}: {error}; every rollout calls it, so correct it"
        ) from error


def _build(name: str, config: ToolsConfig, documents: Sequence[Document] | None) -> Tool:
    if ":" in name:
        return import_tool(name)
    if name.isidentifier() and importlib.util.find_spec(f"{package.__name__}.{name}") is not None:
        module = importlib.import_module(f"{package.__name__}.{name}")
        if hasattr(module, "make_tool"):
            return module.make_tool(config, documents)
        raise ConfigError(
            f"tools.enabled = {name!r}: {module.__file__} is no tool; expected `make_tool(config: ToolsConfig, documents) -> Tool` "
            "in it"
        )
    known = ", ".join(tool_names())
    raise ConfigError(f"tools.enabled: unknown tool {name!r}; expected {known} or `package.module:factory`")


def tool_names() -> list[str]:
    """The names of the built-in tools."""
    names = (module.name for module in pkgutil.iter_modules(package.__path__) if not module.ispkg)
    return [name for name in names if hasattr(importlib.import_module(f"{package.__name__}.{name}"), "make_tool")]


def import_tool(path: str) -> Tool:
    """The tool that `package.module:factory` returns when called without arguments."""
    factory = imported("tools.enabled", path, "package.module:factory")
    try:
        tool = factory()
    except AppoError:
        raise
    except (Exception, SystemExit) as error:
        raise ToolError(
            f"tools.enabled = {path!r} raised {type(error).__name__} when it was called: {error}"
        ) from error
    missing = [need for need in ("name", "start", "call", "close") if not hasattr(tool, need)]
    if missing:
        raise ConfigError(
            f"tools.enabled = {path!r} gave a {type(tool).__name__} without {', '.join(missing)} (tools/protocol.py)"
        )
    for name, (fits, expected) in _ATTRIBUTES.items():
        if hasattr(tool, name) and not fits(value := getattr(tool, name)):
            raise ConfigError(
                f"tools.enabled = {path!r} gave a {type(tool).__name__} with {name} = {value!r}; expected {expected}"
            )
    return tool


def _is_schema(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping) and isinstance(value.get("properties", {}), Mapping))


def _holds(value: Any, kind: type) -> bool:
    return isinstance(value, Collection) and not isinstance(value, str) and all(isinstance(x, kind) for x in value)


# The attributes that a tool has or may have (tools/protocol.py): what they must be, as a function and in words.
_ATTRIBUTES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (lambda x: isinstance(x, str) and bool(x), "a text"),
    "timeout": (lambda x: isinstance(x, int | float) and x > 0, "a number of seconds above 0"),
    "max_concurrency": (lambda x: isinstance(x, int) and x >= 1, "a whole number from 1"),
    "description": (lambda x: isinstance(x, str), "a text"),
    "argument_name": (lambda x: x is None or isinstance(x, str), "a text"),
    "parameters": (_is_schema, 'a JSON schema, such as {"type": "object", "properties": {"city": {"type": "string"}}}'),
    "skills": (lambda x: _holds(x, str), "a list of texts"),
    "examples": (lambda x: _holds(x, ToolExample), "a list of appo_jax.tools.protocol.ToolExample"),
}
