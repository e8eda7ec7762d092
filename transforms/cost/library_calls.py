"""What library calls (products, convolutions) take besides operands and results: copies in another order, memory to work in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .backends import Backend
from .operations import nbytes


def workspace_bytes(eqn: Any, backend: Backend) -> int:
    """The bytes that a product of two matrices of m · n · k ≥ 2²⁷ works in."""
    if not backend.workspace or eqn.primitive.name != "dot_general":
        return 0
    avals = [v.aval for v in (*eqn.invars, *eqn.outvars)]
    is_large = all(a.ndim == 2 for a in avals) and math.prod(math.prod(a.shape) for a in avals) >= 2**54  # (m · n · k)²
    return backend.workspace * is_large


def order_of(eqn: Any, k: int, backend: Backend) -> Sequence[int] | None:
    """The order of axes in which a library call takes its operand; None for any."""
    if eqn.primitive.name not in backend.ordered:
        return None
    if eqn.primitive.name == "dot_general":
        contracted, batch = (sides[k] for sides in eqn.params["dimension_numbers"])
        free = [d for d in range(eqn.invars[k].aval.ndim) if d not in contracted and d not in batch]
        if tuple(batch) == tuple(range(len(batch))) and len(contracted) == 1 and len(free) <= 1:
            return None  # it takes a matrix and its transpose
        return [*batch, *free, *contracted] if k == 0 else [*batch, *contracted, *free]
    if eqn.primitive.name == "conv_general_dilated":
        first, second, *space = eqn.params["dimension_numbers"][k]
        return [first, *space, second] if k == 0 else [*space, second, first]
    return None


def copied_bytes(eqn: Any, backend: Backend) -> int:
    """The bytes of the copies that a library call reads of operands whose axes have an order that it does not take."""
    orders = ((v.aval, order_of(eqn, k, backend)) for k, v in enumerate(eqn.invars))
    return sum(nbytes(aval) for aval, order in orders if order is not None and is_moved(order, aval.shape))


def is_moved(order: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether axes change places, but for those of size 1."""
    kept = [d for d in order if shape[d] != 1]
    return kept != sorted(kept)
