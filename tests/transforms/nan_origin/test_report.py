"""`nan_origin`: thirty faults found to the line, the iteration and the lane; and what is none."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import funcgrad as fg

from ... import faults
from ...corpus import CORPUS
from ...faults import FAULTS
from ...sampling import sampled

X = jnp.array([4.0, 0.0])
WAYS = {"function": lambda f: f, "jax.jit": jax.jit, "fg.jit": fg.jit}


def root(x):
    return jnp.where(x > 0, jnp.sqrt(x), 0.0).sum()


COMPILED = "scan_in_scan", "while_in_lane", "custom_backward", "rematerialised", "masked_root", "branch"


@pytest.mark.parametrize(
    ("fault", "way"),
    [
        pytest.param(fault, way, marks=() if way == "function" or fault.name in COMPILED else pytest.mark.slow)
        for fault, way in itertools.product(FAULTS, WAYS)
    ],
    ids=str,
)
def test_thirty_faults(fault, way):
    origin = fg.nan_origin(WAYS[way](fault.program), *fault.args)
    assert origin.line.rsplit(" ", 1)[0] == f"{faults.__file__}:{fault.line}"
    place = origin.kind, origin.phase, origin.derivative_of, origin.iterations, origin.lanes, origin.index
    assert place == (fault.kind, fault.phase, fault.of, fault.iterations, fault.lanes, fault.index)
    assert origin.argument is None
    value = origin.result.values[0]
    assert np.isnan(value) if fault.kind == "nan" else np.isinf(value)
    assert origin.remedy


def test_thirty():
    assert len({fault.name for fault in FAULTS}) == 30


# ------------------------------------------------------------------------------------------------ what it takes


@pytest.mark.parametrize(
    "gradient",
    [
        jax.grad,
        fg.value_and_grad,
        *(pytest.param(f, marks=pytest.mark.slow) for f in (fg.grad, jax.value_and_grad, jax.jacrev, jax.hessian)),
    ],
)
def test_gradients(gradient):
    for f in (gradient(root), jax.jit(gradient(root)), gradient(jax.jit(root))):
        origin = fg.nan_origin(f, X)
        assert (origin.derivative_of, origin.index, origin.result.shape) == ("sqrt", (1,), (2,))


def test_graphs():
    graph = fg.trace(root, X)
    for g in (fg.grad(graph), jax.jit(fg.grad(graph)), jax.grad(graph)):
        origin = fg.nan_origin(g, X)
        assert (origin.derivative_of, origin.index, origin.phase) == ("sqrt", (1,), "backward")
        assert "test_report.py" in origin.line


def test_static_arguments_branches_and_keywords():
    def f(x, mode, *, scale, flag=True):
        if x.sum() > 1 and float(x[0]) > 0 and mode == "log":
            return scale * jnp.log(x) if flag else x
        return x

    assert fg.nan_origin(f, X, "log", scale=2.0).primitive == "log"
    assert fg.nan_origin(f, X, "exp", scale=2.0) is None
    assert fg.nan_origin(f, X, "log", scale=2.0, flag=False) is None
    jitted = jax.jit(lambda x, mode: f(x, "none", scale=1.0) if mode else jnp.log(x), static_argnums=1)
    assert fg.nan_origin(functools.partial(jitted, mode=False), X).primitive == "log"


def test_random_keys_and_scopes():
    def f(key, x):
        with jax.named_scope("noisy"), jax.named_scope("log"):
            return jnp.log(-jax.random.uniform(key, x.shape) * x)

    origin = fg.nan_origin(jax.jit(f), jax.random.key(0), jnp.ones(3))
    assert (origin.primitive, origin.scope, origin.index) == ("log", "noisy/log", (0,))


def test_effects_run_again_and_donated_arguments_stay(capsys):
    def f(x):
        jax.debug.print("x {}", x[0])
        return jnp.log(x)

    x = jnp.array([0.0, 1.0])
    assert fg.nan_origin(jax.jit(f, donate_argnums=0), x).index == (0,)
    assert x.sum() == 1.0
    jax.effects_barrier()
    assert capsys.readouterr().out.count("x 0.0") == 2


def test_references():
    def f(x):
        ref = jax.new_ref(x)
        ref[0] = 3.0
        return jnp.log(ref[...]).sum()

    assert fg.nan_origin(f, X).primitive == "log"
    assert fg.nan_origin(jax.jit(f), X).primitive == "log"


def test_what_is_no_call():
    with pytest.raises(fg.ArgumentError, match="nan_origin takes a function, and got int"):
        fg.nan_origin(3)
    with pytest.raises(fg.ArgumentError, match="nan_origin of root is called while JAX traces"):
        jax.jit(lambda x: fg.nan_origin(root, x))(X)


# ------------------------------------------------------------------------------------------------ what is a fault


def test_what_is_finite_has_no_fault():
    assert fg.nan_origin(root, X) is None
    assert fg.nan_origin(jax.grad(root), X + 1) is None
    assert fg.nan_origin(lambda: None) is None
    assert fg.nan_origin(lambda: (3, "text", jax.random.key(0), True, 1.0)) is None


def test_while_jax_watches_for_nan():
    with jax.debug_nans(True), jax.debug_infs(True):
        assert fg.nan_origin(jax.jit(jnp.log), X).index == (1,)


def test_infinities_that_are_meant():
    def f(x):
        weights = jax.nn.softmax(jnp.where(jnp.arange(3) < 2, x, -jnp.inf))
        least = lax.fori_loop(0, 3, lambda k, least: jnp.minimum(least, x[k]), jnp.inf)
        return weights, least, jnp.where(x > 0, jnp.log(x), 0.0)

    assert fg.nan_origin(jax.jit(f), jnp.array([1.0, 0.0, 2.0])) is None


def test_the_fault_that_reaches_the_result():
    def f(x):
        logs = jnp.where(x > 0, jnp.log(x), 0.0)  # infinite where it is not used
        both = jnp.concatenate([logs, 1 / x])
        return both.reshape(2, 2)[::-1].T + 1

    origin = fg.nan_origin(f, X)
    assert (origin.primitive, origin.index, origin.output) == ("div", (1,), "result[1, 0]")


def test_nan_counts_before_infinity():
    origin = fg.nan_origin(lambda x: {"a": 1 / x, "b": jnp.log(-x - 1)}, X)
    assert (origin.primitive, origin.output_kind, origin.output) == ("log", "nan", "result['b'][0]")


def test_arguments():
    params = {"w": [jnp.ones(2), jnp.array([1.0, jnp.nan])]}
    f = lambda params, x: jnp.sum(params["w"][0] * x) + params["w"][1]
    for way in WAYS.values():
        origin = fg.nan_origin(way(f), params, 2.0)
        assert (origin.argument, origin.kind, origin.primitive) == ("params['w'][1]", "nan", "add")
        assert "holds nan" in str(origin)
    returned = fg.nan_origin(lambda x, y: y, 1.0, jnp.array([0.0, jnp.inf]))
    assert (returned.argument, returned.primitive, returned.index) == ("y", None, (1,))
    assert fg.nan_origin(jnp.sin, np.array([1, np.nan], np.float32)).argument == "x"
    assert fg.nan_origin(jnp.sin, float("inf")).argument == "x"
    assert repr(fg.nan_origin(lambda: np.nan)) == "NanOrigin(nan: a constant)"


def test_an_infinite_argument_of_which_nan_is_made():
    origin = fg.nan_origin(jax.jit(lambda x, y: jnp.sin(y) + x), jnp.zeros(2), jnp.array([1.0, jnp.inf]))
    assert (origin.argument, origin.kind, origin.primitive, origin.index) == ("y", "inf", "sin", (1,))
    assert "y holds inf" in str(origin)


def test_constants():
    table = jnp.array([1.0, jnp.nan])
    origin = fg.nan_origin(jax.jit(lambda x: x + table), jnp.zeros(2))
    assert (origin.argument, origin.primitive, origin.operands[1].name) == (None, "add", "constant")


def test_nan_made_of_an_infinity():
    f = lambda x: jnp.exp(x) - jnp.exp(2 * x)
    origin = fg.nan_origin(f, jnp.float32(100))
    assert (origin.primitive, origin.kind, origin.output_kind) == ("exp", "inf", "nan")
    assert origin.then.startswith("sub made nan of it at ")


# ------------------------------------------------------------------------------------------------ loops


def test_scans_that_run_backward_count_as_their_slices():
    f = lambda x: lax.scan(lambda c, t: (c + jnp.log(t), c), x, jnp.array([1.0, 0.0, 2.0]), reverse=True)
    for k, way in enumerate((lambda x: f(x)[0], lambda x: f(x)[1])):
        origin = fg.nan_origin(way, 0.0)
        assert (origin.primitive, origin.iterations) == ("log", (("scan", 1),)), k


def test_what_came_into_a_loop():
    f = lambda x: lax.fori_loop(0, 3, lambda k, x: x * 0.5, 1 / x)
    origin = fg.nan_origin(jax.jit(f), 0.0)
    assert (origin.primitive, origin.iterations) == ("div", ())
    body = lambda state: (state[0] + 1, state[1] - state[2], jnp.where(state[0] == 2, jnp.inf, state[2]))
    origin = fg.nan_origin(lambda x: lax.while_loop(lambda s: s[0] < 6, body, (0, x, x)), 1.0)
    assert origin.iterations[0][1] in (2, 4)


def test_nan_that_moves_through_a_loop():
    """One element further with each iteration: it was made in the first."""

    def f(x):
        return lax.scan(
            lambda x, k: (jnp.roll(x.at[0].set(jnp.where(k == 0, jnp.log(x[0]), 0.0)), 1), None), x, jnp.arange(5)
        )

    origin = fg.nan_origin(f, -jnp.ones(8))
    assert (origin.primitive, origin.iterations, origin.output) == ("log", (("scan", 0),), "result[0][5]")


def test_gradient_of_a_while_of_lanes():
    def f(x):
        body = lambda s: (s[0] + 1, jnp.sqrt(s[1] * jnp.abs(s[0] - 2)) + 1)
        return lax.while_loop(lambda s: s[0] < 1 + 2 * x, body, (0.0, x))[1]

    origin = fg.nan_origin(jax.jit(jax.vmap(fg.grad(f))), jnp.array([0.2, 1.0]))
    assert (origin.derivative_of, origin.iterations, origin.lanes) == ("sqrt", (("while", 2),), (1,))


# ------------------------------------------------------------------------------------------------ lanes


def test_lanes_of_any_axis():
    w = jnp.ones((3, 2))
    xs = jnp.ones((2, 5)).at[:, 4].set(-1.0)
    for f in (jax.vmap(lambda x: jnp.log(w @ x), 1), jax.jit(jax.vmap(lambda x: jnp.log(w @ x), 1, 1))):
        assert fg.nan_origin(f, xs).lanes == (4,)


def test_lanes_in_lanes():
    f = jax.vmap(jax.vmap(lambda x, y: jnp.log(x + y), (None, 0)), (0, None))
    origin = fg.nan_origin(jax.jit(f), jnp.array([2.0, 1.0]), jnp.array([0.0, 1.0, -1.5]))
    assert origin.lanes == (1, 2)
    for order in (lambda f: jax.vmap(jax.grad(f)), lambda f: jax.grad(lambda xs: jax.vmap(f)(xs).sum())):
        origin = fg.nan_origin(order(root), jnp.array([[1.0, 2.0], [3.0, 4.0], [1.0, 0.0]]))
        assert (origin.lanes, origin.index) == ((2,), (2, 1))


def test_lanes_that_are_not_known():
    def f(x):
        return jax.vmap(jnp.log)(x) if float(x[0]) > 0 else x

    assert fg.nan_origin(f, X).lanes is None
    assert fg.nan_origin(jnp.log, X).lanes is None


# ------------------------------------------------------------------------------------------------ every program

QUICK = (
    "custom_nodes",
    "scan_tree_carry",
    "cond",
    "custom_vjp_in_loops",
    "vmap_collectives",
)
# NaN that goes through integers, through a comparison, or through a reference.
LOST = ("bitcast", "random_gamma", "scan_nested", "branches_in_loops", "references", "references_in_loops")


@pytest.mark.parametrize("form", ["function", "jit", "grad"])
@pytest.mark.parametrize("p", sampled(CORPUS, QUICK))
def test_programs_of_the_corpus(p, form):
    """None is at fault; and where an argument holds NaN that reaches a result, it is named."""
    if form == "grad" and (p.diff is None or "grad" in p.lacks):
        pytest.skip("JAX has no gradient of it")
    total = lambda *args: sum(jnp.sum(x.astype(np.float32)) for x in jax.tree.leaves(p.f(*args)) if is_float(x))
    f = {"function": p.f, "jit": jax.jit(p.f), "grad": jax.jit(fg.grad(total, p.diff, allow_int=True))}[form]
    assert fg.nan_origin(f, *p.args) is None
    leaves, tree = jax.tree.flatten(p.args)
    place = next((k for k, x in enumerate(leaves) if is_float(x) and np.size(x)), None)
    if place is not None:
        x = jnp.asarray(leaves[place])
        leaves[place] = x.ravel().at[-1].set(jnp.nan).reshape(x.shape)
        origin = fg.nan_origin(f, *tree.unflatten(leaves))
        assert origin is None or origin.argument or p.name in LOST


def is_float(x):
    return jnp.issubdtype(jnp.result_type(x), np.floating)


# ------------------------------------------------------------------------------------------------ text


def test_text():
    origin = fg.nan_origin(jax.jit(jax.grad(root)), X)
    head, *rows = str(origin).split("\n")
    assert head == "root returned nan at result[1]: div made inf"
    rows = [row.split(maxsplit=1) for row in rows]
    assert [row[0] for row in rows] == ["at", "pass", "operand", "operand", "result", "then", "try"]
    assert rows[0][1].endswith("(root), in the derivative of sqrt")
    assert [row[1] for row in rows[1:5]] == ["backward", "0.5 of f32[]", "0 at [1] of f32[2]", "inf at [1] of f32[2]"]
    assert "jnp.where(ok, jnp.sqrt(jnp.where(ok, x, 1.0)), 0.0)" in rows[-1][1]
    assert repr(origin).startswith("NanOrigin(inf: div at ")


def test_text_of_loops_and_long_operands():
    def f(ws, x):
        return lax.scan(lambda x, w: (jnp.exp(w @ x), None), x, ws)[0]

    text = str(fg.nan_origin(jax.jit(f), jnp.ones((6, 8, 8)), jnp.ones(8)))
    assert "  iteration  scan 1\n" in text
    text = str(fg.nan_origin(lambda w, x: w @ x, jnp.full((8, 8), 1e30), jnp.full(8, 1e30)))
    assert "1e+30 at [0, 0], 1e+30 at [0, 1], 1e+30 at [0, 2], 1e+30 at [0, 3], and 4 more of w: f32[8,8]" in text
    assert "float32 ends at 3.4e+38" in text


def test_a_fault_among_many_equations():
    def loss(ws, x):
        for k, w in enumerate(ws):
            x = x + jnp.tanh(x @ w)
            x = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True))
            x = jnp.where(x > 1e9, x, x - x) if k == 3 else x
        return x.sum()

    f, args = jax.jit(jax.grad(loss)), (jnp.ones((8, 8, 8)), jnp.ones((16, 8)))
    assert sum(1 for _ in fg.walk(fg.trace(f, *args))) > 200
    assert fg.nan_origin(f, *args).phase == "backward"


def test_constants_that_hold_nan_are_the_fault():
    c = jnp.array([1.0, jnp.nan, 2.0])
    assert "closes over" in fg.nan_origin(lambda x: x * c, jnp.ones(3)).remedy


def test_masks_of_inverse_functions():
    origin = fg.nan_origin(jax.grad(lambda x: jnp.sum(jnp.where(x < 1, jnp.arccos(x), 0.0))), jnp.array([0.5, 1.0]))
    assert "jnp.arccos(jnp.where(ok, x, 0.0))" in origin.remedy
