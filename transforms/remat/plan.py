"""`Plan`: what a budget buys. `budgeted`: a derivative that keeps to one.

What plans is imported when it is asked for, so that importing funcgrad is quick.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
from jax.tree_util import tree_flatten

from ..core import _jax
from ..core.errors import ArgumentError, BudgetError, location
from ..core.graph import Graph, trace
from ..core.report import Report, Result, Table
from ..core.scope_paths import BACKWARD, maker
from ..core.signatures import name_of
from ..cost.formatting import format_bytes, format_count, parse_bytes
from ..cost.operations import nbytes
from ..cost.table import cost
from ..while_loops.schedule import Loops

if TYPE_CHECKING:
    from .candidates import Candidate
    from .planner import Planner


@dataclass(frozen=True)
class Part:
    """What the lines of one scope, or one line outside of any, save or compute again.

    Attributes:
      where: the scope, or the source line.
      values: how many arrays.
      bytes: of what is saved; flops: of what is computed again.
    """

    where: str
    values: int
    bytes: int = 0
    flops: float = 0


@dataclass(frozen=True, repr=False)
class Plan(Result):
    """A derivative within a budget.

    Attributes:
      name: of the derivative, as "grad(loss)".
      limit_bytes: the budget; bytes here are those of XLA's temporaries: arguments and results come on top.
      default_bytes: of the program without a budget, compiled.
      predicted_bytes, compiled_bytes: of this program, as simulated and as XLA reports it.
      flops, default_flops: of this program and of that without a budget; a multiply-add is two.
      saved: what the forward pass keeps, the most bytes first; empty where the default fits.
      recomputed: what is computed again, the most FLOPs first.
      compiles: how many programs were compiled for this plan.
      graph: the program.
    """

    name: str
    limit_bytes: int
    default_bytes: int
    predicted_bytes: int
    compiled_bytes: int
    flops: float
    default_flops: float
    saved: tuple[Part, ...]
    recomputed: tuple[Part, ...]
    compiles: int
    graph: Graph

    @property
    def extra_flops(self) -> float:
        """FLOPs that the budget costs, as a fraction of those of the default."""
        return self.flops / self.default_flops - 1 if self.default_flops else 0.0

    def __repr__(self) -> str:
        return f"Plan({self.name}, {format_bytes(self.compiled_bytes)}, FLOPs {self.extra_flops:+.1%})"

    def report(self, *, lines: int = 12) -> Report:
        """The bytes and FLOPs, and the `lines` largest of what is saved and of what is computed again."""
        budget, default = format_bytes(self.limit_bytes), format_bytes(self.default_bytes)
        compiled, predicted = format_bytes(self.compiled_bytes), format_bytes(self.predicted_bytes)
        totals = [
            ("compiled", f"{compiled}, predicted {predicted}, without a budget {default}"),
            ("FLOPs", f"{format_count(self.flops)}, {self.extra_flops:+.1%}"),
            ("compiles", f"{self.compiles}"),
        ]
        saved = [(format_bytes(p.bytes), f"{p.values}", p.where) for p in self.saved]
        recomputed = [(format_count(p.flops), f"{p.values}", p.where) for p in self.recomputed]
        parts = (
            Table(saved, ("bytes", "values", "where"), ">>", "saved", lines),
            Table(recomputed, ("FLOPs", "values", "where"), ">>", "computed again", lines),
        )
        head = f"{self.name} within {budget} of temporaries"
        return Report((head, Table(totals), *(table for table in parts if table.rows)))


def budgeted(transform: Callable, f: Callable, *, options: dict, loops: Loops | None, memory: Any) -> Callable:
    """`transform(f, **options)`, compiled, with temporaries that keep to `memory`.

    What is planned is kept, by the types of the arguments and the values of those that are not traced.
    """
    limit = parse_bytes(memory)
    known: dict[Any, Planner] = {}

    def derived(*args, **kwargs):
        planner, values = _planner(transform, f, args, kwargs, options, loops, known)
        return planner.run(_answer(planner, f, limit)[0], values)

    return derived


def planned(
    transform: Callable, f: Callable, *args: Any, options: dict, loops: Loops | None, memory: Any, **kwargs: Any
) -> Plan:
    """What `budgeted` does at a call; `args` and `kwargs` may be types."""
    from .program import AGAIN, Emission

    limit = parse_bytes(memory)
    planner, values = _planner(transform, f, args, kwargs, options, loops, {})
    chosen, compiles = _answer(planner, f, limit)
    graph, default = (trace(lambda *values, c=c: planner.run(c, values), *values) for c in (chosen, planner.default))
    count, before = cost(graph), cost(default)
    name = f"{transform.__name__}({name_of(f)})"
    again = [(row.path, row.eqn, 0, row.work.flops) for row in count.rows if AGAIN in row.path]
    saved = []
    if chosen.choice:
        makers = {v: (eqn, k) for eqn in chosen.traced.joint.eqns for k, v in enumerate(eqn.outvars)}
        for v in Emission(chosen.traced.joint, chosen.choice).saved:
            outer = _jax.scopes(_jax.name_stack(makers[v][0]))
            calls, path = maker(*makers[v], outer, ("jit", "scan"))
            saved.append((path, calls[-1], nbytes(v.aval), 0.0))
    return Plan(
        name,
        limit if isinstance(limit, int) else int(limit * planner.default.bytes),
        planner.default.bytes,
        chosen.predicted_bytes,
        chosen.bytes,
        count.flops,
        before.flops,
        _parts(saved),
        _parts(again),
        compiles,
        dataclasses.replace(graph, name=name),
    )


def _planner(
    transform: Callable,
    f: Callable,
    args: tuple,
    kwargs: dict,
    options: dict,
    loops: Loops | None,
    known: dict[Any, Planner],
) -> tuple[Planner, list[Any]]:
    """The planner for a call, and what of the call is traced."""
    from .candidates import Call
    from .planner import Planner, placed

    leaves, tree = tree_flatten((args, kwargs))
    is_array = lambda x: hasattr(x, "dtype") and not isinstance(x, type)
    is_traced = [is_array(x) or (isinstance(x, int | float | complex) and type(x) is not bool) for x in leaves]
    values = [x for x, ok in zip(leaves, is_traced, strict=True) if ok]
    static = [None if ok else x for x, ok in zip(leaves, is_traced, strict=True)]
    for x in static:
        if not isinstance(x, Hashable):
            raise ArgumentError(
                f"{transform.__name__} of {name_of(f)} with memory= takes arrays and what has a hash, not {type(x).__name__}.",
                at=location(f),
                inputs=f"{x!r:.60}",
                hint="pass a tuple or a frozen dataclass, or close over it",
            )
    places = tuple(map(placed, values))
    key = tree, tuple(static), tuple(map(type, static)), tuple(map(_jax.type_of, values)), places, _jax.trace_context()
    if key in known:
        return known[key], values
    planner = Planner(transform, f, Call(tree, static, is_traced), values, options, loops)
    if not any(isinstance(c, jax.core.Tracer) for c in planner.consts):  # those belong to one trace around
        known[key] = planner
    return planner, values


def _answer(planner: Planner, f: Callable, limit: int | float) -> tuple[Candidate, int]:
    """The program within so many bytes, or such a part of the default's, and how many were compiled for it."""
    before = len(planner.candidates)
    limit = limit if isinstance(limit, int) else limit * planner.default.bytes
    chosen = planner.within_budget(limit)
    if chosen is None:
        smallest = planner.smallest_bytes
        error = BudgetError(
            f"{planner.transform.__name__} of {name_of(f)} needs more than {format_bytes(limit)} of temporaries: "
            f"the smallest program that is always found takes {format_bytes(smallest)}.",
            at=location(f),
            inputs=f"without a budget {format_bytes(planner.default.bytes)}; {len(planner.candidates)} programs were compiled",
            hint=f"memory={smallest}, a smaller batch, or parts of it one after the other{_shard_maps(planner)}",
        )
        error.smallest = smallest
        raise error
    return chosen, len(planner.candidates) - before


def _shard_maps(planner: Planner) -> str:
    """What to do about them, if the function holds any."""
    is_held = any(eqn.primitive.name == "shard_map" for eqn in planner.flat.eqns)
    return (
        "; what shard_map holds is kept or computed again as a whole: jax.checkpoint inside of it keeps less" * is_held
    )


def _parts(found: Iterable[tuple[Any, Any, int, float]]) -> tuple[Part, ...]:
    """Together by scope, the largest first."""
    from .program import AGAIN

    parts: dict[str, Part] = {}
    for path, eqn, size, flops in found:
        where = (
            "/".join(name for name in path if name not in (AGAIN, BACKWARD)) or _jax.line_of(eqn) or eqn.primitive.name
        )
        old = parts.get(where, Part(where, 0))
        parts[where] = Part(where, old.values + 1, old.bytes + size, old.flops + flops)
    return tuple(sorted(parts.values(), key=lambda p: (-p.bytes, -p.flops)))
