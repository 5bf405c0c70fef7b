"""More of what a hostile policy may write, run four at a time in one sandbox, as a run does. A case is the calls of one
rollout; a line BREACH is what it must not get. A victim beside each must keep its state, and nothing may be left."""

# ruff: noqa: E501 - a line is an attack

import errno
import gc
import platform
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fresh_attacks import FRESH, INNER, SECRET
from test_attacks import RAW, REFUSED

from appo_jax.config import PythonToolConfig
from appo_jax.tools.python import PythonTool
from appo_jax.tools.sandbox import seccomp
from appo_jax.tools.sandbox.system import descendants
from appo_jax.types import Outcome

pytestmark = [
    pytest.mark.skipif(bool(REFUSED), reason=REFUSED),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the raw system calls are those of x86_64"),
]

TIMEOUT = 1.0

# Each line is tried by itself; getting a value that is true is a breach.
EXPRESSIONS = {
    # the host's files
    **{f"read_{path}": f"open({path!r}).read(1)" for path in (
        "/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/etc/machine-id", "/proc/self/status", "/proc/cpuinfo",
        "/proc/meminfo", "/proc/mounts", "/proc/1/cmdline", "/proc/1/maps", "/proc/sys/kernel/hostname", "/proc/kallsyms",
        "/proc/net/tcp", "/proc/self/cgroup", "/sys/kernel/mm/transparent_hugepage/enabled", "/dev/mem", "/dev/kmsg",
        "/run/secrets/token", "/var/log/syslog", "/root/.bashrc", "/home/user/.ssh/id_rsa", "/boot/config",
        "/dev/shm/x", "/dev/pts/0", "/dev/tty", "/dev/fd/0", "/usr/bin/env", "/bin/sh", "/sbin/init", "/opt/x", "/srv/x",
    )},
    **{f"write_{path}": f"open({path!r}, 'w')" for path in (
        "/etc/passwd", "/usr/lib/x", "/sandbox/x", "/sandbox/sandbox/cell.py", "/sandbox/site/x.py", "/lib64/x", "/dev/x", "/x",
        "/proc/x", "/proc/sys/kernel/core_pattern", "/proc/self/oom_score_adj", "/dev/null/x",
    )},
    **{f"list_{path}": f"os.listdir({path!r})" for path in ("/proc", "/sys", "/root/.ssh", "/home", "/var", "/run", "/mnt", "/boot")},
    # changes of what is mounted
    "mkdir_root": "os.mkdir('/y') or 1", "mkdir_dev": "os.mkdir('/dev/y') or 1", "mkdir_site": "os.mkdir('/sandbox/site/y') or 1",
    "rename_library": "os.rename(os.__file__, os.__file__ + 'x') or 1",
    "unlink_cell": "os.unlink('/sandbox/sandbox/cell.py') or 1",
    "link_library": "os.link(os.__file__, '/tmp/l') or 1",
    "chmod_library": "os.chmod(os.__file__, 0o777) or 1", "chmod_root": "os.chmod('/', 0o777) or 1",
    "chmod_tmp_parent": "os.chmod('/tmp/..', 0o777) or 1", "utime_usr": "os.utime('/usr/lib') or 1",
    "chown_tmp": "os.chown('/tmp', 0, 0) or 1", "mknod_fifo": "os.mkfifo('/tmp/p') or 1",
    "mknod_zero": "os.mknod('/tmp/z', 0o20666, os.makedev(1, 5)) or 1",
    "xattr": "os.setxattr('/tmp', 'user.x', b'y') or 1", "xattr_trusted": "os.setxattr('/tmp', 'trusted.x', b'y') or 1",
    "set_id_bit": "(open('s', 'w').close(), os.chmod('s', 0o4777), os.execv('/tmp/s', ['s']))",
    "chroot": "os.chroot('/tmp') or 1", "open_by_dot_dot": "os.open('/tmp/../root/.ssh', os.O_RDONLY)",
    "open_path_of_root": "os.listdir(os.open('/root', os.O_RDONLY | os.O_PATH))",
    # who it is
    "setuid": "os.setuid(0) or 1", "setgid": "os.setgid(0) or 1", "setresuid": "os.setresuid(0, 0, 0) or 1",
    "setgroups": "os.setgroups([0]) or 1", "setsid": "os.setsid()", "setpgid": "os.setpgid(0, 0) or 1",
    "nice": "os.nice(-5) or 1", "setpriority": "os.setpriority(0, 0, -20) or 1",
    "affinity": "os.sched_setaffinity(0, [0]) or 1", "scheduler": "os.sched_setscheduler(0, 1, os.sched_param(1)) or 1",
    "hostname": "socket.sethostname('x') or 1", "root": "os.getuid() == 0",
    # other processes
    **{f"kill_{pid}": f"os.kill({pid}, 0) or 1" for pid in (0, 1, 2, 3, -1, -2)},
    "tkill_2": "libc.syscall(200, 2, 0) == 0", "tgkill_1": "libc.syscall(234, 1, 1, 0) == 0",
    "pidfd_1": "libc.syscall(434, 1, 0) >= 0", "pidfd_getfd": "libc.syscall(438, 3, 0, 0) >= 0",
    "sigqueue": "libc.syscall(129, 2, 10, bytes(128)) == 0", "getpgid_1": "os.getpgid(1)", "getsid_1": "os.getsid(1)",
    "getpriority_1": "os.getpriority(0, 1) is not None", "prlimit_1": "__import__('resource').prlimit(1, 7)",
    "prlimit_2": "__import__('resource').prlimit(2, 7, (0, 0)) or 1",
    "ioprio": "libc.syscall(251, 1, 1, 0) == 0", "migrate_pages": "libc.syscall(256, 1, 8, bytes(8), bytes(8)) >= 0",
    "kcmp": "libc.syscall(312, 1, 2, 0, 0, 0) >= 0", "process_madvise": "libc.syscall(440, 3, 0, 0, 20, 0) >= 0",
    "rt_tgsigqueueinfo": "libc.syscall(297, 1, 1, 10, bytes(128)) == 0", "ptrace_me": "libc.syscall(101, 0, 0, 0, 0) == 0",
    "perf": "libc.syscall(298, bytes(128), 0, -1, -1, 0) >= 0", "robust_list_of_1": "libc.syscall(274, 1, bytes(8), bytes(8)) == 0",
    # the network
    **{f"socket_{family}_{kind}": f"socket.socket({family}, {kind})" for family in (1, 2, 10, 16, 17, 31, 38, 40, 44) for kind in (1, 2, 3)},
    "pair_of_inet": "socket.socketpair(socket.AF_INET)", "resolve": "socket.gethostbyname('example.org')",
    "connect_on_pair": "socket.socketpair()[0].connect('/tmp/s') or 1", "bind_on_pair": "socket.socketpair()[0].bind('/tmp/s') or 1",
    "listen_on_pair": "socket.socketpair()[0].listen() or 1", "setsockopt": "socket.socketpair()[0].setsockopt(1, 7, 1 << 30) or 1",
    "credentials_of_supervisor": "socket.socket(fileno=60).getsockopt(1, 17, 12)[:4] == b'\\x00\\x00\\x00\\x00' or None",
    "send_descriptor": "socket.send_fds(socket.socketpair()[0], [b'x'], [0])",
    "send_credentials": "socket.socketpair()[0].sendmsg([b'x'], [(1, 2, bytes(12))])",
    # memory and kernel
    "shared_map": "__import__('mmap').mmap(-1, 4096)", "huge_map": "__import__('mmap').mmap(-1, 1 << 40, flags=2 | 32)",
    "memfd": "os.memfd_create('x')", "mlock": "libc.mlock(bytes(4096), 4096) == 0", "shmget": "libc.shmget(0, 4096, 0o1600) >= 0",
    "semget": "libc.semget(0, 1, 0o1600) >= 0", "msgget": "libc.msgget(0, 0o1600) >= 0", "mq_open": "libc.syscall(240, b'x', 0o102, 0o600, 0) >= 0",
    "userfaultfd": "libc.syscall(323, 0) >= 0", "io_uring": "libc.syscall(425, 1, bytes(120)) >= 0", "aio": "libc.syscall(206, 1, bytes(8)) == 0",
    "inotify": "libc.syscall(294, 0) >= 0", "fanotify": "libc.syscall(300, 0, 0) >= 0", "timerfd": "libc.syscall(283, 0, 0) >= 0",
    "signalfd": "libc.syscall(289, -1, bytes(8), 8, 0) >= 0", "splice": "libc.syscall(275, 0, 0, 1, 0, 1, 0) >= 0",
    "vmsplice": "libc.syscall(278, 1, 0, 0, 0) >= 0", "tee": "libc.syscall(276, 0, 1, 1, 0) >= 0",
    "quota": "libc.syscall(179, 0, b'/', 0, 0) == 0", "swapon": "libc.syscall(167, b'/tmp', 0) == 0", "reboot": "libc.syscall(169, 0xfee1dead, 672274793, 0, 0) == 0",
    "clock_settime": "libc.syscall(227, 0, bytes(16)) == 0", "adjtimex": "libc.syscall(159, bytes(208)) >= 0", "settimeofday": "libc.syscall(164, bytes(16), 0) == 0",
    "init_module": "libc.syscall(175, b'', 0, b'') == 0", "kexec": "libc.syscall(246, 0, 0, 0, 0) == 0", "bpf": "libc.syscall(321, 0, bytes(128), 128) >= 0",
    "syslog": "libc.syscall(103, 3, bytes(64), 64) >= 0", "acct": "libc.syscall(163, 0) == 0", "iopl": "libc.syscall(172, 3) == 0", "ioperm": "libc.syscall(173, 0x80, 1, 1) == 0",
    "keyctl": "libc.syscall(250, 0, -3, 1) >= 0", "add_key": "libc.syscall(248, b'user', b'a', b'b', 1, -3) >= 0", "landlock": "libc.syscall(444, 0, 0, 1) >= 0",
    "seccomp_again": "libc.syscall(317, 1, 8, bytes(16)) >= 0", "no_new_filter": "libc.prctl(22, 2, bytes(16), 0, 0) == 0",
    "dumpable": "libc.prctl(4, 1, 0, 0, 0) == 0", "name": "libc.prctl(15, b'x', 0, 0, 0) == 0", "capset": "libc.syscall(126, bytes(8), bytes(24)) == 0",
    "keep_caps": "libc.prctl(8, 1, 0, 0, 0) == 0", "ambient": "libc.prctl(47, 2, 21, 0, 0) == 0", "subreaper": "libc.prctl(36, 1, 0, 0, 0) == 0",
    # namespaces and mounts
    **{f"unshare_{flag:x}": f"libc.unshare({flag}) == 0" for flag in (
        0x20000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000, 0x80, 0x10020000, 0x200, 0x400)},
    **{f"clone_{flag:x}": f"libc.syscall(56, {flag}, 0, 0, 0, 0) >= 0" for flag in (
        17, 0x20011, 0x10000011, 0x20000011, 0x100 | 17, 0x200 | 17, 0x400 | 17, 0x4000 | 17, 0x8000 | 17, 0x10000 | 17)},
    "fork_raw": "libc.syscall(57) >= 0", "vfork_raw": "libc.syscall(58) >= 0", "fork": "os.fork() + 1",
    "setns": "libc.setns(0, 0) == 0", "mount_tmpfs": "libc.mount(b'x', b'/tmp', b'tmpfs', 0, 0) == 0", "remount": "libc.mount(0, b'/', 0, 32 | 4096, 0) == 0",
    "umount_tmp": "libc.umount2(b'/tmp', 2) == 0", "umount_proc": "libc.umount2(b'/proc', 2) == 0", "fsopen": "libc.syscall(430, b'proc', 0) >= 0",
    "open_tree": "libc.syscall(428, -100, b'/', 1) >= 0", "mount_setattr": "libc.syscall(442, -100, b'/', 0, bytes(32), 32) == 0",
    "statmount": "libc.syscall(457, bytes(24), bytes(512), 512, 0) == 0", "listmount": "libc.syscall(458, bytes(24), bytes(64), 8, 0) >= 0",
    "move_mount_own": "libc.syscall(429, -1, b'', -1, b'', 0) == 0", "pivot": "libc.syscall(155, b'/tmp', b'/tmp') == 0",
    "name_to_handle": "libc.syscall(303, -100, b'/', bytes(128), bytes(8), 0) == 0", "open_by_handle": "libc.syscall(304, 3, bytes(128), 0) >= 0",
    "execve": "os.execv('/usr/lib/x', ['x'])", "execveat": "libc.syscall(322, 0, b'', 0, 0, 0x1000) == 0", "x32": "libc.syscall(0x40000000 + 39) >= 0",
}  # fmt: skip

