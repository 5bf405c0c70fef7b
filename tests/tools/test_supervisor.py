"""The supervisor: each step of an interpreter's life, faults around state 0, what memory is counted, and a fuzzer that
sends it what states and trainers should not."""

import contextlib
import gc
import itertools
import json
import os
import random
import signal
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_attacks import REFUSED

from appo_jax.config import PythonToolConfig
from appo_jax.tools.python import PythonTool
from appo_jax.tools.sandbox import system
from appo_jax.tools.sandbox.budget import Budget
from appo_jax.tools.sandbox.messages import Trainer, TrainerGone
from appo_jax.tools.sandbox.node import Node, NoSuchStep, Phase
from appo_jax.tools.sandbox.system import descendants
from appo_jax.types import Outcome

FUZZ_SECONDS = float(os.environ.get("APPO_FUZZ_SECONDS", "6"))
needs_bubblewrap = pytest.mark.skipif(bool(REFUSED), reason=REFUSED)

# The life of an interpreter, written down a second time: every pair that is not here must be refused.
STEPS = {
    ("asked", "forking"), ("asked", "dead"), ("forking", "running"), ("forking", "dead"), ("running", "frozen"),
    ("running", "dead"), ("frozen", "dead"),
}  # fmt: skip


@pytest.mark.parametrize(("before", "after"), list(itertools.product(Phase, Phase)))
def test_an_interpreter_takes_the_steps_of_its_life_and_no_others(before, after):
    node = Node(1)
    node.phase = before
    if (before.value, after.value) in STEPS:
        node.become(after)
        assert node.phase is after
    else:
        with pytest.raises(NoSuchStep, match=f"state 1: from {before.value} to {after.value}"):
            node.become(after)
        assert node.phase is before


def make(**options):
    return PythonTool(PythonToolConfig(**{"preload": ("math",), "timeout": 2.0} | options))


@pytest.fixture
def tool():
    tool = make()
    yield tool
    tool.close()


def state_zero(tool):
    """The process of state 0: the oldest child of the supervisor."""
    return sorted(descendants(tool.pid) - {tool.pid})[1]


# Every step as the policy meets it: a call from a state in each phase.


@needs_bubblewrap
def test_from_asked_to_frozen(tool):
    result, state = tool.call(tool.start(), "x = 1\nx")
    assert (result.text, result.outcome) == ("1", Outcome.OK)
    assert tool.call(state, "x + 1")[0].text == "2"


@needs_bubblewrap
@pytest.mark.parametrize(
    ("code", "outcome"),
    [("import os; os._exit(0)", Outcome.ERROR), ("while True: pass", Outcome.TIMEOUT), ("[0] * 10**10", Outcome.LIMIT)],
)
def test_from_running_to_dead(code, outcome):
    tool = make(timeout=0.5)
    try:
        assert tool.call(tool.start(), code)[0].outcome is outcome
        assert tool.call(tool.start(), "1")[0].text == "1"
    finally:
        tool.close()


@needs_bubblewrap
def test_from_frozen_to_dead(tool):
    """A snapshot is killed from outside: later calls from it report that, and other states work."""
    _, state = tool.call(tool.start(), "x = 1")
    _, other = tool.call(tool.start(), "x = 2")
    (first, _) = sorted(descendants(tool.pid))[2:4]
    os.kill(first, signal.SIGKILL)
    result, _ = tool.call(state, "x")
    assert (result.outcome, "lost" in result.text) == (Outcome.ERROR, True)
    assert tool.call(other, "x")[0].text == "2"


@needs_bubblewrap
def test_from_asked_to_dead():
    """Requests that wait for a state that does not fork are all answered when it ends."""
    tool = make(timeout=0.4)
    try:
        _, state = tool.call(tool.start(), "import os, time\nos.fork = lambda: time.sleep(60)")
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda i: tool.call(state, f"{i}")[0], range(4)))
        assert all(result.outcome in (Outcome.ERROR, Outcome.TIMEOUT, Outcome.LIMIT) for result in results)
        assert tool.call(tool.start(), "1")[0].text == "1"
    finally:
        tool.close()


