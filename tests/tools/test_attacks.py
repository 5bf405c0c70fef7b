"""What a hostile policy may write. After each case: a victim's state is intact, no process is left over, the host is
unchanged, and the call came back within its limit. A case prints BREACH where it got what it should not."""

import gc
import os
import platform
import resource
import shutil
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from appo_jax.config import PythonToolConfig
from appo_jax.tools.python import PythonTool
from appo_jax.tools.sandbox import system
from appo_jax.tools.sandbox.enter import UNPRIVILEGED
from appo_jax.tools.sandbox.system import descendants
from appo_jax.types import Outcome

TIMEOUT = 0.6
SLACK = 4.0  # the machine may be busy; a call that hangs would take for ever

OK, ERROR, LIMIT, LATE = Outcome.OK, Outcome.ERROR, Outcome.LIMIT, Outcome.TIMEOUT
FAILS = {ERROR, LIMIT}
ANY = {OK, ERROR, LIMIT, LATE}


def sandbox_works() -> str:
    """Why the sandbox cannot be tested here; "" if it can."""
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed"
    tried = subprocess.run(["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"], capture_output=True, text=True)
    return "" if tried.returncode == 0 else f"user namespaces are refused here: {tried.stderr.strip()}"


REFUSED = sandbox_works()
pytestmark = [
    pytest.mark.skipif(bool(REFUSED), reason=REFUSED),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the raw system calls are those of x86_64"),
]

RAW = """
import ctypes, os, sys
_libc = ctypes.CDLL(None, use_errno=True)
def raw(number, *arguments):
    result = _libc.syscall(number, *arguments)
    if result >= 0:
        print("BREACH", number, result)
    else:
        print("errno", ctypes.get_errno())
"""

