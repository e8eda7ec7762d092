"""Scans: what each step keeps for the backward pass, and how long the segments are that are computed again.

A planned scan is a scan with a derivative of its own. The forward pass stacks what the choice for its body saves; the
backward pass runs the body's backward part over these stacks. With segments, only the carry at their starts is kept, and each is
run again before it is reversed; segments may lie in segments.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.dtypes import float0

from ..core import _jax, subjaxprs
from ..cost.backends import Backend
from ..cost.operations import nbytes
from .device_model import Nominal
from .joint import SEAM, Joint
from .program import AGAIN, Emission, read
from .search import everything
from .simulation import Choice, Simulation


class Option(NamedTuple):
    """A way to run a scan backward.

    Attributes:
      choice: for its body.
      lengths: of the segments, from the outermost to the innermost; () keeps what the choice saves of every step.
      bytes: of all that is kept, and of what is alive while a step is reversed.
      seconds: of what is computed again, and to write and read what is kept, on the nominal machine.
    """

    choice: Choice
    lengths: tuple[int, ...]
    bytes: float
    seconds: float


class Scan:
    """A scan and its body's two parts."""

    def __init__(self, eqn: Any, backend: Backend, machine: Nominal):
        self.eqn, body = eqn, eqn.params["jaxpr"]
        self.sizes = subjaxprs.scan_sizes(eqn)
        self.avals = [v.aval for v in body.jaxpr.invars]
        self.out_avals = [v.aval for v in body.jaxpr.outvars]
        self.is_in, self.is_out = [_is_float(a) for a in self.avals], [_is_float(a) for a in self.out_avals]
        cts = [a for a, is_float in zip(self.out_avals, self.is_out, strict=True) if is_float]
        closed = _jax.stage_flat(self._pulled, [*cts, *self.avals], _jax.no_names)
        self.joint = Joint(closed, backend, machine, are_results_free=False)
        closed_over = len(self.joint.consts)
        self.consts = dict(zip(self.joint.inputs[:closed_over], self.joint.consts, strict=True))
        self.inputs = self.joint.inputs[closed_over:]  # the cotangents first

    def _pulled(self, *values):
        """The body and its pull-back, of cotangents and inputs."""
        body, n = self.eqn.params["jaxpr"], sum(self.is_out)
        cts, inputs = values[:n], values[n:]

        def of_floats(*floats):
            given = iter(floats)
            return _jax.jaxpr_as_fun(body)(
                *(next(given) if is_float else x for x, is_float in zip(inputs, self.is_in, strict=True))
            )

        outs, pull = jax.vjp(of_floats, *_chosen(inputs, self.is_in))
        marked = iter([checkpoint_name(ct, SEAM) for ct in cts])
        full = [
            next(marked) if ok else np.zeros(a.shape, float0) for a, ok in zip(self.out_avals, self.is_out, strict=True)
        ]
        return [*outs, *pull(full)]

    # ------------------------------------------------------------------------------------------------ what there is to choose

    @cached_property
    def options(self) -> list[Option]:
        """All that no other beats in both bytes and seconds, those to have the memory among these, the cheapest first."""
        segmentations, taken_s = list(_segmentations(self.eqn.params["length"])), self.joint.machine.taken
        found = [self._option(choice, lengths) for choice in self._choices() for lengths in segmentations]
        best: list[Option] = []
        for option in sorted(found, key=lambda o: (o.seconds + taken_s(o.bytes), o.bytes)):
            if not best or option.bytes < best[-1].bytes:
                best.append(option)
        return best

    @property
    def default(self) -> Option:
        """What is done without a budget."""
        return self._option(Choice(everything(self.joint), is_staged=False), ())

    @cached_property
    def _simulate(self) -> Simulation:
        return Simulation(self.joint, is_new=False)

    def _option(self, choice: Choice, lengths: tuple[int, ...]) -> Option:
        joint, machine, length = self.joint, self.joint.machine, self.eqn.params["length"]
        outcome, sizes = self._simulate(choice, 0), self._simulate.sizes_with(choice.saved)
        const_bytes, carry_bytes, _ = (sum(map(nbytes, avals)) for avals in self._split(self.avals))
        saved_bytes = sum(int(sizes[k]) for k in choice.saved)
        # Each level keeps the carry where its segments start, the innermost also what the choice saves of each step.
        kept = [math.ceil(a / b) * carry_bytes for a, b in pairwise((length, *lengths))]
        kept.append((lengths or (length,))[-1] * (saved_bytes + carry_bytes))
        times = [1, *(length / n for n in lengths)]
        moved_s = sum(machine.stacked * t * machine.moved(size, size) for t, size in zip(times, kept, strict=True))
        forward_s = sum(node.seconds for node in joint.nodes if node.is_run)
        # Each segment is a loop: the state of the one around it, the constants' cotangents among it, is copied in and out.
        state = const_bytes + carry_bytes
        moved_s += sum(times[1:]) * (2 * machine.moved(state, state) + machine.loop_s)
        again_s = (len(lengths) * forward_s + outcome.seconds) * length
        return Option(choice, lengths, sum(kept) + max(outcome.peak - saved_bytes, 0), again_s + moved_s)

    def _choices(self) -> list[Choice]:
        """From what saves everything to what saves nothing, the fewest seconds per byte first; and with one more or less."""
        joint, simulate = self.joint, self._simulate
        groups: dict[Any, list[int]] = defaultdict(list)
        for k in everything(joint):
            if not joint.nodes[k].is_pinned:
                groups[joint.nodes[k].kind if len(joint.nodes) > SINGLY else k].append(k)
        saved, rest = everything(joint), [frozenset(group) for group in groups.values()]
        found = [saved]
        while rest:
            here = simulate(Choice(saved), 0)

            def price(group, saved=saved, here=here):
                there = simulate(Choice(saved - group), 0)
                return (there.seconds - here.seconds) / (sum(joint.nodes[k].bytes for k in group) + 1)

            cheapest = min(rest, key=price)
            rest.remove(cheapest)
            saved = saved - cheapest
            found.append(saved)
        near = (saved ^ frozenset(group) for saved in found for group in groups.values())
        kept = dict.fromkeys([*found, *near])
        # A tie goes to all at once, which computes a little less.
        ways = (False, True) if len(joint.stages) > 1 else (False,)
        return [Choice(saved, is_staged=is_staged) for saved in kept for is_staged in ways]

    # ------------------------------------------------------------------------------------------------ how it runs

    def run(self, option: Option, values: Sequence[Any]) -> list[Any]:
        """The scan for its operands, with the derivative of this option."""
        emission, length = self._emission(option.choice), self.eqn.params["length"]

        @jax.custom_vjp
        def planned(*values):
            return _jax.bind(self.eqn.primitive, self.eqn.params, values)

        def forward(*values):
            consts, carry, xs = self._split(values)
            carry, ys, kept = self._forward(emission, length, option.lengths, consts, carry, xs)
            return [*carry, *ys], (consts, xs, kept)

        def backward(residuals, cts):
            consts, xs, kept = residuals
            floats, n = _chosen(cts, self.is_out), sum(self.is_out[: self.sizes[1]])
            sums = [jnp.zeros_like(c) for c, is_float in zip(consts, self.is_in, strict=False) if is_float]
            cts = sums, floats[:n], floats[n:]
            sums, ct_carry, ct_xs = self._backward(emission, length, option.lengths, consts, kept, xs, cts)
            grads = iter([*sums, *ct_carry, *ct_xs])
            return tuple(next(grads) if is_float else None for is_float in self.is_in)

        planned.defvjp(forward, backward)
        return list(planned(*values))

    def _emission(self, choice: Choice) -> Emission:
        return Emission(self.joint, choice, self.joint.outvars[len(self.out_avals) :])

    def _split(self, values: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        a, b, _ = accumulate(self.sizes)
        return list(values[:a]), list(values[a:b]), list(values[b:])

    def _forward(
        self, emission: Emission, length: int, lengths: tuple[int, ...], consts: Any, carry: Any, xs: Any
    ) -> Any:
        """The carry, the results, and what the backward pass needs: of every step, or the carry where each segment starts."""
        if lengths:

            def segment(count, carry, _, xs):
                after, ys, _ = self._forward(emission, count, _below(lengths, count), consts, carry, xs)
                return after, carry, ys

            avals = self.out_avals[self.sizes[1] :]
            carry, kept, ys = self._by_segments(segment, length, lengths[0], carry, None, xs, avals)
            return carry, ys, kept
        joint, n_carry = self.joint, self.sizes[1]
        inputs, outvars = self.inputs[sum(self.is_out) :], joint.outvars[: len(self.out_avals)]
        read_carry = [v in emission.read for v in self._split(inputs)[1]]

        def step(carry, x):
            env = self.consts | dict(zip(inputs, [*consts, *carry, *x], strict=True))
            emission.forward(env)
            outs = [read(env, v) for v in outvars]
            return outs[:n_carry], (outs[n_carry:], ([env[v] for v in emission.saved], _chosen(carry, read_carry)))

        carry, (ys, kept) = self._scan(step, carry, xs, length, unroll=self.eqn.params["unroll"])
        return carry, ys, kept

    def _backward(
        self, emission: Emission, length: int, lengths: tuple[int, ...], consts: Any, kept: Any, xs: Any, cts: Any
    ) -> Any:
        """From the sums so far of the constants' cotangents and the cotangents of carry and results to those of all inputs."""
        sums, ct_carry, ct_ys = cts
        if lengths:

            def segment(count, state, carry, given):
                (sums, ct_carry), xs, ct_ys = state, given[: len(xs_avals)], given[len(xs_avals) :]
                inner = _below(lengths, count)
                with jax.named_scope(AGAIN):
                    kept = self._forward(emission, count, inner, consts, carry, xs)[2]
                cts = sums, ct_carry, ct_ys
                sums, ct_carry, ct_xs = self._backward(emission, count, inner, consts, kept, xs, cts)
                return (sums, ct_carry), None, ct_xs

            xs_avals, is_float = self._split(self.avals)[2], self._split(self.is_in)[2]
            state, avals = (sums, ct_carry), _chosen(xs_avals, is_float)
            state, _, ct_xs = self._by_segments(
                segment, length, lengths[0], state, kept, [*xs, *ct_ys], avals, back=True
            )
            return *state, ct_xs
        joint, n = self.joint, sum(self.is_out)
        of_cts, inputs, grads = self.inputs[:n], self.inputs[n:], joint.outvars[len(self.out_avals) :]
        of_consts, of_carry, of_xs = self._split(inputs)
        of_carry = [v for v in of_carry if v in emission.read]
        n_sums, n_carry = len(sums), len(ct_carry)

        def step(state, given):
            (sums, ct_carry), (x, (saved, carry), ct_ys) = state, given
            names = [*of_cts, *of_consts, *of_xs, *of_carry, *emission.saved]
            known = self.consts | dict(zip(names, [*ct_carry, *ct_ys, *consts, *x, *carry, *saved], strict=True))
            env = known | emission.backward(dict(known))
            out = [read(env, v) for v in grads]
            sums = [s + g for s, g in zip(sums, out[:n_sums], strict=True)]
            return (sums, out[n_sums : n_sums + n_carry]), out[n_sums + n_carry :]

        state, given, unroll = (sums, ct_carry), (xs, kept, ct_ys), self.eqn.params["unroll"]
        (sums, ct_carry), ct_xs = self._scan(step, state, given, length, back=True, unroll=unroll)
        return sums, ct_carry, ct_xs

    def _scan(self, step: Any, state: Any, given: Any, length: int, *, back: bool = False, unroll: int = 1) -> Any:
        reverse = self.eqn.params["reverse"] != back
        return lax.scan(step, state, given, length=length, reverse=reverse, unroll=unroll)

    def _by_segments(
        self,
        segment: Callable,
        length: int,
        size: int,
        state: Any,
        kept: Any,
        xs: Sequence[Any],
        avals: Sequence[Any],
        *,
        back: bool = False,
    ) -> tuple[Any, Any, list[Any]]:
        """The last state of `segment(count, state, kept, xs) -> state, kept, ys`, what it keeps of each segment, and all `ys`.

        Where steps are left over, they are the last in the order of time. `avals` are those of a step of `ys`.
        """
        count, rest = divmod(length, size)
        reverse = self.eqn.params["reverse"]
        if not rest:

            def step(state, given):
                state, kept, ys = segment(size, state, *given)
                return state, (kept, ys)

            given = kept, [x.reshape(count, size, *x.shape[1:]) for x in xs]
            state, (kept, ys) = self._scan(step, state, given, count, back=back)
            return state, kept, [y.reshape(length, *y.shape[2:]) for y in ys]

        def at(n, start, state, kept):
            """One segment. It reads a part of `xs`, and writes a part of `ys`: no copy of either is made."""
            state, ys = state
            parts = [lax.dynamic_slice_in_dim(x, start, n) for x in xs]
            state, kept, parts = segment(n, state, kept, parts)
            ys = [lax.dynamic_update_slice_in_dim(y, part, start, 0) for y, part in zip(ys, parts, strict=True)]
            return (state, ys), kept

        starts = np.arange(count, dtype=np.int32) * size
        starts, last = (length - size - starts, 0) if reverse else (starts, count * size)
        state = state, [lax.broadcast(subjaxprs.zeros(a), (length,)) for a in avals]
        whole, left = kept or (None, None)
        if back:
            state, left = at(rest, last, state, left)
        step = lambda state, given: at(size, given[0], state, given[1])
        state, whole = lax.scan(step, state, (starts, whole), reverse=back)
        if not back:
            state, left = at(rest, last, state, left)
        (state, ys) = state
        return state, (whole, left), ys


SHORTEST = 4  # steps of a segment that is cut again
SINGLY = 40  # in a body of so many nodes, each is dropped on its own


def _segmentations(length: int) -> Iterator[tuple[int, ...]]:
    """Lengths of segments: none, those in steps of about 1.4, and segments in segments. Where one is near, a divisor."""
    sizes = sorted({_near(length, 2 ** (k / 2)) for k in range(2, int(2 * math.log2(length)))})
    yield ()
    yield from ((size,) for size in sizes)
    yield from ((size, _near(size, math.sqrt(size))) for size in sizes if size >= SHORTEST)


def _near(length: int, aim: float) -> int:
    """The divisor that is nearest to an aim, or the aim where none is near: then some steps are left over."""
    divisors = (d for d in range(2, length) if length % d == 0)
    nearest = min(divisors, key=lambda d: abs(math.log(d / aim)), default=length)
    return nearest if abs(math.log2(nearest / aim)) <= 1 / 2 else round(aim)


def _below(lengths: Sequence[int], length: int) -> tuple[int, ...]:
    return tuple(d for d in lengths if d < length)


def _is_float(aval: Any) -> bool:
    return jax.dtypes.issubdtype(aval.dtype, np.inexact)


def _chosen(values: Sequence[Any], flags: Sequence[bool]) -> list[Any]:
    return [x for x, flag in zip(values, flags, strict=True) if flag]
