"""An identity `rewrite` of 10,000 equations: the rule binds each equation unchanged.

`flat` is a chain of 10,000 equations. `nested` has the same equations in 100 loops of 100. "cold" is the first rewrite
of a graph with a table of rules. "warm" is a later rewrite, which reuses the rewritten sub-jaxprs that the table
stores. The reference is JAX's own evaluation of the graph under `jax.make_jaxpr`, which does not enter sub-jaxprs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import jaxpr_as_fun

import funcgrad as fg
from tests.checks import identity

from .bounds import figure
from .interleaving import Figure, interleaved

COLUMNS = {"graph": "", "equations": ",d", "jax_s": ".3f", "cold_s": ".3f", "warm_s": ".3f"}


def steps(x: jax.Array, equations: int) -> jax.Array:
    for _ in range(equations // 2):
        x = lax.add(lax.sin(x), x)
    return x


def flat(equations: int) -> Callable:
    return lambda x: steps(x, equations)


def nested(equations: int) -> Callable:
    def f(x):
        for _ in range(equations // 100):
            x = lax.fori_loop(0, 3, lambda _, x: steps(x, 98), x)  # and two that count
        return x

    return f


def run(quick: bool) -> list[dict[str, Any]]:
    return [measured(f, equations=1000 if quick else 10_000, rounds=3 if quick else 7) for f in (flat, nested)]


def measured(f: Callable, equations: int, rounds: int) -> dict[str, Any]:
    graph, rules = fg.trace(f(equations), jnp.ones(3)), identity()
    fresh = lambda: fg.Rules("identity", default=rules.default)
    fg.rewrite(graph, rules)
    ways = (
        lambda: jax.make_jaxpr(jaxpr_as_fun(graph.jaxpr))(*graph.in_avals),
        lambda: fg.rewrite(graph, fresh()),
        lambda: fg.rewrite(graph, rules),
    )
    jax_s, cold_s, warm_s = (float(np.median(s)) for s in interleaved(*ways, rounds=rounds).cpu_s)
    equations = sum(1 for _ in fg.walk(graph))
    return {"graph": f.__name__, "equations": equations, "jax_s": jax_s, "cold_s": cold_s, "warm_s": warm_s}


def figures(rows: list[dict[str, Any]]) -> list[Figure]:
    return [
        figure(f"{row['graph']}, {how}: CPU seconds of a rewrite", row[f"{how}_s"])
        for row in rows
        for how in ("cold", "warm")
    ]
