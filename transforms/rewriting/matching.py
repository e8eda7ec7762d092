"""Where one graph occurs in another: `View`, a graph as nodes and values, and `matches`, the embeddings of a pattern's view.

A view is modulo what does not change values: it inlines plain jits, ignores names and source lines, and numbers values so that
common subexpressions are one value (value numbering). Matching is syntactic otherwise, from the outputs backwards, modulo
commutativity.

Source: Baader & Nipkow 1998, Term Rewriting and All That, doi:10.1017/CBO9781139172752, chapters 4 (matching) and 10.3
(commutative operations).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from ..core import _jax, subjaxprs

MAX_INLINED_EQNS = 1000  # a jit of more equations is planned on its own
COMMUTATIVE = frozenset({"add", "mul", "max", "min", "and", "or", "xor", "eq", "ne"})
# Parameters without influence on the values of an equation; nor has `name` where it names a body, except a composite's.
IGNORED_PARAMS = frozenset({"jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd", "out_trees", "num_consts", "weak_type"})


def type_of(aval: Any) -> tuple:
    """Shape, dtype and weak type: what a pattern is traced for."""
    return aval.shape, aval.dtype, aval.weak_type


class Keys:
    """Small integers for classes of equal things: constants, parameters, alpha-equivalent bodies, operations."""

    def __init__(self) -> None:
        self.numbers: dict[Any, int] = {}
        self.by_identity: dict[int, tuple[int, Any]] = {}  # of objects, which it keeps alive

    def __call__(self, *key: Any) -> int:
        """The number of a key."""
        return self.numbers.setdefault(key, len(self.numbers))

    def _memoised(self, value: Any, key: Callable[[Any], tuple]) -> int:
        if id(value) not in self.by_identity:
            self.by_identity[id(value)] = self(*key(value)), value
        return self.by_identity[id(value)][0]

    def operation(self, primitive: Any, params: Mapping[str, Any], avals: Sequence[Any]) -> int:
        """The number of a primitive with its parameters and the shapes and dtypes of its operands."""
        is_named = primitive.name == "composite" or not any(map(_is_jaxpr, params.values()))
        ignored = IGNORED_PARAMS if is_named else {*IGNORED_PARAMS, "name"}
        numbers = ((k, self.parameter(v)) for k, v in sorted(params.items()) if k not in ignored)
        types = [self(a.shape, a.dtype) if hasattr(a, "dtype") else self(a) for a in avals]
        return self("operation", name_of(primitive), *numbers, *in_any_order(primitive, types))

    def parameter(self, value: Any) -> Any:
        """The number of a parameter of an equation."""
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
        """The number of a scalar by its dtype and bits; of an array, a tracer and a key by identity."""
        bits = lambda x: _bits(x) if getattr(x, "size", 1) == 1 else None
        return self._memoised(value, lambda x: ("const", bits(x) or id(x)))

    def body(self, jaxpr: Any) -> int:
        """The number of a sub-jaxpr up to the names of its variables (alpha-equivalence)."""
        return self._memoised(jaxpr, self._body_key)

    def _body_key(self, closed: Any) -> tuple:
        jaxpr, numbers = getattr(closed, "jaxpr", closed), dict[Any, int]()
        number = lambda v: (self.const(v.val),) if isinstance(v, _jax.Literal) else numbers.setdefault(v, len(numbers))
        numbered = lambda atoms: tuple(map(number, atoms))
        inputs = [*jaxpr.constvars, *jaxpr.invars]
        key = [numbered(inputs), *map(self.const, getattr(closed, "consts", ()))]
        for e in jaxpr.eqns:
            operation = self.operation(e.primitive, e.params, [v.aval for v in e.invars])
            key.append((operation, numbered(e.invars), numbered(e.outvars)))
        return "body", tuple(self(v.aval) for v in inputs), *key, numbered(jaxpr.outvars)


def _bits(value: Any) -> tuple | None:
    """Shape, dtype and bits of a constant; None for tracers, keys and objects."""
    try:
        x = None if isinstance(value, jax.core.Tracer) else np.asarray(value, getattr(value, "dtype", None))
    except (TypeError, ValueError):
        x = None
    return None if x is None or x.dtype == object else (x.shape, x.dtype, x.tobytes())


def _is_jaxpr(x: Any) -> bool:
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def name_of(primitive: Any) -> str:
    """A primitive's name; the backward pass has a primitive of its own for sums."""
    return "add" if primitive.name == "add_any" else primitive.name


