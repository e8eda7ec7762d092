"""`study`: a function run eagerly, traced and compiled, in one report."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import time
from collections import Counter
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
from .line_tracing import captured_output, trace_lines
from .report import Comparison, Constant, Difference, Study, Times
from .tape import Node, Tape, tape

TIMING_S, MOST_CALLS = 0.5, 100  # calls are timed for this long, at most this many


def study(
    f: Callable,
    /,
    *args: Any,
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
    others: Sequence[tuple] = (),
    **kwargs: Any,
) -> Study:
    """Compare eager execution of a function with its traced and its compiled program.

    Traces `f`, runs it eagerly on a tape, compiles it, and times each for half a second, at most 100 calls. Each call gets
    copies of the arguments. Other side effects of `f` happen at each call. Its output is captured.

    Args:
      f: a function of pytrees of arrays.
      *args, **kwargs: its arguments, with values.
      static_argnums, static_argnames: as in `jax.jit`; by default those of a jitted `f`.
      others: further positional arguments, one tuple per call, to see whether a call traces `f` again, and why.
    Returns:
      Study: its text is the report; also in notebooks, as HTML by `.save(path)`, and as `.dict()`.
    Raises:
      All that `f` raises in eager execution. If it cannot be traced, the study says why. OptionError: `others` are no tuples.

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
    if hasattr(f, "lower") and hasattr(f, "__wrapped__"):  # the function that is compiled, not what it wraps in turn
        plain = f.__wrapped__
        if isinstance(f, type(jax.jit(abs))) and static_argnums == static_argnames == ():
            _, _, numbers, static_argnames = _jax.dispatch_of(f)
            static_argnums = [k for k in numbers if -len(args) <= k < len(args)]
    options: dict[str, Any] = {"static_argnums": static_argnums, "static_argnames": static_argnames}
    fresh_arguments = lambda: _copied((args, kwargs))
    graph, error = None, None
    with trace_lines(plain) as tracing_run:
        try:
            traced_args, traced_kwargs = fresh_arguments()
            g, traced_args, traced_kwargs, signature = without_static(plain, traced_args, traced_kwargs, **options)
            graph = trace(g, *traced_args, **traced_kwargs)
        except Exception as tracing_error:
            error = tracing_error
    arguments = fresh_arguments()
    with trace_lines(plain) as eager_run, tape() as t:
        eager_out = _call(plain, arguments)
    eager_s = _least_seconds(plain, fresh_arguments)
    shared: dict[str, Any] = {"name": name_of(f), "tape": t}
    shared |= {"eager_operations": len(t), "eager_peak_bytes": _peak_bytes(t.nodes)}
    if graph is None:
        assert error is not None
        times, reason = Times(eager_s, None, None), refusal(error, t.nodes)
        return Study(**shared, noticed=eager_run, times=times, refusal=reason)
    kernels = compiled(graph, *traced_args, **traced_kwargs)
    jitted = jit(_Uncached(plain), **options)
    with captured_output():
        start_s = time.perf_counter()
        compiled_out = jax.block_until_ready(_call(jitted, fresh_arguments()))
        first_s = time.perf_counter() - start_s
        times = Times(eager_s, first_s, _least_seconds(jitted, fresh_arguments))
        difference = _difference(eager_out, compiled_out, t)
        for other in others:
            _call(jitted, _copied((other, kwargs)))
    dynamic = _arguments(g, traced_args, traced_kwargs)
    static = {name: value for name, value in _arguments(plain, args, kwargs).items() if name not in dynamic}
    return Study(
        **shared,
        noticed=tracing_run,
        traced_equations=sum(not subjaxprs.bodies(eqn) for _, eqn in walk(graph)),
        constants=_constants(plain, graph),
        fixed=tuple(_fixed(*named_leaves(traced_args, traced_kwargs, signature), static)),
        retraces=tuple(map(str, jitted.retraces)),
        kernels=kernels,
        times=times,
        difference=difference,
        graph=graph,
    )


