"""The trusted half of the sandbox: an event loop between the trainer and the interpreter processes.

It runs no policy code. It alone decides which process may fork and when (through the system-call filter's listener),
gives every cell its output file, its private /tmp and its deadline, stops finished cells so that snapshots are truly
frozen, and kills. In the sandbox it is process 1: when it ends, for whatever reason, the kernel ends everything else in
there. It ends when its socket to the trainer closes, that is, when the trainer is gone.

Messages are JSON with a 4-byte length. In: {"run": id, "from": id, "code", "timeout"} and {"free": id}.
Out: {"ready": true} or {"error"}, then {"id", "outcome", "text"}, the outcome one of ok, error, limit, timeout, died,
lost and full.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import resource
import selectors
import shutil
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

from . import enter, interpreter, seccomp, system

TMPFS_SIZE = "16m"
TAIL = 4096  # bytes of the end of an overlong output that are kept: the traceback stands there
MEMORY_SHARE = 0.5  # of the memory available at start, for all snapshots together


class TrainerGone(Exception):
    """There is nobody left to serve."""


@dataclasses.dataclass(eq=False)
class Node:
    """An interpreter: asked for, then a cell that is forked and runs, then a frozen snapshot."""

    id: int
    code: bytes = b""
    timeout: float = 0.0
    parent: Node | None = None
    channel: socket.socket | None = None
    pid: int = 0
    pidfd: int = -1
    output: int = -1
    files: int = -1  # the mount of its /tmp
    deadline: float = 0.0
    allowed: set[int] = dataclasses.field(default_factory=set)  # supervised system calls it may make now, once each
    verdict: str = "died"  # what its death means while it runs
    running: bool = True
    memory: int = 0  # bytes of private memory, pages shared with its ancestors included
    growth: int = 0  # bytes by which it outgrew its parent, its files included
    child: Node | None = None  # being forked from it
    unmet: bool = False  # it has forked a child that has not made itself known
    queue: collections.deque[Node] = dataclasses.field(default_factory=collections.deque)  # to be forked from it


def main(control: int, options: dict[str, Any]) -> None:
    """Set up the sandbox, start state 0, serve the trainer until its socket closes."""
    host = socket.socket(fileno=control)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    if options["isolation"] == "bubblewrap":
        # The parent is bwrap's outer process, which in turn dies with the thread that started it (--die-with-parent).
        system.prctl(system.PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # should memory run out, this goes before the trainer
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # every state needs two descriptors here
    try:
        supervisor = Supervisor(host, options)
    except Exception as error:
        host.sendall(_pack({"error": f"{type(error).__name__}: {error}"}))
        return
    supervisor._tell({"ready": True, "filtered": supervisor.listener is not None})
    with contextlib.suppress(TrainerGone):
        supervisor.serve()
    supervisor.end()


class Supervisor:
    """State 0 and all that was forked from it."""

    def __init__(self, host: socket.socket, options: dict[str, Any]):
        self.host = host
        self.options = options
        self.sandboxed = options["isolation"] == "bubblewrap"
        self.inbox = bytearray()
        self.outbox = bytearray()
        self.nodes: dict[int, Node] = {}  # asked for and not freed
        self.by_pid: dict[int, Node] = {}  # alive
        self.waiting: set[Node] = set()  # forking or running: these have deadlines
        self.memory_left = int(MEMORY_SHARE * system.available_memory())
        if self.sandboxed:
            if os.getuid() == 0:
                enter.become_unprivileged()
            system.own_user_namespace()
            self.mounts = os.open("/proc/self/ns/mnt", os.O_RDONLY)  # its own mount namespace
            os.close(system.new_tmpfs(TMPFS_SIZE))  # fails here, at start, where the kernel cannot do it
        else:
            os.mkdir(os.path.join(options["folder"], "0"), 0o700)
        self.selector = (
            selectors.DefaultSelector()
        )  # what becomes readable: the node that it belongs to, and its handler
        self.listener = self._start_root()
        host.setblocking(False)
        self.selector.register(host, selectors.EVENT_READ, (None, self._on_host))
        if self.listener is not None:
            self.selector.register(self.listener, selectors.EVENT_READ, (None, self._on_notification))

    def _start_root(self) -> int | None:
        """Fork state 0. Returns the listener of its system-call filter."""
        ours, theirs = _channel()
        pid = os.fork()
        if pid == 0:
            try:
                ours.close()
                self.host.close()
                interpreter.main(theirs, self.options)
            except BaseException as error:
                with contextlib.suppress(OSError):
                    socket.socket(fileno=interpreter.CHANNEL).send(f"{type(error).__name__}: {error}".encode()[:4000])
            finally:
                os._exit(1)
        theirs.close()
        message = ours.recv(4096)
        if message == interpreter.UNMAPPED:
            system.map_user(pid, os.getuid(), os.getgid())
            ours.send(b"mapped")
            message = ours.recv(4096)
        if not message.startswith(interpreter.READY):
            raise RuntimeError(message.decode("utf-8", "replace") or "the interpreter died at start")
        theirs_fd = int(message[len(interpreter.READY) :] or b"-1")
        root = Node(0, channel=ours, running=False)
        self.nodes[0] = root
        self._born(root, pid)
        root.memory = system.private_memory(pid)
        if self.sandboxed and theirs_fd < 0:
            raise RuntimeError("no listener for the system-call filter")
        listener = None if theirs_fd < 0 else system.take_descriptor(root.pidfd, theirs_fd)
        ours.send(b"taken")
        ours.setblocking(False)
        return listener

    def serve(self) -> None:
        """Run until the trainer is gone (TrainerGone)."""
        while True:
            nearest = min((node.deadline for node in self.waiting), default=None)
            events = self.selector.select(None if nearest is None else max(0.0, nearest - time.monotonic()))
            for key, _ in events:
                if self.selector.get_map().get(key.fd) is key:  # an earlier event may have closed it
                    self._handle(*key.data)
            now = time.monotonic()
            for node in [node for node in self.waiting if node.deadline <= now]:
                self._handle(node, self._expire)

    def _handle(self, node: Node | None, handler: Callable[..., None]) -> None:
        """Handle an event. What goes wrong about one state is that state's loss and nobody else's."""
        try:
            handler() if node is None else handler(node)
        except TrainerGone:
            raise
        except Exception as error:
            if node is None or node.id == 0:
                raise
            print(f"state {node.id}: {handler.__name__}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            self._give_up(node)

    def _give_up(self, node: Node) -> None:
        """End a state that the supervisor cannot deal with; its call, if it has one, is answered."""
        node.verdict = "lost"
        if node.pid in self.by_pid:
            self._kill(node)  # answered when it is dead
        elif node.running:
            self.waiting.discard(node)
            self._lose(node)

    def end(self) -> None:
        """Kill every interpreter."""
        for node in list(self.by_pid.values()):
            self._kill(node)
        if not self.sandboxed:
            shutil.rmtree(self.options["folder"], ignore_errors=True)

    # The trainer asks

    def _on_host(self) -> None:
        self._flush()
        try:
            data = self.host.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            raise TrainerGone("the trainer is gone")
        self.inbox += data
        while len(self.inbox) >= 4:
            (length,) = struct.unpack_from("!I", self.inbox)
            if len(self.inbox) < 4 + length:
                break
            message = json.loads(bytes(self.inbox[4 : 4 + length]))
            del self.inbox[: 4 + length]
            if "run" in message:
                self._run(message)
            else:
                self._free(message["free"])

    def _tell(self, message: dict[str, Any]) -> None:
        """Answer the trainer, now or when it reads again: nothing here waits for anybody."""
        self.outbox += _pack(message)
        self._flush()

    def _flush(self) -> None:
        try:
            while self.outbox:
                del self.outbox[: self.host.send(self.outbox)]
        except BlockingIOError:
            pass
        except OSError:
            raise TrainerGone("the trainer is gone") from None
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self.outbox else 0)
        if self.selector.get_key(self.host).events != wanted:
            self.selector.modify(self.host, wanted, (None, self._on_host))

    def _run(self, message: dict[str, Any]) -> None:
        parent = self.nodes.get(message["from"])
        code = message["code"].encode("utf-8", "replace")
        node = Node(message["run"], code, message["timeout"], parent)
        if parent is None or parent.running or parent.pid not in self.by_pid:
            self._answer(node, "lost")
            return
        self.nodes[node.id] = node
        parent.queue.append(node)
        self._fork_next(parent)

    def _free(self, identity: int) -> None:
        node = self.nodes.pop(identity, None)
        if node is None or identity == 0:
            return
        self.memory_left += node.growth
        if node.pid in self.by_pid:
            self._kill(node)
        if not self.sandboxed:
            shutil.rmtree(self._folder(node), ignore_errors=True)

    def _answer(self, node: Node, outcome: str) -> None:
        text = ""
        if node.output >= 0:
            text = system.take_output(node.output, self.options["max_output_bytes"], TAIL).decode("utf-8", "replace")
            node.output = -1
        if node.files >= 0:
            os.close(node.files)
            node.files = -1
        self.waiting.discard(node)
        self._tell({"id": node.id, "outcome": outcome, "text": text})

    # From request to running cell

    def _fork_next(self, parent: Node) -> None:
        if parent.child is not None or not parent.queue or parent.channel is None:
            return
        node = parent.child = parent.queue.popleft()
        try:
            with contextlib.ExitStack() as given:
                fds = self._equip(node, given)
                node.deadline = time.monotonic() + node.timeout
                self.waiting.add(node)
                parent.allowed = {seccomp.SYSCALLS["clone"]}
                self._thaw(parent)
                head = json.dumps({"folder": self._folder(node)}).encode()
                socket.send_fds(parent.channel, [head + b"\n" + node.code], fds)
        except ProcessLookupError:  # the parent is dying: its death is reported by its pidfd
            return
        except BlockingIOError:  # the parent forks but does not read what it is asked
            self._expire(node)
            return
        except OSError:  # out of descriptors, memory or disk
            parent.child = None
            self._answer(node, "full")
            self._fork_next(parent)
            return
        assert node.channel is not None
        self.selector.register(node.channel, selectors.EVENT_READ, (node, self._on_report))

    def _equip(self, node: Node, given: contextlib.ExitStack) -> list[int]:
        """What a cell gets: its end of a channel, its output, its /tmp. Raises OSError."""
        node.channel, theirs = _channel()
        node.channel.setblocking(False)
        given.enter_context(theirs)
        node.output = system.new_output()
        if not self.sandboxed:
            os.mkdir(self._folder(node), 0o700)
            node.channel.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            return [theirs.fileno(), node.output]
        node.allowed = {seccomp.SYSCALLS["unshare"], seccomp.SYSCALLS["move_mount"]}
        node.files = system.new_tmpfs(TMPFS_SIZE)
        return [theirs.fileno(), node.output, node.files]

    def _adopt(self, pid: int) -> Node | None:
        """The node of a process; a new one is known by its parent, which the kernel names."""
        if pid in self.by_pid:
            return self.by_pid[pid]
        parent = self.by_pid.get(system.parent_of(pid))
        if parent is None or parent.child is None:
            return None
        node = parent.child
        try:
            self._born(node, pid)
        except ProcessLookupError:
            return None
        self._release(node)
        return node

    def _release(self, node: Node) -> None:
        """Its parent has done its part: it is frozen again, or asked for the next child."""
        parent = node.parent
        assert parent is not None
        assert parent.channel is not None
        parent.child = None
        parent.unmet = False
        parent.allowed = set()
        self._freeze(parent)
        if system.unread(parent.channel):  # it forks without reading: requests, and their descriptors, would pile up
            self._give_up(parent)
        self._fork_next(parent)

    def _born(self, node: Node, pid: int) -> None:
        node.pid, node.pidfd = pid, os.pidfd_open(pid)
        self.by_pid[pid] = node
        self.selector.register(node.pidfd, selectors.EVENT_READ, (node, self._on_death))

    def _on_notification(self) -> None:
        assert self.listener is not None
        asked = seccomp.receive(self.listener)
        if asked is None:
            return
        verdict = seccomp.Verdict.REFUSED
        node = self._adopt(asked.pid)
        if node is not None and asked.syscall in node.allowed:
            node.allowed.discard(asked.syscall)
            node.unmet = asked.syscall == seccomp.SYSCALLS["clone"]
            if asked.syscall != seccomp.SYSCALLS["move_mount"]:
                verdict = seccomp.Verdict.GO_ON
            elif self._give_files(node):
                verdict = seccomp.Verdict.DONE
        seccomp.decide(self.listener, asked, verdict)

    def _give_files(self, node: Node) -> bool:
        """Mount a new state's own /tmp in place of its parent's. Only in a mount namespace that is its own."""
        assert node.parent is not None
        try:
            with (
                open(f"/proc/{node.pid}/ns/mnt", "rb") as mounts,
                open(f"/proc/{node.parent.pid}/ns/mnt", "rb") as others,
            ):
                if os.path.sameopenfile(mounts.fileno(), others.fileno()):
                    return False
                with system.inside_mounts(mounts.fileno(), self.mounts):
                    if node.parent.id:
                        system.detach_mount(interpreter.PRIVATE)
                    system.attach_mount(node.files, interpreter.PRIVATE)
        except OSError:
            return False
        return True

    def _on_report(self, node: Node) -> None:
        """The cell says that it is done; its channel closes when it cannot even be forked."""
        assert node.channel is not None
        # Descriptors that a forged report may bring find no room: that of the credentials is taken.
        room = 0 if self.sandboxed else socket.CMSG_SPACE(12)
        try:
            message, control, _, _ = node.channel.recvmsg(16, room)
        except BlockingIOError:
            return
        except OSError:
            message, control = b"", []
        if message == interpreter.HELLO and not self.sandboxed:
            # Without namespaces nobody here may forge the sender that the kernel attaches.
            pid = next(struct.unpack("3i", data)[0] for _, kind, data in control if kind == socket.SCM_CREDENTIALS)
            if self._adopt(pid) is None:  # it is dead already
                self.selector.unregister(node.channel)
                self._release(node)
                self._answer(node, "died")
            return
        self.selector.unregister(node.channel)
        if node.pid == 0:
            self._lose(node)
        elif node.pid in self.by_pid and message:
            self._finish(node, message)
        # otherwise it is dying: its death is reported by its pidfd

    def _finish(self, node: Node, report: bytes) -> None:
        self._freeze(node)
        node.memory = system.private_memory(node.pid)
        assert node.parent is not None
        node.growth = max(0, node.memory - node.parent.memory)
        if self.sandboxed:
            used = os.fstatvfs(node.files)
            node.growth += (used.f_blocks - used.f_bfree) * used.f_frsize
        node.parent, node.code = None, b""
        self.waiting.discard(node)
        if node.growth > self.memory_left:
            node.growth = 0
            node.verdict = "limit"
            self._kill(node)  # answered when it is dead
            return
        self.memory_left -= node.growth
        node.running = False
        outcomes = {interpreter.DONE: "ok", interpreter.FAILED: "error", interpreter.OUT_OF_MEMORY: "limit"}
        self._answer(node, outcomes.get(report, "error"))

    # Ends

    def _expire(self, node: Node) -> None:
        self.waiting.discard(node)
        node.verdict = "timeout"
        if node.pid:
            self._kill(node)
        else:  # its parent does not fork
            self._lose(node)

    def _lose(self, node: Node) -> None:
        """A child that its parent did not fork; the parent can no longer be used."""
        parent = node.parent
        if node.channel is not None and node.channel in self.selector.get_map():
            self.selector.unregister(node.channel)
        node.channel = None
        self._answer(node, "lost")
        if parent is None or parent.child is not node:
            return
        parent.child = None
        if parent.pid in self.by_pid:
            self._kill(parent)

    def _on_death(self, node: Node) -> None:
        self.selector.unregister(node.pidfd)
        os.close(node.pidfd)
        del self.by_pid[node.pid]
        if node.channel is not None:
            if node.channel in self.selector.get_map():
                self.selector.unregister(node.channel)
            node.channel.close()
            node.channel = None
        if node.running:
            node.running = False
            self._answer(node, node.verdict)
        for child in [*([node.child] if node.child else []), *node.queue]:
            self._lose(child)
        node.child = None
        node.queue.clear()
        if node.unmet and self.sandboxed:
            self._sweep()
        if node.id == 0:
            raise TrainerGone("state 0 is gone")

    def _sweep(self) -> None:
        """Kill the child of a dead state whose code saw to it that it never made itself known."""
        for pid in system.descendants(os.getpid()) - self.by_pid.keys():
            parent = self.by_pid.get(system.parent_of(pid))
            if parent is None or parent.child is None:  # nobody's newborn
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _kill(self, node: Node) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(node.pidfd, signal.SIGKILL)
            if not self.sandboxed:
                with contextlib.suppress(OSError):
                    os.killpg(node.pid, signal.SIGKILL)

    def _freeze(self, node: Node) -> None:
        if node.id:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(node.pidfd, signal.SIGSTOP)

    def _thaw(self, node: Node) -> None:
        if node.id:
            signal.pidfd_send_signal(node.pidfd, signal.SIGCONT)

    def _folder(self, node: Node) -> str:
        return os.path.join(self.options["folder"], str(node.id))


def _channel() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # keeps messages whole


def _pack(message: dict[str, Any]) -> bytes:
    data = json.dumps(message).encode()
    return struct.pack("!I", len(data)) + data
