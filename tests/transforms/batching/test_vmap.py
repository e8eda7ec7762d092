"""`vmap` on Graphs, and what it adds to JAX's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import funcgrad as fg

PARAMS = {"w": jnp.arange(12.0).reshape(4, 3), "b": jnp.ones(4)}
XS = jnp.arange(15.0).reshape(5, 3)


def model(params, x):
    return params["w"] @ x + params["b"]


@pytest.mark.parametrize(
    ("in_axes", "out_axes", "xs"),
    [((None, 0), 0, XS), ((None, 1), 1, XS.T), ((None, -1), -1, XS.T), (({"w": None, "b": None}, 0), 0, XS)],
)
def test_a_graph_gives_the_graph_of_the_batch(in_axes, out_axes, xs):
    graph = fg.vmap(fg.trace(model, PARAMS, XS[0]), in_axes, out_axes, axis_size=5)
    assert isinstance(fg.verify(graph), fg.Graph)
    assert graph.name == "vmap(model)"
    assert graph.paths == ("params['b']", "params['w']", "x")
    np.testing.assert_array_equal(graph(PARAMS, xs), jax.vmap(model, in_axes, out_axes)(PARAMS, xs))


def test_trees_of_axes():
    stacked = {"w": jnp.stack([PARAMS["w"]] * 5, 1), "b": PARAMS["b"]}
    axes = ({"w": 1, "b": None}, 0)
    graph = fg.vmap(fg.trace(model, PARAMS, XS[0]), axes, axis_size=5)
    np.testing.assert_array_equal(graph(stacked, XS), jax.vmap(model, axes)(stacked, XS))


def test_keyword_arguments_are_mapped_along_their_first_axis_as_in_jax():
    f = lambda x, *, y: x * y
    graph = fg.vmap(fg.trace(f, 1.0, y=2.0), axis_size=3)
    np.testing.assert_array_equal(graph(jnp.arange(3.0), y=jnp.arange(3.0)), jnp.arange(3.0) ** 2)


def test_no_mapped_argument():
    graph = fg.vmap(fg.trace(jnp.sin, 1.0), None, axis_size=3)
    np.testing.assert_array_equal(graph(1.0), jax.vmap(jnp.sin, None, axis_size=3)(1.0))


def test_axes_that_do_not_fit_fail_as_in_jax():
    graph = fg.trace(model, PARAMS, XS[0])
    with pytest.raises(ValueError, match="vmap in_axes") as theirs:
        jax.vmap(model, (None, 0, 0), axis_size=5)(PARAMS, XS)
    with pytest.raises(ValueError, match="vmap in_axes") as ours:
        fg.vmap(graph, (None, 0, 0), axis_size=5)
    assert str(ours.value).split(",")[0] == str(theirs.value).split(",")[0]


def test_named_axes():
    f = lambda x: x / lax.psum(x, "batch")
    graph = fg.vmap(fg.trace(jax.vmap(f, axis_name="batch"), jnp.ones(3)), axis_size=2)
    np.testing.assert_allclose(graph(jnp.ones((2, 3))), np.full((2, 3), 1 / 3), rtol=1e-6)


def test_batches_of_gradients_and_gradients_of_batches():
    graph = fg.trace(lambda p, x: jnp.sum(model(p, x) ** 2), PARAMS, XS[0])
    per_example = fg.vmap(fg.grad(graph), (None, 0), axis_size=5)
    want = jax.vmap(jax.grad(lambda p, x: jnp.sum(model(p, x) ** 2)), (None, 0))(PARAMS, XS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), per_example(PARAMS, XS), want)


def test_a_graph_needs_the_size():
    with pytest.raises(ValueError, match="needs the size of the batch") as e:
        fg.vmap(fg.trace(model, PARAMS, XS[0]), (None, 0))
    assert str(e.value) == (
        "vmap of the graph model needs the size of the batch.\n  try     fg.vmap(graph, in_axes=..., axis_size=32)"
    )


def test_mismatched_sizes_are_named_by_argument():
    with pytest.raises(ValueError, match=r"params\['b'\]") as e:
        fg.vmap(model)({"w": jnp.ones((5, 4, 3)), "b": jnp.ones((2, 4))}, XS)
    assert "x" in str(e.value)
