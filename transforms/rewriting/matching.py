"""Where one graph stands in another: `View`, a graph as nodes and values, and `matches`, the ways a small one fits a large one.

A view looks through what says nothing of values: plain jits stand as their bodies, names and source lines do not count, what is
computed twice is one value. Matching is syntactic otherwise, from the outputs backwards, modulo commutativity.

Source: Baader & Nipkow 1998, Term Rewriting and All That, doi:10.1017/CBO9781139172752, chapters 4 (matching) and 10.3
(commutative operations).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from ..core import _jax, subjaxprs

LARGE = 1000  # equations: a jit of more is searched on its own, and not looked through
COMMUTATIVE = frozenset({"add", "mul", "max", "min", "and", "or", "xor", "eq", "ne"})
# Parameters that say nothing of what an equation computes; nor does `name` where it is that of a body, except a composite's.
UNSAID = frozenset({"jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd", "out_trees", "num_consts", "weak_type"})


def type_of(aval: Any) -> tuple:
    """Shape, dtype and weak type: what a pattern is traced for."""
    return aval.shape, aval.dtype, aval.weak_type


class Keys:
    """Small numbers for what is equal: constants, parameters, bodies up to names, and so operations."""

    def __init__(self) -> None:
        self.numbers: dict[Any, int] = {}
        self.kept: dict[int, tuple[int, Any]] = {}  # by identity, of objects that it keeps alive

    def __call__(self, *key: Any) -> int:
        """The number of a key."""
        return self.numbers.setdefault(key, len(self.numbers))

    def operation(self, primitive: Any, params: Mapping[str, Any], avals: Sequence[Any]) -> int:
        """A primitive with its parameters and the shapes and dtypes of its operands."""
        is_named = primitive.name == "composite" or not any(map(_is_jaxpr, params.values()))
        unsaid = UNSAID if is_named else {*UNSAID, "name"}
        said = ((k, self.parameter(v)) for k, v in sorted(params.items()) if k not in unsaid)
        types = [self(a.shape, a.dtype) if hasattr(a, "dtype") else self(a) for a in avals]
        types = sorted(types) if name_of(primitive) in COMMUTATIVE else types
        return self("operation", name_of(primitive), *said, *types)

    def parameter(self, value: Any) -> Any:
        """A parameter of an equation."""
        if _is_jaxpr(value):
            return self.body(value)
        if isinstance(value, tuple | list):
            return tuple(map(self.parameter, value))
        if isinstance(value, float | complex | np.inexact):  # 0.0 == -0.0
            return self.const(value)
        try:
            return self("parameter", value)
        except TypeError:
            return self.const(value)

    def const(self, value: Any) -> int:
        """A number by its dtype and bits; an array by identity, and so what has no bits, such as a tracer or a key."""
        if id(value) not in self.kept:
            bits = _bits(value) if getattr(value, "size", 1) == 1 else None
            self.kept[id(value)] = self("const", bits or id(value)), value
        return self.kept[id(value)][0]

    def body(self, jaxpr: Any) -> int:
        """A sub-graph up to the names of its variables (alpha-equivalence)."""
        if id(jaxpr) not in self.kept:
            inner, numbers = getattr(jaxpr, "jaxpr", jaxpr), dict[Any, int]()
            number = lambda v: (
                (self.const(v.val),) if isinstance(v, _jax.Literal) else numbers.setdefault(v, len(numbers))
            )
            listed = lambda atoms: tuple(map(number, atoms))
            key = [listed([*inner.constvars, *inner.invars]), *map(self.const, getattr(jaxpr, "consts", ()))]
            for e in inner.eqns:
                operation = self.operation(e.primitive, e.params, [v.aval for v in e.invars])
                key.append((operation, listed(e.invars), listed(e.outvars)))
            types = tuple(self(v.aval) for v in (*inner.constvars, *inner.invars))
            self.kept[id(jaxpr)] = self("body", types, *key, listed(inner.outvars)), jaxpr
        return self.kept[id(jaxpr)][0]


def _bits(value: Any) -> tuple | None:
    """Shape, dtype and bits of a constant that has some."""
    try:
        x = None if isinstance(value, jax.core.Tracer) else np.asarray(value, getattr(value, "dtype", None))
    except (TypeError, ValueError):
        x = None
    return None if x is None or x.dtype == object else (x.shape, x.dtype, x.tobytes())


def _is_jaxpr(x: Any) -> bool:
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def name_of(primitive: Any) -> str:
    """A primitive's name; sums are sums, also those of the backward pass."""
    return "add" if primitive.name == "add_any" else primitive.name


