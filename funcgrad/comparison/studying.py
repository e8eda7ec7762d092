"""`study`: run a function eagerly, traced and compiled, and set side by side what each does."""

from __future__ import annotations

import contextlib
import io
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path

from ..recording import Node, Tape, tape
from ..transforms import _jax, layouts
from ..transforms.arguments import argument_names, described, name_of, without_static
from ..transforms.compilation import jit
from ..transforms.costs.operations import nbytes
from ..transforms.errors import ArgumentError
from ..transforms.graph import Graph, trace, walk
from ..transforms.kernels import compiled
from .noticing import noticing
from .refusing import refusal
from .reporting import Comparison, Constant, Difference, Study, Times

WITHIN_S = 0.5  # that calls of each kind are timed


def study(
    f: Callable,
    /,
    *args: Any,
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
    others: Sequence[tuple] = (),
    **kwargs: Any,
) -> Study:
    """Tracing beside eager execution: what each does with a function, in one report.

    Runs `f` eagerly on a tape, traces it, compiles it and times each. So `f` runs several times; what it prints is kept.

    Args:
      f: a function of pytrees of arrays.
      *args, **kwargs: its arguments, with values.
      static_argnums, static_argnames: as in `jax.jit`.
      others: further positional arguments, one tuple for each call, to see whether it is traced again, and why.
    Returns:
      Study: its text is the report; also in notebooks, as HTML by `.save(path)`, and as `.dict()`.
    Raises:
      Whatever `f` raises when it runs eagerly. If it cannot be traced, the study says why.

    >>> def f(x):
    ...     for _ in range(3):
    ...         x = jnp.sin(x)
    ...     return x
    >>> s = study(f, jnp.ones(4))
    >>> s.eager_operations, s.traced_equations, s.kernels.kernels[0].kind
    (3, 3, 'fusion')
    """
    if not callable(f):
        raise ArgumentError(f"study takes a function, and got {type(f).__name__}.", inputs=f"{f!r:.60}")
    options: dict[str, Any] = {"static_argnums": static_argnums, "static_argnames": static_argnames}
    g, given, named, signature = without_static(f, args, kwargs, **options)
    with noticing(f) as eager, tape() as t:
        out = f(*args, **kwargs)
    eager_s = _seconds(lambda: f(*args, **kwargs))
    paths, leaves = described(given, named, signature)
    every = _arguments(f, args, kwargs)
    static = {name: every[name] for name in every if name not in _arguments(g, given, named)}
    graph, refused, kernels, difference, times = None, None, None, None, Times(eager_s, None, None)
    retraces: list[str] = []
    with noticing(f) as noticed:
        try:
            graph = trace(g, *given, **named)
        except Exception as error:
            refused = refusal(error, t.nodes)
            if refused is None:
                raise
    if graph is not None:
        kernels = compiled(graph, *given, **named)
        jitted = jit(f, **options)
        with contextlib.redirect_stdout(io.StringIO()):
            start_s = time.perf_counter()
            result = jax.block_until_ready(jitted(*args, **kwargs))
            first_s = time.perf_counter() - start_s
            times = Times(eager_s, first_s, _seconds(lambda: jitted(*args, **kwargs)))
            difference = _difference(out, result, t, graph)
            for other in others:
                jitted(*other, **kwargs)
        retraces = [str(entry) for entry in jitted.retraces]
    return Study(
        name=name_of(f),
        noticed=noticed if graph is not None else eager,
        eager_operations=len(t),
        traced_equations=_equations(graph) if graph is not None else None,
        constants=_constants(f, graph) if graph is not None else (),
        fixed=tuple(_fixed(paths, leaves, static)),
        retraces=tuple(retraces),
        kernels=kernels,
        eager_peak_bytes=_peak_bytes(t.nodes),
        times=times,
        difference=difference,
        refusal=refused,
        tape=t,
        graph=graph,
    )


def compare(*studies: Study) -> Comparison:
    """Several studies, of functions or of arguments, in one table.

    Args:
      *studies: what `study` returned.

    >>> one, two = (study(f, jnp.ones(4)) for f in (jnp.sin, jnp.cos))
    >>> print(compare(one, two).rows[0]["function"], len(compare(one, two).rows))
    sin 2
    """
    return Comparison(studies)


# ------------------------------------------------------------------------------------------------ what is counted


def _seconds(call: Callable[[], Any]) -> float:
    """The least time of a call, of those within half a second."""
    times: list[float] = []
    with contextlib.redirect_stdout(io.StringIO()):
        while not times or (sum(times) < WITHIN_S and len(times) < 100):
            start_s = time.perf_counter()
            jax.block_until_ready(call())
            times.append(time.perf_counter() - start_s)
    return min(times[1:] or times)


