"""`live`: run a Python function as it is, with a table of rules watching what it binds.

The function runs under a `Trace` of ours. It holds no values of its own: a primitive that has a rule goes to the rule, one whose
sub-graphs hold work for a rule is bound again with these rewritten, everything else goes to the parent trace untouched. So all
of JAX's semantics stay: Python branches on concrete values, side effects on every call, closed-over state, arguments that
are not arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import jax
import numpy as np

from . import _jax, manual_axes, subjaxprs
from .errors import GraphError
from .rules import Rule, Rules


class Bound(NamedTuple):
    """A primitive as it is bound: the equation that a rule sees in a running function."""

    primitive: Any
    params: dict[str, Any]
    source_info: Any


def live(f: Callable, rules: Rules | Mapping[_jax.Primitive, Rule]) -> Callable:
    """`f`, with `rules` applied to each primitive as it is bound, at any depth of sub-graphs.

    Args:
      f: any function. What a generator yields later runs without the rules, and so do the insides of what JAX has as one
        operation: Pallas kernels, combiners of reductions and scatters, linear_call, run_state, and since JAX 0.12 a
        custom_root that is traced.
      rules: the table, or a mapping from primitives to rules; an empty one gives `f` itself.
    Returns:
      A function as `f`. Values stay plain arrays or the tracers of JAX's own transforms around it.
    Raises:
      GraphError: at a call, a rule returned values of other shapes, dtypes or number than its equation has.

    >>> from jax import lax
    >>> live(lambda x: lax.sin(x) + 1, {lax.sin_p: lambda eqn, x: 10 * x})(2.0)
    Array(21., dtype=float32, weak_type=True)
    """
    rules = Rules.of(rules, "live")
    if not rules:
        return f

    return functools.wraps(f, updated=())(under(lambda parent: Living(parent, rules), f))


def under(watch: Callable[[_jax.Trace], Watch], f: Callable) -> Callable:
    """`f`, run under the trace that `watch` makes for the one that is current at a call."""

    def run_under(*args, **kwargs):
        with _jax.take_current_trace() as parent, _jax.set_current_trace(watch(parent)):
            return f(*args, **kwargs)

    return run_under


def _same(eqn: Any, *values: Any) -> Any:
    outputs = _jax.bind(eqn.primitive, eqn.params, values)
    return outputs if eqn.primitive.multiple_results else outputs[0]


def _varied(eqn: Any, value: Any) -> Any:
    return manual_axes.vary(value, frozenset(eqn.params["axes"]))


# For graphs on values of a shard_map that vary where those did not that they were traced for: every operation as it was.
FOREIGN = Rules("foreign", {_jax.pvary_p: _varied}, default=_same)


def apply(rules: Rules, eqn: Any, values: Sequence[Any]) -> list[Any]:
    """The outputs of one equation: by its rule, with its sub-graphs rewritten, or as it is."""
    axes = (
        manual_axes.varying(values)
        if rules is FOREIGN and eqn.primitive is not _jax.pvary_p
        else manual_axes.unforeseen(values)
    )
    if not axes:
        return _apply(rules, eqn, values, axes)
    with manual_axes.mesh_of(values):
        return _apply(rules, eqn, [manual_axes.vary(v, axes) for v in values], axes)


def _apply(rules: Rules, eqn: Any, values: Sequence[Any], axes: frozenset[str]) -> list[Any]:
    is_touched = touches(rules, eqn)
    rule = rules.table.get(eqn.primitive) or (rules.default if _is_one(eqn) and not is_touched else None)
    if rule is not None:
        outputs = rule(eqn, *values)
        outputs = outputs if eqn.primitive.multiple_results else [outputs]
        what = f"the rule of '{eqn.primitive}' in {rules.name}"
        return checked(what, eqn, _types_of(eqn, values), outputs)
    if not is_touched:
        return _jax.bind(eqn.primitive, eqn.params, values)
    if eqn.primitive.name in subjaxprs.FUNCTIONAL:
        return live(functools.partial(_jax.bind, eqn.primitive, eqn.params), rules)(values)
    if eqn.primitive.name in subjaxprs.INLINED:
        return evaluate(subjaxprs.bodies(eqn)[0].jaxpr, rules, values)
    is_inlined = subjaxprs.is_inlined(eqn)
    new = [_rewritten(body.jaxpr, rules, axes, is_inlined) for body in subjaxprs.bodies(eqn)]
    return subjaxprs.rebind(eqn.primitive, eqn.params, values, new)


def _types_of(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """The types of an equation's outputs, also of one that is just being bound to these values."""
    if isinstance(eqn, _jax.JaxprEqn):
        return [v.aval for v in eqn.outvars]
    out, _ = eqn.primitive.abstract_eval(*map(jax.typeof, values), **eqn.params)
    return list(out) if eqn.primitive.multiple_results else [out]


