"""What the forward pass keeps for the backward pass: the two halves of a gradient, and the residuals between them."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..core import _jax, subjaxprs
from ..core.graph import Graph
from ..core.report import Report, Result, Table
from ..core.scope_paths import Path, joined, maker
from ..cost.formatting import format_bytes


@dataclass(frozen=True)
class Residual:
    """A value that the forward pass hands to the backward pass.

    Attributes:
      path: the argument that it is, as "params['w']", or the "scope/primitive#k" that computed it, as in a `tap` of the
        forward Graph; "constant" for what is closed over and for literals.
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
        types of `out`. None stands for what has no derivative (integers, bools, keys), in and out.
      residuals: what is kept, in program order, arguments first.
    """

    forward: Graph
    backward: Graph
    residuals: tuple[Residual, ...]

    @property
    def bytes(self) -> int:
        """Bytes of what is computed and kept; arguments are there anyway."""
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


def in_program_order(forward: Graph, count: int) -> tuple[Graph, list[int], tuple[Residual, ...]]:
    """A graph whose last `count` outputs are sorted by what made them, which these were before, and what they are."""
    jaxpr = forward.jaxpr.jaxpr
    known = {v: (-1, Residual("constant", *_type(v))) for v in jaxpr.constvars}
    known.update((v, (k, Residual(forward.paths[k], *_type(v)))) for k, v in enumerate(jaxpr.invars))
    makers = {v: (eqn, k) for eqn in jaxpr.eqns for k, v in enumerate(eqn.outvars)}
    counts: Counter[str] = Counter()
    named: dict[tuple, tuple[int, str]] = {}  # by an equation and the calls around it: its place, and its name in a tap
    for calls, name in _named(jaxpr):
        named[calls] = len(jaxpr.invars) + len(named), f"{name}#{counts[name]}"
        counts[name] += 1

    def residual(v):
        if isinstance(v, _jax.Literal):
            return -1, Residual("constant", *_type(v))
        if v in makers:
            calls, _ = maker(*makers[v], (), ("jit", "remat2", "closed_call", "eval_jaxpr", "scan"))
            place, path = named[tuple(map(id, calls))]
            return place, Residual(path, *_type(v), calls[-1], _jax.line_of(calls[-1]))
        return known[v]

    own, kept = jaxpr.outvars[: len(jaxpr.outvars) - count], jaxpr.outvars[len(jaxpr.outvars) - count :]
    found = list(map(residual, kept))
    order = sorted(range(count), key=lambda k: found[k][0])
    new = _jax.close(jaxpr.replace(outvars=[*own, *(kept[k] for k in order)]), forward.jaxpr.consts)
    return dataclasses.replace(forward, jaxpr=new), order, tuple(found[k][1] for k in order)


def _type(v: Any) -> tuple:
    return tuple(v.aval.shape), v.aval.dtype, math.prod(v.aval.shape) * v.aval.dtype.itemsize


def _named(jaxpr: Any, around: Path = (), calls: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], str]]:
    """Each equation at any depth, by identity with the calls around it, and its "scope/primitive"."""
    for eqn in jaxpr.eqns:
        path = joined(around, _jax.scopes(_jax.name_stack(eqn)))
        yield (*calls, id(eqn)), "/".join((*path, eqn.primitive.name))
        for body in subjaxprs.bodies(eqn):
            yield from _named(body.jaxpr.jaxpr, path, (*calls, id(eqn)))
