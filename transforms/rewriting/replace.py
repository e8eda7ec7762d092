"""`replace`: rewrite a graph by example. Pattern and replacement are ordinary functions of the same parameters.

Three steps, each a section of this page:

- **Forms.** The jaxpr of a pattern depends on the types of its arguments. It is traced for types of the graph's values that lead
  to operations of the graph; each of these jaxprs is a form of the pattern.
- **Plans.** Each form is matched against each equation of a level: a graph or a sub-jaxpr, with small jits inlined. The plan of
  a level holds the matches to replace and the nodes that are dead then.
- **The new graph** is the old one, evaluated by its plans while JAX traces it.

Source: patterns as traced functions are an idea of torch.fx (`replace_pattern`); see `matching` for the algorithm.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.tree_util import tree_flatten

from ..core import _jax, manual_axes, subjaxprs
from ..core.errors import ArgumentError, GraphError, location
from ..core.graph import Graph
from ..core.pass_trace import Bound, bind, driven, functions_of
from ..core.passes import Pass, run
from ..core.signatures import name_of
from .matching import Keys, Level, Node, Value, View, is_folded, type_of
from .plans import Form, Match, Plan, Planner, where


@dataclass(frozen=True, eq=False, repr=False)
class Replaced(Graph):
    """The graph that `replace` returns, and the matches that it replaced.

    Attributes:
      count: the number of matches; in a sub-jaxpr as often as `walk` visits it.
      at: the user's lines of the matches, with scopes, in program order; each line once.
    """

    count: int = 0
    at: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, {self.count} replaced)"


def replace(graph: Graph, pattern: Callable, replacement: Callable) -> Replaced:
    """Replace each occurrence of a pattern, at any depth of sub-jaxprs.

    A match computes what the pattern computes, of any values in the place of its parameters, with the operands of commutative
    operations in either order, with or without common subexpressions, and with any use of `jax.jit`. The replacement computes
    its outputs instead; values of a match that are used elsewhere stay. In program order each output is replaced once;
    matches inside a sub-jaxpr go first. The equations of a replacement are not searched again.

    Args:
      graph: the graph.
      pattern: pure function of arrays; each parameter without a default is a free variable. It is traced many times, with
        types found in the graph; where it raises an exception, these types do not match (`assert x.ndim == 2`). A value that
        it computes and does not use has to be in the graph too.
      replacement: function of as many arrays that returns what the pattern returns, of the same shapes and dtypes.
    Returns:
      The graph of the same inputs and outputs, with the number of matches as `count`; the same program where there are none.
    Raises:
      ArgumentError: `graph` is not a Graph, or the two functions do not take the same parameters. Also a TypeError.
      GraphError: the pattern computes nothing, has effects or leaves a parameter unused; or the replacement returns other
        types than a match has. Also a ValueError.

    >>> import jax, jax.numpy as jnp
    >>> from funcgrad.transforms import trace
    >>> naive = lambda x: jnp.log(jax.nn.softmax(x))
    >>> graph = trace(naive, jnp.array([0.0, 200.0]))
    >>> stable = replace(graph, naive, jax.nn.log_softmax)
    >>> print(stable.count, graph(jnp.array([0.0, 200.0])), stable(jnp.array([0.0, 200.0])))
    1 [-inf   0.] [-200.    0.]
    """
    names = _parameters(graph, pattern, replacement)
    keys = Keys()
    planner = Planner(keys, _forms(graph, pattern, names, keys))
    plan = planner.plan(graph.jaxpr, [None] * len(graph.in_avals))
    fields = {f.name: getattr(graph, f.name) for f in dataclasses.fields(Graph)}
    if plan.count:
        p = _Replacement(replacement, names, plan, plan.view.level, {})
        flat = lambda *values: run(p, graph.jaxpr, values)
        fields["jaxpr"] = _jax.stage_flat(flat, graph.in_avals, _jax.without_results(graph.jaxpr.jaxpr))
    at = tuple(f"{line} in {scopes}" if scopes else line for line, scopes in plan.at)
    return Replaced(**fields, count=plan.count, at=at)


def _parameters(graph: Any, pattern: Any, replacement: Any) -> list[str]:
    """The names of the free variables; raises for wrong arguments of `replace`."""
    if not isinstance(graph, Graph):
        hint = "fg.trace(f, *args) makes one"
        raise ArgumentError(f"replace takes a Graph, and got {type(graph).__name__}.", hint=hint)
    for role, f in (("pattern", pattern), ("replacement", replacement)):
        if not callable(f):
            raise ArgumentError(f"replace takes the {role} as a function, and got {type(f).__name__}.")
    free = [p for p in inspect.signature(pattern).parameters.values() if p.default is p.empty]
    for p in free:
        if p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD):
            what = f"the pattern {name_of(pattern)} takes {p}, and free variables are positional parameters."
            raise ArgumentError(what, at=location(pattern), hint="name each: lambda x, y: ...")
    names, signature = [p.name for p in free], inspect.signature(replacement)
    try:
        bound_names = list(signature.bind(*names).arguments)
    except TypeError:
        bound_names = []
    is_reordered = bound_names != names and set(bound_names) == set(names)
    if is_reordered or (names and not bound_names):
        raise ArgumentError(
            f"the pattern {name_of(pattern)} takes ({', '.join(names)}), "
            f"and the replacement {name_of(replacement)} takes {signature}.",
            at=location(replacement),
            hint="give both the same positional parameters, in the same order",
        )
    return names


# ------------------------------------------------------------------------------------------------ forms


class _TypeNeeded(BaseException):
    """The pattern reads the type of a parameter, which has none yet. A BaseException, so that no pattern catches it."""


class _NotInGraph(BaseException):
    """The pattern binds an operation that the graph does not have."""


class _Untyped(jax.core.Tracer):
    """Parameter `k` before it has a type."""

    __slots__ = ("k",)

    def __init__(self, k: int):
        self.k = k

    @property
    def aval(self):
        raise _TypeNeeded(self.k)


class _Checked(Pass):
    """The pass that a pattern runs under: `check` sees each operation before it is bound."""

    def __init__(self, check: Callable):
        self.check = check

    def axes(self, eqn: Any, values: Sequence[Any]) -> frozenset[str]:
        """None: patterns are traced outside of any shard_map."""
        return frozenset()

    def enters(self, eqn: Any, values: Sequence[Any]) -> bool:
        """Sub-jaxprs are compared whole."""
        return False

    def equation(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        """The outputs, once the operation is checked."""
        if not functions_of(eqn):
            self.check(eqn.primitive, eqn.params, tuple(map(jax.typeof, values)))
        return bind(eqn, values)


def _forms(graph: Graph, pattern: Callable, names: list[str], keys: Keys) -> list[Form]:
    """The pattern for all choices of types that lead to operations of the graph.

    Depth-first search: a parameter has no type until the pattern reads it, so most choices fail early.
    """
    types, check = _vocabulary(graph, pattern, keys)
    form = functools.partial(_form, graph, pattern, names, keys)
    forms, mistake = [], None
    choices: list[dict[int, Any]] = [{}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX's warnings about types that the user did not choose
        while choices:  # invariant: all forms are in `forms`, or extend one of the `choices`
            choice = choices.pop()
            try:
                forms.append(form(choice, check))
            except _TypeNeeded as e:
                choices += [{**choice, e.args[0]: t} for t in reversed(types)]
            except GraphError:  # may be a fault of these types alone: a reshape, say, may be an identity for them
                doubled = {k: t.update(shape=tuple(2 * d + 1 for d in t.shape) or (3,)) for k, t in choice.items()}
                try:
                    form(doubled, lambda *_: None)
                except GraphError:
                    raise
                except (Exception, _TypeNeeded):
                    pass
            except (
                NameError,
                ImportError,
                AttributeError,
            ) as e:  # a mistake in the pattern, unless it is about a value
                is_about_value = isinstance(getattr(e, "obj", None), jax.core.Tracer)
                mistake = mistake or (None if is_about_value else e)
            except (Exception, _NotInGraph):  # the pattern is not defined for these types, or matches nothing
                pass
    if mistake is not None and not forms:
        raise mistake
    return forms


def _vocabulary(graph: Graph, pattern: Callable, keys: Keys) -> tuple[list[Any], Callable]:
    """The types of the graph's operands, and a check that it has an operation on operands of some types."""
    types: dict[tuple, None] = {}
    operations: set[int] = set()
    visited: set[int] = set()

    def operation(eqn, avals):
        return keys.operation(eqn.primitive, {} if subjaxprs.bodies(eqn) else eqn.params, avals)

    def visit(jaxpr):
        if id(jaxpr) in visited:
            return
        visited.add(id(jaxpr))
        for eqn in jaxpr.eqns:
            avals = [v.aval for v in eqn.invars]
            operations.add(operation(eqn, avals))
            types.update(dict.fromkeys(type_of(a) for a in avals if isinstance(a, jax.core.ShapedArray)))
            for body in subjaxprs.bodies(eqn):
                visit(body.jaxpr.jaxpr)

    def check(primitive, params, avals):
        eqn = Bound(primitive, params, None)
        if subjaxprs.is_plain(eqn):
            for e in params["jaxpr"].jaxpr.eqns:
                check(e.primitive, e.params, [v.aval for v in e.invars])
        elif not (avals and is_folded(primitive, params, avals[0])) and operation(eqn, avals) not in operations:
            if primitive.abstract_eval(*avals, **params)[1]:
                raise _has_effects(pattern)
            raise _NotInGraph

    visit(graph.jaxpr.jaxpr)
    return [jax.core.ShapedArray(shape, dtype, weak_type=weak) for shape, dtype, weak in types], check


