"""The number of body evaluations in the gradient of a `while` loop, compared with equinox's checkpointed loop.

equinox stores 32 states. funcgrad stores 32 states and no residuals, or 28 states and the residuals of 16 steps (see
`benchmarks.loops`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import funcgrad as fg

from .interleaving import Figure
from .loops import CHECKPOINTS, Step, by_equinox, by_funcgrad

COLUMNS = {
    "steps": "d",
    "equinox": "d",
    "as_many_checkpoints": "d",
    "with_residuals": "d",
    "ratio": ".2f",
    "other_ratio": ".2f",
}
STEPS = 5, 10, 33, 40, 50, 64, 100, 150, 200, 300, 500, 560, 1_000, 2_000, 5_000, 10_000


def run(quick: bool) -> list[dict[str, Any]]:
    rows = []
    for steps in (50,) if quick else STEPS:
        theirs = counted(lambda body: by_equinox(body, CHECKPOINTS), steps)
        same = counted(lambda body: by_funcgrad(body, fg.Loops(CHECKPOINTS, 1)), steps)
        other = counted(lambda body: by_funcgrad(body, fg.Loops(28, 16)), steps)
        values = steps, theirs, same, other, same / theirs, other / theirs
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def counted(by: Callable[[Step], Callable], steps: int) -> int:
    """The number of evaluations of the body."""
    calls = []

    @jax.custom_jvp
    def sine(x):
        return jax.pure_callback(lambda x: calls.append(1) or np.sin(x), x, x)

    sine.defjvp(lambda primals, tangents: ((out := sine(*primals)), tangents[0] * out))
    jax.block_until_ready(by(lambda w, x: sine(x) * w)(jnp.ones(()), jnp.ones(()), steps))
    return len(calls)


def figures(rows: list[dict[str, Any]]) -> list[Figure]:
    return [Figure("evaluations / those of equinox, maximum", max(row["ratio"] for row in rows), most=1.0)]
