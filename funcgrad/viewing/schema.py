"""A graph as plain data for viewers and other tools: nodes, their values, and edges. docs/viewing.md has the schema."""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax.tree_util import keystr, tree_flatten_with_path, tree_unflatten

from ..transforms.autodiff.halves import Halves
from ..transforms.core import _jax, subjaxprs
from ..transforms.core.errors import OptionError
from ..transforms.core.graph import Graph
from ..transforms.core.scope_paths import BACKWARD, Path, joined
from ..transforms.core.text import Names, equation, short
from ..transforms.cost.inlining import total
from ..transforms.cost.operations import Work, nbytes
from ..transforms.cost.table import cost
from .boxes import Boxes

VERSION = 1  # of the schema: changes if a reader of the previous version would misread the data


def to_json(graph: Graph) -> str:
    """A graph as JSON: nodes, values and edges, with costs and source lines. docs/viewing.md has the schema."""
    return json.dumps(graph_data(graph), allow_nan=False)


def graph_data(
    what: Graph | Halves, times: Mapping[str, float] | None = None, kernels: Mapping[str, Sequence[str]] | None = None
) -> dict[str, Any]:
    """The data of a Graph, or of both halves of a gradient, with the residuals as edges between them.

    Args:
      what: Graph or Halves.
      times: measured seconds of equations, by their names, as "block_0/tanh#0"; those of the backward half start with
        "transpose".
      kernels: descriptions of the kernels of equations, by the same names.
    Raises:
      OptionError: `times` or `kernels` name an equation that does not exist. Also a ValueError.
    """
    builder = _Builder(dict(times or {}), dict(kernels or {}))
    if isinstance(what, Graph):
        builder.add_graph(what, None, ())
        return builder.data(what.name, "graph")
    builder.add_halves(what)
    return builder.data(what.forward.name.removeprefix("forward(").removesuffix(")"), "halves")