# Calls of one rollout, one after the other.
ROLLOUTS = {
    "patched_report": [INNER + "os.write(60, b'm'); os.write(60, b'r'); os.write(60, b'h')", "1"],
    "ready_again": [INNER + "os.write(60, b'ready 3')", "1"],
    "unmapped_again": [INNER + "os.write(60, b'unmapped')", "1"],
    "no_seal": [INNER + "files.seal = lambda *_: None; f = open('f', 'w')", "f.write('x')", "1"],
    "seal_loops": [INNER + "def s(*_):\n    while True: pass\nfiles.forget = files.seal = s", "1"],
    "held_forged": [INNER + "files.kept = True; files.held.append(files.Held(59, 2, 59, 1 << 60))", "1", "1"],
    "held_directory": [INNER + "files.kept = True; files.held.append(files.Held(0, 2, 7, 0))", "1"],
    "old_fd_kept": [INNER + "open('f', 'w').write('x' * 9); k = os.open('f', os.O_RDONLY); files.take = lambda *_: None", "k", "1"],
    "cwd_kept": [INNER + "os.mkdir('d'); os.chdir('d'); files.take = lambda *_: None; os.fchdir = lambda *_: None", "1", "1"],
    "requests_eaten": [INNER + "recv = socket.recv_fds\nsocket.recv_fds = lambda *a: (b'', [], 0, None)", "1", "1"],
    "requests_garbled": [INNER + "recv = socket.recv_fds\nsocket.recv_fds = lambda *a: (b'{}\\nx', [0, 1, 2], 0, None)", "1"],
    "requests_twice": [INNER + "fork = os.fork\ndef f():\n    quietly(fork); return fork()\nos.fork = f", "1", "1"],
    "fork_and_exit": [INNER + "fork = os.fork\ndef f():\n    p = fork()\n    if p: os._exit(0)\n    return p\nos.fork = f", "1"],
    "fork_and_sleep": [INNER + "import time\nfork = os.fork\ndef f():\n    p = fork()\n    if p: time.sleep(60)\n    return p\nos.fork = f", "1", "1"],
    "fork_says_none": [INNER + "os.fork = lambda: -1", "1", "1"],
    "fork_raises": [INNER + "def f(): raise OSError\nos.fork = f", "1", "1"],
    "child_closes_all": [INNER + "def c(*_):\n    os.closerange(0, 64)\n    while True: pass\ninner._cell = c", "1", "1"],
    "child_unshares_only": [INNER + "inner._take_files = lambda *_: system.unshare(0x20000)", "open('/tmp/x', 'w')", "1"],
    "child_mounts_twice": [INNER + "def t(*_):\n    system.unshare(0x20000); system.ask_for_mount(); breach_if(libc.syscall(429, -1, b'', -1, b'', 0) == 0)\ninner._take_files = t", "1"],
    "child_unshares_late": [INNER + "take = inner._take_files\ndef t(*a):\n    take(*a); breach_if(libc.unshare(0x20000) == 0)\ninner._take_files = t", "1"],
    "child_user_namespace": [INNER + "take = inner._take_files\ndef t(*a):\n    breach_if(libc.unshare(0x10020000) == 0); take(*a)\ninner._take_files = t", "1"],
    "child_writes_parents_files": [INNER + "open('/tmp/a', 'w').write('kept')\ntake = inner._take_files\ndef t(*a):\n    quietly(lambda: open('/tmp/a', 'w').write('gone')); take(*a)\ninner._take_files = t", "breach_if(open('/tmp/a').read() != 'kept')", "1"],
    "pipe_to_child": [INNER + "r, w = os.pipe()", "os.write(w, b'x')", "1"],
    "timer_in_snapshot": ["import signal, os\nsignal.signal(14, lambda *_: os.write(60, b'd'))\nsignal.setitimer(0, 0.01, 0.01)", "1"],
    "alarm_kills_snapshot": ["import signal\nsignal.alarm(1)", "import time\ntime.sleep(0.1)", "1"],
    "stop_itself": [RAW + "raw(62, os.getpid(), 19)", "1"],
    "sigstop_ignored": ["import signal\nfor s in range(1, 65):\n    try: signal.signal(s, lambda *_: None)\n    except (OSError, ValueError): pass", "1"],
    "blocked_signals": ["import signal\nsignal.pthread_sigmask(0, range(1, 65))", "1"],
    "nofile_zero": ["import resource as r\nr.setrlimit(r.RLIMIT_NOFILE, (0, 0))", "1"],
    "nofile_61": ["import resource as r\nr.setrlimit(r.RLIMIT_NOFILE, (61, 61))", "1", "1"],
    "fsize_zero": ["import resource as r\nr.setrlimit(r.RLIMIT_FSIZE, (0, 0))", "print('x')", "1"],
    "as_tiny": ["import resource as r\nr.setrlimit(r.RLIMIT_AS, (1 << 20, 1 << 20))", "1", "1"],
    "stack_tiny": ["import resource as r\nr.setrlimit(r.RLIMIT_STACK, (4096, 4096))", "1", "1"],
    "cpu_zero": ["import resource as r\nr.setrlimit(r.RLIMIT_CPU, (0, 0))", "1"],
    "cpu_one_then_spin": ["import resource as r\nr.setrlimit(r.RLIMIT_CPU, (1, 1))", "while True: pass", "1"],
    "all_descriptors": ["import os\nf = []\nwhile True:\n    try: f.append(os.dup(0))\n    except OSError: break", "1"],
    "pipes_full": ["import os\nr, w = os.pipe(); os.set_blocking(w, False)\ntry:\n    while True: os.write(w, bytes(4096))\nexcept OSError: pass", "1"],
    "socket_full": ["import socket\na, b = socket.socketpair(); a.setblocking(False)\ntry:\n    while True: a.send(bytes(4096))\nexcept OSError: pass", "1"],
    "channel_full": ["import socket\nc = socket.socket(fileno=60); c.setblocking(False)\ntry:\n    while True: c.send(b'd')\nexcept OSError: pass", "1"],
    "channel_read": ["import socket\nc = socket.socket(fileno=60); c.setblocking(False)\ntry: print('BREACH', c.recv(100))\nexcept OSError: pass", "1"],
    "channel_shut": ["import socket\nsocket.socket(fileno=60).shutdown(2)", "1", "1"],
    "channel_replaced": ["import os, socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)\nos.dup2(a.fileno(), 60)", "1", "1"],
    "files_full": ["i = 0\ntry:\n    while True: open(str(i), 'wb').write(bytes(1 << 20)); i += 1\nexcept OSError: pass", "1"],
    "inodes_full": ["i = 0\ntry:\n    while True: open(str(i), 'w').close(); i += 1\nexcept OSError: pass", "1"],
    "long_names": ["for i in range(50): open(str(i).rjust(255, 'x'), 'w').close()", "import os\nlen(os.listdir('.'))"],
    "odd_names": ["import os\nfor n in (b'\\xff\\xfe', b'\\n', b' ', b'-', b'\\x1b[2J', '\\u202e'.encode()): open(n, 'w').close()", "len(os.listdir('.'))"],
    "symlink_loop": ["import os\nos.symlink('a', 'b'); os.symlink('b', 'a'); os.symlink('.', 'c')", "len(os.listdir('.'))"],
    "symlink_out": ["import os\nos.symlink('/usr/lib', 'l'); os.symlink('/proc/1/root', 'm')", "try: os.listdir('m'); print('BREACH')\nexcept OSError: pass"],
    "tmp_moved": ["import os\ntry: os.rename('/tmp', '/tmp2'); print('BREACH')\nexcept OSError: pass", "1"],
    "tmp_mode_zero": ["import os\nos.chmod('/tmp', 0)", "1"],
    "many_links": ["import os\nopen('f', 'w').close()\nfor i in range(2000): os.link('f', f'l{i}')", "os.stat('f').st_nlink"],
    "unlinked_chain": ["import os\nf = []\nfor i in range(20):\n    f.append(open('f', 'w+b')); f[-1].write(bytes(1 << 18)); f[-1].flush(); os.unlink('f')", "1", "1"],
    "mapped_file": ["import mmap\nopen('f', 'wb').write(bytes(1 << 20))\nm = mmap.mmap(open('f', 'rb').fileno(), 0, flags=mmap.MAP_PRIVATE, prot=1)", "m[0]", "1"],
    "shadowed_modules": ["import sys\nfor n in ('os', 'socket', 'signal', 'json', 'resource', 'ast'): sys.modules[n] = None", "1", "import os"],
    "shadowed_file": ["open('os.py', 'w').write('print(1 / 0)'); open('json.py', 'w').write('x')", "import json; json.dumps(1)"],
    "import_hook": ["import sys\nsys.meta_path.insert(0, type('F', (), {'find_spec': lambda *a: 1 / 0})())", "1"],
    "builtins_print": ["import builtins\nbuiltins.print = builtins.repr = builtins.compile = builtins.exec = None", "1", "1 + 1"],
    "gc_callbacks": ["import gc\ngc.callbacks.append(lambda *_: 1 / 0)\ngc.set_threshold(1)", "1", "[[] for _ in range(99)]"],
    "excepthook": ["import sys\nsys.excepthook = sys.unraisablehook = lambda *_: 1 / 0", "1 / 0", "1"],
    "atexit": ["import atexit, os\natexit.register(lambda: os.write(60, b'd'))", "raise SystemExit", "1"],
    "at_fork": ["import os\nos.register_at_fork(before=lambda: 1 / 0, after_in_child=lambda: 1 / 0, after_in_parent=lambda: 1 / 0)", "1", "1"],
    "at_fork_loops": ["import os\ndef f():\n    while True: pass\nos.register_at_fork(before=f)", "1"],
    "at_fork_child_loops": ["import os\ndef f():\n    while True: pass\nos.register_at_fork(after_in_child=f)", "1"],
    "settrace_kept": ["import sys, threading\nsys.settrace(lambda *_: 1 / 0); threading.settrace(lambda *_: 1 / 0)", "1"],
    "audit_hook": ["import sys\nsys.addaudithook(lambda *_: 1 / 0)", "1", "1"],
    "audit_hook_exits": ["import sys, os\ndef hook(event, _):\n    if event.startswith('os.fork'): os._exit(0)\nsys.addaudithook(hook)", "1", "1"],
    "recursion_zero": ["import sys\ntry: sys.setrecursionlimit(10)\nexcept RecursionError: pass", "1"],
    "deep_object": ["x = []\nfor _ in range(10**5): x = [x]", "del x", "1"],
    "weird_last_value": ["class A:\n    __class__ = property(lambda s: 1 / 0)\n    def __repr__(s): return 7\nA()", "1"],
    "output_closed": ["import os\nos.close(1); os.close(2); os.close(0)", "print(1)", "1"],
    "output_to_channel": ["import os\nos.dup2(60, 1)\nprint('d' * 100)", "1"],
    "output_escapes": ["print('\\x1b]0;x\\x07' * 1000)", "1"],
    "output_zeros": ["import os\nos.write(1, bytes(1 << 20))", "1"],
    "output_sparse": ["import os\nos.lseek(1, (16 << 20) - 1, 0); os.write(1, b'x')", "1"],
    "report_after_death": [INNER + "os.write(60, b'd'); os._exit(0)", "1"],
    "thousand_calls_of_one_state": ["x = 1", *["x += 1"] * 8, "x"],
    "memory_in_steps": [*["try: y.append(bytearray(40 << 20))\nexcept NameError: y = []"] * 8, "len(y)"],
    "swap_like": ["import mmap\nm = mmap.mmap(-1, 200 << 20, flags=34)\nfor i in range(0, len(m), 4096): m[i] = 1", "m.madvise(4)", "1"],
    "threads": ["import threading\nfor _ in range(50):\n    try: threading.Thread(target=print).start(); print('BREACH')\n    except RuntimeError: pass", "1"],
    "asyncio_subprocess": ["import asyncio\nasync def f():\n    p = await asyncio.create_subprocess_exec('/bin/true'); print('BREACH', p)\nasyncio.run(f())", "1"],
    "executor_pool": ["from concurrent.futures import ProcessPoolExecutor as P\nwith P(1) as p: print('BREACH', p.submit(abs, -1).result())", "1"],
    "asyncio_kept": ["import asyncio\nloop = asyncio.new_event_loop()", "loop.run_until_complete(asyncio.sleep(0.01, 5))", "1"],
    "sqlite_wal": ["import sqlite3\nc = sqlite3.connect('d'); c.execute('pragma journal_mode=wal').fetchall()", "c.execute('create table t(a)'); c.commit()", "1"],
    "sqlite_attach": ["import sqlite3\nc = sqlite3.connect(':memory:')\ntry: c.execute(\"attach '/etc/passwd' as p\"); c.execute('select * from p.sqlite_master'); print('BREACH')\nexcept sqlite3.Error: pass", "1"],
    "ctypes_gadget": ["import ctypes\nctypes.CFUNCTYPE(None)(lambda: None)()", "1"],
    "exec_memory": ["import mmap\ntry:\n    m = mmap.mmap(-1, 4096, prot=7, flags=34); m.write(b'\\xcc')\nexcept (OSError, PermissionError): pass", "1"],
    "jump_to_garbage": ["import ctypes, mmap\nm = mmap.mmap(-1, 4096, prot=7, flags=34); m.write(b'\\x0f\\x0b')\nctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()", "1"],
    "int80": ["import ctypes, mmap\nm = mmap.mmap(-1, 4096, prot=7, flags=34); m.write(b'\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3')\nprint('BREACH', ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))())", "1"],
    "vsyscall": ["import ctypes\nctypes.CFUNCTYPE(ctypes.c_int)(0xffffffffff600400)()", "1"],
}  # fmt: skip


