"""`vmap`, `jacrev` and `hessian` within a memory budget, compared with all lanes at once and with `jax.lax.map`.

The handwritten variants are `lax.map(batch_size=...)` with the five largest powers of two that fit the budget. `time`
is the ratio to the fastest of them in wall seconds, `cpu` in CPU seconds. At 100 %, both are ratios to the plain
program. `memory` is the temporaries that XLA allocates, divided by the budget. `choosing_s` is the time of the first
call, which traces and compiles to choose the chunk size.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import funcgrad as fg

from .interleaving import Figure, calls_within, geomean, interleaved, ratio

COLUMNS = {
    "program": "",
    "lanes": "d",
    "budget": "",
    "budget_kb": ".0f",
    "plain_ms": ".2f",
    "by_hand_ms": ".2f",
    "by_hand": "d",
    "ours_ms": ".2f",
    "time": ".3f",
    "cpu": ".3f",
    "beside_plain": ".3f",
    "memory": ".3f",
    "choosing_s": ".2f",
}


class Mapped(NamedTuple):
    """A program in three forms.

    Attributes:
      ours: from a budget to a function of `x`; None is no budget.
      by_hand: from a chunk size to a function of `x`.
    """

    name: str
    lanes: int
    x: Any
    plain: Callable
    ours: Callable
    by_hand: Callable


def weights(sizes: tuple[int, ...]) -> list[Any]:
    return [normal(a, b) / math.sqrt(a) for a, b in itertools.pairwise(sizes)]


def normal(*shape: int) -> Any:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


def mlp(ws: list[Any], x: Any) -> Any:
    for w in ws[:-1]:
        x = jnp.tanh(x @ w)
    return x @ ws[-1]


def of_examples(name: str, f: Callable, xs: Any) -> Mapped:
    by_hand = lambda size: lambda xs: lax.map(f, xs, batch_size=size)
    return Mapped(name, len(xs), xs, jax.vmap(f), lambda memory: fg.vmap(f, memory=memory), by_hand)


def programs(quick: bool) -> list[Mapped]:
    ws = weights((8, 16, 4) if quick else (64, 128, 128, 10))
    gradient = jax.grad(lambda ws, x: jnp.sum(mlp(ws, x) ** 2))
    norm = lambda x: sum(jnp.sum(g**2) for g in gradient(ws, x))
    mapped_programs = [of_examples("norms of gradients", norm, normal(32 if quick else 512, ws[0].shape[0]))]
    if quick:
        return mapped_programs
    mapped_programs.append(of_examples("gradients", functools.partial(gradient, ws), normal(512, 64)))
    wide = weights((256, 512, 512, 10))
    wider = lambda x: sum(jnp.sum(g**2) for g in gradient(wide, x))
    mapped_programs.append(of_examples("norms of wide gradients", wider, normal(128, 256)))
    points = normal(2000, 16)
    kernel = lambda x: jax.nn.softmax(-jnp.sum((points - x) ** 2, -1)) @ points
    mapped_programs.append(of_examples("pairwise kernel", kernel, points))
    return [
        *mapped_programs,
        jacobian_of(weights((256, 512, 1024)), normal(256)),
        hessian_of(weights((256, 256, 256, 1)), normal(256)),
    ]


def jacobian_of(ws: list[Any], x: Any) -> Mapped:
    f = functools.partial(mlp, ws)
    n = ws[-1].shape[1]

    def by_hand(size):
        def rows(x):
            _, pull = jax.vjp(f, x)
            return lax.map(lambda k: pull(jax.nn.one_hot(k, n))[0], jnp.arange(n), batch_size=size)

        return rows

    return Mapped("jacobian", n, x, jax.jacrev(f), lambda memory: fg.jacrev(f, memory=memory), by_hand)


def hessian_of(ws: list[Any], x: Any) -> Mapped:
    f = lambda x: jnp.sum(mlp(ws, x) ** 2)
    n = len(x)

    def by_hand(size):
        def columns(x):
            push = lambda k: jax.jvp(jax.grad(f), (x,), (jax.nn.one_hot(k, n),))[1]
            return lax.map(push, jnp.arange(n), batch_size=size)

        return columns

    return Mapped("hessian", n, x, jax.hessian(f), lambda memory: fg.hessian(f, memory=memory), by_hand)


def run(quick: bool) -> list[dict[str, Any]]:
    budgets = ("25%", "100%") if quick else ("50%", "10%", "100%")
    return [measured(p, memory, quick) for p in programs(quick) for memory in budgets]


def temp_bytes(f: Callable, x: Any) -> int:
    return jax.jit(f).lower(x).compile().memory_analysis().temp_size_in_bytes


def measured(p: Mapped, memory: str, quick: bool) -> dict[str, Any]:
    """One row. If the budget is 100 %, the plain program is the handwritten variant."""
    budget = temp_bytes(p.plain, p.x) * float(memory[:-1]) / 100
    start_s = time.perf_counter()
    ours = p.ours(memory)
    jax.block_until_ready(ours(p.x))
    choosing_s = time.perf_counter() - start_s
    by_hand = {}
    for size in (2**k for k in reversed(range(p.lanes.bit_length())) if 2**k < p.lanes):
        if memory != "100%" and len(by_hand) < (1 if quick else 5) and temp_bytes(p.by_hand(size), p.x) <= budget:
            by_hand[size] = jax.jit(p.by_hand(size))
    functions = [jax.jit(p.plain), ours, *by_hand.values()]
    ways = [lambda f=f: jax.block_until_ready(f(p.x)) for f in functions]
    for way in ways[1:]:
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-2, atol=1e-3), way(), ways[0]())
    timed = interleaved(
        *ways, rounds=3 if quick else 15, calls=calls_within(0.01 if quick else 0.2, ways[1]), within_s=15
    )
    times_s, spent = timed.wall_s, timed.cpu_s
    best = 2 + int(np.argmin(np.median(times_s[2:], axis=1))) if by_hand else 0
    return {
        "program": p.name,
        "lanes": p.lanes,
        "budget": memory,
        "budget_kb": budget / 1024,
        "plain_ms": float(np.median(times_s[0])) * 1e3,
        "by_hand_ms": float(np.median(times_s[best])) * 1e3,
        "by_hand": list(by_hand)[best - 2] if by_hand else p.lanes,
        "ours_ms": float(np.median(times_s[1])) * 1e3,
        "time": ratio(times_s[1], times_s[best]),
        "cpu": ratio(spent[1], spent[best]),
        "beside_plain": ratio(times_s[1], times_s[0]),
        "memory": temp_bytes(ours, p.x) / max(budget, 1),
        "choosing_s": choosing_s,
    }


def figures(rows: list[dict[str, Any]]) -> list[Figure]:
    bound = [row for row in rows if row["budget"] != "100%"]
    return [
        Figure("memory / budget, maximum", max(row["memory"] for row in rows), most=1.0),
        Figure("time / best time by hand, geomean", geomean(row["time"] for row in bound), most=1.05),
        Figure("time / best time by hand, maximum", max(row["time"] for row in bound), most=1.05),
        Figure("time / plain time at 100 %, maximum", max(r["time"] for r in rows if r not in bound), most=1.05),
    ]