@needs_bubblewrap
def test_a_call_that_is_forgotten_before_it_ends_leaves_nothing(tool):
    """Earlier, a state that was freed while it was being forked lived for ever."""
    sandbox, before = tool._sandbox, len(descendants(tool.pid))
    for i in range(1000, 1050):
        sandbox._send({"run": i, "from": 0, "code": "while True: pass", "timeout": 30})
        sandbox.free(i)
    sandbox._send()
    end = time.monotonic() + 5
    while len(descendants(tool.pid)) > before:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert tool.call(tool.start(), "1")[0].text == "1"


# State 0


@needs_bubblewrap
def test_state_zero_is_not_killed_for_a_slow_fork():
    """State 0 is stopped, as on a stalled machine: calls time out, nothing is lost, and calls work again afterwards."""
    tool = make(timeout=0.3)
    try:
        _, state = tool.call(tool.start(), "x = 1")
        zero = state_zero(tool)
        os.kill(zero, signal.SIGSTOP)
        assert tool.call(tool.start(), "1")[0].outcome is Outcome.TIMEOUT
        assert tool.call(state, "x")[0].text == "1"
        os.kill(zero, signal.SIGCONT)
        assert tool.call(tool.start(), "2")[0].text == "2"
        assert state_zero(tool) == zero
    finally:
        tool.close()


def test_a_call_that_crashes_before_it_is_looked_at_has_run_once(tmp_path):
    """With process isolation, on a busy machine: the process of a call is already dead when the supervisor reads its greeting."""
    tool = make(isolation="process", timeout=5.0)
    over = threading.Event()

    def stall():
        while not over.is_set():
            os.kill(tool.pid, signal.SIGSTOP)
            time.sleep(0.02)
            os.kill(tool.pid, signal.SIGCONT)
            time.sleep(0.001)

    stalling = threading.Thread(target=stall)
    stalling.start()
    try:
        _, state = tool.call(tool.start(), "import os")
        for i, start in enumerate([tool.start(), state] * 10):
            ran = tmp_path / str(i)
            result, _ = tool.call(
                start,
                f"import os\nos.write(os.open({str(ran)!r}, os.O_CREAT | os.O_APPEND | os.O_WRONLY), b'once')\nos._exit(1)",
            )
            assert (result.outcome, "lost" in result.text) == (Outcome.ERROR, False)
            assert ran.read_text() == "once"
    finally:
        over.set()
        stalling.join()
        tool.close()


@needs_bubblewrap
def test_a_dead_state_zero_is_made_anew_and_all_states_live_on(tool):
    pid = tool.pid
    states = [tool.call(tool.start(), f"x = {i}")[1] for i in range(3)]
    os.kill(state_zero(tool), signal.SIGKILL)
    assert tool.call(tool.start(), "6 * 7")[0].text == "42"
    assert [tool.call(state, "x")[0].text for state in states] == ["0", "1", "2"]
    assert tool.pid == pid


@needs_bubblewrap
def test_a_stuck_sandbox_does_not_keep_another_from_starting():
    """Descriptors in unread messages count for all processes of a user."""
    first = make(timeout=0.5)
    try:
        deaf = "import os\nos.write(60, b'd')\nwhile True:\n    try: os.fork()\n    except OSError: pass"
        states = [first.call(first.start(), deaf)[1] for _ in range(4)]
        with ThreadPoolExecutor(16) as pool:
            calls = [pool.submit(first.call, state, "#" + "x" * 60_000) for state in states for _ in range(4)]
            second = make()
            try:
                assert second.call(second.start(), "6 * 7")[0].text == "42"
            finally:
                second.close()
            outcomes = [call.result()[0].outcome for call in calls]
        assert Outcome.UNAVAILABLE not in outcomes  # nor does it count as a failure of the tool
        assert first.call(first.start(), "6 * 7")[0].text == "42"
    finally:
        first.close()


