"""The graph of a bound `forward`, `sweep` or `tangent` for concrete values: two scans, one forward and one back."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax

from ..core import _jax
from . import checkpointed
from .adjoint import cut


def unrolled(eqn: Any, values: Sequence[Any]) -> _jax.ClosedJaxpr:
    """A graph with the operands and the results of `eqn` (`subjaxprs.SWEEPS`); of `forward` only the last x."""
    params, name = eqn.params, eqn.primitive.name
    if name == "tangent":
        f: Any = functools.partial(eqn.primitive.impl, **params)
    else:
        sweep = params["sweep"]
        n_c, n_x, n_y, _ = sweep.sizes
        n = int(jax.jit(functools.partial(checkpointed.plain, sweep))(*cut(values, n_c, n_x)[:2])[0])

        def f(*values):
            c, x, y, _ = cut(values, n_c, n_x, n_y)
            last, y, totals = checkpointed.stepwise(sweep, c, x, y if name == "sweep" and n_y else None, n)
            return [*([] if params.get("has_checkpoints") else last), *y, *totals]

    return _jax.stage_flat(f, [jax.typeof(x) for x in values], _jax.no_names)
