"""`fg.tape`: the cost of recording per operation, and its gradient compared with an eager `jax.grad`.

`more_us` is the extra time of an operation on an open tape. `grad` is the time of the tape's gradient divided by the
time of `jax.grad`; the operations are already on the tape. `with_recording` also includes the recorded run, because
`jax.grad` runs the function too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import funcgrad as fg

from .bounds import figure
from .interleaving import Figure, calls_within, interleaved, ratio

COLUMNS = {
    "operation": "",
    "operations": "d",
    "eager_us": ".1f",
    "more_us": ".1f",
    "jax_grad_us": ".1f",
    "grad_us": ".1f",
    "grad": ".3f",
    "with_recording": ".3f",
}
OPERATIONS: dict[str, Callable] = {
    "lax.sin": lax.sin,
    "lax.mul": lambda x: lax.mul(x, x),
    "jnp.tanh": jnp.tanh,
    "x @ W": lambda x: x @ W,
}
W = jnp.eye(8)


def chain(operation: Callable, count: int) -> Callable:
    def run(x):
        for _ in range(count):
            x = operation(x)
        return jnp.sum(x)

    return run


def run(quick: bool) -> list[dict[str, Any]]:
    names = list(OPERATIONS)[: 1 if quick else None]
    return [measured(name, 20 if quick else 200, quick) for name in names]


def measured(name: str, count: int, quick: bool) -> dict[str, Any]:
    f, x = chain(OPERATIONS[name], count), jnp.full(8, 0.5)
    gradient = jax.grad(f)

    def taped():
        with fg.tape() as t:
            return t, f(x)

    t, out = taped()
    ways = [
        lambda: jax.block_until_ready(f(x)),
        taped,
        lambda: jax.block_until_ready(gradient(x)),
        lambda: jax.block_until_ready(t.grad(out, x)),
    ]
    np.testing.assert_allclose(ways[3](), ways[2](), rtol=1e-5, atol=1e-7)
    times_s = interleaved(*ways, rounds=3 if quick else 21, calls=calls_within(0.005 if quick else 0.05, ways[2])).cpu_s
    eager, recording, theirs, ours = times_s / count * 1e6
    return {
        "operation": name,
        "operations": count,
        "eager_us": float(np.median(eager)),
        "more_us": float(np.median(recording - eager)),
        "jax_grad_us": float(np.median(theirs)),
        "grad_us": float(np.median(ours)),
        "grad": ratio(ours, theirs),
        "with_recording": ratio(recording + ours, theirs),
    }


def figures(rows: list[dict[str, Any]]) -> list[Figure]:
    """Operations of jax.numpy have no recording target: they are jitted, and a tape dispatches them in Python."""
    of_lax = [r for r in rows if r["operation"].startswith("lax.")]
    recorded = [figure(f"{r['operation']}: extra time per operation, us", r["more_us"]) for r in of_lax]
    return recorded + [figure(f"{r['operation']}: gradient / jax.grad", r["grad"]) for r in rows]
