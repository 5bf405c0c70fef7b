"""The process that watches a run: `appo-jax train` forks, the child trains, and the parent watches it.

A Python process cannot watch itself: while it holds the interpreter's lock, waits in a device program or is stopped, it handles
no signal and runs no other thread. The parent passes on requests to stop, ends a run that makes no progress (with the stacks of
all its threads), ends it when another host is lost or fails, writes status.json, and prints the first cause in the last line.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from appo_jax import distributed, failures, heartbeat, interrupt
from appo_jax.config import Config
from appo_jax.errors import JoinError
from appo_jax.supervision.child import set_up_child
from appo_jax.supervision.peers import CONNECT_S, Cause, Line, Peers
from appo_jax.supervision.records import Records
from appo_jax.supervision.status import WRITE_S

# If the child's heartbeat is late by this time, the child runs no Python: something holds the interpreter's lock.
LOCKED_S = 120.0
# A process that was stopped (SIGSTOP, a debugger) for this time counts as lost.
STOPPED_S = 10.0
# If a round of the supervisor's loop takes this long, the supervisor itself was stopped.
PAUSED_S = 5.0
# SIGABRT makes a hanging run print its stacks and end; after this time it is killed.
STACKS_S = 5.0
# A killed process that waits in the kernel (for a disk that does not answer) ends only after that. It is not waited for longer.
KILLED_S = 5.0
# A failing run has this time to finish its writes.
UNWIND_S = 120.0
# If another host's failure may have caused a failure, the supervisor waits this long for news of it.
SECONDARY_S = 15.0


def supervise(config: Config, body: Callable[[], None]) -> None:
    """Fork; run `body` in the child, and return in the child when `body` returns. The parent ends with the run's exit code.

    The process must not have threads yet. An exception of `body` is reported to the parent and raised in the child.
    """
    ours, theirs = socket.socketpair()
    sys.stdout.flush()
    parent = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, interrupt.stop_signals())  # until both processes have set their handlers
    pid = os.fork()
    if pid:
        theirs.close()
        os._exit(Supervisor(config, pid, ours).run())
    ours.close()
    set_up_child(parent, theirs, config)
    try:
        body()
    except Exception as error:
        failures.report(error)
        raise


class Supervisor:
    """Runs in the parent: watches the child and talks to the other hosts' supervisors."""

    def __init__(self, config: Config, pid: int, channel: socket.socket) -> None:
        self._config, self._pid = config, pid
        self._selector = selectors.DefaultSelector()
        self._peers = Peers(self._selector)
        self._child = Line(channel)
        self._selector.register(channel, selectors.EVENT_READ, self._hear_child)
        self._beat: dict[str, Any] = {"phase": "start", "step": 0, "silent_s": 0.0, "limit_s": float("inf")}
        self._cause: Cause | None = None
        self._own_error: Cause | None = None  # the first error that the child has reported
        self._cause_at = 0.0
        self._requests, self._passed_on = interrupt.Requests(), 0
        self._records: Records | None = None  # when the child has opened the run's folder
        self._written, self._reported, self._listened = 0.0, 0.0, time.monotonic()
        self._stopped_since: float | None = None

    def run(self) -> int:
        """Watch until the child has ended. Returns its exit code, or that of the cause for which it was ended."""
        stops = interrupt.stop_signals()
        for number in stops:
            signal.signal(number, self._requests.hear)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)
        while (status := self._ended()) is None:
            self._listen()
            if self._requests.count > self._passed_on:
                self._fail(self._hear_child())  # for the latest heartbeat, which says whether the child can stop
                self._fail(self._pass_on())
            if time.monotonic() > self._requests.pressing_since + (self._config.stop_grace_seconds or float("inf")):
                self._fail(Cause(self._peers.host, self._out_of_time(), failures.INTERRUPTED))
            self._fail(self._hanging())
            self._report()
            if self._cause is not None and not self._may_be_secondary():
                status = self._end_child()
                break
        else:
            self._conclude(status)
        return self._finish(status)

    def _listen(self) -> None:
        """Handle messages of the child and of the other hosts; return after half a second without any."""
        for key, _ in self._selector.select(timeout=0.5):
            self._fail(key.data())
        now = time.monotonic()
        if now - self._listened > PAUSED_S:  # this process was stopped, as by Ctrl-Z, and the child with it
            self._child.heard, self._stopped_since = now, None
            self._peers.restart_clocks()
        self._listened = now
        self._fail(self._peers.lost())

    # ---- the child

    def _hear_child(self) -> Cause | None:
        messages = self._child.receive()
        if messages is None:  # the child has ended; waitpid gives its exit status
            if self._child.connection in self._selector.get_map():
                self._selector.unregister(self._child.connection)
            return None
        for message in messages:
            if "phase" in message:
                self._beat = message
            elif "failed" in message:
                cause = Cause(self._peers.host, message["failed"], message["code"], message["secondary"])
                self._own_error = self._own_error or cause
                return self._own_error
            elif "run_dir" in message:
                self._records = Records(Path(message["run_dir"]), self._config.steps)
            elif "hub" in message:  # the child is host 0; the message holds the number of hosts
                port, token = self._peers.listen(message["hub"])
                self._child.send(port=port, token=token)
            elif "join" in message:
                return self._peers.connect(**message["join"])
        return None

    def _hanging(self) -> Cause | None:
        """The cause if the child is stopped, runs no Python or makes no progress for too long; else None."""
        now, host = time.monotonic(), self._peers.host
        late = now - self._child.heard
        if _is_stopped(self._pid):
            self._stopped_since = self._stopped_since or now
            if now - self._stopped_since > STOPPED_S:
                what = f"{self._name()} was stopped (SIGSTOP) for {STOPPED_S:.0f} s"
                return Cause(host, what, failures.START_AGAIN)
            return None
        self._stopped_since = None
        phase, silent, limit = self._beat["phase"], self._beat["silent_s"] + late, self._beat["limit_s"]
        if late > LOCKED_S:
            what = f"{self._name()} has run no Python for {late:.0f} s in phase {phase!r}: something holds the interpreter's lock"
            return Cause(host, f"{what} (the stacks above say what)", failures.START_AGAIN, dump_stacks=True)
        waits = self._peers.hosts > 1 and self._beat.get("waiting")  # for a host that is late, and may make progress
        if silent > limit and (not waits or self._peers.all_wait(self._beat | {"silent_s": silent}, limit)):
            return Cause(
                host,
                f"{self._name()} has made no progress for {silent:.0f} s in phase {phase!r}, step {self._beat['step'] + 1}; "
                f"its limit is {limit:.0f} s: {heartbeat.PATIENCE} times the longest pause before, at least max_silent_seconds"
                f"{'; all hosts wait for each other' if waits else ''} (stacks above)",
                failures.START_AGAIN,
                dump_stacks=True,
            )
        return None

    def _name(self) -> str:
        return f"the process of host {self._peers.host}" if self._peers.hosts > 1 else "the run's process"

    def _ended(self) -> int | None:
        """The child's exit code, or minus the number of the signal that ended it; None while it lives."""
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def _end_child(self) -> int | None:
        """End the child and return its exit status; None if it cannot be ended. A hanging child prints its stacks first; a failing
        one may finish writing."""
        cause = self._cause
        assert cause is not None
        if cause.dump_stacks:
            os.kill(self._pid, signal.SIGABRT)
        patience = STACKS_S if cause.dump_stacks else 0.0
        if cause is self._own_error and not cause.secondary:
            # Alone, it prints its error and releases its resources; with several hosts it may wait for the others.
            patience = UNWIND_S if self._peers.hosts == 1 else STACKS_S
        if (status := self._ended_within(patience)) is None:
            os.kill(self._pid, signal.SIGKILL)
            status = self._ended_within(KILLED_S)
        if status is None:
            print(
                f"appo-jax: {self._name()} (pid {self._pid}) cannot be ended: the kernel holds it, as for a disk that does not "
                "answer; until it is gone, it may hold the run's lock",
                file=sys.stderr,
            )
        return status

    def _ended_within(self, seconds: float) -> int | None:
        """`_ended`, after at most this time."""
        deadline = time.monotonic() + seconds
        while (status := self._ended()) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return status

    # ---- causes

    def _fail(self, cause: Cause | None) -> None:
        """Record a cause and tell the other hosts. The first cause is kept; only a secondary one is replaced by a later one."""
        if cause is None or (self._cause is not None and (cause.secondary or not self._cause.secondary)):
            return
        self._cause, self._cause_at = cause, time.monotonic()
        if not cause.secondary:
            self._peers.tell(failed=vars(cause))

    def _may_be_secondary(self) -> bool:
        """Whether another host's failure may have caused this one, and news of it may still come."""
        assert self._cause is not None
        return self._cause.secondary and self._peers.hosts > 1 and time.monotonic() - self._cause_at < SECONDARY_S

    def _pass_on(self) -> Cause | None:
        """Pass a request to stop on to the child. A cause is returned if it has nothing to save yet, or at a second request."""
        if (requests := self._requests.count) == self._passed_on:
            return None
        first, self._passed_on = self._passed_on == 0, requests
        if first and requests == 1 and self._beat.get("stoppable"):
            os.kill(self._pid, signal.SIGTERM)
            return None
        return Cause(self._peers.host, "interrupted", failures.INTERRUPTED)

    def _conclude(self, status: int) -> None:
        """Find the cause after the child has ended by itself. For a secondary cause, wait for news of other hosts."""
        while any(key.fileobj is self._child.connection for key, _ in self._selector.select(0)):
            self._fail(self._hear_child())  # its last messages
        if status == -signal.SIGTERM and self._passed_on:  # it had stopped already, as another host was asked before
            self._fail(Cause(self._peers.host, "interrupted", failures.INTERRUPTED))
        elif status < 0:
            self._fail(Cause(self._peers.host, self._ended_by(signal.Signals(-status)), failures.START_AGAIN))
        elif self._cause is None and status not in (0, failures.INTERRUPTED):
            self._fail(Cause(self._peers.host, f"{self._name()} ended with exit code {status}", status))
        while self._cause is not None and self._may_be_secondary():
            self._listen()
            self._report()

    def _ended_by(self, number: signal.Signals) -> str:
        if number == signal.SIGABRT and self._beat["phase"] == "join":  # JAX ends the process at its time limit
            return (
                f"not all hosts have joined within {distributed.JOIN_S} s: one has not started, has ended, or cannot be reached; "
                "`launch/logs.sh all` shows which"
            )
        hint = " (sent by the kernel when memory ran out, or by a user)" if number == signal.SIGKILL else ""
        return f"{self._name()} was ended by {number.name}{hint}"

    def _out_of_time(self) -> str:
        """What is lost if the run does not end within stop_grace_seconds."""
        if unsaved := self._beat.get("unsaved"):
            return f"interrupted: within stop_grace_seconds, {unsaved} could not be saved; a restart makes it again"
        return "interrupted: the run did not end within stop_grace_seconds, but everything is saved"

    def _leave(self) -> Cause | None:
        """After this host has ended without failure: wait until all have, or one fails, so that all give the same exit code."""
        if self._peers.host != 0:
            self._peers.tell(beat=self._beat, left=True)
        while self._cause is None and not self._peers.may_leave() and self._requests.count == self._passed_on:
            self._listen()
            self._report()
        return self._cause

    # ---- reports to others

    def _report(self) -> None:
        now = time.monotonic()
        if now - self._reported >= heartbeat.BEAT_S:
            self._reported = now
            beat = self._beat | {"silent_s": self._beat["silent_s"] + now - self._child.heard}
            self._peers.tell(beat=beat | {"machine": socket.gethostname()})
        if now - self._written >= WRITE_S and self._records is not None and self._peers.host == 0:
            self._written = now
            self._records.running(self._hosts())

    def _hosts(self) -> dict[str, dict[str, Any]]:
        """The hosts' last heartbeats, for status.json."""
        hosts = {"0": self._beat | {"machine": socket.gethostname(), "pid": self._pid}}
        return hosts | {str(host): beat for host, beat in sorted(self._peers.beats.items())}

    def _write_end(self, state: str, error: str | None = None) -> None:
        if self._records is not None and self._peers.host == 0:
            self._records.ended(state, self._hosts(), error)

    def _note(self, cause: Cause) -> str:
        """Write a failure to the run's folder and return a warning (`note_failure`). Host 0 writes; host 1 if host 0 failed."""
        writer = 1 if cause.host == 0 and self._peers.hosts > 1 else 0
        crashed = cause.code == failures.START_AGAIN and self._peers.hosts > 1
        if self._records is None or self._peers.host != writer or not crashed:
            return ""
        here = cause.host == self._peers.host
        machine = socket.gethostname() if here else str(self._peers.beats.get(cause.host, {}).get("machine", "?"))
        return self._records.note(cause.host, machine, self._beat["step"], cause.text)

    def _finish(self, status: int | None) -> int:
        """Write the final status, print the first cause in the last line, and return the exit code."""
        cause = self._cause or self._leave()
        if cause is None:
            self._write_end("done" if status == 0 else "stopped")
            self._peers.goodbye()
            return status or 0
        if cause.secondary:
            self._peers.tell(failed=vars(cause))
        interrupted = cause.code == failures.INTERRUPTED
        self._write_end("stopped" if interrupted else "failed", None if interrupted else cause.text)
        warning = "" if interrupted else self._note(cause)
        if warning:
            print(f"appo-jax: {warning}", file=sys.stderr)
        if self._peers.hosts > 1 or status is None or status < 0 or interrupted:
            where = f"host {cause.host} failed first: " if self._peers.hosts > 1 and not interrupted else ""
            print(f"appo-jax: {where}{cause.text}", file=sys.stderr, flush=True)
        time.sleep(0.2 if self._peers.hosts > 1 else 0)  # the other supervisors read it before the connection closes
        self._peers.close()
        return cause.code


def _is_stopped(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    return False


def connect_supervisors() -> None:
    """Called in the child after the hosts have joined: connect their supervisors. Raises JoinError if that fails."""
    hosts, host, coordinator, store = distributed.joined()
    if not heartbeat.supervised() or hosts == 1 or store is None:
        return
    try:
        if host == 0:
            hub = heartbeat.ask(hub=hosts)
            store.key_value_set("appo_jax/supervisor", f"{hub['port']} {hub['token']}")
        else:
            port, token = store.blocking_key_value_get("appo_jax/supervisor", int(1000 * CONNECT_S)).split()
            address = coordinator.rpartition(":")[0].strip("[]")
            heartbeat.send(join={"host": host, "hosts": hosts, "address": address, "port": int(port), "token": token})
    except (RuntimeError, OSError) as error:  # JAX raises RuntimeErrors
        raise JoinError(
            f"the supervisors of the hosts cannot be connected now: {type(error).__name__}: {error}; start again"
        ) from error