def _form(graph: Graph, pattern: Callable, names: list[str], keys: Keys, choice: dict, check: Callable) -> Form:
    """The pattern for a choice of types, by the position of a parameter."""
    order, trees = sorted(choice), []

    def flat(*values):
        typed = dict(zip(order, values, strict=True))
        args = [typed.get(k, _Untyped(k)) for k in range(len(names))]
        with driven(_Checked(check)):
            leaves, tree = tree_flatten(pattern(*args))
        trees.append(tree)
        return leaves

    jaxpr = _jax.stage_flat(flat, [choice[k] for k in order], _jax.unnamed(graph.jaxpr.jaxpr))
    if jaxpr.jaxpr.effects:
        raise _has_effects(pattern)
    view = View(keys, jaxpr, [None] * len(order), lambda eqn, _: None if subjaxprs.is_plain(eqn) else [])
    outputs = view.level.outputs
    if not outputs or not all(v.node for v in outputs):
        hint = "return what operations on the parameters give, and nothing else"
        raise _wrong(pattern, "returns a value that it does not compute", hint)
    needed: set[Value] = set()
    stack = list(outputs)
    while stack:  # invariant: `needed` is closed under operands, but for the values on the stack
        value = stack.pop()
        if value not in needed:
            needed.add(value)
            stack += value.node.inputs if value.node else []
    inputs = [view.level.values[v] for v in jaxpr.jaxpr.invars]
    unused = [name for k, name in enumerate(names) if k not in choice or inputs[order.index(k)] not in needed]
    if unused:
        hint = "a match says what each parameter is: use it, or leave it out of both functions"
        raise _wrong(pattern, f"does not use {', '.join(unused)}", hint)
    return Form(view, inputs, len(needed), trees[-1], name_of(pattern))