def checked(what: str, eqn: Any, avals: Sequence[Any], outputs: Any) -> list[Any]:
    """What a rule returned in the place of `eqn`, as arrays of the types that it has."""
    if isinstance(outputs, tuple | list) and len(outputs) == len(avals):
        fitted = [_jax.fitted(x, aval) for x, aval in zip(outputs, avals, strict=True)]
        if not any(x is None for x in fitted):
            return fitted
    types = [jax.typeof(x).str_short() if hasattr(x, "dtype") else type(x).__name__ for x in jax.tree.leaves(outputs)]
    raise GraphError(
        f"{what} returned {', '.join(types) or 'nothing'} for {', '.join(a.str_short() for a in avals)}.",
        at=_jax.line_of(eqn) or _jax.line_now(),  # what jnp's own functions hold has no line of the user's
        hint="return as many values as the equation has outputs, of their shapes and dtypes",
    )


def touches(rules: Rules, eqn: Any, by_table: bool = False) -> bool:
    """Whether `rules`, or the table among them, have work in the sub-graphs of `eqn`, at any depth.

    The derivative rules of a custom_jvp or custom_vjp function are not traced yet, so they may hold some.
    """
    by_table = by_table or eqn.primitive.name in subjaxprs.INLINED
    unknown = eqn.primitive.name in subjaxprs.WITH_DERIVATIVES and bool(rules.table if by_table else rules)
    return unknown or any(holds(rules, body.jaxpr.jaxpr, by_table) for body in subjaxprs.bodies(eqn))


def holds(rules: Rules, jaxpr: _jax.Jaxpr, by_table: bool = False) -> bool:
    """Whether `rules`, or the table among them, have work in a jaxpr, at any depth."""

    def is_work(eqn):
        return (
            eqn.primitive in rules.table
            or touches(rules, eqn, by_table)
            or (rules.default is not None and not by_table and _is_one(eqn))
        )

    memo = rules.memo.setdefault(jaxpr, {})
    if by_table not in memo:
        memo[by_table] = any(map(is_work, jaxpr.eqns))
    return memo[by_table]


def _is_one(eqn: Any) -> bool:
    """Whether an equation is one operation to a default rule."""
    return eqn.primitive.name in subjaxprs.INLINED or not subjaxprs.bodies(eqn)


def _rewritten(jaxpr: _jax.ClosedJaxpr, rules: Rules, axes: frozenset[str], is_inlined: bool) -> subjaxprs.Opened:
    """A sub-graph with the rules applied, its constants and those of the rules as leading inputs.

    Inside a `shard_map` all of its values differ along `axes`, whatever they did where it was traced.

    It is kept per sub-graph, so that what JAX compiled for it is found again at the next call; unless a rule closes over
    values of a trace, which must not outlive it.
    """
    inner, context = jaxpr.jaxpr, (axes, _jax.trace_context())
    memo = rules.memo.setdefault(inner, {})
    opened = memo.get(context)
    if opened is None:
        rewrite = functools.partial(apply, rules)
        again = lambda *values: [manual_axes.vary(x, axes) for x in run(inner, values, rewrite, is_inlined)]
        opened = retraced(inner, again, axes)
        if not any(isinstance(c, jax.core.Tracer) for c in opened.consts):
            memo[context] = opened
    return subjaxprs.Opened(opened.jaxpr, [manual_axes.vary(c, axes) for c in (*opened.consts, *jaxpr.consts)])


def retraced(inner: _jax.Jaxpr, f: Callable, axes: frozenset[str] = frozenset()) -> subjaxprs.Opened:
    """A sub-graph traced again as `f`, a function of its constants and inputs; what `f` closes over is a leading input."""
    avals = [manual_axes.vary(v.aval, axes) for v in (*inner.constvars, *inner.invars)]
    return subjaxprs.opened(_jax.stage_flat(f, avals, _jax.names_of(inner)))


def evaluate(jaxpr: _jax.ClosedJaxpr, rules: Rules, values: Sequence[Any]) -> list[Any]:
    """Evaluate a jaxpr equation by equation under the current trace, with `rules` applied."""
    return run(jaxpr.jaxpr, [*jaxpr.consts, *values], functools.partial(apply, rules))


