"""Single iterations of loops: the values that enter one, and since which one an element is NaN or infinite.

Nothing is kept of a loop. A compiled run to any iteration gives the states that enter it and, element by element, since which
iteration they are what they are there: finite, infinite or NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..core import _jax, subjaxprs
from ..while_loops.adjoint import call
from .dependencies import is_inexact

_ALL = 2**31 - 1


class Iterations:
    """A scan or a while, of certain operands.

    Attributes:
      body: consts, states and slices -> states, and what a scan stacks.
      consts, states, slices: operands of the loop; the states are those before the first iteration.
    """

    def __init__(self, eqn: Any, values: Sequence[Any]):
        p, values = eqn.params, list(values)
        *tests, self.body = (body.jaxpr for body in subjaxprs.bodies(eqn))
        self.test, self.length = next(iter(tests), None), p.get("length", _ALL)
        self.is_reverse = p.get("reverse", False)
        first = p.get("cond_nconsts", 0)
        if self.test:
            n_consts, n_states = p["body_nconsts"], len(self.body.out_avals)
        else:
            n_consts, n_states, _ = subjaxprs.scan_sizes(eqn)
        self.test_consts, rest = values[:first], values[first:]
        self.consts, self.states = rest[:n_consts], rest[n_consts : n_consts + n_states]
        self.slices = rest[n_consts + n_states :]
        self.before = functools.cache(functools.partial(self._before, jax.jit(self._run)))

    def position(self, step: Any) -> Any:
        """Which slice an iteration reads: its number, or in a reverse scan the number that it has from the end."""
        return self.length - 1 - step if self.is_reverse else step

    def inputs(self, step: int) -> list[Any]:
        """What enters an iteration: constants, states and slices."""
        return [*self.consts, *self.before(step)[0], *self._sliced(self.slices, step)]

    def since(self, j: int, index: tuple[int, ...], stop: int) -> int:
        """Which iteration made the element of the j-th state that enters iteration `stop`; -1 if it came in so.

        That is the first of those since which it has been NaN, or infinite, without a break.
        """
        return int(np.asarray(self.before(stop)[1][j])[index])

    def _sliced(self, slices: Sequence[Any], step: Any) -> list[Any]:
        return [lax.dynamic_index_in_dim(x, self.position(step), keepdims=False) for x in slices]

    def _before(self, run: Any, stop: int) -> tuple[list[Any], list[Any]]:
        return run(np.int32(stop), self.test_consts, self.consts, self.states, self.slices)

    def _run(self, stop, test_consts, consts, states, slices):
        """The states before an iteration, and since when each element is what it is."""
        typed = self.body.in_avals[len(consts) :]
        states = [x if jax.typeof(x) == a else _jax.cast(x, a) for x, a in zip(states, typed, strict=False)]
        goes_on = lambda states: call(self.test, test_consts, states)[0] if self.test else jnp.bool_(True)

        def step(t):
            i, states, since = t
            new = call(self.body, consts, states, self._sliced(slices, i))[: len(states)]
            goes = goes_on(states)
            new = _where(goes, new, states) if goes.ndim else new  # where it has lanes, some have finished
            since = [jnp.where(_kind(a) == _kind(b), s, i) for a, b, s in zip(new, states, since, strict=True)]
            return i + 1, new, since

        never = [jnp.full(_kind(x).shape, -1, jnp.int32) for x in states]
        is_next = lambda t: (t[0] < stop) & jnp.any(goes_on(t[1]))
        return lax.while_loop(is_next, step, (jnp.int32(0), states, never))[1:]


def _kind(x: Any) -> Any:
    """Of each element: 0 if it is finite, 1 if it is infinite, 2 if it is NaN; one 0 for what holds no floats."""
    if not is_inexact(x):
        return jnp.int8(0)
    return jnp.where(jnp.isnan(x), jnp.int8(2), jnp.isinf(x).astype(jnp.int8))


def _where(goes: Any, new: Sequence[Any], old: Sequence[Any]) -> list[Any]:
    """Of each lane the new values, if it goes on."""
    lifted = lambda x: jnp.reshape(goes, (*goes.shape, *[1] * (x.ndim - goes.ndim)))
    return [jnp.where(lifted(a), a, b) for a, b in zip(new, old, strict=True)]
