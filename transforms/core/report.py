"""`Report`: what a result says, as lines and tables. `Result`: what is printed as its report.

The text of a report is made here, its HTML in `funcgrad/notebooks.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_PAD = {"<": str.ljust, ">": str.rjust}


@dataclass(frozen=True)
class Table:
    """Rows of cells in columns.

    Attributes:
      rows: cells, as many in each row.
      header: the names of the columns; () for none.
      align: "<" or ">" for each column, to the left or to the right; to the left where it is shorter.
      title: the line above; "" for none.
      limit: how many rows are shown; None for all.
    """

    rows: Sequence[Sequence[str]]
    header: Sequence[str] = ()
    align: str = ""
    title: str = ""
    limit: int | None = None

    @property
    def shown(self) -> Sequence[Sequence[str]]:
        """The rows up to `limit`."""
        return self.rows[: self.limit]

    @property
    def note(self) -> str:
        """How many rows are not shown; "" if all are."""
        hidden = len(self.rows) - len(self.shown)
        return f"… {hidden} more" if hidden else ""

    def lines(self) -> Iterator[str]:
        """The table as text: indented, except for one that has column names and no title."""
        indent = "" if self.header and not self.title else "  "
        rows = [self.header, *self.shown] if self.header else self.shown
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        pads = [_PAD[side] for side in self.align.ljust(len(widths), "<")]
        if self.title:
            yield self.title
        for row in rows:
            cells = (pad(cell, width) for pad, cell, width in zip(pads, row, widths, strict=True))
            yield f"{indent}{'  '.join(cells)}".rstrip()
        if self.note:
            yield indent + self.note


@dataclass(frozen=True)
class Report:
    """Lines and tables, in order."""

    blocks: tuple[str | Table, ...]

    def __str__(self) -> str:
        lines = ([block] if isinstance(block, str) else block.lines() for block in self.blocks)
        return "\n".join(line for block in lines for line in block)


class Result:
    """Base of what transforms return besides functions and Graphs. `funcgrad.notebooks` adds `_repr_html_`."""

    def report(self, *args: Any, **kwargs: Any) -> Report:
        """What the result says."""
        raise NotImplementedError

    def text(self, *args: Any, **kwargs: Any) -> str:
        """The report as text; takes the options of `report`."""
        return str(self.report(*args, **kwargs))

    def __str__(self) -> str:
        return self.text()
