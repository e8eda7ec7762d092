"""`vmap`: one program for a batch, as `jax.vmap`, on functions and Graphs; in chunks, where memory is bounded."""

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
    `jax.jit`: Python scalars are traced, and closed-over values are constants. The chunks are chosen once per types of
    arguments. Reverse mode through the loop keeps the residuals of all chunks, as it does without: map
    `jax.checkpoint(fun)` to keep its arguments alone. Under another vmap the budget is that of a lane.

    Args:
      fun: function or Graph.
      in_axes: which axis of each argument is mapped; None for an argument that all share. A tree prefix of the arguments.
      out_axes: where the mapped axis stands in each result.
      axis_name: a name for collectives inside `fun`.
      axis_size: size of the mapped axis; a Graph needs it, since its batched arguments do not exist yet.
      memory: bytes of temporaries, arguments and results not among them, that the program may use: a number, "512MiB", or
        "50%" of those of the program without a budget, which it is where it fits. Else the chunks are the largest that fit;
        on CPUs none uses more than the caches hold, 24 MiB at most, since larger ones are slower.
      chunk: at most so many lanes at a time, by hand.
    Returns:
      A function as `fun`, or the Graph of the batched function. Without `fun`, a decorator.
    Raises:
      OptionError: a Graph is given without `axis_size`; the batch is cut, and has an `axis_name`; or `memory` and `chunk`
        do not fit. Also a ValueError, as all that `jax.vmap` raises on sizes and axes.
      BudgetError: one lane needs more than `memory`; `smallest` says how much. Also a ValueError.

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
    axes = in_axes if in_axes is None or isinstance(in_axes, int) else tuple(in_axes)
    try:
        avals = jax.tree.leaves((_batched(axes, args, axis_size), _batched(0, kwargs, axis_size)))
    except ValueError:  # JAX says how the axes do not fit the arguments
        jax.eval_shape(jax.vmap(fun, **options), *args, **kwargs)
        raise
    return fun.derive(mapped, f"vmap({fun.name})", avals)


def _batched(axes: Any, tree: Any, size: int) -> Any:
    """The types of a batch: `tree` with an axis of `size` where `axes`, a tree prefix of it, says so."""

    def grow(axis, aval):
        if axis is None:
            return aval
        k = axis + len(aval.shape) + 1 if axis < 0 else axis
        return aval.update(shape=(*aval.shape[:k], size, *aval.shape[k:]))

    return _by_axis(grow, axes, tree)


def _by_axis(f: Callable, axes: Any, tree: Any) -> Any:
    """`f(axis, leaf)` for each leaf of `tree`; `axes` is a tree prefix of it."""
    each = lambda axis, subtree: jax.tree.map(lambda leaf: f(axis, leaf), subtree)
    return jax.tree.map(each, axes, tree, is_leaf=lambda axis: axis is None)


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
            cut = lambda axis, x: x if axis is None else lax.dynamic_slice_in_dim(x, start, size, axis)
            given, named = _by_axis(cut, _axes(options), args), _by_axis(cut, 0, kwargs)
            return jax.vmap(fun, **{**options, "axis_size": size})(*given, **named)

        return in_chunks(piece, _lanes(fun, options, *args, **kwargs), chunk, options["out_axes"])

    return mapped


def _axes(options: dict) -> Any:
    return tuple(options["in_axes"]) if isinstance(options["in_axes"], list) else options["in_axes"]


def _lanes(fun: Callable, options: dict, *args, **kwargs) -> int:
    """The size of the mapped axis; raises as `jax.vmap` does where the arguments have none, or several."""
    size = lambda axis, x: None if axis is None else jax.numpy.shape(x)[axis]
    try:
        found = {options["axis_size"], *tree_leaves((_by_axis(size, _axes(options), args), _by_axis(size, 0, kwargs)))}
        (lanes,) = found - {None}
        return lanes
    except (ValueError, IndexError):
        jax.eval_shape(jax.vmap(fun, **options), *args, **kwargs)
        raise
