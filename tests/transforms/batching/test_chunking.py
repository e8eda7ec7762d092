"""`vmap`, `jacfwd`, `jacrev` and `hessian` in chunks: JAX's results, within a budget, chosen once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from funcgrad.transforms.batching import chunking
from jax import lax

import funcgrad as fg

from ...checks import (
    assert_close_values,
    assert_near,
    assert_same_error,
    assert_same_opcodes,
    counted_compilations,
    raised_by,
    temp_bytes,
)

W = jnp.sin(jnp.arange(12.0)).reshape(4, 3)
XS = jnp.cos(jnp.arange(21.0)).reshape(7, 3)
WS = [jnp.sin(jnp.arange(64.0 * 64) + k).reshape(64, 64) / 8 for k in range(3)]
X = jnp.sin(jnp.arange(64.0))


def net(x):
    for w in WS:
        x = jnp.tanh(w @ x)
    return x


def square(x):
    return jnp.sum(net(x) ** 2)


def heavy(ws, x):
    """The squared norm of the gradient of one example: makes matrices, and returns a number."""

    def loss(ws):
        y = x
        for w in ws:
            y = jnp.tanh(y @ w)
        return jnp.sum(y**2)

    return sum(jnp.sum(g**2) for g in jax.grad(loss)(ws))


BATCH = jnp.sin(jnp.arange(64.0 * 100)).reshape(100, 64)


class Counted:
    """A function, and how often it was called."""

    def __init__(self, f):
        self.f, self.calls, self.__name__ = f, 0, f.__name__

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.f(*args, **kwargs)


# ------------------------------------------------------------------------------------------------ chunks by hand


@pytest.mark.parametrize("chunk", [3, pytest.param(1, marks=pytest.mark.slow), pytest.param(7, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("in_axes", "out_axes", "args"),
    [
        ((None, 0), 0, (W, XS)),
        ((None, 1), 1, (W, XS.T)),
        ((None, -1), -1, (W, XS.T)),
        ([None, 0], -2, (W, XS)),
        ((2, None), 0, (jnp.stack([W * k for k in range(7)], 2), XS[0])),
        (0, 1, (jnp.stack([W * k for k in range(7)]), XS)),
    ],
)
def test_axes(in_axes, out_axes, args, chunk):
    f = lambda w, x: w @ x
    mapped = fg.vmap(f, in_axes, out_axes, chunk=chunk)
    assert_close_values(
        mapped(*args), jax.vmap(f, tuple(in_axes) if isinstance(in_axes, list) else in_axes, out_axes)(*args)
    )


@pytest.mark.parametrize("chunk", [2, 7])
def test_trees_kwargs_and_outputs_without_an_axis(chunk):
    def f(p, x, *, scale):
        return {"y": [p["w"] @ x["a"] * scale, x["b"]], "w": p["w"] * 2, "none": None}

    args = {"w": W, "b": None}, {"a": XS.T, "b": jnp.arange(7)}
    axes = dict(in_axes=(None, {"a": 1, "b": 0}), out_axes={"y": [-1, 0], "w": None, "none": 0})
    want = jax.vmap(f, **axes)(*args, scale=jnp.arange(7.0))
    assert_close_values(fg.vmap(f, **axes, chunk=chunk)(*args, scale=jnp.arange(7.0)), want)


def test_types_are_those_of_vmap():
    def f(key, x):
        return jax.random.fold_in(key, x), x > 2, 2.0, x * 1.0, lax.complex(1.0, 2.0), jax.random.normal(key, (2,))

    args = jax.random.split(jax.random.key(0), 7), jnp.arange(7)
    with jax.numpy_dtype_promotion("standard"):
        got, want = fg.vmap(f, chunk=3)(*args), jax.vmap(f)(*args)
    assert [jax.typeof(x) for x in got] == [jax.typeof(x) for x in want]
    np.testing.assert_array_equal(*(jax.random.key_data(x[0]) for x in (got, want)))
    assert_close_values(got[1:], want[1:])


@pytest.mark.parametrize("size", [5, 7])
def test_no_mapped_argument(size):
    f = lambda x: x * 2
    mapped = fg.vmap(f, None, axis_size=size, chunk=2)
    assert_close_values(mapped(XS), jax.vmap(f, None, axis_size=size)(XS))


def test_an_empty_batch():
    assert fg.vmap(jnp.sin, chunk=2)(jnp.ones((0, 3))).shape == (0, 3)


def test_a_decorator():
    @fg.vmap(chunk=2)
    def f(x):
        return x * 2

    np.testing.assert_array_equal(f(XS), XS * 2)


def test_no_more_lanes_at_a_time_than_asked_and_chunks_are_even():
    seen = []

    def f(x):
        jax.debug.callback(lambda x: seen.append(float(x)), x)
        return jnp.sum(jnp.outer(x, x))

    mapped = fg.vmap(f, chunk=4)  # 10 lanes are 4 + 4 + 2 of them
    mapped(jnp.arange(10.0)).block_until_ready()
    jax.effects_barrier()
    assert sorted(seen) == list(np.arange(10.0))  # once for each, in the chunk that is left too
    assert "10,4]" not in str(jax.make_jaxpr(mapped)(jnp.arange(10.0)))


def test_chunks_are_as_equal_as_can_be():
    shapes = str(jax.make_jaxpr(fg.vmap(jnp.sin, chunk=64))(jnp.ones(100)))
    assert "slice_sizes=(50,)" in shapes


def test_callbacks_with_results():
    seen = []

    def host(x):
        seen.append(float(x))
        return np.float32(x + 1)

    f = lambda x: jax.experimental.io_callback(host, jax.ShapeDtypeStruct((), np.float32), x)
    np.testing.assert_array_equal(fg.vmap(f, chunk=3)(jnp.arange(7.0)), jnp.arange(7.0) + 1)
    assert sorted(seen) == list(np.arange(7.0))


def test_ordered_callbacks_are_refused_as_in_vmap():
    f = lambda x: jax.experimental.io_callback(lambda x: x, jax.typeof(x), x, ordered=True)
    want = raised_by(jax.vmap(f), (jnp.arange(7.0),))
    assert_same_error(raised_by(fg.vmap(f, chunk=3), (jnp.arange(7.0),)), want)


# ------------------------------------------------------------------------------------------------ budgets


@pytest.mark.parametrize("memory", ["5%", "70kB", *(pytest.param(m, marks=pytest.mark.slow) for m in ("50%", 2**20))])
def test_temporaries_stay_within_the_budget(memory):
    axes = (None, 0)
    plain = temp_bytes(jax.vmap(heavy, axes), WS, BATCH)
    fraction = float(memory[:-1]) / 100 if isinstance(memory, str) and "%" in memory else None
    budget = plain * fraction if fraction else {"70kB": 70_000}.get(memory, memory)
    mapped = fg.vmap(heavy, axes, memory=memory)
    assert_close_values(mapped(WS, BATCH), jax.vmap(heavy, axes)(WS, BATCH))
    used = temp_bytes(mapped, WS, BATCH)
    assert used <= budget < plain
    assert used > budget * 0.45  # and use it


@pytest.mark.parametrize("memory", ["100%", pytest.param("250%", marks=pytest.mark.slow), "1GiB"])
def test_where_everything_fits_it_is_the_plain_program(memory):
    mapped = fg.vmap(heavy, (None, 0), memory=memory)
    compiled = lambda f: jax.jit(f).lower(WS, BATCH).compile()
    assert_same_opcodes(compiled(mapped), compiled(jax.vmap(heavy, (None, 0))))
    assert "scan" not in str(jax.make_jaxpr(mapped)(WS, BATCH))


@pytest.mark.parametrize("near", [4, pytest.param(32, marks=pytest.mark.slow)])
def test_on_cpus_a_chunk_stays_near_the_caches(near, monkeypatch):
    monkeypatch.setattr(chunking, "cache_bytes", lambda: near * 2**20)
    big = lambda x: jnp.sum(jnp.sort(jnp.outer(x, x).ravel()))
    xs = jnp.ones((120, 512))  # a MiB and more for each
    mapped = fg.vmap(big, memory="90%")
    assert near / 4 < temp_bytes(mapped, xs) / 2**20 < near


def test_a_budget_that_is_too_small_says_what_is_needed():
    with pytest.raises(fg.BudgetError, match=r"vmap of heavy needs [\d.]+ KiB .* 100 lanes .* allows 1,000 B") as e:
        fg.vmap(heavy, (None, 0), memory=1000)(WS, BATCH)
    smallest = e.value.smallest
    assert f"memory={smallest}" in str(e.value)
    assert isinstance(e.value, ValueError)
    assert temp_bytes(fg.vmap(heavy, (None, 0), memory=smallest), WS, BATCH) <= smallest
    with pytest.raises(fg.BudgetError):
        fg.vmap(heavy, (None, 0), memory=smallest - 1)(WS, BATCH)
    with pytest.raises(fg.BudgetError, match="1 lanes"):
        fg.vmap(heavy, (None, 0), memory=1000)(WS, BATCH[:1])


@pytest.mark.parametrize(
    ("predicted", "measured", "budget", "want"),
    [
        (lambda k: 10 * k, lambda k: 10 * k, 300, 30),  # as predicted: 100 lanes in 4 chunks are 25, in 3 are 34
        (lambda k: 10 * k, lambda k: 20 * k, 300, 15),  # it needs twice
        (lambda k: 10 * k, lambda k: 5 * k, 300, 50),  # it needs half
        (lambda k: 10 * k + 500, lambda k: 10 * k, 300, 30),  # nothing is fixed
        (lambda k: 10 * k, lambda k: 10 * k + 200, 300, 10),  # much is
        (lambda k: 0, lambda k: 10 * k, 300, 30),  # all is fused, it said
        (lambda k: 10 * k, lambda k: 310 if k > 3 else 10, 300, 3),  # a cliff
    ],
)
def test_the_choice_follows_what_is_compiled(predicted, measured, budget, want):
    sizes = []

    def compiled(k):
        sizes.append(k)
        return measured(k or 100)

    size = chunking._largest(100, budget, lambda k: predicted(k or 100), compiled, "f")
    assert measured(size) <= budget
    assert 0.6 * want <= size <= want
    assert len(sizes) <= 7


def test_the_choice_is_made_once_per_types():
    f = Counted(heavy)
    mapped = fg.vmap(f, (None, 0), memory="10%")
    first = mapped(WS, BATCH)
    calls = f.calls
    np.testing.assert_array_equal(mapped(WS, BATCH), first)
    mapped([w * 2 for w in WS], BATCH + 1)
    assert f.calls == calls
    mapped(WS, BATCH[:50])
    assert f.calls > calls


def test_nothing_is_compiled_twice():
    mapped = fg.vmap(heavy, (None, 0), memory=2**20)
    with counted_compilations() as compilations:
        jax.block_until_ready(mapped(WS, BATCH))
        assert len(compilations) <= 2  # all lanes at once, which might have fitted, and the chunks
        compilations.clear()
        jax.block_until_ready(mapped(WS, BATCH))
        assert not compilations


# ------------------------------------------------------------------------------------------------ options and errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(memory="50%", chunk=3), "memory= or chunk=, and got both"),
        (dict(chunk=0), "chunk= cannot be 0"),
        (dict(chunk=True), "chunk= cannot be True"),
        (dict(chunk=2.0), "chunk= cannot be 2.0"),
        (dict(memory="much"), "memory= cannot be 'much'"),
        (dict(memory=-1), "memory= cannot be -1"),
    ],
)
@pytest.mark.parametrize("verb", [fg.vmap, fg.jacfwd, fg.jacrev, fg.hessian])
def test_options_that_do_not_fit(verb, options, message):
    with pytest.raises(fg.OptionError, match=message):
        verb(square, **options)


@pytest.mark.parametrize("option", ["axis_name", "spmd_axis_name"])
def test_names_of_axes_are_refused_where_the_batch_is_cut(option):
    mapped = fg.vmap(jnp.sin, chunk=2, **{option: "i"})
    with pytest.raises(fg.OptionError, match=f"{option}='i'"):
        mapped(XS)


@pytest.mark.parametrize("limit", [dict(chunk=7), dict(memory="1MiB")])
def test_names_of_axes_work_where_it_is_not(limit):
    f = lambda x: x - lax.pmean(x, "i")
    assert_close_values(fg.vmap(f, axis_name="i", **limit)(XS), jax.vmap(f, axis_name="i")(XS))


@pytest.mark.parametrize(
    ("options", "args"),
    [
        ({}, (XS, XS[:5])),
        ({}, (XS, 1.0)),
        (dict(in_axes=(0, None, 0)), (XS, XS)),
        (dict(in_axes=(0, 2)), (XS, XS)),
        (dict(in_axes=None), (XS, XS)),
        (dict(out_axes=(0, 1)), (XS, XS)),
        (dict(out_axes=None), (XS, XS)),
        (dict(axis_size=5), (XS, XS)),
    ],
)
@pytest.mark.parametrize("limit", [dict(chunk=2), dict(memory="50%")], ids=str)
def test_what_vmap_refuses_is_refused_alike(options, args, limit):
    f = lambda x, y: x * y
    want = raised_by(jax.vmap(f, **options), args)
    assert_same_error(raised_by(fg.vmap(f, **options, **limit), args), want)


def test_what_is_no_array_is_refused_as_by_jit():
    with pytest.raises(TypeError):
        fg.vmap(lambda x, y: x, (0, None), chunk=2)(XS, "text")


# ------------------------------------------------------------------------------------------------ under other transforms

LIMITS = [dict(chunk=30), dict(memory="20%")]


@pytest.mark.parametrize("limit", LIMITS, ids=str)
def test_under_jit_with_closed_over_tracers(limit):
    @jax.jit
    def ours(c, ws, xs):
        return fg.vmap(lambda x: heavy(ws, x) * c, **limit)(xs)

    @jax.jit
    def theirs(c, ws, xs):
        return jax.vmap(lambda x: heavy(ws, x) * c)(xs)

    assert_close_values(ours(2.0, WS, BATCH), theirs(2.0, WS, BATCH))
    assert "while" in ours.lower(2.0, WS, BATCH).as_text()


def test_what_it_closes_over_is_seen_anew_in_each_trace():
    box = []
    mapped = fg.vmap(lambda x: x * box[-1], chunk=3)

    def f(c, xs):
        box.append(c)
        return mapped(xs[:7])

    for size in (7, 8):
        np.testing.assert_array_equal(jax.jit(f)(2.0, jnp.arange(float(size))), 2 * jnp.arange(7.0))


@pytest.mark.parametrize("limit", LIMITS[1:], ids=str)
def test_under_vmap_the_budget_is_that_of_a_lane(limit):
    mapped, plain = fg.vmap(heavy, (None, 0), **limit), jax.vmap(heavy, (None, 0))
    batches = jnp.stack([BATCH, 2 * BATCH])
    assert_close_values(*(jax.jit(jax.vmap(f, (None, 0)))(WS, batches) for f in (mapped, plain)))
    one, two = (temp_bytes(f, WS, x) for f, x in ((mapped, BATCH), (jax.vmap(mapped, (None, 0)), batches)))
    assert two < 2.5 * one


@pytest.mark.parametrize("limit", LIMITS[1:], ids=str)
def test_derivatives(limit):
    of = lambda vmap, **options: lambda w, xs: jnp.sum(jnp.log1p(vmap(heavy, (None, 0), **options)([w], xs)))
    ours, theirs = of(fg.vmap, **limit), of(jax.vmap)
    args = WS[0], BATCH
    assert_near(jax.jit(fg.grad(ours, (0, 1)))(*args), jax.jit(jax.grad(theirs, (0, 1)))(*args), 1e-4)
    push = lambda f: jax.jit(lambda *tangents: jax.jvp(f, args, tangents))(*jax.tree.map(jnp.cos, args))
    assert_near(push(ours), push(theirs), 1e-4)


def test_lanes_that_chunks_share_have_one_gradient():
    ours = jax.grad(lambda xs: jnp.sum(fg.vmap(jnp.sin, chunk=4)(xs)))(jnp.arange(7.0))
    np.testing.assert_allclose(ours, jnp.cos(jnp.arange(7.0)), rtol=1e-6)


def test_a_checkpointed_function_keeps_its_arguments_alone():
    total = lambda f: lambda ws, xs: jnp.sum(fg.vmap(f, (None, 0), chunk=10)(ws, xs))
    kept, made_again = (temp_bytes(jax.grad(total(f)), WS, BATCH) for f in (heavy, jax.checkpoint(heavy)))
    assert made_again < kept / 2


@pytest.mark.parametrize("limit", LIMITS[:1], ids=str)
def test_collectives_of_an_outer_axis(limit):
    f = lambda ws, x: heavy(ws, x) - lax.pmean(jnp.sum(x), "i")
    batches = jnp.stack([BATCH, 2 * BATCH])
    ours = jax.vmap(fg.vmap(f, (None, 0), **limit), (None, 0), axis_name="i")
    theirs = jax.vmap(jax.vmap(f, (None, 0)), (None, 0), axis_name="i")
    assert_close_values(jax.jit(ours)(WS, batches), jax.jit(theirs)(WS, batches))


@pytest.mark.parametrize("limit", LIMITS[1:], ids=str)
def test_in_a_shard_map(limit):
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    f = lambda x: x - lax.pmean(jnp.sum(x), "i")
    mapped = lambda vmap: lambda xs: vmap(lambda x: heavy(WS, f(x)))(xs)
    ours, theirs = (
        jax.jit(jax.shard_map(mapped(vmap), mesh=mesh, in_specs=spec("i"), out_specs=spec("i")))(BATCH)
        for vmap in (lambda g: fg.vmap(g, **limit), jax.vmap)
    )
    assert_close_values(ours, theirs)


@pytest.mark.parametrize("limit", LIMITS, ids=str)
def test_graphs(limit):
    graph = fg.vmap(fg.trace(heavy, WS, BATCH[0]), (None, 0), axis_size=100, **limit)
    assert isinstance(fg.verify(graph), fg.Graph)
    assert graph.name == "vmap(heavy)"
    assert [eqn.primitive.name for eqn in graph.eqns][-1] == "scan"
    assert_close_values(jax.jit(graph)(WS, BATCH), jax.jit(jax.vmap(heavy, (None, 0)))(WS, BATCH))
    for verb, theirs in ((fg.jacfwd, jax.jacfwd), (fg.jacrev, jax.jacrev)):
        derived = verb(fg.trace(net, X), **limit)
        assert isinstance(fg.verify(derived), fg.Graph)
        assert_close_values(jax.jit(derived)(X), jax.jit(theirs(net))(X))


# ------------------------------------------------------------------------------------------------ jacobians


VERBS = [(fg.jacfwd, jax.jacfwd), (fg.jacrev, jax.jacrev), (fg.hessian, jax.hessian)]


def trees(p, x, n=2):
    y = jnp.tanh(p["w"] @ x) * p["b"] * n
    return {"y": y, "pair": (jnp.sum(y**2), jnp.outer(y, x))}


POINT = ({"w": W, "b": jnp.arange(4.0)}, XS[0])


@pytest.mark.parametrize(("argnums", "chunk"), [(0, 5), ((0, 1), 1), ((1,), 1000)], ids=str)
@pytest.mark.parametrize(("ours", "theirs"), VERBS[:2], ids=["jacfwd", "jacrev"])
def test_jacobians_of_trees(ours, theirs, argnums, chunk):
    got, want = (jax.jit(f)(*POINT) for f in (ours(trees, argnums, chunk=chunk), theirs(trees, argnums)))
    assert_close_values(got, want)


def test_hessians_of_trees():
    f = lambda p, x, *, n: jnp.sum(trees(p, x, n)["y"] ** 2)
    got, want = (jax.jit(f)(*POINT, n=3) for f in (fg.hessian(f, (1, 0), chunk=4), jax.hessian(f, (1, 0))))
    assert_close_values(got, want)


@pytest.mark.parametrize(("ours", "theirs"), VERBS, ids=["jacfwd", "jacrev", "hessian"])
def test_auxiliary_results(ours, theirs):
    f = lambda x: (net(x)[:5], {"x": x, "n": 3})
    got, want = (jax.jit(f)(X) for f in (ours(f, has_aux=True, chunk=3), theirs(f, has_aux=True)))
    assert_close_values(got, want)


@pytest.mark.parametrize(("ours", "theirs"), VERBS, ids=["jacfwd", "jacrev", "hessian"])
def test_holomorphic_functions(ours, theirs):
    f = lambda z: jnp.sin(z) * z[0] ** 2
    z = lax.complex(XS[0], XS[1])
    assert_close_values(ours(f, holomorphic=True, chunk=2)(z), theirs(f, holomorphic=True)(z))


@pytest.mark.parametrize("argnums", [0, 1, (0, 1)], ids=str)
def test_integers_with_allow_int(argnums):
    f = lambda x, n: x["a"] * n.astype(x["a"].dtype)
    args = {"a": XS[0], "n": jnp.arange(4)}, jnp.arange(3)
    ours, theirs = fg.jacrev(f, argnums, allow_int=True, chunk=2), jax.jacrev(f, argnums, allow_int=True)
    assert_close_values(ours(*args), theirs(*args))


def test_results_that_are_integers():
    f = lambda x: (jnp.argsort(x), x**2)
    assert_close_values(fg.jacfwd(f, chunk=2)(XS[0]), jax.jacfwd(f)(XS[0]))
    want = raised_by(fg.jacrev(f), (XS[0],))
    assert_same_error(raised_by(fg.jacrev(f, chunk=2), (XS[0],)), want)


@pytest.mark.parametrize(("ours", "theirs"), VERBS, ids=["jacfwd", "jacrev", "hessian"])
@pytest.mark.parametrize("x", [2.0, jnp.float16(2), jnp.ones(3, jnp.bfloat16)], ids=str)
def test_types_of_jacobians(ours, theirs, x):
    f = lambda x: x**3
    got, want = ours(f, chunk=2)(x), theirs(f)(x)
    assert jax.typeof(got) == jax.typeof(want)
    assert_close_values(got, want)


@pytest.mark.parametrize("ours", [fg.jacfwd, fg.jacrev, fg.hessian])
@pytest.mark.parametrize(
    ("f", "options", "args"),
    [
        (jnp.sin, dict(argnums=1), (X,)),
        (jnp.sin, dict(argnums=-2), (X,)),
        (jnp.sin, {}, (jnp.arange(3),)),
        (jnp.sin, {}, ("text",)),
        (jnp.sin, dict(holomorphic=True), (X,)),
        (lambda x: x, dict(has_aux=True), (X,)),
    ],
)
def test_what_jacobians_refuse_is_refused_alike(ours, f, options, args):
    want, got = raised_by(ours(f, **options), args), raised_by(ours(f, **options, chunk=2), args)
    assert type(got) is type(want)
    assert str(got).splitlines()[0][:100] == str(want).splitlines()[0][:100]


@pytest.mark.parametrize(
    ("ours", "theirs", "memory"),
    [
        (*VERBS[0], "30%"),
        (*VERBS[1], "10 KiB"),
        pytest.param(*VERBS[1], "30%", marks=pytest.mark.slow),
        pytest.param(*VERBS[2], "30%", marks=pytest.mark.slow),
    ],
)
def test_jacobians_within_a_budget(ours, theirs, memory):
    f = square if ours is fg.hessian else net
    plain = temp_bytes(theirs(f), X)
    mapped = ours(f, memory=memory)
    used, budget = temp_bytes(mapped, X), plain * 0.3 if memory == "30%" else 10240
    assert used <= budget < plain
    assert used > 0.4 * budget
    assert_close_values(mapped(X), jax.jit(theirs(f))(X))


def test_jacobians_are_chosen_once():
    f = Counted(net)
    mapped = fg.jacrev(f, memory="30%")
    first, calls = mapped(X), f.calls
    np.testing.assert_array_equal(mapped(X), first)
    assert f.calls == calls


def test_jacobians_under_jit_vmap_and_grad():
    xs = jnp.stack([X, 2 * X])
    assert_close_values(jax.jit(fg.jacfwd(net, chunk=10))(X), jax.jit(jax.jacfwd(net))(X))
    assert_close_values(*(jax.jit(jax.vmap(f))(xs) for f in (fg.jacrev(net, memory="30%"), jax.jacrev(net))))
    total = lambda jac, **options: lambda x: jnp.sum(jnp.sin(jac(net, **options)(x)))
    gradients = fg.grad(total(fg.jacfwd, chunk=10)), jax.grad(total(jax.jacfwd))
    assert_close_values(*(jax.jit(f)(X) for f in gradients))


def test_jacobians_with_rules_and_through_loops():
    straight = {lax.round_p: lambda eqn, x: x + lax.stop_gradient(lax.round(x) - x)}
    f = lambda x: lax.while_loop(lambda t: t[0] < 3, lambda t: (t[0] + 1, jnp.sin(t[1])), (0, lax.round(x)))[1]
    for verb in (fg.jacrev, fg.jacfwd):
        assert_close_values(*(jax.jit(verb(f, rules=straight, **cut))(X) for cut in (dict(chunk=10), {})))


def test_where_only_the_plain_program_fits_it_is_that():
    w = jax.random.normal(jax.random.key(0), (64, 64)) / 8
    wide = lambda x: jnp.tanh(jnp.outer(x, x) @ w).sum(1)  # XLA never has the outer product of all lanes
    x = jnp.linspace(-1, 1, 64)
    plain = temp_bytes(jax.jacrev(wide), x)
    assert temp_bytes(fg.jacrev(wide, memory=plain), x) == plain
    with pytest.raises(fg.BudgetError, match=r"needs [\d.]+ KiB of temporaries for its 64 lanes at once") as e:
        fg.jacrev(wide, memory=plain - 1)(x)
    assert e.value.smallest == plain


@pytest.mark.parametrize(
    ("transform", "has_aux"), [("jacfwd", False), ("jacfwd", True), ("jacrev", True), ("hessian", False)]
)
def test_effects_of_what_all_lanes_share_happen_once(transform, has_aux):
    seen = []

    def f(x):
        jax.debug.callback(lambda x: seen.append(float(x)), x[0])
        y = jnp.sum(x**3) if transform == "hessian" else jnp.sin(x) * x[::-1]
        return (y, x) if has_aux else y

    x = jnp.linspace(0.5, 1, 5)
    got = getattr(fg, transform)(f, has_aux=has_aux, chunk=3)(x)
    jax.effects_barrier()
    assert seen == [0.5]
    assert_close_values(got, getattr(jax, transform)(f, has_aux=has_aux)(x))
