"""Results as HTML, for notebooks, and methods of a Graph for other tools."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import islice, zip_longest

from .transforms import Graph, Halves, walk
from .transforms.core.report import Report, Result, Table

LARGEST = 3000  # equations of a graph that a notebook draws; larger graphs show their text
HEIGHT_PX = 520


def _to_json(self: Graph) -> str:
    """The graph as JSON, as `fg.to_json`."""
    from .viewing.schema import to_json

    return to_json(self)


def _to_dot(self: Graph) -> str:
    """The graph in the language of Graphviz, as `fg.to_dot`."""
    from .viewing.graphviz import to_dot

    return to_dot(self)


def framed(result: Graph | Halves, graph: Graph) -> str:
    """The page of `fg.show` in a frame; the text, if `graph` is large."""
    if sum(1 for _ in islice(walk(graph), LARGEST + 1)) > LARGEST:
        hint = "too large to be drawn here: fg.show(graph, path) writes it to a file"
        return f"<pre>{escape(str(result))}</pre><p>{hint}</p>"
    from .viewing.page import html_page

    style = f"width:100%;height:{HEIGHT_PX}px;border:1px solid #d5dbe2"
    return f'<iframe srcdoc="{escape(html_page(result))}" style="{style}"></iframe>'


def html(report: Report) -> str:
    """A report as HTML: lines, and tables with their columns aligned as in the text."""
    return "".join(_line(block) if isinstance(block, str) else _table(block) for block in report.blocks)


def _line(text: str) -> str:
    return f"<div>{escape(text)}</div>"


def _table(table: Table) -> str:
    def row(tag: str, cells: Sequence[str]) -> str:
        aligned = zip_longest(cells, table.align[: len(cells)], fillvalue="<")
        styles = ((cell, f"text-align:{'right' if side == '>' else 'left'}") for cell, side in aligned)
        return "".join(["<tr>", *(f'<{tag} style="{style}">{escape(cell)}</{tag}>' for cell, style in styles), "</tr>"])

    title = f'<caption style="text-align:left">{escape(table.title)}</caption>' if table.title else ""
    head = row("th", table.header) if table.header else ""
    rows = "".join(row("td", cells) for cells in table.shown)
    return f"<table>{title}{head}{rows}</table>{_line(table.note) if table.note else ''}"


# The engine knows no HTML and no format of other tools.
Result._repr_html_ = lambda self: html(self.report())  # type: ignore[attr-defined]
Graph._repr_html_ = lambda self: framed(self, self)  # type: ignore[attr-defined]
Halves._repr_html_ = lambda self: framed(self, self.forward)  # type: ignore[attr-defined]
Graph.to_json, Graph.to_dot = _to_json, _to_dot  # type: ignore[method-assign]
