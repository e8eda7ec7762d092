"""`vmap`: `jax.vmap` on functions and Graphs; in chunks, if the memory is bounded."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.tree_util import tree_leaves, tree_unflatten

from ..core.errors import OptionError, location
from ..core.graph import Graph
from ..core.signatures import name_of
from .chunking import chunked, in_chunks


def vmap(
    fun=None,
    in_axes: Any = 0,
    out_axes: Any = 0,
    axis_name=None,
    axis_size=None,
    spmd_axis_name=None,
    *,
    memory: int | str | None = None,
    chunk: int | None = None,
    **options,
):
    """Map a function over an axis of its arguments, as `jax.vmap` with its options.

    With `memory` or `chunk` the batch is mapped in a loop over chunks of equal size, and the function is compiled as by
    `jax.jit`: Python scalars are traced, and closed-over values are constants. The size of the chunks is chosen once per
    combination of argument types. Reverse mode through the loop keeps the residuals of all chunks, as it does without chunks:
    map `jax.checkpoint(fun)` to keep only its arguments. Under another vmap the budget is that of a lane.

    Args:
      fun: function or Graph.
      in_axes: the mapped axis of each argument; None for an argument that all lanes share. A tree prefix of the arguments.
      out_axes: the mapped axis of each result.
      axis_name: a name for collectives inside `fun`.
      axis_size: size of the mapped axis; a Graph needs it, since its batched arguments do not exist yet.
      memory: the budget in bytes of temporaries, without arguments and results: a number, "512MiB", or "50%" of the
        temporaries of the program without a budget. If that program exceeds the budget, the chunks are the largest that fit;
        on CPUs they use at most the size of the caches, and 24 MiB, since larger ones are slower.
      chunk: the largest number of lanes at a time.
    Returns:
      A function like `fun`, or the Graph of the batched function. Without `fun`, a decorator.
    Raises:
      OptionError: a Graph is given without `axis_size`; a batch with an `axis_name` needs chunks; or `memory` and `chunk`
        do not fit. Also a ValueError, like the errors of `jax.vmap` on sizes and axes.
      BudgetError: one lane needs more than `memory`; its `smallest` is what it needs. Also a ValueError.

    >>> vmap(lambda w, x: w @ x, (None, 0))(jax.numpy.ones((2, 3)), jax.numpy.ones((5, 3))).shape
    (5, 2)
    """
    options |= dict(in_axes=in_axes, out_axes=out_axes)
    options |= dict(axis_name=axis_name, axis_size=axis_size, spmd_axis_name=spmd_axis_name)
    if fun is None:
        return functools.partial(vmap, memory=memory, chunk=chunk, **options)
    if memory is None and chunk is None:
        mapped = jax.vmap(fun, **options)
    else:
        lanes = functools.partial(_lanes, fun, options)
        name = f"vmap of {name_of(fun)}"
        mapped = chunked(functools.partial(_program, fun, options), lanes, name, memory, chunk)
    if not isinstance(fun, Graph):
        return mapped
    if axis_size is None:
        raise OptionError(
            f"vmap of the graph {fun.name} needs the size of the batch.",
            hint="fg.vmap(graph, in_axes=..., axis_size=32)",
        )
    args, kwargs = tree_unflatten(fun.in_tree, fun.in_avals)
    try:
        avals = tree_leaves((_batched(in_axes, args, axis_size), _batched(0, kwargs, axis_size)))
    except ValueError:  # the axes do not fit: JAX raises the error
        jax.eval_shape(jax.vmap(fun, **options), *args, **kwargs)
        raise
    return fun.derive(mapped, f"vmap({fun.name})", avals)


def _batched(axes: Any, tree: Any, size: int) -> Any:
    """The avals of a batch: those of `tree` with an axis of `size`, at the places that its tree prefix `axes` gives."""

    def inserted(axis, aval):
        if axis is None:
            return aval
        k = axis + len(aval.shape) + 1 if axis < 0 else axis
        return aval.update(shape=(*aval.shape[:k], size, *aval.shape[k:]))

    return _by_axis(inserted, axes, tree)


def _by_axis(f: Callable, axes: Any, tree: Any) -> Any:
    """`f(axis, leaf)` for each leaf of `tree`; `axes` is a tree prefix of it."""
    axes = tuple(axes) if isinstance(axes, list) and isinstance(tree, tuple) else axes  # jax.vmap takes lists
    subtree = lambda axis, tree: jax.tree.map(lambda leaf: f(axis, leaf), tree)
    return jax.tree.map(subtree, axes, tree, is_leaf=lambda axis: axis is None)


# ------------------------------------------------------------------------------------------------ in chunks


def _program(fun: Callable, options: dict, chunk: int | None) -> Callable:
    """`fun` mapped `chunk` lanes at a time, or all at once."""
    if chunk is None:
        return jax.vmap(fun, **options)
    for name in ("axis_name", "spmd_axis_name"):
        if options[name] is not None:
            raise OptionError(
                f"vmap of {name_of(fun)} with {name}={options[name]!r} does not fit the budget at once, and collectives "
                "would see one chunk of the batch.",
                at=location(fun),
                hint=f"more memory=, or no {name}=",
            )

    def mapped(*args, **kwargs):
        def piece(start, size):
            lanes = lambda axis, x: x if axis is None else lax.dynamic_slice_in_dim(x, start, size, axis)
            args_lanes, kwargs_lanes = _by_axis(lanes, options["in_axes"], args), _by_axis(lanes, 0, kwargs)
            return jax.vmap(fun, **{**options, "axis_size": size})(*args_lanes, **kwargs_lanes)

        return in_chunks(piece, _lanes(fun, options, *args, **kwargs), chunk, options["out_axes"])

    return mapped


def _lanes(fun: Callable, options: dict, *args, **kwargs) -> int:
    """The size of the mapped axis; raises as `jax.vmap` does if the arguments have none, or several."""
    size = lambda axis, x: None if axis is None else jax.numpy.shape(x)[axis]
    try:
        sizes = tree_leaves((_by_axis(size, options["in_axes"], args), _by_axis(size, 0, kwargs)))
        (lanes,) = {options["axis_size"], *sizes} - {None}
        return lanes
    except (ValueError, IndexError):
        jax.eval_shape(jax.vmap(fun, **options), *args, **kwargs)
        raise
