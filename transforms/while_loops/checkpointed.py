"""How a sweep runs: `plain`, forward alone; `forward`, with checkpoints; `backward`, from these; all as loops of XLA.

The body of the loop stands in few loops, so that programs stay small: in the forward sweep one that records residuals (for the
first steps) and one that does not; in the reverse sweep one that advances from a checkpoint, one that records residuals, and
one that pulls cotangents back.

Symbols, here and in `schedule`: n steps; u = `residual_steps`, the steps of a unit; s = `checkpoints`, the slots. x[k] is the
state before step k and y[k] its cotangent. Units start at the steps 0, u, 2u, … The state x[0] needs no slot.

Source: the sources of `schedule`; Griewank & Walther 2008, Evaluating Derivatives, doi:10.1137/1.9780898717761, chapter 12.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..core import lanes, manual_axes, subjaxprs
from .adjoint import Sweep, call, chosen, cut, merged
from .schedule import advance, merge

_MAX_STEPS = np.int32(2**31 - 1)


class Checkpoints(NamedTuple):
    """What the forward sweep keeps for the reverse sweep. Counts are int32.

    Attributes:
      steps: n. stored: the number of stored checkpoints.
      units: [s] the unit of each checkpoint, ascending. slots: [s] the slot of each; the free slots follow.
      states: for each of x, [s, ...]. running: bool [u, *lanes], the lanes that took a step.
      tape: for each residual, [u, ...], that of the first u steps. `running` and `tape` are empty if u = 1.
      last_inputs: for each of x, the input of each lane's last step; the first x without lanes.
    """

    steps: Any
    stored: Any
    units: Any
    slots: Any
    states: list[Any]
    running: list[Any]
    tape: list[Any]
    last_inputs: list[Any]

    @classmethod
    def avals(cls, sweep: Sweep) -> Checkpoints:
        """The types of all fields, for the x and the residuals of a sweep."""
        s, u = sweep.loops.checkpoints, sweep.loops.residual_steps
        typed = lambda shape, dtype: manual_axes.vary(jax.core.ShapedArray(shape, np.dtype(dtype)), sweep.axes)
        stacked = lambda avals, n: [
            manual_axes.vary(jax.core.ShapedArray((n, *a.shape), a.dtype), manual_axes.axes_of(a)) for a in avals
        ]
        count, counts, x = typed((), np.int32), typed((s,), np.int32), sweep.avals[1]
        running, tape = ([typed((u, *sweep.lanes), bool)], stacked(sweep.residuals, u)) if u > 1 else ([], [])
        return cls(count, count, counts, counts, stacked(x, s), running, tape, list(x))


class _Front(NamedTuple):
    """How far a run forward is: `i` steps, x = x[i], the predicate, and of each lane the input of its latest step.

    A batched loop has lanes; without lanes `last_inputs` is empty.
    """

    i: Any
    x: list[Any]
    running: Any
    last_inputs: list[Any]


def plain(sweep: Sweep, c: Sequence[Any], x: Sequence[Any]) -> tuple[Any, list[Any]]:
    """The number of steps, and the last x."""
    front = _Front(_counts(sweep, 0), list(x), _running(sweep, c, x), [])
    return _run(sweep, c, front, _MAX_STEPS)[:2]


def forward(sweep: Sweep, c: Sequence[Any], x0: Sequence[Any]) -> tuple[list[Any], Checkpoints]:
    """The last x, and what the reverse sweep needs."""
    u, n_slots = sweep.loops.residual_steps, sweep.loops.checkpoints
    avals = Checkpoints.avals(sweep)
    running_tape, tape = _zeros(avals.running), _zeros(avals.tape)
    i, running = _counts(sweep, 0), _running(sweep, c, x0)
    c_filled, last_inputs = _filled_lanes(sweep, c, x0, running)
    front = _Front(i, list(x0), running, last_inputs)
    if u > 1:
        steps = _Steps(sweep, c_filled)

        def taped(state):  # invariant: the tape holds the residuals of the steps before i
            front, running_tape, tape = state
            next_front, residuals = steps.forward(c, front)
            running_tape = _put(running_tape, [front.running], front.i)
            return next_front, running_tape, _put(tape, residuals, front.i)

        is_first_unit = lambda state: (state[0].i < u) & jnp.any(state[0].running)
        front, running_tape, tape = lax.while_loop(is_first_unit, taped, (front, running_tape, tape))
    else:
        front = _run(sweep, c, front, 1)

    def segment(state):
        """Store a checkpoint of x[i], and run to the start of the next unit that is stored.

        Invariant: i is a multiple of u, `units[:stored]` ascend, and the state of unit `units[k]` lies in slot `slots[k]`.
        """
        front, stored, units, slots, states = state
        unit = front.i // u
        evicted_rank, repetitions = merge(units, unit)
        is_full, ranks = stored == n_slots, jnp.arange(n_slots, dtype=jnp.int32)
        source = jnp.where(is_full & (ranks >= evicted_rank), jnp.minimum(ranks + 1, n_slots - 1), ranks)
        slot = slots[jnp.where(is_full, evicted_rank, stored)]
        is_new = ranks == jnp.minimum(stored, n_slots - 1)
        units, slots = jnp.where(is_new, unit, units[source]), jnp.where(is_new, slot, slots[source])
        states = _put(states, front.x, slot)
        end = (unit + jnp.where(is_full, jnp.maximum(repetitions, 1), 1)) * u
        return _run(sweep, c, front, end), jnp.minimum(stored + 1, n_slots), units, slots, states

    numbers = _counts(sweep, 0), _counts(sweep, np.zeros(n_slots)), _counts(sweep, np.arange(n_slots))
    start = front, *numbers, _zeros(avals.states)
    front, stored, units, slots, states = lax.while_loop(lambda state: jnp.any(state[0].running), segment, start)
    return front.x, Checkpoints(
        front.i, stored, units, slots, states, running_tape, tape, front.last_inputs or list(x0)
    )


def backward(
    sweep: Sweep, c: Sequence[Any], x0: Sequence[Any], checkpoints: Checkpoints, y: Sequence[Any]
) -> tuple[list[Any], list[Any]]:
    """The first y, and the totals."""
    u, n_slots = sweep.loops.residual_steps, sweep.loops.checkpoints
    steps = _Steps(sweep, _filled_lanes(sweep, c, x0, _running(sweep, c, x0))[0])
    totals = _zeros(sweep.avals[3])

    def last_unit(state):
        """Reverse the last unit before step `end`.

        Invariant: y = y[end], `totals` are the increments of the steps from `end` on, and all checkpoints lie before `end`.
        """
        end, stored, units, states, running_tape, tape, y, totals = state
        is_taped = (end == checkpoints.steps) & (end <= u) & (u > 1)
        last = jnp.maximum(stored - 1, 0)
        unit = jnp.where(stored > 0, units[last], 0)
        x = _get(states, checkpoints.slots[last])
        x = [jnp.where(lanes.expand(stored > 0, a), a, b) for a, b in zip(x, x0, strict=True)]

        def to_next_checkpoint(state):  # invariant: x = x[unit * u], which is a checkpoint unless no slot was free
            unit, stored, units, states, x = state
            n_units = advance((end - unit * u + u - 1) // u, n_slots - stored, n_slots)
            running = _running(sweep, c, x) if sweep.lanes else None
            x = _run(sweep, c, _Front(_counts(sweep, 0), x, running, []), n_units * u).x
            has_room, rank = stored < n_slots, jnp.minimum(stored, n_slots - 1)
            slot = checkpoints.slots[rank]
            old = zip(x, _get(states, slot), strict=True)
            states = _put(states, [jnp.where(lanes.expand(has_room, a), a, b) for a, b in old], slot)
            units = jnp.where(has_room & (jnp.arange(n_slots, dtype=jnp.int32) == rank), unit + n_units, units)
            return unit + n_units, stored + has_room.astype(jnp.int32), units, states, x

        unit, stored, units, states, x = lax.while_loop(
            lambda state: end - state[0] * u > u, to_next_checkpoint, (unit, stored, units, states, x)
        )
        n_steps = end - unit * u
        if u > 1:

            def taped(state):  # invariant: x = x[unit * u + k], and the tape holds the residuals of the k steps before
                k, x, running_tape, tape = state
                running = _running(sweep, c, x) if sweep.lanes else jnp.ones_like(k, bool)
                x, residuals = steps.recorded(x, running, checkpoints.last_inputs)
                return k + 1, x, _put(running_tape, [running], k), _put(tape, residuals, k)

            start = jnp.where(is_taped, n_steps, 0), x, running_tape, tape
            _, _, running_tape, tape = lax.while_loop(lambda state: state[0] < n_steps, taped, start)

            def pulled(state):  # invariant: y = y[unit * u + k]
                k, y, totals = state
                return k - 1, *steps.backward(_get(tape, k - 1), _get(running_tape, k - 1)[0], y, totals)

            _, y, totals = lax.while_loop(lambda state: state[0] > 0, pulled, (n_steps, y, totals))
        else:
            running = _running(sweep, c, x) if sweep.lanes else None
            _, residuals = steps.recorded(x, running, checkpoints.last_inputs)
            y, totals = steps.backward(residuals, running, y, totals)
        is_reversed = (stored > 0) & (units[jnp.maximum(stored - 1, 0)] == unit)
        return unit * u, stored - is_reversed.astype(jnp.int32), units, states, running_tape, tape, y, totals

    n, stored, units, _, states, running_tape, tape, _ = checkpoints
    start = n, stored, units, states, running_tape, tape, list(y), totals
    *_, y, totals = lax.while_loop(lambda state: state[0] > 0, last_unit, start)
    return y, totals


def stepwise(
    sweep: Sweep, c: Sequence[Any], x: Sequence[Any], y: Sequence[Any] | None, n: int
) -> tuple[Sequence[Any], list[Any], list[Any]]:
    """The last x, the first y and the totals of n steps, as two scans with all residuals between them.

    Args:
      y: the last y; None for the forward sweep alone.
    """
    c_filled, last_inputs = _filled_lanes(sweep, c, x, _running(sweep, c, x))
    steps = _Steps(sweep, c_filled)

    def taped(state, _):
        front = _Front(0, state[0], _running(sweep, c, state[0]), state[1])
        (_, x, _, last_inputs), residuals = steps.forward(c, front)
        return (x, last_inputs), (residuals, front.running)

    (x, _), tape = lax.scan(taped, (list(x), last_inputs), None, length=n)
    if y is None:
        return x, [], []
    pulled = lambda state, step: (steps.backward(*step, *state), None)
    (y, totals), _ = lax.scan(pulled, (list(y), _zeros(sweep.avals[3])), tape, reverse=True)
    return x, y, totals


def _run(sweep: Sweep, c: Sequence[Any], front: _Front, end: Any) -> _Front:
    """Steps until `end`, or until no lane is running; without a predicate the loop is known to reach `end`."""
    if front.running is None:
        step = lambda front: front._replace(i=front.i + 1, x=call(sweep.step, c, front.x))
        return lax.while_loop(lambda front: front.i < end, step, front)

    def step_of_lanes(front):
        i, x, running, last_inputs = front
        next_x = call(sweep.step, c, x)
        last_inputs = last_inputs and lanes.select(running, x, last_inputs)
        next_x = lanes.select(running, next_x, x)
        return _Front(i + 1, next_x, _running(sweep, c, next_x), last_inputs)

    return lax.while_loop(lambda front: (front.i < end) & jnp.any(front.running), step_of_lanes, front)


class _Steps:
    """Single steps of a sweep, forward with residuals and back.

    Args:
      c: the constants, as `_filled_lanes` returns them.
    """

    def __init__(self, sweep: Sweep, c: Sequence[Any]):
        self.sweep, self.c, self.hoisted = sweep, c, call(sweep.hoist, c)

    def forward(self, c: Sequence[Any], front: _Front) -> tuple[_Front, list[Any]]:
        """The front after a step of the loop whose constants are `c`, and the residuals."""
        i, x, running, last_inputs = front
        last_inputs = last_inputs and lanes.select(running, x, last_inputs)
        x, residuals = self.recorded(x, running, last_inputs)
        return _Front(i + 1, x, _running(self.sweep, c, x), last_inputs), residuals

    def recorded(self, x: Sequence[Any], running: Any, last_inputs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """The next x and the residuals. A finished lane has those of its last step.

        At its final state derivatives may be infinite, and a cotangent of zero times infinity is NaN.
        """
        outputs = call(self.sweep.fwd, self.c, self.hoisted, lanes.select(running, x, last_inputs))
        next_x, residuals = cut(outputs, len(x))
        return lanes.select(running, next_x, x), residuals

    def backward(self, residuals: Any, running: Any, y: Sequence[Any], totals: Any) -> tuple[list[Any], list[Any]]:
        """The y before a step, and the totals with its increments. Lanes that did not take the step keep both."""
        ct = lanes.select(running, y, map(jnp.zeros_like, y))
        ct, increments = cut(call(self.sweep.bwd, self.c, self.hoisted, residuals, ct), len(y))
        return lanes.select(running, ct, y), [a + b for a, b in zip(totals, increments, strict=True)]


def _filled_lanes(sweep: Sweep, c: Sequence[Any], x: Sequence[Any], running: Any) -> tuple[list[Any], list[Any]]:
    """The constants for derivatives, and the first `last_inputs`: a lane without a step takes those of a running lane.

    Where the constants of lanes are not known (`Sweep.per_lane`), such a state may not belong to the lane's constants, and loops
    in the step might not end: a step with loops keeps its own state.
    """

    def filled(values):
        if not running.size:
            return list(values)
        lane = jnp.unravel_index(jnp.argmax(running), running.shape)
        return lanes.select(running, values, [jnp.broadcast_to(v[lane], v.shape) for v in values])

    if not sweep.lanes:
        return list(c), []
    if sweep.per_lane is None:
        return list(c), list(x) if _has_loops(sweep.fwd.jaxpr) else filled(x)
    return merged(c, sweep.per_lane, filled(chosen(c, sweep.per_lane))), filled(x)


def _has_loops(jaxpr: Any) -> bool:
    is_loop = lambda eqn: eqn.primitive.name in subjaxprs.LOOPS | subjaxprs.SWEEPS
    in_bodies = lambda eqn: any(_has_loops(body.jaxpr.jaxpr) for body in subjaxprs.bodies(eqn))
    return any(is_loop(eqn) or in_bodies(eqn) for eqn in jaxpr.eqns)


def _running(sweep: Sweep, c: Sequence[Any], x: Sequence[Any]) -> Any:
    """The predicate of the loop, bool[*lanes]."""
    return call(sweep.cond, c, x)[0]


def _counts(sweep: Sweep, value: Any) -> Any:
    """An int32, or an array of them, with the mesh axes of the sweep's counts."""
    return manual_axes.vary(jnp.asarray(value, jnp.int32), sweep.axes)


def _zeros(avals: Sequence[Any]) -> list[Any]:
    return list(map(subjaxprs.zeros, avals))


def _put(buffers: Sequence[Any], values: Sequence[Any], k: Any) -> list[Any]:
    put = lambda b, v: lax.dynamic_update_index_in_dim(b, v, k, 0)
    return [put(b, v.astype(b.dtype)) for b, v in zip(buffers, values, strict=True)]


def _get(buffers: Sequence[Any], k: Any) -> list[Any]:
    return [lax.dynamic_index_in_dim(b, k, 0, keepdims=False) for b in buffers]
