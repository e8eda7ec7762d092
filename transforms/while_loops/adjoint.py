"""`Sweep`: a forward and a reverse sweep through one loop, and the derivatives of a sweep, which are sweeps.

The state x goes forward and the state y comes back, one step k at a time:

    x[k+1]             = step(c, x[k])                     while cond(c, x[k])
    y[k], increments   = back(c, x[k], y[k+1])             for k from the last to the first; linear in y
    totals            += increments

A plain loop is a sweep without y. Its VJP is a sweep: y is the cotangent of x, and the totals are the cotangents of c. Sweeps are
closed under both derivatives, so a gradient of any order is a sweep and needs the memory of a few states:

- The JVP of a sweep is a sweep: each state, constant and total has its tangent beside it.
- The VJP of a sweep is a sweep: the cotangent of y[0] goes *forward* beside x, since `back` is linear in y and its transpose
  reads x alone; the cotangent of x[n] comes back beside y.

`back` has three parts, by what they depend on: `hoist(c)` runs once, `fwd(c, hoisted, x)` gives the next x and the residuals of
a step, `bwd(c, hoisted, residuals, y)` does not read x. A predicate of shape [B] (a loop under vmap) has B lanes: B are leading
axes of x and y, the loop runs while any lane runs, and finished lanes keep their states.

Source: Griewank & Walther 2008, Evaluating Derivatives, doi:10.1137/1.9780898717761, chapters 3 and 5 (forward and reverse
sweeps, and adjoints of these).
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from ..core import _jax, subjaxprs
from ..core.manual_axes import axes_of
from .schedule import Loops

Flag = tuple[bool, ...]
Flags = tuple[Flag, Flag, Flag]  # for c, x and y


def _memoised(method: Callable) -> Callable:
    """Make each derivative and batch of a sweep once, so that JAX finds what it compiled for it."""

    @functools.wraps(method)
    def memoised(self, *args):
        key = (method.__name__, *args, _jax.trace_context())
        if key not in self.memo:
            self.memo[key] = method(self, *args)
        return self.memo[key]

    return memoised


@dataclass(frozen=True, eq=False, repr=False)
class Sweep:
    """A sweep, as closed jaxprs.

    Attributes:
      cond: (c, x) -> predicate; bool[], or bool[*lanes] with leading axes of all of x and y.
      step: (c, x) -> x.
      hoist: c -> hoisted values. fwd: (c, hoisted, x) -> (x, residuals). bwd: (c, hoisted, residuals, y) -> (y, increments).
      sizes: the number of values in c, x, y and the totals.
      per_lane: which c differ from lane to lane; None where that is not known.
    """

    cond: Any
    step: Any
    hoist: Any
    fwd: Any
    bwd: Any
    sizes: tuple[int, int, int, int]
    loops: Loops
    per_lane: Flag | None = None
    memo: dict[Any, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return "sweep({} forward, {} back)".format(*self.sizes[1:3])

    @classmethod
    def of(
        cls,
        cond: Callable,
        step: Callable,
        back: Callable,
        avals: tuple[list, list, list],
        n_totals: int,
        loops: Loops,
        per_lane: Flag | None = None,
    ) -> Sweep:
        """A sweep from functions of lists: `cond(c, x)`, `step(c, x)` and `back(c, x, y) -> (x, y, increments)`.

        Args:
          avals: the types of c, x and y.
        """
        n_c, n_x, n_y = map(len, avals)
        stage = lambda f, *groups: _jax.stage_flat(f, [a for group in groups for a in group], _jax.no_names)
        test = stage(lambda *v: [cond(*cut(v, n_c))], *avals[:2])
        forward = stage(lambda *v: step(*cut(v, n_c)), *avals[:2])
        both = stage(lambda *v: [z for part in back(*cut(v, n_c, n_x)) for z in part], *avals)
        return cls(test, forward, *_parts(both, forward, n_c, n_x), (n_c, n_x, n_y, n_totals), loops, per_lane)

    @property
    def lanes(self) -> tuple[int, ...]:
        """The shape of the predicate."""
        return self.cond.out_avals[0].shape

    @property
    def axes(self) -> frozenset[str]:
        """The mesh axes along which the number of steps differs."""
        return axes_of(self.cond.out_avals[0])

    @functools.cached_property
    def avals(self) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
        """The types of c, x, y and the totals."""
        n_c, _, n_y, _ = self.sizes
        (c, x), (y, totals) = cut(self.step.in_avals, n_c), cut(self.bwd.out_avals, n_y)
        return c, x, y, totals

    @property
    def residuals(self) -> list[Any]:
        """The types of the residuals of a step."""
        return list(self.fwd.out_avals[self.sizes[1] :])

    def back(self, c: Sequence[Any], x: Sequence[Any], y: Sequence[Any]) -> tuple[list, list, list]:
        """A step of both sweeps: the next x, the y before it and the increments of the totals."""
        n_x, n_y = self.sizes[1:3]
        hoisted = call(self.hoist, c)
        x, residuals = cut(call(self.fwd, c, hoisted, x), n_x)
        y, increments = cut(call(self.bwd, c, hoisted, residuals, y), n_y)
        return x, y, increments

    # ------------------------------------------------------------------------------------------------ derivatives

    def active(self, flags: Flags) -> Flags:
        """Which of c, x and y have tangents in the loop, given which have tangents at its start."""
        c, x, y = flags
        while True:  # x only grows; it is a fixed point where the step adds no tangent
            _, has_tangent = _jax.jvp_of(self.step, [*c, *x], False)
            if x == (x := _either(x, has_tangent)):
                break
        is_active = any((*c, *x, *y))
        return c, x, tuple(is_active and jax.dtypes.issubdtype(a.dtype, np.inexact) for a in self.avals[2])

    @_memoised
    def jvp(self, flags: Flags) -> Sweep:
        """The sweep of tangents beside primals: c, x and y, each followed by the tangents of the flagged ones, and the totals
        followed by theirs.
        """
        fc, fx, fy = flags
        (c, x, y, _), (n_c, n_x, n_y, n_t) = self.avals, self.sizes

        def step(c, x):
            f = lambda tc, tx: call(self.step, merged(c[:n_c], fc, tc), merged(x[:n_x], fx, tx))
            primals = chosen(c[:n_c], fc), chosen(x[:n_x], fx)
            out, out_tangents = jax.jvp(f, primals, (list(c[n_c:]), list(x[n_x:])))
            return [*out, *chosen(out_tangents, fx)]

        def back(c, x, y):
            primals = c[:n_c], x[:n_x], y[:n_y]
            f = lambda *active: self.back(*map(merged, primals, flags, active))
            in_tangents = list(c[n_c:]), list(x[n_x:]), list(y[n_y:])
            out, (tx, ty, tt) = jax.jvp(f, tuple(map(chosen, primals, flags)), in_tangents)
            return [*out[0], *chosen(tx, fx)], [*out[1], *chosen(ty, fy)], [*out[2], *tt]

        avals = tuple([*a, *tangents(a, f)] for a, f in zip((c, x, y), flags, strict=True))
        per_lane = None if self.per_lane is None else (*self.per_lane, *chosen(self.per_lane, fc))
        return self._derivative(step, back, avals, 2 * n_t, per_lane)

    @_memoised
    def vjp(self, flags: Flags) -> Sweep:
        """The sweep of cotangents: c and the cotangents of the totals; x and the cotangents of the flagged y; y, where it is
        needed, and the cotangents of the flagged x; the totals are the cotangents of the flagged c.
        """
        fc, fx, fy = flags
        (c, x, y, totals), (n_c, n_x, *_) = self.avals, self.sizes
        n_y = self.sizes[2] if self.needs_y(flags) else 0
        zeros_y = lambda: list(map(subjaxprs.zeros, y))

        def both(c, x, y):
            primals = c[:n_c], x[:n_x], y[:n_y] if n_y else zeros_y()

            def f(*active):
                out = self.back(*map(merged, primals, flags, active))
                return (chosen(out[0], fx), chosen(out[1], fy), out[2]), out

            _, pullback, out = jax.vjp(f, *map(chosen, primals, flags), has_aux=True)
            return out, pullback((list(y[n_y:]), list(x[n_x:]), list(c[n_c:])))

        def step(c, x):
            if not any(fy):
                return call(self.step, c[:n_c], x)
            zeros = [*zeros_y()[:n_y], *map(subjaxprs.zeros, tangents(self.avals[1], fx))]
            out, (_, _, ct_y) = both(c, x, zeros)
            return [*out[0], *ct_y]

        def back(c, x, y):
            out, (ct_c, ct_x, ct_y) = both(c, x, y)
            return [*out[0], *ct_y], [*out[1][:n_y], *ct_x], ct_c

        avals = [*c, *tangents(totals)], [*x, *tangents(y, fy)], [*y[:n_y], *tangents(x, fx)]
        per_lane = None if self.per_lane is None else (*self.per_lane, *[False] * len(totals))
        return self._derivative(step, back, avals, sum(fc), per_lane)

    def _derivative(self, step: Callable, back: Callable, avals: tuple, n_totals: int, per_lane: Flag | None) -> Sweep:
        """A sweep with the same predicate; with half as many residual steps, as each has about twice the residuals."""
        n_c, n_x, n_y, _ = self.sizes
        cond = lambda c, x: call(self.cond, c[:n_c], x[:n_x])[0]
        u = self.loops.residual_steps // 2 if n_y else self.loops.residual_steps  # a plain loop has no residuals
        return Sweep.of(cond, step, back, avals, n_totals, Loops(self.loops.checkpoints, max(1, u)), per_lane)

    def needs_y(self, flags: Flags) -> bool:
        """Whether the VJP reads y: not if only y has cotangents, since all is linear in y."""
        return bool(self.sizes[2]) and any((*flags[0], *flags[1]))

    # ------------------------------------------------------------------------------------------------ batching

    @_memoised
    def batched(self, axis: Any, flags: Flags, residuals: Flag) -> tuple[Sweep, Flags, Flag, Flag]:
        """The sweep of a batch: values have a leading axis where they are flagged, or need one.

        Args:
          flags: for c, x, y. residuals: for the residuals of a step, of a sweep whose forward sweep is already batched.
        Returns:
          The sweep, and the flags for c, x, y; for residuals; and for totals.
        """
        c, x, y = flags
        n_x, n_y = self.sizes[1:3]
        while True:  # x only grows; it is a fixed point where the step batches no other state
            cond, (has_lanes,) = _jax.batched(self.cond, axis, [*c, *x], bool(self.lanes) and any((*c, *x, *y)))
            step, is_batched = _jax.batched(self.step, axis, [*c, *x], [has_lanes or f for f in x])
            if x == (x := _either(x, is_batched)):
                break
        hoist, hoisted = _jax.batched(self.hoist, axis, c, False)
        fwd, is_batched = _jax.batched(self.fwd, axis, [*c, *hoisted, *x], [*x, *residuals])
        residuals = tuple(is_batched[n_x:])
        y = tuple(f or has_lanes for f in y)
        any_axis = [False] * self.sizes[3]
        while True:  # y only grows, as x does
            bwd, is_batched = _jax.batched(self.bwd, axis, [*c, *hoisted, *residuals, *y], [*y, *any_axis])
            if y == (y := _either(y, is_batched[:n_y])):
                break
        per_lane = c if has_lanes and not self.lanes else self.per_lane
        if cond.out_avals[0].shape != self.lanes and per_lane != c:
            per_lane = None  # some belong to lanes along one axis alone
        sweep = Sweep(cond, step, hoist, fwd, bwd, self.sizes, self.loops, per_lane)
        return sweep, (c, x, y), residuals, tuple(is_batched[n_y:])


# ------------------------------------------------------------------------------------------------ lists of values


def call(jaxpr: Any, *groups: Sequence[Any]) -> list[Any]:
    """Evaluate a closed jaxpr."""
    return list(_jax.jaxpr_as_fun(jaxpr)(*(x for group in groups for x in group)))


def cut(values: Sequence[Any], *sizes: int) -> list[list[Any]]:
    """Lists of these sizes, and the rest."""
    bounds = [0, *itertools.accumulate(sizes), len(values)]
    return [list(values[a:b]) for a, b in itertools.pairwise(bounds)]


def chosen(values: Sequence[Any], flags: Flag) -> list[Any]:
    """The values that are flagged."""
    return [x for x, f in zip(values, flags, strict=True) if f]


def merged(values: Sequence[Any], flags: Flag, replacements: Sequence[Any]) -> list[Any]:
    """`values`, with replacements for the flagged ones."""
    rest = iter(replacements)
    return [next(rest) if f else x for x, f in zip(values, flags, strict=True)]


def tangents(avals: Sequence[Any], flags: Flag | None = None) -> list[Any]:
    """The types of tangents, and of cotangents, of flagged values."""
    return [a.to_tangent_aval() for a in (avals if flags is None else chosen(avals, flags))]


def _either(a: Flag, b: Sequence[bool]) -> Flag:
    return tuple(map(operator.or_, a, b))


# ------------------------------------------------------------------------------------------------ the parts of a step


# Elementwise, of a few cycles each.
_CHEAP = {"add", "sub", "mul", "neg", "max", "min", "integer_pow", "select_n", "convert_element_type"}
_CHEAP |= {"eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not"}


def _parts(both: Any, step: Any, n_c: int, n_x: int) -> tuple[Any, Any, Any]:
    """Cut (c, x, y) -> (x, y, increments) by dependence: on c alone (level 0), on x too (level 1), and on y (level 2).

    An equation with sub-jaxprs may compute a part of the next x beside what depends on y. Then x comes from `step`.
    """
    jaxpr = _deduplicated(both.jaxpr)
    c, x, y = cut(jaxpr.invars, n_c, n_x)
    level = {**dict.fromkeys([*jaxpr.constvars, *c], 0), **dict.fromkeys(x, 1), **dict.fromkeys(y, 2)}
    eqns: list[list[Any]] = [[], [], []]
    for eqn in jaxpr.eqns:
        eqn_level = max([1 if eqn.effects else 0, *(level[v] for v in _variables(eqn.invars))])
        level.update(dict.fromkeys(eqn.outvars, eqn_level))
        eqns[eqn_level].append(eqn)
    of_level = lambda k, atoms: [v for v in _variables(atoms) if level[v] == k]
    next_x, reverse = cut(jaxpr.outvars, n_x)
    _, reads = _live(eqns[2], reverse)
    saved, recomputed = set(of_level(1, reads)), []
    for eqn in reversed(eqns[1]):  # a residual that is cheap to compute from other residuals is not saved
        if eqn.primitive.name in _CHEAP and eqn.outvars[0] in saved and saved.issuperset(of_level(1, eqn.invars)):
            saved.remove(eqn.outvars[0])
            recomputed.append(eqn)
    bwd_eqns, bwd_reads = _live([*reversed(recomputed), *eqns[2]], reverse)
    residuals = of_level(1, bwd_reads)
    is_x_apart = not of_level(2, next_x)
    fwd_outvars = [*(next_x if is_x_apart else ()), *residuals]
    fwd_eqns, fwd_reads = _live(eqns[1], fwd_outvars)
    inputs = {*jaxpr.constvars, *c}
    hoisted = [v for v in of_level(0, dict.fromkeys([*bwd_reads, *fwd_reads])) if v not in inputs]
    part = lambda invars, outvars, eqns: _jax.part_of(jaxpr, invars, outvars, eqns, both.consts)
    fwd = part([*c, *hoisted, *x], fwd_outvars, fwd_eqns)
    if not is_x_apart:
        with_step = lambda *v, rest=fwd: [*call(step, v[:n_c], v[len(v) - n_x :]), *call(rest, v)]
        fwd = _jax.stage_flat(with_step, fwd.in_avals, _jax.no_names)
    bwd = part([*c, *hoisted, *residuals, *y], reverse, bwd_eqns)
    return part(c, hoisted, _live(eqns[0], hoisted)[0]), fwd, bwd


def _deduplicated(jaxpr: Any) -> Any:
    """Common-subexpression elimination, so that a step has no two residuals of the same value."""
    canonical: dict[Any, Any] = {}  # variables
    first_eqns: dict[Any, Any] = {}
    atom = lambda v: v if isinstance(v, _jax.Literal) else canonical.get(v, v)
    key_of = lambda v: (np.asarray(v.val).tobytes(), v.aval) if isinstance(v, _jax.Literal) else v
    eqns = []
    for eqn in jaxpr.eqns:
        eqn = eqn.replace(invars=list(map(atom, eqn.invars)))
        first = eqn
        if not eqn.effects:
            try:
                key = (eqn.primitive, tuple(eqn.params.items()), *map(key_of, eqn.invars))
                first = first_eqns.setdefault(key, eqn)
            except TypeError:  # parameters without a hash
                pass
        if first is eqn or any(map(_jax.dropped, first.outvars)):  # a dropped output has no variable to read
            eqns.append(eqn)
        else:
            canonical.update(zip(eqn.outvars, first.outvars, strict=True))
    return jaxpr.replace(eqns=eqns, outvars=list(map(atom, jaxpr.outvars)))


def _live(eqns: list[Any], outvars: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The equations that these outputs need, and the variables that they read from outside, in order of use."""
    live: list[Any] = []
    needed = set(_variables(outvars))
    for eqn in reversed(eqns):
        if eqn.effects or not needed.isdisjoint(eqn.outvars):
            live.insert(0, eqn)
            needed.update(_variables(eqn.invars))
    computed = {v for eqn in live for v in eqn.outvars}
    reads = _variables([*(v for eqn in live for v in eqn.invars), *outvars])
    return live, list(dict.fromkeys(v for v in reads if v not in computed))


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [v for v in atoms if not isinstance(v, _jax.Literal)]
