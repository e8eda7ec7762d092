"""The driver of static graphs: `interpret` walks a graph with a table of rules, `rewrite` traces that walk into a new graph.

Write the interpreter, let JAX trace it again: a pass never builds equations by hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from . import _jax
from .errors import ArgumentError, GraphError
from .graph import Graph
from .passes import evaluate, holds
from .rules import Rule, Rules


def interpret(graph: Graph, rules: Rules | Mapping[_jax.Primitive, Rule], *values: Any) -> list[Any]:
    """Evaluate a graph with `rules` applied to each equation, going into sub-graphs.

    Args:
      graph: the graph.
      rules: the table, or a mapping from primitives to rules; an equation without a rule is bound as it is.
      *values: the flat inputs, one for each of `graph.in_avals`.
    Returns:
      The flat outputs.
    Raises:
      GraphError: a rule returned values of other shapes, dtypes or number than its equation has.
    """
    _check_graph("interpret", graph)
    return evaluate(graph.jaxpr, Rules.of(rules, "interpret"), values)


def rewrite(graph: Graph, rules: Rules | Mapping[_jax.Primitive, Rule]) -> Graph:
    """The graph with `rules` applied, of the same inputs and outputs; scopes and source lines stay.

    Args:
      graph: the graph; it comes back itself where there is no work for the rules.
      rules: the table, or a mapping from primitives to rules.
    Raises:
      GraphError: a rule returned values of other shapes, dtypes or number than its equation has.
    """
    _check_graph("rewrite", graph)
    rules = Rules.of(rules, "rewrite")
    if not holds(rules, graph.jaxpr.jaxpr):
        return graph
    names = _jax.without_results(graph.jaxpr.jaxpr)
    new = _jax.stage_flat(lambda *values: interpret(graph, rules, *values), graph.in_avals, names)
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
