"""A graph in the language of Graphviz."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from ..transforms.core.graph import Graph
from .schema import described

_SHAPES = {"argument": "ellipse", "input": "ellipse", "output": "ellipse", "constant": "note"}


def to_dot(graph: Graph) -> str:
    """A graph in the language of Graphviz (`dot -Tsvg`); scopes and sub-jaxprs are clusters."""
    data = described(graph)
    inside = defaultdict(list)
    for node in data["nodes"]:
        inside[node["parent"]].append(node)
    ends = {node["id"]: _end(node, inside) for node in data["nodes"]}
    lines = [*_lines(None, inside, "  "), *(_edge(edge, data["values"], ends) for edge in data["edges"])]
    head = f"digraph {_quoted(graph.name)} {{\n  compound=true\n  node [shape=box, fontname=Helvetica]"
    return "\n".join([head, *lines, "}\n"])


def _lines(parent: int | None, inside: dict[int | None, list[dict[str, Any]]], indent: str) -> Iterator[str]:
    for node in inside[parent]:
        if inside[node["id"]]:
            yield f"{indent}subgraph cluster_{node['id']} {{"
            yield f"{indent}  label={_quoted(node['label'])}"
            yield from _lines(node["id"], inside, indent + "  ")
            yield f"{indent}}}"
        else:
            shape = f", shape={_SHAPES[node['kind']]}" if node["kind"] in _SHAPES else ""
            label = " ".join([node["label"], *node.get("literals", ())])
            yield f"{indent}n{node['id']} [label={_quoted(label)}{shape}]"


def _end(node: dict[str, Any], inside: dict[int | None, list[dict[str, Any]]]) -> tuple[int, int | None]:
    """Graphviz ties edges to nodes and cuts them at clusters: a node for the end of an edge, and the cluster."""
    cluster = node["id"] if inside[node["id"]] else None
    while inside[node["id"]]:
        node = inside[node["id"]][-1]
    return node["id"], cluster


def _edge(edge: dict[str, Any], values: list[dict[str, Any]], ends: dict[int, tuple[int, int | None]]) -> str:
    (source, tail), (target, head) = ends[edge["source"]], ends[edge["target"]]
    cut = [f"{key}=cluster_{k}" for key, k in (("ltail", tail), ("lhead", head)) if k is not None]
    options = ", ".join([f"label={_quoted(values[edge['value']]['type'])}", *cut])
    return f"  n{source} -> n{target} [{options}]"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