class _Builder:
    """Nodes, values and edges so far; the id of a node or value is its index in its list."""

    def __init__(self, times: dict[str, float], kernels: dict[str, Sequence[str]]) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.values: list[dict[str, Any]] = []
        self.edges: list[dict[str, Any]] = []
        self.times, self.kernels = times, kernels  # of equations that are not added yet
        self.counts: Counter[str] = Counter()  # name -> number of its equations
        self.origins: list[tuple[Any, dict[str, Any]]] = []  # in program order: what made an equation, and its node

    def add_halves(self, halves: Halves) -> None:
        """Add both graphs. A residual is one value in both."""
        count, forward = len(halves.residuals), halves.forward
        value_ids = self.add_graph(forward, self._node("half", "forward", None)["id"], (), hidden=count)
        residuals = forward.jaxpr.jaxpr.outvars[forward.out_tree.num_leaves - count :]
        inputs = [None if isinstance(v, _jax.Literal) else value_ids[v] for v in residuals]
        self.add_graph(halves.backward, self._node("half", "backward", None)["id"], (BACKWARD,), inputs)

    def add_graph(
        self, graph: Graph, parent: int | None, scopes: Path, inputs: Sequence[int | None] = (), hidden: int = 0
    ) -> dict[Any, int]:
        """Add a graph; returns the value of each variable at its top level.

        Args:
          inputs: values of the first input variables, which then are no arguments.
          hidden: number of the last outputs that get no node.
        """
        jaxpr, names = graph.jaxpr.jaxpr, Names(graph)
        self.names, self.costs = names, _costs(graph)
        value_ids = {v: self._value(v, self._node("constant", names(v), parent)) for v in jaxpr.constvars}
        for v, path, value in itertools.zip_longest(jaxpr.invars, graph.paths, inputs):
            value_ids[v] = self._value(v, self._node("argument", path, parent)) if value is None else value
        self._add_equations(jaxpr, value_ids, parent, scopes, None)
        for v, label in zip(jaxpr.outvars[: len(jaxpr.outvars) - hidden], _output_labels(graph), strict=False):
            self._edge(v, value_ids, self._node("output", label, parent))
        return value_ids

    def data(self, name: str, kind: str) -> dict[str, Any]:
        """All of it, after the last graph."""
        if unknown := [*self.times, *self.kernels]:
            option, hint = "times" if self.times else "kernels", 'equations are named as in "block_0/tanh#0"'
            what = f"{option}= names equations that {name} does not have: {', '.join(unknown[:5])}."
            raise OptionError(what, hint=f'{hint}: see "name" in graph.to_json()')
        _link(self.origins)
        head = {"format": "funcgrad.graph", "version": VERSION, "kind": kind, "name": name}
        return {**head, "nodes": self.nodes, "values": self.values, "edges": self.edges}

    def _add_equations(
        self, jaxpr: _jax.Jaxpr, value_ids: dict[Any, int], parent: int | None, scopes: Path, source: Any
    ) -> None:
        """Add the equations of one level inside `scopes`; `source` is the line that calls it."""
        boxes = Boxes(lambda label, parent: self._node("scope", label, parent)["id"], parent)
        for eqn in jaxpr.eqns:
            path = joined(scopes, _jax.scopes(_jax.name_stack(eqn)))
            inputs = [value_ids[v] for v in eqn.invars if not isinstance(v, _jax.Literal)]
            makers = {self.values[value]["node"] for value in inputs}
            node = self._add_equation(eqn, boxes.box(path[len(scopes) :], makers), path, source)
            boxes.add(node["id"], node["parent"], makers)
            results = self._add_bodies(eqn, node, value_ids, path)
            outputs = {k: self._value(v, node, k) for k, v in enumerate(eqn.outvars) if not _jax.dropped(v)}
            value_ids.update((eqn.outvars[k], value) for k, value in outputs.items())
            for output_node, k in results:
                output_node["result"] = None if k is None else outputs.get(k)

    def _add_equation(self, eqn: Any, parent: int | None, path: Path, source: Any) -> dict[str, Any]:
        primitive, params = eqn.primitive.name, eqn.params
        name = "/".join((*path, primitive))
        self.counts[name] += 1
        name = f"{name}#{self.counts[name] - 1}"
        label = f"scan ×{params['length']}" if primitive == "scan" else str(params.get("name") or primitive)
        place = next(iter(_jax.source_lines(eqn)), source or (None, None, None))
        costs = self.costs[_key(eqn)]
        times, work = costs.popleft() if costs and not subjaxprs.bodies(eqn) else (None, None)
        fields: dict[str, Any] = {"primitive": primitive, "name": name, "scope": "/".join(path)}
        fields |= {"text": equation(eqn, self.names), **dict(zip(("file", "line", "function"), place, strict=True))}
        fields |= {"times": times, **{key: work and getattr(work, key) for key in _WORK}}
        fields |= {"time_s": self.times.pop(name, None), "kernels": list(self.kernels.pop(name, ())), "forward": []}
        node = self._node("equation", label, parent, **fields)
        scopes = tuple(scope for scope in path if scope != BACKWARD)
        self.origins.append(((eqn.source_info.traceback, scopes, BACKWARD in path), node))
        return node

    def _add_bodies(
        self, eqn: Any, node: dict[str, Any], value_ids: dict[Any, int], path: Path
    ) -> list[tuple[dict[str, Any], int | None]]:
        """Add the sub-graphs of an equation. Edges go to the input of a sub-graph if it gets the value, else to the equation.

        Returns the output nodes of the sub-graphs, each with the index of its output of the equation.
        """
        bodies = subjaxprs.bodies(eqn)
        operands = subjaxprs.operands(eqn, eqn.invars) if bodies else []
        passed, results = {id(v) for body_operands in operands for v in body_operands}, []
        for v in eqn.invars:
            if id(v) not in passed:
                self._edge(v, value_ids, node)
        line = (node["file"], node["line"], node["function"]) if node["file"] else None
        for body, body_operands, indices in zip(bodies, operands, subjaxprs.results(eqn), strict=True):
            jaxpr = body.jaxpr.jaxpr
            box = node if len(bodies) == 1 else self._node("body", body.label, node["id"])
            body_ids = {v: self._value(v, self._node("constant", self.names(v), box["id"])) for v in jaxpr.constvars}
            for v, operand, role in zip(jaxpr.invars, body_operands, _roles(eqn, body.label), strict=True):
                input_node = self._node("input", f"{role} {self.names(v)}".lstrip(), box["id"])
                body_ids[v] = self._value(v, input_node)
                if operand is not None:
                    self._edge(operand, value_ids, input_node)
            self._add_equations(jaxpr, body_ids, box["id"], path, line)
            for v, k in zip(jaxpr.outvars, indices, strict=True):
                output_node = self._node("output", self.names(v), box["id"])
                self._edge(v, body_ids, output_node)
                results.append((output_node, k))
        return results

    def _node(self, kind: str, label: str, parent: int | None, **fields: Any) -> dict[str, Any]:
        node = {"id": len(self.nodes), "parent": parent, "kind": kind, "label": label, **fields}
        self.nodes.append(node)
        return node

    def _value(self, v: Any, node: dict[str, Any], index: int = 0) -> int:
        shape, dtype = getattr(v.aval, "shape", None), getattr(v.aval, "dtype", None)
        value = {"id": len(self.values), "name": self.names(v), "node": node["id"], "index": index}
        value["type"] = short(v.aval)
        value["shape"] = None if shape is None else [d if isinstance(d, int) else str(d) for d in shape]
        value["dtype"] = None if dtype is None else str(dtype)
        self.values.append({**value, "bytes": nbytes(v.aval)})
        return value["id"]

    def _edge(self, v: Any, value_ids: dict[Any, int], node: dict[str, Any]) -> None:
        """An edge from the maker of a variable to `node`; a literal becomes text of the node."""
        if isinstance(v, _jax.Literal):
            node.setdefault("literals", []).append(self.names(v))
        else:
            value = value_ids[v]
            self.edges.append({"source": self.values[value]["node"], "target": node["id"], "value": value})


