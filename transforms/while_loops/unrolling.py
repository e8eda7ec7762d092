"""What a loop of funcgrad's own computes for values at hand, as a graph of two scans: one forward, one back."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax

from ..core import _jax
from . import checkpointed


def unrolled(eqn: Any, values: Sequence[Any]) -> _jax.ClosedJaxpr:
    """A graph of the operands of a sweep (`layouts.SWEEPS`), with its results; of `forward` only the first, the last x."""
    p, name = eqn.params, eqn.primitive.name
    if name == "tangent":
        f: Any = functools.partial(eqn.primitive.impl, **p)
    else:
        sweep = p["sweep"]
        n_c, n_x, n_y, _ = sweep.sizes
        cut = lambda values: (values[:n_c], values[n_c : n_c + n_x], values[n_c + n_x : n_c + n_x + n_y])
        steps = int(jax.jit(functools.partial(checkpointed.count, sweep))(*cut(list(values))[:2]))

        def both(*values):
            c, x, y = cut(values)
            last, y, totals = checkpointed.stepwise(sweep, c, x, y if name == "sweep" and n_y else None, steps)
            return [*([] if p.get("is_kept") else last), *y, *totals]

        f = both

    return _jax.stage_flat(f, [jax.typeof(x) for x in values], _jax.no_names)