# name: (code, outcomes that are right)
CASES: dict[str, tuple[str, set[Outcome]]] = {
    # resource exhaustion
    "memory_blocks": ("x = []\nwhile True: x.append(bytearray(10**7))", {LIMIT}),
    "memory_string": ("'a' * (1 << 35)", {LIMIT}),
    "memory_shift": ("1 << (1 << 42)", {LIMIT}),
    "memory_mmap": ("import mmap\nmmap.mmap(-1, 8 << 30); print('BREACH')", FAILS),
    "memory_shared": ("import mmap\nmmap.mmap(-1, 1 << 20); print('BREACH')", {ERROR}),  # no fork would copy it
    "memory_shared_file": (
        "import mmap\nf = open('f', 'w+b'); f.write(bytes(4096)); f.flush()\nmmap.mmap(f.fileno(), 0); print('BREACH')",
        {ERROR},
    ),
    "memory_kept": ("x = bytearray(200 << 20)\nfor i in range(0, len(x), 4096): x[i] = 1", {OK}),
    "cpu_loop": ("while True: pass", {LATE}),
    "cpu_in_c": ("sum(range(10**13))", {LATE}),
    "cpu_regex": ("import re\nre.match(r'(a+)+$', 'a' * 60 + 'b')", {LATE}),
    "cpu_bigint": ("10 ** 10 ** 8 % 7", {LATE, LIMIT}),
    "sleep": ("import time\ntime.sleep(100)", {LATE}),
    "wait_for_ever": ("import os\nr, w = os.pipe()\nos.read(r, 1)", {LATE}),
    "fork_bomb": ("import os\nwhile True:\n    try: os.fork(); print('BREACH')\n    except OSError: pass", {LATE}),
    "fork": ("import os\nos.fork(); print('BREACH')", {ERROR}),
    "thread_bomb": (
        "import threading\nwhile True:\n    try: threading.Thread(target=print, args=['BREACH']).start()\n"
        "    except RuntimeError: pass",
        {LATE},
    ),
    "open_files": ("f = [open('/dev/null') for _ in range(10**5)]; print('BREACH')", FAILS),
    "pipes": ("import os\np = [os.pipe() for _ in range(10**5)]; print('BREACH')", FAILS),
    "big_file": ("f = open('f', 'wb')\nfor _ in range(400): f.write(bytes(1 << 20))\nprint('BREACH')", FAILS),
    "sparse_file": ("open('f', 'wb').truncate(1 << 40); print('BREACH')", FAILS),
    "many_files": (
        "for i in range(100):\n    with open(f'{i}', 'wb') as f: f.write(bytes(1 << 20))\nprint('BREACH')",
        FAILS,
    ),
    "inodes": ("for i in range(10**5): open(str(i), 'w').close()\nprint('BREACH')", FAILS),
    "deep_folders": ("import os\nfor _ in range(1500):\n    os.mkdir('d'); os.chdir('d')", {OK, ERROR}),
    "fifo_and_socket_files": (
        "import os, stat\nos.mkfifo('p') if hasattr(os, 'mkfifo') else None\nprint(os.listdir('.'))",
        ANY,
    ),
    "raise_own_limits": (
        "import resource as r\nfor k in (r.RLIMIT_AS, r.RLIMIT_FSIZE, r.RLIMIT_NOFILE):\n"
        "    r.setrlimit(k, (r.RLIM_INFINITY, r.RLIM_INFINITY)); print('BREACH')",
        {ERROR},
    ),
    "lower_cpu_limit": ("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 1))", {OK}),
    "lower_every_limit": (
        "import resource as r\nfor k in range(16):\n    try: r.setrlimit(k, (0, 0))\n    except (ValueError, OSError): pass",
        ANY,
    ),
    # output
    "print_flood": ("while True: print('x' * 1000)", {LATE}),
    "write_flood": ("import os\nwhile True: os.write(1, b'x' * 65536)", FAILS),
    "stdio_flood": (
        "import ctypes\nlibc = ctypes.CDLL(None)\nwhile True: libc.puts(b'x' * 4096); libc.fflush(None)",
        {LATE},
    ),
    "huge_value": ("'x' * 10**7", {OK}),
    "error_after_flood": ("print('x' * 10**7)\n1 / 0", {ERROR}),
    "not_utf8": ("import os\nos.write(1, bytes(range(256)))", {OK}),
    "surrogates": ("print('\\ud800\\udfff', chr(0), chr(27) + '[2J')", {OK}),
    "close_stdout": ("import os\nos.close(1); os.close(2)\nprint('x')\n1 / 0", ANY),
    "no_stdout": ("import sys\nsys.stdout = sys.stderr = None\n1 / 0", {ERROR}),
    "seal_output": ("import fcntl\nfcntl.fcntl(1, fcntl.F_ADD_SEALS, 15); print('BREACH')", {ERROR}),
    "truncate_output": ("import os\nprint('a' * 100)\nos.ftruncate(1, 0); os.lseek(1, 1 << 40, 0)\nprint('b')", ANY),
    # files of the host
    "passwords": ("for p in ('/etc/passwd', '/etc/shadow'):\n    print(open(p).read(), 'BREACH')", {ERROR}),
    "home": ("import os\nfor p in ('/root/.ssh', '/home', '/var', '/sys'): print(os.listdir(p), 'BREACH')", {ERROR}),
    "sentinel": ("print(open('{sentinel}').read(), 'BREACH')", {ERROR}),
    "sentinel_by_symlink": ("import os\nos.symlink('{sentinel}', 'l')\nprint(open('l').read(), 'BREACH')", {ERROR}),
    "sentinel_by_root": ("import os\nos.symlink('/proc/1/root', 'r')\nprint(os.listdir('r'), 'BREACH')", {ERROR}),
    "sentinel_by_dots": ("print(open('../../../../../..{sentinel}').read(), 'BREACH')", {ERROR}),
    "write_usr": ("open('/usr/x', 'w'); print('BREACH')", {ERROR}),
    "write_root": ("open('/x', 'w'); print('BREACH')", {ERROR}),
    "write_library": ("import os\nopen(os.__file__, 'a'); print('BREACH')", {ERROR}),
    "write_sandbox": ("import glob\nopen('/sandbox/sandbox/supervisor.py', 'a'); print('BREACH')", {ERROR}),
    "remove_library": ("import os\nos.remove(os.__file__); print('BREACH')", {ERROR}),
    "remove_device": ("import os\nos.remove('/dev/null'); print('BREACH')", {ERROR}),
    "make_device": ("import os\nos.mknod('/tmp/d', 0o60600, os.makedev(8, 0)); print('BREACH')", {ERROR}),
    "dev_mem": (
        "for d in ('mem', 'kmsg', 'sda', 'vda', 'kvm', 'fuse', 'tty', 'ptmx'):\n    try: open('/dev/' + d)\n"
        "    except FileNotFoundError: continue\n    print('BREACH')",
        {OK},
    ),
    "dev_shm": ("open('/dev/shm/x', 'w'); print('BREACH')", {ERROR}),
    "shared_memory": (
        "from multiprocessing import shared_memory as s\ns.SharedMemory(create=True, size=4096); print('BREACH')",
        {ERROR},
    ),
    "memfd": ("import os\nos.memfd_create('x'); print('BREACH')", {ERROR}),
    "chroot": ("import os\nos.chroot('/tmp'); print('BREACH')", {ERROR}),
    "set_uid": ("import os\nos.setuid(0); print('BREACH')", {ERROR}),
    "file_handle": (RAW + "raw(304, 3, b'x' * 128, 0)", {OK}),
    "device_mode": ("import os\nfor d in os.listdir('/dev'): os.chmod('/dev/' + d, 0o600); print('BREACH')", {ERROR}),
    "device_times": ("import os\nos.utime('/dev/urandom', (1, 1)); print('BREACH')", {ERROR}),
    "device_owner": ("import os\nos.chown('/dev/null', 1000, 1000); print('BREACH')", {ERROR}),
    "device_link": ("import os\nos.link('/dev/null', '/tmp/l'); print('BREACH')", {ERROR}),
    "device_rename": ("import os\nos.rename('/dev/null', '/dev/x'); print('BREACH')", {ERROR}),
    # what it may learn
    "environment": ("import os\nprint(os.environ, 'BREACH' if 'APPO_SECRET' in os.environ else '')", {OK}),
    "proc_environment": ("print(open('/proc/1/environ').read(), 'BREACH')", {ERROR}),
    "proc_list": ("import os\nprint('BREACH' if os.listdir('/proc') else 'empty')", {OK}),
    "proc_memory": ("open('/proc/self/mem', 'r+b'); print('BREACH')", {ERROR}),
    "proc_sys": ("open('/proc/sys/kernel/core_pattern', 'w'); print('BREACH')", {ERROR}),
    "stack_frames": (
        "import sys\nnames = [m for m in sys.modules if 'appo' in m]\nprint('BREACH' if names else 'none')",
        {OK},
    ),
    "descriptors": (
        "import os, stat\nopen_ones = []\nfor fd in range(3, 64):\n    try: os.fstat(fd); open_ones.append(fd)\n"
        "    except OSError: pass\nprint(open_ones, 'BREACH' if len(open_ones) > 1 else '')",
        {OK},
    ),
    # network
    "tcp": ("import socket\nsocket.create_connection(('1.1.1.1', 80), 1); print('BREACH')", {ERROR}),
    "metadata": ("import urllib.request as u\nu.urlopen('http://169.254.169.254/'); print('BREACH')", {ERROR}),
    "loopback": ("import socket\nsocket.create_connection(('127.0.0.1', {port}), 1); print('BREACH')", {ERROR}),
    "udp": ("import socket as s\ns.socket(s.AF_INET, s.SOCK_DGRAM).sendto(b'x', ('8.8.8.8', 53))", {ERROR}),
    "raw_socket": ("import socket as s\ns.socket(s.AF_PACKET, s.SOCK_RAW); print('BREACH')", {ERROR}),
    "netlink": ("import socket as s\ns.socket(s.AF_NETLINK, s.SOCK_RAW); print('BREACH')", {ERROR}),
    "vsock": ("import socket as s\ns.socket(s.AF_VSOCK, s.SOCK_STREAM); print('BREACH')", {ERROR}),
    "unix_socket": ("import socket as s\ns.socket(s.AF_UNIX).bind('\\0appo'); print('BREACH')", {ERROR}),
    "inet_pair": ("import socket as s\ns.socketpair(s.AF_INET); print('BREACH')", {ERROR}),
    # signals and other processes
    "kill_parent": ("import os\nos.kill(os.getppid(), 9); print('BREACH')", {ERROR}),
    "kill_init": ("import os\nos.kill(1, 9); print('BREACH')", {ERROR}),
    "kill_all": ("import os\nos.kill(-1, 9); print('BREACH')", {ERROR}),
    "kill_group": ("import os\nos.killpg(0, 9); print('BREACH')", {ERROR}),
    "kill_thread": (RAW + "raw(234, os.getppid(), os.getppid(), 9); raw(200, os.getppid(), 9)", {OK}),
    "kill_by_pidfd": (RAW + "raw(434, os.getppid(), 0); raw(424, 3, 9, 0, 0)", {OK}),
    "kill_by_queue": (RAW + "raw(129, os.getppid(), 9, bytes(128))", {OK}),
    "kill_by_io": (  # process 1, state 0, and whatever else there is
        "import fcntl, os\nr, w = os.pipe()\nfor pid in range(1, 500):\n"
        "    try: fcntl.fcntl(r, fcntl.F_SETOWN, pid); fcntl.fcntl(r, 10, 9); print('BREACH')\n"
        "    except PermissionError: continue\n"
        "    fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)\n    if pid != os.getpid(): os.write(w, b'x')",
        {OK},
    ),
    "ptrace": (RAW + "raw(101, 16, os.getppid(), 0, 0); raw(101, 0x4206, 1, 0, 0)", {OK}),
    "read_memory": (RAW + "raw(310, os.getppid(), bytes(16), 1, bytes(16), 1, 0)", {OK}),
    "write_memory": (RAW + "raw(311, os.getppid(), bytes(16), 1, bytes(16), 1, 0)", {OK}),
    "limit_parent": ("import os, resource\nresource.prlimit(os.getppid(), 7, (0, 0)); print('BREACH')", {ERROR}),
    "schedule_parent": ("import os\nos.sched_setaffinity(os.getppid(), [0]); print('BREACH')", {ERROR}),
    "niceness_of_all": ("import os\nos.setpriority(os.PRIO_USER, 0, 19); print('BREACH')", {ERROR}),
    "masked_signals": (
        "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass",
        {LATE},
    ),
    "ignored_signals": (
        "import signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n    except OSError: pass\n"
        "while True: pass",
        {LATE},
    ),
    # kernel interfaces
    "user_namespace": (RAW + "raw(272, 0x10000000)", {OK}),
    "mount_namespace": (RAW + "raw(272, 0x20000)", {OK}),
    "clone_namespace": (RAW + "raw(56, 0x10000000 | 17, 0, 0, 0, 0)", {OK}),
    "clone3": (RAW + "raw(435, bytes(88), 88)", {OK}),
    "vfork": (RAW + "raw(58); raw(57)", {OK}),
    "mount": (RAW + "raw(165, b'none', b'/tmp', b'tmpfs', 0, 0); raw(165, b'/', b'/tmp', 0, 4096, 0)", {OK}),
    "unmount": (RAW + "raw(166, b'/tmp', 2); raw(166, b'/proc', 2)", {OK}),
    "move_mount": (RAW + "raw(429, -100, b'/usr', -100, b'/tmp', 0)", {OK}),
    "mount_api": (RAW + "raw(430, b'proc', 0); raw(428, -100, b'/', 1); raw(442, -100, b'/', 0, bytes(32), 32)", {OK}),
    "pivot_root": (RAW + "raw(155, b'/tmp', b'/tmp')", {OK}),
    "setns": (RAW + "raw(308, 3, 0)", {OK}),
    "io_uring": (RAW + "raw(425, 8, bytes(120)); raw(426, 3, 1, 1, 0, 0, 0)", {OK}),
    "bpf": (RAW + "raw(321, 0, bytes(64), 64); raw(298, bytes(64), 0, -1, -1, 0)", {OK}),
    "keys": (RAW + "raw(250, 0, -3, 0); raw(248, b'user', b'x', b'y', 1, -3)", {OK}),
    "userfaultfd": (RAW + "raw(323, 0); raw(175, b'', 0, b''); raw(246, 0, 0, 0, 0); raw(169, 0, 0, 0, 0)", {OK}),
    "own_filter": (RAW + "raw(317, 1, 0, bytes(16)); raw(157, 22, 2, bytes(16))", {OK}),
    "wrong_abi": (RAW + "raw(0x40000000 + 57); raw(0x40000000 + 41, 2, 1, 0)", {OK}),
    "system_v_memory": (RAW + "raw(29, 0, 4096, 0o1600); raw(64, 0, 1, 0o1600); raw(68, 0, 0o1600)", {OK}),
    "terminal_injection": ("import fcntl\nfcntl.ioctl(0, 0x5412, b'x'); print('BREACH')", {ERROR}),
    "file_attributes": (RAW + "import fcntl\nfcntl.ioctl(os.open('/tmp', 0), 0x40086602, b'x' * 8)", {ERROR}),
    # programs and daemons
    "subprocess": ("import subprocess\nsubprocess.run(['/usr/bin/env']); print('BREACH')", {ERROR}),
    "system": ("import os\nprint('BREACH' if os.system('true') == 0 else 'refused')", {OK}),
    "exec": ("import os\nos.execv('/usr/bin/env', ['env'])", {ERROR}),
    "daemon": ("import os\nif os.fork() == 0:\n    os.setsid(); os.fork(); print('BREACH')", {ERROR}),
    "zombies": ("import os\nfor _ in range(100):\n    if os.fork() == 0: os._exit(0)\nprint('BREACH')", {ERROR}),
    "multiprocessing": ("import multiprocessing as m\nm.Process(target=print).start(); print('BREACH')", {ERROR}),
    "alarm_afterwards": (
        "import signal\ndef go(*_):\n    while True: pass\nsignal.signal(14, go)\nsignal.setitimer(0, 0.05, 0.05)",
        {OK},
    ),
    # hostile objects
    "repr_raises": ("class A:\n    def __repr__(self): raise SystemError('no')\nA()", {ERROR}),
    "repr_loops": ("class A:\n    def __repr__(self):\n        while True: pass\nA()", {LATE}),
    "repr_recurses": ("class A:\n    def __repr__(self): return repr(self)\nA()", {ERROR}),
    "repr_exits": ("import os\nclass A:\n    def __repr__(self): os._exit(0)\nA()", {ERROR}),
    "error_text_raises": ("class E(Exception):\n    def __str__(self): raise SystemExit(0)\nraise E", {ERROR}),
    "error_text_loops": ("class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E", {LATE}),
    "error_text_is_huge": ("raise ValueError('x' * 10**7)", {ERROR}),
    "base_exception": ("class E(BaseException): pass\nraise E('x')", {ERROR}),
    "keyboard_interrupt": ("raise KeyboardInterrupt", {ERROR}),
    "generator_exit": ("raise GeneratorExit", {ERROR}),
    "finaliser": ("class A:\n    def __del__(self):\n        while True: pass\na = A()", {OK}),
    # its own report and its own runtime
    "forged_report": ("import os\nos.write(60, b'd')\nwhile True: print('BREACH?')", ANY),
    "forged_reports": ("import os\nfor _ in range(10**5): os.write(60, b'd')", ANY),
    "forged_junk": ("import os\nos.write(60, bytes(range(256)) * 100)", ANY),
    "forged_descriptors": ("import socket\nsocket.send_fds(socket.socket(fileno=60), [b'd'], [0, 0, 0])", ANY),
    "closed_channel": ("import os\nos.closerange(3, 64)", {ERROR}),
    "stolen_request": ("import os\nos.read(60, 10)", {LATE}),
    "patched_runtime": (
        "import os, ast, socket, builtins, json\ndef evil(*a, **k):\n    while True: pass\n"
        "ast.parse = socket.recv_fds = json.loads = os.fork = builtins.compile = evil",
        {OK, ERROR},
    ),
    "patched_child": (  # the next call's process never makes itself known
        "import sys\ndef evil(*_):\n    while True: pass\nsys.modules['sandbox.interpreter']._cell = evil",
        {OK},
    ),
    "patched_death": (  # and loses its parent
        "import os, sys, ctypes\ndef evil(*_):\n    while True: pass\nsys.modules['sandbox.interpreter']._cell = evil\n"
        "fork = os.fork\nos.fork = lambda: fork() and ctypes.string_at(0)",
        {OK},
    ),
    "patched_fork": ("import os\nos.fork = lambda: 0", {OK}),
    "patched_limits": ("import resource\nresource.setrlimit = lambda *a: None", {OK}),
    "empty_modules": ("import sys\nsys.modules.clear()", ANY),
    "empty_builtins": ("import builtins\nbuiltins.__dict__.clear()", ANY),
    "tracer": ("import sys\ndef t(*a): raise RuntimeError('traced')\nsys.settrace(t)\nprint(1)", ANY),
    "profiler": ("import sys\ndef t(*a):\n    while True: pass\nsys.setprofile(t)\nlen('x')", ANY),
    # crashes
    "recursion": ("def f(n): return f(n + 1)\nf(0)", {ERROR}),
    "recursion_without_limit": ("import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1)\nf(0)", ANY),
    "c_stack": ("import sys\nsys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x)", ANY),
    "nested_source": ("eval('(' * 10**5 + ')' * 10**5)", ANY),
    "segfault": ("import ctypes\nctypes.string_at(0)", {ERROR}),
    "stack_smash": ("import ctypes\nctypes.memset(id(None), 0, 1 << 16)", ANY),
    "exit_code": ("import os\nos._exit(0)", {ERROR}),
    "abort": ("import os\nos.abort()", {ERROR}),
    "own_alarm": ("import signal, time\nsignal.alarm(1)\ntime.sleep(30)", {ERROR, LATE}),
    "null_in_source": ("x = 1\0", {ERROR}),
    "long_source": ("#" + "x" * 200_000, {LIMIT}),
}  # fmt: skip


