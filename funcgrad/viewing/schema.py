"""A graph as plain data for viewers and other tools: nodes, the values that they make, and edges. See docs/viewing.md."""

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

VERSION = 1  # of the schema: changes when a reader of the last one would misread


def to_json(graph: Graph) -> str:
    """A graph as JSON: nodes, values and edges, with costs and source lines. docs/viewing.md has the schema."""
    return json.dumps(described(graph), allow_nan=False)


def described(
    what: Graph | Halves, times: Mapping[str, float] | None = None, kernels: Mapping[str, Sequence[str]] | None = None
) -> dict[str, Any]:
    """The data of a Graph, or of both halves of a gradient with the residuals as edges between them.

    Args:
      what: the Graph or Halves.
      times: measured seconds of equations, by their names as in "block_0/tanh#0"; in the backward half they start with
        "transpose".
      kernels: what is to be said of the kernels of equations, by the same names.
    Raises:
      OptionError: `times` or `kernels` name an equation that is not there. Also a ValueError.
    """
    description = _Description(dict(times or {}), dict(kernels or {}))
    if isinstance(what, Graph):
        description.graph(what, None, ())
        name = what.name
    else:
        description.halves(what)
        name = what.forward.name.removeprefix("forward(").removesuffix(")")
    return description.finished(name, "graph" if isinstance(what, Graph) else "halves")