def is_folded(primitive: Any, params: Mapping[str, Any], aval: Any) -> bool:
    """Whether an operation may be none: a conversion of a number, which JAX folds, or one to the same shape and dtype."""
    if primitive.name == "convert_element_type":
        return params["new_dtype"] == aval.dtype or aval.shape == ()
    if primitive.name == "broadcast_in_dim":
        return params["shape"] == aval.shape
    return primitive.name in ("stage", _jax.pvary_p.name)


# ------------------------------------------------------------------------------------------------ views


@dataclass(eq=False, slots=True)
class Value:
    """A value of a view: output `index` of `node`, or the constant `const`, or an input.

    Attributes:
      number: equal for values that are computed alike from the same.
      users: the nodes and calls that read it; None for the world outside.
    """

    aval: Any
    number: int
    node: Any = None  # a Node
    index: int = 0
    const: Any = None
    users: list[Any] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Node:
    """An equation of a view: its operation's key, its place in program order, the calls that it stands in."""

    eqn: Any
    key: int
    at: int
    calls: tuple[Level, ...]
    inputs: list[Value]
    plans: list[Any]  # for its sub-graphs
    outputs: list[Value] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Level:
    """A jaxpr as it stands in a view; that of a call, which is a jit that the view looks into, has its equation."""

    jaxpr: Any
    eqn: Any
    values: dict[Any, Value]
    items: list[Node | Level] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)


class View:
    """A jaxpr as nodes and values.

    Args:
      keys: shared by the views that are compared.
      jaxpr: closed.
      known: for each input, the constant that it is, or None.
      inside: called with each equation that has sub-graphs, and its operands. It returns the plans for them, or None for a
        plain jit that is to be looked into.
    """

    def __init__(self, keys: Keys, jaxpr: Any, known: Sequence[Any], inside: Callable[[Any, list[Value]], Any]):
        self.keys, self.inside = keys, inside
        self.nodes: list[Node] = []
        self.by_key: dict[int, list[Node]] = {}
        inputs = [self._value(v.aval, c) for v, c in zip(jaxpr.jaxpr.invars, known, strict=True)]
        self.level = self._enter(None, jaxpr, inputs, ())
        for value in self.level.outputs:
            value.users.append(None)

    def _value(self, aval: Any, const: Any = None) -> Value:
        number = self.keys("value", len(self.keys.numbers)) if const is None else self.keys.const(const)
        return Value(aval, number, const=const)

    def _read(self, level: Level, atom: Any) -> Value:
        return self._value(atom.aval, atom.val) if isinstance(atom, _jax.Literal) else level.values[atom]

    def _enter(self, call: Any, jaxpr: Any, inputs: list[Value], calls: tuple[Level, ...]) -> Level:
        inner = jaxpr.jaxpr
        level = Level(inner, call, dict(zip(inner.invars, inputs, strict=True)))
        calls = (*calls, level) if call else ()
        level.values.update((v, self._value(v.aval, c)) for v, c in zip(inner.constvars, jaxpr.consts, strict=True))
        for eqn in inner.eqns:
            operands = [self._read(level, v) for v in eqn.invars]
            bodies = subjaxprs.bodies(eqn)
            plans = self.inside(eqn, operands) if bodies else []
            item = (
                self._enter(eqn, bodies[0].jaxpr, operands, calls)
                if plans is None
                else self._node(eqn, operands, calls, plans)
            )
            level.items.append(item)
            level.values.update(zip(eqn.outvars, item.outputs, strict=True))
            for value in operands:
                value.users.append(item)
        level.outputs = [self._read(level, v) for v in inner.outvars]
        return level

    def _node(self, eqn: Any, operands: list[Value], calls: tuple[Level, ...], plans: list[Any]) -> Node:
        avals = [v.aval for v in operands]
        node = Node(eqn, self.keys.operation(eqn.primitive, eqn.params, avals), len(self.nodes), calls, operands, plans)
        self.nodes.append(node)
        self.by_key.setdefault(node.key, []).append(node)
        if avals and is_folded(eqn.primitive, eqn.params, avals[0]):
            (aval,), (x,) = [v.aval for v in eqn.outvars], operands
            if (aval.shape, aval.dtype) == (x.aval.shape, x.aval.dtype):
                node.outputs = operands
                return node
            if x.const is not None and not isinstance(x.const, jax.core.Tracer):
                node.outputs = [self._value(aval, np.asarray(x.const).astype(aval.dtype))]
                return node
        numbers = [v.number for v in operands]
        numbers = sorted(numbers) if name_of(eqn.primitive) in COMMUTATIVE else numbers
        is_one = (
            eqn.effects or eqn.primitive.name in subjaxprs.WITH_DERIVATIVES
        )  # others of its kind may have other rules
        how = self.keys("computed", id(node) if is_one else None, node.key, *numbers)
        node.outputs = [Value(v.aval, self.keys("output", how, k), node, k) for k, v in enumerate(eqn.outvars)]
        return node


