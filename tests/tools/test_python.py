"""The Python tool: what the policy reads, and that a state can be continued any number of times from any call."""

import contextlib
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from appo_jax.config import PythonToolConfig, ToolsConfig
from appo_jax.errors import ToolError
from appo_jax.tools.arguments import NO_CODE
from appo_jax.tools.bubblewrap import locate
from appo_jax.tools.build import build_executor
from appo_jax.tools.protocol import ToolResult
from appo_jax.tools.python import PythonTool
from appo_jax.tools.sandbox import system
from appo_jax.tools.sandbox.cell import clean
from appo_jax.tools.sandbox.system import descendants
from appo_jax.types import Outcome

BUBBLEWRAP = shutil.which("bwrap") is not None and (
    subprocess.run(["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"], capture_output=True).returncode == 0
)
ISOLATIONS = [
    pytest.param("bubblewrap", marks=pytest.mark.skipif(not BUBBLEWRAP, reason="bubblewrap does not work here")),
    "process",
]


@pytest.fixture(scope="module", params=ISOLATIONS)
def tool(request):
    tool = PythonTool(PythonToolConfig(isolation=request.param, timeout=5.0, preload=("math",), max_output_chars=400))
    yield tool
    tool.close()


def run(tool, *cells):
    """The last result of cells that are run one after another, and the state after them."""
    state = tool.start()
    for cell in cells:
        result, state = tool.call(state, cell)
    return result, state


@pytest.mark.parametrize(
    ("cells", "text"),
    [
        (["print(1 + 1)"], "2"),
        (["1 + 1"], "2"),
        (["'a'"], "'a'"),
        (["None"], "(no output)"),
        (["x = 3"], "(no output)"),
        (["print('a')\n'b'"], "a\n'b'"),
        (["x = 3", "x * 2"], "6"),
        (["import math as m", "m.comb(5, 2)"], "10"),
        (["def f(n):\n    return n if n < 2 else f(n - 1) + f(n - 2)", "f(10)"], "55"),
        (["from dataclasses import dataclass\n@dataclass\nclass A:\n    n: int", "A(3)"], "A(n=3)"),
        (["    x = 1\n    print(x)"], "1"),
        (["```python\nprint(7)\n```"], "7"),
        # as published system prompts show a call: <python> import math … </python>
        ([" import math\nprint(math.factorial(5)) "], "120"),
        (["\timport math\nprint(math.factorial(5))\n"], "120"),
        ([" \n import math\nprint(math.factorial(5))"], "120"),
        ([" for i in range(2):\n    print(i)\n    print('-')"], "0\n-\n1\n-"),
        (["\tfor i in range(2):\n        print(i)"], "0\n1"),
        (["    for i in range(2):\n        print(i)\n    print('end')"], "0\n1\nend"),
        ([" print('''a\n  b''')"], "a\n  b"),
        ([" s = '''a\n b\nc'''\nprint(s)"], "a\n b\nc"),
        (["print('''a\n  \nb''')"], "a\n  \nb"),
        (["```python3\nprint(7)\n```"], "7"),
        (["```Python\nprint(7)\n```"], "7"),
        ([" ```PY\nprint(7)\n```"], "7"),
        (["```python\nx = 3\n```\n\n```py3\nprint(x * 2)\n```"], "6"),
        (["```\nx = 3\n```\n```\nx * 2\n```"], "6"),
        (["```python\nprint(\'\'\'a\n```\n```py\nb\'\'\')\n```"], "a\n```\n```py\nb"),  # fences in a string
        (["if __name__ == '__main__': print('main')"], "main"),
        (["x = 1; x"], "1"),
        (["import sys; sys.exit()"], "(no output)"),
        (["exit()"], "(no output)"),
        (["import warnings, sys; print('to stderr', file=sys.stderr)"], "to stderr"),
        (["import asyncio\nasync def f(): return 4\nasyncio.run(f())"], "4"),
        (["[i for i in range(3)]", "# only a comment"], "(no output)"),
        (["import io, contextlib as c\nwith c.redirect_stdout(io.StringIO()) as s: print(1)\nlen(s.getvalue())"], "2"),
        (["import sys; _ = sys.stdout.buffer.write(b'bytes')"], "bytes"),
        (["print('ä€😀')"], "ä€😀"),
        (["x = '" + "a" * 95_000 + "'\nlen(x)"], "95000"),
    ],
)  # fmt: skip
def test_what_a_call_shows(tool, cells, text):
    result, _ = run(tool, *cells)
    assert (result.text, result.outcome) == (text, Outcome.OK)