def program(expression):
    return f"{INNER}breach_if(quietly(lambda: {expression}))"


CASES = {f"expression {name}": [program(code), "1"] for name, code in EXPRESSIONS.items()}
CASES |= ROLLOUTS | {f"fresh {name}": codes for name, codes in FRESH.items()}


@pytest.fixture(scope="module")
def tool():
    tool = PythonTool(PythonToolConfig(timeout=TIMEOUT, memory_mb=256, preload=("math",)))
    yield tool
    tool.close()


@pytest.fixture(scope="module")
def played(tool):
    """For each rollout: the results it read, the time of its longest call, and whether its victim kept its state."""
    pid = tool.pid

    def play(name):
        _, victim = tool.call(tool.start(), f"secret = {SECRET!r}\nopen('note', 'w').write({name!r})")
        state, results, longest = tool.start(), [], 0.0
        for code in CASES[name]:
            began = time.monotonic()
            result, state = tool.call(state, code)
            longest = max(longest, time.monotonic() - began)
            results.append(result)
        intact = tool.call(victim, "secret, open('note').read()")[0].text == repr((SECRET, name))
        return results, longest, intact

    with ThreadPoolExecutor(4) as pool:
        found = dict(zip(CASES, pool.map(play, CASES), strict=True))
    assert tool.pid == pid, "the sandbox had to be restarted"
    return found