class _Description:
    def __init__(self, times: dict[str, float], kernels: dict[str, Sequence[str]]) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.values: list[dict[str, Any]] = []
        self.edges: list[dict[str, Any]] = []
        self.times, self.kernels = times, kernels
        self.counts: Counter[str] = Counter()  # of equations of a name
        self.origins: list[tuple[Any, dict[str, Any]]] = []  # what made each equation, in program order

    def halves(self, halves: Halves) -> None:
        """Both graphs; what is kept is one value in both."""
        forward = self._node("half", "forward", None)
        known = self.graph(halves.forward, forward["id"], (), hidden=len(halves.residuals))
        kept = halves.forward.jaxpr.jaxpr.outvars[halves.forward.out_tree.num_leaves - len(halves.residuals) :]
        backward = self._node("half", "backward", None)
        given = [None if isinstance(v, _jax.Literal) else known[v] for v in kept]
        self.graph(halves.backward, backward["id"], (BACKWARD,), given)

    def graph(
        self, graph: Graph, parent: int | None, around: Path, given: Sequence[int | None] = (), hidden: int = 0
    ) -> dict[Any, int]:
        """Add a graph; gives the value of each of its outermost variables.

        Args:
          given: values that its first inputs are, which then are no arguments.
          hidden: how many of its last outputs are not shown.
        """
        jaxpr, names = graph.jaxpr.jaxpr, Names(graph)
        self.names, self.costs = names, _costs(graph)
        known = {}
        for v in jaxpr.constvars:
            known[v] = self._value(v, self._node("constant", names(v), parent))
        for v, path, value in itertools.zip_longest(jaxpr.invars, graph.paths, given):
            known[v] = self._value(v, self._node("argument", path, parent)) if value is None else value
        self._equations(jaxpr, known, parent, around, None)
        shown = jaxpr.outvars[: len(jaxpr.outvars) - hidden]
        for v, label in zip(shown, _outputs(graph), strict=False):
            self._use(v, known, self._node("output", label, parent))
        return known

    def finished(self, name: str, kind: str) -> dict[str, Any]:
        if unknown := [*self.times, *self.kernels]:
            raise OptionError(
                f"{'times' if self.times else 'kernels'}= names equations that {name} does not have: {', '.join(unknown[:5])}.",
                hint='equations are named as in "block_0/tanh#0": see "name" in graph.to_json()',
            )
        _link(self.origins)
        head = {"format": "funcgrad.graph", "version": VERSION, "kind": kind, "name": name}
        return {**head, "nodes": self.nodes, "values": self.values, "edges": self.edges}

    def _equations(
        self, jaxpr: _jax.Jaxpr, known: dict[Any, int], parent: int | None, around: Path, source: Any
    ) -> None:
        """Add the equations of one level, which lies at the scopes `around`; `source` is the line that calls it."""
        boxes = Boxes(lambda label, parent: self._node("scope", label, parent)["id"], parent)
        for eqn in jaxpr.eqns:
            path = joined(around, _jax.scopes(_jax.name_stack(eqn)))
            reads = [known[v] for v in eqn.invars if not isinstance(v, _jax.Literal)]
            makers = {self.values[value]["node"] for value in reads}
            node = self._equation(eqn, boxes.box(path[len(around) :], makers), path, source)
            boxes.add(node["id"], node["parent"], makers)
            returned = self._enter(eqn, node, known, path)
            made = {k: self._value(v, node, k) for k, v in enumerate(eqn.outvars) if not _jax.dropped(v)}
            known.update((eqn.outvars[k], value) for k, value in made.items())
            for place, k in returned:
                place["result"] = None if k is None else made.get(k)

    def _equation(self, eqn: Any, parent: int | None, path: Path, source: Any) -> dict[str, Any]:
        scope = "/".join(path)
        name = "/".join((*path, eqn.primitive.name))
        self.counts[name] += 1
        name = f"{name}#{self.counts[name] - 1}"
        p = eqn.params
        label = f"scan ×{p['length']}" if eqn.primitive.name == "scan" else str(p.get("name") or eqn.primitive.name)
        file, line, function = next(iter(_jax.source_lines(eqn)), source or (None, None, None))
        known = self.costs[_key(eqn)]
        times, work = known.popleft() if known and not subjaxprs.bodies(eqn) else (None, None)
        node = self._node(
            "equation",
            label,
            parent,
            primitive=eqn.primitive.name,
            name=name,
            scope=scope,
            text=equation(eqn, self.names),
            file=file,
            line=line,
            function=function,
            times=times,
            flops=work and work.flops,
            transcendentals=work and work.transcendentals,
            bytes_read=work and work.bytes_read,
            bytes_written=work and work.bytes_written,
            time_s=self.times.pop(name, None),
            kernels=list(self.kernels.pop(name, ())),
            forward=[],
        )
        self.origins.append(
            ((eqn.source_info.traceback, tuple(n for n in path if n != BACKWARD), BACKWARD in path), node)
        )
        return node

    def _enter(
        self, eqn: Any, node: dict[str, Any], known: dict[Any, int], path: Path
    ) -> list[tuple[dict[str, Any], int | None]]:
        """Add the sub-graphs of an equation, and the edges to it, or to the input of a sub-graph that takes the value.

        Gives the output nodes of the sub-graphs, and which output of the equation each is.
        """
        bodies = subjaxprs.bodies(eqn)
        operands = subjaxprs.operands(eqn, eqn.invars) if bodies else []
        passed, returned = {id(v) for given in operands for v in given}, []
        for v in eqn.invars:
            if id(v) not in passed:
                self._use(v, known, node)
        line = (node["file"], node["line"], node["function"]) if node["file"] else None
        for body, given, made in zip(bodies, operands, subjaxprs.results(eqn), strict=True):
            jaxpr = body.jaxpr.jaxpr
            box = node if len(bodies) == 1 else self._node("body", body.label, node["id"])
            inner = {v: self._value(v, self._node("constant", self.names(v), box["id"])) for v in jaxpr.constvars}
            for v, operand, role in zip(jaxpr.invars, given, _roles(eqn, body.label), strict=True):
                place = self._node("input", f"{role} {self.names(v)}".lstrip(), box["id"])
                inner[v] = self._value(v, place)
                if operand is not None:
                    self._use(operand, known, place)
            self._equations(jaxpr, inner, box["id"], path, line)
            for v, k in zip(jaxpr.outvars, made, strict=True):
                place = self._node("output", self.names(v), box["id"])
                self._use(v, inner, place)
                returned.append((place, k))
        return returned

    def _node(self, kind: str, label: str, parent: int | None, **fields: Any) -> dict[str, Any]:
        node = {"id": len(self.nodes), "parent": parent, "kind": kind, "label": label, **fields}
        self.nodes.append(node)
        return node

    def _value(self, v: Any, node: dict[str, Any], index: int = 0) -> int:
        shape, dtype = getattr(v.aval, "shape", None), getattr(v.aval, "dtype", None)
        self.values.append(
            {
                "id": len(self.values),
                "name": self.names(v),
                "node": node["id"],
                "index": index,
                "type": short(v.aval),
                "shape": None if shape is None else [d if isinstance(d, int) else str(d) for d in shape],
                "dtype": None if dtype is None else str(dtype),
                "bytes": nbytes(v.aval),
            }
        )
        return len(self.values) - 1

    def _use(self, v: Any, known: dict[Any, int], node: dict[str, Any]) -> None:
        if isinstance(v, _jax.Literal):
            node.setdefault("literals", []).append(self.names(v))
        else:
            self.edges.append({"source": self.values[known[v]]["node"], "target": node["id"], "value": known[v]})


