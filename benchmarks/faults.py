"""`fg.nan_origin` compared with `jax_debug_nans` and `checkify`: how many faults of `tests/faults.py` each tool locates.

Every program runs as a plain function and jitted. A tool locates the line if the line occurs anywhere in its error: in
the message, in the traceback, or in those of the causes. `jax_debug_nans` runs with and without `jax_debug_infs`; the
better result counts. A tool locates the iteration and the lane if it locates the line, and if its message has their
numbers after the words "iteration", "step", "index" or the name of the loop. A fault without iterations and lanes needs
only the line.
"""

from __future__ import annotations

import contextlib
import io
import re
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import checkify

import funcgrad as fg
from tests import faults
from tests.faults import FAULTS, Fault

from .interleaving import Figure

COLUMNS = {"fault": "", "as": "", "ours": "", "debug_nans": "", "checkify": "", "ours_s": ".2f"}
QUICK = ("scan_step",)
NAMED = ("-", "line", "line, iteration")


def run(quick: bool) -> list[dict[str, Any]]:
    with jax.numpy_dtype_promotion("strict"):
        chosen = [fault for fault in FAULTS if not quick or fault.name in QUICK]
        return [row(fault, form) for fault in chosen for form in (("function",) if quick else ("function", "jit"))]


def row(fault: Fault, form: str) -> dict[str, Any]:
    program = jax.jit(fault.program) if form == "jit" else fault.program
    start_s = time.perf_counter()
    origin = fg.nan_origin(program, *fault.args)
    took_s = time.perf_counter() - start_s
    debugged = [level_of(fault, raised(lambda: debug(program, fault.args, infs))) for infs in (False, True)]
    return {
        "fault": fault.name,
        "as": form,
        "ours": NAMED[by_us(fault, origin)],
        "debug_nans": NAMED[max(debugged)],
        "checkify": NAMED[level_of(fault, raised(lambda: check(program, fault.args)))],
        "ours_s": took_s,
    }


def by_us(fault: Fault, origin: fg.NanOrigin | None) -> int:
    if origin is None or not (origin.line or "").startswith(f"{faults.__file__}:{fault.line} "):
        return 0
    return 1 + ((origin.iterations, origin.lanes) == (fault.iterations, fault.lanes))


def debug(program: Callable, args: tuple, infs: bool) -> None:
    with jax.debug_nans(True), jax.debug_infs(infs), contextlib.redirect_stdout(io.StringIO()):
        jax.block_until_ready(program(*args))


def check(program: Callable, args: tuple) -> None:
    error, _ = checkify.checkify(program, errors=checkify.float_checks)(*args)
    error.throw()


def raised(run: Callable[[], None]) -> Exception | None:
    try:
        run()
    except Exception as error:  # whatever they say
        return error
    return None


def level_of(fault: Fault, error: Exception | None) -> int:
    """How precisely an exception locates a fault, as an index into NAMED."""
    text, lines = "", set()
    while error is not None:
        text += str(error)
        frames = traceback.extract_tb(error.__traceback__)
        lines |= {frame.lineno for frame in frames if frame.filename == faults.__file__}
        error = error.__cause__ or error.__context__
    lines |= {int(n) for n in re.findall(r"faults\.py:(\d+)", text)}
    counted = [*fault.iterations, *(("index", k) for k in fault.lanes or ())]
    is_counted = all(re.search(rf"(iteration|step|{what})\D*\b{k}\b", text) for what, k in counted)
    return (fault.line in lines) * (1 + is_counted)


def figures(rows: list[dict[str, Any]]) -> list[Figure]:
    """The number of faults that each tool locates in both forms."""
    faults = {row["fault"] for row in rows}
    worst = lambda tool, name: min(NAMED.index(row[tool]) for row in rows if row["fault"] == name)
    count = lambda tool, level: sum(worst(tool, name) >= level for name in faults)
    return [
        Figure("located to the line and iteration by nan_origin", count("ours", 2), least=len(faults)),
        *(
            Figure(
                f"located to the {what} by {tool}",
                count(tool, level),
                most=len(faults) - 1 if level == 2 else len(faults),
            )
            for tool in ("debug_nans", "checkify")
            for level, what in ((1, "line"), (2, "line and iteration"))
        ),
    ]
