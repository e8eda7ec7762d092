"""FLOPs and bytes of operations: XLA's own counts of the unrolled program, and counts derived by hand."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from funcgrad.transforms.core import _jax, subjaxprs
from jax import lax
from jax.extend.core import Literal

import funcgrad as fg

from ... import checks
from ...corpus import CORPUS

# ------------------------------------------------------------------------------------------------ XLA's counts

# Primitives for which XLA counts what its lowering happens to be (a polynomial, masks for indices out of bounds, a loop counted
# once, LAPACK), or a complex operation as one. They are taken out of both counts; what they cost is
# tested one by one below. All that is left is equal.
LOWERED = frozenset(
    """lgamma digamma asin atan2 erf_inv cbrt tan nextafter igamma random_gamma erfc polynomial one_minus_square
    argmax argmin sort top_k cumsum cumprod cummax cummin cumlogsumexp reduce reduce_window_max select_and_scatter_add
    gather scatter scatter-add scatter-mul scatter-max scatter-min dynamic_slice dynamic_update_slice bitcast_convert_type fft
    cholesky lu qr eigh svd triangular_solve call_hi_primitive
    random_bits random_seed random_split random_fold_in random_wrap random_unwrap threefry2x32
    psum ppermute all_gather pure_callback io_callback debug_callback sharding_constraint empty2 population_count""".split()  # noqa: SIM905
)
# Programs that differ otherwise, and why.
OTHERWISE = {
    "zero_size": "XLA knows that a product with nothing is zero",
    "shard_map": "XLA counts one of the devices",
    "shard_map_loops": "XLA counts one of the devices",
    "references": "for XLA a reference is an array that is updated",
    "references_in_loops": "for XLA a reference is an array that is updated",
    "derivatives_inside": "XLA knows an iota of one element",
    "factorisations": "operands of a branch for another platform, which JAX leaves out when it compiles",
    "random_gamma": "a loop counted once, of which XLA leaves out two operations",
    "mixed_bfloat16": "XLA on CPU adds up bfloat16 in float32, with conversions",
}
CALLS = (
    frozenset({"jit", "remat2", "closed_call", "eval_jaxpr", "composite", "custom_vmap_call"})
    | subjaxprs.WITH_DERIVATIVES
)


def is_lowered(eqn):
    avals = [v.aval for v in (*eqn.invars, *eqn.outvars)]
    is_complex = any(jnp.issubdtype(getattr(a, "dtype", bool), jnp.complexfloating) for a in avals)
    return eqn.primitive.name in LOWERED or (is_complex and not subjaxprs.bodies(eqn))


def evaluated(jaxpr, values, apply, number=lambda v: v.val):
    inner = jaxpr.jaxpr
    environment = dict(zip([*inner.constvars, *inner.invars], [*jaxpr.consts, *values], strict=True))
    read = lambda v: number(v) if isinstance(v, Literal) else environment[v]
    for eqn in inner.eqns:
        environment.update(zip(eqn.outvars, apply(eqn, list(map(read, eqn.invars))), strict=True))
    return list(map(read, inner.outvars))


def unrolled(jaxpr, *values):
    """A jaxpr with scans as many steps and calls as their bodies. What `is_lowered` is a barrier, which has no FLOPs."""

    def apply(eqn, values):
        name, bodies = eqn.primitive.name, [body.jaxpr for body in subjaxprs.bodies(eqn)]
        if is_lowered(eqn):
            empty = [jnp.zeros(v.aval.shape, v.aval.dtype) for v in eqn.outvars]
            return lax.optimization_barrier([*empty, *values])[: len(empty)]
        if name in CALLS:
            return unrolled(bodies[0], *values)
        if name == "custom_linear_solve":
            lengths, jaxprs = eqn.params["const_lengths"], eqn.params["jaxprs"]
            start = lengths.matvec + lengths.vecmat
            return unrolled(jaxprs.solve, *values[start : start + lengths.solve], *values[sum(lengths) :])
        if name == "scan":
            return steps(eqn, bodies[0], values)
        if bodies:
            opened = [
                subjaxprs.lifted(_jax.stage_flat(partial(unrolled, j), j.in_avals, _jax.no_names)) for j in bodies
            ]
            return subjaxprs.rebind(eqn.primitive, eqn.params, values, opened)
        return _jax.bind(eqn.primitive, eqn.params, values)

    return evaluated(jaxpr, values, apply)


def steps(eqn, body, values):
    p = eqn.params
    consts, carried = (
        (p["num_consts"], p["num_carry"]) if "num_consts" in p else [len(x) for x in p["ft_in"].unpack()[:2]]
    )
    c, x, xs = values[:consts], values[consts : consts + carried], values[consts + carried :]
    x = lax.optimization_barrier([jnp.asarray(a) for a in x])  # of a counter that is known, nothing need be computed
    ys = {}
    for k in reversed(range(p["length"])) if p["reverse"] else range(p["length"]):
        out = unrolled(body, *c, *x, *(lax.index_in_dim(a, k, keepdims=False) for a in xs))
        out = lax.optimization_barrier(out)  # what a single step does not need, the loop computes still
        x, ys[k] = out[:carried], out[carried:]
    return [*x, *(jnp.stack([ys[k][i] for k in range(p["length"])]) for i in range(len(eqn.outvars) - carried))]


def counted_by_xla(graph):
    """FLOPs and transcendentals of the unrolled program. Its numbers are inputs: XLA would compute with them at once."""
    alive, _ = _jax.dce_jaxpr(graph.jaxpr.jaxpr, [True] * len(graph.out_avals), instantiate=True)
    alive = _jax.close(alive, graph.jaxpr.consts)
    flat = _jax.stage_flat(lambda *values: unrolled(alive, *values), graph.in_avals, _jax.no_names)
    numbers: list = []
    aval = lambda v: jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype)
    bind = lambda eqn, values: _jax.bind(eqn.primitive, eqn.params, values)
    note = lambda v: numbers.append(aval(v)) or jnp.asarray(v.val, v.aval.dtype)
    jax.eval_shape(lambda *values: evaluated(flat, values, bind, note), *map(aval, flat.jaxpr.invars))

    def program(numbers, consts, values):
        rest = iter(numbers)
        return evaluated(flat.replace(consts=consts), values, bind, lambda v: next(rest))

    values = list(map(aval, flat.jaxpr.invars))
    lowered = jax.jit(program).lower(numbers, list(flat.consts), values)
    analysis = lowered.cost_analysis() or {}
    foreign = lowered.compiler_ir("hlo").as_hlo_text().count(" custom-call(")  # -1 each
    return analysis.get("flops", 0) + foreign, analysis.get("transcendentals", 0)


def compare(graph):
    rows = [row for row in fg.cost(graph).rows if not is_lowered(row.eqn)]
    assert all(row.once for row in rows)
    flops, transcendentals = counted_by_xla(graph)
    assert sum(row.work.flops for row in rows) == flops
    if not any(
        eqn.primitive.name == "cond" for _, eqn in fg.walk(graph)
    ):  # XLA takes the maxima over the branches one by one
        assert sum(row.work.transcendentals for row in rows) == transcendentals


@pytest.mark.parametrize("p", [p for p in CORPUS if p.name not in OTHERWISE], ids=str)
def test_xla_counts_the_same_flops_of_the_unrolled_program(p):
    compare(fg.trace(p.f, *p.args))


@pytest.mark.parametrize("p", [p for p in CORPUS if "grad" not in p.lacks and p.name not in OTHERWISE], ids=str)
def test_xla_counts_the_same_flops_of_the_unrolled_gradient(p):
    compare(fg.grad(fg.trace(checks.summed(p.f), *p.args), **checks.options(p)))


# ------------------------------------------------------------------------------------------------ by hand

W, X = jnp.full((8, 8), 0.1), jnp.ones((4, 8))
PRODUCT = 2 * 4 * 8 * 8


A = jax.ShapeDtypeStruct((6, 4), np.float32)
S = jax.ShapeDtypeStruct((6, 6), np.float32)
Z = jax.ShapeDtypeStruct((16,), np.complex64)
KEY = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)


@pytest.mark.parametrize(
    ("f", "avals", "flops"),
    [
        (jnp.linalg.cholesky, (S,), None),
        (lax.linalg.lu, (A,), 6 * 4**2 - 4**3 / 3),
        (lambda a: lax.linalg.qr(a, full_matrices=False), (A,), 4 * 4**2 * (6 - 4 / 3)),
        (lambda a: lax.linalg.eigh(a, symmetrize_input=False), (S,), 9 * 6**3),
        (lambda a: lax.linalg.svd(a, compute_uv=False), (A,), 4 * 6 * 4**2 - 4 * 4**3 / 3),
        (lambda a, b: lax.linalg.triangular_solve(a, b, left_side=True), (S, A), 6 * 6 * 4),
        (jnp.fft.fft, (Z,), 5 * 16 * 4),
        (lambda z: z * z, (Z,), 6 * 16),
        (lambda z: z + z, (Z,), 2 * 16),
        (jnp.dot, (Z, Z), 8 * 16),
        (jnp.cumsum, (jax.ShapeDtypeStruct((10,), np.float32),), 9),
        (lambda a: lax.sort(a, dimension=0), (A,), 24 * 3),
        (lambda a: lax.argmax(a, 0, np.int32), (A,), 24),
        (lambda a: lax.reduce(a, np.float32(0), lambda x, y: x * y + x, (0,)), (A,), 2 * (24 - 4)),
        (lambda a: lax.reduce_window(a, -np.inf, lax.max, (2, 2), (2, 2), "VALID"), (A,), 6 * 3),
        (lambda a: lax.integer_pow(a, 7), (A,), 4 * 24),
        (lambda a: lax.integer_pow(a, -2), (A,), 2 * 24),
        (lambda key: jax.random.bits(key, (10,)), (KEY,), 117 * 5),
        (lambda a: a.astype(jnp.bfloat16), (A,), 24),
        (lambda a: a.reshape(4, 6).T[None], (A,), 0),
    ],
)
def test_families(f, avals, flops):
    cost = fg.cost(f, *avals)
    assert not cost.unknown
    if f is jnp.linalg.cholesky:
        (row,) = [row for row in cost.rows if row.eqn.primitive.name == "cholesky"]
        assert row.work.flops == 6**3 / 3
    else:
        assert cost.flops == flops


def test_the_table_knows_every_operation_of_the_corpus():
    unknown = set()
    for p in CORPUS:
        unknown |= {name.split("(")[0] for name in fg.cost(p.f, *p.args).unknown}
    assert unknown <= {"random_gamma", "pure_callback", "io_callback", "call_hi_primitive"}


def test_bytes():
    table, rows = jax.ShapeDtypeStruct((1000, 8), np.float32), jax.ShapeDtypeStruct((3, 8), np.float32)
    add = fg.cost(lambda a, b: a + b, rows, rows)
    assert (add.bytes_read, add.bytes_written) == (2 * 96, 96)
    assert fg.cost(lambda a: a + a, rows).bytes_read == 96
    window = fg.cost(lambda t: lax.slice(t, (0, 0), (3, 8)), table)
    assert (window.bytes_read, window.bytes_written) == (96, 96)
    update = fg.cost(lambda t, r: lax.dynamic_update_slice(t, r, (0, 0)), table, rows)
    assert (update.bytes_read, update.bytes_written) == (96, 96)
    loop_cost = fg.cost(lambda x: lax.scan(lambda c, x: (c + x, None), jnp.zeros(8), x)[0], rows)
    assert loop_cost.by("primitive")[0].work.bytes == 3 * 3 * 32


def test_what_is_unknown_is_named_and_never_zero():
    f = lambda x: jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x) * 2
    cost = fg.cost(f, X)
    assert cost.unknown == {"pure_callback": 1}
    assert "unknown, on top: pure_callback ×1" in str(cost)
    assert str(cost).startswith("<lambda>: ≥ ")
    elsewhere = fg.cost(lambda x: lax.platform_dependent(x, tpu=f, default=jnp.sin), X)
    assert (elsewhere.unknown, elsewhere.transcendentals) == ({}, X.size)


def test_a_pallas_kernel_costs_what_it_declares():
    pl = pytest.importorskip("jax.experimental.pallas")

    def kernel(x_ref, o_ref):
        o_ref[...] = x_ref[...] * 2

    def f(x, declared=None):
        return pl.pallas_call(kernel, out_shape=jax.typeof(x), cost_estimate=declared, interpret=True)(x)

    assert list(fg.cost(f, X).unknown) == ["pallas_call(kernel)"]
    declared = pl.CostEstimate(flops=32, transcendentals=4, bytes_accessed=256)
    cost = fg.cost(lambda x: f(x, declared), X)
    assert (cost.flops, cost.transcendentals, cost.work.bytes, cost.unknown) == (32, 4, 256, {})


def test_shards_count_on_all_devices():
    mesh = jax.make_mesh((4,), ("i",), (jax.sharding.AxisType.Auto,), devices=jax.devices("cpu")[:4])
    spec = jax.sharding.PartitionSpec("i")
    f = jax.shard_map(lambda x: x @ W, mesh=mesh, in_specs=spec, out_specs=spec)
    assert fg.cost(f, X).flops == PRODUCT