def test_a_text_that_is_no_code_is_explained(tool):
    result, _ = run(tool, '{"code": "print(1)"}')
    assert result == ToolResult(NO_CODE, Outcome.MALFORMED)


def test_an_error_shows_the_policys_own_lines(tool):
    result, _ = run(tool, "def f(x):\n    return 1 / x", "y = 0\nf(y)")
    assert result.outcome is Outcome.ERROR
    assert result.text == (
        "Traceback (most recent call last):\n"
        '  File "<call 2>", line 2, in <module>\n    f(y)\n'
        '  File "<call 1>", line 2, in f\n    return 1 / x\n'
        "ZeroDivisionError: division by zero"
    )


def test_frames_of_libraries_are_left_out(tool):
    result, _ = run(tool, "import json\njson.loads('{')")
    assert "json/" not in result.text
    assert result.text.startswith('Traceback (most recent call last):\n  File "<call 1>", line 2, in <module>')


def test_a_syntax_error_names_its_line(tool):
    result, _ = run(tool, "x = 1\ny = = 2")
    assert result.outcome is Outcome.ERROR
    assert 'File "<call 1>", line 2' in result.text
    assert "SyntaxError" in result.text


def test_what_ran_before_an_error_is_kept(tool):
    result, _ = run(tool, "x = 1\nx += 1\n1 / 0", "x")
    assert result.text == "2"


@pytest.mark.parametrize("bad", ["while True: pass", "import os; os._exit(1)", "import ctypes; ctypes.string_at(0)"])
def test_a_lost_call_leaves_the_state_before_it(tool, bad):
    quick = PythonTool(PythonToolConfig(isolation=tool._config.isolation, timeout=0.3, preload=("math",)))
    try:
        _, state = quick.call(quick.start(), "x = [1]")
        result, after = quick.call(state, f"x.append(2)\n{bad}")
        assert result.outcome in (Outcome.TIMEOUT, Outcome.ERROR)
        assert "as they were before this call" in result.text
        assert quick.call(after, "x")[0].text == "[1]"
    finally:
        quick.close()


@pytest.mark.parametrize(
    ("code", "first", "last"),
    [
        ("for i in range(100_000): print(i)", "0\n1\n", "\n99998\n99999"),
        ("for i in range(100_000): print(i)\n1 / 0", "0\n1\n", "\nZeroDivisionError: division by zero"),
        ("print('é' * 90_000)\nprint('done')", "ééé", "é\ndone"),
        ("import sys\nsys.stdout.buffer.write(b'x' * 90_000)\nprint('\\nend')", "xxx", "x\nend"),
        ("print('a' * 90_000)\nimport sys; sys.exit('that is all')", "aaa", "that is all"),
        ("def f(n):\n    return f(n - 1) if n else 1 / 0  # " + "x" * 900 + "\nf(20)", "Traceback", "division by zero"),
        ("raise ValueError('a' * 9000 + ' the end')", "Traceback", "aaa the end"),
    ],
)
def test_a_long_output_keeps_its_beginning_and_its_end(tool, code, first, last):
    result, _ = run(tool, code)
    assert result.text.startswith(first)
    assert result.text.endswith(last)
    assert len(result.text) < 12_000


@pytest.mark.parametrize("code", ["s = '''\n  two\n'''\nprint(s)", "if x:\n    s = '''\n  \n'''", "", "x"])
def test_clean_leaves_ordinary_code_alone(code):
    assert clean(code) == code


def test_two_branches_of_one_state_do_not_see_each_other(tool):
    _, state = run(tool, "x = {'a': [1]}\nopen('f', 'w').write('one')")
    left, left_state = tool.call(state, "x['a'].append(2)\nopen('f', 'a').write(' left')\nx")
    right, right_state = tool.call(state, "x['b'] = 3\nx, open('f').read()")
    assert left.text == "{'a': [1, 2]}"
    assert right.text == "({'a': [1], 'b': 3}, 'one')"
    assert tool.call(left_state, "x, open('f').read()")[0].text == "({'a': [1, 2]}, 'one left')"
    assert tool.call(right_state, "import os; os.remove('f'); os.listdir('.')")[0].text == "[]"
    assert tool.call(state, "open('f').read()")[0].text == "'one'"


