"""Rules: what one pass does with one primitive.

A rule is a function `rule(eqn, *values) -> outputs`, or there is none and the equation stays as it is. The table is all that
tells one pass from another; `interpreter` drives it over traced graphs and `living` over running functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from ._jax import Jaxpr, Primitive
from .errors import ArgumentError, DuplicateRule


class Equation(Protocol):
    """What a rule sees of the equation: a `JaxprEqn` of a graph, or what is being bound in a running function."""

    primitive: Primitive
    params: dict[str, Any]
    source_info: Any


Rule = Callable[..., Any]


class Rules:
    """A table from primitives to rules, with a default for all others.

    Args:
      name: what the pass is called, for messages.
      table: primitive -> rule. A rule takes the equation and its input values and returns the output values (a single value
        for a primitive with one output), of the same shapes and dtypes. What it computes is bound below the pass: a rule does
        not see its own work. It is pure: for a sub-graph it may be asked once, and its answer kept.
      default: rule for every primitive that the table does not hold and that has no sub-graphs; None leaves them as they are.

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
        # What the drivers found out about sub-graphs; it goes when the table or the sub-graph goes.
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

    @classmethod
    def of(cls, rules: Rules | Mapping[Primitive, Rule], name: str) -> Rules:
        """A table of rules as it is, or made of a mapping."""
        if isinstance(rules, Rules):
            return rules
        if not isinstance(rules, Mapping):
            raise ArgumentError(f"{name} takes rules as a mapping or Rules, and got {type(rules).__name__}.")
        return cls(name, rules)

    def __repr__(self) -> str:
        names = ", ".join(sorted(p.name for p in self.table))
        return f"Rules({self.name}: {names}{' and a default' if self.default else ''})"