@pytest.mark.parametrize("name", CASES)
def test_attack(played, name):
    results, longest, intact = played[name]
    for result in results:
        assert not re.search(r"^BREACH", result.text, re.MULTILINE), result.text
        assert result.outcome is not Outcome.UNAVAILABLE, result.text
        assert len(result.text) < 25_000
    assert longest < TIMEOUT + 4.0  # the executor's own patience: beyond it a call counts as the tool's failure
    assert intact


def test_nothing_is_left_of_them(tool, played):
    gc.collect()
    end = time.monotonic() + 10
    while len(descendants(tool.pid)) > 2 and time.monotonic() < end:
        time.sleep(0.1)
    assert len(descendants(tool.pid)) == 2


def test_every_other_system_call_is_refused(tool):
    """All numbers that the filter does not name, each with empty arguments, and those of the other ABIs."""
    probes = {335, 336}  # uretprobe and uprobe: the kernel lets no filter see them, and kills who calls them by hand
    numbers = sorted(set(range(480)) - set(seccomp._X86_64.values()) - probes)
    code = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nallowed = []\n"
        f"for n in {numbers} + [0x40000000 + n for n in range(0, 550)]:\n"
        f"    if libc.syscall(n, 0, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() != {errno.EPERM}: allowed.append(n)\n"
        "allowed"
    )
    assert tool.call(tool.start(), code)[0].text == "[]"
    assert len(numbers) > 250
