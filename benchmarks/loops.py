"""Reverse mode through a `while` loop: `fg.grad` beside equinox's checkpointed loop, and beside `scan` of a known length.

Every row is one loop: its body, the floats of its state and its number of steps, which the program does not know. equinox
(Kidger 2021, `equinox.internal.while_loop`, after Stumm & Walther 2010) is given as many checkpoints, and funcgrad keeps no residuals besides.
Temporaries are what XLA says that it allocates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import funcgrad as fg

from .interleaving import Figure, calls_within, geomean, interleaved, ratio

COLUMNS = {
    "body": "",
    "floats": "d",
    "steps": "d",
    "beside": "",
    "theirs_ms": ".2f",
    "ours_ms": ".2f",
    "time": ".3f",
    "temp_kb": ".0f",
    "memory": ".3f",
}
CHECKPOINTS = 32
Step = Callable[[Any, Any], Any]


def elementwise(w: Any, x: Any) -> Any:
    return jnp.sin(x) * w + 0.1


def matmul(w: Any, x: Any) -> Any:
    return jnp.tanh(x @ w)


def arguments(body: Step, floats: int) -> tuple[Any, Any]:
    """The weights and the first state: a vector, or rows of 32 for a matrix."""
    if body is elementwise:
        return jnp.full(floats, 0.9), jnp.linspace(0, 1, floats)
    w = jax.random.normal(jax.random.key(0), (32, 32)) / 6
    return w, jax.random.normal(jax.random.key(1), (floats // 32, 32))


def by_funcgrad(body: Step, loops: fg.Loops) -> Callable:
    def loss(w, x, steps):
        return jnp.sum(lax.while_loop(lambda t: t[0] < steps, lambda t: (t[0] + 1, body(w, t[1])), (0, x))[1])

    return jax.jit(fg.grad(loss, (0, 1), loops=loops))


def by_equinox(body: Step, checkpoints: int) -> Callable:
    import equinox.internal as eqxi

    def loss(w, x, steps):
        step = lambda t: (t[0] + 1, body(w, t[1]))
        last = eqxi.while_loop(lambda t: t[0] < steps, step, (0, x), kind="checkpointed", checkpoints=checkpoints)
        return jnp.sum(last[1])

    return jax.jit(jax.grad(loss, (0, 1)))


def by_scan(body: Step, steps: int) -> Callable:
    def loss(w, x, _):
        return jnp.sum(lax.scan(lambda x, _: (body(w, x), None), x, None, length=steps)[0])

    return jax.jit(jax.grad(loss, (0, 1)))


def run(quick: bool) -> list[dict[str, Any]]:
    rows = []
    for body in (elementwise, matmul):
        for floats in (1024,) if quick else (1024, 102_400):
            for steps in (10, 100) if quick else (10, 100, 1_000, 10_000):
                theirs = by_equinox(body, CHECKPOINTS)
                ours = by_funcgrad(body, fg.Loops(CHECKPOINTS, 1))
                rows.append(measured(body, floats, steps, "equinox", ours, theirs, quick))
    for floats in (1024,) if quick else (1024, 102_400):
        steps = 100 if quick else 1_000
        ours = by_funcgrad(matmul, fg.Loops(CHECKPOINTS, 16))
        rows.append(measured(matmul, floats, steps, "scan", ours, by_scan(matmul, steps), quick))
    return rows


def measured(
    body: Step, floats: int, steps: int, beside: str, ours: Callable, theirs: Callable, quick: bool
) -> dict[str, Any]:
    w, x = arguments(body, floats)
    compiled = [f.lower(w, x, steps).compile() for f in (ours, theirs)]
    temp = [c.memory_analysis().temp_size_in_bytes for c in compiled]
    ways = [lambda c=c: jax.block_until_ready(c(w, x, np.int32(steps))) for c in compiled]
    found = [way() for way in ways]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-4), *found)
    took = interleaved(*ways, rounds=3 if quick else 9, calls=calls_within(0.02, ways[1]), within_s=8).wall_s
    return {
        "body": body.__name__,
        "floats": floats,
        "steps": steps,
        "beside": beside,
        "theirs_ms": float(np.median(took[1])) * 1e3,
        "ours_ms": float(np.median(took[0])) * 1e3,
        "time": ratio(*took),
        "temp_kb": temp[0] / 1024,
        "memory": temp[0] / temp[1],
    }


def figures(rows: list[dict[str, Any]]) -> list[Figure]:
    found = []
    beside = {name: [row for row in rows if row["beside"] == name] for name in ("equinox", "scan")}
    found.append(Figure("time beside equinox, geomean", geomean(row["time"] for row in beside["equinox"]), most=0.5))
    found.append(Figure("time beside equinox, most", max(row["time"] for row in beside["equinox"]), most=0.8))
    found.append(Figure("memory beside equinox, most", max(row["memory"] for row in beside["equinox"]), most=1.0))
    found.append(Figure("time beside scan, most", max(row["time"] for row in beside["scan"]), most=1.4))
    found.append(Figure("memory beside scan, most", max(row["memory"] for row in beside["scan"]), most=0.05))
    return found
