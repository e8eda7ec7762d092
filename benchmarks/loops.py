"""Reverse mode through a `while` loop: `fg.grad` compared with equinox's checkpointed loop and with a `scan`.

Every row is one loop with its body, the number of floats in its state, and its number of steps. The program does not
know the number of steps. equinox (Kidger 2021, `equinox.internal.while_loop`, after Stumm & Walther 2010) stores 32
states. funcgrad uses no more memory: it stores 28 states and the residuals of 16 steps. In the comparison with a `scan`
of known length, which stores the residuals of all steps, funcgrad uses its defaults. Temporaries are those that XLA
reports. The last rows are a batch of loops of unequal length, and the gradient of a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    "trace_ms": ".1f",
    "trace": ".2f",
}
CHECKPOINTS = 32
Step = Callable[[Any, Any], Any]


def elementwise(w: Any, x: Any) -> Any:
    return jnp.sin(x) * w + 0.1


def matmul(w: Any, x: Any) -> Any:
    return jnp.tanh(x @ w)


def arguments(body: Step, floats: int) -> tuple[Any, Any]:
    """The weights and the initial state: a vector for `elementwise`, rows of 32 for `matmul`."""
    if body is elementwise:
        return jnp.full(floats, 0.9), jnp.linspace(0, 1, floats)
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
    return draw(32, 32) / 6, draw(floats // 32, 32)


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
    sizes, steps = ((1024,), 100) if quick else ((1024, 102_400), 1_000)
    rows = [row for floats in sizes for row in beside_scan(floats, steps, quick)]
    if quick:  # the others take long to compile
        return rows
    bodies = [(body, floats) for floats in sizes for body in (elementwise, matmul)]
    rows += [row for each in bodies for row in beside_equinox(*each, (10, 100, 1_000, 10_000), quick)]
    return rows + of_lanes_and_second_order(64, quick)


def beside_scan(floats: int, steps: int, quick: bool) -> list[dict[str, Any]]:
    """The same number of steps as a scan, which stores the residuals of all steps."""
    ways = lambda: (by_funcgrad(matmul, fg.Loops()), by_scan(matmul, steps))
    return measured(matmul, floats, [steps], "scan", ways, arguments(matmul, floats), quick)


def beside_equinox(body: Step, floats: int, steps: Sequence[int], quick: bool) -> list[dict[str, Any]]:
    """With about the same number of checkpoints as equinox."""
    ways = lambda: (by_funcgrad(body, fg.Loops(28, 16)), by_equinox(body, CHECKPOINTS))
    return measured(body, floats, steps, "equinox", ways, arguments(body, floats), quick)


def of_lanes_and_second_order(lanes: int, quick: bool) -> list[dict[str, Any]]:
    """A batch of unequal loops compared with equinox, and the gradient of a gradient compared with the gradient."""
    w, x = arguments(matmul, 1024)
    batched = lambda f: jax.jit(jax.vmap(f, (None, 0, 0)))
    ways = lambda: (batched(by_funcgrad(matmul, fg.Loops(28, 16))), batched(by_equinox(matmul, CHECKPOINTS)))
    steps, states = 4 * np.arange(1, lanes + 1), jnp.stack([x] * lanes)
    rows = measured(matmul, 1024, [steps], "lanes", ways, (w, states), quick)
    return rows + measured(
        elementwise, 1024, [100], "first order", of_second_order, arguments(elementwise, 1024), quick
    )


def of_second_order() -> tuple[Callable, Callable]:
    """The gradient of a gradient, and the gradient itself."""
    first = by_funcgrad(elementwise, fg.Loops())
    squared = lambda w, x, steps: sum(jnp.sum(g**2) for g in first(w, x, steps))
    return jax.jit(fg.grad(squared, (0, 1))), first


def measured(
    body: Step,
    floats: int,
    lengths: Sequence[Any],
    beside: str,
    make: Callable[[], tuple[Callable, Callable]],
    args: tuple,
    quick: bool,
) -> list[dict[str, Any]]:
    """One row per number of steps. Both variants, ours first, are traced and compiled once for all rows."""
    rows = []
    inputs = [(*args, np.asarray(steps, np.int32)) for steps in lengths]
    tracing = interleaved(*(lambda k=k: make()[k].trace(*inputs[0]) for k in (0, 1)), rounds=1 if quick else 9).cpu_s
    compiled = [f.lower(*inputs[0]).compile() for f in make()]
    temp = [c.memory_analysis().temp_size_in_bytes for c in compiled]
    for values in inputs:
        ways = [lambda c=c, values=values: jax.block_until_ready(c(*values)) for c in compiled]
        if beside != "first order":
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-4), *(way() for way in ways))
        times_s = interleaved(
            *ways, rounds=3 if quick else 9, calls=calls_within(0.002 if quick else 0.02, ways[1]), within_s=6
        ).wall_s
        rows.append(
            {
                "body": body.__name__,
                "floats": floats,
                "steps": int(np.max(values[-1])),
                "beside": beside,
                "theirs_ms": float(np.median(times_s[1])) * 1e3,
                "ours_ms": float(np.median(times_s[0])) * 1e3,
                "time": ratio(*times_s),
                "temp_kb": temp[0] / 1024,
                "memory": temp[0] / temp[1],
                "trace_ms": float(np.median(tracing[0])) * 1e3,
                "trace": ratio(*tracing),
            }
        )
    return rows


def figures(rows: list[dict[str, Any]]) -> list[Figure]:
    """The targets of the measured rows. A quick run does not measure all rows."""
    targets: list[tuple[str, Callable, str, str, float]] = [
        ("time / time of equinox, geomean", geomean, "equinox", "time", 0.5),
        ("time / time of equinox, maximum", max, "equinox", "time", 0.8),
        ("memory / memory of equinox, maximum", max, "equinox", "memory", 1.0),
        ("time / time of scan, maximum", max, "scan", "time", 1.15),
        ("memory / memory of scan, maximum", max, "scan", "memory", 0.05),
        ("tracing time / tracing time of scan, maximum", max, "scan", "trace", 3.0),
        ("time of a batch / time of equinox", max, "lanes", "time", 0.8),
        ("memory of second order / first order", max, "first order", "memory", 4.0),
    ]
    results = []
    for name, together, beside, what, most in targets:
        if values := [row[what] for row in rows if row["beside"] == beside]:
            results.append(Figure(name, together(values), most=most))
    return results
