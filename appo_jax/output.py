"""What is printed: standard output and error whose reader may go away (`| head`, a `tee` that Ctrl-C ended, a terminal that was
closed), and text that others have written."""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import Any


def harmless(text: str) -> str:
    """Text with control characters shown as �: text of a policy, a web page or a data set must not control the terminal."""
    return "".join(char if char.isprintable() or char in "\n\t" else "�" for char in text)


def cell(text: object) -> str:
    """Text as one cell of a Markdown table: harmless, on one line, without a bar that would end the cell."""
    return harmless(" ".join(str(text).split())).replace("|", "\\|")


def end_with_reader() -> None:
    """Make a command that only prints end without an error when the reader of its output closes the pipe."""
    sys.stdout = _reopened(sys.stdout, _Ending)


def outlive_reader() -> None:
    """Make a command go on without its output when nobody reads it any more, or its disk is full."""
    sys.stdout, sys.stderr = _reopened(sys.stdout, _Lasting), _reopened(sys.stderr, _Lasting)


class _Ending(io.FileIO):
    """SIGPIPE would also end the process when a client or worker is gone."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            os._exit(128 + signal.SIGPIPE)


class _Lasting(io.FileIO):
    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _reopened(stream: Any, kind: type[io.FileIO]) -> Any:
    if stream is None:  # this process was started without it
        return None
    return io.TextIOWrapper(
        io.BufferedWriter(kind(stream.fileno(), "w", closefd=False)), stream.encoding, stream.errors,
        line_buffering=stream.line_buffering or stream.write_through,
    )  # fmt: skip
