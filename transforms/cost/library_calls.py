"""Memory of library calls (products, convolutions) besides operands and results: copies of operands, and workspace."""

from __future__ import annotations

import math
from typing import Any

from .backends import Backend
from .operations import nbytes


def workspace_bytes(eqn: Any, backend: Backend) -> int:
    """The workspace of a product of two matrices of m · n · k ≥ 2²⁷."""
    if not backend.workspace or eqn.primitive.name != "dot_general":
        return 0
    avals = [v.aval for v in (*eqn.invars, *eqn.outvars)]
    is_large = all(a.ndim == 2 for a in avals) and math.prod(math.prod(a.shape) for a in avals) >= 2**54  # (m · n · k)²
    return backend.workspace * is_large


def copy_order(eqn: Any, k: int, backend: Backend) -> tuple[int, ...]:
    """The order of axes in which a library call reads a copy of its k-th operand; () if it reads the operand itself."""
    if eqn.primitive.name not in backend.ordered:
        return ()
    shape, order = eqn.invars[k].aval.shape, list[int]()
    if eqn.primitive.name == "dot_general":
        contracted, batch = (sides[k] for sides in eqn.params["dimension_numbers"])
        free = [d for d in range(len(shape)) if d not in contracted and d not in batch]
        if tuple(batch) != tuple(range(len(batch))) or len(contracted) != 1 or len(free) > 1:
            order = [*batch, *free, *contracted] if k == 0 else [*batch, *contracted, *free]
    else:
        first, second, *space = eqn.params["dimension_numbers"][k]
        order = [first, *space, second] if k == 0 else [*space, second, first]
    axes = [d for d in order if shape[d] != 1]  # axes of size 1 move no data
    return tuple(order) if axes != sorted(axes) else ()


def copied_bytes(eqn: Any, backend: Backend) -> int:
    """The bytes of the copies of operands whose order of axes a library call does not take."""
    return sum(nbytes(v.aval) for k, v in enumerate(eqn.invars) if copy_order(eqn, k, backend))
