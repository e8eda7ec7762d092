"""`study`: run a function eagerly, traced and compiled, and set side by side what each does."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path

from ..transforms.compilation.jit import jit
from ..transforms.compilation.kernels.table import compiled
from ..transforms.core import _jax, subjaxprs
from ..transforms.core.errors import ArgumentError, OptionError
from ..transforms.core.graph import Graph, trace, walk
from ..transforms.core.signatures import argument_names, name_of, named_leaves, without_static
from ..transforms.cost.operations import nbytes
from .advice import refusal
from .line_tracing import noticing, silent
from .report import Comparison, Constant, Difference, Study, Times
from .tape import Node, Tape, tape

WITHIN_S, CALLS = 0.5, 100  # calls of each kind are timed within so long, and at most so many


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

    Traces `f`, runs it eagerly on a tape, compiles it, and times each way within half a second, up to 100 calls. Each call has
    copies of the arguments; what else `f` changes, it changes as often. What it prints is kept.

    Args:
      f: a function of pytrees of arrays.
      *args, **kwargs: its arguments, with values.
      static_argnums, static_argnames: as in `jax.jit`; those of a jitted `f` if not given.
      others: further positional arguments, one tuple for each call, to see whether it is traced again, and why.
    Returns:
      Study: its text is the report; also in notebooks, as HTML by `.save(path)`, and as `.dict()`.
    Raises:
      Whatever `f` raises when it runs eagerly. If it cannot be traced, the study says why. OptionError: `others` are no tuples.

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
    if not all(isinstance(other, tuple) for other in others):
        raise OptionError("study needs others= to be tuples of positional arguments.", hint="others=[(x,), (y,)]")
    plain: Callable = f
    if hasattr(f, "lower") and hasattr(f, "__wrapped__"):  # jitted: what it compiles, not what that wraps in turn
        plain = f.__wrapped__
        if isinstance(f, type(jax.jit(abs))) and static_argnums == static_argnames == ():
            _, _, numbers, static_argnames = _jax.dispatch_of(f)
            static_argnums = [k for k in numbers if -len(args) <= k < len(args)]
    options: dict[str, Any] = {"static_argnums": static_argnums, "static_argnames": static_argnames}
    given: Callable[[], tuple] = lambda: _copied((args, kwargs))
    graph, failed = None, None
    with noticing(plain) as noticed:
        try:
            some, named = given()
            g, some, named, signature = without_static(plain, some, named, **options)
            graph = trace(g, *some, **named)
        except Exception as error:
            failed = error
    arguments = given()
    with noticing(plain) as eager, tape() as t:
        out = _called(plain, arguments)
    eager_s = _seconds(plain, given)
    paths: list[str] = []
    leaves: list[Any] = []
    static: dict[str, Any] = {}
    kernels, difference, times = None, None, Times(eager_s, None, None)
    retraces: list[str] = []
    if graph is not None:
        paths, leaves = named_leaves(some, named, signature)
        every, dynamic = (_arguments(h, *a) for h, a in ((plain, (args, kwargs)), (g, (some, named))))
        static = {name: value for name, value in every.items() if name not in dynamic}
        kernels = compiled(graph, *some, **named)
        jitted = jit(_Anew(plain), **options)
        start_s = time.perf_counter()
        with silent():
            result = jax.block_until_ready(_called(jitted, given()))
            first_s = time.perf_counter() - start_s
            times = Times(eager_s, first_s, _seconds(jitted, given))
            difference = _difference(out, result, t, graph)
            for other in others:
                _called(jitted, _copied((other, kwargs)))
        retraces = [str(entry) for entry in jitted.retraces]
    return Study(
        name=name_of(f),
        noticed=noticed if graph is not None else eager,
        eager_operations=len(t),
        traced_equations=_equations(graph) if graph is not None else None,
        constants=_constants(plain, graph) if graph is not None else (),
        fixed=tuple(_fixed(paths, leaves, static)),
        retraces=tuple(retraces),
        kernels=kernels,
        eager_peak_bytes=_peak_bytes(t.nodes),
        times=times,
        difference=difference,
        refusal=refusal(failed, t.nodes) if failed else None,
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
    if not studies or not all(isinstance(s, Study) for s in studies):
        raise ArgumentError("compare takes one or more studies.", hint="fg.compare(fg.study(f, x), fg.study(g, x))")
    return Comparison(studies)


# ------------------------------------------------------------------------------------------------ what is counted


def _copied(arguments: tuple) -> tuple:
    """Arguments of their own, which may be donated; NumPy's arrays as JAX's, as they are when traced."""
    copy = lambda x: x.copy() if isinstance(x, jax.Array) else jnp.asarray(x) if isinstance(x, np.ndarray) else x
    return jax.tree.map(copy, arguments)


def _called(f: Callable, arguments: tuple) -> Any:
    args, kwargs = arguments
    return f(*args, **kwargs)


class _Anew:
    """A function that no cache of JAX has seen, whatever it was called with before; it has a hash."""

    def __init__(self, f: Callable):
        self.f, self.__name__, self.__signature__ = f, name_of(f), _jax.signature_of(f)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.f(*args, **kwargs)


def _seconds(f: Callable, given: Callable[[], tuple]) -> float:
    """The least time of a call, of those within half a second, after one that compiles."""
    times: list[float] = []
    with silent():
        jax.block_until_ready(_called(f, given()))
        while not times or (sum(times) < WITHIN_S and len(times) < CALLS):
            arguments = jax.block_until_ready(given())
            start_s = time.perf_counter()
            jax.block_until_ready(_called(f, arguments))
            times.append(time.perf_counter() - start_s)
    return min(times)


def _equations(graph: Graph) -> int:
    """Operations of a graph, bodies of loops and branches once."""
    return sum(not subjaxprs.bodies(eqn) for _, eqn in walk(graph))


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
    """The arrays that a graph closed over, at any depth, with the names that the function has for them."""
    every = [*graph.jaxpr.consts]
    every += [c for _, eqn in walk(graph) for body in subjaxprs.bodies(eqn) for c in body.jaxpr.consts]
    arrays = list({id(c): c for c in every if hasattr(c, "shape")}.values())
    names = [(name, leaf) for name, value in _reachable(f, "", 3) for name, leaf in _arrays(name, value)]

    def name_of(c: Any) -> str:
        same = (name for name, leaf in names if leaf is c)
        copies = (name for name, leaf in names if isinstance(leaf, np.ndarray) and np.array_equal(leaf, c))
        return next(same, "") or next(copies, "")

    sizes = ((c, jax.typeof(c)) for c in arrays)
    return tuple(Constant(name_of(c), t.str_short(short_dtypes=True), nbytes(t)) for c, t in sizes)


def _reachable(value: Any, name: str, depth: int) -> Iterator[tuple[str, Any]]:
    """What a function closes over, is bound to, or has as a global, with the names by which it does."""
    dotted = lambda attribute: f"{name}.{attribute}" if name else attribute
    if isinstance(value, functools.partial):
        found = {f"argument {k}": x for k, x in enumerate(value.args)} | value.keywords | {"": value.func}
    elif inspect.ismethod(value):
        found = {"self": value.__self__, "": value.__func__}
    elif inspect.isfunction(value):
        closed = inspect.getclosurevars(value)
        inner = [c for c in value.__code__.co_consts if inspect.iscode(c)]
        more = {n: value.__globals__[n] for c in inner for n in c.co_names if n in value.__globals__}
        found = {**closed.globals, **closed.nonlocals, **more}
    elif hasattr(value, "__dict__") and not inspect.ismodule(value) and not inspect.isclass(value):
        found = {dotted(n): x for n, x in vars(value).items()}
    else:
        found = {}
    for each, inner in found.items():
        yield each, inner
        if depth and not isinstance(inner, jax.Array | np.ndarray):
            yield from _reachable(inner, each, depth - 1)


def _arrays(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    with contextlib.suppress(Exception):  # a value of any kind: what is no tree has no leaves to name
        for path, leaf in tree_leaves_with_path(value):
            if isinstance(leaf, jax.Array | np.ndarray):
                yield name + keystr(path), leaf


def _arguments(f: Callable, args: tuple, kwargs: dict) -> dict[str, Any]:
    """name -> value of a call."""
    return dict(zip(argument_names(_jax.signature_of(f), len(args)), args, strict=True)) | kwargs


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
        a, b = (_numbers(jnp.asarray(v)) for v in (a, b))
        if a.size == 0:
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


def _numbers(x: Any) -> Any:
    """Keys by their data, truth values as numbers."""
    x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return x.astype(jnp.int8) if x.dtype == bool else x