def _has_effects(pattern: Callable) -> GraphError:
    return _wrong(pattern, "has effects", "match what is computed: no prints, callbacks or references")


def _wrong(pattern: Callable, what: str, hint: str) -> GraphError:
    return GraphError(f"the pattern {name_of(pattern)} {what}.", at=location(pattern), hint=hint)


# ------------------------------------------------------------------------------------------------ the new graph


class _Replacement(Pass):
    """Evaluates a level of a graph as its plan says.

    Attributes:
      items: the nodes and calls of the level, one per equation; `item` is that of the equation that is visited.
      arrays: by value, the arrays computed so far, also in opened calls.
    """

    def __init__(
        self, replacement: Callable, parameters: list[str], plan: Plan, level: Level, arrays: dict[Value, Any]
    ):
        self.replacement, self.parameters = replacement, parameters
        self.plan, self.view_level, self.arrays = plan, level, arrays
        self.items: Iterator[Node | Level] = iter(())
        self.item: Any = None
        self.memo = plan.staged

    def level(self, jaxpr: Any, values: Sequence[Any]) -> Any:
        """The jaxpr itself, once its inputs are stored."""
        self.items = iter(self.view_level.items)
        self._store([*jaxpr.constvars, *jaxpr.invars], values)
        return jaxpr

    def visit(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        """The outputs of an equation: of a match by the replacement; None for dead equations."""
        self.item = item = next(self.items)
        if isinstance(item, Level):
            outputs = super().visit(eqn, values)
        else:
            if match := self.plan.matches.get(item):
                self.arrays.update(zip(match.outputs, self._replaced(match, eqn), strict=True))
            outputs = [None] * len(item.outputs) if item in self.plan.gone else super().visit(eqn, values)
            outputs = [
                self.arrays[v] if self.plan.is_new(item, v) else x for v, x in zip(item.outputs, outputs, strict=True)
            ]
        self._store(eqn.outvars, outputs)
        return outputs

    def enters(self, eqn: Any, values: Sequence[Any]) -> bool:
        """Whether there are matches inside."""
        is_call = isinstance(self.item, Level)
        return self.item in self.plan.opened if is_call else any(plan.count for plan in self.item.plans)

    def inlines(self, eqn: Any, values: Sequence[Any]) -> bool:
        """Whether a match needs the call opened."""
        return isinstance(self.item, Level) or super().inlines(eqn, values)

    def body(self, eqn: Any, k: int) -> _Replacement | None:
        """The pass for a sub-jaxpr; derivative rules stay as they are."""
        item = self.item
        if isinstance(item, Level):
            return _Replacement(self.replacement, self.parameters, self.plan, item, self.arrays)
        plan = item.plans[k] if k < len(item.plans) else None
        return (
            _Replacement(self.replacement, self.parameters, plan, plan.view.level, {}) if plan and plan.count else None
        )

    def _store(self, variables: Sequence[Any], arrays: Sequence[Any]) -> None:
        for v, x in zip(variables, arrays, strict=True):
            if x is not None:
                self.arrays.setdefault(self.view_level.values[v], x)

    def _replaced(self, match: Match, eqn: Any) -> list[Any]:
        """What the replacement returns in the place of a match, of the types that the match has."""
        args = [self.arrays[v] if v in self.arrays else _jax.staged(v.const) for v in match.inputs]
        inputs = ", ".join(f"{n}: {v.aval.str_short()}" for n, v in zip(self.parameters, match.inputs, strict=True))
        try:
            outputs, tree = tree_flatten(self.replacement(*args))
        except Exception as e:
            e.add_note(f"fg.replace called {name_of(self.replacement)} for {where([eqn])} with {inputs}.")
            raise
        avals = [v.aval for v in match.outputs]
        if tree == match.form.tree:
            fitted = [_jax.fitted(x, aval) for x, aval in zip(outputs, avals, strict=True)]
            if all(x is not None for x in fitted):
                return [manual_axes.vary(x, manual_axes.axes_of(aval)) for x, aval in zip(fitted, avals, strict=True)]
        short = lambda x: jax.typeof(x).str_short() if hasattr(x, "dtype") else type(x).__name__
        raise GraphError(
            f"the replacement {name_of(self.replacement)} returned {', '.join(map(short, outputs)) or 'nothing'} "
            f"where the pattern {match.form.name} gives {', '.join(a.str_short() for a in avals)}.",
            at=where([eqn]),
            inputs=inputs,
            hint="return what the pattern returns: the same tree, shapes and dtypes",
        )
