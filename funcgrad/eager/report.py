"""`Study` and `Comparison`: results as text, in notebooks, as HTML and as plain values."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from ..notebooks import html
from ..transforms.compilation.kernels.table import Compiled
from ..transforms.core.graph import Graph
from ..transforms.core.report import Report, Result, Table
from ..transforms.cost.formatting import format_bytes, format_seconds
from .advice import Refusal
from .line_tracing import PythonRun
from .tape import Tape

MOST_ROWS = 12  # of a section
LEAST_GAIN = 0.95  # compilation pays if a compiled call takes less than this part of the eager time


class Page(Result):
    """A result that can be saved as a page, and that rich prints."""

    def save(self, path: str | Path) -> Path:
        """Write the report as one HTML file, which replaces one that is there; its path."""
        page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(repr(self))}</title>{_STYLE}'
        path = Path(path)
        path.write_text(f"{page}<body>{''.join(map(html, self.pages()))}</body></html>", encoding="utf-8")
        return path

    def pages(self) -> list[Report]:
        """The reports in the file that `save` writes."""
        return [self.report()]

    def __rich__(self) -> Any:
        return _rich(self.report())


@dataclass(frozen=True)
class Constant:
    """An array that is a constant of the program: its name in the function, "" if it has none, type and bytes."""

    name: str
    type: str
    bytes: int


@dataclass(frozen=True)
class Times:
    """Seconds of an eager call, of the first call of the compiled function, and of its later calls; None if it has none."""

    eager_s: float
    first_s: float | None
    compiled_s: float | None

    @property
    def pays_after(self) -> int | None:
        """The number of calls after which compilation has paid; None for never."""
        if self.first_s is None or self.compiled_s is None or self.compiled_s >= LEAST_GAIN * self.eager_s:
            return None
        return math.ceil((self.first_s - self.compiled_s) / (self.eager_s - self.compiled_s))


@dataclass(frozen=True)
class Difference:
    """Eager and compiled values differ by more than rounding.

    Attributes:
      gap: the largest difference, relative to the largest value.
      primitive, scope, line: the first operation whose compiled value differs; "" if all operations agree: then Python took
        another path while it was traced.
    """

    gap: float
    primitive: str
    scope: str
    line: str


@dataclass(frozen=True, repr=False, kw_only=True)
class Study(Page):
    """Eager execution, tracing and compilation of a function. Its text is the report.

    Attributes:
      name: of the function.
      noticed: Python's `branches()`, `loops()` and `printed` lines in the traced run (in the eager run, if it cannot be traced).
      eager_operations: number of operations of the eager run; those of jitted functions count one by one.
      traced_equations: number of equations, bodies of loops and branches once; None if it cannot be traced.
      constants: arrays that are constants of the program.
      fixed: the types and static arguments of this trace, in words.
      retraces: the traces for these arguments and for the others, with their causes.
      kernels: the compiled program.
      eager_peak_bytes: peak of live bytes of results in an eager run that frees each after its last use.
      times: of a call: eager, first, compiled.
      difference: where eager and compiled values first differ; None if they are equal up to rounding.
      refusal: why it cannot be traced; None if it can.
      tape, graph: the eager run and the traced program.
    """

    name: str
    noticed: PythonRun
    eager_operations: int
    traced_equations: int | None = None
    constants: tuple[Constant, ...] = ()
    fixed: tuple[str, ...] = ()
    retraces: tuple[str, ...] = ()
    kernels: Compiled | None = None
    eager_peak_bytes: int
    times: Times
    difference: Difference | None = None
    refusal: Refusal | None = None
    tape: Tape = field(compare=False)
    graph: Graph | None = field(compare=False, default=None)

    def report(self) -> Report:
        """The totals, and a table for each subject."""
        t, k = self.times, self.kernels
        count = lambda n: "-" if n is None else f"{n:,}"
        seconds = lambda s: "-" if s is None else format_seconds(s)
        kernels = f"{len(k.kernels)} kernel{'s' * (len(k.kernels) != 1)}" if k else "-"
        results = format_bytes(k.memory.temp_bytes + k.memory.output_bytes) if k else "-"
        totals = [
            ("operations", count(self.eager_operations), count(self.traced_equations), kernels),
            ("time of a call", seconds(t.eager_s), f"{seconds(t.first_s)} (first)", seconds(t.compiled_s)),
            ("memory of results", format_bytes(self.eager_peak_bytes), "-", results),
        ]
        tables = [Table(totals, ("", "eager", "traced", "compiled"), title=self.name)]
        if self.refusal:
            tables.append(Table([(line,) for line in str(self.refusal).splitlines()], title="cannot be traced"))
        else:
            calls = (
                f"after {t.pays_after:,} call{'s' * (t.pays_after != 1)}"
                if t.pays_after is not None
                else "never: a compiled call is no faster"
            )
            tables.append(Table([(calls,)], title="compiling pays"))
            tables.append(Table([(self._values(),)], title="values"))
        constants = [(c.name or "(without a name)", c.type, format_bytes(c.bytes)) for c in self.constants]
        tables += [
            Table(self._python(), title=f"Python, while it {'was traced' if self.graph is not None else 'ran'}"),
            Table(constants, title="burned in"),
            Table([(text,) for text in self.fixed], title="made for", limit=MOST_ROWS),
            Table([(text,) for text in self.retraces], title="traced"),
        ]
        if k:
            blocks = k.report(lines=MOST_ROWS).blocks
            tables.append(Table([(block,) for block in blocks if isinstance(block, str)], title="kernels"))
            tables += [block for block in blocks if isinstance(block, Table)]
        return Report(tuple(table for table in tables if table.rows))

    def _values(self) -> str:
        if self.difference is None:
            return "equal, but for rounding"
        d, gap = self.difference, f"differ by {self.difference.gap:.1g} of the largest"
        if not d.line:
            return f"{gap}: the operations agree, so Python did something else while it was traced"
        return f"{gap}, first at '{d.primitive}' {d.scope} {d.line}"

    def _python(self) -> list[tuple[str, str]]:
        rows = [(f"printed {text!r}", "once, and not in later calls") for text in self.noticed.printed]
        for loop in self.noticed.loops():
            text = f"{loop.head}: went round {loop.times} times, each a part of the program"
            rows.append((os.path.basename(loop.line), text))
        for branch in self.noticed.branches():
            taken, not_taken = " and ".join(filter(None, branch.taken)), ", ".join(filter(None, branch.not_taken))
            absent = f"; not in the program: {not_taken}" if not_taken else ""
            rows.append((os.path.basename(branch.line), f"if {branch.test}: {taken or 'not taken'}{absent}"))
        return rows

    def dict(self) -> dict[str, Any]:
        """All of it as plain Python values, for JSON."""
        plain = lambda x: dataclasses.asdict(x) if x is not None else None
        return {
            "name": self.name,
            "eager_operations": self.eager_operations,
            "traced_equations": self.traced_equations,
            "printed": list(self.noticed.printed),
            "branches": [dataclasses.asdict(b) for b in self.noticed.branches()],
            "loops": [dataclasses.asdict(x) for x in self.noticed.loops()],
            "constants": [dataclasses.asdict(c) for c in self.constants],
            "fixed": list(self.fixed),
            "retraces": list(self.retraces),
            "kernels": self.kernels.dict() if self.kernels else None,
            "eager_peak_bytes": self.eager_peak_bytes,
            "times": {**dataclasses.asdict(self.times), "pays_after": self.times.pays_after},
            "difference": plain(self.difference),
            "refusal": plain(self.refusal),
        }

    def __repr__(self) -> str:
        return f"Study({self.name}: {self.eager_operations} operations, {self.traced_equations} traced)"


@dataclass(frozen=True, repr=False)
class Comparison(Page):
    """A table of studies, one row each."""

    studies: tuple[Study, ...]

    @property
    def rows(self) -> list[dict[str, str]]:
        """Column -> cell, of each study."""
        return [
            {
                "function": s.name,
                "operations": f"{s.eager_operations:,}",
                "equations": "-" if s.traced_equations is None else f"{s.traced_equations:,}",
                "kernels": str(len(s.kernels.kernels)) if s.kernels else "-",
                "eager": format_seconds(s.times.eager_s),
                "first call": "-" if s.times.first_s is None else format_seconds(s.times.first_s),
                "compiled": "-" if s.times.compiled_s is None else format_seconds(s.times.compiled_s),
                "pays after": "-" if s.times.pays_after is None else f"{s.times.pays_after:,}",
                "burned in": format_bytes(sum(c.bytes for c in s.constants)),
                "traces": str(len(s.retraces)),
                "tracing": "refused" if s.refusal else "differs" if s.difference else "ok",
            }
            for s in self.studies
        ]

    def report(self) -> Report:
        """The table; the file that `save` writes has each study's own report below it."""
        rows = self.rows
        return Report((Table([list(row.values()) for row in rows], list(rows[0])),) if rows else ())

    def dict(self) -> list[dict[str, Any]]:
        """Each study as plain Python values, for JSON."""
        return [s.dict() for s in self.studies]

    def pages(self) -> list[Report]:
        """The reports in the file that `save` writes."""
        return [result.report() for result in (self, *self.studies)]

    def __repr__(self) -> str:
        return f"Comparison({', '.join(s.name for s in self.studies)})"


def _rich(report: Report) -> Any:
    from rich import table as rich_table
    from rich.console import Group
    from rich.text import Text

    renderables: list[Any] = []
    for block in report.blocks:
        if isinstance(block, str):
            renderables.append(Text(block))
            continue
        options: dict[str, Any] = dict(title=block.title or None, title_justify="left", title_style="bold", box=None)
        table = rich_table.Table(*block.header, show_header=bool(block.header), **options)
        for row in block.shown:
            table.add_row(*map(Text, row))
        renderables += [table, *([Text(block.note)] if block.note else [])]
    return Group(*renderables)


_STYLE = """<style>
body { font: 14px/1.4 system-ui, sans-serif; }
caption { margin: 1em 0 .3em; font-weight: bold; text-align: left; }
table { border-collapse: collapse; }
td, th { padding: .15em .8em .15em 0; vertical-align: top; white-space: pre-wrap; font: 12px/1.4 ui-monospace, monospace; }
</style>"""
