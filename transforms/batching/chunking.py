"""Maps in chunks: how many lanes are computed at a time, so that XLA's temporaries stay within a budget.

What is mapped (`batching`, `jacobians`) gives its program for any size of a chunk. Here one size is chosen, once per wrapper and
types of arguments: bytes are predicted on a line through two sizes, and the program of the size that the line gives is compiled
and held to the budget.
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
    """What `program(None)` computes, in chunks where `memory` or `chunk` asks for them; compiled, as by `jax.jit`.

    Args:
      program: size of a chunk -> function that computes so many lanes at a time; None -> all at once.
      lanes: `lanes(*args, **kwargs)`: how many there are; raises what is wrong with the arguments.
      name: what errors call the program.
    Raises:
      OptionError: the options do not fit. Also a ValueError.
      BudgetError: at a call, a lane alone needs more than `memory`. Also a ValueError.
    """
    if memory is not None and chunk is not None:
        raise OptionError(f"{name} takes memory= or chunk=, and got both.", hint="leave chunk= out: memory= chooses it")
    if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1):
        raise OptionError(f"chunk= cannot be {chunk!r:.40}.", hint="a number of lanes, at least 1")
    budget = parse_bytes(memory) if chunk is None else 0
    jitted = functools.cache(lambda size: jax.jit(program(size)))
    sizes: dict[Any, int | None] = {}

    def chosen(args: tuple, kwargs: dict) -> int | None:
        count = lanes(*args, **kwargs)
        if chunk is not None:
            return _even(count, chunk) if chunk < count else None
        predicted = functools.cache(lambda size: _predicted(program(size), size, args, kwargs))
        measured = functools.cache(lambda size: _temp_bytes(program(size), jitted(size), args, kwargs))
        return _largest(count, budget, predicted, measured, name)

    def selected(args: tuple, kwargs: dict) -> Any:
        leaves, tree = tree_flatten((args, kwargs))
        types = tree, tuple(map(_jax.type_of, leaves))
        if types not in sizes:
            sizes[types] = chosen(args, kwargs)
        if isinstance(_jax.current_trace(), _jax.StagingTrace):  # anew, since what it closes over may be of that trace
            return jax.jit(program(sizes[types]), inline=_INLINE)
        return jitted(sizes[types])

    @functools.wraps(program(None))
    @_jax.api_boundary
    def mapped(*args, **kwargs):
        return selected(args, kwargs)(*args, **kwargs)

    # A call with known types is dispatched by JAX's C++ cache, which holds what ran for them before.
    return _jax.with_miss(
        jax.jit(mapped), lambda *args, **kwargs: _jax.dispatch_of(selected(args, kwargs)).miss(*args, **kwargs)
    )


def in_chunks(piece: Callable[[Any, int], Any], lanes: int, chunk: int, axes: Any) -> Any:
    """The results of all lanes, computed `chunk` at a time in one loop, each written where it belongs.

    The last chunk overlaps the one before where `chunk` does not divide `lanes`. Where there are effects, which must not
    happen twice, the lanes that are left are a piece of their own instead.

    Args:
      piece: `piece(start, size)`: the results of lanes start to start + size, a tree of arrays.
      axes: where the lanes stand in each result; None where they have none, and all chunks agree. A prefix of the tree.
    """
    graph = trace(lambda start: piece(start, chunk), np.int32(0))
    is_effectful = has_effects(graph.jaxpr)
    places: list[int | None] = []
    each = lambda axis, out: places.extend([axis] * len(tree_leaves(out)))
    jax.tree.map(each, axes, tree_unflatten(graph.out_tree, graph.out_avals), is_leaf=lambda axis: axis is None)
    places = [k if k is None else k % len(a.shape) for k, a in zip(places, graph.out_avals, strict=True)]

    def written(full, part, start):
        part = tree_leaves(part)
        update = lambda x, y, k: y if k is None else lax.dynamic_update_slice_in_dim(x, y, start, k)
        return [update(*xyk) for xyk in zip(full, part, places, strict=True)]

    def step(k, full):
        start = k * chunk if is_effectful else jnp.minimum(k * chunk, lanes - chunk)
        return written(full, graph(start), start)

    whole = lambda a, k: a.shape if k is None else (*a.shape[:k], lanes, *a.shape[k + 1 :])
    zeros = lambda a, k: manual_axes.vary(jnp.zeros(whole(a, k), a.dtype), manual_axes.axes_of(a))
    full = [zeros(a, k) for a, k in zip(graph.out_avals, places, strict=True)]
    count = lanes // chunk if is_effectful else -(-lanes // chunk)
    full = lax.fori_loop(np.int32(0), np.int32(count), step, full)
    if is_effectful and (rest := lanes % chunk):
        full = written(full, piece(np.int32(lanes - rest), rest), lanes - rest)
    weak = [
        _jax.cast(x, a) if getattr(a, "weak_type", False) else x for x, a in zip(full, graph.out_avals, strict=True)
    ]
    return tree_unflatten(graph.out_tree, weak)


def has_effects(jaxpr: Any) -> bool:
    """Whether it must not be run twice: names of axes may."""
    return any(not isinstance(e, _jax.NamedAxisEffect) for e in jaxpr.effects)


# ------------------------------------------------------------------------------------------------ the choice


def _even(lanes: int, most: int) -> int:
    """The size of chunks of at most `most` lanes that are as few as can be, and as equal."""
    return -(-lanes // -(-lanes // most))


def _largest(
    lanes: int,
    budget: int | float,
    predicted: Callable[[int | None], int],
    measured: Callable[[int | None], int],
    name: str,
) -> int | None:
    """The largest size of a chunk with which the program stays within the budget; None for all lanes at once.

    Args:
      budget: bytes; or a fraction, as a float, of what all lanes at once take.
      predicted, measured: bytes of temporaries of the program with a size; to measure is to compile.
    """
    is_part = isinstance(budget, float)
    if is_part:
        budget = math.floor(budget * measured(None)) if budget < 1 else measured(None)
    if (is_part or predicted(None) <= 2 * budget) and measured(None) <= budget:  # predictions are good to a factor of 2
        return None
    if lanes < 2:
        raise _too_small(name, lanes, budget, measured(None), measured(None))
    few, most = _even(lanes, -(-lanes // 4)), -(-lanes // 2)
    slope = (predicted(most) - predicted(few)) / (most - few) if most > few else predicted(few)
    fixed = predicted(few) - slope * few
    cap = _most_on_cpu() if jax.default_backend() == "cpu" else math.inf
    tried: dict[int, int] = {}
    while True:
        within = min(budget - fixed, cap) / slope if slope > 0 else most
        size = _even(lanes, max(1, min(most, int(within))))
        fits = [k for k, found in tried.items() if found <= budget]
        if fits and (len(tried) >= 3 or size < 1.25 * max(fits) or size in tried):
            return max(fits)
        if tried and not fits:
            if min(tried) == 1:
                if measured(None) <= budget:  # chunks need what lanes share as well, and are not simplified as far
                    return None
                raise _too_small(name, lanes, budget, min(tried.values()), measured(None))
            size = min(size, _even(lanes, min(tried) - 1 if len(tried) == 1 else min(tried) // 2))
        before, tried[size] = [*tried.items()][-1:], measured(size)
        if before:  # now the line goes through what was measured
            ((other, found),) = before
            slope = (tried[size] - found) / (size - other)
            fixed = found - slope * other
        else:
            fixed = tried[size] - slope * size
            fixed = fixed if slope and 0 < fixed < budget else 0
            slope = (tried[size] - fixed) / size


def _most_on_cpu() -> int:
    """The bytes that a chunk may have on a CPU, whatever the budget, since larger ones are slower.

    They stay near, and leave some room there for what the chunk reads. And XLA, which asks for all of them at once and at every
    call, gets memory that the process has: from 32 MiB on glibc takes it from the system each time, page by page (mallopt(3),
    M_MMAP_THRESHOLD), which takes longer than the arithmetic.
    """
    return min(cache_bytes() * 7 // 8, 24 * 2**20)


def _too_small(name: str, lanes: int, budget: float, of_one: int, of_all: int) -> BudgetError:
    smallest = min(of_one, of_all)
    what = f"one of its {lanes} lanes at a time" if of_one <= of_all else f"its {lanes} lanes at once"
    error = BudgetError(
        f"{name} needs {format_bytes(smallest)} of temporaries for {what}, and memory= allows {format_bytes(budget)}.",
        hint=f"memory={smallest} is the least; jax.checkpoint inside of the function, or smaller arguments, lower it",
    )
    error.smallest = smallest
    return error


def _predicted(f: Callable, size: int | None, args: tuple, kwargs: dict) -> int:
    """The temporaries of a program. A loop over chunks writes its results in place, where the model makes room for them."""
    graph = trace(f, *args, **kwargs)
    in_place = 0 if size is None else sum(math.prod(a.shape) * a.dtype.itemsize for a in graph.out_avals)
    return max(0, cost(graph).temp_bytes - in_place)


def _temp_bytes(f: Callable, jitted: Any, args: tuple, kwargs: dict) -> int:
    """The temporaries of a compiled program, as XLA counts them; what is compiled here is what a call outside of a trace runs.

    Inside of a trace closed-over values become arguments. What names mesh axes compiles with its surroundings only, so there
    the prediction stands for it.
    """
    if not _jax.is_tracing():
        return jitted.lower(*args, **kwargs).compile().memory_analysis().temp_size_in_bytes
    graph = trace(f, *args, **kwargs)
    types = [*map(jax.typeof, graph.jaxpr.consts), *graph.in_avals]
    is_named = any(isinstance(e, _jax.NamedAxisEffect) for e in graph.jaxpr.effects)
    if is_named or not jax.sharding.get_abstract_mesh().empty or not all(map(_jax.is_array, types)):
        return cost(graph).temp_bytes
    run = _jax.jaxpr_as_fun(_jax.close(_jax.convert_constvars_jaxpr(graph.jaxpr.jaxpr)))
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type) for a in types]
    alone: Any = jax.jit(lambda *values: run(*values))
    return alone.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
