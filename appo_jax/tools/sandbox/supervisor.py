"""The trusted part of the sandbox: an event loop between the trainer and the interpreter processes.

It runs no policy code. It decides which process may fork and when (through the system-call filter's listener), gives every
call its output file, its private /tmp and its deadline, stops the processes of finished calls, and kills processes. In the
sandbox it is process 1: when it ends, for any reason, the kernel ends all other processes in the sandbox. It ends when its
socket to the trainer closes.

An interpreter is a `Node` (node.py). Only this file changes its phase. Three rules hold everywhere: the loop waits for no peer;
an error about one state affects only that state (`_guard`); every request is answered exactly once.

Messages (messages.py). In: {"run": id, "from": id, "code", "timeout"} and {"free": id}. Out: {"ready": true} or
{"error"}, then {"id", "outcome", "text"}. Outcomes: ok, error, limit, timeout, died, refused (the state after the call cannot
be kept), files (it has too many files), lost (the state before the call cannot be used), stuck (that state cannot fork at the
moment), full (the machine cannot hold another state).
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import selectors
import shutil
import signal
import socket
import stat
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

from . import enter, interpreter, seccomp, system
from .budget import Budget
from .messages import Trainer, TrainerGone
from .node import Node, Phase

MAX_FILES_BYTES, MAX_FILES_NUMBER = interpreter.MAX_FILE_BYTES, 4096  # of a state
TAIL = 4096  # bytes that are kept of the end of an overlong output, where the traceback is
MEMORY_SHARE = 0.5  # the share of the memory available at start that all snapshots together may use
WEIGH_EVERY = 0.1  # seconds between checks of the memory of running calls
PATIENCE = 1.0  # seconds that a request may wait in a queue, and again for its fork, in addition to its time limit
ROOT_PATIENCE = 10.0  # seconds that a fork of state 0, which runs no policy code, may take on a stalled machine
START_TIMEOUT = 60.0  # seconds for state 0 to import its modules
MAX_TRIES = 3  # of a fork of state 0 whose process dies before it runs any code
MAX_RESTARTS = 10  # of state 0 in a row, without a call in between
MAX_REPORTS = 200  # lines about errors that are written to stderr, which the trainer reads

CLONE, UNSHARE, MOVE_MOUNT = (seccomp.SYSCALLS[name] for name in ("clone", "unshare", "move_mount"))


def main(control: int, options: dict[str, Any]) -> None:
    """Set up the sandbox, start state 0, serve the trainer until its socket closes."""
    trainer = Trainer(socket.socket(fileno=control))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps ended children
    if options["isolation"] == "bubblewrap":
        # The parent is bwrap's outer process, which in turn dies with the thread that started it (--die-with-parent).
        system.prctl(system.PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        system.prctl(system.PR_SET_CHILD_SUBREAPER, 1)  # orphaned processes of a state become children of this process
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # if memory runs out, the kernel kills this process before the trainer
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))  # every state needs two descriptors here
    try:
        supervisor = Supervisor(trainer, options)
    except Exception as error:
        trainer.tell({"error": f"{type(error).__name__}: {error}"})
        return
    try:
        with contextlib.suppress(TrainerGone):
            supervisor.serve()
    finally:
        supervisor.end()


class Supervisor:
    """Supervises state 0 and all states forked from it."""

    def __init__(self, trainer: Trainer, options: dict[str, Any]):
        self.trainer = trainer
        self.options = options
        self.sandboxed = options["isolation"] == "bubblewrap"
        self.nodes: dict[int, Node] = {}  # by id: all that were requested and not freed
        self.by_pid: dict[int, Node] = {}  # those that are alive
        self.waiting: set[Node] = set()  # those that have a deadline
        self.budget = Budget(options["memory_total"] or int(MEMORY_SHARE * system.available_memory()))
        self.devices: set[int] = set()  # of the file systems that all states see, which excludes a state's /tmp
        self.ready = False  # whether state 0 has been ready before
        self.filtered = False
        self.restarts = 0
        self.reports = 0
        self.weigh_at = 0.0
        if self.sandboxed:
            if os.getuid() == 0:
                enter.become_unprivileged()
            system.own_user_namespace()
            self.mounts = os.open("/proc/self/ns/mnt", os.O_RDONLY)  # its own mount namespace
            os.close(
                system.new_tmpfs(MAX_FILES_BYTES, MAX_FILES_NUMBER)
            )  # so that a kernel that cannot do it fails at start
        else:
            os.mkdir(os.path.join(options["folder"], "0"), 0o700)
        self.selector = selectors.DefaultSelector()  # the data of a key: (its node or None, its handler)
        self.selector.register(trainer.line, selectors.EVENT_READ, (None, self._on_trainer))
        self._start_root([])

    def serve(self) -> None:
        """Handle events until the trainer is gone. Raises TrainerGone."""
        while True:
            nearest = min((node.deadline for node in self.waiting), default=None)
            if any(node.phase is Phase.RUNNING and node.id for node in self.waiting):
                nearest = min(nearest or self.weigh_at, self.weigh_at)
            events = self.selector.select(None if nearest is None else max(0.0, nearest - time.monotonic()))
            for key, _ in events:
                if self.selector.get_map().get(key.fd) is key:  # an earlier event may have closed it
                    self._guard(*key.data)
            now = time.monotonic()
            for node in [node for node in self.waiting if node.deadline <= now]:
                self._guard(node, self._expire)
            if now >= self.weigh_at:
                self.weigh_at = now + WEIGH_EVERY
                self._guard(None, self._weigh_running)

    def end(self) -> None:
        """Kill every interpreter and, with process isolation, all other descendants of this process."""
        for node in list(self.by_pid.values()):
            self._kill(node)
        if not self.sandboxed:
            for pid in system.descendants(os.getpid()):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            shutil.rmtree(self.options["folder"], ignore_errors=True)

    # Faults

    def _guard(self, node: Node | None, handler: Callable[..., None]) -> None:
        """Handle an event. An error about a state is reported, and only that state is given up."""
        try:
            handler() if node is None else handler(node)
        except TrainerGone:
            raise
        except Exception as error:
            self._report(f"state {node.id if node else '-'}: {handler.__name__}: {type(error).__name__}: {error}")
            if node is not None:
                self._give_up(node)

    def _report(self, text: str) -> None:
        self.reports += 1
        if self.reports <= MAX_REPORTS:
            print(text, file=sys.stderr, flush=True)

    def _give_up(self, node: Node) -> None:
        """End a state after an error. Its call, if it has one, is answered."""
        node.verdict = "lost"
        if node.alive:
            self._kill(node)  # answered when it is dead
        elif node.phase is not Phase.DEAD:
            self._end(node, "lost")

    # State 0

    def _start_root(self, queue: list[Node]) -> None:
        """Start state 0. `queue`: the requests that wait for it.

        It is a new program: a fork of this process would hand the texts of calls that are in its memory to every rollout.
        """
        ours, theirs = _channel()
        pid = os.fork()
        if pid == 0:
            try:
                os.dup2(theirs.fileno(), interpreter.CHANNEL)
                os.closerange(3, interpreter.CHANNEL)
                os.closerange(interpreter.CHANNEL + 1, os.sysconf("SC_OPEN_MAX"))
                if self.sandboxed:
                    system.pass_on_sys_admin()
                os.execv(sys.executable, state_0(self.options))
            finally:
                os._exit(1)
        theirs.close()
        ours.setblocking(False)
        root = Node(0, channel=ours)
        root.queue.extend(queue)
        root.become(Phase.FORKING)
        self.nodes[0] = root
        self._born(root, pid)
        root.deadline = time.monotonic() + START_TIMEOUT
        self.waiting.add(root)
        self.selector.register(ours, selectors.EVENT_READ, (root, self._on_root))

    def _on_root(self, root: Node) -> None:
        """Handle a message of state 0 at its start: map its user; or take the filter's listener and begin to fork from it."""
        assert root.channel is not None
        message = root.channel.recv(4096)
        if message == interpreter.UNMAPPED:
            system.map_user(root.pid, os.getuid(), os.getgid())
            root.channel.send(b"mapped")
            return
        if not message.startswith(interpreter.READY):
            if not self.ready:
                self._refuse_service(message.decode("utf-8", "replace") or "the interpreter died at start")
            self.selector.unregister(root.channel)
            self._kill(root)
            return
        fd = int(message[len(interpreter.READY) :])
        if fd < 0 and self.sandboxed:
            self._refuse_service("no listener for the system-call filter")
        if fd >= 0:
            self.filtered = True
            listener = system.take_descriptor(root.pidfd, fd)
            self.selector.register(listener, selectors.EVENT_READ, (None, lambda: self._on_notification(listener)))
        root.channel.send(b"taken")
        self.selector.unregister(root.channel)
        self.waiting.discard(root)
        root.become(Phase.FROZEN)
        self.budget.start(system.private_memory(root.pid))
        if self.sandboxed:
            root.namespace = os.stat(f"/proc/{root.pid}/ns/mnt").st_ino
            output = system.new_output()  # states may also hold their output file open
            self.devices = system.mounted_devices(root.pid) | {os.fstat(output).st_dev}
            os.close(output)
        if not self.ready:
            self.ready = True
            self._tell({"ready": True, "filtered": self.filtered, "memory": self.budget.total})
        self._fork_next(root)

    def _refuse_service(self, why: str) -> None:
        self._tell({"error": why})
        raise TrainerGone(why)

    def _replace_root(self, root: Node) -> None:
        """Start a new state 0. States forked from the old one live on; requests that waited for it keep waiting."""
        if not self.ready:
            self._refuse_service("the interpreter died at start")
        self.restarts += 1
        if self.restarts > MAX_RESTARTS:
            raise TrainerGone("state 0 does not stay alive")
        self._report("state 0 has died and is started again")
        queue = list(root.queue)
        if root.child is not None and root.child.phase is Phase.FORKING:
            queue.insert(0, self._ask_again(root.child))
        root.child = None
        root.queue.clear()
        self._start_root(queue)
        for node in queue:
            node.parent = self.nodes[0]

    def _ask_again(self, node: Node) -> Node:
        """A new node for a request whose process died before it ran any code."""
        again = Node(node.id, node.parent, node.code, node.timeout, tries=node.tries + 1)
        again.deadline = time.monotonic() + node.timeout + PATIENCE
        self._let_go(node)
        for fd in (node.output, node.files):
            if fd >= 0:
                os.close(fd)
        node.output = node.files = -1
        if not self.sandboxed:
            shutil.rmtree(self._folder(node), ignore_errors=True)
        self.waiting.discard(node)
        node.become(Phase.DEAD)
        self.nodes[node.id] = again
        self.waiting.add(again)
        return again

    # Requests of the trainer

    def _on_trainer(self) -> None:
        self.trainer.flush()
        for message in self.trainer.read():
            if "run" in message:
                self._run(message)
            elif isinstance(message.get("free"), int):
                self._free(message["free"])
        self._watch_trainer()

    def _tell(self, message: dict[str, Any]) -> None:
        self.trainer.tell(message)
        self._watch_trainer()

    def _watch_trainer(self) -> None:
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self.trainer.waits else 0)
        if self.selector.get_key(self.trainer.line).events != wanted:
            self.selector.modify(self.trainer.line, wanted, (None, self._on_trainer))

    def _run(self, message: dict[str, Any]) -> None:
        try:
            identity, start, timeout = int(message["run"]), int(message["from"]), min(float(message["timeout"]), 1e6)
            code = str(message["code"]).encode("utf-8", "replace")
        except (KeyError, TypeError, ValueError):
            self._report("a request is malformed")
            return
        if identity <= 0 or identity in self.nodes:
            self._report(f"a request for state {identity}, which exists")
            return
        parent = self.nodes.get(start)
        node = self.nodes[identity] = Node(identity, parent, code, timeout)
        if parent is None or (parent.phase is not Phase.FROZEN and parent.id):
            self._end(node, "lost")
            return
        node.deadline = time.monotonic() + timeout + PATIENCE
        self.waiting.add(node)
        parent.queue.append(node)
        self._fork_next(parent)

    def _free(self, identity: int) -> None:
        node = self.nodes.pop(identity, None) if identity else None
        if node is None:
            return
        if node.alive:
            self._kill(node)
        elif node.phase is not Phase.DEAD:
            self._end(node, "lost")
        if not self.sandboxed:
            shutil.rmtree(self._folder(node), ignore_errors=True)

    def _answer(self, node: Node, outcome: str) -> None:
        text = ""
        if node.output >= 0:
            text = system.take_output(node.output, self.options["max_output_bytes"], TAIL).decode("utf-8", "replace")
            node.output = -1
        for fd in (node.files, node.mounts):
            if fd >= 0:
                os.close(fd)
        node.files = node.mounts = -1
        self.waiting.discard(node)
        node.code = b""
        self._tell({"id": node.id, "outcome": outcome, "text": text})

    # From request to running call

    def _fork_next(self, parent: Node) -> None:
        while parent.phase is Phase.FROZEN and not parent.killed and parent.child is None and parent.queue:
            node = parent.queue.popleft()
            if node.phase is Phase.ASKED:
                self._fork(parent, node)

    def _fork(self, parent: Node, node: Node) -> None:
        """Ask a state to fork. It gets no other request until the child is known or has failed."""
        assert parent.channel is not None
        node.become(Phase.FORKING)
        # Policy code can delay forks of its own states; the trainer waits for every call only a little longer than its limit.
        node.deadline = min(time.monotonic() + node.timeout, node.deadline + PATIENCE)
        with contextlib.ExitStack() as given:
            try:
                fds = self._equip(node, given)
                socket.send_fds(parent.channel, [json.dumps({"descriptors": len(fds)}).encode()], fds)
            except (BlockingIOError, ConnectionError):  # the parent does not read, or is dying
                if parent.id == 0 and node.tries < MAX_TRIES:
                    parent.queue.appendleft(self._ask_again(node))
                else:
                    self._end(node, "lost")
                self._kill(parent)
                return
            except OSError as error:  # descriptors, memory or disk space are exhausted
                self._report(f"another state cannot be made: {error}")
                self._end(node, "full")
                return
        assert node.channel is not None
        self.selector.register(node.channel, selectors.EVENT_READ, (node, self._on_report))
        parent.child = node
        parent.allowed = {CLONE}
        self._thaw(parent)

    def _equip(self, node: Node, given: contextlib.ExitStack) -> list[int]:
        """Make the descriptors that a call gets: its end of a channel, where its code waits, its output, its /tmp. Raises
        OSError."""
        node.channel, theirs = _channel()
        given.enter_context(theirs)
        node.channel.setblocking(False)
        node.channel.send(json.dumps({"folder": self._folder(node)}).encode() + b"\n" + node.code)
        node.output = system.new_output()
        if not self.sandboxed:
            os.mkdir(self._folder(node), 0o700)
            node.channel.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            return [theirs.fileno(), node.output]
        node.allowed = {UNSHARE, MOVE_MOUNT}
        node.files = system.new_tmpfs(MAX_FILES_BYTES, MAX_FILES_NUMBER)
        return [theirs.fileno(), node.output, node.files]

    def _adopt(self, pid: int) -> Node | None:
        """The node of a process. For a new process, it is the node that its parent (known from the kernel) was asked to fork.
        A process without a request, or whose call has already ended, is killed."""
        if pid in self.by_pid:
            return self.by_pid[pid]
        parent = self.by_pid.get(system.parent_of(pid))
        node = parent.child if parent is not None else None
        if node is None or node.phase is not Phase.FORKING:
            if pid in system.descendants(os.getpid()):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            node = None
        else:
            try:
                self._born(node, pid)
            except ProcessLookupError:
                self._end(node, "died")
                node = None
        if parent is not None and parent.child is not None:
            self._release(parent)
        return node

    def _born(self, node: Node, pid: int) -> None:
        node.pidfd = os.pidfd_open(pid)
        node.pid = pid
        node.become(Phase.RUNNING)
        self.by_pid[pid] = node
        self.selector.register(node.pidfd, selectors.EVENT_READ, (node, self._on_death))

    def _release(self, parent: Node) -> None:
        """After a fork: freeze the parent again, and ask it for the next child."""
        assert parent.channel is not None
        parent.child = None
        parent.unmet = False
        parent.allowed = set()
        self._freeze(parent)
        if parent.id == 0:
            self.restarts = 0
        elif system.unread(parent.channel):  # it forks without reading, so requests and their descriptors would pile up
            self._kill(parent)
        self.waiting.discard(parent)
        self._fork_next(parent)

    def _on_notification(self, listener: int) -> None:
        asked = seccomp.receive(listener)
        if asked is None:
            return
        verdict, node = seccomp.Verdict.REFUSED, None
        try:
            node = self._adopt(asked.pid)
            if node is not None and asked.syscall in node.allowed:
                node.allowed.discard(asked.syscall)
                node.unmet = asked.syscall == CLONE
                if asked.syscall != MOVE_MOUNT:
                    verdict = seccomp.Verdict.GO_ON
                elif self._give_files(node):
                    verdict = seccomp.Verdict.DONE
        except TrainerGone:
            raise
        except Exception as error:
            self._report(f"process {asked.pid}: {type(error).__name__}: {error}")
            if node is not None:
                self._give_up(node)
        seccomp.decide(listener, asked, verdict)

    def _give_files(self, node: Node) -> bool:
        """Mount a new state's /tmp in place of its parent's. Returns False if it has no mount namespace of its own."""
        parent = node.parent
        if parent is None or not parent.alive:
            return False
        try:
            node.mounts = os.open(f"/proc/{node.pid}/ns/mnt", os.O_RDONLY)
            node.namespace = os.fstat(node.mounts).st_ino
            if node.namespace == parent.namespace:
                return False
            with system.inside_mounts(node.mounts, self.mounts):
                if parent.has_files:  # an empty one may stay below the new mount; unmounting takes time
                    system.detach_mount(interpreter.PRIVATE)
                system.attach_mount(node.files, interpreter.PRIVATE)
        except OSError:
            return False
        return True

    # Reports

    def _on_report(self, node: Node) -> None:
        """Handle a report: the end of a call or, before it runs, the failure of its fork."""
        assert node.channel is not None
        # The space for ancillary data holds only the credentials, so descriptors in a forged report are not received.
        control_size = 0 if self.sandboxed else socket.CMSG_SPACE(12)
        try:
            message, control, _, _ = node.channel.recvmsg(16, control_size)
        except BlockingIOError:
            return
        except OSError:
            message, control = b"", []
        if message == interpreter.HELLO and not self.sandboxed and node.phase is Phase.FORKING:
            # Without namespaces, no process here can forge the sender's credentials, which the kernel attaches.
            pid = next((struct.unpack("3i", data)[0] for _, kind, data in control if kind == socket.SCM_CREDENTIALS), 0)
            node.greeted = True
            self._adopt(pid)
            return
        self.selector.unregister(node.channel)
        if node.phase is Phase.FORKING:
            self._not_forked(node, message)
        elif node.phase is Phase.RUNNING and message:
            self._finish(node, message)
        # in other cases it is dying, or will reach its deadline

    def _not_forked(self, node: Node, message: bytes) -> None:
        parent = node.parent
        assert parent is not None
        if message == interpreter.NO_FORK:
            self._end(node, "stuck" if parent.id else "full")
        elif node.greeted:  # its process reported, but died before the supervisor could open it
            self._end(node, "died")
        elif parent.id == 0 and node.tries < MAX_TRIES and node.id in self.nodes:  # the new process or state 0 died
            parent.queue.appendleft(self._ask_again(node))
        else:
            self._end(node, "lost" if parent.id else "died")
        if parent.child is node and parent.alive:
            if parent.unmet:
                self._sweep(parent)
            self._release(parent)

    def _finish(self, node: Node, report: bytes) -> None:
        """Freeze the process of a call that has ended. If its state can be kept, it becomes a snapshot; else it is killed."""
        self._freeze(node)
        self.waiting.discard(node)
        node.verdict = self._unfit(node, report)
        if node.verdict:
            self._kill(node)  # answered when it is dead
            return
        node.become(Phase.FROZEN)
        node.parent = None
        outcomes = {interpreter.DONE: "ok", interpreter.FAILED: "error", interpreter.OUT_OF_MEMORY: "limit"}
        self._answer(node, outcomes.get(report, "error"))

    def _unfit(self, node: Node, report: bytes) -> str:
        """The outcome that says why a state cannot be kept; "" if it can."""
        if report == interpreter.REFUSED:
            return "refused"
        parent = node.parent
        assert parent is not None
        files = 0
        if self.sandboxed:
            if not self._seal(node, parent):
                return "refused"
            used = os.fstatvfs(node.files)
            files = (used.f_blocks - used.f_bfree) * used.f_frsize
            node.has_files = used.f_files - used.f_ffree > 1
        elif self._too_many_files(node):
            return "files"
        return "" if self.budget.add(node.id, parent.id, system.private_memory(node.pid), files) else "limit"

    def _seal(self, node: Node, parent: Node) -> bool:
        """Make a state's /tmp read-only, and check that the state has no file of its parent open. Returns False otherwise.

        It fails if a file is still open for writing: the interpreter reopens such files, but code may have patched it."""
        try:
            with system.inside_mounts(node.mounts, self.mounts):
                system.make_read_only(interpreter.PRIVATE)
            os.close(node.mounts)
            node.mounts = -1
            if not parent.has_files:
                return True
            device = os.fstat(node.files).st_dev
            links = [f"/proc/{node.pid}/cwd", *(f"/proc/{node.pid}/fd/{fd}" for fd in system.descriptors(node.pid))]
            for link in links:
                info = os.stat(link)
                file = stat.S_ISREG(info.st_mode) or stat.S_ISDIR(info.st_mode)
                if file and info.st_dev != device and info.st_dev not in self.devices:
                    return False
        except OSError:
            return False
        return True

    def _too_many_files(self, node: Node) -> bool:
        """Whether a state has too many files. For process isolation, where no separate file system limits a state."""
        size, number = system.folder_usage(self._folder(node))
        return size > MAX_FILES_BYTES or number > MAX_FILES_NUMBER

    def _weigh_running(self) -> None:
        """Kill the largest running call if all running calls and snapshots together exceed the memory limit."""
        for node in [node for node in self.waiting if node.phase is Phase.RUNNING and node.id and not self.sandboxed]:
            if self._too_many_files(node):
                node.verdict = "files"
                self._kill(node)
        growth = {}
        for node in self.waiting:
            if node.phase is Phase.RUNNING and node.id and node.parent is not None:
                growth[node] = self.budget.growth(node.parent.id, system.private_memory(node.pid))
        if growth and self.budget.used + sum(growth.values()) > self.budget.total:
            largest = max(growth, key=growth.__getitem__)
            largest.verdict = "limit"
            self._kill(largest)

    # Ends

    def _expire(self, node: Node) -> None:
        self.waiting.discard(node)
        if node.phase is Phase.RUNNING:
            node.verdict = "timeout"
            self._kill(node)
        elif (
            node.phase is Phase.FORKING
        ):  # its parent has not forked: the machine is stalled, or policy code prevents it
            parent = node.parent
            self._end(node, "timeout")
            if parent is not None and parent.child is node:
                parent.deadline = time.monotonic() + (PATIENCE if parent.id else ROOT_PATIENCE)
                self.waiting.add(parent)
        elif node.phase is Phase.ASKED:
            self._end(node, "stuck" if node.parent and node.parent.id else "full")
        elif node.phase is Phase.FROZEN and node.child is not None:
            self._kill(node)

    def _end(self, node: Node, outcome: str) -> None:
        """Answer a request that has no process, and end it."""
        self._let_go(node)
        node.become(Phase.DEAD)
        self._answer(node, outcome)

    def _let_go(self, node: Node) -> None:
        if node.channel is not None:
            if node.channel in self.selector.get_map():
                self.selector.unregister(node.channel)
            node.channel.close()
            node.channel = None

    def _on_death(self, node: Node) -> None:
        self.selector.unregister(node.pidfd)
        os.close(node.pidfd)
        del self.by_pid[node.pid]
        self._let_go(node)
        self.waiting.discard(node)
        running = node.phase is Phase.RUNNING
        node.become(Phase.DEAD)
        self.budget.remove(node.id)
        if node.id == 0:
            self._replace_root(node)
            return
        if running:
            self._answer(node, node.verdict)
        for child in [*([node.child] if node.child else []), *node.queue]:
            if child.phase is not Phase.DEAD:
                self._end(child, "lost")
        node.child = None
        node.queue.clear()
        if node.unmet and self.sandboxed:
            self._sweep(node)

    def _sweep(self, gone: Node) -> None:
        """Kill the children of a state that the supervisor does not know, because policy code hid them."""
        for pid in system.descendants(os.getpid()) - self.by_pid.keys():
            parent = self.by_pid.get(system.parent_of(pid))
            if parent is None or parent is gone or parent.child is None:  # no state was asked for this process
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _kill(self, node: Node) -> None:
        node.killed = True
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
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(node.pidfd, signal.SIGCONT)

    def _folder(self, node: Node) -> str:
        return os.path.join(self.options["folder"], str(node.id))


def state_0(options: dict[str, Any]) -> list[str]:
    """The command line of state 0."""
    programs = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    start = (
        f"import sys; sys.path[:] = {[*sys.path, programs]!r}; "
        f"from sandbox import interpreter; sys.path.pop(); interpreter.main({options!r})"
    )
    return [*sys.orig_argv[:-1], start]  # with the options of this process, which bubblewrap.py gives


def _channel() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # each send is received as one message
