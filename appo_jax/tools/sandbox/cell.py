"""Runs the code of one call (a cell) in `__main__`, with bounded output. Tracebacks show only the policy's own lines."""

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
END = 2000  # characters that are kept of the end of an overlong output, and of each end of a long traceback
_FENCE = r"```(?i:python\d?|py\d?)?[ \t]*\n"  # the first line of a Markdown fence
DONE, FAILED, OUT_OF_MEMORY = b"d", b"f", b"m"  # the reports on a call


def run(code: str, filename: str, max_output: int) -> bytes:
    """Run a cell in `__main__`. Prints the value of a last expression and errors. Returns the report."""
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
        out.finish()
        return DONE
    except SystemExit as leave:
        out.finish()
        if leave.code is None or leave.code == 0:
            return DONE
        _show(leave)
        return FAILED
    except MemoryError as error:
        out.finish()
        _show(error)
        return OUT_OF_MEMORY
    except BaseException as error:
        out.finish()
        _show(error)
        return FAILED


def clean(code: str) -> str:
    """The code without indentation, and without the Markdown fences that models sometimes write around it. The code of
    consecutive fences is joined."""
    code = _without_indent(code)
    fenced = re.fullmatch(rf"{_FENCE}(.*?)\n?[ \t]*```", code, re.DOTALL)
    if fenced is None:
        return code
    code = _without_indent(fenced[1])
    parts = re.split(rf"\n[ \t]*```[ \t]*\n\s*{_FENCE}", code)
    return code if len(parts) == 1 or _is_python(code) else "\n".join(map(_without_indent, parts))


def _is_python(code: str) -> bool:
    """Whether the code can be compiled. (Then fences in it are parts of strings.)"""
    try:
        ast.parse(code)
    except Exception:  # also MemoryError and RecursionError, for deep nesting
        return False
    return True


def _without_indent(code: str) -> str:
    """The code with its first line at the left margin. The other lines move with it only if the code is an indented block.
    Otherwise the space before the first line is that between the tag and the code: the other lines are correct as they are, and
    may be lines of a string."""
    code = re.sub(r"\A\s*\n", "", code.rstrip())
    indent, *others = re.findall(r"^([ \t]*)(?=\S)", code, re.MULTILINE) or [""]
    block = indent != "" and indent in others and all(other.startswith(indent) for other in others)
    return textwrap.dedent(code) if block else code[len(indent) :]


class _Output(io.TextIOBase):
    """Standard output of a cell. It keeps the first bytes and the end. A flood of output costs little and never fails."""

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, limit: int):
        self._left = limit  # bytes that may still be written
        self._end = ""  # the end of the output beyond the limit

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        kept = b""
        if self._left > 0:
            kept = text[: self._left].encode("utf-8", "backslashreplace")[: self._left]
            self._left -= len(kept)
            os.write(1, kept)
        if self._left <= 0:
            left_out = text[len(kept.decode("utf-8", "ignore")) :]
            self._end = (self._end + left_out[-END:])[-END:]
        return len(text)

    def finish(self) -> None:
        """After the code has ended: write the end of the output beyond the limit."""
        if self._end:
            with contextlib.suppress(BaseException):
                os.write(1, f"\n[…]\n{self._end}".encode("utf-8", "backslashreplace"))
        self._end = ""

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
    """Write a short traceback of the policy's own lines. It ignores the limit of the output, which may be exhausted."""
    try:
        summary = traceback.TracebackException(type(error), error, error.__traceback__, limit=-200, compact=True)
        frames = [
            traceback.FrameSummary(frame.filename, frame.lineno, frame.name)
            for frame in summary.stack
            if frame.filename.startswith("<call ")
        ]
        if len(frames) > TRACE_FRAMES:
            frames = frames[: TRACE_FRAMES // 2] + frames[-TRACE_FRAMES // 2 :]
        head = "Traceback (most recent call last):\n"
        lines = [head, *traceback.StackSummary.from_list(frames).format()] if frames else []
        text = "".join([*lines, *summary.format_exception_only()])
    except BaseException:  # a hostile exception may raise when it is formatted
        text = f"{type(error).__name__}\n"
    with contextlib.suppress(BaseException):
        if len(text) > 2 * END:  # keep the end, whose last line is the error
            text = f"{text[:END]}\n[…]\n{text[-END:]}"
        os.write(1, text.encode("utf-8", "backslashreplace"))