# ------------------------------------------------------------------------------------------------ matches


def matches(pattern: View, view: View, root: Node) -> Iterator[dict[Value, Value]]:
    """The ways in which `pattern` stands in `view` with its first output computed by `root`.

    Yields:
      the view's value for each value of the pattern that its outputs need; its inputs may be any values, constants too.
    """
    outputs = pattern.level.outputs
    todo: list[tuple] = [(((outputs[0], root.outputs[outputs[0].index]), ()), {})]
    while todo:
        goals, bound = todo.pop()  # pairs that must fit, as a linked list, and those that do
        while goals:
            (p, v), goals = goals
            if p in bound:
                if bound[p].number != v.number:
                    break
            elif not _fits(p, v):
                break
            else:
                bound[p] = v
                if p.node:
                    if name_of(p.node.eqn.primitive) in COMMUTATIVE:
                        todo.append((_linked(p.node.inputs, v.node.inputs[::-1], goals), dict(bound)))
                    goals = _linked(p.node.inputs, v.node.inputs, goals)
        else:
            missing = next((p for p in outputs if p not in bound), None)
            if missing is None:
                yield bound
                continue
            for node in reversed(view.by_key.get(missing.node.key, ())):
                todo.append((((missing, node.outputs[missing.index]), ()), dict(bound)))


def _linked(ps: Sequence[Value], vs: Sequence[Value], goals: tuple) -> tuple:
    for pair in zip(reversed(ps), reversed(vs), strict=True):
        goals = (pair, goals)
    return goals


def _fits(p: Value, v: Value) -> bool:
    if p.node:
        return v.node is not None and (p.node.key, p.index) == (v.node.key, v.index)
    if p.const is not None:
        return p.number == v.number or (v.const is not None and _is_equal(p.const, v.const))
    return type_of(p.aval) == type_of(v.aval)


def _is_equal(a: Any, b: Any) -> bool:
    """Whether two constant arrays are equal to the bit; they are read only if their types are."""
    return jax.typeof(a) == jax.typeof(b) and _bits(a) is not None and _bits(a) == _bits(b)


# ------------------------------------------------------------------------------------------------ plans


class Form(NamedTuple):
    """The pattern for one choice of types."""

    view: View
    inputs: list[Value]
    size: int  # how many values its outputs need
    tree: Any
    name: str


class Match(NamedTuple):
    """Where a form stands: its inputs, its outputs, and all nodes that compute these."""

    form: Form
    inputs: list[Value]
    outputs: list[Value]
    nodes: list[Node]


