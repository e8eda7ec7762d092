"""`Program`: the forward and the backward part under a policy, with recomputation stage by stage.

Each stage that recomputes something begins with one `optimization_barrier` over the sources of the recomputation, the saved
values that it reads, and all live cotangents. So XLA can neither merge the recomputed values with those of the forward part
(common-subexpression elimination), nor start the stage before the previous one has ended. One barrier per recomputed value does
not hold: XLA's CPU compiler drops barriers before it schedules.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import jax
from jax import lax

from ..core import _jax
from ..core.passes import read, step
from .joint import Flattening, Joint, variables
from .policy import Policy

RECOMPUTED = "rematted_computation"  # JAX's own name for the scope of recomputed equations


class Program:
    """The two parts of a joint program, as functions of flat values, under the current trace.

    Args:
      joint, policy: the program, and what it saves and retains.
      late: outputs that the backward part returns, also where no cotangent reaches them.
    """

    def __init__(self, joint: Joint, policy: Policy, late: Sequence[Any] = ()):
        self.joint, self.policy = joint, policy
        self.forward_eqns, self.backward_eqns = joint.eqns[: joint.split], joint.eqns[joint.split :]
        self.eqn_of = {v: eqn for eqn in self.forward_eqns for v in eqn.outvars}
        saved = [v for v, k in joint.node_of.items() if k in policy.saved]
        self.retained = {v for v, k in joint.node_of.items() if policy.retained is None or k in policy.retained}
        self.late = {v for v in variables(late) if v in joint.sources}
        recomputed = self._ancestors(self._forward_operands(self.backward_eqns) | self.late, saved)
        self.operands = self._forward_operands([*self.backward_eqns, *recomputed]) | self.late
        self.saved = [
            v for v in saved if v in self.operands
        ]  # of a node with several results, only those that are read
        backward_outvars = {v for eqn in self.backward_eqns for v in eqn.outvars}
        self.results = [v for v in variables(joint.outvars) if v not in backward_outvars and v not in self.late]

    def whole(self, values: Sequence[Any]) -> list[Any]:
        """The outputs for all inputs."""
        env = dict(zip(self.joint.inputs, values, strict=True))
        self.forward(env)
        env |= self.backward({v: env[v] for v in (*self.joint.inputs, *self.saved)})
        return [read(env, v) for v in self.joint.outvars]

    def forward(self, env: dict[Any, Any]) -> None:
        """Add the results and the saved values to the inputs in `env`."""
        for eqn in self._forward():
            _bind(eqn, env)

    def _forward(self) -> list[Any]:
        with_effects = [eqn for eqn in self.forward_eqns if eqn.effects]
        return self._ancestors([*self.results, *self.saved], (), with_effects)

    def backward(self, forward_values: dict[Any, Any]) -> dict[Any, Any]:
        """The results of the backward part, from the inputs that it reads, cotangents among them, and the saved values."""
        cotangents: dict[Any, Any] = {}
        computed = {id(eqn) for eqn in self._forward()}
        last = {v: k for k, eqn in enumerate(self.backward_eqns) for v in variables(eqn.invars)}
        # Invariant: before each stage, `forward_values` has the inputs, and the values that are saved or retained so far.
        for stage in self.policy.stages(self.joint):
            eqns = self.backward_eqns[stage.start : stage.stop]
            targets = self._forward_operands(eqns)
            recomputed = self._ancestors(targets, forward_values)
            env = dict(forward_values)
            if recomputed:
                entering = (targets | self._forward_operands(recomputed)) & forward_values.keys()
                live = [v for v in cotangents if last.get(v, -1) >= stage.start]
                ordered = sorted(entering, key=self.joint.order.__getitem__)
                tied = [v for v in (*ordered, *live) if _is_tied(v.aval)]
                values = lax.optimization_barrier([cotangents[v] if v in cotangents else env[v] for v in tied])
                for v, x in zip(tied, values, strict=True):
                    (cotangents if v in cotangents else forward_values)[v] = x
                env = dict(forward_values)
                for eqn in recomputed:
                    with jax.named_scope(RECOMPUTED) if id(eqn) in computed else nullcontext():
                        _bind(eqn, env)
                computed.update(map(id, recomputed))
                forward_values.update((v, env[v]) for eqn in recomputed for v in eqn.outvars if v in self.retained)
            env |= cotangents
            for eqn in eqns:
                _bind(eqn, env)
                cotangents.update((v, env[v]) for v in eqn.outvars)
        for eqn in self._ancestors(self.late, forward_values):
            _bind(eqn, forward_values)
        return cotangents | {v: forward_values[v] for v in self.late}

    def _forward_operands(self, eqns: Sequence[Any]) -> set[Any]:
        """The operands of equations that are inputs or come from the forward part."""
        return {v for eqn in eqns for v in variables(eqn.invars) if v in self.joint.sources}

    def _ancestors(self, targets: Iterable[Any], available: Container[Any], also: Sequence[Any] = ()) -> list[Any]:
        """The equations that compute `targets` from available variables, and `also` with theirs, in program order."""
        needed, pending = {id(eqn) for eqn in also}, [*targets, *(v for eqn in also for v in variables(eqn.invars))]
        while pending:  # invariant: `needed` has the equation of every target and operand that is not pending
            v = pending.pop()
            eqn = self.eqn_of.get(v)
            if v not in available and eqn is not None and id(eqn) not in needed:
                needed.add(id(eqn))
                pending += variables(eqn.invars)
        return [eqn for eqn in self.forward_eqns if id(eqn) in needed]


def _bind(eqn: Any, env: dict[Any, Any]) -> None:
    env.update(zip(eqn.outvars, step(_UNMARKED, eqn, env), strict=True))


_UNMARKED = Flattening(are_marks_kept=False)


def _is_tied(aval: Any) -> bool:
    """Whether a barrier takes such a value. Keys, tokens and references pass by it."""
    return _jax.is_array(aval) and not jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended)