def start(timeout):
    """A sandbox, and a rollout in it that must come through unharmed."""
    tool = PythonTool(PythonToolConfig(timeout=timeout, memory_mb=256, preload=("math",)))
    result, state = tool.call(tool.start(), "import math\nsecret = [1, 2, 3]\nopen('notes', 'w').write('kept')")
    assert result.outcome is OK
    return tool, state


@pytest.fixture(scope="module")
def secret():
    os.environ["APPO_SECRET"] = "token"
    yield
    del os.environ["APPO_SECRET"]


@pytest.fixture(scope="module")
def sandbox(secret):
    tool, state = start(TIMEOUT)
    yield tool, state
    tool.close()


@pytest.fixture(scope="module")
def patient(secret):
    """A long time limit, for code that ends by itself even on a busy machine."""
    tool, state = start(10 * TIMEOUT)
    yield tool, state
    tool.close()


@pytest.fixture(scope="module")
def tool(sandbox):
    return sandbox[0]


@pytest.fixture(scope="module")
def victim(sandbox):
    return sandbox[1]


@pytest.fixture(scope="module")
def server():
    """A server on the host's loopback, which policy code must not be able to reach."""
    listening = socket.create_server(("127.0.0.1", 0))
    visits = []

    def serve():
        while True:
            try:
                visits.append(listening.accept())
            except OSError:
                return

    threading.Thread(target=serve, daemon=True).start()
    yield listening.getsockname()[1], visits
    listening.close()


