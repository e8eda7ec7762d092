"""What Python does while a function runs: which branches it takes, how often loops go round, what is printed.

Lines are counted by `sys.settrace` in the user's files; what they mean is read off the source. So a branch on a line of its own
is seen, and `a if b else c` within a line is not.
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
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

from ..transforms.core import _jax

_LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))


@dataclass(frozen=True)
class Branch:
    """An `if` that Python went through.

    Attributes:
      line: as "model.py:41 (attention)".
      test: its source.
      taken, not_taken: the lines of source that its parts begin with, "" for an else that is not there.
    """

    line: str
    test: str
    taken: tuple[str, ...]
    not_taken: tuple[str, ...]


@dataclass(frozen=True)
class Unrolled:
    """A loop of Python that went round `times` times, all its runs together."""

    line: str
    head: str
    times: int


@dataclass
class Noticed:
    """What was noticed: how often each function went from a line to another, and what was printed."""

    steps: Counter[tuple[CodeType, int, int]] = field(default_factory=Counter)
    printed: list[str] = field(default_factory=list)

    def branches(self) -> list[Branch]:
        """The `if` statements that were reached, in the order of the source."""
        found = []
        for code, node in self._statements(ast.If):
            head, body = range(node.lineno, node.body[0].lineno), node.body[0].lineno
            if not head:  # all on one line
                continue
            into = self._entered(code, head, body)
            beside = sum(n for (c, a, b), n in self.steps.items() if c is code and a in head and b not in head) - into
            is_elif = len(node.orelse) == 1 and isinstance(node.orelse[0], ast.If)  # it is one of its own
            other = _source(code, node.orelse[0].lineno) if node.orelse and not is_elif else ""
            parts = [(_source(code, body), into), (other, beside)]
            taken, left = ([text for text, n in parts if bool(n) is ran] for ran in (True, False))
            found.append(Branch(_line(code, node.lineno), ast.unparse(node.test), tuple(taken), tuple(left)))
        return found

    def loops(self) -> list[Unrolled]:
        """The `for` and `while` statements that were reached, in the order of the source."""
        found = []
        for code, node in self._statements((ast.For, ast.While)):
            if head := range(node.lineno, node.body[0].lineno):
                text = _source(code, node.lineno).rstrip(":")
                times = self._entered(code, head, node.body[0].lineno)
                found.append(Unrolled(_line(code, node.lineno), text, times))
        return found

    def _entered(self, code: CodeType, head: range, body: int) -> int:
        """How often a function went from the head of a statement into its body."""
        return sum(n for (c, a, b), n in self.steps.items() if c is code and a in head and b == body)

    def _statements(self, kind: Any) -> Iterator[tuple[CodeType, Any]]:
        codes = dict.fromkeys(code for code, _, _ in self.steps)
        for code in sorted(codes, key=lambda code: (code.co_filename, code.co_firstlineno)):
            reached = {line for known, _, line in self.steps if known is code}
            statements = _parsed(code.co_filename, "".join(linecache.getlines(code.co_filename)))
            for node in (node for node in statements if isinstance(node, kind) and node.lineno in reached):
                yield code, node


@contextlib.contextmanager
def noticing(f: Any) -> Iterator[Noticed]:
    """Notice what this thread does in the user's files, that of `f` among them; what it prints is kept and not shown."""
    noticed, before = Noticed(), sys.gettrace()
    own = getattr(getattr(inspect.unwrap(f), "__code__", None), "co_filename", "")
    is_user: dict[str, bool] = {own: True}

    def called(frame: FrameType, event: str, _: Any) -> Any:
        code, last = frame.f_code, 0
        if code.co_filename not in is_user:
            is_user[code.co_filename] = is_users(code.co_filename)

        def line(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal last
            if event == "line":
                noticed.steps[code, last, frame.f_lineno] += 1
                last = frame.f_lineno
            return line

        return line if is_user[code.co_filename] else None

    with silent() as printed:
        sys.settrace(called)
        try:
            yield noticed
        finally:
            sys.settrace(before)
            noticed.printed += printed.getvalue().splitlines()


def is_users(filename: str) -> bool:
    """Whether a file is the user's, and no library's."""
    return _jax.is_user_file(filename) and not filename.startswith(_LIBRARIES)


@contextlib.contextmanager
def silent() -> Iterator[io.StringIO]:
    """What this thread prints is kept; what others print is shown."""
    kept, thread = io.StringIO(), threading.get_ident()
    with _lock:
        if not isinstance(sys.stdout, _Writer):
            sys.stdout = _Writer(sys.stdout)
        writer = sys.stdout
        writer.kept.setdefault(thread, []).append(kept)
    try:
        yield kept
    finally:
        with _lock:
            writer.kept[thread].pop()
            if sys.stdout is writer and not any(writer.kept.values()):
                sys.stdout = writer.shown


_lock = threading.Lock()


class _Writer(io.TextIOBase):
    """The process's output while some thread keeps its own."""

    def __init__(self, shown: Any):
        self.shown = shown
        self.kept: dict[int, list[io.StringIO]] = {}

    def write(self, text: str) -> int:
        """Keep the text, or show it."""
        kept = self.kept.get(threading.get_ident())
        return (kept[-1] if kept else self.shown).write(text)

    def flush(self) -> None:
        """Show what was not yet."""
        self.shown.flush()


@functools.lru_cache(maxsize=16)
def _parsed(filename: str, text: str) -> list[ast.stmt]:
    """The statements of a file, none where it is no Python, as a notebook's cell with magic."""
    with contextlib.suppress(SyntaxError):
        found = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt))
        return sorted(found, key=lambda node: node.lineno)
    return []


def _source(code: CodeType, line: int) -> str:
    return linecache.getline(code.co_filename, line).strip()


def _line(code: CodeType, line: int) -> str:
    return f"{code.co_filename}:{line} ({code.co_name})"
