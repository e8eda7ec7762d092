"""The Python lines that run: branches taken, iterations of loops, printed text.

`sys.settrace` counts transitions between lines of the user's files; the syntax tree says what they mean. So a branch on its own
line is seen, and `a if b else c` within a line is not.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import io
import linecache
import sys
import sysconfig
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

from ..transforms.core import _jax

_LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))


@dataclass(frozen=True)
class Branch:
    """An `if` statement that ran.

    Attributes:
      line: as "model.py:41 (attention)".
      test: source of its condition.
      taken, not_taken: first source lines of its sides, "" for an absent else.
    """

    line: str
    test: str
    taken: tuple[str, ...]
    not_taken: tuple[str, ...]


@dataclass(frozen=True)
class UnrolledLoop:
    """A Python loop with `times` iterations, all its runs together."""

    line: str
    head: str
    times: int


@dataclass
class PythonRun:
    """The lines that ran: the count of each transition from a line to the next in a function, and the printed lines."""

    transitions: Counter[tuple[CodeType, int, int]] = field(default_factory=Counter)
    printed: list[str] = field(default_factory=list)

    def branches(self) -> list[Branch]:
        """The `if` statements that ran, in the order of the source."""
        branches = []
        for code, node, head in self._statements(ast.If):
            exits = sum(n for (c, a, b), n in self.transitions.items() if c is code and a in head and b not in head)
            count = self._entries(code, node, head)
            is_elif = len(node.orelse) == 1 and isinstance(node.orelse[0], ast.If)  # a statement of its own
            orelse = _source(code, node.orelse[0].lineno) if node.orelse and not is_elif else ""
            sides = [(_source(code, node.body[0].lineno), count), (orelse, exits - count)]
            taken, not_taken = (tuple(text for text, n in sides if bool(n) is is_taken) for is_taken in (True, False))
            branches.append(Branch(_line(code, node), ast.unparse(node.test), taken, not_taken))
        return branches

    def loops(self) -> list[UnrolledLoop]:
        """The `for` and `while` statements that ran, in the order of the source."""
        return [
            UnrolledLoop(_line(code, node), _source(code, node.lineno).rstrip(":"), self._entries(code, node, head))
            for code, node, head in self._statements((ast.For, ast.While))
        ]

    def _entries(self, code: CodeType, node: Any, head: range) -> int:
        """The number of transitions from the head of a statement into its body."""
        body = node.body[0].lineno
        return sum(n for (c, a, b), n in self.transitions.items() if c is code and a in head and b == body)

    def _statements(self, kind: Any) -> Iterator[tuple[CodeType, Any, range]]:
        """The statements of a kind that ran, with the lines of their heads; not those on a single line."""
        lines: dict[CodeType, set[int]] = defaultdict(set)
        for code, _, line in self.transitions:
            lines[code].add(line)
        for code in sorted(lines, key=lambda code: (code.co_filename, code.co_firstlineno)):
            for node in _parsed(code.co_filename, "".join(linecache.getlines(code.co_filename))):
                if isinstance(node, kind) and node.lineno in lines[code] and node.lineno < node.body[0].lineno:
                    yield code, node, range(node.lineno, node.body[0].lineno)


@contextlib.contextmanager
def trace_lines(f: Any) -> Iterator[PythonRun]:
    """Record the lines of this thread in the user's files and in the file of `f`. Its output is recorded, not shown."""
    run, previous_trace = PythonRun(), sys.gettrace()
    own_file = getattr(getattr(inspect.unwrap(f), "__code__", None), "co_filename", "")
    is_traced = functools.cache(lambda filename: filename == own_file or is_user_source(filename))

    def on_call(frame: FrameType, event: str, _: Any) -> Any:
        code, last_line = frame.f_code, 0

        def on_line(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal last_line
            if event == "line":
                run.transitions[code, last_line, frame.f_lineno] += 1
                last_line = frame.f_lineno
            return on_line

        return on_line if is_traced(code.co_filename) else None

    with captured_output() as output:
        sys.settrace(on_call)
        try:
            yield run
        finally:
            sys.settrace(previous_trace)
            run.printed += output.getvalue().splitlines()


def is_user_source(filename: str) -> bool:
    """Whether a file belongs to the user, not to a library."""
    return _jax.is_user_file(filename) and not filename.startswith(_LIBRARIES)


@contextlib.contextmanager
def captured_output() -> Iterator[io.StringIO]:
    """Capture what this thread prints; the output of other threads is shown."""
    buffer, thread = io.StringIO(), threading.get_ident()
    with _lock:
        if not isinstance(sys.stdout, _ThreadOutput):
            sys.stdout = _ThreadOutput(sys.stdout)
        output = sys.stdout
        output.buffers[thread].append(buffer)
    try:
        yield buffer
    finally:
        with _lock:
            output.buffers[thread].pop()
            if sys.stdout is output and not any(output.buffers.values()):
                sys.stdout = output.stdout


_lock = threading.Lock()


class _ThreadOutput(io.TextIOBase):
    """A standard output that writes to the innermost buffer of a thread, if it has one."""

    def __init__(self, stdout: Any):
        self.stdout = stdout
        self.buffers: dict[int, list[io.StringIO]] = defaultdict(list)

    def write(self, text: str) -> int:
        """Write to the buffer of this thread, or show the text."""
        buffers = self.buffers.get(threading.get_ident())
        return (buffers[-1] if buffers else self.stdout).write(text)

    def flush(self) -> None:
        """Flush the shown output."""
        self.stdout.flush()


@functools.lru_cache(maxsize=16)
def _parsed(filename: str, text: str) -> list[ast.stmt]:
    """The statements of a file, in order; none if it is not plain Python, as a notebook cell with magic."""
    with contextlib.suppress(SyntaxError):
        statements = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt))
        return sorted(statements, key=lambda node: node.lineno)
    return []


def _source(code: CodeType, line: int) -> str:
    return linecache.getline(code.co_filename, line).strip()


def _line(code: CodeType, node: ast.stmt) -> str:
    return f"{code.co_filename}:{node.lineno} ({code.co_name})"
