"""The program with a scope around each equation, as `fg[12]`: what XLA keeps of an equation then knows it.

Scopes change nothing that XLA does, and stay on every instruction that is left of the equation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax

from ...core import _jax, subjaxprs
from ...core.graph import Graph
from ...core.passes import retraced, run
from ...core.scope_paths import Path, joined
from ...cost.operations import work
from ...cost.table import Row

_CALLS = (
    subjaxprs.WITH_DERIVATIVES | subjaxprs.INLINED | {"closed_call", "call", "eval_jaxpr"}
)  # mean nothing but their body here


class Tag(NamedTuple):
    """An equation of the program, its name as in "block_0/tanh#0", and the tags of those that made its operands."""

    row: Row
    name: str
    parents: tuple[int, ...]


def tagged(graph: Graph) -> tuple[Any, list[Tag]]:
    """The graph as a jitted function of its leaves, with a scope around each equation; and the equations, by their tags."""
    tags: list[Tag] = []
    makers: dict[int, tuple[int, Any]] = {}  # by the identity of a value, which is kept so that no other gets it

    counts: Counter[str] = Counter()  # of equations of a name

    def name_of(eqn: Any, path: Path) -> str:
        name = "/".join((*path, eqn.primitive.name))
        counts[name] += 1
        return f"{name}#{counts[name] - 1}"

    def apply(path: Path, eqn: Any, values: Sequence[Any]) -> list[Any]:
        path = joined(path, _jax.scopes(_jax.name_stack(eqn)))
        name = name_of(eqn, path)
        bodies = [body.jaxpr for body in subjaxprs.bodies(eqn) if eqn.primitive.name != "shard_map"]
        if subjaxprs.is_plain(eqn) or eqn.primitive.name in _CALLS:
            return run(bodies[0].jaxpr, [*bodies[0].consts, *values], partial(apply, path))
        tag = len(tags)
        parents = tuple(makers[id(x)][0] for x in values if id(x) in makers)
        tags.append(Tag(Row(eqn, path, 1, None if bodies else work(eqn)), name, parents))
        for body in subjaxprs.bodies(eqn)[len(bodies) :]:
            passed_over(path, body.jaxpr.jaxpr)
        with jax.named_scope(f"fg[{tag}]"):
            if bodies:
                opened = [again(path, body) for body in bodies]
                outputs = subjaxprs.rebind(eqn.primitive, eqn.params, values, opened)
            else:
                outputs = _jax.bind(eqn.primitive, eqn.params, values)
        makers.update((id(x), (tag, x)) for x in outputs)
        return outputs

    def passed_over(path: Path, jaxpr: Any) -> None:
        """Count equations that have no tags."""
        for eqn in jaxpr.eqns:
            inner = joined(path, _jax.scopes(_jax.name_stack(eqn)))
            name_of(eqn, inner)
            for body in subjaxprs.bodies(eqn):
                passed_over(inner, body.jaxpr.jaxpr)

    def again(path: Path, jaxpr: Any) -> subjaxprs.Opened:
        opened = retraced(jaxpr.jaxpr, lambda *values: run(jaxpr.jaxpr, values, partial(apply, path)))
        return subjaxprs.Opened(opened.jaxpr, [*opened.consts, *jaxpr.consts])

    def run_tagged(*leaves):
        outputs = run(graph.jaxpr.jaxpr, [*graph.jaxpr.consts, *leaves], partial(apply, ()))
        makers.clear()
        return outputs

    run_tagged.__name__ = graph.name
    return jax.jit(run_tagged, donate_argnums=donated(graph)), tags


def donated(graph: Graph) -> tuple[int, ...]:
    """Which inputs a graph donates that is nothing but a jitted call."""
    eqns, inputs = graph.eqns, graph.jaxpr.jaxpr.invars
    if len(eqns) == 1 and eqns[0].primitive.name == "jit":
        flags = zip(eqns[0].invars, eqns[0].params["donated_invars"], strict=True)
        donated = {v for v, is_donated in flags if is_donated and not isinstance(v, _jax.Literal)}
        return tuple(k for k, v in enumerate(inputs) if v in donated)
    return ()