def host() -> tuple:
    """The state of the host that an attack may have changed."""
    files = [
        os.stat(path) for path in (os.__file__, system.__file__, "/usr", "/usr/bin/env", "/dev/null", "/dev/urandom")
    ]
    return (
        [
            (info.st_mode, info.st_uid, info.st_nlink, info.st_size, info.st_mtime_ns * (info.st_rdev == 0))
            for info in files
        ],
        [os.path.lexists(path) for path in ("/x", "/usr/x", "/dev/shm/x", "/tmp/d", "/tmp/f", "/tmp/l")],
        [resource.getrlimit(limit) for limit in (resource.RLIMIT_AS, resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE)],
        (os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0), socket.gethostname(), os.environ["APPO_SECRET"]),
    )


def descriptors(pid: int, number: int, seconds: float = 3.0) -> int:
    """The descriptors open in `pid`, once there are no more than `number` of them or the time is over."""
    end = time.monotonic() + seconds
    while (count := len(os.listdir(f"/proc/{pid}/fd"))) > number and time.monotonic() < end:
        time.sleep(0.02)
    return count


def settled(pid: int, number: int, seconds: float = 3.0) -> set[int]:
    """The processes below `pid`, once there are no more than `number` of them or the time is over."""
    end = time.monotonic() + seconds
    while len(left := descendants(pid)) > number and time.monotonic() < end:
        time.sleep(0.02)
    return left


