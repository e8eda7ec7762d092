"""What Python does while a function runs: which branches it takes, how often loops go round, what is printed.

Lines are counted by `sys.settrace` in the user's files; what they mean is read off the source. So a branch on a line of its own
is seen, and `a if b else c` within a line is not.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import linecache
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

from ..transforms import _jax

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
    """What was noticed: counts of lines by function, and what was printed."""

    lines: Counter[tuple[CodeType, int]] = field(default_factory=Counter)
    printed: list[str] = field(default_factory=list)

    def branches(self) -> list[Branch]:
        """The `if` statements that were reached, in the order of the source."""
        found = []
        for code, node in self._statements(ast.If):
            parts = [node.body, node.orelse]
            first = [part[0].lineno if part else 0 for part in parts]
            ran = [bool(self.lines[code, line]) for line in first]
            if node.body[0].lineno == node.lineno:  # all on one line
                continue
            if not node.orelse:
                ran[1] = self.lines[code, node.lineno] > self.lines[code, first[0]]
            is_else = [
                True,
                not (len(node.orelse) == 1 and isinstance(node.orelse[0], ast.If)),
            ]  # elif is one of its own
            text = [_source(code, line) if line and shown else "" for line, shown in zip(first, is_else, strict=True)]
            taken = tuple(t for t, is_taken in zip(text, ran, strict=True) if is_taken)
            other = tuple(t for t, is_taken in zip(text, ran, strict=True) if not is_taken)
            found.append(Branch(_line(code, node.lineno), ast.unparse(node.test), taken, other))
        return found

    def loops(self) -> list[Unrolled]:
        """The `for` and `while` statements that were reached, in the order of the source."""
        found = []
        for code, node in self._statements((ast.For, ast.While)):
            if node.body[0].lineno != node.lineno:
                head = _source(code, node.lineno).rstrip(":")
                found.append(Unrolled(_line(code, node.lineno), head, self.lines[code, node.body[0].lineno]))
        return found

    def _statements(self, kind: Any) -> Iterator[tuple[CodeType, Any]]:
        codes = dict.fromkeys(code for code, _ in self.lines)
        for code in sorted(codes, key=lambda code: (code.co_filename, code.co_firstlineno)):
            reached = {line for known, line in self.lines if known is code}
            for node in ast.walk(_parsed(code.co_filename)):
                if isinstance(node, kind) and node.lineno in reached:
                    yield code, node


@contextlib.contextmanager
def noticing(f: Any) -> Iterator[Noticed]:
    """Notice what this thread does in the user's files, that of `f` among them; what it prints is kept and not shown."""
    noticed, text, before = Noticed(), io.StringIO(), sys.gettrace()
    own = getattr(getattr(inspect.unwrap(f), "__code__", None), "co_filename", "")
    is_user: dict[str, bool] = {own: True}

    def called(frame: FrameType, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if name not in is_user:
            is_user[name] = _jax.is_user_file(name) and not name.startswith(_LIBRARIES)
        return line if is_user[name] else None

    def line(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            noticed.lines[frame.f_code, frame.f_lineno] += 1
        return line

    with contextlib.redirect_stdout(text):
        sys.settrace(called)
        try:
            yield noticed
        finally:
            sys.settrace(before)
            noticed.printed += text.getvalue().splitlines()


def _parsed(filename: str) -> ast.AST:
    try:
        return ast.parse("".join(linecache.getlines(filename)))
    except SyntaxError:  # as in a notebook's cell with magic
        return ast.Module([], [])


def _source(code: CodeType, line: int) -> str:
    return linecache.getline(code.co_filename, line).strip()


def _line(code: CodeType, line: int) -> str:
    return f"{code.co_filename}:{line} ({code.co_name})"
