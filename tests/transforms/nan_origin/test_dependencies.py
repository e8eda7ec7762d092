"""The elements that an element is computed from."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from funcgrad.transforms.core import _jax
from funcgrad.transforms.core.passes import run
from funcgrad.transforms.nan_origin import dependencies
from jax import lax

import funcgrad as fg

# ------------------------------------------------------------------------------------------------ elements

A, B = jnp.arange(1.0, 13).reshape(3, 4), jnp.arange(1.0, 9).reshape(4, 2)
ONE = jnp.ones(())
OPERATIONS = [
    (lambda x: x * 2, (A,)),
    (lambda x, y: lax.dot_general(x, y, (((1,), (0,)), ((), ()))), (A, B)),
    (lambda x, y: lax.dot_general(x, y, (((2,), (1,)), ((0,), (0,)))), (jnp.ones((2, 3, 4)), jnp.ones((2, 4, 5)))),
    (lambda x: lax.transpose(x, (1, 0)), (A,)),
    (lambda x: lax.reshape(x, (2, 6)), (A,)),
    (lambda x: lax.expand_dims(x, (1,)), (A,)),
    (lambda x: lax.squeeze(x, (0,)), (A[None],)),
    (lambda x: lax.broadcast_in_dim(x, (3, 4, 2), (0, 1)), (A,)),
    (lambda x: lax.rev(x, (1,)), (A,)),
    (lambda x: lax.slice(x, (0, 1), (3, 4), (2, 2)), (A,)),
    (lambda x, y: lax.concatenate([x, y], 0), (A, A[:2])),
    (lambda x, y: lax.pad(x, y, ((1, 0, 1), (0, 2, 0))), (A, ONE)),
    (lambda x: jnp.sum(x, 1), (A,)),
    (lambda x: lax.reduce_max(x, (0,)), (A,)),
    (lambda x: lax.cumsum(x, 1), (A,)),
    (lambda x: lax.cumsum(x, 0, reverse=True), (A,)),
    (lambda x, y: lax.select(jnp.arange(12).reshape(3, 4) % 3 == 0, x, y), (A, A)),
    (lambda x: lax.dynamic_slice(x, (1, 3), (2, 2)), (A,)),
    (lambda x, y: lax.dynamic_update_slice(x, y, (1, 3)), (A, A[:2, :2])),
    (lambda x: x[jnp.array([2, 0])], (A,)),
    (lambda x, y: x.at[jnp.array([2, 0])].add(y), (A, A[:2])),
    (lambda x: jnp.split(x, [1], axis=1)[1], (A,)),
    (lambda x, y: lax.conv(x[None, None], y[None, None], (1, 1), "SAME"), (A, A[:2, :2])),
]


@pytest.mark.parametrize(("f", "args"), OPERATIONS)
def test_elements_that_an_element_is_computed_from(f, args):
    """Those with a derivative that is not zero, by JAX's own jacobian of each operation."""
    graph, checked = fg.trace(f, *args), []

    class Checked(fg.Pass):
        def enters(self, eqn, values):
            return False

        def equation(self, eqn, values):
            return check(eqn, values)

    def check(eqn, values):
        outputs = _jax.bind(eqn.primitive, eqn.params, values)
        floats = [k for k, x in enumerate(values) if dependencies.is_inexact(x)]
        if floats:
            operands = lambda some: [dict(zip(floats, some, strict=True)).get(k, x) for k, x in enumerate(values)]
            of = lambda *some: _jax.bind(eqn.primitive, eqn.params, operands(some))
            jacobians = jax.jacrev(of, argnums=tuple(range(len(floats))))(*(values[k] for k in floats))
            for k, out in enumerate(outputs):
                for index in np.ndindex(*out.shape):
                    read = dependencies.reads(dependencies.Element(eqn, values, k, out.shape, index))
                    for place, jacobian in zip(floats, jacobians[k], strict=True):
                        mask = np.zeros(np.shape(values[place]), bool)
                        if read[place] is not None:
                            mask[read[place]] = True
                        want = np.asarray(jacobian)[index] != 0
                        assert (mask >= want).all() if eqn.primitive.name == "reduce_max" else (mask == want).all()
            checked.append(eqn.primitive.name)
        return outputs

    run(Checked(), graph.jaxpr, args)
    assert checked
