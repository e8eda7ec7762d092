"""Single iterations of loops: the values that enter an iteration, and since which one an element is NaN or infinite.

Nothing of a loop is stored. A compiled run up to any iteration gives the states that enter it and, element by element, since
which iteration each element has been finite, infinite or NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..core import _jax, lanes, subjaxprs
from ..while_loops.adjoint import call
from .dependencies import is_inexact


class Iterations:
    """A scan or a while, with its operands.

    Attributes:
      body: consts, states and slices -> states, and the stacked outputs of a scan.
      consts, states, slices: operands of the loop; the states are those before the first iteration.
    """

    def __init__(self, eqn: Any, values: Sequence[Any]):
        p, values = eqn.params, list(values)
        *tests, self.body = (body.jaxpr for body in subjaxprs.bodies(eqn))
        self.test, self.length = next(iter(tests), None), p.get("length", 2**31 - 1)
        self.is_reverse = p.get("reverse", False)
        n_test = p.get("cond_nconsts", 0)
        if self.test:
            n_consts, n_states = p["body_nconsts"], len(self.body.out_avals)
        else:
            n_consts, n_states, _ = subjaxprs.scan_sizes(eqn)
        self.test_consts, values = values[:n_test], values[n_test:]
        self.consts, self.states = values[:n_consts], values[n_consts : n_consts + n_states]
        self.slices = values[n_consts + n_states :]
        run, operands = jax.jit(self._run), (self.test_consts, self.consts, self.states, self.slices)
        self.before = functools.cache(lambda stop: run(np.int32(stop), *operands))

    def position(self, step: Any) -> Any:
        """The index of the slice that an iteration reads; in a reverse scan they count from the end."""
        return self.length - 1 - step if self.is_reverse else step

    def inputs(self, step: int) -> list[Any]:
        """The inputs of the body in an iteration: constants, states and slices."""
        return [*self.consts, *self.before(step)[0], *self._sliced(self.slices, step)]

    def since(self, j: int, index: tuple[int, ...], stop: int) -> int:
        """The iteration since which an element of the j-th state that enters iteration `stop` has been NaN, or infinite.

        Returns:
          -1 if it has been so since before the loop.
        """
        return int(np.asarray(self.before(stop)[1][j])[index])

    def _sliced(self, slices: Sequence[Any], step: Any) -> list[Any]:
        return [lax.dynamic_index_in_dim(x, self.position(step), keepdims=False) for x in slices]

    def _run(self, stop, test_consts, consts, states, slices):
        """The states before iteration `stop`, and since when each element has been of its kind."""
        avals = self.body.in_avals[len(consts) :]
        states = [x if jax.typeof(x) == a else _jax.cast(x, a) for x, a in zip(states, avals, strict=False)]
        is_running = lambda states: call(self.test, test_consts, states)[0] if self.test else jnp.bool_(True)

        def step(carry):  # invariant: the elements of `states` have been of their kinds since the iterations `since`
            i, states, since = carry
            new = call(self.body, consts, states, self._sliced(slices, i))[: len(states)]
            new = lanes.select(is_running(states), new, states)
            since = [jnp.where(_kind(a) == _kind(b), s, i) for a, b, s in zip(new, states, since, strict=True)]
            return i + 1, new, since

        before_loop = [jnp.full(_kind(x).shape, -1, jnp.int32) for x in states]
        is_next = lambda carry: (carry[0] < stop) & jnp.any(is_running(carry[1]))
        return lax.while_loop(is_next, step, (jnp.int32(0), states, before_loop))[1:]


def _kind(x: Any) -> Any:
    """0 for each finite, 1 for each infinite element, 2 for NaN; one 0 for an array without floats."""
    if not is_inexact(x):
        return jnp.int8(0)
    return jnp.where(jnp.isnan(x), jnp.int8(2), jnp.isinf(x).astype(jnp.int8))