def compare(*studies: Study) -> Comparison:
    """Several studies, of functions or of arguments, in one table.

    Args:
      *studies: results of `study`.

    >>> one, two = (study(f, jnp.ones(4)) for f in (jnp.sin, jnp.cos))
    >>> print(compare(one, two).rows[0]["function"], len(compare(one, two).rows))
    sin 2
    """
    if not studies or not all(isinstance(s, Study) for s in studies):
        raise ArgumentError("compare takes one or more studies.", hint="fg.compare(fg.study(f, x), fg.study(g, x))")
    return Comparison(studies)


# ------------------------------------------------------------------------------------------------ measurements


def _copied(arguments: tuple) -> tuple:
    """Copies of the arguments, which may be donated; NumPy arrays become JAX arrays, as in tracing."""
    copy = lambda x: x.copy() if isinstance(x, jax.Array) else jnp.asarray(x) if isinstance(x, np.ndarray) else x
    return jax.tree.map(copy, arguments)


def _call(f: Callable, arguments: tuple) -> Any:
    args, kwargs = arguments
    return f(*args, **kwargs)


class _Uncached:
    """A function with its own hash, so that JAX's caches have no entry for it."""

    def __init__(self, f: Callable):
        self.f, self.__name__, self.__signature__ = f, name_of(f), _jax.signature_of(f)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.f(*args, **kwargs)


def _least_seconds(f: Callable, fresh_arguments: Callable[[], tuple]) -> float:
    """The least time of a call, after one that compiles."""
    calls_s: list[float] = []
    with captured_output():
        jax.block_until_ready(_call(f, fresh_arguments()))
        while not calls_s or (sum(calls_s) < TIMING_S and len(calls_s) < MOST_CALLS):
            arguments = jax.block_until_ready(fresh_arguments())
            start_s = time.perf_counter()
            jax.block_until_ready(_call(f, arguments))
            calls_s.append(time.perf_counter() - start_s)
    return min(calls_s)


def _peak_bytes(nodes: Sequence[Node]) -> int:
    """The peak of live bytes of results in an eager run that frees each result after its last use."""
    last_use = {key: node.index for node in nodes for key in node.parents if key}
    live_bytes = peak_bytes = 0
    freed_bytes: Counter[int] = Counter()  # after the node of an index; results that no node uses are never freed
    for node in nodes:
        for k, x in enumerate(node.outputs):
            live_bytes += nbytes(jax.typeof(x))
            freed_bytes[last_use.get((node.index, k), len(nodes))] += nbytes(jax.typeof(x))
        peak_bytes = max(peak_bytes, live_bytes)
        live_bytes -= freed_bytes[node.index]
    return peak_bytes


def _constants(f: Callable, graph: Graph) -> tuple[Constant, ...]:
    """The arrays that a graph closes over, at any depth, with the names that the function has for them."""
    bodies = [body.jaxpr for _, eqn in walk(graph) for body in subjaxprs.bodies(eqn)]
    arrays = {id(c): c for jaxpr in (graph.jaxpr, *bodies) for c in jaxpr.consts if hasattr(c, "shape")}
    names = [(name, leaf) for name, value in _references(f, "", 3) for name, leaf in _arrays(name, value)]

    def constant(array: Any) -> Constant:
        same = (name for name, leaf in names if leaf is array)
        equal = (name for name, leaf in names if isinstance(leaf, np.ndarray) and np.array_equal(leaf, array))
        aval = jax.typeof(array)
        return Constant(next(same, "") or next(equal, ""), aval.str_short(short_dtypes=True), nbytes(aval))

    return tuple(map(constant, arrays.values()))


