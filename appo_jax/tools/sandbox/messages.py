"""The supervisor's connection to the trainer: JSON messages with a 4-byte length. It never blocks."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from typing import Any

MAX_MESSAGE = 4 << 20  # bytes; a call's code is much shorter


class TrainerGone(Exception):
    """The trainer has closed the connection or does not speak the protocol."""


class Trainer:
    """The connection to the trainer: a non-blocking socket and buffers for messages in both directions."""

    def __init__(self, line: socket.socket):
        line.setblocking(False)
        self.line = line
        self._inbox = bytearray()
        self._outbox = bytearray()

    @property
    def waits(self) -> bool:
        """Whether data is waiting to be sent."""
        return bool(self._outbox)

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message, now or when the trainer reads again. Raises TrainerGone."""
        data = json.dumps(message).encode()
        self._outbox += struct.pack("!I", len(data)) + data
        self.flush()

    def flush(self) -> None:
        """Send as much as the socket takes without blocking. Raises TrainerGone."""
        try:
            while self._outbox:
                del self._outbox[: self.line.send(self._outbox)]
        except BlockingIOError:
            return
        except OSError:
            raise TrainerGone("the trainer is gone") from None

    def read(self) -> Iterator[dict[str, Any]]:
        """The messages that have arrived. Messages that are not JSON objects are skipped. Raises TrainerGone."""
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
