"""The layouts and names of non-public JAX that `transforms/_jax.py` leans on, per version. When JAX moves, this fails first."""

from __future__ import annotations

import functools
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from funcgrad.transforms.core import _jax, subjaxprs
from jax import lax
from jax.experimental import compute_on
from jax.sharding import PartitionSpec as P

X = jnp.linspace(0.1, 1.0, 4)
MESH = jax.make_mesh((4,), ("i",), (jax.sharding.AxisType.Auto,), devices=jax.devices("cpu")[:4])
SINCE_0_11 = tuple(map(int, jax.__version__.split(".")[:2])) >= (0, 11)


@jax.custom_jvp
def with_jvp(x):
    return x


with_jvp.defjvp(lambda p, t: (p[0], t[0]))


@jax.custom_vjp
def with_vjp(x):
    return x


with_vjp.defvjp(lambda x: (x, None), lambda _, ct: (ct,))
divide = lambda mv, b: b / 2
psum = lambda x: lax.psum(x, "i")
on_the_host = functools.partial(
    getattr(compute_on, "compute_on2", None) or compute_on.compute_on,  # the same since JAX 0.11
    compute_type="device_host",
    out_memory_spaces=jax.memory.Space.Device,
)

HOLDERS = {
    "jit": (
        lambda x: jax.jit(jnp.sin)(x),
        {"jaxpr", "in_shardings", "in_layouts", "donated_invars", "name"},
        ["jaxpr"],
    ),
    "scan": (
        lambda x: lax.scan(lambda c, y: (c * y + x.sum(), c), 0.0, x),
        {"jaxpr", "length", "reverse", "unroll"} | ({"ft_in", "ft_out"} if SINCE_0_11 else {"num_consts", "num_carry"}),
        ["jaxpr"],
    ),
    "while": (
        lambda x: lax.while_loop(lambda c: c.sum() < x.sum(), lambda c: c + x, x),
        {"cond_jaxpr", "body_jaxpr", "cond_nconsts", "body_nconsts"},
        ["cond_jaxpr", "body_jaxpr"],
    ),
    "cond": (lambda x: lax.cond(x[0] > 0, jnp.sin, jnp.cos, x), {"branches"}, ["branches[0]", "branches[1]"]),
    "remat2": (lambda x: jax.checkpoint(jnp.sin)(x), {"jaxpr", "prevent_cse", "policy"}, ["jaxpr"]),
    "custom_jvp_call": (with_jvp, {"call_jaxpr", "jvp_jaxpr_fun", "num_consts"}, ["call_jaxpr"]),
    "custom_vjp_call": (with_vjp, {"call_jaxpr", "fwd_jaxpr_thunk", "bwd", "num_consts", "out_trees"}, ["call_jaxpr"]),
    "custom_linear_solve": (
        lambda x: lax.custom_linear_solve(lambda v: v * 2, x, divide, divide),
        {"jaxprs", "const_lengths"},
        ["jaxprs[matvec]", "jaxprs[vecmat]", "jaxprs[solve]", "jaxprs[transpose_solve]"],
    ),
    "compute_on": (
        lambda x: on_the_host(jnp.sin)(x),
        {"jaxpr", "compute_type", "out_memory_spaces"},
        ["jaxpr"],
    ),
    "shard_map": (
        lambda x: jax.shard_map(psum, mesh=MESH, in_specs=P("i"), out_specs=P())(x),
        {"jaxpr", "mesh", "in_specs", "out_specs", "newly_manual_axes"},
        ["jaxpr"],
    ),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_layout_of_an_equation_with_sub_graphs(name):
    f, params, labels = HOLDERS[name]
    eqn = next(e for e in jax.make_jaxpr(f)(X).jaxpr.eqns if e.primitive.name == name)
    assert params <= set(eqn.params)
    assert [b.label for b in subjaxprs.bodies(eqn)] == labels
    assert all(len(b.jaxpr.consts) == len(b.jaxpr.jaxpr.constvars) for b in subjaxprs.bodies(eqn))


@pytest.mark.parametrize("name", sorted(set(HOLDERS) - subjaxprs.FUNCTIONAL))
def test_rebinding_with_the_same_sub_graphs_is_the_same_equation(name):
    f, _, _ = HOLDERS[name]
    eqn = next(e for e in jax.make_jaxpr(f)(X).jaxpr.eqns if e.primitive.name == name)

    def again(*values):
        return subjaxprs.rebind(
            eqn.primitive, eqn.params, values, [subjaxprs.lifted(b.jaxpr) for b in subjaxprs.bodies(eqn)]
        )

    (new,) = jax.make_jaxpr(again)(*(jnp.ones(v.aval.shape, v.aval.dtype) for v in eqn.invars)).jaxpr.eqns
    assert new.primitive is eqn.primitive
    assert [v.aval for v in new.outvars] == [v.aval for v in eqn.outvars]
    assert {k: str(v) for k, v in new.params.items()} == {k: str(v) for k, v in eqn.params.items()}


@pytest.mark.parametrize("name", sorted(subjaxprs.FUNCTIONAL))
def test_binding_an_equation_with_functions(name):
    f, _, _ = HOLDERS[name]
    eqn = next(e for e in jax.make_jaxpr(f)(X).jaxpr.eqns if e.primitive.name == name)
    np.testing.assert_array_equal(_jax.bind(eqn.primitive, eqn.params, [X])[0], f(X))


def test_dead_code_is_left_out_at_any_depth():
    def f(x):
        one = jnp.ones((), x.dtype)
        (a, _), _ = lax.scan(lambda c, y: ((c[0] * y, jnp.sin(c[1])), jnp.cos(y)), (one, one), x)
        return a, jax.jit(lambda z: (jnp.tan(z), z + 1))(x)[1]

    jaxpr = jax.make_jaxpr(f)(X).jaxpr
    alive, used = _jax.dce_jaxpr(jaxpr, [True] * 2, instantiate=True)
    assert used == [True]
    inner = [[e.primitive.name for e in body.jaxpr.jaxpr.eqns] for eqn in alive.eqns for body in subjaxprs.bodies(eqn)]
    assert inner == [["mul"], ["add"]]


def test_staging_gives_a_closed_jaxpr_with_constants():
    table = np.arange(4.0, dtype=np.float32)
    names = jax.make_jaxpr(lambda x: x)(X).jaxpr.debug_info._replace(result_paths=None)
    closed = _jax.stage_flat(lambda x: [jnp.sin(x) * table], [jax.typeof(X)], names)
    assert isinstance(closed, _jax.ClosedJaxpr)
    assert len(closed.jaxpr.invars) == 1
    np.testing.assert_array_equal(_jax.jaxpr_as_fun(closed)(X)[0], jnp.sin(X) * table)
    _jax.check_jaxpr(closed)


def test_constants_become_leading_inputs():
    table = np.arange(4.0, dtype=np.float32)
    opened = subjaxprs.lifted(jax.make_jaxpr(lambda x: x - table)(X))
    assert len(opened.jaxpr.jaxpr.invars) == 1 + len(opened.consts)
    assert not opened.jaxpr.consts
    np.testing.assert_array_equal(_jax.jaxpr_as_fun(opened.jaxpr)(*opened.consts, X)[0], X - table)


def test_the_trace_protocol():
    assert issubclass(_jax.Trace, object)
    with _jax.take_current_trace() as current, _jax.set_current_trace(current):
        assert hasattr(current, "process_primitive")
        assert hasattr(current, "requires_low")
        assert hasattr(current, "process_shard_map")
    assert float(jnp.sin(1.0)) == pytest.approx(np.sin(1.0))


def test_source_lines_and_scopes():
    with jax.named_scope("outer"):
        jaxpr = jax.make_jaxpr(lambda x: jax.named_scope("inner")(jnp.cos)(x))(X)
    (eqn,) = jaxpr.jaxpr.eqns
    ((file, line, function),) = _jax.source_lines(eqn)
    assert file == __file__
    assert "lambda" in function
    assert line > 0
    assert _jax.scope_of(eqn) == "inner"


def test_a_traceback_has_the_places_in_the_code_of_its_frames():
    eqn = jax.make_jaxpr(lambda x: jnp.sin(x))(1.0).eqns[0]
    codes, places = eqn.source_info.traceback.raw_frames()
    assert len(codes) == len(places)
    assert "test_a_traceback" in " ".join(code.co_qualname for code in codes)
    assert all(isinstance(place, int) for place in places)


def test_what_vmap_traces_knows_its_axes(monkeypatch):
    found, process = [], _jax.BatchTrace.process_primitive

    def seen(self, primitive, values, params, /):
        found.append(process(self, primitive, values, params))
        return found[-1]

    monkeypatch.setattr(_jax.BatchTrace, "process_primitive", seen)
    f = jax.jit(lambda x: jax.vmap(lax.sin, 1, 1)(x))
    f(jnp.ones((2, 3)))
    f(jnp.ones((2, 3)))
    assert len(found) == 1
    with jax.make_user_context()(object()):  # traced anew
        f(jnp.ones((2, 3)))
    assert len(found) == 2
    for x in found:
        assert isinstance(x, _jax.BatchTracer)
        assert (x.val.shape, x.batch_dim) == ((2, 3), 1)


def test_a_derivative_rule_runs_below_the_backward_pass():
    names = []
    f = jax.custom_vjp(lambda x: x)
    note = lambda: names.extend(frame.f_code.co_name for frame, _ in traceback.walk_stack(None))
    f.defvjp(lambda x: (x, None), lambda _, ct: (note(), (ct,))[1])
    jax.make_jaxpr(jax.grad(f))(1.0)
    assert any(name.startswith("backward_pass") for name in names)


def test_the_context_of_a_trace_is_a_value():
    before = _jax.trace_context()
    assert before == _jax.trace_context()
    with jax.numpy_dtype_promotion("standard"):
        assert hash(_jax.trace_context()) != hash(before)


@pytest.mark.parametrize("ordered", [False, True])
def test_effects_that_keep_their_order_are_known(ordered):
    notice = lambda x: jax.debug.callback(lambda _: None, x, ordered=ordered)
    (effect,) = jax.make_jaxpr(notice)(1.0).effects
    assert _jax.is_ordered(effect) is ordered


def test_weak_types_are_cast():
    weak = jax.typeof(1.0)
    assert _jax.cast(jnp.float32(1), weak).weak_type
    assert not _jax.cast(1.0, jax.typeof(jnp.float32(1))).weak_type


def test_the_dispatch_of_a_jitted_function():
    jitted = jax.jit(lambda x, n: x * n, static_argnums=1)
    dispatch = _jax.dispatch_of(jitted)
    assert dispatch.name == "<lambda>"
    assert dispatch.static_argnums == [1]
    missed = []

    def miss(*args, **kwargs):
        missed.append(args)
        return dispatch.miss(*args, **kwargs)

    watched = _jax.with_miss(jitted, miss)
    assert isinstance(watched, type(jitted))
    assert [float(watched(1.0, 3)) for _ in range(3)] == [3, 3, 3]
    assert missed == [(1.0, 3)]
    assert float(watched(1.0, 4)) == 4
    assert len(missed) == 2
    assert _jax.cache_size(watched) == 2


def test_the_names_of_the_context():
    assert "strict" in _jax.named_context(_jax.trace_context()).values()
    assert not _jax.is_tracing()
    assert jax.jit(lambda x: x * (2 if _jax.is_tracing() else 1))(1) == 2
    assert _jax.type_of(1.0).weak_type


# ------------------------------------------------------------------------------------------------ new primitives


def _scaled(x, y, *, by):
    return [x * by, y * by]


def _scaled_jvp(primals, tangents, *, by):
    outputs = scaled_p.bind(*primals, by=by)
    found = scaled_p.bind(
        *(jnp.zeros_like(p) if t is None else t for p, t in zip(primals, tangents, strict=True)), by=by
    )
    return outputs, [None if t is None else s for s, t in zip(found, tangents, strict=True)]


def _scaled_batch(axis, values, dims, *, by):
    assert axis.size == 4
    return scaled_p.bind(*values, by=by), dims


def _scaled_transpose(cotangents, *values, by):
    return [None if ct is None else ct * by for ct in cotangents]


scaled_p = _jax.primitive(
    *("scaled", _scaled, _scaled),
    lambda *avals, by: (avals, set()),
    *(_scaled_jvp, _scaled_batch, _scaled_transpose),
)


def test_a_primitive_under_every_transform():
    f = lambda x: scaled_p.bind(x, 2.0, by=3.0)[0].sum()
    for transformed in (f, jax.jit(f)):
        np.testing.assert_allclose(transformed(X), 3 * X.sum(), rtol=1e-6)
        np.testing.assert_array_equal(jax.grad(transformed)(X), np.full(4, 3.0, np.float32))
        np.testing.assert_allclose(jax.jvp(transformed, (X,), (X,))[1], 3 * X.sum(), rtol=1e-6)
        np.testing.assert_array_equal(jax.vmap(transformed)(X), 3 * X)


def test_a_primitive_is_split_where_jax_linearizes():
    seen = []

    def rule(values, later, *, by):
        seen.append([x is not None for x in values])
        return [values[0] * by, *later(scaled_p, [None, 0.0], {"by": by})[:1]]

    _jax.split_by(rule, scaled_p)
    f = jax.custom_jvp(lambda x: x * 3)
    f.defjvp(lambda primals, tangents: tuple(scaled_p.bind(*primals, *tangents, by=3.0)))
    np.testing.assert_array_equal(jax.grad(lambda x: f(x).sum())(X), np.full(4, 3.0, np.float32))
    assert seen == [[True, False]]


def test_jaxprs_are_batched_and_differentiated():
    jaxpr = jax.make_jaxpr(lambda x, y: (jnp.sin(x), y * 2, x * y))(1.0, 2.0)
    tangents, flags = _jax.jvp_of(jaxpr, [True, False], False)
    assert (flags, len(tangents.out_avals)) == ([True, False, True], 5)
    found = []

    def batch(axis, values, dims, *, by):
        found.append(_jax.batched(jaxpr, axis, [True, False], [False, True, False]))
        return scaled_p.bind(*values, by=by), dims

    other_p = _jax.primitive(
        "other", _scaled, _scaled, lambda *avals, by: (avals, set()), _scaled_jvp, batch, _scaled_transpose
    )
    jax.vmap(lambda x: other_p.bind(x, 2.0, by=3.0)[0])(X)
    ((batched, flags),) = found
    assert flags == [True, True, True]
    assert [a.shape for a in batched.out_avals] == [(4,), (4,), (4,)]
