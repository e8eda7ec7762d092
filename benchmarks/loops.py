"""Reverse mode through a `while` loop: `fg.grad` beside equinox's checkpointed loop, and beside `scan` of a known length.

Every row is one loop: its body, the floats of its state and its number of steps, which the program does not know. equinox
(Kidger 2021, `equinox.internal.while_loop`, after Stumm & Walther 2010) keeps 32 states, and funcgrad in their place 16 and the
residuals of 16 steps; beside `scan`, which keeps those of all steps, what it keeps by default. Temporaries are what XLA says
that it allocates. The last rows are a batch of unequal loops, each with its gradient, and the gradient of a gradient.
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
                ours, theirs = by_funcgrad(body, fg.Loops(16, 16)), by_equinox(body, CHECKPOINTS)
                rows.append(measured(body, floats, steps, "equinox", ours, theirs, arguments(body, floats), quick))
    for floats in (1024,) if quick else (1024, 102_400):
        steps = 100 if quick else 1_000
        ours, theirs = by_funcgrad(matmul, fg.Loops()), by_scan(matmul, steps)
        rows.append(measured(matmul, floats, steps, "scan", ours, theirs, arguments(matmul, floats), quick))
    lanes = 8 if quick else 64
    w, x = arguments(matmul, 1024)
    ways = (
        jax.jit(jax.vmap(f, (None, 0, 0)))
        for f in (by_funcgrad(matmul, fg.Loops(16, 16)), by_equinox(matmul, CHECKPOINTS))
    )
    args = w, jnp.stack([x] * lanes)
    rows.append(measured(matmul, 1024, 4 * np.arange(1, lanes + 1), "lanes", *ways, args, quick))
    rows.append(
        measured(elementwise, 1024, 100, "first order", *of_second_order(), arguments(elementwise, 1024), quick)
    )
    return rows


def of_second_order() -> tuple[Callable, Callable]:
    """The gradient of a gradient, and the gradient."""
    first = by_funcgrad(elementwise, fg.Loops())
    squared = lambda w, x, steps: sum(jnp.sum(g**2) for g in first(w, x, steps))
    return jax.jit(fg.grad(squared, (0, 1))), first


def measured(
    body: Step, floats: int, steps: Any, beside: str, ours: Callable, theirs: Callable, args: tuple, quick: bool
) -> dict[str, Any]:
    args = *args, np.asarray(steps, np.int32)
    compiled = [f.lower(*args).compile() for f in (ours, theirs)]
    temp = [c.memory_analysis().temp_size_in_bytes for c in compiled]
    ways = [lambda c=c: jax.block_until_ready(c(*args)) for c in compiled]
    if beside != "first order":
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-4), *(way() for way in ways))
    took = interleaved(*ways, rounds=3 if quick else 9, calls=calls_within(0.02, ways[1]), within_s=6).wall_s
    return {
        "body": body.__name__,
        "floats": floats,
        "steps": int(np.max(steps)),
        "beside": beside,
        "theirs_ms": float(np.median(took[1])) * 1e3,
        "ours_ms": float(np.median(took[0])) * 1e3,
        "time": ratio(*took),
        "temp_kb": temp[0] / 1024,
        "memory": temp[0] / temp[1],
    }


def figures(rows: list[dict[str, Any]]) -> list[Figure]:
    of = lambda beside, what: [row[what] for row in rows if row["beside"] == beside]
    return [
        Figure("time beside equinox, geomean", geomean(of("equinox", "time")), most=0.5),
        Figure("time beside equinox, most", max(of("equinox", "time")), most=0.8),
        Figure("memory beside equinox, most", max(of("equinox", "memory")), most=1.0),
        Figure("time beside scan, most", max(of("scan", "time")), most=1.15),
        Figure("memory beside scan, most", max(of("scan", "memory")), most=0.05),
        Figure("time of a batch beside equinox", max(of("lanes", "time")), most=0.8),
        Figure("memory of second order beside first", max(of("first order", "memory")), most=4.0),
    ]