# ------------------------------------------------------------------------------------------------ costs and origins

_WORK = ("flops", "transcendentals", "bytes_read", "bytes_written")


def _costs(graph: Graph) -> dict[Any, deque[tuple[float, Work | None]]]:
    """Number of runs and total work of each equation, None if unknown. A sub-graph called twice has two, in program order."""

    def leaves(steps):
        for step in steps:
            if subjaxprs.bodies(step.eqn):
                for body in step.bodies:
                    yield from leaves(body.steps)
            else:
                yield step

    costs: dict[Any, deque] = defaultdict(deque)
    for step in leaves(cost(graph).program[1]):
        is_known = step.work is not None or step.bodies
        costs[_key(step.eqn)].append((step.times, total([step]) if is_known else None))
    return costs


def _key(eqn: Any) -> Any:
    """The first variable of an equation, if it has one: dead-code elimination rebuilds equations and keeps variables."""
    return next((v for v in eqn.outvars if not _jax.dropped(v)), eqn)


def _roles(eqn: Any, label: str) -> list[str]:
    """The roles of the inputs of a loop's body; empty strings for other bodies."""
    name, params = eqn.primitive.name, eqn.params
    size = next(len(body.jaxpr.jaxpr.invars) for body in subjaxprs.bodies(eqn) if body.label == label)
    if name == "scan":
        consts, carry, xs = subjaxprs.scan_sizes(eqn)
    elif name in subjaxprs.LOOPS:
        consts, xs = params["cond_nconsts" if label == "cond_jaxpr" else "body_nconsts"], 0
        carry = size - consts
    else:
        return [""] * size
    return ["const"] * consts + ["carry"] * carry + ["xs"] * xs


def _link(origins: Sequence[tuple[Any, dict[str, Any]]]) -> None:
    """Link equations of a backward pass to the forward equations that they were derived from.

    JAX gives both the same traceback. If a line ran several times, in a Python loop, the backward runs are in reverse order.
    """
    runs: dict[Any, list[list[dict[str, Any]]]] = defaultdict(list)
    for origin, pairs in itertools.groupby(origins, key=lambda pair: pair[0]):
        runs[origin].append([node for _, node in pairs])
    for (traceback, scopes, is_backward), backward in runs.items():
        if not is_backward or traceback is None:
            continue
        forward = runs.get((traceback, scopes, False), [])
        is_paired = len(forward) == len(backward)
        sources = reversed(forward) if is_paired else [list(itertools.chain(*forward))] * len(backward)
        for nodes, source_nodes in zip(backward, sources, strict=True):
            for node in nodes:
                node["forward"] = [source["id"] for source in source_nodes]


def _output_labels(graph: Graph) -> Iterator[str]:
    """The label of each output leaf, as "out['loss']"."""
    leaves = tree_unflatten(graph.out_tree, range(graph.out_tree.num_leaves))
    return (f"out{keystr(path)}" for path, _ in tree_flatten_with_path(leaves)[0])