def _equations(graph: Graph) -> int:
    """Operations of a graph, bodies of loops and branches once."""
    return sum(not layouts.bodies(eqn) for _, eqn in walk(graph))


def _peak_bytes(nodes: Sequence[Node]) -> int:
    """The most bytes of results alive at a time in an eager run that drops each after its last use."""
    last = {key: node.index for node in nodes for key in node.parents if key}
    live = peak = 0
    ends: dict[int, int] = {}
    for node in nodes:
        for k, x in enumerate(node.outputs):
            size = nbytes(jax.typeof(x))
            live += size
            if (end := last.get((node.index, k))) is not None:
                ends[end] = ends.get(end, 0) + size
        peak = max(peak, live)
        live -= ends.pop(node.index, 0)
    return peak


def _constants(f: Callable, graph: Graph) -> tuple[Constant, ...]:
    """The arrays that a graph closed over, with the names that the function has for them."""
    function = getattr(f, "__wrapped__", f)
    code = getattr(function, "__code__", None)
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True) if code else ()
    named = {name: cell.cell_contents for name, cell in cells if _is_filled(cell)}
    named |= {
        name: function.__globals__[name] for name in (code.co_names if code else ()) if name in function.__globals__
    }
    names: dict[int, str] = {}
    for name, value in named.items():
        with contextlib.suppress(Exception):  # a value of any kind: what is no tree has no leaves to name
            names |= {id(leaf): name + keystr(path) for path, leaf in tree_leaves_with_path(value)}
    found = [(c, names.get(id(c), "")) for c in graph.jaxpr.consts]
    return tuple(Constant(name, jax.typeof(c).str_short(short_dtypes=True), nbytes(jax.typeof(c))) for c, name in found)


def _arguments(f: Callable, args: tuple, kwargs: dict) -> dict[str, Any]:
    """name -> value of a call."""
    return dict(zip(argument_names(_jax.signature_of(f), len(args)), args, strict=True)) | kwargs


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _fixed(paths: Sequence[str], leaves: Sequence[Any], static: dict[str, Any]) -> list[str]:
    """What a trace is made for: others of these are traced again."""
    found = [f"{name} = {value!r:.40} is static: each other value is traced again" for name, value in static.items()]
    for path, leaf in zip(paths, leaves, strict=True):
        aval = jax.typeof(leaf)
        text = aval.str_short(short_dtypes=True)
        if isinstance(leaf, int | float | complex):
            found.append(f"{path} is a Python number, {text} of weak type: an array of {aval.dtype} is traced again")
        else:
            found.append(f"{path} is {text}: another shape or dtype is traced again")
    return found


# ------------------------------------------------------------------------------------------------ values


def _difference(eager: Any, other: Any, t: Tape, graph: Graph) -> Difference | None:
    """Where eager and compiled values first differ; None if they are close."""
    gap = _gap(jax.tree.leaves(eager), jax.tree.leaves(other))
    if gap is None:
        return None
    values = [x for node in t.nodes for x in node.outputs]
    inputs = {f"x{k}": x for k, x in enumerate(t.given())}
    again = jax.jit(t.graph(inputs, values))(**inputs)
    makers = [node for node in t.nodes for _ in node.outputs]
    for node, x, y in zip(makers, values, again, strict=True):
        if _gap([x], [y]) is not None:
            return Difference(gap, str(node.primitive), node.scope, node.line or "")
    return Difference(gap, "", "", "")


def _gap(eager: Sequence[Any], other: Sequence[Any]) -> float | None:
    """How far values are apart, as a part of the largest; None if by rounding alone."""
    worst = None
    for a, b in zip(eager, other, strict=True):
        a, b = jnp.asarray(a), jnp.asarray(b)
        if not jnp.issubdtype(a.dtype, jnp.number) or a.size == 0:
            continue
        eps = float(jnp.finfo(a.dtype).eps) if jnp.issubdtype(a.dtype, jnp.inexact) else 0.0
        x, y = (np.asarray(v, np.complex128 if jnp.iscomplexobj(v) else np.float64) for v in (a, b))
        same = (x == y) | (np.isnan(x) & np.isnan(y))
        apart = np.where(same, 0, np.abs(x - y))
        scale = max(float(np.max(np.abs(np.where(np.isfinite(x), x, 0)))), 1e-30)
        gap = float(np.max(np.where(np.isnan(apart), math.inf, apart))) / scale
        if gap > 64 * eps and gap > (worst or 0):
            worst = gap
    return worst
