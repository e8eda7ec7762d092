"""`to_dot`: a graph in the language of Graphviz."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from ..transforms.core.graph import Graph
from .schema import graph_data

_SHAPES = {"argument": "ellipse", "input": "ellipse", "output": "ellipse", "constant": "note"}
Children = dict[int | None, list[dict[str, Any]]]


def to_dot(graph: Graph) -> str:
    """A graph in the language of Graphviz (`dot -Tsvg`); scopes and sub-jaxprs are clusters."""
    data = graph_data(graph)
    children: Children = defaultdict(list)
    for node in data["nodes"]:
        children[node["parent"]].append(node)
    lines = [f"digraph {_quoted(graph.name)} {{", "  compound=true", "  node [shape=box, fontname=Helvetica]"]
    lines += _lines(None, children, "  ")
    for edge in data["edges"]:
        (source, tail), (target, head) = (_end(data["nodes"][edge[key]], children) for key in ("source", "target"))
        clips = [f"{key}=cluster_{k}" for key, k in (("ltail", tail), ("lhead", head)) if k is not None]
        options = ", ".join([f"label={_quoted(data['values'][edge['value']]['type'])}", *clips])
        lines.append(f"  n{source} -> n{target} [{options}]")
    return "\n".join([*lines, "}\n"])


def _lines(parent: int | None, children: Children, indent: str) -> Iterator[str]:
    for node in children[parent]:
        if children[node["id"]]:
            yield f"{indent}subgraph cluster_{node['id']} {{"
            yield f"{indent}  label={_quoted(node['label'])}"
            yield from _lines(node["id"], children, indent + "  ")
            yield f"{indent}}}"
        else:
            shape = f", shape={_SHAPES[node['kind']]}" if node["kind"] in _SHAPES else ""
            label = " ".join([node["label"], *node.get("literals", ())])
            yield f"{indent}n{node['id']} [label={_quoted(label)}{shape}]"


def _end(node: dict[str, Any], children: Children) -> tuple[int, int | None]:
    """The end of an edge: a node, and the cluster that clips the edge. Graphviz has no edges between clusters."""
    cluster = node["id"] if children[node["id"]] else None
    while children[node["id"]]:
        node = children[node["id"]][-1]
    return node["id"], cluster


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
