"""Rules for whole scopes: the equations of a named scope, as one Graph, go to a rule.

The end of a scope is known only when the program is complete, so the function is traced at every call. In a traced program a
scope is each run of neighbouring equations in it; two entries of a scope with nothing in between are one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import tree_flatten, tree_structure, tree_unflatten

from ..core import _jax, subjaxprs
from ..core.errors import ArgumentError, OptionError, location
from ..core.graph import Graph
from ..core.pass_trace import bind
from ..core.passes import Pass, run
from ..core.rules import checked
from ..core.scope_paths import Path, entered, is_within, joined
from ..core.signatures import name_of, named_leaves


def scoped(f: Callable, rules: Mapping[str, Callable]) -> Callable:
    """`f`, with each scope that a pattern of `rules` names computed by its rule.

    Args:
      f: function or Graph. A function is traced with respect to its arrays, those of NumPy too; all other arguments stay
        as they are.
      rules: scope pattern -> `rule(region, *values)`, where `region` is a Graph of the scope's equations. Its `paths` say where
        the values come from: an argument's path, or the scope and primitive that made them. The rule returns what
        `region(*values)` does, of the same shapes and dtypes. The first pattern that matches counts. Functions with their own
        derivative rules and `shard_map` are not entered.
    Returns:
      A function as `f`.
    Raises:
      ArgumentError: a rule is not callable. Also a TypeError.
      OptionError: at a call, a pattern names no scope. Also a ValueError.
      GraphError: at a call, a rule returned values of other shapes, dtypes or number than its scope has.

    >>> from jax import lax
    >>> def f(w, x):
    ...     with jax.named_scope("encoder"):
    ...         x = w * x
    ...     return w * x
    >>> frozen = lambda region, *values: lax.stop_gradient(region(*values))
    >>> print(jax.grad(f)(3.0, 2.0), jax.grad(scoped(f, {"encoder": frozen}))(3.0, 2.0))
    12.0 6.0
    """
    for pattern, rule in rules.items():
        if not pattern.strip("/") or not callable(rule):
            raise ArgumentError(
                f"rules= takes rules as scope pattern -> function, and got {pattern!r:.40} -> {rule!r:.40}."
            )

    @functools.wraps(f, updated=())
    @_jax.api_boundary
    def with_rules(*args, **kwargs):
        jaxpr, values, names, result = _traced(f, args, kwargs)
        p = ScopeRules(rules, names)
        outputs = run(p, jaxpr, values)
        for pattern in rules:
            if pattern not in p.matched:
                raise _unmatched(f, pattern, p.matched, list(_scopes_of(jaxpr)))
        return result(outputs)

    return with_rules


def _traced(f: Callable, args: tuple, kwargs: dict) -> tuple[_jax.ClosedJaxpr, list, list[str], Callable]:
    """A call as a jaxpr, its inputs, their names, and how to make the result of the outputs."""
    if isinstance(f, Graph):
        return f.jaxpr, f.leaves(*args, **kwargs), list(f.paths), lambda outputs: tree_unflatten(f.out_tree, outputs)
    is_array = lambda x: isinstance(x, jax.Array | np.ndarray | np.generic)
    leaves, tree = tree_flatten((args, kwargs))
    paths, _ = named_leaves(args, kwargs, _jax.signature_of(f))
    arrays = [k for k, x in enumerate(leaves) if is_array(x)]
    results: list[Any] = []

    def flat(*values):
        by_place = dict(zip(arrays, values, strict=True))
        args, kwargs = tree_unflatten(tree, [by_place.get(k, x) for k, x in enumerate(leaves)])
        results[:], out_tree = tree_flatten(f(*args, **kwargs))
        outputs = [x for x in results if is_array(x)]
        results[:] = [_ARRAY if is_array(x) else x for x in results] + [out_tree]
        return outputs

    jaxpr = _jax.stage(f, args, kwargs, [leaves[k] for k in arrays], flat)
    *static_results, out_tree = results

    def result(outputs):
        outputs = iter(outputs)
        return tree_unflatten(out_tree, [next(outputs) if x is _ARRAY else x for x in static_results])

    return jaxpr, [leaves[k] for k in arrays], [paths[k] for k in arrays], result


_ARRAY = object()  # stands for an array among what a function returned


_REGION = _jax.Primitive("region")
_REGION.multiple_results = True


class Region(NamedTuple):
    """The equations of a scope, in the place of an equation."""

    invars: list[Any]
    outvars: list[Any]
    graph: Graph
    rule: Callable
    source_info: Any
    ctx: Any
    primitive: Any = _REGION
    params: Mapping[str, Any] = MappingProxyType({})


class Level(NamedTuple):
    """A jaxpr in which scopes stand as regions."""

    constvars: list[Any]
    invars: list[Any]
    outvars: list[Any]
    eqns: list[Any]


class ScopeRules(Pass):
    """One level of an evaluation with rules for scopes.

    Attributes:
      matched: the patterns that have a scope.
      inputs: what the inputs of this level are called. names: the same of each variable.
    """

    def __init__(self, rules: Mapping[str, Callable], inputs: Sequence[str], around: Path = (), matched: Any = None):
        self.rules, self.inputs, self.around = rules, inputs, around
        self.matched: set[str] = set() if matched is None else matched
        self.names: dict[Any, str] = {}

    def match(self, eqn: Any, around: Path) -> tuple[str, Path] | None:
        """The rule's pattern and the scope that an equation lies in, unless all of `around` lies in it."""
        path = joined(around, _jax.scopes(_jax.name_stack(eqn)))
        scopes = ((pattern, entered(pattern, path)) for pattern in self.rules)
        return next(((p, scope) for p, scope in scopes if scope and not is_within(around, scope)), None)

    def holds(self, eqn: Any, around: Path) -> bool:
        """Whether the sub-jaxprs of an equation have scopes with rules."""
        if eqn.primitive.name in subjaxprs.FUNCTIONAL:
            return False
        path = joined(around, _jax.scopes(_jax.name_stack(eqn)))
        eqns = (e for body in subjaxprs.bodies(eqn) for e in body.jaxpr.jaxpr.eqns)
        return any(self.match(e, path) or self.holds(e, path) for e in eqns)

    def name(self, atom: Any) -> str:
        """Where a value comes from: the path of an argument, or the scope and primitive that computed it."""
        return self.names.get(atom, "") if isinstance(atom, _jax.Var) else "const"

    def enters(self, eqn: Any, values: Sequence[Any]) -> bool:
        """Whether a scope inside has a rule."""
        return not isinstance(eqn, Region) and self.holds(eqn, self.around)

    def equation(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        """The outputs of a scope by its rule."""
        if not isinstance(eqn, Region):
            return bind(eqn, values)
        outputs = eqn.rule(eqn.graph, *values)
        outputs = [outputs] if len(eqn.outvars) == 1 else outputs
        return checked(f"the rule of the scope {eqn.graph.name!r}", eqn, eqn.graph.out_avals, outputs)

    def body(self, eqn: Any, k: int) -> ScopeRules:
        """The same rules, with the names of the operands."""
        names = subjaxprs.operands(eqn, list(map(self.name, eqn.invars)))[k]
        path = joined(self.around, _jax.scopes(_jax.name_stack(eqn)))
        return ScopeRules(self.rules, [name or "" for name in names], path, self.matched)

    def level(self, jaxpr: _jax.Jaxpr, values: Sequence[Any]) -> Level:
        """The jaxpr with scopes as regions."""
        self.names = dict.fromkeys(jaxpr.constvars, "const") | dict(zip(jaxpr.invars, self.inputs, strict=True))
        for eqn in jaxpr.eqns:
            path = joined(self.around, _jax.scopes(_jax.name_stack(eqn)))
            self.names.update(dict.fromkeys(eqn.outvars, "/".join((*path, eqn.primitive.name))))
        return Level(jaxpr.constvars, jaxpr.invars, jaxpr.outvars, list(self._with_regions(jaxpr)))

    def _with_regions(self, jaxpr: _jax.Jaxpr) -> Iterator[Any]:
        """The equations of a jaxpr, those of a scope as one region."""
        last = {v: k for k, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if isinstance(v, _jax.Var)}
        last.update((v, len(jaxpr.eqns)) for v in jaxpr.outvars if isinstance(v, _jax.Var))
        numbered = ((k, eqn, self.match(eqn, self.around)) for k, eqn in enumerate(jaxpr.eqns))
        for match, group in groupby(numbered, key=lambda x: x[2]):
            places, eqns, _ = zip(*group, strict=True)
            if match is None:
                yield from eqns
            else:
                pattern, scope = match
                self.matched.add(pattern)
                outvars = [v for eqn in eqns for v in eqn.outvars if last.get(v, -1) > places[-1]]
                yield _region(jaxpr, eqns, outvars, "/".join(scope), self.rules[pattern], self.name)


def _region(
    jaxpr: _jax.Jaxpr, eqns: Sequence[Any], outvars: list[Any], scope: str, rule: Callable, name: Callable
) -> Region:
    computed = {v for eqn in eqns for v in eqn.outvars}
    read = dict.fromkeys(v for eqn in eqns for v in eqn.invars if isinstance(v, _jax.Var))
    invars = [v for v in read if v not in computed]
    in_tree = tree_structure((tuple(invars), {}))
    out_tree = tree_structure(outvars[0] if len(outvars) == 1 else tuple(outvars))
    closed = _jax.part_of(jaxpr, invars, outvars, eqns)
    graph = Graph(closed, in_tree, out_tree, tuple(map(name, invars)), scope)
    return Region(invars, outvars, graph, rule, _jax.without_scopes(eqns[0].source_info), eqns[0].ctx)


def _unmatched(f: Any, pattern: str, matched: set[str], scopes: list[tuple[Path, bool]]) -> OptionError:
    """The error for a pattern that matches no scope."""
    lying = [(path, is_open) for path, is_open in scopes if entered(pattern, path)]
    other = next((p for p in matched for path, is_open in lying if is_open and entered(p, path)), None)
    if not lying:
        why = f"which {name_of(f)} does not have"
        hint = (
            "patterns look like 'block_*/attention'; a primitive is named as jax.lax.tanh_p, a scope by jax.named_scope"
        )
    elif other:
        why = f"which lies in what {other!r} names"
        hint = (
            "a scope has one rule, that of the first pattern that matches: put the inner scope first, or leave one out"
        )
    else:
        why = "which lies in a function with its own derivative rule or a shard_map, which is not entered"
        hint = "name a scope around that function"
    names = ", ".join(filter(None, dict.fromkeys("/".join(path) for path, _ in scopes)))
    return OptionError(
        f"rules= names the scope {pattern!r}, {why}.",
        at=location(f),
        inputs=f"its scopes are {names or 'none'}",
        hint=hint,
    )


def _scopes_of(jaxpr: _jax.ClosedJaxpr, around: Path = (), is_open: bool = True) -> Iterator[tuple[Path, bool]]:
    """The scopes at any depth, and whether rules go there."""
    for eqn in jaxpr.jaxpr.eqns:
        path = joined(around, _jax.scopes(_jax.name_stack(eqn)))
        yield path, is_open
        for body in subjaxprs.bodies(eqn):
            yield from _scopes_of(body.jaxpr, path, is_open and eqn.primitive.name not in subjaxprs.FUNCTIONAL)
