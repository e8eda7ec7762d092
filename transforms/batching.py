"""`vmap`: one program for a batch, as `jax.vmap`, on functions and Graphs."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.tree_util import tree_unflatten

from .errors import OptionError
from .graph import Graph, trace


def vmap(fun=None, in_axes: Any = 0, out_axes: Any = 0, axis_name=None, axis_size=None, spmd_axis_name=None, **options):
    """Map a function over an axis of its arguments, as `jax.vmap` with its options.

    Args:
      fun: function or Graph.
      in_axes: which axis of each argument is mapped; None for an argument that all share. A tree prefix of the arguments.
      out_axes: where the mapped axis stands in each result.
      axis_name: a name for collectives inside `fun`.
      axis_size: size of the mapped axis; a Graph needs it, since its batched arguments do not exist yet.
    Returns:
      A function as `fun`, or the Graph of the batched function. Without `fun`, a decorator.
    Raises:
      OptionError: a Graph is given without `axis_size`. Also a ValueError, as all that `jax.vmap` raises on sizes and axes.

    >>> vmap(lambda w, x: w @ x, (None, 0))(jax.numpy.ones((2, 3)), jax.numpy.ones((5, 3))).shape
    (5, 2)
    """
    options = dict(
        options,
        in_axes=in_axes,
        out_axes=out_axes,
        axis_name=axis_name,
        axis_size=axis_size,
        spmd_axis_name=spmd_axis_name,
    )
    if fun is None:
        return functools.partial(vmap, **options)
    if not isinstance(fun, Graph):
        return jax.vmap(fun, **options)
    if axis_size is None:
        raise OptionError(
            f"vmap of the graph {fun.name} needs the size of the batch.",
            hint="fg.vmap(graph, in_axes=..., axis_size=32)",
        )
    batched = jax.vmap(fun.__call__, **options)
    args, kwargs = _batched_arguments(fun, in_axes, axis_size)
    graph = trace(batched, *args, **kwargs)
    return Graph(graph.jaxpr, graph.in_tree, graph.out_tree, fun.paths, f"vmap({fun.name})", fun.signature)


def _batched_arguments(graph: Graph, in_axes: Any, size: int) -> tuple[tuple, dict]:
    """The arguments of the batched graph: what the unbatched ones are, with an axis of `size` where `in_axes` says so."""
    args, kwargs = tree_unflatten(
        graph.in_tree, [jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type) for a in graph.in_avals]
    )

    def grow(axis, leaf):
        if axis is None:
            return leaf
        k = axis + len(leaf.shape) + 1 if axis < 0 else axis
        return jax.ShapeDtypeStruct((*leaf.shape[:k], size, *leaf.shape[k:]), leaf.dtype, weak_type=leaf.weak_type)

    def broadcast(axes, tree):
        return jax.tree.map(
            lambda axis, sub: jax.tree.map(lambda leaf: grow(axis, leaf), sub), axes, tree, is_leaf=lambda a: a is None
        )

    axes = in_axes if isinstance(in_axes, int) else tuple(in_axes)
    return broadcast(axes, args), broadcast(0, kwargs)