@pytest.mark.parametrize("name", CASES)
def test_attack(sandbox, patient, server, tmp_path, name):
    code, right = CASES[name]
    tool, victim = sandbox if LATE in right else patient
    limit = tool.timeout + SLACK
    port, visits = server
    sentinel = tmp_path / "sentinel"
    sentinel.write_text("host")
    gc.collect()
    pid, before = tool.pid, settled(tool.pid, 3)  # supervisor, state 0, victim
    assert len(before) == 3
    supervisor, unchanged = min(before), host()
    opened = descriptors(supervisor, 0, seconds=0.0)

    began = time.monotonic()
    result, state = tool.call(tool.start(), code.replace("{sentinel}", str(sentinel)).replace("{port}", str(port)))
    seconds = time.monotonic() - began
    assert "BREACH\n" not in result.text + "\n", result.text
    assert "BREACH " not in result.text, result.text
    assert result.outcome in right, result
    assert seconds < limit
    assert len(result.text) < 6 * 4096 + 500  # four bytes for each character of the limit, and the end twice

    # A poisoned state may be of no use, but it must answer in time as well.
    began = time.monotonic()
    again, later = tool.call(state, "1 + 1")
    assert time.monotonic() - began < limit
    assert isinstance(again.text, str)

    checked = tool.call(victim, "secret, open('/tmp/notes').read(), math.pi > 3")[0]
    assert checked.text == "([1, 2, 3], 'kept', True)"
    assert tool.pid == pid, "the sandbox had to be restarted"
    del state, later
    gc.collect()
    assert settled(pid, 3) == before
    assert descriptors(supervisor, opened) == opened
    assert host() == unchanged
    assert sentinel.read_text() == "host"
    assert os.listdir(tmp_path) == ["sentinel"]
    assert visits == []


