"""`fg.grad` of a function and of its Graph, compared with `jax.grad`, on the programs of `tests/corpus.py`.

The tracing time is the time that a user waits: `jax.jit(fg.grad(f)).trace(...)`, and
`jax.jit(fg.grad(fg.trace(f, ...))).trace(...)` for a Graph. "cold" is a trace with empty JAX caches. "warm" is a later
trace: JAX's caches contain the jitted functions that `f` calls (most of jax.numpy), but neither `f` nor its Graph.

Times are CPU seconds, because the programs are tiny and most of them run in the calling thread.

The compiled program must be equal to JAX's own program: the same number of each operation, before XLA's passes
(StableHLO) and after them (HLO), and the same bytes of temporaries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import funcgrad as fg
from tests.checks import TRANSFORMS, opcode_counts
from tests.corpus import CORPUS, Program

from .bounds import figure
from .interleaving import Figure, calls_within, geomean, interleaved, ratio

COLUMNS = {
    "program": "",
    "form": "",
    "jax_cold_ms": ".1f",
    "cold": ".3f",
    "jax_warm_ms": ".1f",
    "warm": ".3f",
    "jax_run_us": ".1f",
    "run": ".3f",
    "run_wall": ".3f",
    "temp_bytes": "+d",
    "stablehlo": "",
    "hlo": "",
}
QUICK = ("scalar", "dense", "scan")
FORMS = "function", "graph"

(GRAD,) = (t for t in TRANSFORMS if t.name == "grad")


def run(quick: bool) -> list[dict[str, Any]]:
    programs = [p for p in CORPUS if "grad" not in p.lacks and (p.name in QUICK or not quick)]
    rounds, turn_s = (3, 1e-3) if quick else (7, 5e-3)
    rows = []
    for p in programs:
        tracing, jitted = traced(p, rounds), [make() for make in gradients(p)]
        for parts in zip(tracing, compiled(p, jitted), ran(p, jitted, 2 * rounds + 1, turn_s), strict=True):
            rows.append({name: value for part in parts for name, value in part.items()})
    return rows


def gradients(p: Program) -> list[Callable[[], Any]]:
    """Functions that each create a new jitted gradient: JAX's, then ours in each form."""
    namespaces = [(jax, "function"), *((fg, form) for form in FORMS)]
    return [lambda m=m, form=form: jax.jit(GRAD.of(m, p, form)) for m, form in namespaces]


def traced(p: Program, rounds: int) -> list[dict[str, Any]]:
    ways = [lambda make=make: make().trace(*p.args) for make in gradients(p)]
    cold = interleaved(*ways, rounds=rounds, before=jax.clear_caches).cpu_s
    warm = interleaved(*ways, rounds=rounds).cpu_s
    return [
        {
            "program": p.name,
            "form": form,
            "jax_cold_ms": float(np.median(cold[0])) * 1e3,
            "cold": ratio(cold[k], cold[0]),
            "jax_warm_ms": float(np.median(warm[0])) * 1e3,
            "warm": ratio(warm[k], warm[0]),
        }
        for k, form in enumerate(FORMS, start=1)
    ]


def compiled(p: Program, jitted: list[Any]) -> list[dict[str, Any]]:
    """The differences from JAX's program, before and after XLA's passes."""
    lowered = [f.lower(*p.args) for f in jitted]
    programs = [program.compile() for program in lowered]
    stablehlo, hlo = map(opcode_counts, lowered), map(opcode_counts, programs)
    temp_bytes = (program.memory_analysis().temp_size_in_bytes for program in programs)
    theirs, *ours = zip(stablehlo, hlo, temp_bytes, strict=True)
    return [
        {
            "stablehlo": difference(counts[0], theirs[0]),
            "hlo": difference(counts[1], theirs[1]),
            "temp_bytes": counts[2] - theirs[2],
            "jax_temp_bytes": theirs[2],
        }
        for counts in ours
    ]


def ran(p: Program, jitted: list[Any], rounds: int, turn_s: float) -> list[dict[str, Any]]:
    ways = [lambda f=f: jax.block_until_ready(f(*p.args)) for f in jitted]
    count = min(calls_within(turn_s, way) for way in ways)
    times_s = interleaved(*ways, rounds=rounds, calls=count)
    return [
        {
            "jax_run_us": float(np.median(times_s.wall_s[0])) * 1e6,
            "run": ratio(times_s.cpu_s[k], times_s.cpu_s[0]),
            "run_wall": ratio(times_s.wall_s[k], times_s.wall_s[0]),
        }
        for k in range(1, len(ways))
    ]


def difference(got: Counter, want: Counter) -> str:
    """'same', or the difference in the count of each operation."""
    changes = {name: got[name] - want[name] for name in sorted(got | want) if got[name] != want[name]}
    return " ".join(f"{name} {change:+d}" for name, change in changes.items()) or "same"


def figures(rows: list[dict[str, Any]]) -> list[Figure]:
    figures = []
    for form in FORMS:
        of_form = [row for row in rows if row["form"] == form]
        figures += [
            figure(f"{form}: run, geomean", geomean(row["run"] for row in of_form)),
            figure(f"{form}: cold trace, geomean", geomean(row["cold"] for row in of_form)),
            figure(f"{form}: warm trace, geomean", geomean(row["warm"] for row in of_form)),
            figure(f"{form}: programs with different StableHLO", sum(row["stablehlo"] != "same" for row in of_form)),
            figure(f"{form}: programs with different HLO", sum(row["hlo"] != "same" for row in of_form)),
            figure(f"{form}: programs with different temporaries", sum(row["temp_bytes"] != 0 for row in of_form)),
        ]
    return figures