# ------------------------------------------------------------------------------------------------ costs and origins


def _costs(graph: Graph) -> dict[Any, deque[tuple[float, Work | None]]]:
    """How often each equation runs and its work together, where that is known; of a sub-graph called twice, in program order."""
    found: dict[Any, deque] = defaultdict(deque)

    def enter(steps):
        for step in steps:
            if subjaxprs.bodies(step.eqn):
                for body in step.bodies:
                    enter(body.steps)
            else:
                is_known = step.work is not None or step.bodies
                found[_key(step.eqn)].append((step.times, total([step]) if is_known else None))

    enter(cost(graph).program[1])
    return found


def _key(eqn: Any) -> Any:
    """What an equation keeps when what is dead around it is left out: its first variable, if it has one."""
    return next((v for v in eqn.outvars if not _jax.dropped(v)), eqn)


def _roles(eqn: Any, label: str) -> list[str]:
    """What the inputs of a loop's body are; nothing to say of others."""
    name, p = eqn.primitive.name, eqn.params
    body = next(body.jaxpr.jaxpr for body in subjaxprs.bodies(eqn) if body.label == label)
    if name == "scan":
        consts, carry, xs = subjaxprs.scan_sizes(eqn)
    elif name in subjaxprs.LOOPS:
        consts, xs = p["cond_nconsts" if label == "cond_jaxpr" else "body_nconsts"], 0
        carry = len(body.invars) - consts
    else:
        return [""] * len(body.invars)
    return ["const"] * consts + ["carry"] * carry + ["xs"] * xs


def _link(origins: Sequence[tuple[Any, dict[str, Any]]]) -> None:
    """Give equations of a backward pass the forward ones that they were derived from.

    JAX hands down the traceback, so both say the same. Where a line ran several times, in a loop of Python, its runs come
    back in reverse order.
    """
    runs: dict[Any, list[list[dict[str, Any]]]] = defaultdict(list)
    for key, pairs in itertools.groupby(origins, key=lambda pair: pair[0]):
        runs[key].append([node for _, node in pairs])
    for (origin, scopes, is_backward), backward in runs.items():
        if not is_backward or origin is None:
            continue
        forward = runs.get((origin, scopes, False), [])
        everything = list(itertools.chain(*forward))
        paired = list(reversed(forward)) if len(forward) == len(backward) else [everything] * len(backward)
        for nodes, of in zip(backward, paired, strict=True):
            for node in nodes:
                node["forward"] = [f["id"] for f in of]


def _outputs(graph: Graph) -> Iterator[str]:
    """What each output leaf is called, as in "out['loss']"."""
    leaves = tree_unflatten(graph.out_tree, range(graph.out_tree.num_leaves))
    return (f"out{keystr(path)}" for path, _ in tree_flatten_with_path(leaves)[0])
