"""The Python tool: it runs policy code in a sandbox. State is kept from call to call and can be forked at every call.

The sandbox is bubblewrap around the programs of `tools/sandbox`. A state is a `Snapshot`: two calls with the same snapshot
give two independent continuations, and its process ends when the last reference to the snapshot is gone. The trainer itself
never forks; it starts one child per tool and talks to it over a socket.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import weakref
from collections import deque
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

from appo_jax.config import PythonToolConfig, ToolsConfig
from appo_jax.errors import ToolError
from appo_jax.tools.bubblewrap import advice, command_line
from appo_jax.tools.cgroup import ControlGroup
from appo_jax.tools.code import ENDED, KEPT, PythonCode, refusal, unavailable
from appo_jax.tools.protocol import Tool, ToolResult
from appo_jax.tools.remote import RemotePythonTool
from appo_jax.tools.sandbox import system
from appo_jax.tools.sandbox.enter import UNPRIVILEGED
from appo_jax.tools.sandbox.interpreter import MAX_FILE_BYTES
from appo_jax.types import Outcome

logger = logging.getLogger(__name__)

START_TIMEOUT = 60.0  # seconds for the sandbox to start and import its modules
REPLY_GRACE = 20.0  # seconds after its deadline at which a silent sandbox counts as dead
CLOSE_TIMEOUT = 5.0  # seconds for a sandbox to end by itself
FREE_EVERY = 0.2  # seconds between checks for states to free while no messages are exchanged


def make_tool(config: ToolsConfig, documents: object) -> Tool:
    """The tool for `python.isolation`. Raises ToolError, or ConfigError for a server's address."""
    return RemotePythonTool(config.python) if config.python.isolation == "remote" else PythonTool(config.python)


class PythonTool(PythonCode):
    """The `python` tool. Safe to call from several threads."""

    def __init__(self, config: PythonToolConfig):
        """Start the sandbox. Raises ToolError if the requested isolation is not available."""
        self._config = config
        self.timeout = config.timeout + 2.0  # including the wait for a fork
        self._lock = threading.Lock()
        self._closed = False
        if config.isolation == "process":
            logger.warning(
                "tools.python.isolation = process: policy code runs WITHOUT namespaces. It can read, write and delete "
                "what user %d can, the trainer's memory included. Use it only for policies you trust.", os.geteuid()
            )  # fmt: skip
        elif os.geteuid() == 0:
            logger.warning(
                "tools.python: the trainer runs as root. Policy code is mapped to the unprivileged user %d; better "
                "train as a user without privileges.", UNPRIVILEGED
            )  # fmt: skip
        self._sandbox = Sandbox(config)

    @property
    def pid(self) -> int:
        """Process id of the sandbox; everything that policy code starts descends from it."""
        return self._sandbox.pid

    def start(self) -> Snapshot:
        """The state in which only the preloaded modules are loaded."""
        try:
            return self._live_sandbox().root
        except SandboxLost:
            return self._sandbox.root  # calls from it explain what is wrong

    def call(self, state: Snapshot | None, argument: str) -> tuple[ToolResult, Snapshot | None]:
        """Run `argument` from `state`. The result is what it prints and its last expression's value, or its error."""
        if (refused := refusal(argument)) is not None:
            return refused, state
        try:
            sandbox = self._live_sandbox()
            lost = state is not None and state.sandbox is not sandbox
            reply, after = sandbox.run(sandbox.root if lost or state is None else state, argument, self._config.timeout)
        except SandboxLost as error:
            return unavailable(error), state
        result = self._result(reply)
        if lost:
            notice = "(The interpreter was restarted; variables of earlier calls are gone.)\n"
            result = ToolResult(notice + result.text, result.outcome)
        return result, after if after is not None else state

    def close(self) -> None:
        """End the sandbox and every process in it."""
        with self._lock:
            self._closed = True
            self._sandbox.close()

    def _live_sandbox(self) -> Sandbox:
        with self._lock:
            if self._closed:
                raise SandboxLost("the tool is closed")
            if not self._sandbox.alive:
                self._sandbox.close()
                try:
                    self._sandbox = Sandbox(self._config)
                except ToolError as error:
                    raise SandboxLost(str(error)) from error
            return self._sandbox

    def _result(self, reply: dict[str, Any]) -> ToolResult:
        text = reply["text"].rstrip("\n")  # the rollout truncates it to the allowed number of tokens
        match reply["outcome"]:
            case "ok":
                return ToolResult(text or "(no output)", Outcome.OK)
            case "error":
                return ToolResult(text or "(no output)", Outcome.ERROR)
            case "limit":
                why = f"The code needs more memory than it may have ({self._config.memory_mb} MB)."
                return ToolResult(f"{text}\n{why}".lstrip(), Outcome.LIMIT)
            case "timeout":
                why = f"The code did not finish within {self._config.timeout:g} s."
                return ToolResult(f"{text}\n{why} {KEPT}".lstrip(), Outcome.TIMEOUT)
            case "died":
                return ToolResult(f"{text}\n{ENDED} {KEPT}".lstrip(), Outcome.ERROR)
            case "refused":
                return ToolResult(f"{text}\n{KEPT}".lstrip(), Outcome.ERROR)
            case "files":
                why = f"The files take more than {MAX_FILE_BYTES >> 20} MB, or are too many."
                return ToolResult(f"{text}\n{why} {KEPT}".lstrip(), Outcome.LIMIT)
            case "stuck":
                why = (
                    "No call can be made from this state of the interpreter now: its limits do not allow a new process."
                )
                return ToolResult(why, Outcome.LIMIT)
            case "full":
                return ToolResult("The machine has no memory for another interpreter state.", Outcome.UNAVAILABLE)
            case _:
                return ToolResult("The state of the interpreter is lost: its code interfered with it.", Outcome.ERROR)