def test_an_open_file_is_forked_with_its_state(tool):
    _, state = run(tool, "f = open('log', 'w+')\n_ = f.write('one\\n')\nf.flush()")
    for _ in range(2):  # the second branch would find the first one's line if they shared the file
        result, _ = tool.call(state, "_ = f.write('two\\n'); f.flush(); open('log').read()")
        assert result.text == "'one\\ntwo\\n'"
    assert tool.call(state, "_ = f.seek(0); f.read()")[0].text == "'one\\n'"


def test_a_working_directory_is_kept(tool):
    result, _ = run(tool, "import os\nos.makedirs('a/b')\nopen('a/b/c', 'w').write('x')", "os.listdir('a/b')")
    assert result.text == "['c']"


STEPS = (
    "a = {n}", "b.append({n})", "b += [a, {n}]", "c[{n}] = a", "c.setdefault('k', []).append({n})", "a *= -2",
    "d = copy.deepcopy(c); c.clear()", "import string; b.append(string.digits[{n}])",
    "import math; a = math.comb(9, 2)",
    "a = random.randrange(1000)", "random.shuffle(b)", "b.append(random.gauss(0, 1))", "def f(x, n={n}): return x + n",
    "a = f(a)", "b = b[::-1]", "b = sorted(map(str, b))", "class K: v = {n}", "a += K.v", "g = (i for i in range(9))",
    "b.append(next(g, None))", "del b[:{n}]", "b.append(hash('{n}'))", "a = 1 // (a % 3)",
    "open('n', 'a').write('{n}')",
    "b.append(open('n').read())", "K.v += a", "b.append(b[:2])",
)  # fmt: skip
SETUP = "import copy, random\na, b, c, d = 0, [], {}, None\ndef f(x): return x\nclass K: v = 1\ng = iter(range(3))"
SHOW = "print(a, b, c, d, f(1), K.v, random.random())"