@dataclass(eq=False)
class Plan:
    """What becomes of a level: where the replacement is called, which calls are opened, which nodes are gone."""

    view: View
    matches: dict[Node, Match] = field(default_factory=dict)  # by the first node that computes an output
    replaced: set[Value] = field(default_factory=set)
    opened: set[Level] = field(default_factory=set)
    gone: set[Node] = field(default_factory=set)
    count: int = 0
    at: dict[tuple[str, str], None] = field(default_factory=dict)  # line and scopes
    staged: dict[Any, subjaxprs.Lifted] = field(default_factory=dict)

    def take(self, match: Match) -> bool:
        """Enter a match, unless an earlier one replaces some of it, or its inputs come after its first output."""
        first = min((v.node for v in match.outputs), key=lambda node: node.at)
        if any(v in self.replaced for node in match.nodes for v in node.outputs):
            return False
        if any(v.node and v.node.at >= first.at for v in match.inputs):
            return False
        self.matches[first] = match
        self.replaced.update(match.outputs)
        self.opened.update(call for node in match.nodes for call in node.calls)
        for value in match.inputs:
            value.users.append(None)
        return True

    def finish(self) -> None:
        """Find what nobody needs any more, count the matches and note where they stand."""
        for node in reversed(self.view.nodes):
            if self._is_gone(node):
                self.gone.add(node)
        self.count = len(self.matches)
        for node in self.view.nodes:
            eqns = [*(call.eqn for call in node.calls), node.eqn]
            around = _joined(*map(_jax.scope_of, eqns))
            if node in self.matches:
                self.at[where(eqns), around] = None
            for plan in node.plans if node not in self.gone else ():
                self.count += plan.count
                self.at.update(((line, _joined(around, scopes)), None) for line, scopes in plan.at)

    def _is_gone(self, node: Node) -> bool:
        if node.eqn.effects or not self.opened.issuperset(node.calls) or not any(v.users for v in node.outputs):
            return False
        is_done = lambda user: user is node or user in self.gone or user in self.opened
        return all(all(map(is_done, v.users)) for v in node.outputs if not self.is_new(node, v))

    def is_new(self, node: Node, value: Value) -> bool:
        """Whether a node's output comes from a replacement."""
        return value in self.replaced and value.node is node


class Planner:
    """Plans level by level, inner levels first; sub-graphs of the same constants once."""

    def __init__(self, keys: Keys, forms: list[Form]):
        self.keys = keys
        self.roots: dict[int, list[Form]] = {}
        for form in sorted(forms, key=lambda form: -form.size):  # the longest match first
            self.roots.setdefault(form.view.level.outputs[0].node.key, []).append(form)
        self.memo: dict[Any, Plan] = {}

    def plan(self, jaxpr: Any, known: Sequence[Any]) -> Plan:
        """The plan of a closed jaxpr; `known` has for each input the constant that it is, or None."""
        key = (id(jaxpr.jaxpr), *(None if c is None else self.keys.const(c) for c in (*jaxpr.consts, *known)))
        if key not in self.memo:
            self.memo[key] = plan = Plan(View(self.keys, jaxpr, known, self._inside))
            for node in plan.view.nodes:
                found = (
                    Match(form, [bound[v] for v in form.inputs], [bound[v] for v in form.view.level.outputs],
                           [v.node for p, v in bound.items() if p.node])
                    for form in self.roots.get(node.key, ())
                    for bound in matches(form.view, plan.view, node)
                )  # fmt: skip
                any(map(plan.take, found))
            plan.finish()
        return self.memo[key]

    def _inside(self, eqn: Any, operands: list[Value]) -> list[Plan] | None:
        """The plans of an equation's sub-graphs; None for a jit that is small and holds no match, or nothing else."""
        known = [[v and v.const for v in values] for values in subjaxprs.invariant_operands(eqn, operands)]
        plans = [self.plan(body.jaxpr, k) for body, k in zip(subjaxprs.bodies(eqn), known, strict=True)]
        if not subjaxprs.is_plain(eqn):
            return plans
        nodes = plans[0].view.nodes
        looks = len(nodes) <= LARGE and (not plans[0].count or len(plans[0].gone) == len(nodes))
        return None if looks else plans


def _joined(*scopes: str) -> str:
    return "/".join(filter(None, scopes))


def where(eqns: Sequence[Any]) -> str:
    """The user's line that made an equation, the last of these that has one; those before are the calls around it."""
    lines = [line for eqn in eqns for line in _jax.source_lines(eqn)]
    return "{}:{} ({})".format(*lines[-1]) if lines else "an unknown line"
