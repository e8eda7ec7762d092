"""`Scan`: a scan with a derivative of its own, which saves parts of its steps and recomputes the rest.

The forward pass stacks what the policy for the body saves; the backward pass runs the backward part of the body over these
stacks. With segments, the forward pass keeps only the carry where each segment starts, and the backward pass runs each segment
again before it reverses it; segments may be nested.

Sources: Chen et al. 2016 (arXiv:1604.06174, section 4) for segments of √n steps; Griewank & Walther 2000, Algorithm 799: revolve
(doi:10.1145/347837.347846) for nested ones.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate, compress, pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.dtypes import float0

from ..core import _jax, subjaxprs
from ..core.pass_trace import bind
from ..core.passes import Pass, read
from ..cost.backends import Backend
from ..cost.operations import nbytes
from .device_model import DeviceModel
from .joint import COTANGENT, Joint
from .policy import Policy, Simulation
from .program import RECOMPUTED, Program
from .saved_set import everything

# The fewest steps of a segment that is cut into segments again. Simulated seconds of the scans of a GPT (12 layers) and an LSTM
# (200 and 997 steps) within 50 to 5 %: the same with 2; worst 1.04 with 8.
MIN_CUT_STEPS = 4
# In a body of at most so many nodes, each node is dropped on its own; in others, nodes of one kind together. It bounds the number
# of simulations, which grows with the square of the nodes. The same scans take the same seconds with 10 and with 1000.
MAX_SINGLE_NODES = 40


class ScanPolicy(NamedTuple):
    """A way to run a scan backward.

    Attributes:
      policy: for its body.
      lengths: of the segments, from the outermost to the innermost; () saves what the policy says of every step.
      bytes: of everything that is kept, and of what is alive while a step is reversed.
      seconds: of recomputation, and to write and read what is kept, by the device model.
    """

    policy: Policy
    lengths: tuple[int, ...]
    bytes: float
    seconds: float


class Scan:
    """A scan and the two parts of its body."""

    def __init__(self, eqn: Any, backend: Backend, device: DeviceModel):
        self.eqn, body = eqn, eqn.params["jaxpr"]
        self.length, self.unroll = eqn.params["length"], eqn.params["unroll"]
        self.sizes = subjaxprs.scan_sizes(eqn)
        self.avals = [v.aval for v in body.jaxpr.invars]
        self.out_avals = [v.aval for v in body.jaxpr.outvars]
        self.is_in, self.is_out = [_is_float(a) for a in self.avals], [_is_float(a) for a in self.out_avals]
        closed = _jax.stage_flat(self._vjp, [*compress(self.out_avals, self.is_out), *self.avals], _jax.no_names)
        self.joint = Joint(closed, backend, device, are_results_free=False)
        n_consts = len(self.joint.consts)
        self.consts = dict(zip(self.joint.inputs[:n_consts], self.joint.consts, strict=True))
        self.inputs = self.joint.inputs[n_consts:]  # the cotangents first

    def _vjp(self, *values):
        """The results of the body and the cotangents of its inputs, from the cotangents of its results and its inputs."""
        body, n = self.eqn.params["jaxpr"], sum(self.is_out)
        cotangents, inputs = values[:n], values[n:]

        def of_floats(*floats):
            remaining = iter(floats)
            return _jax.jaxpr_as_fun(body)(
                *(next(remaining) if is_float else x for x, is_float in zip(inputs, self.is_in, strict=True))
            )

        outs, pullback = jax.vjp(of_floats, *compress(inputs, self.is_in))
        marked = iter([checkpoint_name(ct, COTANGENT) for ct in cotangents])
        zero = lambda aval: np.zeros(aval.shape, float0)
        full = [next(marked) if ok else zero(a) for a, ok in zip(self.out_avals, self.is_out, strict=True)]
        return [*outs, *pullback(full)]

    # ------------------------------------------------------------------------------------------------ the policies

    @cached_property
    def policies(self) -> list[ScanPolicy]:
        """The Pareto front in bytes and seconds, those of allocation included; the cheapest first."""
        segmentations, allocation_s = list(_segmentations(self.length)), self.joint.device.allocation_s
        candidates = [self._scan_policy(p, lengths) for p in self._body_policies() for lengths in segmentations]
        front: list[ScanPolicy] = []
        for candidate in sorted(candidates, key=lambda p: (p.seconds + allocation_s(p.bytes), p.bytes)):
            if not front or candidate.bytes < front[-1].bytes:
                front.append(candidate)
        return front

    @property
    def default(self) -> ScanPolicy:
        """The policy without a budget."""
        return self._scan_policy(Policy(everything(self.joint), is_staged=False), ())

    @cached_property
    def _simulate(self) -> Simulation:
        return Simulation(self.joint, is_allocating=False)

    def _scan_policy(self, policy: Policy, lengths: tuple[int, ...]) -> ScanPolicy:
        joint, device, length = self.joint, self.joint.device, self.length
        outcome, sizes = self._simulate(policy, 0), self._simulate.sizes_with(policy.saved)
        const_bytes, carry_bytes, _ = (sum(map(nbytes, avals)) for avals in self._split(self.avals))
        saved_bytes = sum(int(sizes[k]) for k in policy.saved)
        # Each level keeps the carry where its segments start; the innermost level also what the policy saves of each step.
        kept = [math.ceil(a / b) * carry_bytes for a, b in pairwise((length, *lengths))]
        kept.append((lengths or (length,))[-1] * (saved_bytes + carry_bytes))
        counts = [1, *(length / n for n in lengths)]
        moved_s = sum(
            device.stack_transfers * n * device.transfer_s(size, size) for n, size in zip(counts, kept, strict=True)
        )
        forward_s = sum(node.seconds for node in joint.nodes if node.is_run)
        # Each segment is a loop: it copies the state of the outer loop, with the cotangents of the constants, in and out.
        state = const_bytes + carry_bytes
        moved_s += sum(counts[1:]) * (2 * device.transfer_s(state, state) + device.loop_s)
        recomputed_s = (len(lengths) * forward_s + outcome.seconds) * length
        return ScanPolicy(policy, lengths, sum(kept) + max(outcome.peak - saved_bytes, 0), recomputed_s + moved_s)

    def _body_policies(self) -> list[Policy]:
        """A greedy path from saving everything to saving nothing, by the fewest seconds per byte; and its neighbours.

        Invariant: `unpinned` has the groups of nodes that are still saved. A neighbour saves one group more or less.
        """
        joint, simulate = self.joint, self._simulate
        groups: dict[Any, list[int]] = defaultdict(list)
        for k in everything(joint):
            if not joint.nodes[k].is_pinned:
                groups[joint.nodes[k].kind if len(joint.nodes) > MAX_SINGLE_NODES else k].append(k)
        saved, unpinned = everything(joint), [frozenset(group) for group in groups.values()]
        path = [saved]
        while unpinned:
            outcome = simulate(Policy(saved), 0)

            def price(group, saved=saved, outcome=outcome):
                extra_s = simulate(Policy(saved - group), 0).seconds - outcome.seconds
                return extra_s / (sum(joint.nodes[k].bytes for k in group) + 1)

            cheapest = min(unpinned, key=price)
            unpinned.remove(cheapest)
            saved = saved - cheapest
            path.append(saved)
        neighbours = (saved ^ frozenset(group) for saved in path for group in groups.values())
        # In a tie, all at once comes first: it computes a little less.
        stagings = (False, True) if len(joint.stages) > 1 else (False,)
        return [Policy(s, is_staged=is_staged) for s in dict.fromkeys([*path, *neighbours]) for is_staged in stagings]

    # ------------------------------------------------------------------------------------------------ the program

    def run(self, scan_policy: ScanPolicy, values: Sequence[Any]) -> list[Any]:
        """The scan of its operands, with the derivative of a policy."""
        program = Program(self.joint, scan_policy.policy, self.joint.outvars[len(self.out_avals) :])

        @jax.custom_vjp
        def planned(*values):
            return _jax.bind(self.eqn.primitive, self.eqn.params, values)

        def forward(*values):
            consts, carry, xs = self._split(values)
            carry, ys, kept = self._forward(program, self.length, scan_policy.lengths, consts, carry, xs)
            return [*carry, *ys], (consts, xs, kept)

        def backward(residuals, cts):
            consts, xs, kept = residuals
            floats, n = [*compress(cts, self.is_out)], sum(self.is_out[: self.sizes[1]])
            sums = [jnp.zeros_like(c) for c in compress(consts, self.is_in)]
            cts = sums, floats[:n], floats[n:]
            sums, ct_carry, ct_xs = self._backward(program, self.length, scan_policy.lengths, consts, kept, xs, cts)
            grads = iter([*sums, *ct_carry, *ct_xs])
            return tuple(next(grads) if is_float else None for is_float in self.is_in)

        planned.defvjp(forward, backward)
        return list(planned(*values))

    def _split(self, values: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """The parts of what belongs to constants, carry and xs."""
        a, b, _ = accumulate(self.sizes)
        return list(values[:a]), list(values[a:b]), list(values[b:])

    def _forward(
        self, program: Program, length: int, lengths: tuple[int, ...], consts: Any, carry: Any, xs: Any
    ) -> Any:
        """The carry, the results, and the residuals: of every step, or the carry where each segment starts."""
        if lengths:

            def segment(count, carry, _, xs):
                after, ys, _ = self._forward(program, count, _below(lengths, count), consts, carry, xs)
                return after, carry, ys

            avals = self.out_avals[self.sizes[1] :]
            carry, kept, ys = self._by_segments(segment, length, lengths[0], carry, None, xs, avals, is_back=False)
            return carry, ys, kept
        inputs, outvars, n_carry = self.inputs[sum(self.is_out) :], self.joint.outvars, self.sizes[1]
        is_carry_read = [v in program.operands for v in self._split(inputs)[1]]

        def step(carry, x):
            env = self.consts | dict(zip(inputs, [*consts, *carry, *x], strict=True))
            program.forward(env)
            outs = [read(env, v) for v in outvars[: len(self.out_avals)]]
            residuals = [env[v] for v in program.saved], [*compress(carry, is_carry_read)]
            return outs[:n_carry], (outs[n_carry:], residuals)

        carry, (ys, kept) = self._scan(step, carry, xs, length, unroll=self.unroll)
        return carry, ys, kept

    def _backward(
        self, program: Program, length: int, lengths: tuple[int, ...], consts: Any, kept: Any, xs: Any, cts: Any
    ) -> Any:
        """The cotangents of constants, carry and xs, from the sums so far for the constants, and those of carry and results."""
        sums, ct_carry, ct_ys = cts
        if lengths:
            xs_avals, is_float = self._split(self.avals)[2], self._split(self.is_in)[2]

            def segment(count, state, carry, xs):
                (sums, ct_carry), xs, ct_ys = state, xs[: len(xs_avals)], xs[len(xs_avals) :]
                nested = _below(lengths, count)
                with jax.named_scope(RECOMPUTED):
                    kept = self._forward(program, count, nested, consts, carry, xs)[2]
                cts = sums, ct_carry, ct_ys
                sums, ct_carry, ct_xs = self._backward(program, count, nested, consts, kept, xs, cts)
                return (sums, ct_carry), None, ct_xs

            state, avals = (sums, ct_carry), [*compress(xs_avals, is_float)]
            state, _, ct_xs = self._by_segments(
                segment, length, lengths[0], state, kept, [*xs, *ct_ys], avals, is_back=True
            )
            return *state, ct_xs
        n, n_sums, n_carry = sum(self.is_out), len(sums), len(ct_carry)
        const_vars, carry_vars, xs_vars = self._split(self.inputs[n:])
        carry_vars = [v for v in carry_vars if v in program.operands]
        names = [*self.inputs[:n], *const_vars, *xs_vars, *carry_vars, *program.saved]

        def step(state, slices):
            (sums, ct_carry), (x, (saved, carry), ct_ys) = state, slices
            values = [*ct_carry, *ct_ys, *consts, *x, *carry, *saved]
            env = self.consts | dict(zip(names, values, strict=True))
            env |= program.backward(dict(env))
            grads = [read(env, v) for v in self.joint.outvars[len(self.out_avals) :]]
            sums = [s + g for s, g in zip(sums, grads[:n_sums], strict=True)]
            return (sums, grads[n_sums : n_sums + n_carry]), grads[n_sums + n_carry :]

        state, slices = (sums, ct_carry), (xs, kept, ct_ys)
        (sums, ct_carry), ct_xs = self._scan(step, state, slices, length, is_back=True, unroll=self.unroll)
        return sums, ct_carry, ct_xs

    def _scan(self, step: Any, state: Any, xs: Any, length: int, *, is_back: bool = False, unroll: int = 1) -> Any:
        reverse = self.eqn.params["reverse"] != is_back
        return lax.scan(step, state, xs, length=length, reverse=reverse, unroll=unroll)

    def _by_segments(
        self, segment: Callable, length: int, size: int, state: Any, kept: Any, xs: Any, avals: Any, is_back: bool
    ) -> tuple[Any, Any, list[Any]]:
        """Run `segment(count, state, kept, xs) -> state, kept, ys` over all steps.

        The result is the last state, `kept` of each segment, and all `ys`, whose steps have `avals`. A remainder of steps is a
        segment of its own, the last in time. Invariant: `state` and `ys` are those of the segments so far.
        """
        count, rest = divmod(length, size)
        reverse = self.eqn.params["reverse"]
        if not rest:

            def step(state, slices):
                state, kept, ys = segment(size, state, *slices)
                return state, (kept, ys)

            slices = kept, [x.reshape(count, size, *x.shape[1:]) for x in xs]
            state, (kept, ys) = self._scan(step, state, slices, count, is_back=is_back)
            return state, kept, [y.reshape(length, *y.shape[2:]) for y in ys]

        def at(n, start, state, kept):
            """One segment. It reads a slice of `xs` and writes a slice of `ys`, without a copy of either."""
            state, ys = state
            parts = [lax.dynamic_slice_in_dim(x, start, n) for x in xs]
            state, kept, parts = segment(n, state, kept, parts)
            ys = [lax.dynamic_update_slice_in_dim(y, part, start, 0) for y, part in zip(ys, parts, strict=True)]
            return (state, ys), kept

        starts = np.arange(count, dtype=np.int32) * size
        starts, last = (length - size - starts, 0) if reverse else (starts, count * size)
        state = state, [lax.broadcast(subjaxprs.zeros(a), (length,)) for a in avals]
        kept_whole, kept_rest = kept or (None, None)
        if is_back:
            state, kept_rest = at(rest, last, state, kept_rest)
        step = lambda state, slices: at(size, slices[0], state, slices[1])
        state, kept_whole = lax.scan(step, state, (starts, kept_whole), reverse=is_back)
        if not is_back:
            state, kept_rest = at(rest, last, state, kept_rest)
        (state, ys) = state
        return state, (kept_whole, kept_rest), ys


class PlannedScans(Pass):
    """Replaces scans, found by the identity of their equations, by scans with a derivative of their own."""

    def __init__(self, planned: dict[int, tuple[Scan, ScanPolicy]]):
        self.planned = planned

    def enters(self, eqn: Any, values: Sequence[Any]) -> bool:
        """Sub-jaxprs stay as they are."""
        return False

    def equation(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        """A planned scan; other equations as they are."""
        if id(eqn) not in self.planned:
            return bind(eqn, values)
        scan, policy = self.planned[id(eqn)]
        return scan.run(policy, values)


def _segmentations(length: int) -> Iterator[tuple[int, ...]]:
    """Lengths of segments: none, lengths in steps of √2, and two levels with √length inside; near a divisor, the divisor."""
    sizes = sorted({_near_divisor(length, 2 ** (k / 2)) for k in range(2, int(2 * math.log2(length)))})
    yield ()
    yield from ((size,) for size in sizes)
    yield from ((size, _near_divisor(size, math.sqrt(size))) for size in sizes if size >= MIN_CUT_STEPS)


def _near_divisor(length: int, target: float) -> int:
    """The nearest divisor within a factor of √2 of the target; else the target, which leaves a remainder of steps."""
    divisors = (d for d in range(2, length) if length % d == 0)
    nearest = min(divisors, key=lambda d: abs(math.log(d / target)), default=length)
    return nearest if abs(math.log2(nearest / target)) <= 1 / 2 else round(target)


def _below(lengths: Sequence[int], length: int) -> tuple[int, ...]:
    return tuple(d for d in lengths if d < length)


def _is_float(aval: Any) -> bool:
    return jax.dtypes.issubdtype(aval.dtype, np.inexact)
