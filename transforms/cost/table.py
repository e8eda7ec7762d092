"""`cost`: the work of a program, one row per equation, and its sums by scope, line and primitive."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import jax
from jax.tree_util import tree_leaves, tree_unflatten

from ..core import _jax
from ..core.errors import ArgumentError, OptionError
from ..core.graph import Graph, trace
from ..core.report import Report, Result, Table
from ..core.scope_paths import BACKWARD, Path
from .backends import BACKENDS
from .device import Machine
from .formatting import format_bytes, format_count, format_seconds
from .inlining import Branches, InlinedEqn, Inlining, Value, leaves
from .live_memory import Timeline, simulated
from .operations import Work
from .trip_counts import ByScope, measured
from .xla_memory import temp_bytes

By = Literal["scope", "line", "primitive", "equation"]


@dataclass(frozen=True, slots=True)
class Row:
    """What an equation costs.

    Attributes:
      eqn: the equation, at any depth of sub-graphs.
      path: its scopes, from the outside in; those of a backward pass follow "transpose".
      times: how often it runs: the product of the trips of all loops around it, and of the weights of all branches.
      once: the work of one run; None where it is unknown.
      parameters: how many numbers of the first argument it is the first to read.
    """

    eqn: Any
    path: Path
    times: float
    once: Work | None
    parameters: int = 0

    @property
    def work(self) -> Work:
        """The work of all runs; none where it is unknown."""
        once = self.once or Work()
        return once if self.times == 1 else once.times(self.times)

    @property
    def is_unknown(self) -> bool:
        """Whether it runs, and its work is unknown."""
        return self.once is None and self.times > 0

    @property
    def scope(self) -> str:
        """Its scopes, joined by slashes."""
        return "/".join(self.path)

    @property
    def line(self) -> str:
        """The user's line that bound it, as "model.py:41 (attention)"; "" where JAX has no source for it."""
        return _jax.line_of(self.eqn) or ""

    @property
    def operation(self) -> str:
        """Its primitive and the types of its results, as "dot_general f32[8,64]"."""
        outputs = " ".join(v.aval.str_short(short_dtypes=True) for v in self.eqn.outvars)
        return f"{_operation(self.eqn)} {outputs}".rstrip()

    @property
    def is_backward(self) -> bool:
        """Whether it belongs to the backward pass of a gradient."""
        return BACKWARD in self.path


