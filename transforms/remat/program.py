"""The program of a choice: the forward part, and stage by stage what is computed again and what reads it.

Each stage that computes something again begins with one `optimization_barrier` over what it starts from, what is kept for it,
and all cotangents that are alive. So XLA can neither take the values of the forward part for those of the stage, nor
begin with the stage before the one before it has ended.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import jax
from jax import lax

from ..core import _jax
from .joint import SEAM, Joint, mark_of, variables
from .simulation import Choice

AGAIN = "rematted_computation"  # JAX's own name for the scope of what is computed again


class Emission:
    """The two parts of a joint program, as functions of flat values, under the current trace.

    Args:
      joint, choice: the program, and what is kept.
      late: outputs that the backward part returns, also where no cotangent reaches them.
    """

    def __init__(self, joint: Joint, choice: Choice, late: Sequence[Any] = ()):
        self.joint, self.choice = joint, choice
        self.maker = {v: eqn for eqn in joint.eqns[: joint.split] for v in eqn.outvars}
        self.made = {v for eqn in joint.eqns[joint.split :] for v in eqn.outvars}
        saved = [v for v, k in joint.node_of.items() if k in choice.saved]
        self.held = {v for v, k in joint.node_of.items() if choice.held is None or k in choice.held}
        self.late = {v for v in variables(late) if v in joint.sources}
        reads = self._ordered(self._read_by(joint.eqns[joint.split :]) | self.late, saved)
        self.read = self._read_by([*joint.eqns[joint.split :], *reads]) | self.late
        self.saved = [v for v in saved if v in self.read]  # of nodes with several results only those that are read
        self.results = [v for v in variables(joint.outvars) if v not in self.made and v not in self.late]

    def whole(self, values: Sequence[Any]) -> list[Any]:
        """The outputs for all inputs."""
        env = dict(zip(self.joint.inputs, values, strict=True))
        self.forward(env)
        env |= self.backward({v: env[v] for v in (*self.joint.inputs, *self.saved)})
        return [read(env, v) for v in self.joint.outvars]

    def forward(self, env: dict[Any, Any]) -> None:
        """Add to the inputs in `env` the results, and what is saved."""
        for eqn in self._forward():
            _bind(eqn, env)

    def _forward(self) -> list[Any]:
        with_effects = [eqn for eqn in self.joint.eqns[: self.joint.split] if eqn.effects]
        return self._ordered([*self.results, *self.saved], {*self.joint.inputs}, with_effects)

    def backward(self, known: dict[Any, Any]) -> dict[Any, Any]:
        """What the backward part makes of the inputs that it reads, cotangents among them, and what is saved."""
        made: dict[Any, Any] = {}
        done = {id(eqn) for eqn in self._forward()}
        last = {v: k for k, eqn in enumerate(self.joint.eqns[self.joint.split :]) for v in variables(eqn.invars)}
        for stage in self.choice.stages(self.joint):
            eqns = self.joint.eqns[self.joint.split + stage.start : self.joint.split + stage.stop]
            wanted = self._read_by(eqns)
            again = self._ordered(wanted, known)
            env = dict(known)
            if again:
                entering = (wanted | self._read_by(again)) & known.keys()
                live = [v for v in made if last.get(v, -1) >= stage.start]
                tied = [v for v in (*sorted(entering, key=self.joint.order.__getitem__), *live) if _is_tied(v.aval)]
                values = lax.optimization_barrier([made[v] if v in made else known[v] for v in tied])
                for v, x in zip(tied, values, strict=True):
                    (made if v in made else known)[v] = x
                env = dict(known)
                for eqn in again:
                    with jax.named_scope(AGAIN) if id(eqn) in done else nullcontext():
                        _bind(eqn, env)
                done.update(map(id, again))
                known.update((v, env[v]) for eqn in again for v in eqn.outvars if v in self.held)
            env |= made
            for eqn in eqns:
                _bind(eqn, env)
                made.update((v, env[v]) for v in eqn.outvars)
        env = dict(known)
        for eqn in self._ordered(self.late, known):
            _bind(eqn, env)
        return made | {v: env[v] for v in self.late}

    def _read_by(self, eqns: Sequence[Any]) -> set[Any]:
        """What equations read of the forward part."""
        return {v for eqn in eqns for v in variables(eqn.invars) if v in self.joint.sources}

    def _ordered(self, wanted: Iterable[Any], known: Container[Any], also: Sequence[Any] = ()) -> list[Any]:
        """The equations of the forward part that compute `wanted` from what is known, in program order."""
        found, todo = {id(eqn) for eqn in also}, [*wanted, *(v for eqn in also for v in variables(eqn.invars))]
        while todo:
            v = todo.pop()
            eqn = self.maker.get(v)
            if v in known or eqn is None or id(eqn) in found:
                continue
            found.add(id(eqn))
            todo += variables(eqn.invars)
        return [eqn for eqn in self.joint.eqns[: self.joint.split] if id(eqn) in found]


def read(env: dict[Any, Any], atom: Any) -> Any:
    """The value of a variable or literal."""
    return env[atom] if isinstance(atom, _jax.Var) else atom.val


def _bind(eqn: Any, env: dict[Any, Any]) -> None:
    values = [read(env, v) for v in eqn.invars]
    if mark_of(eqn) == SEAM:
        outputs = values
    else:
        with _jax.context_of(eqn):
            outputs = _jax.bind(eqn.primitive, eqn.params, values)
    env.update(zip(eqn.outvars, outputs, strict=True))


def _is_tied(aval: Any) -> bool:
    """Whether a barrier takes such a value; keys, tokens and references go around it."""
    return _jax.is_array(aval) and not jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended)
