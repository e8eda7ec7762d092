"""The evaluation of a Graph under the current trace, equation by equation, in as little time as that trace allows.

- A trace that stages equations gets copies of them: their types are known, and no sub-jaxpr is traced again.
- JAX linearizes an equation by tracing its JVP, but a jitted function only once. So the equations of a Graph that is
  differentiated inside a trace are called as jitted functions of one operation, which JAX inlines.
- All other traces bind each equation, as `jax.core.eval_jaxpr` does.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from . import _jax, manual_axes, subjaxprs
from .pass_trace import PassTrace, bind
from .passes import Pass, run
from .rules import RETYPING, Rules


def evaluated(jaxpr: _jax.ClosedJaxpr, values: Sequence[Any]) -> list[Any]:
    """The outputs of a graph's jaxpr for values of its types."""
    open_jaxpr = jaxpr.jaxpr
    if manual_axes.varying(values):  # inside a shard_map in which the graph was not traced
        return run(RETYPING, jaxpr, values)
    is_as_traced = all(map(_has_type, values, open_jaxpr.invars)) and jax.sharding.get_abstract_mesh().empty
    if is_as_traced and not open_jaxpr.is_high:
        trace, tables = _jax.current_trace(), []
        if isinstance(trace, _jax.StagingTrace):
            return _copied(trace, jaxpr, values)
        while isinstance(trace, PassTrace) and isinstance(trace.p, Rules):
            tables.append(trace.p)
            trace = trace.parent
        if isinstance(trace, _jax.LinearizeTrace) and _is_staged(trace):
            return run(_LinearizedOnce(tables), jaxpr, values)
    return _jax.jaxpr_as_fun(jaxpr)(*values)


def _has_type(value: Any, var: Any) -> bool:
    return isinstance(value, jax.Array) and jax.typeof(value) == var.aval


def _is_staged(trace: Any) -> bool:
    """Whether a trace below this one stages equations."""
    while not isinstance(trace, _jax.StagingTrace):
        trace = getattr(trace, "parent_trace", getattr(trace, "parent", None))
        if trace is None:
            return False
    return True


def _copied(trace: Any, jaxpr: _jax.ClosedJaxpr, values: Sequence[Any]) -> list[Any]:
    """Stage copies of all equations, as JAX does with calls that it inlines; each keeps its source line.

    Equations with effects are bound, since JAX attaches effects to values; and those of another configuration than the call's.
    """
    open_jaxpr, source_info, context = jaxpr.jaxpr, _jax.current_source(), _jax.current_context()
    env = {
        v: trace.to_jaxpr_tracer(x, source_info)
        for v, x in zip((*open_jaxpr.constvars, *open_jaxpr.invars), (*jaxpr.consts, *values), strict=True)
    }
    read = lambda v: _jax.StagedValue(trace, v.aval, v, source_info) if isinstance(v, _jax.Literal) else env[v]
    for eqn in open_jaxpr.eqns:
        operands, avals = list(map(read, eqn.invars)), [v.aval for v in eqn.outvars]
        if eqn.effects or eqn.ctx is not context:
            with _jax.context_of(eqn):
                outputs = _jax.bind(eqn.primitive, eqn.params, operands)
        elif (constants := _jax.constants_of(eqn.primitive, operands, eqn.params, avals)) is not None:
            outputs = [trace.new_const(x, source_info, aval=aval) for x, aval in zip(constants, avals, strict=True)]
        else:
            eqn_source = eqn.source_info.replace(name_stack=source_info.name_stack + eqn.source_info.name_stack)
            outputs = trace.emit_eqn(operands, avals, eqn.primitive, eqn.params, eqn.effects, eqn_source, eqn.ctx)
        env.update(zip(eqn.outvars, outputs, strict=True))
    return list(map(read, open_jaxpr.outvars))


class _LinearizedOnce(Pass):
    """Binds an equation as a jitted function, if JAX would otherwise trace its JVP again and no rule claims it."""

    def __init__(self, tables: Sequence[Rules]):
        self.tables = tables

    def enters(self, eqn: Any, values: Sequence[Any]) -> bool:
        """Sub-jaxprs stay as they are."""
        return False

    def axes(self, eqn: Any, values: Sequence[Any]) -> frozenset[str]:
        """No operand varies: `evaluated` has looked."""
        return frozenset()

    def equation(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        """The outputs of one operation."""
        primitive, params = eqn.primitive, tuple(eqn.params.items())
        is_operation = primitive in _operations() and not any(hasattr(x, "eqns") for _, x in params)
        if is_operation and all(rules.ignores(primitive, eqn.params) for rules in self.tables):
            avals = tuple(v.aval for v in eqn.invars)
            try:
                operation = _operation(primitive, params, avals, _jax.current_context())
            except TypeError:  # parameters without a hash
                pass
            else:
                return _jax.bind_inlined(operation, primitive.name, values)
        return bind(eqn, values)


@functools.cache
def _operations() -> frozenset[_jax.Primitive]:
    """JAX's own operations: equal parameters mean equal operations, and hold nothing of the user's."""
    every = (getattr(lax, name) for name in dir(lax) if name.endswith("_p"))
    return frozenset(p for p in every if _jax.is_linearized_by_jvp(p) and not subjaxprs.has_bodies(p))


@functools.lru_cache(maxsize=1024)
def _operation(primitive: _jax.Primitive, params: tuple, avals: tuple, context: Any) -> _jax.ClosedJaxpr:
    """One operation as a jaxpr, traced in this context; JAX caches its derivatives for the jaxpr's lifetime."""
    return _jax.stage_flat(lambda *values: _jax.bind(primitive, dict(params), values), avals, _jax.no_names)
