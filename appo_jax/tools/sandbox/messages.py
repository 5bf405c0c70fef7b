"""The supervisor's end of the line to the trainer: JSON messages with a 4-byte length, never waited for."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from typing import Any

MAX_MESSAGE = 4 << 20  # bytes; a call's code is far below it


class TrainerGone(Exception):
    """There is nobody left to serve."""


class Trainer:
    """The other end, as a non-blocking socket and what waits to be sent to it or to be read from it."""

    def __init__(self, line: socket.socket):
        line.setblocking(False)
        self.line = line
        self._inbox = bytearray()
        self._outbox = bytearray()

    @property
    def waits(self) -> bool:
        """Whether something is still to be sent."""
        return bool(self._outbox)

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message, now or when the trainer reads again. Raises TrainerGone."""
        data = json.dumps(message).encode()
        self._outbox += struct.pack("!I", len(data)) + data
        self.flush()

    def flush(self) -> None:
        """Send what can be sent without waiting. Raises TrainerGone."""
        try:
            while self._outbox:
                del self._outbox[: self.line.send(self._outbox)]
        except BlockingIOError:
            return
        except OSError:
            raise TrainerGone("the trainer is gone") from None

    def read(self) -> Iterator[dict[str, Any]]:
        """The messages that have come; none that is not a JSON object. Raises TrainerGone."""
        try:
            data = self.line.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            raise TrainerGone("the trainer is gone")
        self._inbox += data
        while len(self._inbox) >= 4:
            (length,) = struct.unpack_from("!I", self._inbox)
            if length > MAX_MESSAGE:
                raise TrainerGone("the trainer does not speak this protocol")
            if len(self._inbox) < 4 + length:
                return
            raw = bytes(self._inbox[4 : 4 + length])
            del self._inbox[: 4 + length]
            try:
                message = json.loads(raw)
            except ValueError:
                continue
            if isinstance(message, dict):
                yield message
