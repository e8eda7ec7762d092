"""How a sweep runs: `plain`, forward; `forward`, with checkpoints; `backward`, from these; all as loops of XLA.

The body stands in few loops, so that programs stay small: forward one that keeps residuals for the first steps and one that
does not, backward one that goes on from a checkpoint, one that keeps residuals, and one that comes back.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..core import manual_axes, subjaxprs
from .adjoint import Sweep, call, chosen, merged
from .schedule import advance, merge

_LAST = np.int32(2**31 - 1)


class Kept(NamedTuple):
    """What a forward run keeps for the backward run. Counts are int32.

    Attributes:
      steps: how many there were. stored: how many checkpoints.
      units: [c] the unit of each checkpoint, ascending. slots: [c] where each lies; the free ones stand behind.
      states: for each of x, [c, ...]. running: bool [residual_steps, *prefix], which lanes took a step.
      tape: for each residual, [residual_steps, ...], those of the first steps. Neither without residual_steps > 1.
      active: for each of x, where each lane was before its last step; the first x without lanes.
    """

    steps: Any
    stored: Any
    units: Any
    slots: Any
    states: list[Any]
    running: list[Any]
    tape: list[Any]
    active: list[Any]

    @classmethod
    def avals(cls, sweep: Sweep) -> Kept:
        """The types of all, of a sweep with these x and residuals."""
        c, s = sweep.loops.checkpoints, sweep.loops.residual_steps
        made = lambda shape, dtype: manual_axes.vary(jax.core.ShapedArray(shape, np.dtype(dtype)), sweep.axes)
        count, many = made((), np.int32), made((c,), np.int32)
        states = [_stacked(a, c) for a in sweep.avals[1]]
        if s == 1:
            return cls(count, count, many, many, states, [], [], list(sweep.avals[1]))
        running = made((s, *sweep.prefix), bool)
        tape = [_stacked(a, s) for a in sweep.residuals]
        return cls(count, count, many, many, states, [running], tape, list(sweep.avals[1]))


def plain(sweep: Sweep, c: Sequence[Any], x: Sequence[Any]) -> list[Any]:
    """The last x."""
    return _run(sweep, c, _count(sweep, 0), x, _goes(sweep, c, x), [], _LAST)[1]


def forward(sweep: Sweep, c: Sequence[Any], x0: Sequence[Any]) -> tuple[list[Any], Kept]:
    """The last x, and what the backward run needs."""
    size, n_slots = sweep.loops.residual_steps, sweep.loops.checkpoints
    avals = Kept.avals(sweep)
    running, tape = _zeros(avals.running), _zeros(avals.tape)
    i, x, goes = _count(sweep, 0), list(x0), _goes(sweep, c, x0)
    lent, active = _lent(sweep, c, x, goes)
    if size > 1:
        hoisted = call(sweep.hoist, lent)

        def taped(t):
            i, x, goes, active, running, tape = t
            active = _followed(goes, x, active)
            new, residuals = _leaf(sweep, lent, hoisted, x, goes, active)
            running, tape = _put(running, [goes], i), _put(tape, residuals, i)
            return i + 1, new, _goes(sweep, c, new), active, running, tape

        i, x, goes, active, running, tape = lax.while_loop(
            lambda t: (t[0] < size) & jnp.any(t[2]), taped, (i, x, goes, active, running, tape)
        )
    else:
        i, x, goes, active = _run(sweep, c, i, x, goes, active, 1)

    def segment(t):
        i, x, goes, active, stored, units, slots, states = t
        unit = i // size
        rank, most = merge(units, unit)
        is_full, ranks = stored == n_slots, jnp.arange(n_slots, dtype=jnp.int32)
        later = jnp.where(is_full & (ranks >= rank), jnp.minimum(ranks + 1, n_slots - 1), ranks)
        slot = slots[jnp.where(is_full, rank, stored)]
        here = ranks == jnp.minimum(stored, n_slots - 1)
        units, slots = jnp.where(here, unit, units[later]), jnp.where(here, slot, slots[later])
        states = _put(states, x, slot)
        end = (unit + jnp.where(is_full, jnp.maximum(most, 1), 1)) * size
        i, x, goes, active = _run(sweep, c, i, x, goes, active, end)
        return i, x, goes, active, jnp.minimum(stored + 1, n_slots), units, slots, states

    start = (
        i,
        x,
        goes,
        active,
        _count(sweep, 0),
        _count(sweep, np.zeros(n_slots)),
        _count(sweep, np.arange(n_slots)),
        _zeros(avals.states),
    )
    i, x, _, active, stored, units, slots, states = lax.while_loop(lambda t: jnp.any(t[2]), segment, start)
    return x, Kept(i, stored, units, slots, states, running, tape, active or list(x0))


def backward(
    sweep: Sweep, c: Sequence[Any], x0: Sequence[Any], kept: Kept, y: Sequence[Any]
) -> tuple[list[Any], list[Any]]:
    """The first y, and the totals."""
    size, n_slots = sweep.loops.residual_steps, sweep.loops.checkpoints
    lent, _ = _lent(sweep, c, x0, _goes(sweep, c, x0))
    hoisted = call(sweep.hoist, lent)
    totals = _zeros(sweep.avals[3])
    pulled = functools.partial(_pulled, sweep, lent, hoisted)

    def last_unit(t):
        left, stored, units, states, running, tape, y, totals = t
        is_taped = (left == kept.steps) & (left <= size) & (size > 1)
        top = jnp.maximum(stored - 1, 0)
        base = jnp.where(stored > 0, units[top], 0)
        x = [jnp.where(_lifted(stored > 0, a), a, b) for a, b in zip(_get(states, kept.slots[top]), x0, strict=True)]

        def on(q):
            base, stored, units, states, x = q
            ahead = advance((left - base * size + size - 1) // size, n_slots - stored, n_slots)
            _, x, *_ = _run(sweep, c, _count(sweep, 0), x, None, [], ahead * size)
            has_room, at = stored < n_slots, jnp.minimum(stored, n_slots - 1)
            slot = kept.slots[at]
            old = _get(states, slot)
            states = _put(states, [jnp.where(_lifted(has_room, a), a, b) for a, b in zip(x, old, strict=True)], slot)
            units = jnp.where(has_room & (jnp.arange(n_slots, dtype=jnp.int32) == at), base + ahead, units)
            return base + ahead, stored + has_room.astype(jnp.int32), units, states, x

        base, stored, units, states, x = lax.while_loop(
            lambda q: left - q[0] * size > size, on, (base, stored, units, states, x)
        )
        count = left - base * size
        if size > 1:

            def taped(q):
                k, x, running, tape = q
                goes = _goes(sweep, c, x) if sweep.prefix else jnp.ones_like(k, bool)
                x, residuals = _leaf(sweep, lent, hoisted, x, goes, kept.active)
                return k + 1, x, _put(running, [goes], k), _put(tape, residuals, k)

            start = jnp.where(is_taped, count, 0), x, running, tape
            _, _, running, tape = lax.while_loop(lambda q: q[0] < count, taped, start)

            def back(q):
                k, y, totals = q
                return k - 1, *pulled(_get(tape, k - 1), _get(running, k - 1)[0], y, totals)

            _, y, totals = lax.while_loop(lambda q: q[0] > 0, back, (count, y, totals))
        else:
            goes = _goes(sweep, c, x) if sweep.prefix else None
            _, residuals = _leaf(sweep, lent, hoisted, x, goes, kept.active)
            y, totals = pulled(residuals, goes, y, totals)
        is_done = (stored > 0) & (units[jnp.maximum(stored - 1, 0)] == base)
        return base * size, stored - is_done.astype(jnp.int32), units, states, running, tape, y, totals

    start = (kept.steps, kept.stored, kept.units, kept.states, kept.running, kept.tape, list(y), totals)
    *_, y, totals = lax.while_loop(lambda t: t[0] > 0, last_unit, start)
    return y, totals


def count(sweep: Sweep, c: Sequence[Any], x: Sequence[Any]) -> Any:
    """How many steps there are."""
    return _run(sweep, c, _count(sweep, 0), x, _goes(sweep, c, x), [], _LAST)[0]


def stepwise(
    sweep: Sweep, c: Sequence[Any], x: Sequence[Any], y: Sequence[Any] | None, steps: int
) -> tuple[Sequence[Any], list[Any], list[Any]]:
    """The last x, y and the totals of a number of steps that is known, as two scans with all residuals between them.

    Args:
      y: the state that comes back; None for the way forward alone.
    """
    lent, active = _lent(sweep, c, x, _goes(sweep, c, x))
    hoisted = call(sweep.hoist, lent)

    def ahead(t, _):
        x, active = t
        goes = _goes(sweep, c, x)
        active = _followed(goes, x, active)
        new, residuals = _leaf(sweep, lent, hoisted, x, goes, active)
        return (new, active), (goes, residuals)

    (x, _), (goes, residuals) = lax.scan(ahead, (list(x), active), None, length=steps)
    if y is None:
        return x, [], []
    back = lambda t, kept: (_pulled(sweep, lent, hoisted, kept[1], kept[0], *t), None)
    (y, totals), _ = lax.scan(back, (list(y), _zeros(sweep.avals[3])), (goes, residuals), reverse=True)
    return x, y, totals


def _run(
    sweep: Sweep, c: Sequence[Any], i: Any, x: Sequence[Any], goes: Any, active: list[Any], end: Any
) -> tuple[Any, list[Any], Any, list[Any]]:
    """Steps until `end`, and while the loop goes on; without `goes` it is known to. `active` follows x, or is empty."""
    if goes is None and not sweep.prefix:
        body = lambda t: (t[0] + 1, call(sweep.step, c, t[1]))
        i, x = lax.while_loop(lambda t: t[0] < end, body, (i, list(x)))
        return i, x, None, active

    def step(t):
        i, x, goes, active = t
        new = call(sweep.step, c, x)
        active = _followed(goes, x, active)
        new = _where(goes, new, x) if sweep.prefix else new
        return i + 1, new, _goes(sweep, c, new), active

    start = i, list(x), _goes(sweep, c, x) if goes is None else goes, active
    return lax.while_loop(lambda t: (t[0] < end) & jnp.any(t[2]), step, start)


def _leaf(
    sweep: Sweep, lent: Sequence[Any], hoisted: Sequence[Any], x: Sequence[Any], goes: Any, active: Sequence[Any]
) -> tuple[list[Any], list[Any]]:
    """A step with its residuals. Lanes that have finished compute them where they were before their last step.

    Where they have stopped derivatives may not be finite, and no zero cotangent makes them so.
    """
    outputs = call(sweep.leaf, lent, hoisted, _where(goes, x, active) if sweep.prefix else x)
    new, residuals = outputs[: len(x)], outputs[len(x) :]
    return _where(goes, new, x) if sweep.prefix else new, residuals


def _pulled(
    sweep: Sweep, c: Sequence[Any], hoisted: Sequence[Any], residuals: Any, goes: Any, y: Sequence[Any], totals: Any
) -> tuple[list[Any], list[Any]]:
    """A step back: y and the totals. Lanes that took no such step stay as they are."""
    given = _where(goes, y, [jnp.zeros_like(v) for v in y]) if sweep.prefix else y
    found = call(sweep.pull, c, hoisted, residuals, given)
    new, increments = found[: len(y)], found[len(y) :]
    return _where(goes, new, y) if sweep.prefix else new, [a + b for a, b in zip(totals, increments, strict=True)]


def _borrowed(goes: Any, values: Sequence[Any]) -> list[Any]:
    """Values of each lane, those of the first that goes on in the place of those that do not."""
    if not goes.size:
        return list(values)
    lane = jnp.unravel_index(jnp.argmax(goes), goes.shape)
    return _where(goes, values, [jnp.broadcast_to(v[lane], v.shape) for v in values])


def _lent(sweep: Sweep, c: Sequence[Any], x: Sequence[Any], goes: Any) -> tuple[list[Any], list[Any]]:
    """The constants for derivatives, and the first `active`: a lane without a step is lent those of another.

    Where nobody knows which constants are its own, it may be lent a state that does not go with them: not if the step has
    loops, which then might not end.
    """
    if not sweep.prefix:
        return list(c), []
    if sweep.own is None:
        return list(c), list(x) if _has_loops(sweep.leaf.jaxpr) else _borrowed(goes, x)
    return merged(c, sweep.own, _borrowed(goes, chosen(c, sweep.own))), _borrowed(goes, x)


def _has_loops(jaxpr: Any) -> bool:
    is_loop = lambda eqn: eqn.primitive.name in subjaxprs.LOOPS | {"forward", "sweep", "tangent"}
    inside = lambda eqn: any(_has_loops(body.jaxpr.jaxpr) for body in subjaxprs.bodies(eqn))
    return any(is_loop(eqn) or inside(eqn) for eqn in jaxpr.eqns)


def _followed(goes: Any, x: Sequence[Any], active: list[Any]) -> list[Any]:
    """Where each lane is now, or was before its last step; nothing without lanes."""
    return _where(goes, x, active) if active else []


def _goes(sweep: Sweep, c: Sequence[Any], x: Sequence[Any]) -> Any:
    return call(sweep.cond, c, x)[0]


def _where(goes: Any, new: Sequence[Any], old: Sequence[Any]) -> list[Any]:
    return [jnp.where(_lifted(goes, a), a, b) for a, b in zip(new, old, strict=True)]


def _lifted(goes: Any, value: Any) -> Any:
    """A predicate with trailing axes for those of `value`."""
    return jnp.reshape(goes, (*goes.shape, *[1] * (value.ndim - goes.ndim)))


def _stacked(aval: Any, n: int) -> Any:
    return manual_axes.vary(jax.core.ShapedArray((n, *aval.shape), aval.dtype), manual_axes.axes_of(aval))


def _count(sweep: Sweep, value: Any) -> Any:
    """An int32, or some, to begin with."""
    return manual_axes.vary(jnp.asarray(value, jnp.int32), sweep.axes)


def _zeros(avals: Sequence[Any]) -> list[Any]:
    return list(map(subjaxprs.zeros, avals))


def _put(buffers: Sequence[Any], values: Sequence[Any], at: Any) -> list[Any]:
    put = lambda b, v: lax.dynamic_update_index_in_dim(b, v, at, 0)
    return [put(b, v.astype(b.dtype)) for b, v in zip(buffers, values, strict=True)]


def _get(buffers: Sequence[Any], at: Any) -> list[Any]:
    return [lax.dynamic_index_in_dim(b, at, 0, keepdims=False) for b in buffers]
