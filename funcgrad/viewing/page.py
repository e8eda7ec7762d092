"""`show`: a graph as one HTML file that needs no network."""

from __future__ import annotations

import html
import json
import linecache
import os
import sys
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
from .schema import graph_data


def show(
    graph: Graph | Halves,
    path: str | os.PathLike | None = None,
    *,
    kernels: Compiled | None = None,
    times: Mapping[str, float] | None = None,
) -> Path:
    """Write a graph as one HTML file with a viewer.

    Scopes and sub-graphs are boxes that open and close, equations are nodes, values are edges. The file contains the source
    lines of the equations. The two halves of a gradient are side by side, with the residuals between them. The file needs no
    network and no other file.

    Args:
      graph: Graph, or Halves as from `fg.halves`.
      path: the file, which is replaced if it exists. None writes to a new temporary file, and opens it in the browser if
        Python runs interactively.
      kernels: `fg.compiled(graph, *args)`: each equation lists its kernels, and the colour "time" shows their times.
      times: measured seconds of equations by their names, as {"block_0/tanh#0": 2e-6}, in place of those of `kernels`. `tap` and
        `Residual.path` name equations in the same way; those of a backward pass start with "transpose".
    Returns:
      The path of the file.
    Raises:
      ArgumentError: neither a Graph nor Halves; `kernels` is no Compiled. Also a TypeError.
      OptionError: `kernels` or `times` name an equation that does not exist. Also a ValueError.
    """
    if not isinstance(graph, Graph | Halves):
        what = f"show takes a Graph or Halves, and got {type(graph).__name__}."
        raise ArgumentError(what, hint="fg.show(fg.trace(f, *args)), or fg.show(fg.halves(graph))")
    if kernels is not None and not isinstance(kernels, Compiled):
        what = f"show takes kernels of fg.compiled, and got {type(kernels).__name__}."
        raise ArgumentError(what, hint="fg.show(graph, path, kernels=fg.compiled(graph, *args))")
    text = html_page(graph, kernels, times)
    if path is None:
        descriptor, name = tempfile.mkstemp(suffix=".html", prefix="funcgrad_")
        os.close(descriptor)
    file = Path(name if path is None else path)
    file.write_text(text, encoding="utf-8")
    if path is None and _is_interactive():
        webbrowser.open(file.as_uri())
    return file


def html_page(graph: Graph | Halves, kernels: Compiled | None = None, times: Mapping[str, float] | None = None) -> str:
    """The text of the HTML file."""
    descriptions = {} if kernels is None else {name: list(map(_in_words, ks)) for name, ks in kernels.parts.items()}
    times = kernels.times if times is None and kernels is not None else times
    data = _with_source(graph_data(graph, times, descriptions))
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = text.replace("<", "\\u003c")  # a script has no HTML escapes: "<" could end it
    parts = {name: _asset(file) for name, file in _PARTS.items()}
    return Template(_asset("page.html")).substitute(parts, title=html.escape(data["name"]), data=text)


def _in_words(k: Kernel) -> str:
    time = "" if k.elapsed_s is None else f", {format_seconds(k.elapsed_s)}"
    more = f", with {len(k.equations) - 1} more" if len(k.equations) > 1 else ""
    return f"{k.name}: {k.sort}{time}{more}"


_PARTS = {"style": "viewer.css", "licence": "dagre.LICENSE", "dagre": "dagre.min.js", "viewer": "viewer.js"}


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath("assets", name).read_text(encoding="utf-8")


def _with_source(data: dict[str, Any]) -> dict[str, Any]:
    """The data with base names of files where these are unique, and the text of the equations' source lines."""
    files = {node["file"] for node in data["nodes"] if node.get("file")}
    short_names = {file: os.path.basename(file) for file in files}
    if len(set(short_names.values())) < len(files):
        short_names = {file: file for file in files}
    source: dict[str, dict[int, str]] = {}
    for node in data["nodes"]:
        if file := node.get("file"):
            node["file"] = short_names[file]
            source.setdefault(node["file"], {})[node["line"]] = linecache.getline(file, node["line"]).rstrip()
    return {**data, "source": {file: dict(sorted(lines.items())) for file, lines in sorted(source.items())}}


def _is_interactive() -> bool:
    return hasattr(sys, "ps1") and sys.stdout.isatty()