# Memory


def test_what_is_shared_stays_counted_while_anybody_holds_it():
    budget = Budget(1000, root_memory=50)
    assert budget.add(1, 0, 450, 0)  # 400 of its own
    assert budget.add(2, 1, 460, 10)  # 10 more, and files
    assert budget.used == 420
    budget.remove(1)  # the first is forgotten: what it allocated lives on in the second
    assert budget.used == 420
    assert budget.add(3, 2, 470, 0)
    assert budget.add(4, 2, 900, 0)
    assert budget.used == 870
    assert not budget.add(5, 0, 200, 0)
    budget.remove(2)  # two branches share it
    assert budget.used == 870
    budget.remove(4)
    assert budget.used == 420
    budget.remove(3)
    assert budget.used == 0


def test_a_budget_is_empty_when_all_are_gone():
    rng = random.Random(0)
    for _ in range(200):
        budget, alive, number = Budget(10**6), [0], 0
        for _ in range(60):
            if len(alive) > 1 and rng.random() < 0.4:
                budget.remove(alive.pop(rng.randrange(1, len(alive))))
            else:
                number += 1
                if budget.add(number, rng.choice(alive), rng.randrange(10**4), rng.randrange(10**3)):
                    alive.append(number)
            assert 0 <= budget.used <= budget.total
        for identity in alive[1:]:
            budget.remove(identity)
        assert budget.used == 0


@needs_bubblewrap
def test_the_budget_holds_against_forgetting(monkeypatch):
    """Allocate, call again, free the older state: the memory is still in use and still counted."""
    monkeypatch.setattr("appo_jax.tools.bubblewrap.MEMORY_TOTAL", 400 << 20)
    tool = make(memory_mb=512)
    try:
        kept, outcomes = [], []
        for _ in range(6):
            result, state = tool.call(
                tool.start(), "x = bytearray(90 << 20)\nfor i in range(0, len(x), 4096): x[i] = 1"
            )
            outcomes.append(result.outcome)
            kept.append(tool.call(state, "y = 1")[1])
            del state
            gc.collect()
            time.sleep(0.5)
        assert outcomes[:3] == [Outcome.OK] * 3
        assert Outcome.LIMIT in outcomes[4:]
        assert sum(system.private_memory(pid) for pid in descendants(tool.pid)) < 900 << 20
    finally:
        tool.close()


@needs_bubblewrap
def test_running_calls_together_keep_to_the_budget(monkeypatch):
    monkeypatch.setattr("appo_jax.tools.bubblewrap.MEMORY_TOTAL", 300 << 20)
    tool = make(memory_mb=512, timeout=3.0)
    hungry = "x = bytearray(200 << 20)\nfor i in range(0, len(x), 4096): x[i] = 1\nimport time\ntime.sleep(1.0)"
    try:
        with ThreadPoolExecutor(4) as pool:
            outcomes = list(pool.map(lambda _: tool.call(tool.start(), hungry)[0].outcome, range(4)))
        assert outcomes.count(Outcome.LIMIT) >= 2
        assert tool.call(tool.start(), "1")[0].text == "1"
    finally:
        tool.close()


@needs_bubblewrap
def test_a_control_group_holds_all_of_it_where_one_can_be_made():
    tool = make()
    try:
        group = tool._sandbox._group
        if group is None:
            pytest.skip("this machine lets no control group be made")
        _, state = tool.call(tool.start(), "x = 1")
        members = {int(pid) for pid in (group.folder / "cgroup.procs").read_text().split()}
        assert members >= descendants(tool.pid)
        assert state is not None
    finally:
        tool.close()
    end = time.monotonic() + 5
    while group.folder.exists() and time.monotonic() < end:
        time.sleep(0.05)
        group.close()
    assert not group.folder.exists()


