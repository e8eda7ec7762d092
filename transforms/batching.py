"""`vmap`: one program for a batch, as `jax.vmap`, on functions and Graphs."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.tree_util import tree_unflatten

from .errors import OptionError
from .graph import Graph


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
    args, kwargs = tree_unflatten(fun.in_tree, fun.in_avals)
    axes = in_axes if in_axes is None or isinstance(in_axes, int) else tuple(in_axes)
    try:
        avals = jax.tree.leaves((_batched(axes, args, axis_size), _batched(0, kwargs, axis_size)))
    except ValueError:  # JAX says how the axes do not fit the arguments
        jax.eval_shape(jax.vmap(fun, **options), *args, **kwargs)
        raise
    return fun.derive(jax.vmap(fun, **options), f"vmap({fun.name})", avals)


def _batched(axes: Any, tree: Any, size: int) -> Any:
    """The types of a batch: `tree` with an axis of `size` where `axes`, a tree prefix of it, says so."""

    def grow(axis, aval):
        if axis is None:
            return aval
        k = axis + len(aval.shape) + 1 if axis < 0 else axis
        return aval.update(shape=(*aval.shape[:k], size, *aval.shape[k:]))

    each = lambda axis, subtree: jax.tree.map(lambda aval: grow(axis, aval), subtree)
    return jax.tree.map(each, axes, tree, is_leaf=lambda axis: axis is None)
