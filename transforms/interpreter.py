"""The driver of static graphs: `interpret` walks a graph with a table of rules, `rewrite` traces that walk into a new graph.

Write the interpreter, let JAX trace it again: a pass never builds equations by hand.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from . import _jax
from .errors import GraphError
from .graph import Graph, walk
from .living import evaluate
from .rules import Rules


def interpret(graph: Graph, rules: Rules, *values: Any) -> list[Any]:
    """Evaluate a graph with `rules` applied to each equation, going into sub-graphs.

    Args:
      graph: the graph.
      rules: the table; an equation without a rule is bound as it is.
      *values: the flat inputs, one for each of `graph.in_avals`.
    Returns:
      The flat outputs.
    """
    return evaluate(graph.jaxpr, rules, values)


def rewrite(graph: Graph, rules: Rules) -> Graph:
    """The graph with `rules` applied, of the same inputs and outputs; scopes and source lines stay.

    Raises:
      GraphError: a rule changed the shape or dtype of an output.
    """
    if not any(rules.table.get(eqn.primitive) or rules.default for _, eqn in walk(graph)):
        return graph
    names = _jax.unresolved(graph.jaxpr.jaxpr)
    new = _jax.stage_flat(lambda *values: interpret(graph, rules, *values), graph.in_avals, names)
    result = dataclasses.replace(graph, jaxpr=new)
    for k, (before, after) in enumerate(zip(graph.out_avals, result.out_avals, strict=True)):
        if (before.shape, before.dtype) != (after.shape, after.dtype):
            raise GraphError(
                f"{rules.name} changed output {k} of {graph.name} from {before.str_short()} to {after.str_short()}.",
                hint="a rule returns values of the shapes and dtypes of the equation that it replaces",
            )
    return result


def verify(graph: Graph) -> Graph:
    """Type-check a graph and return it.

    Raises:
      GraphError: an equation does not fit its primitive, or trees, paths and jaxpr disagree.
    """
    try:
        _jax.check_jaxpr(graph.jaxpr)
    except Exception as e:
        raise GraphError(f"{graph.name} is not well typed: {e}") from e
    counts = (graph.in_tree.num_leaves, len(graph.paths), len(graph.in_avals))
    if len(set(counts)) != 1 or graph.out_tree.num_leaves != len(graph.out_avals):
        raise GraphError(f"{graph.name} has {counts} input leaves, paths, variables; these must agree.")
    return graph