@dataclass(frozen=True, slots=True)
class Group:
    """The cost of all equations of a scope, source line or primitive.

    Attributes:
      name: of the scope, line or primitive.
      share: the part of all FLOPs, 0 to 1; of all bytes in a program without FLOPs.
      unknown: operations of unknown work, which `work` leaves out.
    """

    name: str
    work: Work
    parameters: int
    share: float
    unknown: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class Cost(Result):
    """The cost of a program. Its text is a table of scopes, sorted by share.

    Attributes:
      name: of the program.
      rows: one per equation, in program order, at any depth of sub-jaxprs; calls, loops, branches and views have none.
      branches: for each `cond`, the work of one run of each branch, and its weight.
      endless: the loops of unknown length, as "scope/while" or the line; each counts as one trip.
      program: the constants and arguments, the equations that run, and the outputs.
    """

    name: str
    rows: tuple[Row, ...]
    branches: tuple[Branches, ...]
    endless: tuple[str, ...]
    program: tuple[list[Value], list[InlinedEqn], list[Value]] = field(compare=False)

    @cached_property
    def work(self) -> Work:
        """The work of all rows; `unknown` operations are left out."""
        return Work.sum(row.work for row in self.rows)

    @property
    def flops(self) -> float:
        """Arithmetic operations; a multiply-add is two."""
        return self.work.flops

    @property
    def transcendentals(self) -> float:
        """Evaluations of exp, log, tanh and their like, which are not among the FLOPs."""
        return self.work.transcendentals

    @property
    def bytes_read(self) -> float:
        """Bytes that equations read, each on its own."""
        return self.work.bytes_read

    @property
    def bytes_written(self) -> float:
        """Bytes that equations write, each on its own."""
        return self.work.bytes_written

    @property
    def parameters(self) -> int:
        """Numbers in the float arrays of the first argument that the program reads."""
        return sum(row.parameters for row in self.rows)

    @property
    def unknown(self) -> dict[str, int]:
        """Operations of unknown work by name, and how many equations there are of each."""
        return dict(Counter(_operation(row.eqn) for row in self.rows if row.is_unknown))

    @property
    def forward(self) -> Cost:
        """The rows that do not belong to a backward pass; the timeline stays that of the whole program."""
        return dataclasses.replace(self, rows=tuple(row for row in self.rows if not row.is_backward))

    @property
    def backward(self) -> Cost:
        """The rows that belong to a backward pass; the timeline stays that of the whole program."""
        return dataclasses.replace(self, rows=tuple(row for row in self.rows if row.is_backward))

    def by(self, what: By = "scope", depth: int | None = None) -> list[Group]:
        """The rows grouped, the largest share first.

        Args:
          what: group by "scope", "line" of source, "primitive" or "equation".
          depth: how many names of a scope count; None counts all.
        Raises:
          OptionError: `what` is none of these. Also a ValueError.
        """
        keys: dict[str, Callable[[Row], str]] = {
            "scope": lambda row: "/".join(row.path[:depth]),
            "line": lambda row: row.line,
            "primitive": lambda row: _operation(row.eqn),
            "equation": lambda row: f"{row.scope}/{row.operation}".lstrip("/"),
        }
        if what not in keys:
            raise OptionError(f"a cost can be grouped by {', '.join(keys)}, and not by {what!r}.")
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(keys[what](row), []).append(row)
        measure = (lambda work: work.flops) if self.flops else (lambda work: work.bytes)
        whole = measure(self.work) or 1

        def group(name: str, rows: list[Row]) -> Group:
            work = Work.sum(row.work for row in rows)
            unknown = tuple(dict.fromkeys(_operation(row.eqn) for row in rows if row.is_unknown))
            return Group(name, work, sum(row.parameters for row in rows), measure(work) / whole, unknown)

        return sorted(itertools.starmap(group, groups.items()), key=lambda g: (-g.share, -g.work.bytes))

    def timeline(self) -> Timeline:
        """The live bytes over the program, and the values that are alive at the peak."""
        return self._timeline

    @cached_property
    def _timeline(self) -> Timeline:
        return simulated(*self.program)

    @property
    def peak_bytes(self) -> int:
        """The peak of live bytes, arguments included, if nothing is fused; see `timeline`."""
        return self.timeline().peak.live_bytes

    @cached_property
    def temp_bytes(self) -> int:
        """A prediction of XLA's `temp_size_in_bytes` on the default backend: temporaries without arguments and results.

        Loops hold one trip. TPUs count as GPUs. `cost/xla_memory.py` describes the model.
        """
        _, steps, outputs = self.program
        return temp_bytes(steps, outputs, BACKENDS.get(jax.default_backend(), BACKENDS["gpu"]))

    def dict(self, depth: int | None = None) -> dict[str, Any]:
        """All of it as plain Python values, for JSON."""
        kinds: tuple[By, ...] = ("scope", "line", "primitive")
        return {
            "name": self.name,
            **dataclasses.asdict(self.work),
            "parameters": self.parameters,
            "peak_bytes": self.peak_bytes,
            "temp_bytes": self.temp_bytes,
            "unknown": self.unknown,
            "endless": list(self.endless),
            "forward": dataclasses.asdict(self.forward.work),
            "backward": dataclasses.asdict(self.backward.work),
            **{kind: {g.name: dataclasses.asdict(g) for g in self.by(kind, depth)} for kind in kinds},
        }

    def __repr__(self) -> str:
        flops = _at_least(self.flops, self.unknown, "FLOP")
        return f"Cost({self.name}: {flops}, {format_bytes(self.work.bytes)}, {len(self.rows)} equations)"

    def report(
        self, by: By = "scope", depth: int | None = None, *, lines: int = 30, machine: Machine | None = None
    ) -> Report:
        """A table, sorted by share.

        Args:
          by, depth: how rows are grouped, as in the method `by`.
          lines: how many groups are shown.
          machine: adds the roofline of each group on this machine: its least time, and "compute" or "bandwidth".
        """
        peak, flops = self.timeline().peak, _at_least(self.flops, self.unknown, "FLOP")
        place = "/".join(filter(None, (peak.scope, peak.primitive)))
        head = [
            f"{self.name}: {flops}, {format_count(self.transcendentals)} transcendentals, "
            f"{format_bytes(self.bytes_read)} read, {format_bytes(self.bytes_written)} written, "
            f"{format_count(self.parameters)} parameters",
            f"peak {format_bytes(peak.live_bytes)} at {place} {peak.line or ''}".rstrip(),
        ]
        if backward := self.backward.flops:
            head.append(f"forward {1 - backward / self.flops:.0%}, backward {backward / self.flops:.0%} of FLOPs")
        if self.unknown:
            head.append("unknown, on top: " + ", ".join(f"{name} ×{n}" for name, n in self.unknown.items()))
        if self.endless:
            head.append("loops of unknown length, as one trip: " + ", ".join(self.endless))
        roofline = ["time", "bound by"] if machine else []
        columns = ["share", "FLOP", "transc.", "read", "written", "params", *roofline, by]
        rows = [_cells(group, machine) for group in self.by(by, depth)]
        return Report((*head, Table(rows, columns, ">" * (len(columns) - 1), limit=lines)))