def in_any_order(primitive: Any, numbers: list[int]) -> list[int]:
    """The numbers of operands, sorted where their order does not matter."""
    return sorted(numbers) if name_of(primitive) in COMMUTATIVE else numbers


def is_folded(primitive: Any, params: Mapping[str, Any], aval: Any) -> bool:
    """Whether an operation may be an identity: a conversion of a number, which JAX folds, or one to the same shape and dtype."""
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
      number: the value number, equal for common subexpressions.
      users: the nodes and calls that read it; None for the outputs of the view.
    """

    aval: Any
    number: int
    node: Any = None  # a Node
    index: int = 0
    const: Any = None
    users: list[Any] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Node:
    """An equation of a view: the key of its operation, its place in program order, the inlined calls around it."""

    eqn: Any
    key: int
    at: int
    calls: tuple[Level, ...]
    inputs: list[Value]
    plans: list[Any]  # of its sub-jaxprs
    outputs: list[Value] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Level:
    """A jaxpr in a view; `eqn` is the jit whose body it is, an inlined call, and None for the view's own jaxpr."""

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
      consts: for each input, its constant, or None.
      plan_bodies: called with each equation that has sub-jaxprs, and its operands. It returns their plans, or None for a
        plain jit to inline.
    """

    def __init__(self, keys: Keys, jaxpr: Any, consts: Sequence[Any], plan_bodies: Callable[[Any, list[Value]], Any]):
        self.keys, self.plan_bodies = keys, plan_bodies
        self.nodes: list[Node] = []
        self.by_key: dict[int, list[Node]] = {}
        inputs = [self._value(v.aval, c) for v, c in zip(jaxpr.jaxpr.invars, consts, strict=True)]
        self.level = self._enter(None, jaxpr, inputs, ())
        for value in self.level.outputs:
            value.users.append(None)

    def _value(self, aval: Any, const: Any = None) -> Value:
        number = self.keys("value", len(self.keys.numbers)) if const is None else self.keys.const(const)
        return Value(aval, number, const=const)

    def _read(self, level: Level, atom: Any) -> Value:
        return self._value(atom.aval, atom.val) if isinstance(atom, _jax.Literal) else level.values[atom]

    def _enter(self, call: Any, closed: Any, inputs: list[Value], calls: tuple[Level, ...]) -> Level:
        jaxpr = closed.jaxpr
        level = Level(jaxpr, call, dict(zip(jaxpr.invars, inputs, strict=True)))
        calls = (*calls, level) if call else ()
        level.values.update((v, self._value(v.aval, c)) for v, c in zip(jaxpr.constvars, closed.consts, strict=True))
        for eqn in jaxpr.eqns:
            operands = [self._read(level, v) for v in eqn.invars]
            bodies = subjaxprs.bodies(eqn)
            plans = self.plan_bodies(eqn, operands) if bodies else []
            if plans is None:
                item: Node | Level = self._enter(eqn, bodies[0].jaxpr, operands, calls)
            else:
                item = self._node(eqn, operands, calls, plans)
            level.items.append(item)
            level.values.update(zip(eqn.outvars, item.outputs, strict=True))
            for value in operands:
                value.users.append(item)
        level.outputs = [self._read(level, v) for v in jaxpr.outvars]
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
        numbers = in_any_order(eqn.primitive, [v.number for v in operands])
        # Effects happen once each; functions with equal bodies may have other derivative rules.
        is_unique = eqn.effects or eqn.primitive.name in subjaxprs.WITH_DERIVATIVES
        number = self.keys("computed", id(node) if is_unique else None, node.key, *numbers)
        node.outputs = [Value(v.aval, self.keys("output", number, k), node, k) for k, v in enumerate(eqn.outvars)]
        return node


# ------------------------------------------------------------------------------------------------ matches


def matches(pattern: View, view: View, root: Node) -> Iterator[dict[Value, Value]]:
    """The embeddings of `pattern` in `view` with its first output computed by `root`.

    Yields:
      the view's value for each value of the pattern that its outputs depend on; its inputs may be any values, constants too.
    """
    outputs = pattern.level.outputs
    todo: list[tuple] = [(((outputs[0], root.outputs[outputs[0].index]), ()), {})]
    while todo:  # invariant: each entry is a partial embedding `bound`, and the pairs still to be bound, a linked list
        goals, bound = todo.pop()
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
    """Whether two constant arrays are equal to the bit; their elements are compared only if their types are equal."""
    return jax.typeof(a) == jax.typeof(b) and _bits(a) is not None and _bits(a) == _bits(b)
