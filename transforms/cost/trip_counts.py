"""Trip counts of loops and weights of branches: the user's, or measured by a run with counters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..core import lanes
from ..core.errors import ArgumentError, OptionError
from ..core.graph import Graph
from ..core.passes import run
from ..core.rules import Rules
from ..core.scope_paths import Path, entered
from ..while_loops.adjoint import call
from ..while_loops.primitives import forward_p, loop_p, sweep_p, tangent_p


class ByScope:
    """The user's counts or weights: one for all, or by scope pattern, of which the first that matches counts."""

    def __init__(self, name: str, answers: Any):
        self.name, self.answers, self.used = name, answers, set[str]()

    def __call__(self, eqn: Any, path: Path) -> Any:
        """The answer for an equation; its primitive is the last name on its path."""
        if not isinstance(self.answers, Mapping):
            return self.answers
        for pattern, answer in self.answers.items():
            if entered(pattern, (*path, eqn.primitive.name)):
                self.used.add(pattern)
                return answer
        return None

    def check(self, paths: Sequence[str]) -> None:
        """Raise if a pattern matches no loop or branch."""
        unused = [p for p in self.answers if p not in self.used] if isinstance(self.answers, Mapping) else []
        if unused:
            raise OptionError(
                f"{self.name}= names {unused[0]!r}, where there is none.",
                inputs=f"there are {', '.join(dict.fromkeys(paths)) or 'none'}",
                hint=f"a pattern names scopes and ends in the primitive, as in {self.name}={{'solver/while': ...}}",
            )


def measured(graph: Graph, args: tuple, kwargs: dict) -> Callable[[Any, Path], float | None]:
    """Run a graph and count the trips of its loops: the mean over all runs of each loop."""
    counts: dict[int, list[int]] = defaultdict(list)
    record = lambda key, n: counts[key].append(int(n))

    def counted(key: int, cond: Callable, body: Callable, x: Sequence[Any]) -> list[Any]:
        """The last x of a loop; finished lanes of a batch stay, as in JAX's own loop."""

        def step(state):
            n, running, x = state
            x = lanes.select(running, body(x), x)
            return n + 1, cond(x), x

        n, _, x = lax.while_loop(lambda state: jnp.any(state[1]), step, (jnp.int32(0), cond(list(x)), list(x)))
        jax.debug.callback(partial(record, key), n)
        return x

    def loop(eqn, *values):
        p = eqn.params
        n, m = p["cond_nconsts"], p["body_nconsts"]
        cond = lambda x: run(rules, p["cond_jaxpr"], [*values[:n], *x])[0]
        body = lambda x: run(rules, p["body_jaxpr"], [*values[n : n + m], *x])
        return counted(_key(eqn), cond, body, values[n + m :])

    def sweep(eqn, *values):
        params = eqn.params["sweep"]
        c, x = values[: params.sizes[0]], values[params.sizes[0] : sum(params.sizes[:2])]
        counted(_key(eqn), lambda x: call(params.cond, c, x)[0], lambda x: call(params.step, c, x), x)
        return eqn.primitive.bind(*values, **eqn.params)

    table = {lax.while_p: loop, loop_p: loop, forward_p: sweep, sweep_p: sweep, tangent_p: sweep}
    rules = Rules("cost", table)
    leaves = graph.leaves(*args, **kwargs)
    for path, x in zip(graph.paths, leaves, strict=True):
        if isinstance(x, jax.ShapeDtypeStruct):
            what = f'trips="measured" runs {graph.name}, and got no values for {path}.'
            raise ArgumentError(what, hint="pass arrays, or trips= as a number")
    jax.block_until_ready(jax.jit(lambda *leaves: run(rules, graph.jaxpr, leaves))(*leaves))
    jax.effects_barrier()
    means = {key: sum(ns) / len(ns) for key, ns in counts.items()}
    return lambda eqn, path: means.get(_key(eqn))


def _key(eqn: Any) -> int:
    return id(eqn.params.get("sweep") or getattr(eqn.params["body_jaxpr"], "jaxpr", None))
