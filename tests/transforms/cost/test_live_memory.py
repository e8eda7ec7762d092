"""The timeline: which bytes are alive at which equation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import funcgrad as fg


def test_the_timeline_names_what_a_scan_stacks():
    def layer(x, w):
        with jax.named_scope("layer"):
            return jnp.tanh(x @ w), None

    f = lambda w, x: jnp.sum(lax.scan(layer, x, w)[0])
    owners = fg.cost(fg.value_and_grad(f), jnp.ones((12, 8, 8)), jnp.ones((256, 8))).timeline().owners
    kept = [o for o in owners if o.type == "f32[12,256,8]"]
    assert any(o.path.startswith("layer/") and "(test_the_timeline" in o.line for o in kept)


def test_the_timeline_of_a_chain():
    """x [1 KiB] stays; each value lives until it is read."""
    x = jax.ShapeDtypeStruct((256,), np.float32)

    def f(x):
        a = jnp.sin(x)
        b = jnp.concatenate([a, a, a])
        return jnp.sum(b) + a[0]

    line = fg.cost(f, x).timeline()
    assert max(line.live_bytes) == line.peak.live_bytes == fg.cost(f, x).peak_bytes
    assert line.live_bytes[:3] == (2048, 2048 + 3072, 2048 + 3072 + 4)
    assert line.argument_bytes == 1024
    assert [(o.path, o.type, o.bytes) for o in line.owners[:3]] == [
        ("concatenate", "f32[768]", 3072),
        *sorted([("x", "f32[256]", 1024), ("sin", "f32[256]", 1024)], reverse=True),
    ]
    assert "test_live_memory.py" in line.owners[0].line
    assert "peak 5.0 KiB at equation 3 of" in str(line)


def test_the_timeline_of_a_loop_holds_a_body_and_the_stack():
    xs = jax.ShapeDtypeStruct((10, 256), np.float32)

    def f(xs):
        return lax.scan(lambda c, x: (c, jnp.sin(jnp.concatenate([x, x]))), 0.0, xs)[1]

    line = fg.cost(f, xs).timeline()
    stack, body = 10 * 2048, 1024 + 2048 + 2048  # the slice of xs, the concatenation, its sine
    assert line.peak.live_bytes == pytest.approx(10 * 1024 + stack + body, abs=8)
    assert line.peak.primitive == "sin"


def test_calls_and_views_hold_nothing_of_their_own():
    x = jax.ShapeDtypeStruct((256,), np.float32)
    plain = fg.cost(lambda x: jnp.cos(jnp.sin(x)), x)
    inside = fg.cost(lambda x: jax.jit(lambda y: jnp.cos(y.reshape(16, 16)))(jax.jit(jnp.sin)(x)).reshape(-1), x)
    assert plain.timeline().live_bytes == inside.timeline().live_bytes


def test_recomputing_lowers_the_peak():
    layer = lambda x: jnp.sin(jnp.cos(jnp.sin(jnp.cos(x))))
    stack = lambda f: jax.grad(lambda x: jnp.sum(f(f(f(f(x))))))
    x = jax.ShapeDtypeStruct((1024,), np.float32)
    assert fg.cost(stack(jax.checkpoint(layer)), x).peak_bytes < fg.cost(stack(layer), x).peak_bytes