def test_an_output_that_is_kept_holds_nothing(tool):
    """Otherwise a rollout could fill the machine's memory with the outputs of its calls."""
    _, state = tool.call(tool.start(), "import os\nkept = os.dup(1)\nprint('x' * 1000)")
    assert tool.call(state, "os.fstat(kept).st_size")[0].text == "0"
    result, _ = tool.call(state, "os.write(kept, b'x')")
    assert result.outcome is ERROR
    assert "PermissionError" in result.text


def test_code_may_limit_its_own_processor_time(tool):
    """Honest code does that, and later calls must continue."""
    _, state = tool.call(tool.start(), "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 1))\nx = 20")
    result, state = tool.call(state, "x + 1")
    assert (result.text, result.outcome) == ("21", OK)


@pytest.mark.parametrize("limit", ["CPU", "NOFILE", "AS", "FSIZE", "DATA", "STACK", "NPROC", "SIGPENDING"])
def test_a_state_without_room_is_lost_alone(tool, victim, limit):
    pid = tool.pid
    _, state = tool.call(tool.start(), f"import resource\nresource.setrlimit(resource.RLIMIT_{limit}, (0, 0))")
    assert isinstance(tool.call(state, "1 + 1")[0].text, str)
    assert tool.call(victim, "secret")[0].text == "[1, 2, 3]"
    assert tool.pid == pid


# A state that says it is done, and then forks whenever it is let, but never reads what it is asked.
DEAF = """
import os
os.write(60, b"d")
while True:
    try:
        os.fork()
    except OSError:
        pass
"""


