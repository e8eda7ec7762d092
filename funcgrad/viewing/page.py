"""`show`: a graph as one HTML file, which needs no network."""

from __future__ import annotations

import html
import json
import linecache
import os
import tempfile
import webbrowser
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from ..transforms import Graph, Halves
from ..transforms.compilation.kernels.instructions import Kernel
from ..transforms.compilation.kernels.table import Compiled
from ..transforms.core.errors import ArgumentError
from ..transforms.cost.formatting import format_seconds
from .schema import described


def show(
    graph: Graph | Halves,
    path: str | os.PathLike | None = None,
    *,
    kernels: Compiled | None = None,
    times: Mapping[str, float] | None = None,
) -> Path:
    """Write a graph as one HTML file to look at, and give its path.

    Scopes and sub-graphs are boxes that open and close, equations are nodes, values are edges; it holds the lines of your code
    that made them. The two halves of a gradient stand side by side, with the residuals between them. The file is complete: it
    needs no network, and can be sent to others.

    Args:
      graph: Graph, or Halves as from `fg.halves`.
      path: where to write; what is there is replaced. None writes to a new temporary file, and opens it in the browser if
        Python runs interactively.
      kernels: `fg.compiled(graph, *args)`: each equation says in which kernels it is, and has the colour "time" of theirs.
      times: measured seconds of equations by their names, as {"block_0/tanh#0": 2e-6}, in place of those of `kernels`. `tap` and
        `Residual.path` name equations in the same way; those of a backward pass start with "transpose".
    Returns:
      The path of the file.
    Raises:
      ArgumentError: neither a Graph nor Halves; `kernels` is no Compiled. Also a TypeError.
      OptionError: `kernels` or `times` name an equation that is not there. Also a ValueError.
    """
    if not isinstance(graph, Graph | Halves):
        raise ArgumentError(
            f"show takes a Graph or Halves, and got {type(graph).__name__}.",
            hint="fg.show(fg.trace(f, *args)), or fg.show(fg.halves(graph))",
        )
    if kernels is not None and not isinstance(kernels, Compiled):
        raise ArgumentError(
            f"show takes kernels of fg.compiled, and got {type(kernels).__name__}.",
            hint="fg.show(graph, path, kernels=fg.compiled(graph, *args))",
        )
    text = page(graph, kernels, times)
    if path is not None:
        written = Path(path)
        written.write_text(text, encoding="utf-8")
        return written
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".html", prefix="funcgrad_", delete=False) as file:
        file.write(text)
    if _is_interactive():
        webbrowser.open(Path(file.name).as_uri())
    return Path(file.name)


def page(graph: Graph | Halves, kernels: Compiled | None = None, times: Mapping[str, float] | None = None) -> str:
    """The text of the HTML file."""
    words = {} if kernels is None else {name: list(map(_in_words, each)) for name, each in kernels.parts.items()}
    times = kernels.times if times is None and kernels is not None else times
    data = _with_source(described(graph, times, words))
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    parts = {name: _asset(file) for name, file in _PARTS.items()}
    # In a script, HTML knows no escapes: "<" could end it.
    return Template(_asset("page.html")).substitute(
        parts, title=html.escape(data["name"]), data=text.replace("<", "\\u003c")
    )


def _in_words(k: Kernel) -> str:
    took = "" if k.elapsed_s is None else f", {format_seconds(k.elapsed_s)}"
    others = f", with {len(k.equations) - 1} more" if len(k.equations) > 1 else ""
    return f"{k.name}: {k.sort}{took}{others}"


_PARTS = {"style": "viewer.css", "licence": "dagre.LICENSE", "dagre": "dagre.min.js", "viewer": "viewer.js"}


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath("assets", name).read_text(encoding="utf-8")


def _with_source(data: dict[str, Any]) -> dict[str, Any]:
    """The data with short names of files, and the text of the lines that made equations."""
    files = {node["file"] for node in data["nodes"] if node.get("file")}
    short = {file: os.path.basename(file) for file in files}
    if len(set(short.values())) < len(files):
        short = {file: file for file in files}
    source: dict[str, dict[int, str]] = {}
    for node in data["nodes"]:
        if file := node.get("file"):
            node["file"] = short[file]
            text = linecache.getline(file, node["line"]).rstrip()
            source.setdefault(short[file], {})[node["line"]] = text
    return {**data, "source": {file: dict(sorted(lines.items())) for file, lines in sorted(source.items())}}


def _is_interactive() -> bool:
    import sys

    return hasattr(sys, "ps1") and sys.stdout.isatty()
