"""Graphs under a pass: `interpret` evaluates a graph, `rewrite` traces that evaluation into a new graph; `verify` type-checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from . import _jax
from .errors import ArgumentError, GraphError
from .graph import Graph
from .passes import Pass, run
from .rules import Rule, as_pass


def interpret(graph: Graph, rules: Pass | Mapping[_jax.Primitive, Rule], *values: Any) -> list[Any]:
    """Evaluate a graph under a pass, which goes into sub-jaxprs.

    Args:
      graph: the graph.
      rules: a table of rules, a mapping from primitives to rules, or another `Pass`; an equation without a rule stays.
      *values: the flat inputs, one for each of `graph.in_avals`. A pass that inlines every call may take values of its own.
    Returns:
      The flat outputs.
    Raises:
      GraphError: a rule returned values of other shapes, dtypes or number than its equation has.
    """
    _check_graph("interpret", graph)
    return run(as_pass(rules, "interpret").within(()), graph.jaxpr, values)


def rewrite(graph: Graph, rules: Pass | Mapping[_jax.Primitive, Rule]) -> Graph:
    """The graph under a pass, of the same inputs and outputs; scopes and source lines stay.

    Args:
      graph: the graph; it comes back itself where there is no work for the rules.
      rules: a table of rules, a mapping from primitives to rules, or another `Pass`.
    Raises:
      GraphError: a rule returned values of other shapes, dtypes or number than its equation has.
    """
    _check_graph("rewrite", graph)
    p = as_pass(rules, "rewrite")
    if not p.has_work(graph.jaxpr.jaxpr):
        return graph
    names = _jax.without_results(graph.jaxpr.jaxpr)
    new = _jax.stage_flat(lambda *values: interpret(graph, p, *values), graph.in_avals, names)
    return dataclasses.replace(graph, jaxpr=new)


def verify(graph: Graph) -> Graph:
    """Type-check a graph and return it.

    Raises:
      GraphError: an equation does not fit its primitive, or trees, paths and jaxpr disagree.
    """
    _check_graph("verify", graph)
    try:
        _jax.check_jaxpr(graph.jaxpr)
    except Exception as e:
        raise GraphError(f"{graph.name} is not well typed: {e}") from e
    counts = (graph.in_tree.num_leaves, len(graph.paths), len(graph.in_avals))
    if len(set(counts)) != 1 or graph.out_tree.num_leaves != len(graph.out_avals):
        raise GraphError(f"{graph.name} has {counts} input leaves, paths, variables; these must agree.")
    return graph


def _check_graph(verb: str, graph: Any) -> None:
    if not isinstance(graph, Graph):
        raise ArgumentError(
            f"{verb} takes a Graph, and got {type(graph).__name__}.",
            hint="fg.trace(f, *args) makes one; fg.live(f, rules) runs a function",
        )
