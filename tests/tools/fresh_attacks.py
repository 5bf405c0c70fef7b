"""A hundred attacks that were written after the sandbox had been repaired against those of the other files, and tried once:
docs/tools.md has the result. test_more_attacks.py runs them. A case is the calls of one rollout."""

# ruff: noqa: E501 - a line is an attack

INNER = """
import ctypes, os, signal, socket, sys
inner, system, files, cell = (sys.modules[f"sandbox.{n}"] for n in ("interpreter", "system", "files", "cell"))
libc = ctypes.CDLL(None, use_errno=True)
def quietly(f, *a):
    try: return f(*a)
    except BaseException: return None
def breach_if(value):
    if value: print("BREACH", value)
"""

SECRET = "b7e2-victim-secret-91aa"
# The secret's text with each byte changed: an attack that searches memory must not find its own code there.
HIDDEN = bytes(x ^ 1 for x in SECRET.encode())
GREP = INNER + "import gc\nneedle = 'b7e2-victim-' + 'secret-91aa'\n"

FRESH = {
    # the protocol between a state and the supervisor
    "report_then_write": [INNER + "os.write(60, b'd')\nfor i in range(10**5): open('late', 'a').write('x')", "1"],
    "report_then_fork": [INNER + "os.write(60, b'd')\nfor i in range(10**4):\n    try: print('BREACH', os.fork())\n    except OSError: pass", "1"],
    "empty_reports": [INNER + "for _ in range(100): socket.socket(fileno=os.dup(60)).send(b'')", "1"],
    "long_report": [INNER + "quietly(os.write, 60, b'd' * 100_000)", "1"],
    "hello_when_sandboxed": [INNER + "os.write(60, b'h')\nimport time; time.sleep(0.1)", "1"],
    "head_lies_about_folder": [INNER + "loads = inner.json.loads\ninner.json.loads = lambda t: {**loads(t), 'folder': '/'}", "os.listdir('/tmp')", "1"],
    "head_lies_about_descriptors": [INNER + "loads = inner.json.loads\ninner.json.loads = lambda t: {**loads(t), 'descriptors': 0}", "1", "1"],
    "child_swaps_output": [INNER + "cell0 = inner._cell\ndef c(m, fds, *a):\n    fds[1], fds[2] = fds[2], fds[1]; cell0(m, fds, *a)\ninner._cell = c", "1", "1"],
    "child_reports_to_parent": [INNER + "cell0 = inner._cell\ndef c(m, fds, *a):\n    fds[0] = os.dup(60); cell0(m, fds, *a)\ninner._cell = c", "1", "1"],
    "child_keeps_mount": [INNER + "cell0 = inner._cell\ndef c(m, fds, *a):\n    os.dup2(fds[2], 50); cell0(m, fds, *a)\ninner._cell = c", "breach_if(quietly(lambda: open('/proc/self/fd/50')))", "1"],
    "child_closes_mount": [INNER + "cell0 = inner._cell\ndef c(m, fds, *a):\n    os.close(fds[2]); cell0(m, fds, *a)\ninner._cell = c", "1", "1"],
    "grandchild": [INNER + "cell0 = inner._cell\ndef c(m, fds, *a):\n    p = quietly(os.fork); breach_if(p is not None and p + 1); cell0(m, fds, *a)\ninner._cell = c", "1", "1"],
    "parent_answers_for_child": [INNER + "fork = os.fork\ndef f():\n    p = fork()\n    if p: os.write(60, b'd')\n    return p\nos.fork = f", "1", "1"],
    "nonblocking_channel": [INNER + "os.set_blocking(60, False)", "1", "1"],
    "ioctl_nonblocking_channel": [INNER + "import fcntl\nfcntl.ioctl(60, 0x5421, b'\\x01\\0\\0\\0')", "1", "1"],
    "continue_handler": [INNER + "n = [0]\ndef h(*_): n[0] += 1\nsignal.signal(signal.SIGCONT, h)", "m = n[0]", "breach_if(m > 1 or n[0] > 1)"],
    "continue_handler_loops": [INNER + "def h(*_):\n    while True: pass\nsignal.signal(signal.SIGCONT, h)", "1", "1"],
    "continue_handler_reports": [INNER + "signal.signal(signal.SIGCONT, lambda *_: os.write(60, b'd'))", "1", "1"],
    "stop_handler_blocked": [INNER + "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCONT, signal.SIGTSTP])", "1", "1"],
    "child_signals": [INNER + "signal.signal(signal.SIGCHLD, lambda *_: os._exit(0))", "1", "1"],
    "pipe_signal": [INNER + "signal.signal(signal.SIGPIPE, signal.SIG_DFL)\nr, w = os.pipe(); os.close(r)", "os.write(w, b'x')", "1"],
    "wakeup_descriptor": [INNER + "a, b = socket.socketpair(); a.setblocking(False)\nsignal.set_wakeup_fd(60 if False else a.fileno())", "1", "1"],
    "wakeup_on_channel": [INNER + "os.set_blocking(60, False); signal.set_wakeup_fd(60); signal.signal(14, lambda *_: None); signal.setitimer(0, 0.001, 0.001)\nimport time; time.sleep(0.1)", "1"],
    # what another rollout knows
    "secret_in_heap": [GREP + "breach_if([o for o in gc.get_objects() if isinstance(o, dict) and o is not globals() and any(needle in str(v)[:99] for v in list(o.values())[:50] if isinstance(v, str))])", "1"],
    "secret_in_frames": [GREP + "f = sys._getframe()\nwhile f:\n    breach_if(f.f_locals is not globals() and needle in repr({k: v for k, v in f.f_locals.items() if v is not globals() and k != 'code'})); f = f.f_back", "1"],
    "secret_in_strings": [GREP + "breach_if(any(needle in repr(m.__dict__.get('__main__', '')) for m in list(sys.modules.values()) if hasattr(m, '__dict__')))", "1"],
    "options_hold_paths": [INNER + "f = sys._getframe()\nwhile f:\n    o = f.f_locals.get('options', {}); breach_if(isinstance(o, dict) and (o.get('folder') or [k for k in o if 'key' in k.lower()])); f = f.f_back", "1"],
    "environment_of_start": [INNER + "e = ctypes.POINTER(ctypes.c_char_p).in_dll(libc, 'environ')\ni = 0\nwhile e[i]:\n    breach_if(b'APPO' in e[i] or b'KEY' in e[i] or b'TOKEN' in e[i]); i += 1", "1"],
    "command_line": [INNER + "breach_if([a for a in sys.orig_argv if '/work' in a or 'api' in a.lower()])", "1"],
    "stack_leftovers": [INNER + f"HIDDEN = {HIDDEN}\nb = ctypes.create_string_buffer(1 << 16)\nbreach_if(HIDDEN in bytes(x ^ 1 for x in ctypes.string_at(ctypes.addressof(b) - (1 << 14), 1 << 14)))", "1"],
    "fresh_memory": [INNER + "import mmap\nbreach_if(any(mmap.mmap(-1, 1 << 20)[:]) if False else any(mmap.mmap(-1, 1 << 20, flags=34)[:]))", "1"],
    "fresh_tmp": [INNER + "breach_if(os.listdir('/tmp'))", "1"],
    "pid_reuse": [INNER + "breach_if(os.getppid() > os.getpid() + 10**6)", "1"],
    # files
    "exchange": [INNER + "open('a', 'w').write('a'); open('b', 'w').write('b')\nlibc.syscall(316, -100, b'a', -100, b'b', 2)", "breach_if(open('a').read() != 'b')", "1"],
    "whiteout": [INNER + "open('a', 'w').close(); breach_if(libc.syscall(316, -100, b'a', -100, b'w', 4) == 0 and os.stat('a').st_rdev)", "1"],
    "exchange_with_outside": [INNER + "open('a', 'w').close(); breach_if(libc.syscall(316, -100, b'/tmp/a', -100, b'/usr/lib', 2) == 0)", "1"],
    "own_nameless": [INNER + "open('.nameless', 'w').close()\nimport tempfile; t = tempfile.TemporaryFile()", "1", "1"],
    "own_gone": [INNER + "open('.gone', 'w').close(); os.mkdir('d'); os.chdir('d'); os.rmdir('/tmp/d')", "1", "1"],
    "negative_times": [INNER + "open('f', 'w').close(); os.utime('f', ns=(-10**18, -10**18))", "breach_if(os.stat('f').st_mtime_ns != -10**18)", "1"],
    "future_times": [INNER + "open('f', 'w').close(); os.utime('f', (2**40, 2**40))", "1", "1"],
    "sticky_and_set_group": [INNER + "os.mkdir('d'); os.chmod('d', 0o7777); open('d/s', 'w').close(); os.chmod('d/s', 0o6755)", "1", "1"],
    "punched_hole": [INNER + "f = open('f', 'w+b'); f.write(bytes([1]) * (1 << 20)); f.flush(); libc.fallocate(f.fileno(), 3, 0, 1 << 19)", "1", "1"],
    "grown_beyond": [INNER + "f = open('f', 'wb'); breach_if(quietly(os.posix_fallocate, f.fileno(), 0, 1 << 30) is None and os.fstat(f.fileno()).st_size >= 1 << 30)", "1"],
    "seek_far": [INNER + "f = os.open('f', os.O_CREAT | os.O_RDWR); os.lseek(f, 1 << 62, 0); quietly(os.write, f, b'x')", "1", "1"],
    "append_only_reopen": [INNER + "f = os.open('f', os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_SYNC)", "os.write(f, b'x')", "1"],
    "path_descriptor": [INNER + "f = os.open('/tmp', os.O_PATH)", "breach_if(quietly(lambda: os.open('../etc/shadow', os.O_RDONLY, dir_fd=f)))", "1"],
    "path_descriptor_of_file": [INNER + "open('g', 'w').close(); f = os.open('g', os.O_PATH)", "1", "1"],
    "openat2_beneath": [INNER + "h = (ctypes.c_uint64 * 3)(0, 0, 8); breach_if(libc.syscall(437, -100, b'/etc/shadow', h, 24) >= 0)", "1"],
    "directory_of_itself": [INNER + "os.symlink('/tmp', '/tmp/self')", "breach_if(len(os.listdir('/tmp/self/self')) != 1)", "1"],
    "rename_into_itself": [INNER + "os.mkdir('d'); breach_if(quietly(lambda: os.rename('d', 'd/d') or 1))", "1"],
    "ten_thousand_symlinks": [INNER + "i = 0\ntry:\n    while True: os.symlink('x' * 4000, f's{i}'); i += 1\nexcept OSError: pass", "1", "1"],
    "library_as_tmp": [INNER + "open('/tmp/libc.so.6', 'wb').write(open('/usr/lib/x86_64-linux-gnu/libc.so.6', 'rb').read(1 << 20))", "quietly(lambda: ctypes.CDLL('/tmp/libc.so.6'))", "1"],
    "pth_and_sitecustomize": [INNER + "open('sitecustomize.py', 'w').write('1/0'); open('x.pth', 'w').write('import os; os._exit(1)')", "import importlib; importlib.invalidate_caches()", "1"],
    "bytecode_cache": [INNER + "os.makedirs('__pycache__'); sys.dont_write_bytecode = False; open('m.py', 'w').write('x = 1'); import m", "import m; m.x", "1"],
    # kernel
    "pdeathsig": [INNER + "breach_if(libc.prctl(1, 9, 0, 0, 0) == 0)", "1"],
    "set_mm": [INNER + "breach_if(libc.prctl(35, 1, 0, 0, 0) == 0)", "1"],
    "user_dispatch": [INNER + "breach_if(libc.prctl(59, 1, 0, 0, 0) == 0)", "1"],
    "core_scheduling": [INNER + "breach_if(libc.prctl(62, 1, 0, 0, 0) == 0)", "1"],
    "speculation": [INNER + "breach_if(libc.prctl(53, 0, 2, 0, 0) == 0)", "1"],
    "prctl_high_bits": [INNER + "breach_if(libc.syscall(157, (1 << 32) | 22, 2, bytes(16), 0, 0) == 0)", "1"],
    "clone_high_bits": [INNER + "breach_if(libc.syscall(56, (1 << 33) | 17, 0, 0, 0, 0) >= 0)", "1"],
    "socketpair_high_bits": [INNER + "b = (ctypes.c_int * 2)(); breach_if(libc.syscall(53, (1 << 32) | 2, 1, 0, b) == 0)", "1"],
    "prlimit_high_bits": [INNER + "breach_if(libc.syscall(302, (1 << 32) | 0, 7, 0, bytes(16)) == 0 and False)", "1"],
    "mmap_shared_validate": [INNER + "m = libc.mmap; m.restype = ctypes.c_ssize_t; breach_if(m(0, 4096, 3, 0x23, -1, 0) > 0)", "1"],
    "mmap_grows_down": [INNER + "m = libc.mmap; m.restype = ctypes.c_ssize_t; m(0, 4096, 3, 0x122, -1, 0)", "1"],
    "mremap_many": [INNER + "m, r = libc.mmap, libc.mremap\nm.restype = r.restype = ctypes.c_ssize_t\na = m(0, 1 << 20, 3, 0x22, -1, 0)\nbreach_if(r(ctypes.c_void_p(a), 1 << 20, ctypes.c_size_t(1 << 40), 1) > 0)", "1"],
    "merge_pages": [INNER + "import mmap\nm = mmap.mmap(-1, 1 << 20, flags=34); quietly(m.madvise, 12)", "1"],
    "dont_fork": [INNER + "import mmap\nm = mmap.mmap(-1, 1 << 20, flags=34); m[:5] = b'hello'; m.madvise(10)", "m[:5]", "1"],
    "wipe_on_fork": [INNER + "import mmap\nm = mmap.mmap(-1, 1 << 20, flags=34); m[:5] = b'hello'; m.madvise(18)", "m[:5]", "1"],
    "poison": [INNER + "m = ctypes.create_string_buffer(1 << 14)\na = (ctypes.addressof(m) + 4095) & ~4095\nbreach_if(libc.madvise(ctypes.c_void_p(a), 4096, 100) == 0)", "1"],
    "rseq_garbage": [INNER + "breach_if(libc.syscall(334, 8, 32, 0, 0) == 0)", "1"],
    "robust_garbage": [INNER + "libc.syscall(273, 8, 24)", "1", "1"],
    "alternate_stack": [INNER + "class S(ctypes.Structure):\n    _fields_ = [('p', ctypes.c_void_p), ('f', ctypes.c_int), ('n', ctypes.c_size_t)]\nlibc.sigaltstack(ctypes.byref(S(4096, 0, 8192)), None)", "1", "1"],
    "futex_wait": [INNER + "libc.syscall(202, bytes(4), 0, 0, 0)", "1"],
    "int80_write": ["import ctypes, mmap\nm = mmap.mmap(-1, 4096, prot=7, flags=34); m.write(b'\\xb8\\x27\\0\\0\\0\\xcd\\x80\\xc3')\nprint('BREACH', ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))())", "1"],
    "sysenter": ["import ctypes, mmap\nm = mmap.mmap(-1, 4096, prot=7, flags=34); m.write(b'\\xb8\\x14\\0\\0\\0\\x0f\\x34\\xc3')\nprint('BREACH', ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))())", "1"],
    "far_call": ["import ctypes, mmap\nm = mmap.mmap(-1, 4096, prot=7, flags=98); m.write(b'\\x6a\\x23\\x68\\0\\0\\0\\0\\x48\\xcb')\nctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()", "1"],
    "cpuid_faulting": [INNER + "libc.syscall(158, 0x1012, 0)", "1", "1"],
    "gs_base": [INNER + "libc.syscall(158, 0x1001, 0)", "1", "1"],
    "fs_base": [INNER + "libc.syscall(158, 0x1002, 0)", "1", "1"],
    "epoll_nest": ["import select\ne = [select.epoll() for _ in range(30)]\nfor a, b in zip(e, e[1:]):\n    try: a.register(b.fileno())\n    except OSError: pass", "1", "1"],
    "eventfd_full": [INNER + "e = libc.eventfd(0, 0)\nquietly(os.write, e, (2**64 - 2).to_bytes(8, 'little'))", "quietly(os.write, e, (5).to_bytes(8, 'little'))", "1"],
    "sendfile_for_ever": [INNER + "z = os.open('/dev/zero', 0)\nquietly(os.sendfile, 1, z, None, 1 << 40)", "1"],
    "random_drain": [INNER + "for _ in range(200): os.getrandom(1 << 20)", "1"],
    "urandom_write": [INNER + "quietly(lambda: os.write(os.open('/dev/urandom', os.O_WRONLY), bytes(1 << 20)))", "1"],
    "random_ioctl": [INNER + "import fcntl\nbreach_if(quietly(lambda: fcntl.ioctl(os.open('/dev/urandom', 0), 0x5204, 0) or 1))", "1"],
    # resources
    "zip_bomb": ["import zlib\nzlib.decompress(zlib.compress(bytes(1 << 30)) if False else zlib.compress(bytes(10**7)) * 1, bufsize=1 << 34)", "1"],
    "wide_format": ["f'{1:>9999999999}'", "'%9999999999d' % 1", "1"],
    "pickle_bomb": ["import pickle\npickle.loads(b'cbuiltins\\nbytearray\\n(I9999999999\\ntR.')", "1"],
    "decimal_bomb": ["import decimal\ndecimal.getcontext().prec = 10**9\ndecimal.Decimal(2) ** decimal.Decimal('0.5')", "1"],
    "hash_flood": ["{i * (2**61 - 1): 0 for i in range(10**5)}", "1"],
    "huge_range_list": ["list(range(10**12))", "1"],
    "generator_bomb": ["import itertools\nsum(1 for _ in itertools.product(*[range(10)] * 30))", "1"],
    "json_deep": ["import json\njson.loads('[' * 10**5)", "1"],
    "compile_huge": ["compile('x = ' + '+'.join(['1'] * 40_000), 'x', 'exec')", "1"],
    # what is shown
    "group_of_errors": ["raise ExceptionGroup('x', [ValueError(str(i)) for i in range(10**5)])", "1"],
    "cause_cycle": ["a, b = ValueError(1), ValueError(2)\na.__cause__, b.__cause__ = b, a\nraise a", "1"],
    "hostile_notes": ["e = ValueError()\ne.__notes__ = type('N', (), {'__iter__': lambda s: s, '__next__': lambda s: 'x' * 10**6})()\nraise e", "1"],
    "hostile_syntax_error": ["raise SyntaxError('x', (object(), 2**70, -5, 7, 1, 2))", "1"],
    "traceback_replaced": ["import sys\nsys.modules['sandbox.cell'].traceback = None\n1 / 0", "1"],
    "output_replaced": ["import sys\nsys.modules['sandbox.cell']._Output = None", "print(1)", "1"],
    "run_replaced": ["import sys\nsys.modules['sandbox.cell'].run = lambda *_: b'x' * 10**6", "1", "1"],
    "bom_and_cookie": ["\ufeff# -*- coding: rot13 -*-\ncevag(1)", "1"],
    "fences_in_fences": ["```python\n```python\n1\n```\n```", "1"],
    "form_feeds": ["\x0c\x0c1\r\r\n\x1a", "1"],
    "lone_surrogates": ["'\ud800'", "print('\udfff')", "1"],
    "exactly_as_long": ["#" + "x" * 99_999, "1"],
}  # fmt: skip
