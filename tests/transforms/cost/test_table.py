"""What programs cost: XLA's own counts of the unrolled program, counts derived by hand, and the bytes that are alive."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import funcgrad as fg

# ------------------------------------------------------------------------------------------------ by hand

W, X = jnp.full((8, 8), 0.1), jnp.ones((4, 8))
PRODUCT = 2 * 4 * 8 * 8


def test_a_gradient_and_its_two_passes():
    def loss(w, x):
        with jax.named_scope("layer"):
            return jnp.sum(x @ w)

    gradient = fg.cost(fg.value_and_grad(fg.trace(loss, W, X)))
    assert (gradient.forward.by("primitive")[0].work.flops, gradient.backward.flops) == (PRODUCT, PRODUCT)
    assert gradient.flops == gradient.forward.flops + gradient.backward.flops
    assert [g.name for g in gradient.by("scope")] == ["layer", "transpose/layer"]
    assert fg.cost(fg.grad(fg.trace(loss, W, X))).flops == PRODUCT  # the value is not needed


def test_what_is_computed_again_counts_again():
    layer = lambda x: jnp.sin(jnp.sin(x @ W) @ W)
    loss = lambda f: lambda x: jnp.sum(f(x))
    count = lambda f: fg.cost(jax.value_and_grad(loss(f)), X)
    assert count(jax.checkpoint(layer)).flops == count(layer).flops + 2 * PRODUCT
    assert count(jax.checkpoint(layer)).backward.flops == count(layer).backward.flops + 2 * PRODUCT


def test_parameters():
    def model(params, x):
        with jax.named_scope("body"):
            x, _ = lax.scan(lambda x, w: (x @ w, None), x, params["layers"])
        return x @ params["head"] @ params["head"].T

    params = {"layers": jnp.ones((3, 8, 8)), "head": jnp.ones((8, 2)), "unused": jnp.ones(9), "step": jnp.int32(1)}
    cost = fg.cost(model, params, X)
    assert cost.parameters == 3 * 64 + 16
    assert {g.name: g.parameters for g in cost.by("scope")} == {"body": 3 * 64, "": 16}


def test_wrong_uses_are_refused():
    loop = lambda x: lax.while_loop(lambda x: x < 9, lambda x: x * 2, x)
    for trips in (-1, {"while": -1}):
        with pytest.raises(fg.OptionError, match="at least 0"):
            fg.cost(loop, 1.0, trips=trips)
    with pytest.raises(TypeError, match='trips="measured" runs <lambda>, and got no values for x'):
        fg.cost(loop, jax.ShapeDtypeStruct((), "float32"), trips="measured")
    with pytest.raises(TypeError, match="cost takes a function or a Graph, and got Lowered"):
        fg.cost(jax.jit(loop).lower(1.0))


# ------------------------------------------------------------------------------------------------ the result


def two_scopes(params, x):
    with jax.named_scope("a"):
        with jax.named_scope("b"):
            x = x @ params
        x = jnp.tanh(x)
    return x @ params @ params


def test_folding():
    cost = fg.cost(two_scopes, W, X)
    assert [(g.name, g.work.flops) for g in cost.by("scope")] == [("", 2 * PRODUCT), ("a/b", PRODUCT), ("a", 0)]
    assert [(g.name, round(g.share, 2)) for g in cost.by("scope", depth=1)] == [("", 0.67), ("a", 0.33)]
    lines = cost.by("line")
    assert all("test_table.py:" in g.name and "two_scopes" in g.name for g in lines)
    assert len(lines) == 3
    for what in ("scope", "line", "primitive", "equation"):
        assert sum(g.work.flops for g in cost.by(what)) == cost.flops
        assert sum(g.share for g in cost.by(what)) == pytest.approx(1)
    with pytest.raises(ValueError, match="grouped by scope, line, primitive, equation, and not by 'file'"):
        cost.by("file")


def test_the_dict_is_json():
    fields = json.loads(json.dumps(fg.cost(two_scopes, W, X).dict()))
    assert (fields["flops"], fields["transcendentals"], fields["scope"]["a/b"]["work"]["flops"]) == (
        3 * PRODUCT,
        32,
        PRODUCT,
    )


def test_the_text():
    machine = fg.Machine("a machine", 1e9, 1e9)
    head, peak, columns, *rows = fg.cost(two_scopes, W, X).text(machine=machine).splitlines()
    assert head == "two_scopes: 1.5 kFLOP, 32 transcendentals, 1.2 KiB read, 512 B written, 64 parameters"
    assert peak.startswith("peak 640 B at ")
    assert columns.split() == ["share", "FLOP", "transc.", "read", "written", "params", "time", "bound", "by", "scope"]
    assert [row.split()[0] for row in rows] == ["66.7%", "33.3%", "0.0%"]
    assert rows[1].endswith("512 ns    compute  a/b") or rows[1].endswith("512 ns  bandwidth  a/b")


def test_a_row_for_each_of_many_equations():
    def f(x):
        for _ in range(500):
            x = jnp.sin(x) * x
        return x

    cost = fg.cost(f, X)
    assert (cost.flops, cost.transcendentals) == (500 * 32, 500 * 32)
    assert len(cost.rows) == len(cost.timeline().live_bytes) == 1000