# The fuzzer

MESSAGES = """
import os, random, socket, struct, sys
rng = random.Random({seed})
line = socket.socket(fileno=60)
for _ in range(rng.randrange(1, 12)):
    kind = rng.randrange(9)
    try:
        if kind == 0: line.send(rng.choice([b"d", b"f", b"m", b"n", b"h", b"r", b"unmapped", b"ready 3", b"ready -1"]))
        if kind == 1: line.send(os.urandom(rng.randrange(0, 4000)))
        if kind == 2: line.send(b"d" * rng.randrange(20))
        if kind == 3: os.fork()
        if kind == 4: line.shutdown(rng.choice([socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR]))
        if kind == 5: os.closerange(rng.randrange(3, 60), 64)
        if kind == 6: sys.modules["sandbox.system"].ask_for_mount()
        if kind == 7: sys.modules["sandbox.system"].unshare(0x20000)
        if kind == 8: os.open("/tmp", os.O_RDONLY)
    except OSError:
        pass
if rng.random() < 0.3: os._exit(0)
if rng.random() < 0.3:
    inner = sys.modules["sandbox.interpreter"]
    inner._take_files = lambda *_: None
if rng.random() < 0.2:
    import time
    os.fork = lambda: rng.choice([0, 1, -1])
"""