def run(jaxpr: _jax.Jaxpr, values: Sequence[Any], apply: Callable, is_inlined: bool = False) -> list[Any]:
    """Evaluate a jaxpr, constants as leading values, with `apply(eqn, values) -> outputs` for each equation.

    Args:
      is_inlined: whether it is the body of what JAX inlines: its equations then have the source line of the call.
    """
    env: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], values, strict=True))
    last = _jax.last_used(jaxpr)

    def read(atom):
        return atom.val if isinstance(atom, _jax.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        bound = _jax.inlined(eqn) if is_inlined else eqn
        with _jax.context_of(bound), of_width(v.aval for v in (*eqn.invars, *eqn.outvars)):
            outputs = apply(bound, [read(v) for v in eqn.invars])
        env.update((v, x) for v, x in zip(eqn.outvars, outputs, strict=True) if v in last)
        for var in {v for v in eqn.invars if not isinstance(v, _jax.Literal) and last[v] is eqn}:
            del env[var]  # frees the memory of an eager run as it goes
    return [read(v) for v in jaxpr.outvars]


def of_width(avals: Iterable[Any]) -> AbstractContextManager:
    """A context with 64-bit types where values have them: a graph keeps those that `jax.enable_x64` gave when it was traced."""
    return jax.enable_x64(True) if any(getattr(a, "dtype", None) in _WIDE for a in avals) else nullcontext()


_WIDE = frozenset(map(np.dtype, ("int64", "uint64", "float64", "complex128")))


@functools.cache
def _look_through() -> None:
    _jax.look_through(Watch)


class Watch(_jax.Trace):
    """A trace without values of its own: it sees what is bound, and hands it on to its parent."""

    __slots__ = ("parent",)

    def __init__(self, parent: _jax.Trace):
        super().__init__()
        _look_through()
        self.parent = parent
        self.requires_low = parent.requires_low

    def stage_value(self, value):
        """Values have no form of ours: the parent's is theirs."""
        return self.parent.stage_value(value)

    def process_primitive(self, primitive, values, params, /):
        """A primitive is being bound."""
        with _jax.set_current_trace(self.parent):
            outputs = self.bind(primitive, params, values)
        return outputs if primitive.multiple_results else outputs[0]

    def bind(self, primitive: Any, params: dict[str, Any], values: Sequence[Any]) -> list[Any]:
        """The outputs of a primitive, while the parent is current."""
        raise NotImplementedError

    def call(self, process, primitive, functions, values, options):
        """What holds functions is being bound: itself, then derivative rules. `process(trace, functions, values)` binds it."""
        return process(self.parent, functions, values)

    # These leave the current trace as `bind` set it, as JAX's own traces do.

    def process_custom_jvp_call(self, primitive, fun, jvp, values, /, **options):
        """A function with its own JVP rule is being called."""
        process = lambda trace, functions, values: trace.process_custom_jvp_call(
            primitive, *functions, values, **options
        )
        return self.call(process, primitive, (fun, jvp), values, options)

    def process_custom_vjp_call(self, primitive, fun, fwd, bwd, values, /, **options):
        """A function with its own VJP rule is being called."""
        process = lambda trace, functions, values: trace.process_custom_vjp_call(
            primitive, *functions, values, **options
        )
        return self.call(process, primitive, (fun, fwd, bwd), values, options)

    def process_shard_map(self, primitive, fun, values, /, **options):
        """A function is being mapped over the shards of a mesh."""
        process = lambda trace, functions, values: trace.process_shard_map(primitive, *functions, values, **options)
        return self.call(process, primitive, (fun,), values, options)

    def process_call(self, primitive, fun, values, params, /):
        """A call of the old style, JAX 0.10 only."""
        process = lambda trace, functions, values: trace.process_call(primitive, *functions, values, params)
        return self.call(process, primitive, (fun,), values, params)


def refilled(outputs: Any, values: Sequence[Any]) -> Any:
    """`values` in the form that the outputs of a sub-function have: a list, or a flat tree of JAX's own."""
    return outputs.update(values) if hasattr(outputs, "update") else list(values)


class Living(Watch):
    """The trace that a living function runs under: it hands on everything but what the rules claim."""

    __slots__ = ("rules",)

    def __init__(self, parent: _jax.Trace, rules: Rules):
        super().__init__(parent)
        self.rules = rules

    def process_primitive(self, primitive, values, params, /):
        """A primitive is being bound."""
        rules = self.rules
        is_plain = primitive not in rules.table and not rules.default
        if is_plain and not (subjaxprs.has_bodies(primitive) and touches(rules, Bound(primitive, params, None))):
            return primitive.bind_with_trace(self.parent, values, tuple(map(jax.typeof, values)), params)
        return super().process_primitive(primitive, values, params)

    def bind(self, primitive, params, values):
        """By its rule, or with its sub-graphs rewritten."""
        return apply(self.rules, Bound(primitive, params, _jax.current_source()), values)

    def call(self, process, primitive, functions, values, options):
        """Functions and derivative rules run live."""
        return process(self.parent, [_jax.transformed(f, lambda g: live(g, self.rules)) for f in functions], values)