def _cells(group: Group, machine: Machine | None) -> list[str]:
    work = group.work
    cells = [
        f"{group.share:.1%}",
        _at_least(work.flops, group.unknown),
        format_count(work.transcendentals),
        format_bytes(work.bytes_read),
        format_bytes(work.bytes_written),
        format_count(group.parameters) if group.parameters else "",
    ]
    if machine:
        seconds, bound = machine.bound(work)
        cells += [format_seconds(seconds), bound]
    return [*cells, group.name or "-"]


def _at_least(n: float, unknown: Any, unit: str = "") -> str:
    return ("≥ " if unknown else "") + format_count(n, unit)


def _operation(eqn: Any) -> str:
    """The name of the primitive, with that of the kernel or foreign function that it calls."""
    params, name = eqn.params, eqn.primitive.name
    callee = params.get("target_name")
    if name == "pallas_call":
        callee = params["name"] or params["jaxpr"].debug_info.func_name
    elif name == "call_hi_primitive":
        callee = type(params["_prim"]).__name__
    return f"{name}({callee})" if callee else name


# ------------------------------------------------------------------------------------------------ cost


def cost(
    f: Callable,
    /,
    *args: Any,
    trips: int | Mapping[str, int] | Literal["measured"] | None = None,
    probabilities: Sequence[float] | Mapping[str, Sequence[float]] | None = None,
    **kwargs: Any,
) -> Cost:
    """The cost of a program: FLOPs, transcendentals, bytes, parameters and memory, by scope, source line and equation.

    The body of a scan counts once per iteration, a rematerialised value once per computation, a `shard_map` once per device,
    a Pallas kernel as its `cost_estimate` says. `unknown` lists primitives without a rule; the sums leave them out. Dead code
    does not count.

    Args:
      f: function or Graph. A function is traced with `args` and `kwargs`, which may be `jax.ShapeDtypeStruct`; a Graph needs
        them only for trips="measured".
      trips: how often `while` loops run: a number for all, or scope pattern -> number, as in {"solver/while": 20}, or
        "measured": the program is run and its loops are counted. Other loops count as one trip.
      probabilities: how often the branches of a `cond` are taken, [of False, of True], for all or by scope pattern. Without
        them, the most expensive branch counts.
    Returns:
      Cost. Its text is a table of scopes; `timeline()` lists the values at the peak of memory.
    Raises:
      OptionError: a pattern names no loop or branch, or a `cond` has another number of branches. Also a ValueError.
      ArgumentError: the arguments cannot be traced, or have no values and trips="measured". Also a TypeError.

    >>> import jax.numpy as jnp
    >>> c = cost(lambda w, x: jnp.tanh(x @ w), jnp.ones((3, 4)), jnp.ones((2, 3)))
    >>> c.flops, c.transcendentals, c.parameters
    (48, 8, 12)
    """
    if not callable(f):
        raise ArgumentError(f"cost takes a function or a Graph, and got {type(f).__name__}.", inputs=f"{f!r:.60}")
    graph = f if isinstance(f, Graph) else trace(f, *args, **kwargs)
    graph = dataclasses.replace(graph, jaxpr=_without_dead_code(graph.jaxpr))
    if isinstance(trips, str) and trips != "measured":
        raise OptionError(f'trips= takes a number, a mapping or "measured", and got {trips!r}.')
    if any(n < 0 for n in (trips.values() if isinstance(trips, Mapping) else [trips]) if isinstance(n, int | float)):
        raise OptionError(f"trips= takes numbers of at least 0, and got {trips!r}.")
    trip_counts = measured(graph, args, kwargs) if trips == "measured" else ByScope("trips", trips)
    branch_weights = ByScope("probabilities", probabilities)

    def weights(eqn, path, count):
        numbers = branch_weights(eqn, path)
        if numbers is not None and (len(numbers) != count or not math.isclose(sum(numbers), 1) or min(numbers) < 0):
            raise OptionError(
                f"probabilities= gives {list(numbers)} to a cond of {count} branches.",
                at=_jax.line_of(eqn),
                hint="one number per branch, which add up to 1; False is the first",
            )
        return numbers

    inlining = Inlining(trip_counts, weights)
    inputs, steps, outputs = inlining.program(graph.jaxpr.jaxpr, graph.paths)
    if isinstance(trip_counts, ByScope):
        trip_counts.check([name for name, _, _ in inlining.loops])
    branch_weights.check(["/".join((*b.path, "cond")) for b in inlining.branches])
    rows = _rows(steps, _parameters(graph, inputs))
    endless = tuple(dict.fromkeys(line or name for name, line, count in inlining.loops if count is None))
    return Cost(graph.name, rows, tuple(inlining.branches), endless, (inputs, steps, outputs))


def _without_dead_code(jaxpr: _jax.ClosedJaxpr) -> _jax.ClosedJaxpr:
    """The equations that the outputs need, at any depth; XLA removes the others too."""
    live, _ = _jax.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars), instantiate=True)
    return _jax.close(live, jaxpr.consts)


def _parameters(graph: Graph, inputs: Sequence[Value]) -> set[Value]:
    """The float arrays of the first argument."""
    values = inputs[len(inputs) - len(graph.paths) :]
    args, _ = tree_unflatten(graph.in_tree, values)
    first = tree_leaves(args[0]) if args else []
    return {v for v in first if jax.dtypes.issubdtype(getattr(v.aval, "dtype", bool), jax.numpy.inexact)}


def _rows(steps: Sequence[InlinedEqn], parameters: set[Value]) -> tuple[Row, ...]:
    """A row per equation. The first that reads one of `parameters`, or a slice of it, counts it, and removes it from the set."""
    rows = []
    for step in leaves(steps):
        read = [v for v in dict.fromkeys(v.whole or v for v in step.reads) if v in parameters]
        parameters.difference_update(read)
        rows.append(Row(step.eqn, step.path, step.times, step.work, sum(math.prod(v.aval.shape) for v in read)))
    return tuple(rows)
