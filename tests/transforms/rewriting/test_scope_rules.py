"""Rules for scopes: the gradient of a part of a model is overridden, and the model's code is not touched."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import funcgrad as fg

X = jnp.linspace(-1, 1, 6).reshape(2, 3)
PARAMS = {
    "encoder": jnp.linspace(-0.5, 0.5, 9).reshape(3, 3),
    "decoder": jnp.linspace(0.1, 0.9, 9).reshape(3, 3),
}


def layer(name, params, x):
    with jax.named_scope(name):
        return jnp.tanh(x @ params[name])


def loss(params, x):
    return jnp.sum(layer("decoder", params, layer("encoder", params, x)) ** 2)


def same(region, *values):
    return region(*values)


def frozen(region, *values):
    """The parameters of a scope get no gradient; what flows through it does."""
    fixed = (
        lax.stop_gradient(x) if path.startswith("params") else x for path, x in zip(region.paths, values, strict=True)
    )
    return region(*fixed)


def clipped(bound):
    """What flows back out of a scope is clipped."""

    def rule(region, *values):
        @jax.custom_vjp
        def f(*values):
            return region(*values)

        f.defvjp(lambda *values: jax.vjp(region, *values), lambda pull, ct: tuple(clip(x) for x in pull(ct)))
        return f(*values)

    clip = lambda x: jnp.clip(x, -bound, bound)
    return rule


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7), got, want)


@pytest.fixture(params=["function", "graph", "jit"])
def form(request):
    """A gradient with rules, of a function, of its Graph, or compiled."""

    def gradient(f, rules, *args, argnums=0):
        if request.param == "graph":
            return fg.grad(fg.trace(f, *args), argnums, rules=rules)(*args)
        derived = fg.grad(f, argnums, rules=rules)
        return (jax.jit(derived) if request.param == "jit" else derived)(*args)

    return gradient


# ------------------------------------------------------------------------------------------------ three uses


def test_a_frozen_scope(form):
    got = form(loss, {"encoder": frozen}, PARAMS, X)

    def by_hand(params, x):
        return loss({**params, "encoder": lax.stop_gradient(params["encoder"])}, x)

    assert_equal(got, jax.grad(by_hand)(PARAMS, X))
    assert not np.any(got["encoder"])
    through = form(loss, {"decoder": frozen}, PARAMS, X)
    assert_equal(through["encoder"], jax.grad(loss)(PARAMS, X)["encoder"])


def test_a_clipped_backward(form):
    got = form(loss, {"decoder": clipped(0.1)}, PARAMS, X)
    h, pull_encoder = jax.vjp(lambda p: layer("encoder", {"encoder": p}, X), PARAMS["encoder"])
    out, pull_decoder = jax.vjp(lambda h, p: layer("decoder", {"decoder": p}, h), h, PARAMS["decoder"])
    ct_h, ct_decoder = (jnp.clip(x, -0.1, 0.1) for x in pull_decoder(2 * out))
    assert_equal(got, {"decoder": ct_decoder, "encoder": pull_encoder(ct_h)[0]})


def test_straight_through_rounding(form):
    """Of a primitive anywhere, and of the rounding in one scope only."""

    def quantised(x):
        with jax.named_scope("quantise"):
            q = jnp.round(4 * x) / 4
        return jnp.sum(q * jnp.round(x))

    through = lambda eqn, x: x + lax.stop_gradient(lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN) - x)
    q = jnp.round(4 * X) / 4
    assert_equal(form(quantised, {lax.round_p: through}, X), q + jnp.round(X))

    straight = lambda region, x: x + lax.stop_gradient(region(x) - x)
    assert_equal(form(quantised, {"quantise": straight}, X), jnp.round(X))


def test_recomputed_scopes():
    """`jax.checkpoint` from outside of the model."""
    recomputed = lambda region, *values: jax.checkpoint(region)(*values)
    graph = fg.trace(loss, PARAMS, X)
    assert fg.halves(graph, rules={"*coder": recomputed}).bytes < fg.halves(graph).bytes
    assert_equal(fg.grad(loss, rules={"*coder": recomputed})(PARAMS, X), jax.grad(loss)(PARAMS, X))


# ------------------------------------------------------------------------------------------------ what a rule is given


def seen_by(f, pattern, *args):
    regions = []

    def look(region, *values):
        assert len(values) == len(region.paths) == len(region.in_avals)
        regions.append(fg.verify(region))
        return region(*values)

    got = jax.jit(fg.grad(f, rules={pattern: look}))(*args)
    assert_equal(got, jax.jit(jax.grad(f))(*args))
    return regions


def test_a_region_is_a_graph_that_says_where_its_values_come_from():
    (region,) = seen_by(loss, "decoder", PARAMS, X)
    assert region.name == "decoder"
    assert region.paths == ("encoder/tanh", "params['decoder']")
    assert [eqn.primitive.name for eqn in region.eqns] == ["dot_general", "tanh"]
    assert [a.str_short() for a in region.out_avals] == ["float32[2,3]"]


def stacked(params, x):
    def body(x, w):
        with jax.named_scope("block"), jax.named_scope("inner"):
            x = jnp.sin(x @ w)
        return x + 1, jnp.sum(x)

    def branch(x):
        with jax.named_scope("branch"):
            return jnp.cos(x)

    with jax.named_scope("stack"):
        x, sums = lax.scan(jax.checkpoint(body), x, jnp.stack([params["encoder"], params["decoder"]]))
    x = lax.cond(x[0, 0] > 0, branch, lambda x: x, x)
    x = jax.jit(lambda x: layer("decoder", params, x))(x)
    return jnp.sum(x) + jnp.sum(sums)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("block", ["stack/block"]),
        ("inner", ["stack/block/inner"]),
        ("block/inner", ["stack/block/inner"]),
        ("stack", ["stack"]),
        ("stack/block", ["stack/block"]),
        ("branch", ["branch"]),
        ("decoder", ["decoder"]),
        ("*r", ["stack/block/inner", "decoder"]),
    ],
)
def test_scopes_at_any_depth(pattern, names):
    regions = seen_by(stacked, pattern, PARAMS, X)
    assert [r.name for r in regions] == names


def test_the_paths_of_parameters_reach_into_loops():
    def body(x, w):
        with jax.named_scope("block"):
            return jnp.sin(x @ w), None

    def f(params, x):
        return jnp.sum(lax.scan(body, x, params["w"])[0])

    (region,) = seen_by(f, "block", {"w": jnp.ones((2, 3, 3))}, X)
    assert region.paths == ("x", "params['w']")
    assert not np.any(fg.grad(f, rules={"block": frozen})({"w": jnp.ones((2, 3, 3))}, X)["w"])


def test_a_scope_with_several_outputs_and_inner_uses():
    def f(x):
        with jax.named_scope("two"):
            y = jnp.sin(x)
            z = jnp.cos(y) + y
        return jnp.sum(y * z)

    (region,) = seen_by(f, "two", X)
    assert len(region.out_avals) == 2
    assert_equal(fg.grad(f, rules={"two": lambda region, x: tuple(2 * y for y in region(x))})(X), 4 * jax.grad(f)(X))


def test_a_scope_entered_again_is_a_region_of_its_own():
    def f(x):
        for _ in range(2):
            with jax.named_scope("cell"):
                x = jnp.sin(x)
            x = 2 * x
        return jnp.sum(x)

    assert len(seen_by(f, "cell", X)) == 2


def test_the_first_pattern_that_matches_counts():
    doubled, tripled = (lambda region, *values, k=k: region(*values) * k for k in (2.0, 3.0))
    linear = lambda x: jnp.sum(layer("encoder", PARAMS, x)) + jnp.sum(layer("decoder", PARAMS, x))
    got = fg.grad(linear, rules={"enc*": doubled, "*coder": tripled})(X)
    encoder, decoder = (jax.grad(lambda x, n=n: jnp.sum(layer(n, PARAMS, x)))(X) for n in ("encoder", "decoder"))
    assert_equal(got, 2 * encoder + 3 * decoder)


def test_rules_of_primitives_hold_inside_of_scopes_too():
    rules = {"encoder": same, lax.tanh_p: lambda eqn, x: lax.sin(x)}
    by_hand = lambda params: jnp.sum(jnp.sin(jnp.sin(X @ params["encoder"]) @ params["decoder"]) ** 2)
    assert_equal(fg.grad(loss, rules=rules)(PARAMS, X), jax.grad(by_hand)(PARAMS))


# ------------------------------------------------------------------------------------------------ as JAX, otherwise


def test_arguments_and_aux_that_are_no_arrays():
    def f(params, x, *, mode, activation=jnp.tanh):
        assert mode == "train"
        with jax.named_scope("body"):
            x = activation(x @ params["encoder"])
        return jnp.sum(x), {"mode": mode, "x": x, "f": activation, "none": None}

    got, aux = fg.grad(f, has_aux=True, rules={"body": same})(PARAMS, X, mode="train")
    want, want_aux = jax.grad(f, has_aux=True)(PARAMS, X, mode="train")
    assert_equal(got, want)
    assert (aux["mode"], aux["f"], aux["none"]) == ("train", want_aux["f"], None)
    np.testing.assert_array_equal(aux["x"], want_aux["x"])


def test_python_numbers_stay_python_numbers():
    def power(x, n):
        with jax.named_scope("power"):
            return x**n if n > 1 else x

    assert fg.grad(power, rules={"power": same})(3.0, 2) == 6.0


@pytest.mark.parametrize(
    "wrap", [jax.jit, jax.vmap, jax.jacfwd, jax.linearize, jax.checkpoint], ids=lambda w: w.__name__
)
def test_under_transforms(wrap):
    with_rules = fg.differentiable(lambda x: layer("encoder", PARAMS, x), rules={"encoder": same})
    plain = lambda x: layer("encoder", PARAMS, x)
    if wrap is jax.linearize:
        assert_equal(jax.linearize(with_rules, X)[1](X), jax.linearize(plain, X)[1](X))
    else:
        assert_equal(wrap(with_rules)(X), wrap(plain)(X))


def test_vjp_jvp_and_hessian_take_them():
    by_hand = lambda x: lax.stop_gradient(layer("encoder", PARAMS, x)) * x
    f = lambda x: layer("encoder", PARAMS, x) * x
    rules = {"encoder": lambda region, *values: lax.stop_gradient(region(*values))}
    assert_equal(fg.vjp(f, X, rules=rules)[1](X), jax.vjp(by_hand, X)[1](X))
    assert_equal(fg.jvp(f, (X,), (X,), rules=rules), jax.jvp(by_hand, (X,), (X,)))
    assert_equal(fg.hessian(lambda x: jnp.sum(f(x)), rules=rules)(X), jax.hessian(lambda x: jnp.sum(by_hand(x)))(X))


def test_models_of_the_library():
    model = fg.nn.serial(fg.nn.dense(4), jnp.tanh, fg.nn.dense(1))
    params, _ = model.init(jax.random.key(0), X)
    f = lambda params, x: jnp.sum(model(params, x) ** 2)
    got = fg.grad(f, rules={"dense_0": frozen})(params, X)
    want = jax.grad(f)(params, X)
    assert not np.any(got["dense_0"]["w"])
    assert_equal(got["dense_1"], want["dense_1"])


# ------------------------------------------------------------------------------------------------ errors


def test_a_scope_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="'decodr'") as info:
        fg.grad(loss, rules={"decodr": frozen})(PARAMS, X)
    assert str(info.value).startswith("rules= names the scope 'decodr', which loss does not have.")
    assert "its scopes are encoder, decoder" in str(info.value)


def test_a_scope_that_no_rule_reaches_is_named_with_the_reason():
    def f(x):
        with jax.named_scope("outer"), jax.named_scope("inner"):
            return jnp.sin(x)

    @jax.custom_jvp
    def with_rule(x):
        return f(x)

    with_rule.defjvp(lambda primals, tangents: (with_rule(*primals), tangents[0]))
    for program, rules, reason in (
        (f, {"outer": same, "inner": same}, "'inner', which lies in what 'outer' names."),
        (lambda x: lax.scan(lambda c, _: (f(c), None), x, None, 2)[0], {"inner": same}, None),
        (lambda x: with_rule(x), {"inner": same}, "'inner', which lies in a function with its own derivative rule"),
    ):
        if reason:
            with pytest.raises(fg.OptionError, match=reason):
                fg.differentiable(program, rules=rules)(1.0)
        else:
            fg.differentiable(program, rules=rules)(1.0)


def test_a_scope_that_nothing_leaves():
    def f(x):
        with jax.named_scope("unused"):
            jnp.sin(x)
        with jax.named_scope("printed"):
            jax.debug.callback(lambda x: None, x)
        return x

    assert fg.grad(f, rules={"unused": same, "printed": lambda region, *values: region(*values)})(1.0) == 1


def test_numpy_arrays_are_arrays():
    seen = []

    def f(x, mask):
        with jax.named_scope("masked"):
            return jnp.sum(x * mask)

    fg.grad(f, rules={"masked": lambda region, *values: seen.append(region.paths) or region(*values)})(
        X, np.ones(3, np.float32)
    )
    assert seen == [("mask", "x")]


def test_what_a_rule_returns_is_checked_at_the_users_line():
    with pytest.raises(fg.GraphError) as info:
        fg.grad(loss, rules={"encoder": lambda region, *values: region(*values)[0]})(PARAMS, X)
    assert str(info.value).startswith("the rule of the scope 'encoder' returned float32[3] for float32[2,3].")
    assert "test_scope_rules.py" in str(info.value)


@pytest.mark.parametrize("table", [{"encoder": None}, {"": frozen}])
def test_what_is_no_rule_is_named(table):
    with pytest.raises(TypeError, match="rules= takes rules as scope pattern -> function"):
        fg.grad(loss, rules=table)
