"""`Graph`: a traced function as a value. `trace`: from a pure function to its Graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax
from jax.tree_util import keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from . import _jax, subjaxprs
from .errors import ArgumentError
from .evaluation import evaluated
from .signatures import canonical_arguments, name_of, named_leaves, without_static
from .text import Names, graph_lines


@dataclass(frozen=True, eq=False, repr=False)
class Graph:
    """A traced function: an immutable value, hashable by identity, callable as the function was.

    It works under `jax.jit`, `jax.vmap`, `jax.grad`, `jax.shard_map` and inside other functions. A call evaluates it equation
    by equation; `fg.jit(graph)` compiles it. Reverse mode of a `jax.custom_vjp` function inside a `shard_map` needs a graph
    that was traced inside of it too, or check_vma=False.

    Attributes:
      jaxpr: the closed jaxpr, its constants (closed-over arrays) in `jaxpr.consts`.
      in_tree: tree of (args, kwargs), static arguments left out.
      out_tree: tree of the result.
      paths: the path of each input leaf, as in `params['dense_0']['w']`.
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
        """The equations of the outermost level; `walk` yields those of sub-jaxprs too."""
        return self.jaxpr.jaxpr.eqns

    @cached_property
    def in_avals(self) -> tuple[Any, ...]:
        """Abstract value (shape, dtype, weak type) of each input leaf."""
        return tuple(v.aval for v in self.jaxpr.jaxpr.invars)

    @cached_property
    def out_avals(self) -> tuple[Any, ...]:
        """Abstract value of each output leaf."""
        return tuple(v.aval for v in self.jaxpr.jaxpr.outvars)

    def __post_init__(self):
        # `inspect`, `functools.wraps` and JAX's messages read these attributes of a function.
        object.__setattr__(self, "__name__", self.name)
        object.__setattr__(self, "__signature__", self.signature or inspect.signature(lambda *args, **kwargs: None))

    def __call__(self, /, *args, **kwargs):
        """Evaluate the graph.

        Raises:
          ArgumentError: tree, shape or dtype of an argument differ from the traced ones. Also a TypeError.
        """
        leaves = self.leaves(*args, **kwargs)
        outputs = evaluated(self.jaxpr, leaves)
        arrays = [
            x if isinstance(x, jax.Array) else _jax.cast(x, a) for x, a in zip(outputs, self.out_avals, strict=True)
        ]
        return tree_unflatten(self.out_tree, arrays)

    def leaves(self, /, *args, **kwargs) -> list[Any]:
        """The flat inputs of a call, checked against the traced types; raises as a call does."""
        leaves, tree = tree_flatten((args, kwargs))
        if tree != self.in_tree:
            leaves, tree = tree_flatten(canonical_arguments(self.signature, args, kwargs))
        if tree != self.in_tree:
            raise self._wrong_tree(args, kwargs)
        return [_fit(self, k, leaf, aval) for k, (leaf, aval) in enumerate(zip(leaves, self.in_avals, strict=True))]

    def derive(self, f: Callable, name: str, avals: Sequence[Any] | None = None) -> Graph:
        """Trace `f`, called as this graph is, into a graph of the same inputs.

        Args:
          f: function of this graph's arguments.
          name: the name of the new graph.
          avals: types of the inputs, where they differ from this graph's.
        """
        flat, out_tree = _flat(f, self.in_tree, name)
        jaxpr = _jax.stage_flat(flat, avals or self.in_avals, _jax.without_results(self.jaxpr.jaxpr))
        return Graph(jaxpr, self.in_tree, out_tree(), self.paths, name, self.signature)

    def _wrong_tree(self, args, kwargs) -> ArgumentError:
        args, kwargs = canonical_arguments(self.signature, args, kwargs)
        leaves = dict(zip(*named_leaves(args, kwargs, self.signature), strict=True))
        missing = ", ".join(path for path in self.paths if path not in leaves)
        unknown = ", ".join(path for path in leaves if path not in self.paths)
        details = "; ".join([f"missing {missing}"] * bool(missing) + [f"unknown {unknown}"] * bool(unknown))
        parameters = ", ".join(dict.fromkeys(map(_parameter, self.paths)))
        return ArgumentError(
            f"{self.name} was traced with other arguments: {details or 'another tree structure'}.",
            inputs=", ".join(f"{path}: {_short(x)}" for path, x in leaves.items()) or "none",
            hint=f"call it as {self.name}({parameters}), or trace it again with these arguments",
        )

    def __repr__(self) -> str:
        shown = zip(self.paths[:4], self.in_avals[:4], strict=True)
        inputs = ", ".join(f"{path}: {aval.str_short()}" for path, aval in shown)
        more = f", and {len(self.paths) - 4} more" if len(self.paths) > 4 else ""
        outputs = ", ".join(a.str_short() for a in self.out_avals)
        return f"Graph({self.name}({inputs}{more}) -> {outputs}, {len(self.eqns)} equations)"

    def __str__(self) -> str:
        return self.text()

    def text(self, *, source: bool = False, lines: int | None = 200) -> str:
        """The graph as text: one equation a line, scopes as headings, sub-jaxprs indented.

        Args:
          source: whether each equation shows the user's line that bound it.
          lines: fold the middle of a longer text; None shows all.
        """
        head, body = graph_lines(self, Names(self), source)
        if lines is not None and len(body) > (lines := max(lines, 2)):
            folded = f"  … {len(body) - lines} lines folded; text(lines=None) shows all …"
            body = [*body[: lines // 2], folded, *body[len(body) - (lines - lines // 2) :]]
        return "\n".join([*head, *body])

    if TYPE_CHECKING:  # `funcgrad.notebooks` adds these methods

        def to_json(self) -> str:
            """The graph as JSON, as `fg.to_json`."""

        def to_dot(self) -> str:
            """The graph in the language of Graphviz, as `fg.to_dot`."""


def trace(
    f: Callable,
    /,
    *args,
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
    **kwargs,
) -> Graph:
    """Trace a pure function into a `Graph`; `f` runs once with tracers, and nothing is cached.

    Args:
      f: function of pytrees of arrays.
      *args, **kwargs: example arguments: arrays, or anything with shape and dtype such as `jax.ShapeDtypeStruct`.
      static_argnums, static_argnames: arguments that are Python values, as in `jax.jit`; the graph holds for these values only
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
    f, args, kwargs, signature = without_static(f, args, kwargs, static_argnums, static_argnames)
    args, kwargs = canonical_arguments(signature, args, kwargs)
    leaves, in_tree = tree_flatten((args, kwargs))
    paths, _ = named_leaves(args, kwargs, signature)
    for path, leaf in zip(paths, leaves, strict=True):
        _check_traceable(f, path, leaf)
    flat, out_tree = _flat(f, in_tree, name_of(f))
    jaxpr = _jax.stage(f, args, kwargs, leaves, flat)
    return Graph(jaxpr, in_tree, out_tree(), tuple(paths), name_of(f), signature)


def walk(graph: Graph | _jax.ClosedJaxpr) -> Iterator[tuple[tuple[str, ...], _jax.JaxprEqn]]:
    """Every equation of a graph in program order, with the path of the sub-jaxprs around it.

    Yields:
      (path, equation): () for the outermost level; `("scan.jaxpr",)` for the body of a scan.
    """
    jaxpr = graph.jaxpr if isinstance(graph, Graph) else graph
    for eqn in jaxpr.jaxpr.eqns:
        yield (), eqn
        for body in subjaxprs.bodies(eqn):
            for path, nested in walk(body.jaxpr):
                yield (f"{eqn.primitive.name}.{body.label}", *path), nested


# ------------------------------------------------------------------------------------------------ checks


def _flat(f: Callable, in_tree: Any, name: str) -> tuple[Callable, Callable[[], Any]]:
    """`f` on the leaves of its arguments, and a function that returns the tree of its result after it ran."""
    trees = []

    def flat(*leaves):
        args, kwargs = tree_unflatten(in_tree, leaves)
        paths, out_tree = tree_flatten_with_path(f(*args, **kwargs))
        trees.append(out_tree)
        for path, leaf in paths:
            if _aval(leaf) is None:
                raise ArgumentError(
                    f"{name} returned {type(leaf).__name__} {('at ' + keystr(path)) if path else ''}, which is not an array.",
                    inputs=f"{leaf!r:.60}",
                    hint="return arrays, in any tree; None is an empty one",
                )
        return [leaf for _, leaf in paths]

    return flat, lambda: trees[-1]


def _check_traceable(f, path: str, leaf) -> None:
    if (hasattr(leaf, "shape") and hasattr(leaf, "dtype")) or _aval(leaf) is not None:
        return
    raise ArgumentError(
        f"{name_of(f)} cannot be traced with {path} of type {type(leaf).__name__}, which is not an array.",
        inputs=f"{path} = {leaf!r:.60}",
        hint=f"name it static: fg.trace({name_of(f)}, ..., static_argnames={path!r})"
        if path.isidentifier()
        else f"close over it, or leave it out: only arrays can stand in {_parameter(path)}",
    )


def _parameter(path: str) -> str:
    """The parameter that the path of a leaf starts with."""
    return path.split("[")[0].split(".")[0]


def _aval(leaf) -> Any:
    """The abstract value of a leaf; None for an object that is no array."""
    try:
        return jax.typeof(leaf)
    except TypeError:
        return None


def _short(leaf) -> str:
    """The type of a leaf, as "float32[3]"; of an object that is no array the name of its class."""
    aval = _aval(leaf)
    return type(leaf).__name__ if aval is None else aval.str_short()


def _fit(graph: Graph, k: int, leaf, aval):
    """The leaf, cast to the weak type of the graph's input; raises if it has another shape or dtype."""
    leaf_aval = _aval(leaf)
    if type(leaf_aval) is not type(aval) or (leaf_aval.shape, leaf_aval.dtype) != (aval.shape, aval.dtype):
        raise ArgumentError(
            f"{graph.name} takes {graph.paths[k]} of type {aval.str_short()}, and got {_short(leaf)}.",
            hint=f"pass {aval.str_short()}, or trace {graph.name} again with such an argument",
        )
    is_weak, is_weak_input = (getattr(a, "weak_type", False) for a in (leaf_aval, aval))
    return leaf if is_weak == is_weak_input else _jax.cast(leaf, aval)
