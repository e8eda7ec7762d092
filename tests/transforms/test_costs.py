"""What programs cost: XLA's own counts of the unrolled program, counts derived by hand, and the bytes that are alive."""

from __future__ import annotations

import json
import math
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from funcgrad.transforms import _jax, layouts
from funcgrad.transforms.living import retraced
from jax import lax
from jax.extend.core import Literal

import funcgrad as fg

from .. import checks
from ..corpus import CORPUS

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
    "mixed_bfloat16": "XLA on CPU adds up bfloat16 in float32, with conversions",
}
CALLS = (
    frozenset({"jit", "remat2", "closed_call", "eval_jaxpr", "composite", "custom_vmap_call"})
    | layouts.WITH_DERIVATIVES
)


def is_lowered(eqn):
    avals = [v.aval for v in (*eqn.invars, *eqn.outvars)]
    is_complex = any(jnp.issubdtype(getattr(a, "dtype", bool), jnp.complexfloating) for a in avals)
    return eqn.primitive.name in LOWERED or (is_complex and not layouts.bodies(eqn))


def evaluated(jaxpr, values, apply, number=lambda v: v.val):
    inner = jaxpr.jaxpr
    known = dict(zip([*inner.constvars, *inner.invars], [*jaxpr.consts, *values], strict=True))
    read = lambda v: number(v) if isinstance(v, Literal) else known[v]
    for eqn in inner.eqns:
        known.update(zip(eqn.outvars, apply(eqn, list(map(read, eqn.invars))), strict=True))
    return list(map(read, inner.outvars))


def unrolled(jaxpr, *values):
    """A jaxpr with scans as many steps and calls as their bodies. What `is_lowered` is a barrier, which has no FLOPs."""

    def apply(eqn, values):
        name, bodies = eqn.primitive.name, [body.jaxpr for body in layouts.bodies(eqn)]
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
            opened = [retraced(j.jaxpr, lambda *values, j=j: unrolled(j, *values)) for j in bodies]
            return layouts.rebind(eqn.primitive, eqn.params, values, opened)
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
    found = lowered.cost_analysis() or {}
    foreign = lowered.compiler_ir("hlo").as_hlo_text().count(" custom-call(")  # -1 each
    return found.get("flops", 0) + foreign, found.get("transcendentals", 0)


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