# Runs each program's cells one after the other in a plain interpreter: the truth that branches are compared with.
REPLAY = """
import contextlib, io, json, os, random, sys, tempfile
for cells in json.load(sys.stdin):
    random.seed(0)
    os.chdir(tempfile.mkdtemp(dir=sys.argv[1]))
    space, out = {"__name__": "__main__"}, io.StringIO()
    with contextlib.redirect_stdout(out):
        for cell in cells:
            try:
                exec(cell, space)
            except Exception:
                pass
    print(json.dumps(out.getvalue().rstrip("\\n")))
"""


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_every_branch_equals_a_replay_from_the_start(isolation, tmp_path):
    """1,000 random programs, taken as branches at random calls of random trees."""
    number = 1000 if isolation == "bubblewrap" else 100
    tool = PythonTool(PythonToolConfig(isolation=isolation, preload=("math", "random", "copy", "string")))

    def tree(seed):
        rng = random.Random(seed)
        nodes = [((SETUP,), tool.call(tool.start(), SETUP)[1])]
        for _ in range(10):
            cells, state = rng.choice(nodes)  # an early one is a branch
            cell = "\n".join(rng.choice(STEPS).format(n=rng.randrange(6)) for _ in range(rng.randrange(1, 5)))
            nodes.append(((*cells, cell), tool.call(state, cell)[1]))
        return [((*cells, SHOW), tool.call(state, SHOW)[0].text) for cells, state in nodes[1:]]

    try:
        with ThreadPoolExecutor(4) as pool:
            branches = [branch for tree in pool.map(tree, range(number // 10)) for branch in tree]
    finally:
        tool.close()
    replay = subprocess.run(
        [sys.executable, "-c", REPLAY, str(tmp_path)],
        input=json.dumps([cells for cells, _ in branches]),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "0"},
    )
    truth = [json.loads(line) for line in replay.stdout.splitlines()]
    assert len(truth) == number
    assert len(set(truth)) > number // 2  # the programs do differ
    for (cells, text), expected in zip(branches, truth, strict=True):
        assert text == expected, cells


def test_numpy_draws_go_on_where_they_were():
    tool = PythonTool(PythonToolConfig(isolation="process", preload=("numpy",)))
    try:
        _, state = run(tool, "import numpy as np; a = np.random.rand()")
        first, second = (tool.call(state, "a, np.random.rand()")[0].text for _ in range(2))
        assert first == second
    finally:
        tool.close()


def test_states_are_freed_with_their_last_reference(tool):
    def processes():
        return len(descendants(tool.pid))

    gc.collect()
    time.sleep(0.5)
    start = processes()
    states = [tool.call(tool.start(), f"x = {i}")[1] for i in range(10)]
    assert processes() == start + 10
    del states[::2]
    gc.collect()
    until(lambda: processes() == start + 5)
    del states
    gc.collect()
    until(lambda: processes() == start)


def until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_nothing_survives_a_killed_trainer(isolation, tmp_path):
    program = (
        "import sys, time\nfrom appo_jax.config import PythonToolConfig\nfrom appo_jax.tools.python import PythonTool\n"
        f"tool = PythonTool(PythonToolConfig(isolation={isolation!r}, preload=('math',), timeout=60))\n"
        "state = tool.call(tool.start(), 'x = 1')[1]\nprint(tool.pid, flush=True)\n"
        "tool.call(state, 'while True: pass')"
    )
    trainer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env={
        **os.environ, "TMPDIR": str(tmp_path)})  # fmt: skip
    sandbox = int(trainer.stdout.readline())
    until(lambda: len(descendants(sandbox)) >= 2)
    left = descendants(sandbox) | {sandbox}
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    trainer.stdout.close()
    until(lambda: not any(alive(pid) for pid in left))
    until(lambda: os.listdir(tmp_path) == [])


# A trainer with a rollout that is busy, one that never reads what it is asked, and one that comes and goes.
BUSY = """
import sys, threading
from appo_jax.config import PythonToolConfig
from appo_jax.tools.python import PythonTool
print("up", flush=True)
tool = PythonTool(PythonToolConfig(preload=("math",), timeout=60))
def deaf():
    _, state = tool.call(tool.start(), "import os\\nos.write(60, b'd')\\nwhile True:\\n try: os.fork()\\n except OSError: 0")
    for _ in range(8):
        threading.Thread(target=tool.call, args=(state, "#" + "x" * 90_000), daemon=True).start()
threading.Thread(target=tool.call, args=(tool.start(), "while True: pass"), daemon=True).start()
threading.Thread(target=deaf, daemon=True).start()
while True:
    tool.call(tool.start(), "x = 1")
"""


@pytest.mark.skipif(not BUBBLEWRAP, reason="bubblewrap does not work here")
def test_nothing_survives_a_trainer_killed_at_any_moment():
    system.prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: what a trainer leaves behind becomes this process's child
    before = descendants(os.getpid())

    def kill_after(seconds):
        trainer = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        with trainer, trainer.stdout as out:
            assert out.readline() == b"up\n"
            time.sleep(seconds)
            trainer.send_signal(signal.SIGKILL)
        return True

    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(kill_after, [0.05 * moment for moment in range(20)]))
        until(lambda: not any(alive(pid) for pid in descendants(os.getpid()) - before))
    finally:
        system.prctl(36, 0)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_dead_sandbox_is_replaced_and_says_so(tool):
    _, state = run(tool, "x = 1")
    for pid in (tool.pid, *descendants(tool.pid)):  # bubblewrap, the supervisor and all else
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    until(lambda: not alive(tool.pid))
    time.sleep(0.1)
    result, state = tool.call(state, "y = 2\ny")
    assert result.text.endswith("\n2")
    assert "restarted" in result.text
    assert tool.call(state, "y")[0].text == "2"


def test_closing_leaves_nothing_open():
    before = set(os.listdir("/proc/self/fd")), threading.active_count()
    tool = PythonTool(PythonToolConfig(isolation="process", preload=("math",)))
    _, state = run(tool, "x = 1")
    tool.close()
    tool.close()
    assert (set(os.listdir("/proc/self/fd")), threading.active_count()) == before
    assert tool.call(state, "x")[0].outcome is Outcome.UNAVAILABLE
    assert tool.call(tool.start(), "x")[0].outcome is Outcome.UNAVAILABLE


