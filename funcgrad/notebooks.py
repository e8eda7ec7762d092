"""What results can do beside printing: methods of a Graph for other tools, and how results appear in a notebook."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

from .transforms import Graph, Halves, walk

LARGEST = 3000  # equations of a graph that is drawn within a notebook; others show their text
HEIGHT_PX = 520


def attach(*kinds: type) -> None:
    """Give result classes `_repr_html_`, if they have none; the engine itself knows no HTML."""
    shown: dict[type, Callable] = {
        Graph: lambda self: framed(self, self),
        Halves: lambda self: framed(self, self.forward),
    }
    for kind in kinds:
        if not hasattr(kind, "_repr_html_"):
            kind._repr_html_ = shown.get(kind, lambda self: table(str(self)))  # type: ignore[attr-defined]


def _to_json(self: Graph) -> str:
    """The graph as JSON, as `fg.to_json`."""
    from .viewing.schema import to_json

    return to_json(self)


def _to_dot(self: Graph) -> str:
    """The graph in the language of Graphviz, as `fg.to_dot`."""
    from .viewing.graphviz import to_dot

    return to_dot(self)


# The engine knows neither format.
Graph.to_json, Graph.to_dot = _to_json, _to_dot  # type: ignore[method-assign]


def framed(what: Graph | Halves, graph: Graph) -> str:
    """The page in a frame of its own; the text, where `graph` is large."""
    from html import escape

    if sum(1 for _ in itertools.islice(walk(graph), LARGEST + 1)) > LARGEST:
        hint = "too large to be drawn here: fg.show(graph, path) writes it to a file"
        return f"<pre>{escape(str(what))}</pre><p>{hint}</p>"
    from .viewing.page import page

    style = f"width:100%;height:{HEIGHT_PX}px;border:1px solid #d5dbe2"
    return f'<iframe srcdoc="{escape(page(what))}" style="{style}"></iframe>'


def table(text: str) -> str:
    """Text with columns as HTML: lines in columns become tables, other lines stay."""
    from html import escape

    is_row = lambda line: re.search(r"\S {2,}\S", line) is not None
    parts = []
    for in_columns, group in itertools.groupby(text.splitlines(), key=is_row):
        lines = list(group)
        parts += [_rows(lines)] if in_columns else [f"<div>{escape(line)}</div>" for line in lines]
    return "".join(parts)


def _rows(lines: list[str]) -> str:
    """Columns are what blanks, at least two and in all lines, stand between."""
    from html import escape

    width = max(map(len, lines))
    used = "".join("x" if any(x[k : k + 1].strip() for x in lines) else " " for k in range(width))
    spans = [match.span() for match in re.finditer(r"x+(?: x+)*", used)]
    rows = []
    for k, line in enumerate(lines):
        tag = "th" if k == 0 and not any(c.isdigit() for c in line) else "td"
        cells = [f'<{tag} style="text-align:left">{escape(line[a:b].strip())}</{tag}>' for a, b in spans]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(rows)}</table>"
