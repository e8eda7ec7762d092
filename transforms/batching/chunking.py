"""Maps in chunks of lanes, whose size keeps XLA's temporaries within a budget.

`vmap` and the Jacobians give their program as a function of the size of a chunk. One size is chosen per wrapper and combination
of argument types: a line through the predicted bytes of two sizes gives a size, and its program is compiled and measured.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import tree_flatten, tree_leaves, tree_unflatten

from ..core import _jax, manual_axes
from ..core.errors import BudgetError, OptionError
from ..core.graph import trace
from ..cost.device import cache_bytes
from ..cost.formatting import format_bytes, parse_bytes
from ..cost.table import cost

_INLINE = jax.Inline.JAX_EARLY if hasattr(jax, "Inline") else True
Program = Callable[[int | None], Callable]


def chunked(program: Program, lanes: Callable[..., int], name: str, memory: Any, chunk: int | None) -> Callable:
    """`program(None)` compiled, as by `jax.jit`, in chunks if `memory` or `chunk` demands it.

    Args:
      program: size of a chunk -> function that computes so many lanes at a time; None -> all at once.
      lanes: `lanes(*args, **kwargs)` is the number of lanes; raises if the arguments do not fit.
      name: of the program in errors.
    Raises:
      OptionError: the options do not fit. Also a ValueError.
      BudgetError: at a call, one lane needs more than `memory`. Also a ValueError.
    """
    if memory is not None and chunk is not None:
        raise OptionError(f"{name} takes memory= or chunk=, and got both.", hint="leave chunk= out: memory= chooses it")
    if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1):
        raise OptionError(f"chunk= cannot be {chunk!r:.40}.", hint="a number of lanes, at least 1")
    budget = parse_bytes(memory) if chunk is None else 0
    jitted = functools.cache(lambda size: jax.jit(program(size)))
    sizes: dict[Any, int | None] = {}

    def chunk_size(args: tuple, kwargs: dict) -> int | None:
        count = lanes(*args, **kwargs)
        if chunk is not None:
            return _even(count, chunk) if chunk < count else None
        predicted = functools.cache(lambda size: _predicted(program(size), size, args, kwargs))
        measured = functools.cache(lambda size: _temp_bytes(program(size), jitted(size), args, kwargs))
        return _largest(count, budget, predicted, measured, name)

    def jitted_for(args: tuple, kwargs: dict) -> Any:
        leaves, tree = tree_flatten((args, kwargs))
        types = tree, tuple(map(_jax.type_of, leaves))
        if types not in sizes:
            sizes[types] = chunk_size(args, kwargs)
        if isinstance(_jax.current_trace(), _jax.StagingTrace):  # a new jit: it may close over tracers of this trace
            return jax.jit(program(sizes[types]), inline=_INLINE)
        return jitted(sizes[types])

    @functools.wraps(program(None))
    @_jax.api_boundary
    def mapped(*args, **kwargs):
        return jitted_for(args, kwargs)(*args, **kwargs)

    # JAX's C++ cache dispatches calls of types that it has seen, to the program that a miss returned.
    return _jax.with_miss(
        jax.jit(mapped), lambda *args, **kwargs: _jax.dispatch_of(jitted_for(args, kwargs)).miss(*args, **kwargs)
    )


def in_chunks(piece: Callable[[Any, int], Any], lanes: int, chunk: int, axes: Any) -> Any:
    """The results of all lanes, computed `chunk` at a time in one loop that carries the results and updates them in place.

    If `chunk` does not divide `lanes`, the last chunk overlaps the one before. With effects, which must not happen twice, the
    remaining lanes are computed after the loop instead.

    Args:
      piece: `piece(start, size)` is the tree of results of lanes start to start + size.
      axes: the axis of lanes in each result; None for a result without lanes, equal in all chunks. A tree prefix.
    """
    graph = trace(lambda start: piece(start, chunk), np.int32(0))
    is_effectful = has_effects(graph.jaxpr)
    leaf_axes: list[int | None] = []
    extend = lambda axis, out: leaf_axes.extend([axis] * len(tree_leaves(out)))
    jax.tree.map(extend, axes, tree_unflatten(graph.out_tree, graph.out_avals), is_leaf=lambda axis: axis is None)
    leaf_axes = [k if k is None else k % len(a.shape) for k, a in zip(leaf_axes, graph.out_avals, strict=True)]

    def updated(results, part, start):
        update = lambda x, y, k: y if k is None else lax.dynamic_update_slice_in_dim(x, y, start, k)
        return list(map(update, results, tree_leaves(part), leaf_axes))

    def step(k, results):
        start = k * chunk if is_effectful else jnp.minimum(k * chunk, lanes - chunk)
        return updated(results, graph(start), start)

    shape = lambda a, k: a.shape if k is None else (*a.shape[:k], lanes, *a.shape[k + 1 :])
    zeros = lambda a, k: manual_axes.vary(jnp.zeros(shape(a, k), a.dtype), manual_axes.axes_of(a))
    results = list(map(zeros, graph.out_avals, leaf_axes))
    count = lanes // chunk if is_effectful else -(-lanes // chunk)
    results = lax.fori_loop(np.int32(0), np.int32(count), step, results)
    if is_effectful and (rest := lanes % chunk):
        results = updated(results, piece(np.int32(lanes - rest), rest), lanes - rest)
    typed = lambda x, a: _jax.cast(x, a) if getattr(a, "weak_type", False) else x
    return tree_unflatten(graph.out_tree, list(map(typed, results, graph.out_avals)))


def has_effects(jaxpr: Any) -> bool:
    """Whether a second run would repeat an effect; names of mesh axes are none."""
    return any(not isinstance(e, _jax.NamedAxisEffect) for e in jaxpr.effects)


# ------------------------------------------------------------------------------------------------ size of a chunk

Bytes = Callable[[int | None], int]  # size of a chunk, or None for all lanes at once -> bytes of temporaries


def _even(lanes: int, limit: int) -> int:
    """The size of the fewest chunks of at most `limit` lanes, as equal as possible."""
    return -(-lanes // -(-lanes // limit))


def _largest(lanes: int, budget: int | float, predicted: Bytes, measured: Bytes, name: str) -> int | None:
    """The largest size of a chunk that keeps to the budget; None for all lanes at once.

    bytes(size) ≈ fixed + slope · size, at first through two predictions, then through the last measurements.

    Args:
      budget: bytes; or, as a float, a fraction of the bytes of all lanes at once.
      predicted, measured: bytes of temporaries; `measured` compiles the program.
    """
    is_part = isinstance(budget, float)
    if is_part:
        budget = math.floor(budget * measured(None)) if budget < 1 else measured(None)
    if (is_part or predicted(None) <= 2 * budget) and measured(None) <= budget:  # predictions may be twice too large
        return None
    if lanes < 2:
        raise _too_small(name, lanes, budget, measured(None), measured(None))
    quarter, half = _even(lanes, -(-lanes // 4)), -(-lanes // 2)
    slope = (predicted(half) - predicted(quarter)) / (half - quarter) if half > quarter else predicted(quarter)
    fixed = predicted(quarter) - slope * quarter
    cap = _cpu_limit_bytes() if jax.default_backend() == "cpu" else math.inf
    tried: dict[int, int] = {}  # size -> measured bytes, in the order of the measurements
    while True:
        limit = min(budget - fixed, cap) / slope if slope > 0 else half
        size = _even(lanes, max(1, min(half, int(limit))))
        fitting = [k for k, nbytes in tried.items() if nbytes <= budget]
        if fitting and (len(tried) >= 3 or size < 1.25 * max(fitting) or size in tried):
            return max(fitting)
        if tried and not fitting:
            if min(tried) == 1:
                if (
                    measured(None) <= budget
                ):  # a loop also carries values that all lanes share, and XLA simplifies it less
                    return None
                raise _too_small(name, lanes, budget, min(tried.values()), measured(None))
            size = min(size, _even(lanes, min(tried) - 1 if len(tried) == 1 else min(tried) // 2))
        previous = next(reversed(tried), None)
        tried[size] = measured(size)
        if previous is not None:
            slope = (tried[size] - tried[previous]) / (size - previous)
            fixed = tried[previous] - slope * previous
        else:
            fixed = tried[size] - slope * size
            fixed = fixed if slope and 0 < fixed < budget else 0
            slope = (tried[size] - fixed) / size


def _cpu_limit_bytes() -> int:
    """The largest bytes of a chunk on a CPU, whatever the budget: larger chunks are slower.

    The temporaries stay in the caches, with an eighth left for operands. And they are below 32 MiB, from where on glibc maps new
    pages for each allocation (mallopt(3), M_MMAP_THRESHOLD), which takes longer than the arithmetic: XLA allocates all
    temporaries at once, at every call.
    """
    return min(cache_bytes() * 7 // 8, 24 * 2**20)


def _too_small(name: str, lanes: int, budget: float, lane_bytes: int, all_bytes: int) -> BudgetError:
    smallest = min(lane_bytes, all_bytes)
    part = f"one of its {lanes} lanes at a time" if lane_bytes <= all_bytes else f"its {lanes} lanes at once"
    error = BudgetError(
        f"{name} needs {format_bytes(smallest)} of temporaries for {part}, and memory= allows {format_bytes(budget)}.",
        hint=f"memory={smallest} is the least; jax.checkpoint inside of the function, or smaller arguments, lower it",
    )
    error.smallest = smallest
    return error


def _predicted(f: Callable, size: int | None, args: tuple, kwargs: dict) -> int:
    """The temporaries of a program: the model's, without the results that a loop over chunks updates in place."""
    graph = trace(f, *args, **kwargs)
    in_place = 0 if size is None else sum(math.prod(a.shape) * a.dtype.itemsize for a in graph.out_avals)
    return max(0, cost(graph).temp_bytes - in_place)


def _temp_bytes(f: Callable, jitted: Any, args: tuple, kwargs: dict) -> int:
    """The temporaries of the compiled program, as XLA counts them. Outside of a trace, a call runs the same executable.

    Inside of a trace closed-over values become arguments. A program with names of mesh axes cannot be compiled alone; its bytes
    are predicted.
    """
    if not _jax.is_tracing():
        return jitted.lower(*args, **kwargs).compile().memory_analysis().temp_size_in_bytes
    graph = trace(f, *args, **kwargs)
    avals = [*map(jax.typeof, graph.jaxpr.consts), *graph.in_avals]
    has_axis_names = any(isinstance(e, _jax.NamedAxisEffect) for e in graph.jaxpr.effects)
    if has_axis_names or not jax.sharding.get_abstract_mesh().empty or not all(map(_jax.is_array, avals)):
        return cost(graph).temp_bytes
    run = _jax.jaxpr_as_fun(_jax.close(_jax.convert_constvars_jaxpr(graph.jaxpr.jaxpr)))
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type) for a in avals]
    jitted = jax.jit(lambda *values: run(*values))
    return jitted.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
