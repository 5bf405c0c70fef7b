"""The Python tool on another machine: `tools.python.isolation = remote`, over SandboxFusion's protocol (`POST /run_code`).

The server runs a program and keeps nothing. So a state is the list of earlier calls. Each call first runs them again without
output, and then runs its own code; all of them together may take twice `tools.python.timeout`. A fork costs nothing, because a
branch runs the calls before it again. Code that depends on the time or on data kept by a server may then behave differently.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import secrets
import time
from typing import Any

from appo_jax.config import PythonToolConfig
from appo_jax.errors import ConfigError
from appo_jax.tools.code import ENDED, KEPT, PythonCode, refusal, unavailable
from appo_jax.tools.exchange import Fault, addresses, post, split_url
from appo_jax.tools.protocol import ToolResult, writable
from appo_jax.tools.sandbox import cell
from appo_jax.types import Outcome

MAX_HISTORY_BYTES = 1 << 20  # of all calls of a rollout
ROUND_TRIP = 10.0  # seconds for the server to start a program and to answer, in addition to the run time of the code

State = tuple[str, ...]  # the calls so far

# Runs on the server. Strings have the same hash in every replay; all output goes to one descriptor, as in `cell`.
_PROGRAM = """
import os, sys
if os.environ.get("PYTHONHASHSEED") != "0" and os.path.isfile(sys.argv[0]):
    os.environ["PYTHONHASHSEED"] = "0"
    os.execv(sys.executable, [sys.executable, *sys.argv])
import importlib, json, random, tempfile, types
cell = types.ModuleType("cell")
exec(compile(SOURCE, "cell", "exec"), cell.__dict__)
for name in PRELOAD:
    importlib.import_module(name)
os.chdir(tempfile.mkdtemp())
random.seed(0)
if "numpy" in sys.modules:
    sys.modules["numpy"].random.seed(0)
sys.modules["__main__"] = types.ModuleType("__main__")
out, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
os.dup2(1, 2)
for number, code in enumerate(CALLS, 1):
    last = number == len(CALLS)
    for fd in (1, 2):
        os.dup2(out if last else null, fd)
    report = cell.run(code, f"<call {number}>", MAX_OUTPUT)
os.write(out, b"\\n" + MARK.encode() + report)
os._exit(0)
"""


class RemotePythonTool(PythonCode):
    """The `python` tool over HTTP. Safe to call from several threads; nothing is kept between calls."""

    def __init__(self, config: PythonToolConfig):
        """Raises ConfigError for an invalid URL, or a private one that is not allowed."""
        if config.url is None:
            raise ConfigError("tools.python.isolation = remote: give the server's address, --tools.python.url http://…")
        parts = split_url("tools.python.url", config.url)
        if not config.allow_private:
            with contextlib.suppress(OSError):  # a name that cannot be resolved now may be resolved later
                addresses(str(parts.hostname), parts.port or 80, False, time.monotonic() + 5.0, "tools.python")
        self._config = config
        self._url = config.url.rstrip("/") + "/run_code"
        self._run_timeout = 2 * config.timeout  # of a call and of those before it, which run again
        self.timeout = self._run_timeout + ROUND_TRIP

    def start(self) -> State:
        return ()

    def call(self, state: State | None, argument: str) -> tuple[ToolResult, State]:
        """Run `argument` after the calls of `state`."""
        state = state or ()
        calls = (*state, argument)
        if (refused := refusal(argument)) is not None:
            return refused, state
        if sum(map(len, calls)) > MAX_HISTORY_BYTES:
            return ToolResult("The calls of this rollout are too long to be run again.", Outcome.LIMIT), state
        mark = secrets.token_hex(16)
        try:
            answer = self._run(self._program(calls, mark))
            output, status = str(answer["run_result"]["stdout"] or ""), answer["run_result"]["status"]
        except Fault as fault:
            if fault.kind == "too_large":  # the code's output, which must not count as a failure of the server
                return ToolResult(f"The code prints too much. {KEPT}", Outcome.LIMIT), state
            # A time limit of the code is an answer of the server; a request that times out is the server's failure.
            return unavailable(fault), state
        except (KeyError, TypeError):
            return unavailable("an unknown answer"), state
        text, found, report = writable(output).rpartition(f"\n{mark}")
        if not found:
            return self._unfinished(output, status, bool(state)), state
        text = text.rstrip("\n") or "(no output)"
        outcomes = {cell.DONE: Outcome.OK, cell.FAILED: Outcome.ERROR, cell.OUT_OF_MEMORY: Outcome.LIMIT}
        return ToolResult(text, outcomes.get(report.strip()[:1].encode(), Outcome.ERROR)), calls

    def close(self) -> None:
        pass

    def _unfinished(self, output: str, status: object, earlier: bool) -> ToolResult:
        text = writable(output)[: self._config.max_output_chars].strip("\n")
        if status == "TimeLimitExceeded":
            code = "The code and the earlier calls, which were run again," if earlier else "The code"
            why = f"{code} did not finish within {self._run_timeout:g} s."
            return ToolResult(f"{text}\n{why} {KEPT}".lstrip(), Outcome.TIMEOUT)
        return ToolResult(f"{text}\n{ENDED} {KEPT}".lstrip(), Outcome.ERROR)

    def _program(self, calls: State, mark: str) -> str:
        values: dict[str, Any] = {
            "SOURCE": inspect.getsource(cell), "PRELOAD": list(self._config.preload), "CALLS": list(calls),
            "MAX_OUTPUT": self._config.max_output_bytes, "MARK": mark,
        }  # fmt: skip
        return "\n".join(f"{name} = {value!r}" for name, value in values.items()) + _PROGRAM

    def _run(self, program: str) -> Any:
        body = {"code": writable(program), "language": "python", "run_timeout": self._run_timeout}
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        deadline = time.monotonic() + self.timeout
        data = post(self._url, json.dumps(body).encode(), headers, deadline, self._config.allow_private, "tools.python")
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError):
            raise Fault("garbage", "the server's answer is not JSON", retry=False) from None
        if not isinstance(answer, dict) or answer.get("status") == "SandboxError":
            raise Fault("sandbox", "the server could not run it", retry=False)
        return answer
