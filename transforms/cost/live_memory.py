"""`Timeline`: the live bytes of a program at each of its equations, and the values that are alive at the peak.

The model is a program that runs in the order of its equations and keeps each value from the equation that computes it to the
last one that reads it. Arguments stay, because they belong to the caller; results stay to the end. A reshape shares memory. A
loop holds its slices, two copies of its carry, and the values of its body. Nothing is fused: a backend that fuses needs less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..core import _jax
from ..core.report import Report, Result, Table
from .formatting import format_bytes
from .inlining import InlinedEqn, Value


class Moment(NamedTuple):
    """The live bytes while an equation runs, and its scope, primitive and source line."""

    live_bytes: int
    scope: str
    primitive: str
    line: str | None


@dataclass(frozen=True)
class Owner:
    """A value that is alive at the peak.

    Attributes:
      path: of an argument, as "params['w']"; "constant"; or the "scope/primitive" that computes it.
      type: as "f32[8,128]".
      bytes: its size; of all shards, inside a `shard_map`.
      line: the user's line that computes it; None for an argument.
    """

    path: str
    type: str
    bytes: int
    line: str | None


@dataclass(frozen=True, repr=False)
class Timeline(Result):
    """The live bytes of a program over its equations. Its text shows the curve, and the values alive at the peak.

    Attributes:
      live_bytes: one number per equation, in the order in which they run; the body of a loop counts once.
      peak: the moment of the most live bytes; `peak_at` is its index.
      owners: the values that are alive at the peak, the largest first.
      argument_bytes: of the arguments and constants, which are alive throughout.
    """

    live_bytes: tuple[int, ...]
    peak_at: int
    peak: Moment
    owners: tuple[Owner, ...]
    argument_bytes: int

    def __repr__(self) -> str:
        return f"Timeline(peak {format_bytes(self.peak.live_bytes)} at {self.peak.scope or self.peak.primitive})"

    def report(self, *, lines: int = 12) -> Report:
        """The curve as one line, the peak, and the `lines` largest of its owners."""
        peak, count = self.peak, len(self.live_bytes)
        where = "/".join(filter(None, (peak.scope, peak.primitive)))
        head = [
            f"peak {format_bytes(peak.live_bytes)} at equation {self.peak_at + 1} of {count}: {where}",
            f"  {peak.line or ''}".rstrip(),
            f"arguments {format_bytes(self.argument_bytes)}",
            _curve(self.live_bytes),
        ]
        rows = [(format_bytes(o.bytes), o.type, o.path, o.line or "") for o in self.owners[:lines]]
        if rest := self.owners[lines:]:
            rows.append((format_bytes(sum(o.bytes for o in rest)), "", f"{len(rest)} more", ""))
        return Report((*filter(None, head), Table(rows, ("bytes", "type", "path", "line"), ">")))


def simulated(inputs: Sequence[Value], steps: Sequence[InlinedEqn], outputs: Sequence[Value]) -> Timeline:
    """The timeline of a program."""
    moments: list[tuple[int, InlinedEqn | None, _Chain]] = []
    run = _Run(list(steps), outputs, list(inputs), frozenset(), 1)
    argument_bytes = sum(v.bytes for v in run.inputs)
    _simulate(run, 0, (), moments)
    if not moments:
        moments.append((argument_bytes, None, ((run, 0),)))
    at = max(range(len(moments)), key=lambda k: moments[k][0])
    live_bytes, step, chain = moments[at]
    owners = [_owner(v, run.copies) for run, k in chain for v in run.alive(k) if v.bytes]
    owners += [_checkpoints(run.steps[k]) for run, k in chain if run.steps and run.steps[k].kept_bytes]
    owners.sort(key=lambda o: -o.bytes)
    where = ("/".join(step.path), step.eqn.primitive.name, _jax.line_of(step.eqn)) if step else ("", "", None)
    peak = Moment(live_bytes, *where)
    return Timeline(tuple(m[0] for m in moments), at, peak, tuple(owners), argument_bytes)


class _Run:
    """Steps that run one after the other, and the lifetimes of their values."""

    def __init__(
        self,
        steps: list[InlinedEqn],
        outputs: Sequence[Value],
        inputs: list[Value],
        shared: frozenset[Value],
        copies: int,
    ):
        self.steps, self.inputs, self.copies = steps, inputs, copies
        results = {v: k for k, step in enumerate(steps) for v in step.makes if v not in shared}
        self.born = dict.fromkeys(inputs, 0) | results
        reads = {v: k for k, step in enumerate(steps) for v in step.reads} | dict.fromkeys(
            [*outputs, *inputs], len(steps)
        )
        self.last = {v: reads.get(v, k) for v, k in self.born.items()}

    def alive(self, k: int) -> list[Value]:
        """The values that are alive while step k runs."""
        return [v for v, born in self.born.items() if born <= k <= self.last[v]]


_Chain = tuple[tuple[_Run, int], ...]


def _simulate(run: _Run, base: int, chain: _Chain, moments: list[tuple[int, InlinedEqn | None, _Chain]]) -> None:
    """Append the moments of a run, on top of `base` bytes. Invariant: `live` has the values alive at step k, and `base`."""
    begin, end = [0] * (len(run.steps) + 1), [0] * (len(run.steps) + 2)
    for v, k in run.born.items():
        begin[k] += v.bytes * run.copies
        end[run.last[v] + 1] += v.bytes * run.copies
    live = base
    for k, step in enumerate(run.steps):
        live += begin[k] - end[k]
        step_chain = (*chain, (run, k))
        moments.append((live + step.kept_bytes, step, step_chain))
        for body in step.bodies:
            body_run = _Run(body.steps, body.outputs, body.slices, body.shared, run.copies * body.copies)
            _simulate(body_run, live + step.kept_bytes, step_chain, moments)


def _owner(v: Value, copies: int) -> Owner:
    kind = v.aval.str_short(short_dtypes=True)
    if v.argument is not None:
        return Owner(v.argument, kind, v.bytes, None)
    return Owner("/".join((*v.path, v.maker.primitive.name)), kind, v.bytes * copies, _jax.line_of(v.maker))


def _checkpoints(step: InlinedEqn) -> Owner:
    """The checkpoints of a loop for its reversal."""
    return Owner(
        "/".join((*step.path, step.eqn.primitive.name)), "checkpoints", step.kept_bytes, _jax.line_of(step.eqn)
    )


_BARS = "▁▂▃▄▅▆▇█"


def _curve(values: Sequence[int], width: int = 72) -> str:
    """A line of bars: the largest value of each column."""
    width = min(width, len(values))
    columns = [
        max(values[k * len(values) // width : max((k + 1) * len(values) // width, k * len(values) // width + 1)])
        for k in range(width)
    ]
    top = max(columns, default=0) or 1
    return "".join(_BARS[min(int(8 * c / top), 7)] for c in columns)