class Snapshot:
    """A state of the interpreter. Its process ends with the last reference to it."""

    __slots__ = ("__weakref__", "id", "sandbox")

    def __init__(self, sandbox: Sandbox, identity: int):
        self.sandbox = sandbox
        self.id = identity
        if identity:
            weakref.finalize(self, sandbox.free, identity).atexit = False


class SandboxLost(Exception):
    """The sandbox does not answer."""


class Sandbox:
    """The child process and the messages with it."""

    def __init__(self, config: PythonToolConfig):
        self._ids = itertools.count(1)
        self._replies: dict[int, Future[dict[str, Any]]] = {}
        self._lock = threading.Lock()
        # Finalizers may run at any moment, even inside this class while it holds the lock, so they only record what to
        # free.
        self._to_free: deque[int] = deque()
        self._folder = tempfile.mkdtemp(prefix="appo-python-") if config.isolation == "process" else ""
        self._socket, theirs = socket.socketpair()
        self._group: ControlGroup | None = None
        self.alive = False
        started: Future[None] = Future()
        # bubblewrap ends with the thread that started it; this thread lives as long as the sandbox.
        self._listener = threading.Thread(
            target=self._live, args=(config, theirs, started), name="python-sandbox", daemon=True
        )
        self._listener.start()
        started.result()
        self.pid = self._process.pid
        self.root = Snapshot(self, 0)

    def _live(self, config: PythonToolConfig, theirs: socket.socket, started: Future[None]) -> None:
        try:
            self._start(config, theirs)
        except BaseException as error:
            self._socket.close()
            shutil.rmtree(self._folder, ignore_errors=True)
            started.set_exception(error)
            return
        self.alive = True
        started.set_result(None)
        self._listen()

    def _start(self, config: PythonToolConfig, theirs: socket.socket) -> None:
        with theirs:
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - the child's stderr, read when it has died
            try:
                command, environment = command_line(config, theirs.fileno(), self._folder)
                self._process = subprocess.Popen(
                    command, env=environment, pass_fds=[theirs.fileno()], cwd="/", start_new_session=True,
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._errors,
                )  # fmt: skip
            except OSError as error:
                raise ToolError(advice(config, str(error))) from error
        self._socket.settimeout(START_TIMEOUT)
        try:
            greeting = self._receive()
        except OSError as error:
            greeting = {"error": str(error)}
        if "error" in greeting:
            self._kill()
            raise ToolError(advice(config, f"{greeting['error']} {self._last_words()}"))
        if not greeting["filtered"]:
            logger.warning("tools.python: this kernel gives no system-call filter; policy code can reach the network")
        self._socket.settimeout(None)
        # The supervisor ends calls at a lower limit. This limit covers what the supervisor does not see.
        self._group = ControlGroup.make(greeting["memory"] + (1 << 30)) if greeting.get("memory") else None
        if self._group is not None:
            self._group.add({self._process.pid} | system.descendants(self._process.pid))

    def run(self, state: Snapshot, code: str, timeout: float) -> tuple[dict[str, Any], Snapshot | None]:
        """Run code from a state. Returns the reply and the state after it, if there is one. Raises SandboxLost."""
        identity = next(self._ids)
        reply: Future[dict[str, Any]] = Future()
        self._replies[identity] = reply
        after = Snapshot(self, identity)
        try:
            self._send({"run": identity, "from": state.id, "code": code, "timeout": timeout})
            answer = reply.result(timeout + REPLY_GRACE)
        except FutureTimeout:
            self.alive = False
            raise SandboxLost("it does not answer") from None
        except OSError as error:
            raise SandboxLost(str(error)) from error
        finally:
            self._replies.pop(identity, None)
        ended = answer["outcome"] in ("ok", "error")
        return answer, after if ended else None

    def free(self, identity: int) -> None:
        """Record a state that is to be freed, with the next message or soon by the listener."""
        self._to_free.append(identity)

    def close(self) -> None:
        """End the child. When it ends, process 1 of the sandbox ends, and with it all others."""
        self.alive = False
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(CLOSE_TIMEOUT)
        except subprocess.TimeoutExpired:
            logger.error("the Python sandbox does not end; its processes are killed")
            self._kill()
        self._listener.join(1)
        self._socket.close()
        self._errors.close()
        if self._group is not None:
            self._group.close()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _kill(self) -> None:
        """Kill every process of the sandbox, in any state."""
        for pid in (self._process.pid, *system.descendants(self._process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def _last_words(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode("utf-8", "replace").strip()[-2000:]

    def _send(self, message: dict[str, Any] | None = None) -> None:
        with self._lock:
            data = b""
            while self._to_free:
                data += _pack({"free": self._to_free.popleft()})
            if message is not None:
                data += _pack(message)
            if data:
                self._socket.sendall(data)

    def _listen(self) -> None:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        with contextlib.suppress(OSError):
            while True:
                while not poll.poll(FREE_EVERY * 1000):
                    self._send()
                reply = self._receive()
                future = self._replies.get(reply["id"])
                if future is not None:
                    future.set_result(reply)
        if self.alive:  # `close` was not called
            logger.error("the Python sandbox has died; the next call starts another. %s", self._last_words())
        self.alive = False
        for future in list(self._replies.values()):
            if not future.done():
                future.set_exception(ConnectionError("the sandbox has ended"))

    def _receive(self) -> dict[str, Any]:
        (length,) = struct.unpack("!I", self._read(4))
        return json.loads(self._read(length))

    def _read(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            part = self._socket.recv(length - len(data))
            if not part:
                raise ConnectionError("the sandbox has ended")
            data += part
        return data


def _pack(message: dict[str, Any]) -> bytes:
    data = json.dumps(message).encode()
    return struct.pack("!I", len(data)) + data