def _references(value: Any, name: str, depth: int) -> Iterator[tuple[str, Any]]:
    """The values that a function refers to, by name: closed over, bound, global; with their attributes to some depth."""
    references: dict[str, Any] = {}
    if isinstance(value, functools.partial):
        references = {f"argument {k}": x for k, x in enumerate(value.args)} | value.keywords | {"": value.func}
    elif inspect.ismethod(value):
        references = {"self": value.__self__, "": value.__func__}
    elif inspect.isfunction(value):
        variables = inspect.getclosurevars(value)
        codes = [c for c in value.__code__.co_consts if inspect.iscode(c)]  # of functions defined inside
        nested = {n: value.__globals__[n] for c in codes for n in c.co_names if n in value.__globals__}
        references = {**variables.globals, **variables.nonlocals, **nested}
    elif hasattr(value, "__dict__") and not inspect.ismodule(value) and not inspect.isclass(value):
        references = {f"{name}.{attribute}" if name else attribute: x for attribute, x in vars(value).items()}
    for reference, x in references.items():
        yield reference, x
        if depth and not isinstance(x, jax.Array | np.ndarray):
            yield from _references(x, reference, depth - 1)


def _arrays(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    with contextlib.suppress(Exception):  # values that are no trees have no leaves to name
        for path, leaf in tree_leaves_with_path(value):
            if isinstance(leaf, jax.Array | np.ndarray):
                yield name + keystr(path), leaf


def _arguments(f: Callable, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of a call by name."""
    return dict(zip(argument_names(_jax.signature_of(f), len(args)), args, strict=True)) | kwargs


def _fixed(paths: Sequence[str], leaves: Sequence[Any], static: dict[str, Any]) -> list[str]:
    """The static arguments and the types of the others: a call with different ones is traced again."""
    lines = [f"{name} = {value!r:.40} is static: each other value is traced again" for name, value in static.items()]
    for path, leaf in zip(paths, leaves, strict=True):
        aval = jax.typeof(leaf)
        text = aval.str_short(short_dtypes=True)
        if isinstance(leaf, int | float | complex):
            lines.append(f"{path} is a Python number, {text} of weak type: an array of {aval.dtype} is traced again")
        else:
            lines.append(f"{path} is {text}: another shape or dtype is traced again")
    return lines


# ------------------------------------------------------------------------------------------------ values


def _difference(eager_out: Any, compiled_out: Any, t: Tape) -> Difference | None:
    """Where eager and compiled values first differ; None if they are close."""
    gap = _gap(jax.tree.leaves(eager_out), jax.tree.leaves(compiled_out))
    if gap is None:
        return None
    outputs = [(node, x) for node in t.nodes for x in node.outputs]
    inputs = {f"x{k}": x for k, x in enumerate(t.given())}
    compiled_values = jax.jit(t.graph(inputs, [x for _, x in outputs]))(**inputs)
    for (node, x), y in zip(outputs, compiled_values, strict=True):
        if _gap([x], [y]) is not None:
            return Difference(gap, str(node.primitive), node.scope, node.line or "")
    return Difference(gap, "", "", "")


def _gap(eager_values: Sequence[Any], compiled_values: Sequence[Any]) -> float | None:
    """The largest difference, relative to the largest value of its array; None if all are rounding errors."""
    gaps = []
    for a, b in zip(eager_values, compiled_values, strict=True):
        a, b = (_numbers(jnp.asarray(v)) for v in (a, b))
        if a.size == 0:
            continue
        eps = float(jnp.finfo(a.dtype).eps) if jnp.issubdtype(a.dtype, jnp.inexact) else 0.0
        x, y = (np.asarray(v, np.complex128 if jnp.iscomplexobj(v) else np.float64) for v in (a, b))
        is_equal = (x == y) | (np.isnan(x) & np.isnan(y))
        distance = np.where(is_equal, 0, np.abs(x - y))
        scale = max(float(np.max(np.abs(np.where(np.isfinite(x), x, 0)))), 1e-30)
        gap = float(np.max(np.where(np.isnan(distance), math.inf, distance))) / scale
        gaps += [gap] if gap > 64 * eps else []
    return max(gaps, default=None)


def _numbers(x: Any) -> Any:
    """The data of keys, booleans as integers, other arrays unchanged."""
    x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return x.astype(jnp.int8) if x.dtype == bool else x
