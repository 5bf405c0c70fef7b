"""Messages between the supervisors of a pod's hosts, over TCP: heartbeats and the first failure.

Supervisor 0 is the hub. JAX's own heartbeats are not enough: JAX notices a lost host after 100 seconds, ends the other hosts
with a core dump, and does not say what happened on the lost host.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import selectors
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from appo_jax.failures import START_AGAIN

# A supervisor that sends nothing for this time counts as lost.
SILENCE_S = 12.0
# The time in which all supervisors must connect to the hub.
CONNECT_S = 60.0
# Any program may connect to the hub. It is dropped if its first message takes longer or is larger than this, in seconds and bytes.
HELLO_S, HELLO_BYTES = 5.0, 4096
# At the end, the hub waits this long for the others to close their connections.
GOODBYE_S = 2.0


@dataclasses.dataclass(frozen=True)
class Cause:
    """The reason why a run ends, the same on every host."""

    host: int  # where it happened
    text: str
    code: int  # the exit code
    secondary: bool = False  # another host's failure, which is not known here yet, may have caused it
    dump_stacks: bool = False  # the processes hang: they print the stacks of their threads before they are ended


class Line:
    """JSON messages over a socket, one per line. It never blocks."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection, self._begun = connection, b""
        self.opened = self.heard = time.monotonic()

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have arrived; None if the other end has closed the connection."""
        try:
            data = self.connection.recv(1 << 16)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError:
            return None
        if not data:
            return None
        self.heard = time.monotonic()
        *lines, self._begun = (self._begun + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def unfinished(self) -> int:
        """The bytes of the next message that have arrived."""
        return len(self._begun)

    def send(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # `receive` notices a broken connection
            self.connection.send(json.dumps(message).encode() + b"\n")


class Peers:
    """The connections of this host's supervisor to the other hosts' supervisors."""

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self.host, self.hosts = 0, 1
        self.beats: dict[int, dict[str, Any]] = {}  # at the hub: the last heartbeat of every other host
        self.left: set[int] = set()  # hosts that ended without failure
        self._selector = selector
        self._lines: dict[int, Line] = {}  # by host: at the hub all others, at the others the hub
        self._unknown: list[Line] = []  # at the hub: connections without a first message
        self._listener: socket.socket | None = None
        self._token, self._began = "", time.monotonic()

    def listen(self, hosts: int) -> tuple[int, str]:
        """Be the hub of `hosts` supervisors. Returns the port, and the token that the others must send."""
        self.hosts, self._token, self._began = hosts, secrets.token_hex(16), time.monotonic()
        dual = socket.has_dualstack_ipv6()
        self._listener = socket.create_server(
            ("", 0), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual
        )
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        return self._listener.getsockname()[1], self._token

    def connect(self, host: int, hosts: int, address: str, port: int, token: str) -> Cause | None:
        """Connect to the hub as host number `host`. Returns a cause if the hub cannot be reached."""
        self.host, self.hosts = host, hosts
        try:
            line = Line(socket.create_connection((address, port), timeout=CONNECT_S))
        except OSError as error:
            return Cause(0, f"the supervisor of host 0 cannot be reached at {address}:{port} ({error})", START_AGAIN)
        line.send(token=token, host=host, machine=socket.gethostname())
        self._add(0, line)
        return None

    def tell(self, **message: Any) -> None:
        """Send a message to every connected supervisor."""
        for line in self._lines.values():
            line.send(**message)

    def restart_clocks(self) -> None:
        """Count the others' silence from now on: this process itself was stopped, so it could not hear them."""
        for line in self._lines.values():
            line.heard = time.monotonic()

    def lost(self) -> Cause | None:
        """The cause for a host that has been silent for too long or has not connected in time; None if there is none."""
        now = time.monotonic()
        for line in [line for line in self._unknown if now - line.opened > HELLO_S]:
            self._forget(line, close=True)
        for host, line in self._lines.items():
            if host not in self.left and (silent := now - line.heard) > SILENCE_S:
                return self.gone(host, f"has sent nothing for {silent:.0f} s")
        if self._listener is not None and now - self._began > CONNECT_S:
            missing = sorted(set(range(1, self.hosts)) - set(self._lines) - self.left)
            if missing:
                return self.gone(missing[0], f"has not connected within {CONNECT_S:.0f} s")
        return None

    def gone(self, host: int, what: str) -> Cause:
        """The cause for a lost host. `what`: what was noticed."""
        machine = self.beats.get(host, {}).get("machine")
        name = f"host {host}{f' ({machine})' if machine else ''}"
        return Cause(host, f"{name} {what}: the host or its network is lost", START_AGAIN)

    def all_wait(self, own: Mapping[str, Any], limit_s: float) -> bool:
        """At the hub: whether all hosts have waited for each other for longer than `limit_s`. `own`: the hub's heartbeat."""
        others = [beat for host, beat in self.beats.items() if host not in self.left]
        return self.host == 0 and all(beat.get("waiting") and beat["silent_s"] > limit_s for beat in (own, *others))

    def may_leave(self) -> bool:
        """Whether all other hosts have ended without failure. The hub knows that, and tells the others by leaving."""
        return self.hosts == 1 or (len(self.left) == self.hosts - 1 if self.host == 0 else 0 in self.left)

    def goodbye(self) -> None:
        """Close the connections. The hub first tells the others that they may leave, and waits until they have closed theirs."""
        if self.host == 0:
            self.tell(left=True)
            deadline = time.monotonic() + GOODBYE_S
            while self._lines and time.monotonic() < deadline:
                for key, _ in self._selector.select(timeout=0.1):
                    key.data()
        self.close()

    def close(self) -> None:
        for line in (*self._lines.values(), *self._unknown):
            line.connection.close()
        if self._listener is not None:
            self._listener.close()

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):
            line = Line(self._listener.accept()[0])
            self._unknown.append(line)
            self._selector.register(line.connection, selectors.EVENT_READ, lambda: self._greet(line))

    def _greet(self, line: Line) -> Cause | None:
        """Read the first message of a connection: it must hold the token and a host. Others may have come with it."""
        try:
            messages = line.receive()
            if messages == [] and line.unfinished() <= HELLO_BYTES:
                return None
            hello, *more = messages or [{}]
            known = secrets.compare_digest(str(hello.get("token")), self._token) and hello["host"] not in self._lines
            beat = {"machine": hello["machine"], "phase": "start", "step": 0} if known else {}
        except (ValueError, KeyError, TypeError, AttributeError):  # any program may send anything
            known = False
        self._forget(line, close=not known)
        if not known:
            return None
        self.beats[hello["host"]] = beat
        self._add(hello["host"], line)
        return self._handle(hello["host"], more)

    def _forget(self, line: Line, close: bool) -> None:
        self._unknown.remove(line)
        self._selector.unregister(line.connection)
        if close:
            line.connection.close()

    def _add(self, host: int, line: Line) -> None:
        self._lines[host] = line
        self._selector.register(line.connection, selectors.EVENT_READ, lambda: self._hear(host))

    def _hear(self, host: int) -> Cause | None:
        line = self._lines[host]
        messages = line.receive()
        if messages is None:
            self._selector.unregister(line.connection)
            line.connection.close()
            del self._lines[host]
            return None if host in self.left else self.gone(host, "has closed its connection")
        return self._handle(host, messages)

    def _handle(self, host: int, messages: Sequence[dict[str, Any]]) -> Cause | None:
        for message in messages:
            if "failed" in message:
                return Cause(**message["failed"])
            if message.get("left"):
                self.left.add(host)
            if "beat" in message:
                self.beats[host] = self.beats.get(host, {}) | message["beat"]
        return None
