"""`Graph`: a traced function as a value. `trace`: from a pure function to its Graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
from jax.tree_util import keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from . import _jax
from .errors import ArgumentError


@dataclass(frozen=True, eq=False, repr=False)
class Graph:
    """A traced function: an immutable value, hashable by identity, callable as the function was.

    It works under `jax.jit`, `jax.vmap`, `jax.grad`, `jax.shard_map` and inside other functions. A call evaluates it equation
    by equation; `fg.jit(graph)` compiles it.

    Attributes:
      jaxpr: the closed jaxpr, its constants (closed-over arrays) in `jaxpr.consts`.
      in_tree: tree of (args, kwargs), static arguments left out.
      out_tree: tree of the result.
      paths: what each input leaf is called, as in `params['dense_0']['w']`.
      name: the function's name.
      signature: the function's parameters without the static ones; None if Python cannot tell.
    """

    jaxpr: _jax.ClosedJaxpr
    in_tree: Any
    out_tree: Any
    paths: tuple[str, ...]
    name: str
    signature: inspect.Signature | None = None

    @property
    def eqns(self) -> list[_jax.JaxprEqn]:
        """The equations of the outermost level; `walk` goes into sub-graphs."""
        return self.jaxpr.jaxpr.eqns

    @cached_property
    def in_avals(self) -> tuple[Any, ...]:
        """Abstract value (shape, dtype, weak type) of each input leaf."""
        return tuple(v.aval for v in self.jaxpr.jaxpr.invars)

    @cached_property
    def out_avals(self) -> tuple[Any, ...]:
        """Abstract value of each output leaf."""
        return tuple(v.aval for v in self.jaxpr.jaxpr.outvars)

    @property
    def __name__(self) -> str:
        return self.name

    @property
    def __signature__(self) -> inspect.Signature:
        return self.signature or inspect.Signature(
            [
                inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL),
                inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD),
            ]
        )

    def __call__(self, *args, **kwargs):
        """Evaluate the graph.

        Raises:
          ArgumentError: tree, shape or dtype of an argument differ from the traced ones. Also a TypeError.
        """
        return tree_unflatten(self.out_tree, _jax.jaxpr_as_fun(self.jaxpr)(*self.leaves(*args, **kwargs)))

    def leaves(self, *args, **kwargs) -> list[Any]:
        """The flat inputs of a call, checked against the traced types."""
        leaves, tree = tree_flatten((args, kwargs))
        if tree != self.in_tree:
            leaves, tree = tree_flatten(_canonical(self.signature, args, kwargs))
        if tree != self.in_tree:
            raise self._wrong_tree(args, kwargs)
        return [_fit(self, k, leaf, aval) for k, (leaf, aval) in enumerate(zip(leaves, self.in_avals, strict=True))]

    def derive(self, f: Callable, name: str) -> Graph:
        """Trace `f`, called as this graph is, into a graph of the same inputs.

        Args:
          f: function of this graph's arguments.
          name: the name of the new graph.
        """
        out_tree = None

        def flat(*leaves):
            nonlocal out_tree
            args, kwargs = tree_unflatten(self.in_tree, leaves)
            out, out_tree = tree_flatten(f(*args, **kwargs))
            return out

        jaxpr = _jax.stage_flat(flat, self.in_avals, _jax.unresolved(self.jaxpr.jaxpr))
        return Graph(jaxpr, self.in_tree, out_tree, self.paths, name, self.signature)

    def _wrong_tree(self, args, kwargs) -> ArgumentError:
        args, kwargs = _canonical(self.signature, args, kwargs)
        given = dict(zip(*_described(args, kwargs, self.signature), strict=True))
        missing = [p for p in self.paths if p not in given]
        unknown = [p for p in given if p not in self.paths]
        details = "; ".join(
            f"{what} {', '.join(which)}" for what, which in (("missing", missing), ("unknown", unknown)) if which
        )
        return ArgumentError(
            f"{self.name} was traced with other arguments: {details or 'another tree structure'}.",
            inputs=", ".join(f"{p}: {_short(x)}" for p, x in given.items()) or "none",
            hint=f"call it as {self.name}({', '.join(self._parameters())}), or trace it again with these arguments",
        )

    def _parameters(self) -> list[str]:
        return list(dict.fromkeys(p.split("[")[0].split(".")[0] for p in self.paths))

    def __repr__(self) -> str:
        inputs = ", ".join(f"{p}: {a.str_short()}" for p, a in zip(self.paths[:4], self.in_avals[:4], strict=True))
        more = f", and {len(self.paths) - 4} more" if len(self.paths) > 4 else ""
        outputs = ", ".join(a.str_short() for a in self.out_avals)
        return f"Graph({self.name}({inputs}{more}) -> {outputs}, {sum(1 for _ in walk(self))} equations)"

    def __str__(self) -> str:
        return self.text()

    def text(self, *, source: bool = False, lines: int | None = 200) -> str:
        """The graph as text: one equation a line, scopes as headings, sub-graphs indented.

        Args:
          source: whether each equation shows the user's line that made it.
          lines: fold the middle of a longer text; None shows all.
        """
        from .listing import listing

        return listing(self, source=source, lines=lines)


def trace(
    f: Callable,
    *args,
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
    **kwargs,
) -> Graph:
    """Trace a pure function into a `Graph`; `f` runs once, nothing is computed, nothing is cached.

    Args:
      f: function of pytrees of arrays.
      *args, **kwargs: example arguments: arrays, or anything with shape and dtype such as `jax.ShapeDtypeStruct`.
      static_argnums, static_argnames: arguments that are Python values, as in `jax.jit`; the graph is made for these values
        and is called without them.
    Returns:
      The graph, with one input per array leaf of the arguments. Closed-over arrays are its constants.
    Raises:
      ArgumentError: an argument that is not static is not an array either. Also a TypeError.

    >>> import jax.numpy as jnp
    >>> print(trace(lambda x, y: jnp.sin(x) * y, 1.0, 2.0))
    <lambda>(x: f32[], y: f32[])
      a:f32[] = sin x
      b:f32[] = mul a y
      return b
    """
    if isinstance(f, Graph):
        return f.derive(f, f.name) if not (args or kwargs) else trace(f.__call__, *args, **kwargs)
    f, args, kwargs, signature = _without_static(f, args, kwargs, static_argnums, static_argnames)
    args, kwargs = _canonical(signature, args, kwargs)
    leaves, in_tree = tree_flatten((args, kwargs))
    paths, _ = _described(args, kwargs, signature)
    for path, leaf in zip(paths, leaves, strict=True):
        _check_traceable(f, path, leaf)
    out_tree = None

    def flat(*leaves):
        nonlocal out_tree
        args, kwargs = tree_unflatten(in_tree, leaves)
        out, out_tree = tree_flatten(f(*args, **kwargs))
        return out

    jaxpr = _jax.stage(f, args, kwargs, leaves, flat)
    return Graph(jaxpr, in_tree, out_tree, tuple(paths), _name(f), signature)


def walk(graph: Graph | _jax.ClosedJaxpr) -> Iterator[tuple[tuple[str, ...], _jax.JaxprEqn]]:
    """Every equation of a graph in program order, with the path of sub-graphs it lies in.

    Yields:
      (path, equation): () for the outermost level; `("scan.jaxpr",)` for the body of a scan.
    """
    jaxpr = graph.jaxpr if isinstance(graph, Graph) else graph
    for eqn in jaxpr.jaxpr.eqns:
        yield (), eqn
        for body in _jax.bodies(eqn):
            for path, inner in walk(body.jaxpr):
                yield (f"{eqn.primitive.name}.{body.label}", *path), inner


# ------------------------------------------------------------------------------------------------ arguments


def _name(f: Callable) -> str:
    return getattr(f, "__name__", None) or type(getattr(f, "func", f)).__name__


def _without_static(f, args, kwargs, static_argnums, static_argnames):
    """`f` with its static arguments filled in, and what is left of the arguments and of the signature."""
    signature = _jax.signature_of(f)
    positions = {static_argnums} if isinstance(static_argnums, int) else set(static_argnums)
    names = {static_argnames} if isinstance(static_argnames, str) else set(static_argnames)
    if not positions and not names:
        return f, args, kwargs, signature
    positions = {k + len(args) if k < 0 else k for k in positions}
    if signature is not None:
        parameters = list(signature.parameters.values())
        positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        names |= {positional[k] for k in positions if k < len(positional)}
        positions |= {k for k, name in enumerate(positional) if name in names}
        signature = signature.replace(parameters=[p for p in parameters if p.name not in names])
    static = {k: args[k] for k in positions if k < len(args)}
    static_kwargs = {k: v for k, v in kwargs.items() if k in names}
    for value in [*static.values(), *static_kwargs.values()]:
        if not isinstance(value, Hashable):
            raise ArgumentError(
                f"a static argument of {_name(f)} is not hashable: {type(value).__name__}.",
                hint="pass a tuple or a frozen dataclass",
            )
    total = len(args)

    def filled(*rest, **others):
        values = iter(rest)
        return f(*(static[k] if k in static else next(values) for k in range(total)), **others, **static_kwargs)

    filled.__name__ = filled.__qualname__ = _name(f)
    if signature is not None:
        filled.__signature__ = signature  # type: ignore[attr-defined]
    rest = tuple(a for k, a in enumerate(args) if k not in static)
    return filled, rest, {k: v for k, v in kwargs.items() if k not in names}, signature


def _canonical(signature, args, kwargs):
    """The arguments as the signature orders them, so that keyword and positional calls meet; as they are if they do not fit."""
    try:
        bound = signature.bind(*args, **kwargs)
    except (AttributeError, TypeError):
        return args, kwargs
    return bound.args, bound.kwargs


def _described(args, kwargs, signature) -> tuple[list[str], list[Any]]:
    """Path and value of each leaf of the arguments."""
    names = [f"args[{k}]" for k in range(len(args))]
    if signature is not None:
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        fixed = [p.name for p in signature.parameters.values() if p.kind in kinds]
        variadic = next(
            (p.name for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_POSITIONAL), "args"
        )
        names = [fixed[k] if k < len(fixed) else f"{variadic}[{k - len(fixed)}]" for k in range(len(args))]
    paths, leaves = [], []
    for name, value in [*zip(names, args, strict=True), *sorted(kwargs.items())]:
        for path, leaf in tree_flatten_with_path(value)[0]:
            paths.append(name + keystr(path))
            leaves.append(leaf)
    return paths, leaves


def _check_traceable(f, path: str, leaf) -> None:
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return
    try:
        jax.typeof(leaf)
    except TypeError:
        raise ArgumentError(
            f"{_name(f)} cannot be traced with {path} of type {type(leaf).__name__}, which is not an array.",
            inputs=f"{path} = {leaf!r:.60}",
            hint=f"name it static: fg.trace({_name(f)}, ..., static_argnames={path.split('[')[0]!r})",
        ) from None


def _short(leaf) -> str:
    try:
        return jax.typeof(leaf).str_short()
    except TypeError:
        return type(leaf).__name__


def _fit(graph: Graph, k: int, leaf, aval):
    try:
        given = jax.typeof(leaf)
    except TypeError:
        given = None
    if given is None or type(given) is not type(aval) or (given.shape, given.dtype) != (aval.shape, aval.dtype):
        raise ArgumentError(
            f"{graph.name} takes {graph.paths[k]} of type {aval.str_short()}, and got {_short(leaf)}.",
            hint=f"pass {aval.str_short()}, or trace {graph.name} again with such an argument",
        )
    return leaf if getattr(given, "weak_type", False) == getattr(aval, "weak_type", False) else _jax.cast(leaf, aval)
