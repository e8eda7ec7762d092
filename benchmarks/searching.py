"""CPU seconds of one search for the residuals that fit a budget, for unrolled transformers, without compilation.

A budget needs a few searches. Each search adjusts its target bytes to the measurements of the programs compiled before.
"""

from __future__ import annotations

import time
from typing import Any

import jax
from funcgrad.transforms.remat.candidates import Call, Config
from funcgrad.transforms.remat.planner import Planner
from funcgrad.transforms.remat.policy import Policy
from funcgrad.transforms.remat.saved_set import Search, everything
from funcgrad.transforms.while_loops.schedule import Loops

from tests import trainings

from .interleaving import Figure

COLUMNS = {"equations": ",d", "budget": ".0%", "cpu_s": ".2f", "again_s": ".3f"}
PARTS = 0.75, 0.5, 0.35, 0.25, 0.15
MOST_S = {2_100: 1.0, 10_000: 10.0}  # by at most so many equations
ROUNDS = 3


def run(quick: bool) -> list[dict[str, Any]]:
    depths, parts = ((1,), (0.5,)) if quick else ((9, 44), PARTS)
    return [row for depth in depths for row in measured(depth, parts, 1 if quick else ROUNDS)]


def measured(depth: int, parts: tuple[float, ...], rounds: int) -> list[dict[str, Any]]:
    """One row per budget, a fraction of the peak without recomputation: best search time, and recomputation seconds."""
    loss, args = trainings.transformer(lambda layer: layer, depth=depth)
    leaves, tree = jax.tree.flatten((args, {}))
    options = dict(argnums=0, has_aux=False, holomorphic=False)
    call = Call(tree, [None] * len(leaves), [True] * len(leaves))
    joint = Planner(jax.value_and_grad, loss, call, leaves, options, None).trace(Config((), Loops())).joint
    whole = Search(joint).simulate(Policy(everything(joint)), 0).peak
    rows = []
    for part in parts:
        times_s = []
        for _ in range(rounds):
            search, start_s = Search(joint), time.process_time()
            found = search.best(part * whole)
            times_s.append(time.process_time() - start_s)
        again_s = found[1].seconds if found else float("inf")
        rows.append({"equations": len(joint.eqns), "budget": part, "cpu_s": min(times_s), "again_s": again_s})
    return rows


def figures(rows: list[dict[str, Any]]) -> list[Figure]:
    found = []
    for equations in sorted({row["equations"] for row in rows}):
        seconds = max(row["cpu_s"] for row in rows if row["equations"] == equations)
        most = min(most for largest, most in MOST_S.items() if equations <= largest)
        found.append(Figure(f"{equations:,} equations: CPU seconds of a search, maximum", seconds, most=most))
    return found
