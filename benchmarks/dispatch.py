"""The cost of a call: `fg.jit` compared with `jax.jit`, with 2 and with 200 leaves.

"hit" is a call that JAX dispatches from its cache. "nested" is a call inside another trace. "callback" is a call of a
function with effects. JAX does not dispatch the last two from its cache, so the Python code of `fg.jit` runs at each of
these calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import funcgrad as fg

from .bounds import figure
from .interleaving import Figure, calls_within, interleaved, ratio

COLUMNS = {"call": "", "leaves": "d", "jax_us": ".2f", "funcgrad_us": ".2f", "difference_us": "+.2f", "ratio": ".3f"}


def hit(jit: Callable, params: dict) -> Callable:
    step = jit(lambda params: params["w0"] + 1)
    return lambda: step(params)


def nested(jit: Callable, params: dict) -> Callable:
    step = jit(lambda params: params["w0"] + 1)
    return lambda: jax.eval_shape(lambda p: step(p), params)


def callback(jit: Callable, params: dict) -> Callable:
    step = jit(lambda params: jax.debug.callback(lambda x: None, params["w0"]))
    return lambda: step(params)


def run(quick: bool) -> list[dict[str, Any]]:
    return [
        measured(call, leaves, rounds=5 if quick else 41, turn_s=0.01 if quick else 0.05)
        for call in (hit, nested, callback)
        for leaves in (2, 200)
    ]


def measured(call: Callable, leaves: int, rounds: int, turn_s: float) -> dict[str, Any]:
    params = {f"w{i}": jnp.ones(()) for i in range(leaves)}
    ours, theirs = call(fg.jit, params), call(jax.jit, params)
    ours()  # compiles
    times_s = interleaved(ours, theirs, rounds=rounds, calls=calls_within(turn_s, theirs)).cpu_s
    return {
        "call": call.__name__,
        "leaves": leaves,
        "jax_us": float(np.median(times_s[1])) * 1e6,
        "funcgrad_us": float(np.median(times_s[0])) * 1e6,
        "difference_us": float(np.median(times_s[0] - times_s[1])) * 1e6,
        "ratio": ratio(*times_s),
    }


def figures(rows: list[dict[str, Any]]) -> list[Figure]:
    """Only hits have a target. In a nested call, tracing costs far more than dispatch."""
    return [
        figure(f"hit with {row['leaves']} leaves: extra time over jax.jit, us", row["difference_us"])
        for row in rows
        if row["call"] == "hit"
    ]
