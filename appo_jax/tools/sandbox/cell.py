"""One call's code: run in `__main__`, its output bounded, its errors shown as the policy's own lines."""

from __future__ import annotations

import ast
import builtins
import contextlib
import io
import linecache
import os
import re
import sys
import textwrap
import traceback
from typing import Any

TRACE_FRAMES = 8
DONE, FAILED, OUT_OF_MEMORY = b"d", b"f", b"m"  # what is reported of a call


def run(code: str, filename: str, max_output: int) -> bytes:
    """Run a cell in `__main__`, show the value of a last expression, show errors as the policy's own lines."""
    out: Any = _Output(max_output)
    for name in ("stdout", "stderr", "__stdout__", "__stderr__"):
        setattr(sys, name, out)
    code = clean(code)
    linecache.cache[filename] = (len(code), None, code.splitlines(keepends=True), filename)
    space = sys.modules["__main__"].__dict__
    try:
        tree = ast.parse(code, filename)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, filename, "exec", dont_inherit=True), space)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), filename, "eval", dont_inherit=True), space)
            if value is not None:
                builtins.print(repr(value))
        return DONE
    except SystemExit as leave:
        if leave.code is None or leave.code == 0:
            return DONE
        _show(leave)
        return FAILED
    except MemoryError as error:
        _show(error)
        return OUT_OF_MEMORY
    except BaseException as error:
        _show(error)
        return FAILED


def clean(code: str) -> str:
    """Code as models write it: indented as a whole, or in a Markdown fence."""
    code = textwrap.dedent(code.strip("\n").rstrip())
    fenced = re.fullmatch(r"\s*```(?:python|py)?[ \t]*\n(.*?)\n?[ \t]*```\s*", code, re.DOTALL)
    return textwrap.dedent(fenced[1]) if fenced else code


class _Output(io.TextIOBase):
    """Standard output of a cell: keeps the first bytes and swallows the rest; a flood costs nothing and never fails."""

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, limit: int):
        self._room = limit

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        if self._room > 0:
            data = text[: self._room].encode("utf-8", "backslashreplace")[: self._room]
            self._room -= len(data)
            os.write(1, data)
        return len(text)

    @property
    def buffer(self) -> io.RawIOBase:
        return _Bytes(self)


class _Bytes(io.RawIOBase):
    """`sys.stdout.buffer`."""

    def __init__(self, text: _Output):
        self._text = text

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._text.write(bytes(data).decode("utf-8", "backslashreplace"))
        return len(data)


def _show(error: BaseException) -> None:
    """Write a short traceback: the policy's own lines only. Goes past the limit of the output, which may be full."""
    try:
        summary = traceback.TracebackException(type(error), error, error.__traceback__, limit=-200, compact=True)
        own = [
            traceback.FrameSummary(frame.filename, frame.lineno, frame.name)
            for frame in summary.stack
            if frame.filename.startswith("<call ")
        ]
        if len(own) > TRACE_FRAMES:
            own = own[: TRACE_FRAMES // 2] + own[-TRACE_FRAMES // 2 :]
        lines = ["Traceback (most recent call last):\n", *traceback.StackSummary.from_list(own).format()] if own else []
        text = "".join([*lines, *summary.format_exception_only()])
    except BaseException:  # hostile exceptions
        text = f"{type(error).__name__}\n"
    with contextlib.suppress(BaseException):
        os.write(1, text[:4000].encode("utf-8", "backslashreplace"))
