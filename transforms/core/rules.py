"""`Rules`, the tabular `Pass`: a table from primitives to rules. `live` runs a function under a pass.

A rule is a function `rule(eqn, *values) -> outputs`; an equation without one stays as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import jax

from . import _jax, manual_axes, subjaxprs
from ._jax import Jaxpr, Primitive
from .errors import ArgumentError, DuplicateRule, GraphError
from .pass_trace import Bound, bind, driven, functions_of
from .passes import Pass


class Equation(Protocol):
    """An equation as a rule sees it: a `JaxprEqn` of a graph, or a primitive that a running function binds."""

    primitive: Primitive
    params: dict[str, Any]
    source_info: Any


Rule = Callable[..., Any]


class Rules(Pass):
    """A table from primitives to rules, with a default for all others.

    Args:
      name: the name of the pass, for messages.
      table: primitive -> rule. A rule takes the equation and its input values and returns the output values (a single value
        for a primitive with one output), of the same shapes and dtypes. It computes below the pass: a rule does not see its own
        work. It is pure: its result for a sub-jaxpr is kept.
      default: rule for every primitive that the table does not hold and that has no sub-jaxprs; None leaves them as they are.

    >>> import jax, jax.numpy as jnp
    >>> from jax import lax
    >>> softer = Rules("softer")
    >>> @softer(lax.abs_p)
    ... def _(eqn, x):
    ...     return jnp.sqrt(x * x + 1e-2)
    """

    def __init__(self, name: str, table: Mapping[Primitive, Rule] | None = None, default: Rule | None = None):
        self.name = name
        self.default = default
        self._table: dict[Primitive, Rule] = {}
        self.table = MappingProxyType(self._table)
        # Transformed sub-jaxprs, and which hold work; an entry lives as long as the table and the sub-jaxpr.
        self.memo: WeakKeyDictionary[Jaxpr, dict[Any, Any]] = WeakKeyDictionary()
        for primitive, rule in (table or {}).items():
            self(primitive)(rule)

    def __call__(self, *primitives: Primitive) -> Callable[[Rule], Rule]:
        """Decorator that enters a rule for these primitives; a second one for the same primitive raises `DuplicateRule`."""

        def enter(rule: Rule) -> Rule:
            for primitive in primitives:
                if not isinstance(primitive, Primitive) or not callable(rule):
                    raise ArgumentError(
                        f"{self.name} takes rules as primitive -> function, and got {primitive!r:.40} -> {rule!r:.40}.",
                        hint="primitives end in _p, as jax.lax.tanh_p; fg.walk(graph) shows those of a graph",
                    )
                if primitive in self.table:
                    raise DuplicateRule(
                        f"{self.name} already has a rule for primitive '{primitive.name}'.",
                        hint="change that rule, or make a table of your own with Rules(name, table)",
                    )
                self._table[primitive] = rule
                self.memo.clear()
            return rule

        return enter

    def __bool__(self) -> bool:
        return bool(self.table) or self.default is not None

    def __repr__(self) -> str:
        names = ", ".join(sorted(p.name for p in self.table))
        return f"Rules({self.name}: {names}{' and a default' if self.default else ''})"

    # As a pass

    def enters(self, eqn: Any, values: Sequence[Any]) -> bool:
        """Whether there is work for rules inside; derivative rules, which are not traced yet, may always hold some."""
        return bool(functions_of(eqn)) or (eqn.primitive not in self.table and self._touches(eqn))

    def equation(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        """By its rule, or as it is."""
        rule = self.table.get(eqn.primitive) or (self.default if _is_operation(eqn) else None)
        if rule is None:
            return bind(eqn, values)
        outputs = rule(eqn, *values)
        outputs = outputs if eqn.primitive.multiple_results else [outputs]
        return checked(f"the rule of '{eqn.primitive}' in {self.name}", eqn, _types_of(eqn, values), outputs)

    def body(self, eqn: Any, k: int) -> Rules:
        """The same table at every depth."""
        return self

    def within(self, around: Any) -> Rules:
        """The table itself: rules do not depend on scopes."""
        return self

    def ignores(self, primitive: Primitive, params: dict[str, Any]) -> bool:
        """Whether there is no rule for a primitive, nor work in its sub-jaxprs."""
        if primitive in self.table or self.default:
            return False
        return not (subjaxprs.has_bodies(primitive) and self._touches(Bound(primitive, params)))

    def has_work(self, jaxpr: Jaxpr) -> bool:
        """Whether there is work for rules in a jaxpr, at any depth."""
        return self._holds(jaxpr)

    def _touches(self, eqn: Any, by_table: bool = False) -> bool:
        """Whether the rules, or those of the table alone, have work in the sub-jaxprs of `eqn`."""
        by_table = by_table or eqn.primitive.name in subjaxprs.INLINED
        unknown = eqn.primitive.name in subjaxprs.WITH_DERIVATIVES and bool(self.table if by_table else self)
        return unknown or any(self._holds(body.jaxpr.jaxpr, by_table) for body in subjaxprs.bodies(eqn))

    def _holds(self, jaxpr: Jaxpr, by_table: bool = False) -> bool:
        def is_work(eqn):
            is_default = self.default is not None and not by_table and _is_operation(eqn)
            return eqn.primitive in self.table or self._touches(eqn, by_table) or is_default

        memo = self.memo.setdefault(jaxpr, {})
        if by_table not in memo:
            memo[by_table] = any(map(is_work, jaxpr.eqns))
        return memo[by_table]


def _is_operation(eqn: Any) -> bool:
    """Whether an equation is one operation to a default rule."""
    return eqn.primitive.name in subjaxprs.INLINED or not subjaxprs.bodies(eqn)


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
        at=_jax.line_of(eqn) or _jax.line_now(),  # an equation of jax.numpy's own functions has no line of the user's
        hint="return as many values as the equation has outputs, of their shapes and dtypes",
    )


class _Retyping(Rules):
    """Every operation as it is, on values that vary between the shards of a `shard_map`."""

    def axes(self, eqn: Any, values: Sequence[Any]) -> frozenset[str]:
        """All axes along which an operand varies."""
        return manual_axes.unforeseen(values) if eqn.primitive is _jax.pvary_p else manual_axes.varying(values)


def _as_is(eqn: Any, *values: Any) -> Any:
    outputs = bind(eqn, values)
    return outputs if eqn.primitive.multiple_results else outputs[0]


def _varied(eqn: Any, value: Any) -> Any:
    return manual_axes.vary(value, frozenset(eqn.params["axes"]))


# For a graph in a `shard_map` in which it was not traced.
RETYPING = _Retyping("retyping", {_jax.pvary_p: _varied}, default=_as_is)


def as_pass(p: Pass | Mapping[Primitive, Rule], name: str) -> Pass:
    """A pass as it is, or the table of a mapping from primitives to rules."""
    if isinstance(p, Pass):
        return p
    if not isinstance(p, Mapping):
        raise ArgumentError(f"{name} takes rules as a mapping, Rules or a Pass, and got {type(p).__name__}.")
    return Rules(name, p)


def live(f: Callable, rules: Pass | Mapping[Primitive, Rule]) -> Callable:
    """`f`, with a pass applied to each primitive that it binds, at any depth of sub-jaxprs.

    All of JAX's semantics stay: Python branches on concrete values, side effects on every call, closed-over state, arguments
    that are not arrays.

    Args:
      f: any function. The pass does not reach code that a generator runs later, nor the insides of JAX's single operations:
        Pallas kernels, combiners of reductions and scatters, linear_call, run_state, and since JAX 0.12 a traced custom_root.
      rules: a table of rules, a mapping from primitives to rules, or another `Pass`; an empty table gives `f` itself.
    Returns:
      A function as `f`. Values stay plain arrays or the tracers of JAX's own transforms around it.
    Raises:
      GraphError: at a call, a rule returned values of other shapes, dtypes or number than its equation has.

    >>> from jax import lax
    >>> live(lambda x: lax.sin(x) + 1, {lax.sin_p: lambda eqn, x: 10 * x})(2.0)
    Array(21., dtype=float32, weak_type=True)
    """
    p = as_pass(rules, "live")
    if isinstance(p, Rules) and not p:
        return f

    @functools.wraps(f, updated=())
    def running(*args, **kwargs):
        with driven(p.within(())):
            return f(*args, **kwargs)

    return running
