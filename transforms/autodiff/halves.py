"""`halves`: the forward and the backward Graph of a gradient, and the residuals between them."""

from __future__ import annotations

import dataclasses
import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.dtypes import float0
from jax.tree_util import tree_flatten, tree_leaves, tree_unflatten

from ..core import _jax, subjaxprs
from ..core.errors import ArgumentError
from ..core.graph import Graph, trace
from ..core.report import Report, Result, Table
from ..core.scope_paths import Path, joined, maker
from ..cost.formatting import format_bytes
from ..cost.operations import nbytes
from ..while_loops.schedule import Loops
from .grad import UserRules, differentiable
from .jacobians import split_argnums
from .messages import wrong_arguments


@dataclass(frozen=True)
class Residual:
    """A value that the forward pass hands to the backward pass.

    Attributes:
      path: that of the argument, as "params['w']", or the "scope/primitive#k" that computed it, as in a `tap` of the
        forward Graph; "constant" for closed-over values and literals.
      shape, dtype: of the array; inside a scan with its leading axis of iterations.
      bytes: its size.
      eqn: the equation that made it, at any depth of sub-graphs; None for an argument and a constant.
      line: the user's line that made it, as "model.py:41 (attention)"; None where Python does not know it.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    bytes: int
    eqn: Any = None
    line: str | None = None


@dataclass(frozen=True, repr=False)
class Halves(Result):
    """A gradient in two Graphs. `out, kept = forward(*args)`, then `backward(kept, cotangents)` is the gradient.

    Attributes:
      forward: Graph from the arguments to `(out, kept)`; `kept` is a tuple of arrays, one for each of `residuals`.
      backward: Graph from `(kept, cotangents)` to the cotangents of the arguments in `argnums`. `cotangents` has the tree and
        types of `out`. None stands for values without a derivative (integers, bools, keys), in and out.
      residuals: in program order, arguments first.
    """

    forward: Graph
    backward: Graph
    residuals: tuple[Residual, ...]

    @property
    def bytes(self) -> int:
        """Bytes of the computed residuals; arguments take no memory of their own."""
        return sum(r.bytes for r in self.residuals if r.eqn is not None)

    def __repr__(self) -> str:
        count = len(self.residuals)
        return f"Halves({self.forward.name}, {self.backward.name}, {count} residuals, {format_bytes(self.bytes)})"

    def report(self) -> Report:
        """The number of equations, and a row for each residual."""
        arguments = sum(r.bytes for r in self.residuals if r.eqn is None)
        rows = []
        for r in self.residuals:
            kind = f"{_jax.short_dtype(r.dtype)}[{','.join(map(str, r.shape))}]"
            rows.append((f"{r.bytes:,}", kind, r.path, r.eqn.primitive.name if r.eqn else "", r.line or ""))
        return Report(
            (
                f"{self.forward.name}: {len(self.forward.eqns)} equations; {self.backward.name}: {len(self.backward.eqns)}",
                f"residuals: {format_bytes(self.bytes)} computed, {format_bytes(arguments)} of arguments",
                Table(rows, ("bytes", "type", "path", "equation", "line"), ">"),
            )
        )


def halves(
    graph: Graph, argnums: int | Sequence[int] = 0, *, rules: UserRules | None = None, loops: Loops | None = None
) -> Halves:
    """The forward and the backward Graph of a gradient, and the residuals between them.

    Args:
      graph: the Graph; its output may be any tree of arrays.
      argnums: which positional arguments to differentiate with respect to.
      rules, loops: as in `grad`.
    Returns:
      Halves. Its text lists each residual with its path, type, bytes, equation and line. Together they compute `jax.vjp`.
    Raises:
      ArgumentError: `graph` is not a Graph, or an argument in `argnums` holds integers. Also a TypeError.

    >>> import jax.numpy as jnp
    >>> from funcgrad.transforms import trace
    >>> f = lambda x: jnp.exp(jnp.sin(x))
    >>> h = halves(trace(f, 1.0))
    >>> [(r.path, r.bytes) for r in h.residuals]
    [('cos#0', 4), ('exp#0', 4)]
    >>> out, kept = h.forward(1.0)
    >>> bool(h.backward(kept, 1.0) == jax.grad(f)(1.0))
    True
    """
    if not isinstance(graph, Graph):
        raise ArgumentError(
            f"halves takes a Graph, and got {type(graph).__name__}.", hint="fg.halves(fg.trace(f, *args))"
        )
    argnums = jax.tree.map(operator.index, argnums)
    is_inexact = lambda x: jax.dtypes.issubdtype(x.dtype, np.inexact)
    body = differentiable(graph, rules=rules, loops=loops)
    pullbacks: list[Any] = []

    def forward(*args, **kwargs):
        numbers = (argnums,) if isinstance(argnums, int) else argnums
        has_floats = any(is_inexact(x) for k in numbers if k < len(args) for x in tree_leaves(args[k]))
        options = dict(argnums=argnums, holomorphic=False) | (dict(allow_int=True) if has_floats else {})
        if problem := wrong_arguments("halves", graph, args, options):
            raise problem
        out, pullback = jax.vjp(*split_argnums(body, argnums, args, kwargs))
        leaves, tree = tree_flatten(pullback)
        tracers = {id(x): x for x in leaves if isinstance(x, jax.core.Tracer)}
        positions = {key: k for k, key in enumerate(tracers)}
        template = [
            (positions.get(id(x)), None if id(x) in tracers else x) for x in leaves
        ]  # a constant is not a tracer
        pullbacks.append((tree, template))
        return out, tuple(tracers.values())

    forward = graph.derive(forward, f"forward({graph.name})")
    forward, order, residuals = _in_program_order(forward, len(forward.out_avals) - len(graph.out_avals))
    tree, template = pullbacks[-1]

    def backward(kept, cotangents):
        leaves = [constant if k is None else kept[order.index(k)] for k, constant in template]
        cotangents = graph.out_tree.flatten_up_to(cotangents)
        full = [np.zeros(a.shape, float0) if x is None else x for a, x in zip(graph.out_avals, cotangents, strict=True)]
        (grads,) = tree_unflatten(tree, leaves)(tree_unflatten(graph.out_tree, full))
        return jax.tree.map(lambda x: None if x.dtype == float0 else x, grads)

    cotangents = tree_unflatten(graph.out_tree, [a if is_inexact(a) else None for a in graph.out_avals])
    backward = trace(backward, forward.out_avals[len(graph.out_avals) :], cotangents)
    return Halves(forward, dataclasses.replace(backward, name=f"backward({graph.name})"), residuals)


def _in_program_order(forward: Graph, count: int) -> tuple[Graph, list[int], tuple[Residual, ...]]:
    """The graph with its last `count` outputs, the residuals, in program order; their old places; and what they are."""
    jaxpr = forward.jaxpr.jaxpr
    arguments = {v: k for k, v in enumerate(jaxpr.invars)}
    makers = {v: (eqn, k) for eqn in jaxpr.eqns for k, v in enumerate(eqn.outvars)}
    counts: Counter[str] = Counter()
    names: dict[tuple, tuple[int, str]] = {}  # by an equation and the calls around it: its place, and its name in a tap
    for calls, name in _named(jaxpr):
        names[calls] = len(jaxpr.invars) + len(names), f"{name}#{counts[name]}"
        counts[name] += 1

    def residual(v):
        place, path, eqn = -1, "constant", None
        if not isinstance(v, _jax.Literal) and v in arguments:
            place, path = arguments[v], forward.paths[arguments[v]]
        elif not isinstance(v, _jax.Literal) and v in makers:
            calls, _ = maker(*makers[v], (), ("jit", "remat2", "closed_call", "eval_jaxpr", "scan"))
            (place, path), eqn = names[tuple(map(id, calls))], calls[-1]
        line = _jax.line_of(eqn) if eqn else None
        return place, Residual(path, tuple(v.aval.shape), v.aval.dtype, nbytes(v.aval), eqn, line)

    results, kept = jaxpr.outvars[: len(jaxpr.outvars) - count], jaxpr.outvars[len(jaxpr.outvars) - count :]
    places, residuals = zip(*map(residual, kept), strict=True) if kept else ((), ())
    order = sorted(range(count), key=places.__getitem__)
    ordered = _jax.close(jaxpr.replace(outvars=[*results, *(kept[k] for k in order)]), forward.jaxpr.consts)
    return dataclasses.replace(forward, jaxpr=ordered), order, tuple(residuals[k] for k in order)


def _named(jaxpr: Any, around: Path = (), calls: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], str]]:
    """Each equation at any depth, by identity with the calls around it, and its "scope/primitive"."""
    for eqn in jaxpr.eqns:
        path = joined(around, _jax.scopes(_jax.name_stack(eqn)))
        yield (*calls, id(eqn)), "/".join((*path, eqn.primitive.name))
        for body in subjaxprs.bodies(eqn):
            yield from _named(body.jaxpr.jaxpr, path, (*calls, id(eqn)))