def test_a_state_that_does_not_read_its_requests_holds_up_nobody(tool, victim):
    """Earlier, the supervisor waited for ever in a send to such a state."""
    pid = tool.pid
    _, state = tool.call(tool.start(), DEAF)
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(tool.call, state, "#" + "x" * 95_000) for _ in range(8)]
        time.sleep(2 * TIMEOUT)
        began = time.monotonic()
        assert tool.call(victim, "secret")[0].text == "[1, 2, 3]"
        assert time.monotonic() - began < SLACK
        for future in asked:
            assert future.result(8 * TIMEOUT + SLACK)[0].outcome is not OK
    assert tool.pid == pid


PATCHED = """
import os, sys, ctypes
inner, system = sys.modules["sandbox.interpreter"], sys.modules["sandbox.system"]
libc, take = ctypes.CDLL(None, use_errno=True), inner._take_files
def patched(folder, mount):
    %s
inner._take_files = patched
"""
# What the next state's process does in place of taking its files, as honest code never would.
FILES = {
    "proc_moved": "system.unshare(0x20000); os.mkdir('/tmp/p'); libc.syscall(429, -100, b'/proc', -100, b'/tmp/p', 0)",
    "proc_moved_late": "take(folder, mount); os.mkdir('/tmp/p'); libc.syscall(429, -100, b'/proc', -100, b'/tmp/p', 0)",
    "proc_unmounted": "system.unshare(0x20000); libc.umount2(b'/proc', 2)",
    "proc_covered": "system.unshare(0x20000); libc.syscall(429, mount, b'', -100, b'/proc', 4)",
    "files_on_usr": "system.unshare(0x20000); libc.syscall(429, mount, b'', -100, b'/usr/lib', 4)",
    "devices_remounted": "system.unshare(0x20000); libc.mount(b'', b'/dev/null', b'', 32 | 4096, 0)",
    "no_namespace": "system.ask_for_mount()",
    "two_namespaces": "system.unshare(0x20000); system.unshare(0x20000); system.ask_for_mount()",
    "two_mounts": "take(folder, mount); system.unshare(0x20000); system.ask_for_mount()",
    "user_namespace_again": "system.unshare(0x20000 | 0x10000000)",
}


@pytest.mark.parametrize("name", FILES)
def test_a_state_that_takes_other_files_than_its_own(tool, victim, name):
    pid, unchanged = tool.pid, host()
    _, state = tool.call(tool.start(), PATCHED % FILES[name])
    look = "import os\nprint(os.listdir('/proc'), os.path.exists('/tmp/p/self'), os.path.exists('/usr/lib'))"
    result, state = tool.call(state, look)
    assert result.outcome is not OK or result.text == "[] False True"
    result, _ = tool.call(
        state, "import os\nfor d in os.listdir('/dev'): os.chmod('/dev/' + d, 0o600); print('BREACH')"
    )
    assert result.outcome is not OK
    assert tool.call(victim, "secret, open('/tmp/notes').read()")[0].text == "([1, 2, 3], 'kept')"
    assert tool.pid == pid
    assert host() == unchanged


def test_policy_code_is_nobody_on_the_host(tool):
    """Even if the trainer is root, policy code is not: its files and processes belong to another user of the host."""
    _, state = tool.call(tool.start(), "import os\nx = os.getuid()")
    assert tool.call(state, "x")[0].text == "1000"
    states = descendants(tool.pid) - {min(descendants(tool.pid))}
    expected = UNPRIVILEGED if os.geteuid() == 0 else os.geteuid()
    assert states
    assert {os.stat(f"/proc/{pid}").st_uid for pid in states} == {expected}


def test_only_the_standard_library_and_allowed_modules_are_visible():
    """If policy code could import this package, it could compute the held-out answers of the embedded world."""
    tool = PythonTool(PythonToolConfig(preload=("math", "sympy")))
    walk = (
        "import os\nfound = set()\nfor folder, below, files in os.walk('/'):\n"
        "    found |= {'appo_jax', 'jax', 'jaxlib', 'optax', 'quickstart.yaml'} & {*below, *files}\n"
        "sorted(found)"
    )
    tries = (
        "import importlib\nfor name in ('appo_jax', 'jax', 'yaml', 'pip', 'pytest'):\n"
        "    try: importlib.import_module(name); print('BREACH', name)\n    except ImportError: pass"
    )
    try:
        assert tool.call(tool.start(), walk)[0].text == "[]"
        assert tool.call(tool.start(), tries)[0].text == "(no output)"
        assert tool.call(tool.start(), "import sympy, sqlite3, mpmath\nsympy.factorint(12)")[0].text == "{2: 2, 3: 1}"
        listed = tool.call(tool.start(), "import os\nprint(sorted(os.listdir('/')), os.listdir('/sandbox/site'))")[
            0
        ].text
        assert "home" not in listed
    finally:
        tool.close()


