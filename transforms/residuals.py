"""What the forward pass keeps for the backward pass: the two halves of a gradient, and the residuals between them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from . import _jax
from .graph import Graph
from .selecting import joined, maker


@dataclass(frozen=True)
class Residual:
    """A value that the forward pass hands to the backward pass.

    Attributes:
      path: the argument that it is, as "params['w']", or the "scope/primitive#k" that computed it; "constant" for a literal.
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
class Halves:
    """A gradient in two Graphs. `out, kept = forward(*args)`, then `backward(kept, cotangents)` is the gradient.

    Attributes:
      forward: Graph from the arguments to `(out, kept)`; `kept` is a tuple of arrays, one for each of `residuals`.
      backward: Graph from `(kept, cotangents)` to the cotangents of the arguments in `argnums`. `cotangents` has the tree and
        types of `out`. None stands for what has no derivative (integers, bools, keys), in and out.
      residuals: what is kept, in program order.
    """

    forward: Graph
    backward: Graph
    residuals: tuple[Residual, ...]

    @property
    def bytes(self) -> int:
        """Bytes of what is computed and kept; arguments are there anyway."""
        return sum(r.bytes for r in self.residuals if r.eqn is not None)

    def __repr__(self) -> str:
        return (
            f"Halves({self.forward.name}, {self.backward.name}, {len(self.residuals)} residuals, {_size(self.bytes)})"
        )

    def __str__(self) -> str:
        arguments = sum(r.bytes for r in self.residuals if r.eqn is None)
        head = (
            f"{self.forward.name}: {len(self.forward.eqns)} equations; {self.backward.name}: {len(self.backward.eqns)}\n"
            f"residuals: {_size(self.bytes)} computed, {_size(arguments)} of arguments"
        )
        rows = [("bytes", "type", "path", "equation", "line")]
        for r in self.residuals:
            kind = f"{_jax.short_dtype(r.dtype)}[{','.join(map(str, r.shape))}]"
            rows.append((f"{r.bytes:,}", kind, r.path, r.eqn.primitive.name if r.eqn else "", r.line or ""))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join((row[0].rjust(widths[0]), *map(str.ljust, row[1:], widths[1:]))).rstrip() for row in rows]
        return "\n".join((head, *lines))


def residuals_of(forward: Graph, count: int) -> tuple[Residual, ...]:
    """What the last `count` outputs of a graph are, and what made them."""
    jaxpr = forward.jaxpr.jaxpr
    paths = dict(zip(jaxpr.invars, forward.paths, strict=True))
    makers = {v: (eqn, k) for eqn in jaxpr.eqns for k, v in enumerate(eqn.outvars)}
    counts: Counter[str] = Counter()

    def residual(v):
        path, eqn, line = "constant" if isinstance(v, _jax.Literal) else paths.get(v), None, None
        if path is None:
            eqn, k = makers[v]
            eqn, scopes = maker(
                eqn,
                k,
                joined((), _jax.scopes(_jax.name_stack(eqn))),
                ("jit", "remat2", "closed_call", "eval_jaxpr", "scan"),
            )
            name = "/".join((*scopes, eqn.primitive.name))
            path, line = f"{name}#{counts[name]}", _jax.line_of(eqn)
            counts[name] += 1
        size = math.prod(v.aval.shape) * v.aval.dtype.itemsize
        return Residual(path, tuple(v.aval.shape), v.aval.dtype, size, eqn, line)

    return tuple(map(residual, jaxpr.outvars[len(jaxpr.outvars) - count :]))


def _size(n: float) -> str:
    """A number of bytes in words."""
    k = min(int(math.log2(max(n, 1))) // 10, 4)
    return f"{n / 1024**k:,.{1 if k else 0}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[k]}"
