"""`live`: run a Python function as it is, with a table of rules watching what it binds.

The function runs under a `Trace` of ours. It holds no values of its own: a primitive that has a rule goes to the rule, one whose
sub-graphs hold work for a rule is bound again with these rewritten, everything else goes to the parent trace untouched. So all
of JAX's semantics stay: Python branches on concrete values, side effects on every call, closed-over state, arguments that
are not arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from . import _jax
from .rules import Rules


@dataclass(slots=True)
class Bound:
    """A primitive as it is bound: the equation that a rule sees in a running function."""

    primitive: _jax.Primitive
    params: dict[str, Any]
    source_info: Any = field(default_factory=_jax.current_source)


def live(f: Callable, rules: Rules) -> Callable:
    """`f`, with `rules` applied to each primitive as it is bound, at any depth of sub-graphs.

    Args:
      f: any function.
      rules: the table; an empty one gives `f` itself.
    Returns:
      A function as `f`. Values stay plain arrays or the tracers of JAX's own transforms around it.
    """
    if not rules:
        return f

    @functools.wraps(f)
    def alive(*args, **kwargs):
        with _jax.take_current_trace() as parent, _jax.set_current_trace(Living(parent, rules)):
            return f(*args, **kwargs)

    return alive


def apply(rules: Rules, eqn: Any, values: Sequence[Any]) -> list[Any]:
    """The outputs of one equation: by its rule, with its sub-graphs rewritten, or as it is."""
    rule = rules.table.get(eqn.primitive)
    if rule is None and touched(eqn, rules):
        if eqn.primitive.name in _jax.FUNCTIONAL:
            return live(functools.partial(_jax.bind, eqn.primitive, eqn.params), rules)(values)
        return _jax.rebind(eqn.primitive, eqn.params, values, [rewritten(b.jaxpr, rules) for b in _jax.bodies(eqn)])
    if rule is None and not _jax.bodies(eqn):
        rule = rules.default
    if rule is None:
        return _jax.bind(eqn.primitive, eqn.params, values)
    outputs = rule(eqn, *values)
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def touched(eqn: Any, rules: Rules) -> bool:
    """Whether a sub-graph of `eqn` holds work for a rule, at any depth."""
    return any(_holds(body.jaxpr.jaxpr, rules) for body in _jax.bodies(eqn))


def _holds(jaxpr: _jax.Jaxpr, rules: Rules) -> bool:
    def work(eqn):
        inner = _jax.bodies(eqn)
        return eqn.primitive in rules.table or (rules.default is not None and not inner) or touched(eqn, rules)

    memo = rules.memo.setdefault(jaxpr, {})
    if "holds" not in memo:
        memo["holds"] = any(map(work, jaxpr.eqns))
    return memo["holds"]


def rewritten(jaxpr: _jax.ClosedJaxpr, rules: Rules) -> _jax.ClosedJaxpr:
    """A sub-graph with the rules applied, of the same types.

    The result is kept per sub-graph, so that what JAX compiled for it is found again at the next call; unless a rule closes
    over values of a trace, which must not outlive it.
    """
    inner, context = jaxpr.jaxpr, _jax.trace_context()
    memo = rules.memo.setdefault(inner, {})
    new = memo.get(context)
    if new is None:
        inputs = [*inner.constvars, *inner.invars]
        new = _jax.stage_flat(
            lambda *values: _evaluate(inner, rules, values), [v.aval for v in inputs], _jax.names_of(inner)
        )
        if not any(isinstance(c, jax.core.Tracer) for c in new.consts):
            memo[context] = new
    return _jax.with_leading(new, jaxpr.consts)


def evaluate(jaxpr: _jax.ClosedJaxpr, rules: Rules, values: Sequence[Any]) -> list[Any]:
    """Evaluate a jaxpr equation by equation under the current trace, with `rules` applied."""
    return _evaluate(jaxpr.jaxpr, rules, [*jaxpr.consts, *values])


def _evaluate(jaxpr: _jax.Jaxpr, rules: Rules, values: Sequence[Any]) -> list[Any]:
    env: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], values, strict=True))
    last = _jax.last_used(jaxpr)

    def read(atom):
        return atom.val if isinstance(atom, _jax.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        with _jax.context_of(eqn):
            outputs = apply(rules, eqn, [read(v) for v in eqn.invars])
        env.update(zip(eqn.outvars, outputs, strict=True))
        for var in {v for v in eqn.invars if not isinstance(v, _jax.Literal) and last[v] is eqn}:
            del env[var]  # frees the memory of an eager run as it goes
    return [read(v) for v in jaxpr.outvars]


class Living(_jax.Trace):
    """The trace that a living function runs under: it hands on everything but what the rules claim."""

    __slots__ = ("parent", "rules")

    def __init__(self, parent: _jax.Trace, rules: Rules):
        super().__init__()
        self.parent = parent
        self.rules = rules
        self.requires_low = parent.requires_low

    def stage_value(self, value):
        """Values have no form of ours: the parent's is theirs."""
        return self.parent.stage_value(value)

    def process_primitive(self, primitive, values, params, /):
        """A primitive is being bound."""
        rules = self.rules
        if primitive not in rules.table and not rules.default and not touched(Bound(primitive, params, None), rules):
            return primitive.bind_with_trace(self.parent, values, tuple(map(jax.typeof, values)), params)
        with _jax.set_current_trace(self.parent):
            outputs = apply(rules, Bound(primitive, params), values)
        return outputs if primitive.multiple_results else outputs[0]

    def _alive(self, f):
        return _jax.transformed(f, lambda g: live(g, self.rules))

    # These leave the current trace as `bind` set it, as JAX's own traces do.

    def process_custom_jvp_call(self, primitive, fun, jvp, values, /, **options):
        """A function with its own JVP rule is being called; both run live."""
        return self.parent.process_custom_jvp_call(primitive, self._alive(fun), self._alive(jvp), values, **options)

    def process_custom_vjp_call(self, primitive, fun, fwd, bwd, values, /, **options):
        """A function with its own VJP rule is being called; all three run live."""
        functions = map(self._alive, (fun, fwd, bwd))
        return self.parent.process_custom_vjp_call(primitive, *functions, values, **options)

    def process_shard_map(self, primitive, fun, values, /, **options):
        """A function is being mapped over the shards of a mesh; it runs live."""
        return self.parent.process_shard_map(primitive, self._alive(fun), values, **options)

    def process_call(self, primitive, fun, values, params, /):
        """A call of the old style, JAX 0.10 only."""
        return self.parent.process_call(primitive, self._alive(fun), values, params)
