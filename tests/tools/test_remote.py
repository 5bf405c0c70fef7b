"""The Python tool over HTTP: a real server on loopback that runs programs like SandboxFusion, and keeps nothing."""

import contextlib
import dataclasses
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from test_python import SETUP, SHOW, STEPS

from appo_jax.config import PythonToolConfig, ToolsConfig
from appo_jax.errors import ConfigError
from appo_jax.tools.build import build_executor
from appo_jax.tools.lanes import TRIP_AFTER
from appo_jax.tools.python import PythonTool
from appo_jax.tools.remote import RemotePythonTool
from appo_jax.types import Outcome


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert (self.path, asked["language"]) == ("/run_code", "python")
        if self.server.hang.is_set():
            self.server.over.wait(20)
            return
        answer = self.server.fault or self.run(asked)
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the tool hangs up on an answer that is too large
            self.wfile.write(data)

    def run(self, asked):
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "main.py").write_text(asked["code"])
            try:
                done = subprocess.run(
                    [sys.executable, "main.py"], cwd=folder, capture_output=True, text=True, errors="replace",
                    timeout=min(asked["run_timeout"], self.server.limit), env={"PATH": "/usr/bin:/bin"},
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                run = {"status": "TimeLimitExceeded", "stdout": "", "stderr": ""}
                return {"status": "Failed", "message": "", "run_result": run}
        ended = {"status": "Finished", "return_code": done.returncode, "stdout": done.stdout, "stderr": done.stderr}
        return {"status": "Failed" if done.returncode else "Success", "message": "", "run_result": ended}


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.fault, server.limit, server.hang, server.over = None, 3.0, threading.Event(), threading.Event()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def config(server):
    url = f"http://127.0.0.1:{server.server_address[1]}/"
    return PythonToolConfig(isolation="remote", url=url, allow_private=True, preload=("math",), timeout=5.0)


@pytest.mark.parametrize(
    "cells",
    [
        ["print(1 + 1)"], ["x = 3", "x * 2"], ["1 / 0"], ["x = 1\n1 / 0", "x"], ["print('a')\n'b'"], ["None"],
        ["import random; a = random.random()", "a, random.random()"], ["open('f', 'w').write('x')", "open('f').read()"],
        ["print('never again')", "print('ä€')"], ["def f(x):\n    return 1 / x", "f(0)"], ["hash('a')"],
        ["```python\nprint(7)\n```"], ["import os\nos.write(1, b'raw')"], ["raise SystemExit(3)"], ["y = ="],
        ['"print(1)"'], [" x = 2\nprint(x)"], ["```Python\nx = 2\n```\n```py\nprint(x)\n```"],
    ],
)  # fmt: skip
def test_it_answers_as_the_local_tool_does(config, cells):
    remote, local = RemotePythonTool(config), PythonTool(PythonToolConfig(isolation="process", preload=("math",)))
    try:
        there, here = remote.start(), local.start()
        for code in cells:
            (far, there), (near, here) = remote.call(there, code), local.call(here, code)
            assert (far.text, far.outcome) == (near.text, near.outcome)
    finally:
        local.close()


def test_branches_equal_a_replay(config):
    """Random programs, forked at random calls, give the same results as with the local tool."""
    remote = RemotePythonTool(config)
    local = PythonTool(PythonToolConfig(isolation="process", preload=("math", "random", "copy", "string")))
    rng = random.Random(0)
    try:
        nodes = [(remote.call(remote.start(), SETUP)[1], local.call(local.start(), SETUP)[1])]
        for _ in range(8):
            there, here = rng.choice(nodes)
            code = "\n".join(rng.choice(STEPS).format(n=rng.randrange(6)) for _ in range(4))
            nodes.append((remote.call(there, code)[1], local.call(here, code)[1]))
        for there, here in nodes:
            assert remote.call(there, SHOW)[0].text == local.call(here, SHOW)[0].text
    finally:
        local.close()


def test_a_lost_call_leaves_the_state_before_it(config, server):
    tool = RemotePythonTool(config)
    _, state = tool.call(tool.start(), "x = 1")
    server.limit = 1.0
    for bad, outcome in (
        ("x = 2\nwhile True: pass", Outcome.TIMEOUT),
        ("x = 2\nimport os; os._exit(0)", Outcome.ERROR),
    ):
        result, after = tool.call(state, bad)
        assert result.outcome is outcome
        assert "as they were before this call" in result.text
        assert tool.call(after, "x")[0].text == "1"


def test_replayed_calls_share_one_time_limit(config):
    tool = RemotePythonTool(dataclasses.replace(config, timeout=1.0))
    slow = "import time\ntime.sleep(1.1)"
    _, state = tool.call(tool.start(), slow)
    result, after = tool.call(state, slow)
    assert result.outcome is Outcome.TIMEOUT
    assert "The code and the earlier calls, which were run again, did not finish within 2 s." in result.text
    assert after == state


def test_a_server_that_hangs_is_down(config, server, monkeypatch):
    """Then the circuit opens, and the run waits for the server. The time limit of the code is an answer of the server."""
    monkeypatch.setattr("appo_jax.tools.remote.ROUND_TRIP", 0.1)
    server.hang.set()
    config = dataclasses.replace(config, timeout=0.1)
    with build_executor(ToolsConfig(enabled=("python",), python=config)) as executor:
        calls = [executor.submit(executor.start(), "<python>1</python>") for _ in range(TRIP_AFTER)]
        assert {call.result(5).outcome for call in calls} == {Outcome.UNAVAILABLE}
        assert "failed repeatedly" in executor.submit(executor.start(), "<python>1</python>").result(5).result


def test_code_that_prints_too_much_is_no_failure_of_the_server(config):
    with build_executor(ToolsConfig(enabled=("python",), python=config)) as executor:
        flood = "<python>import os\nfor _ in range(50): os.write(1, b'x' * 100_000)</python>"
        for _ in range(TRIP_AFTER + 1):
            assert executor.submit(executor.start(), flood).result(20).outcome is Outcome.LIMIT
        assert executor.submit(executor.start(), "<python>1 + 1</python>").result(20).result == "2"


@pytest.mark.parametrize("fault", [b"", b"<html>", b"[]", b"{}", b'{"run_result": 3}', b'{"status": "SandboxError"}'])
def test_a_server_that_fails_is_text(config, server, fault):
    server.fault = fault or b"\xff"
    result, state = RemotePythonTool(config).call((), "1")
    assert result.outcome is Outcome.UNAVAILABLE
    assert state == ()


def test_it_is_chosen_by_the_config(config):
    with build_executor(ToolsConfig(enabled=("python",), python=config)) as executor:
        first = executor.submit(executor.start(), "<python>x = 20</python>").result(20)
        assert executor.submit(first.states, "<python>x + 1</python>").result(20).result == "21"


@pytest.mark.parametrize("url", [None, "nonsense", "http://127.0.0.1:1", "http://169.254.169.254", "http://h:port"])
def test_an_address_that_is_missing_or_private_is_refused(url):
    with pytest.raises(ConfigError, match=r"tools\.python"):
        RemotePythonTool(PythonToolConfig(isolation="remote", url=url))


def test_nobody_listens():
    tool = RemotePythonTool(PythonToolConfig(isolation="remote", url="http://127.0.0.1:9", allow_private=True))
    began = time.monotonic()
    assert tool.call((), "1")[0].outcome is Outcome.UNAVAILABLE
    assert time.monotonic() - began < 5