def fuzz(seconds: float, seed: int) -> tuple[int, list[str], int]:
    """Hostile states and a trainer that sends broken requests, beside honest rollouts. Returns the number of honest calls,
    what those read that were lost, and the number of hostile rollouts."""
    tool = make(timeout=3.0)
    pid, end = tool.pid, time.monotonic() + seconds
    counts, lost, lock = [0, 0], [], threading.Lock()

    def honest(number):
        while time.monotonic() < end:
            first, state = tool.call(tool.start(), f"x = {number}\nopen('n', 'w').write('{number}')")
            second, _ = tool.call(state, "x, open('n').read()")
            with lock:
                counts[0] += 2
                if first.outcome is not Outcome.OK or second.text != f"({number}, '{number}')":
                    lost.append(f"{first} {second}")

    def hostile(number):
        rng = random.Random(seed * 1000 + number)
        while time.monotonic() < end:
            _, state = tool.call(tool.start(), MESSAGES.replace("{seed}", str(rng.randrange(10**9))))
            for _ in range(rng.randrange(3)):
                tool.call(state, rng.choice(["1", "import os\nos.write(60, b'd')", "x" * 90_000]))
            with lock:
                counts[1] += 1

    def trainer():
        rng = random.Random(seed)
        while time.monotonic() < end:
            message = rng.choice([
                {"run": rng.randrange(-5, 1), "from": rng.randrange(-5, 10**6), "code": "1", "timeout": 0.1},
                {"run": 10**9 + rng.randrange(10), "from": 10**9 + rng.randrange(10), "code": "1", "timeout": 0.1},
                {"run": 10**9 + rng.randrange(10), "from": 0, "code": "1", "timeout": rng.choice([-1, 0, 0.01, 1e300])},
                {"run": "x", "from": None}, {"free": rng.randrange(-5, 0)}, {"free": "x"}, {"free": 0}, {},
                {"run": 10**9 + 50, "from": 0, "code": 7, "timeout": "x"}, {"free": 10**9 + rng.randrange(10)},
            ])  # fmt: skip
            data = rng.choice([json.dumps(message).encode(), b"{", b"[]", b"\xff" * 9, b""])
            with tool._sandbox._lock, contextlib.suppress(OSError):
                tool._sandbox._socket.sendall(struct.pack("!I", len(data)) + data)
            time.sleep(0.02)

    try:
        threads = [threading.Thread(target=honest, args=(i,)) for i in range(2)]
        threads += [threading.Thread(target=hostile, args=(i,)) for i in range(3)]
        threads += [threading.Thread(target=trainer)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert tool.pid == pid, "the sandbox had to be restarted"
        gc.collect()
        for number in range(10**9, 10**9 + 100):
            tool._sandbox.free(number)
        until = time.monotonic() + 5
        while len(descendants(tool.pid)) > 2 and time.monotonic() < until:
            time.sleep(0.1)
        assert len(descendants(tool.pid)) == 2
    finally:
        tool.close()
    return counts[0], lost, counts[1]


@needs_bubblewrap
@pytest.mark.timeout(FUZZ_SECONDS + 120)
def test_fuzzing_loses_no_honest_call():
    """It runs for some seconds; with APPO_FUZZ_SECONDS=600 for ten minutes, before a release."""
    honest, lost, hostile = fuzz(FUZZ_SECONDS, seed=1)
    print(f"{honest} honest calls, {len(lost)} lost, {hostile} hostile rollouts")
    assert lost == []
    assert honest > 20
    assert hostile > 20


def test_a_trainer_that_does_not_read_holds_up_nothing():
    """The supervisor buffers answers for a trainer that does not read, and still enforces deadlines."""
    ours, theirs = socket.socketpair()
    trainer = Trainer(theirs)
    for i in range(3000):
        trainer.tell({"id": i, "outcome": "ok", "text": "x" * 1000})
    assert trainer.waits
    received = b""
    while trainer.waits:
        received += ours.recv(1 << 16)
        trainer.flush()
    ours.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while part := ours.recv(1 << 20):
            received += part
    assert received.count(b'"outcome"') == 3000
    ours.close()
    with pytest.raises(TrainerGone):
        trainer.tell({"id": 0})
    theirs.close()


# A secret whose bytes do not stand in the code that searches for it.
SECRET = "the secret of another rollout"
SEARCH = f"""
import ctypes, os
write = ctypes.CDLL(None).write
write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
hidden, changed = {bytes(x ^ 1 for x in SECRET.encode())!r}, bytes(x ^ 1 for x in range(256))
page, around, found, read = 4096, 32 << 20, 0, 0
copy = os.open("copy", os.O_RDWR | os.O_CREAT)
for middle in id(object()) & -page, ctypes.addressof(ctypes.create_string_buffer(1 << 20)) & -page:
    for start in range(middle - around, middle + around, page):
        os.lseek(copy, 0, 0)
        if write(copy, start, page) == page:  # the kernel refuses addresses where nothing is mapped
            found += hidden in os.pread(copy, page, 0).translate(changed)
            read += 1
print(found, read > 1000)
"""


@pytest.fixture(params=[pytest.param("bubblewrap", marks=needs_bubblewrap), "process"])
def either(request):
    tool = make(isolation=request.param, timeout=30.0)
    yield tool
    tool.close()


def test_a_rollout_does_not_find_the_code_of_another_in_its_memory(either):
    for i in range(12):  # in memory of several sizes
        _, other = either.call(either.start(), f"secret = {SECRET!r}" + 97 * i * i * "\n")
    assert either.call(either.start(), SEARCH)[0].text == "0 True"
    found, _ = either.call(other, SEARCH)[0].text.split()
    assert int(found) > 0  # the search finds what is there


def test_nor_that_of_one_which_waited_when_state_zero_died(either):
    zero = min(descendants(either.pid) - {either.pid}, key=lambda pid: (bool(descendants(pid) - {pid}), pid))
    os.kill(zero, signal.SIGSTOP)
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(either.call, either.start(), f"secret = {SECRET!r}\nlen(secret)")
        time.sleep(0.2)
        search = pool.submit(either.call, either.start(), SEARCH)
        time.sleep(0.2)
        os.kill(zero, signal.SIGKILL)
        assert other.result()[0].text == str(len(SECRET))
        assert search.result()[0].text == "0 True"