# Two rollouts that try to talk: what the first does, what the second looks at, and what it must see either way.
CHANNELS = {
    "flock": (
        "import fcntl\nf = open(fcntl.__file__)\nfcntl.flock(f, fcntl.LOCK_EX)",
        "import fcntl\nf = open(fcntl.__file__)\ntry: fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB); print('free')\n"
        "except OSError: print('held')",
    ),
    "record_lock": (
        "import fcntl\nf = open('/dev/null', 'r+b', buffering=0)\nfcntl.lockf(f, fcntl.LOCK_EX)",
        "import fcntl\nf = open('/dev/null', 'r+b', buffering=0)\n"
        "try: fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB); print('free')\nexcept OSError: print('held')",
    ),
    "stdin_flags": (
        "import fcntl, os\nfor fd in (0, 1, 2): fcntl.fcntl(fd, fcntl.F_SETFL, os.O_NONBLOCK | os.O_APPEND)",
        "import fcntl\n[fcntl.fcntl(fd, fcntl.F_GETFL) & ~3 for fd in (0,)]",
    ),
    "sysinfo": (
        "x = bytearray(100 << 20)\nfor i in range(0, len(x), 4096): x[i] = 1",
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nb = (ctypes.c_ulong * 16)()\nprint(libc.sysinfo(b), list(b))",
    ),
    "host_name": ("import os\nos.uname()", "import os\nos.uname().nodename"),
    "system_file_times": (
        "import os\nfor _ in range(3): open(os.__file__).read()\ntry: os.utime(os.__file__, (1, 1))\nexcept OSError: pass",
        "import os\nint(os.stat(os.__file__).st_mtime)",
    ),
    "files": ("open('/tmp/note', 'w').write('x')", "import os\nos.path.exists('/tmp/note')"),
    "environment": ("import os\nos.environ['NOTE'] = 'x'", "import os\nos.environ.get('NOTE')"),
    "device_mode": (
        "import os\ntry: os.chmod('/dev/null', 0o600)\nexcept OSError: pass",
        "import os\noct(os.stat('/dev/null').st_mode)",
    ),
}


@pytest.mark.parametrize("name", CHANNELS)
def test_two_rollouts_cannot_talk(tool, name):
    """A second rollout must read the same, whether or not the first one has written."""
    write, read = CHANNELS[name]
    quiet, _ = tool.call(tool.start(), read)
    _, kept = tool.call(tool.start(), write)
    told, _ = tool.call(tool.start(), read)
    assert quiet.outcome is OK
    assert (told.text, told.outcome) == (quiet.text, quiet.outcome)
    assert kept is not None


def test_a_branch_cannot_change_what_another_starts_from(tool):
    """The next state's process writes to its parent's files before it takes its own copy; then it behaves like honest code."""
    _, state = tool.call(
        tool.start(), "open('a', 'w').write('kept')\nf = open('b', 'w'); _ = f.write('kept'); f.flush()"
    )
    evil = """
import os, sys
inner = sys.modules["sandbox.interpreter"]
take = inner._take_files
def patched(*arguments):
    done = []
    for attack in (lambda: open('/tmp/a', 'w').write('changed'), lambda: os.write(f.fileno(), b'changed'),
                   lambda: os.rename('/tmp/a', '/tmp/c'), lambda: open('/tmp/new', 'w'), lambda: os.truncate('/tmp/b', 0)):
        try: attack(); done.append(1)
        except OSError: pass
    take(*arguments)
inner._take_files = patched
"""
    _, poisoned = tool.call(state, evil)  # its own children run the patch, in its /tmp
    before, _ = tool.call(
        poisoned, "open('/tmp/a').read(), open('/tmp/b').read(), sorted(__import__('os').listdir('/tmp'))"
    )
    again, _ = tool.call(
        poisoned, "open('/tmp/a').read(), open('/tmp/b').read(), sorted(__import__('os').listdir('/tmp'))"
    )
    assert before.text == again.text == "('kept', 'kept', ['a', 'b'])"
    assert tool.call(state, "open('a').read(), open('b').read()")[0].text == "('kept', 'kept')"


def test_a_state_cannot_keep_another_states_files(tool):
    """Otherwise each state of a chain would hold the 16 MB of the state before it, without being counted."""
    _, state = tool.call(tool.start(), "open('f', 'wb').write(bytes(8 << 20))\nf = open('f', 'rb')")
    greedy = "import sys\nsys.modules['sandbox.files'].take = lambda *_: None\nkept = f"
    _, state = tool.call(state, greedy)
    result, _ = tool.call(state, "1 + 1")
    assert result.outcome is ERROR
    assert "as they were before" in result.text