def test_weak_isolation_is_logged_loudly(caplog):
    PythonTool(PythonToolConfig(isolation="process", preload=("math",))).close()
    assert [record.levelname for record in caplog.records if "WITHOUT namespaces" in record.message] == ["WARNING"]


def test_missing_isolation_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolError, match=r"apt-get install bubblewrap[\s\S]*--tools.python.isolation process"):
        PythonTool(PythonToolConfig(isolation="bubblewrap"))


def test_a_preload_that_cannot_be_imported_is_an_error():
    with pytest.raises(ToolError, match="no_such_module"):
        PythonTool(PythonToolConfig(isolation="process", preload=("no_such_module",)))


def test_a_module_that_is_not_installed_is_named_without_advice_on_bubblewrap():
    with pytest.raises(ToolError, match="'no_such_module' is not installed here") as caught:
        PythonTool(PythonToolConfig(modules=("no_such_module.part",)))
    assert "apt-get" not in str(caught.value)


def test_modules_in_editable_mode_are_found_where_they_are(tmp_path, monkeypatch):
    """As pip install -e leaves them: the folder of packages has only a finder, for the module and for what it requires."""
    site, checkout = tmp_path / "site", tmp_path / "checkout"
    for name, requires in (("editable_module", "Requires-Dist: Editable-Need\n"), ("editable_need", "")):
        information = site / f"{name}-1.0.dist-info"
        information.mkdir(parents=True)
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{requires}")
        (information / "top_level.txt").write_text(f"{name}\n")
        (information / "RECORD").write_text(f"__editable___{name}_finder.py,,\n{name}-1.0.dist-info/METADATA,,\n")
        (site / f"__editable___{name}_finder.py").write_text("")
    (checkout / "editable_module").mkdir(parents=True)
    (checkout / "editable_module" / "__init__.py").write_text("import editable_need\n")
    (checkout / "editable_need.py").write_text("VALUE = 7\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.syspath_prepend(checkout)
    assert locate(["editable_module"]) == {
        "editable_module": checkout / "editable_module",
        "editable_need.py": checkout / "editable_need.py",
    }


def test_process_isolation_limits_files_and_leaves_nothing():
    """Many files of 8 MB exceed the limit; a process that has left its group ends with the tool."""
    tool = PythonTool(PythonToolConfig(isolation="process", preload=("math",), timeout=5.0))
    pid = tool.pid
    try:
        state = tool.start()
        result, _ = tool.call(state, "for i in range(9):\n    open(str(i), 'wb').write(bytes(8 << 20))\nx = 1")
        assert result.outcome is Outcome.LIMIT
        assert "16 MB" in result.text
        result, _ = tool.call(
            state, "import time\nfor i in range(9):\n    open(str(i), 'wb').write(bytes(8 << 20))\ntime.sleep(4)"
        )
        assert result.outcome is Outcome.LIMIT
        _, kept = tool.call(state, "import os\nos.setsid() if os.getpgid(0) != os.getpid() else None\nx = 1")
        assert kept is not None
        processes = descendants(pid) | {pid}
    finally:
        tool.close()
    until(lambda: not any(alive(process) for process in processes))


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_a_state_that_delays_its_forks_does_not_take_the_tool_down(isolation, monkeypatch):
    """Two branches of such a state: the second waits for the first one's fork, then for its own, and then runs to its limit."""
    monkeypatch.setattr("appo_jax.tools.lanes.GRACE", 1.0)
    config = ToolsConfig(enabled=("python",), python=PythonToolConfig(isolation=isolation, preload=("math",)))
    with build_executor(config) as executor:
        slow = "import os, time\nos.register_at_fork(before=lambda: time.sleep(4))"
        states = executor.submit(executor.start(), f"<python>{slow}</python>").result(20).states
        began = time.monotonic()
        calls = [executor.submit(states, "<python>import time\nwhile True: time.sleep(0.1)</python>") for _ in range(2)]
        assert {call.result(20).outcome for call in calls} == {Outcome.TIMEOUT}
        assert time.monotonic() - began < config.python.timeout + 3.0
        assert executor.submit(executor.start(), "<python>1 + 1</python>").result(20).result == "2"
