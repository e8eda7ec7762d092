"""`Sweep`: a loop that runs forward and then back, and what the derivatives of one are.

A sweep has a state x that goes forward and a state y that comes back, one step at a time:

    x[k+1]             = step(c, x[k])                     while cond(c, x[k])
    y[k], increments   = back(c, x[k], y[k+1])             for the same k, from the last to the first; linear in y
    totals            += increments

A plain loop is a sweep with no y. Its VJP is the sweep whose y is the cotangent of x and whose totals are the cotangents of c.
Sweeps are closed under both derivatives, so gradients of any order are sweeps, with a memory of a few states:

- The JVP of a sweep is a sweep: each state, constant and total has its tangent beside it.
- The VJP of a sweep is a sweep: the cotangent of y[0] goes *forward* beside x, since `back` is linear in y and its transpose
  needs x alone; the cotangent of x[n] comes back beside y.

`back` is kept in parts, by what they depend on: `hoist(c)` is computed once, `leaf(c, hoisted, x)` gives the next x and the
residuals of a step, `pull(c, hoisted, residuals, y)` needs no x. A predicate of shape [B] (a loop under vmap) goes on while any
lane does; x and y have these leading axes, and lanes that have finished stay as they are.

Source: Griewank & Walther 2008, Evaluating Derivatives, doi:10.1137/1.9780898717761, chapters 3 and 5 (adjoints of steps, and
of adjoints).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from ..core import _jax, manual_axes, subjaxprs
from .schedule import Loops

Flag = tuple[bool, ...]
Flags = tuple[Flag, Flag, Flag]  # for c, x and y


@dataclass(frozen=True, eq=False, repr=False)
class Sweep:
    """A sweep, as closed jaxprs.

    Attributes:
      cond: (c, x) -> predicate; bool[], or bool[B] with leading axes that all of x and y have.
      step: (c, x) -> x.
      hoist: c -> hoisted values. leaf: (c, hoisted, x) -> (x, residuals). pull: (c, hoisted, residuals, y) -> (y, increments).
      sizes: how many values c, x, y and the totals are.
      own: which c each lane has of its own; None where that is not known.
    """

    cond: Any
    step: Any
    hoist: Any
    leaf: Any
    pull: Any
    sizes: tuple[int, int, int, int]
    loops: Loops
    own: Flag | None = None
    memo: dict[Any, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return "sweep({} forward, {} back)".format(*self.sizes[1:3])

    @classmethod
    def of(
        cls,
        cond: Callable,
        step: Callable,
        back: Callable,
        c: list,
        x: list,
        y: list,
        totals: int,
        loops: Loops,
        own: Flag | None = None,
    ) -> Sweep:
        """A sweep from functions of lists: `cond(c, x)`, `step(c, x)` and `back(c, x, y) -> (x, y, increments)`.

        Args:
          c, x, y: the types of the values. totals: how many there are.
        """
        cut = lambda values: (values[: len(c)], values[len(c) : len(c) + len(x)], values[len(c) + len(x) :])
        stage = lambda f, *avals: _jax.stage_flat(f, avals, _jax.no_names)
        back_flat = lambda *v: [z for part in back(*cut(v)) for z in part]
        sizes = (len(c), len(x), len(y), totals)
        test, forward = (stage(f, *c, *x) for f in (lambda *v: [cond(*cut(v)[:2])], lambda *v: step(*cut(v)[:2])))
        return cls(test, forward, *_parts(stage(back_flat, *c, *x, *y), forward, len(c), len(x)), sizes, loops, own)

    @property
    def prefix(self) -> tuple[int, ...]:
        """The shape of the predicate."""
        return self.cond.out_avals[0].shape

    @property
    def axes(self) -> frozenset[str]:
        """The mesh axes along which its counts differ."""
        return manual_axes.axes_of(self.cond.out_avals[0])

    @functools.cached_property
    def avals(self) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
        """The types of c, x, y and the totals."""
        n_c, _, n_y, _ = self.sizes
        outputs = list(self.pull.out_avals)
        return list(self.step.in_avals[:n_c]), list(self.step.in_avals[n_c:]), outputs[:n_y], outputs[n_y:]

    @property
    def residuals(self) -> list[Any]:
        """The types of the residuals of a step."""
        return list(self.leaf.out_avals[self.sizes[1] :])

    def back(self, c: Sequence[Any], x: Sequence[Any], y: Sequence[Any]) -> tuple[list, list, list]:
        """One step of both ways: the next x, the y before and the increments of the totals."""
        n_x, n_y = self.sizes[1:3]
        hoisted = call(self.hoist, c)
        outputs = call(self.leaf, c, hoisted, x)
        found = call(self.pull, c, hoisted, outputs[n_x:], y)
        return outputs[:n_x], found[:n_y], found[n_y:]

    # ------------------------------------------------------------------------------------------------ derivatives

    def active(self, flags: Flags) -> Flags:
        """Which of c, x and y have tangents on the way if these do at the start."""
        c, x, y = flags
        while True:
            _, found = _jax.jvp_of(self.step, [*c, *x], False)
            if x == (x := tuple(map(operator.or_, x, found))):
                break
        on = any((*c, *x, *y))
        return c, x, tuple(on and _is_inexact(a) for a in self.avals[2])

    def jvp(self, flags: Flags) -> Sweep:
        """The sweep of tangents beside primals: c, x and y, each followed by the tangents of those that are flagged, and totals
        followed by theirs.
        """
        return self._once(("jvp", flags), lambda: self._jvp(flags))

    def vjp(self, flags: Flags) -> Sweep:
        """The sweep of cotangents: c and the cotangents of the totals; x and the cotangents of the flagged y; y, where it is
        needed, and the cotangents of the flagged x; the totals are the cotangents of the flagged c.
        """
        return self._once(("vjp", flags), lambda: self._vjp(flags))

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        key = (*key, _jax.trace_context())
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    def _jvp(self, flags: Flags) -> Sweep:
        fc, fx, fy = flags
        (c, x, y, _), (n_c, n_x, n_y, n_t) = self.avals, self.sizes

        def step(c, x):
            f = lambda tc, tx: call(self.step, merged(c[:n_c], fc, tc), merged(x[:n_x], fx, tx))
            primals = chosen(c[:n_c], fc), chosen(x[:n_x], fx)
            out, tangents = jax.jvp(f, primals, (list(c[n_c:]), list(x[n_x:])))
            return [*out, *chosen(tangents, fx)]

        def back(c, x, y):
            given = c[:n_c], x[:n_x], y[:n_y]
            f = lambda *some: self.back(*map(merged, given, flags, some))
            primals = tuple(map(chosen, given, flags))
            (x_, y_, t_), (tx, ty, tt) = jax.jvp(f, primals, (list(c[n_c:]), list(x[n_x:]), list(y[n_y:])))
            return [*x_, *chosen(tx, fx)], [*y_, *chosen(ty, fy)], [*t_, *tt]

        cond = lambda c, x: call(self.cond, c[:n_c], x[:n_x])[0]
        wide = lambda avals, f: [*avals, *tangents(avals, f)]
        own = None if self.own is None else (*self.own, *chosen(self.own, fc))
        return Sweep.of(cond, step, back, wide(c, fc), wide(x, fx), wide(y, fy), 2 * n_t, self._loops(), own)

    def _vjp(self, flags: Flags) -> Sweep:
        fc, fx, fy = flags
        (c, x, y, totals), (n_c, n_x, *_) = self.avals, self.sizes
        n_y = self.sizes[2] if self.needs_y(flags) else 0
        zeros_y = lambda: list(map(subjaxprs.zeros, y))

        def both(c, x, y):
            given = c[:n_c], x[:n_x], y[:n_y] if n_y else zeros_y()

            def f(*some):
                out = self.back(*map(merged, given, flags, some))
                return (chosen(out[0], fx), chosen(out[1], fy), out[2]), out

            _, pull, out = jax.vjp(f, *map(chosen, given, flags), has_aux=True)
            return out, pull((list(y[n_y:]), list(x[n_x:]), list(c[n_c:])))

        def step(c, x):
            if not any(fy):
                return call(self.step, c[:n_c], x)
            nothing = [*zeros_y()[:n_y], *map(subjaxprs.zeros, tangents(self.avals[1], fx))]
            out, (_, _, ct_y) = both(c, x, nothing)
            return [*out[0], *ct_y]

        def back(c, x, y):
            out, (ct_c, ct_x, ct_y) = both(c, x, y)
            return [*out[0], *ct_y], [*out[1][:n_y], *ct_x], ct_c

        cond = lambda c, x: call(self.cond, c[:n_c], x[:n_x])[0]
        wider = [*c, *tangents(totals)], [*x, *tangents(y, fy)], [*y[:n_y], *tangents(x, fx)]
        own = None if self.own is None else (*self.own, *[False] * len(totals))
        return Sweep.of(cond, step, back, *wider, sum(fc), self._loops(), own)

    def _loops(self) -> Loops:
        """Of a derivative: half as many residuals of steps that have about twice as many, unless it is the first that has any."""
        size = self.loops.residual_steps // 2 if self.sizes[2] else self.loops.residual_steps
        return Loops(self.loops.checkpoints, max(1, size))

    def needs_y(self, flags: Flags) -> bool:
        """Whether the VJP computes with y itself: not if only y has cotangents, as all is linear in y."""
        return bool(self.sizes[2]) and any((*flags[0], *flags[1]))

    # ------------------------------------------------------------------------------------------------ batching

    def batched(self, axis: Any, flags: Flags, kept: Flag) -> tuple[Sweep, Flags, Flag, Flag]:
        """The sweep of many lanes: values have a leading axis where they are flagged, or must have one.

        Args:
          flags: for c, x, y. kept: for the residuals of a step, of a sweep whose forward run was batched already.
        Returns:
          The sweep, and the flags for c, x, y; for residuals; and for totals.
        """
        key = ("batch", axis, flags, kept)
        return self._once(key, lambda: self._batched(axis, flags, kept))

    def _batched(self, axis: Any, flags: Flags, kept: Flag) -> tuple[Sweep, Flags, Flag, Flag]:
        c, x, y = flags
        n_x, n_y = self.sizes[1:3]
        while True:
            cond, (goes_apart,) = _jax.batched(self.cond, axis, [*c, *x], bool(self.prefix) and any((*c, *x, *y)))
            step, found = _jax.batched(self.step, axis, [*c, *x], [goes_apart or f for f in x])
            if x == (x := tuple(map(operator.or_, x, found))):
                break
        hoist, hoisted = _jax.batched(self.hoist, axis, c, False)
        leaf, found = _jax.batched(self.leaf, axis, [*c, *hoisted, *x], [*x, *kept])
        kept = tuple(found[n_x:])
        y = tuple(f or goes_apart for f in y)
        while True:
            pull, found = _jax.batched(
                self.pull, axis, [*c, *hoisted, *kept, *y], [*y, *[False] * (len(self.pull.out_avals) - n_y)]
            )
            if y == (y := tuple(map(operator.or_, y, found[:n_y]))):
                break
        own = tuple(c) if goes_apart and not self.prefix else self.own
        if own is not None and cond.out_avals[0].shape != self.prefix and own != tuple(c):
            own = None  # some belong to lanes along one axis alone
        return Sweep(cond, step, hoist, leaf, pull, self.sizes, self.loops, own), (c, x, y), kept, tuple(found[n_y:])


# ------------------------------------------------------------------------------------------------ lists of values


def call(jaxpr: Any, *groups: Sequence[Any]) -> list[Any]:
    """Evaluate a closed jaxpr."""
    return list(_jax.jaxpr_as_fun(jaxpr)(*(x for group in groups for x in group)))


def chosen(values: Sequence[Any], flags: Flag) -> list[Any]:
    """The values that are flagged."""
    return [x for x, f in zip(values, flags, strict=True) if f]


def merged(values: Sequence[Any], flags: Flag, others: Sequence[Any]) -> list[Any]:
    """`values`, with others in the place of those that are flagged."""
    rest = iter(others)
    return [next(rest) if f else x for x, f in zip(values, flags, strict=True)]


def tangents(avals: Sequence[Any], flags: Flag | None = None) -> list[Any]:
    """The types of tangents, and of cotangents, of flagged values."""
    return [a.to_tangent_aval() for a in (avals if flags is None else chosen(avals, flags))]


def _is_inexact(aval: Any) -> bool:
    return jax.dtypes.issubdtype(aval.dtype, jax.numpy.inexact)


# ------------------------------------------------------------------------------------------------ the parts of a step


# Elementwise, of a few cycles each.
_CHEAP = {"add", "sub", "mul", "neg", "max", "min", "integer_pow", "select_n", "convert_element_type"}
_CHEAP |= {"eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not"}


def _parts(jaxpr: Any, step: Any, n_c: int, n_x: int) -> tuple[Any, Any, Any]:
    """Cut (c, x, y) -> (x, y, increments) into what needs c alone, what needs x too, and what needs y.

    An equation with sub-graphs may compute a part of the next x beside what needs y. Then x comes from `step`.
    """
    inner = _shared(jaxpr.jaxpr)
    c, x, y = inner.invars[:n_c], inner.invars[n_c : n_c + n_x], inner.invars[n_c + n_x :]
    level = {**dict.fromkeys([*inner.constvars, *c], 0), **dict.fromkeys(x, 1), **dict.fromkeys(y, 2)}
    eqns: list[list[Any]] = [[], [], []]
    for eqn in inner.eqns:
        read = [level[v] for v in eqn.invars if not isinstance(v, _jax.Literal)]
        at = max([1 if eqn.effects else 0, *read])
        level.update(dict.fromkeys(eqn.outvars, at))
        eqns[at].append(eqn)
    is_from = lambda at: lambda v: not isinstance(v, _jax.Literal) and level[v] == at
    _, needed = _live(eqns[2], inner.outvars[n_x:])
    kept, moved = set(filter(is_from(1), needed)), []
    for eqn in reversed(eqns[1]):  # what is cheap to compute from other residuals is not kept
        if eqn.primitive.name in _CHEAP and eqn.outvars[0] in kept and kept.issuperset(filter(is_from(1), eqn.invars)):
            kept.remove(eqn.outvars[0])
            moved.append(eqn)
    pull, needed = _live([*reversed(moved), *eqns[2]], inner.outvars[n_x:])
    residuals = list(filter(is_from(1), needed))
    is_apart = not any(map(is_from(2), inner.outvars[:n_x]))
    made = [*(inner.outvars[:n_x] if is_apart else ()), *residuals]
    leaf, more = _live(eqns[1], made)
    given = {*inner.constvars, *c}
    hoisted = [v for v in filter(is_from(0), dict.fromkeys([*needed, *more])) if v not in given]
    hoist, _ = _live(eqns[0], hoisted)
    make = lambda invars, outvars, eqns: _jax.part_of(inner, invars, outvars, eqns, jaxpr.consts)
    leaf = make([*c, *hoisted, *x], made, leaf)
    if not is_apart:
        both = lambda *v, rest=leaf: [*call(step, v[:n_c], v[len(v) - n_x :]), *call(rest, v)]
        leaf = _jax.stage_flat(both, leaf.in_avals, _jax.no_names)
    return make(c, hoisted, hoist), leaf, make([*c, *hoisted, *residuals, *y], inner.outvars[n_x:], pull)


def _shared(jaxpr: Any) -> Any:
    """What is computed twice is computed once, and so kept once."""
    same: dict[Any, Any] = {}
    found: dict[Any, Any] = {}
    atom = lambda v: v if isinstance(v, _jax.Literal) else same.get(v, v)
    key_of = lambda v: (np.asarray(v.val).tobytes(), v.aval) if isinstance(v, _jax.Literal) else v
    eqns = []
    for eqn in jaxpr.eqns:
        eqn = eqn.replace(invars=list(map(atom, eqn.invars)))
        try:
            key = None if eqn.effects else (eqn.primitive, tuple(eqn.params.items()), *map(key_of, eqn.invars))
            first = found.setdefault(key, eqn) if key else eqn
        except TypeError:  # parameters without a hash
            first = eqn
        if any(map(_jax.dropped, first.outvars)):  # these have no name by which others could read them
            first = eqn
        if first is eqn:
            eqns.append(eqn)
        same.update(zip(eqn.outvars, first.outvars, strict=True))
    return jaxpr.replace(eqns=eqns, outvars=list(map(atom, jaxpr.outvars)))


def _live(eqns: list[Any], outvars: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The equations that these variables need, and all variables that are then read, in order of use."""
    found, live = [], []
    needed = {v for v in outvars if not isinstance(v, _jax.Literal)}
    for eqn in reversed(eqns):
        if eqn.effects or not needed.isdisjoint(eqn.outvars):
            found.append(eqn)
            needed.update(v for v in eqn.invars if not isinstance(v, _jax.Literal))
    made = {v for eqn in found for v in eqn.outvars}
    for v in (*(v for eqn in reversed(found) for v in eqn.invars), *outvars):
        if not isinstance(v, _jax.Literal) and v not in made:
            live.append(v)
    return found[::-1], list(dict.fromkeys(live))
