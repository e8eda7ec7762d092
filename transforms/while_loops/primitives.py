"""The primitives of a differentiable loop, and what each transform makes of them.

    loop      a `while` that can be reversed; its parameters are those of `while`, and it lowers to one
    forward   the forward run of a sweep, which returns what the backward run needs beside the last x
    sweep     a sweep: forward and back, or back alone from what `forward` kept
    tangent   the linear part of a sweep: the tangents of its outputs from those of its inputs

The JVP of a loop is `forward` and `tangent`; the transpose of `tangent` is the sweep that is the VJP. What `forward` keeps has no
tangents: it is computed again from c and x wherever these have, since everything is a function of them.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import tree_leaves, tree_structure, tree_unflatten

from ..core import _jax, manual_axes, subjaxprs
from ..core.passes import run
from ..core.rules import RETYPING, Rules, live
from . import checkpointed
from .adjoint import Flag, Flags, Sweep, chosen, merged, tangents
from .checkpointed import Kept
from .schedule import Loops

# ------------------------------------------------------------------------------------------------ loop


def _loop(*values, loops, **params):
    return _jax.bind(lax.while_p, params, values)


def _loop_types(*avals, loops, cond_jaxpr, body_jaxpr, **counts):
    return body_jaxpr.out_avals, {*cond_jaxpr.effects, *body_jaxpr.effects}


def _loop_jvp(primals, given, *, loops, **params):
    base = _sweep_of(loops, params)
    n, (n_c, n_x, _, _) = params["cond_nconsts"], base.sizes
    on = [False] * n + [t is not None for t in given[n:]]
    flags = base.active((tuple(on[:n_c]), tuple(on[n_c:]), ()))
    if not any(flags[1]):
        return _jax.bind(lax.while_p, params, primals), [None] * n_x
    back = base.vjp(flags)
    outputs = forward_p.bind(*primals, sweep=back, base=base)
    found = tangent_p.bind(
        *primals, *outputs[n_x:], *_instantiated(flags, primals, given), sweep=base, flags=flags, back=back
    )
    return outputs[:n_x], merged([None] * n_x, flags[1], found)


def _loop_split(values, later, *, loops, **params):
    """Where a loop carries tangents beside primals, and JAX knows these alone: the rest is linear in the tangents."""
    base = _sweep_of(loops, params)
    n_c, n_x = base.sizes[:2]
    is_known = tuple(x is not None for x in values)
    flags = base.active((tuple(not k for k in is_known[:n_c]), tuple(not k for k in is_known[n_c:]), ()))
    back = base.vjp(flags)
    primals = [subjaxprs.zeros(a) if x is None else x for x, a in zip(values, base.step.in_avals, strict=True)]
    outputs = forward_p.bind(*primals, sweep=back, base=base)
    every = [*flags[0], *flags[1]]
    linear = [
        subjaxprs.zeros(jax.typeof(x).to_tangent_aval()) if k else None
        for x, k, f in zip(primals, is_known, every, strict=True)
        if f
    ]
    found = later(tangent_p, [*primals, *outputs[n_x:], *linear], dict(sweep=base, flags=flags, back=back))
    return merged(outputs[:n_x], flags[1], found)


def _loop_batch(axis, values, dims, *, loops, **params):
    return live(functools.partial(_jax.batch_while, axis, values, dims, **params), rules(loops))()


def _sweep_of(loops: Loops, params: dict) -> Sweep:
    """A `while` as a sweep with nothing coming back; the loops in its body are differentiable too."""
    cond_jaxpr, body_jaxpr, n, m = (params[k] for k in ("cond_jaxpr", "body_jaxpr", "cond_nconsts", "body_nconsts"))
    memo = _SWEEPS.setdefault(body_jaxpr.jaxpr, {})
    key = cond_jaxpr.jaxpr, loops, n, m, _jax.trace_context()
    if key not in memo:
        c, x = [*cond_jaxpr.in_avals[:n], *body_jaxpr.in_avals[:m]], list(body_jaxpr.in_avals[m:])
        cond = lambda c, x: run(rules(loops), cond_jaxpr, [*c[:n], *x])[0]
        step = lambda c, x: run(rules(loops), body_jaxpr, [*c[n:], *x])
        memo[key] = Sweep.of(cond, step, lambda c, x, y: (step(c, x), [], []), c, x, [], 0, loops)
    return memo[key]


_SWEEPS: WeakKeyDictionary[Any, dict[Any, Sweep]] = WeakKeyDictionary()  # by body


@functools.lru_cache(maxsize=256)
def rules(loops: Loops) -> Rules:
    """The table that makes each `while` a loop that can be reversed, in as much memory."""

    def rule(eqn, *values):
        effects = {*eqn.params["cond_jaxpr"].effects, *eqn.params["body_jaxpr"].effects}
        if not (_jax.are_repeatable(effects) and any(map(_is_inexact, values))):
            return _jax.bind(lax.while_p, eqn.params, values)
        params, values = _apart(eqn.params, values)
        return loop_p.bind(*values, loops=loops, **params)

    return Rules("differentiable", {lax.while_p: rule})


def _apart(params: dict, values: Sequence[Any]) -> tuple[dict, Sequence[Any]]:
    """A `while` whose predicate differs between the shards of a mesh, with all of its values as such that differ.

    Its counters differ then, and what a step sums over the shards would wait for those that have finished.
    """
    axes = manual_axes.axes_of(params["cond_jaxpr"].out_avals[0])
    if not axes:
        return params, values
    jaxprs = {}
    for key in ("cond_jaxpr", "body_jaxpr"):
        retyped = lambda *values, j=params[key]: [manual_axes.vary(x, axes) for x in run(RETYPING, j, values)]
        jaxprs[key] = _jax.stage_flat(retyped, [manual_axes.vary(a, axes) for a in params[key].in_avals], _jax.no_names)
    return {**params, **jaxprs}, [manual_axes.vary(x, axes) for x in values]


def _is_inexact(x: Any) -> bool:
    return jax.dtypes.issubdtype(jax.typeof(x).dtype, jnp.inexact)


# ------------------------------------------------------------------------------------------------ forward


def _forward(*values, sweep, base):
    x, kept = checkpointed.forward(sweep, *_cut(values, sweep.sizes[0]))
    return [*x, *tree_leaves(kept)]


def _forward_types(*avals, sweep, base):
    return [*sweep.avals[1], *tree_leaves(Kept.avals(sweep))], set(sweep.leaf.effects)


def _forward_jvp(primals, given, *, sweep, base):
    n_c, n_x = base.sizes[:2]
    outputs = forward_p.bind(*primals, sweep=sweep, base=base)
    on = tuple(t is not None for t in given)
    flags = base.active((on[:n_c], on[n_c:], ()))
    back = base.vjp(flags)
    kept = outputs[n_x:] if back is sweep else forward_p.bind(*primals, sweep=back, base=base)[n_x:]
    found = tangent_p.bind(*primals, *kept, *_instantiated(flags, primals, given), sweep=base, flags=flags, back=back)
    return outputs, [*merged([None] * n_x, flags[1], found), *[None] * (len(outputs) - n_x)]


def _forward_batch(axis, values, dims, *, sweep, base):
    n_c, _, n_y, _ = sweep.sizes
    on = tuple(d is not None for d in dims)
    wide, (c, x, _), residuals, _ = sweep.batched(
        axis, (on[:n_c], on[n_c:], (False,) * n_y), (False,) * len(sweep.residuals)
    )
    narrow, *_ = base.batched(axis, (on[:n_c], on[n_c:], ()), ())
    outputs = forward_p.bind(*_lanes(axis, values, dims, [*c, *x]), sweep=wide, base=narrow)
    return outputs, [*_axes(x), *tree_leaves(_kept_axes(sweep, wide, x, residuals), is_leaf=lambda d: d is None)]


# ------------------------------------------------------------------------------------------------ sweep


def _sweep(*values, sweep, is_kept):
    n_c, n_x, n_y, _ = sweep.sizes
    c, x, y, kept = _cut(values, n_c, n_x, n_y)
    if is_kept:
        y, totals = checkpointed.backward(sweep, c, x, tree_unflatten(_kept_tree(sweep), kept), y)
        return [*y, *totals]
    if not n_y:
        return checkpointed.plain(sweep, c, x)
    last, kept = checkpointed.forward(sweep, c, x)
    y, totals = checkpointed.backward(sweep, c, x, kept, y)
    return [*last, *y, *totals]


def _sweep_types(*avals, sweep, is_kept):
    _, x, y, totals = sweep.avals
    return [*([] if is_kept else x), *y, *totals], {*sweep.leaf.effects, *sweep.pull.effects}


def _sweep_jvp(primals, given, *, sweep, is_kept):
    n_c, n_x, n_y, _ = sweep.sizes
    outputs = sweep_p.bind(*primals, sweep=sweep, is_kept=is_kept)
    n = 0 if is_kept else n_x  # of x among the outputs
    c, x, y, _ = _cut(given, n_c, n_x, n_y)
    on = lambda values: tuple(t is not None for t in values)
    if not any(on([*c, *x])):  # linear in y
        y = [subjaxprs.zeros(a) if t is None else t for t, a in zip(y, tangents(sweep.avals[2]), strict=True)]
        known = primals[: n_c + n_x], primals[n_c + n_x + n_y :]
        found = sweep_p.bind(*known[0], *y, *known[1], sweep=sweep, is_kept=is_kept)
        return outputs, [*[None] * n, *found[n:]]
    flags = sweep.active((on(c), on(x), on(y)))
    primals, given = primals[: n_c + n_x + n_y], given[: n_c + n_x + n_y]
    found = tangent_p.bind(*primals, *_instantiated(flags, primals, given), sweep=sweep, flags=flags, back=None)
    tx, found = _cut(found, sum(flags[1]))
    ty, tt = _cut(found, sum(flags[2]))
    return outputs, [*([] if is_kept else merged([None] * n_x, flags[1], tx)), *merged([None] * n_y, flags[2], ty), *tt]


def _sweep_transpose(cotangents, *values, sweep, is_kept):
    n_c, n_x, n_y, _ = sweep.sizes
    c, x, _, kept = _cut(values, n_c, n_x, n_y)
    cotangents = [None] * n_x * is_kept + list(cotangents)
    flags = (False,) * n_c, (False,) * n_x, (True,) * n_y
    found = _pulled(sweep, flags, c, x, [None] * n_y, None, cotangents[n_x:])
    return [*[None] * (n_c + n_x), *found, *[None] * len(kept)]


def _sweep_batch(axis, values, dims, *, sweep, is_kept):
    n_c, n_x, n_y, _ = sweep.sizes
    dims_c, dims_x, dims_y, dims_kept = _cut(dims, n_c, n_x, n_y)
    on = lambda dims: tuple(d is not None for d in dims)
    c, x, y, residuals = on(dims_c), on(dims_x), on(dims_y), (False,) * len(sweep.residuals)
    if is_kept:
        kept_on = tree_unflatten(_kept_tree(sweep), on(dims_kept))
        x = tuple(map(operator.or_, x, kept_on.states))
        residuals = tuple(kept_on.tape) or residuals
    wide, (c, x, y), residuals, totals = sweep.batched(axis, (c, x, y), residuals)
    n = n_c + n_x + n_y
    lanes = _lanes(axis, values[:n], dims[:n], [*c, *x, *y])
    if is_kept:
        to = tree_leaves(_kept_axes(sweep, wide, x, residuals), is_leaf=lambda d: d is None)
        lanes += _kept_lanes(axis, values[n:], dims_kept, to)
    outputs = sweep_p.bind(*lanes, sweep=wide, is_kept=is_kept)
    return outputs, _axes([*(() if is_kept else x), *y, *totals])


# ------------------------------------------------------------------------------------------------ tangent


def _tangent(*values, sweep, flags, back):
    """The tangents of the JVP's outputs, bound or computed."""
    (n_c, n_x, n_y, n_t), counts = sweep.sizes, [sum(f) for f in flags]
    n_kept = len(values) - n_c - n_x - n_y - sum(counts)
    c, x, y, _, tc, tx, ty = _cut(values, n_c, n_x, n_y, n_kept, *counts[:2])
    outputs = sweep_p.bind(*c, *tc, *x, *tx, *y, *ty, sweep=sweep.jvp(flags), is_kept=False)
    _, tx, _, ty, _, tt = _cut(outputs, n_x, counts[1], n_y, counts[2], n_t)
    return [*tx, *ty, *tt]


def _tangent_types(*avals, sweep, flags, back):
    _, x, y, totals = sweep.avals
    return [*tangents(x, flags[1]), *tangents(y, flags[2]), *tangents(totals)], set(sweep.leaf.effects)


def _tangent_jvp(primals, given, *, sweep, flags, back):
    n = len(primals) - sum(map(sum, flags))
    params = dict(sweep=sweep, flags=flags, back=back)
    if not any(t is not None for t in given[:n]):
        linear = [
            subjaxprs.zeros(jax.typeof(x)) if t is None else t for x, t in zip(primals[n:], given[n:], strict=True)
        ]
        return tangent_p.bind(*primals, **params), tangent_p.bind(*primals[:n], *linear, **params)
    on = [t is not None for t in given]
    f = lambda *some: _tangent(*merged(primals, on, some), **params)
    return jax.jvp(f, chosen(primals, on), chosen(given, on))


def _tangent_transpose(cotangents, *values, sweep, flags, back):
    n_c, n_x, n_y, _ = sweep.sizes
    n = n_c + n_x + n_y
    c, x, y, rest = _cut(values, n_c, n_x, n_y)
    kept = rest[: len(rest) - sum(map(sum, flags))]
    found = _pulled(sweep, flags, c, x, y, (back, kept) if back else None, cotangents)
    return [*[None] * (n + len(kept)), *found]


def _pulled(sweep, flags, c, x, y, run, cotangents):
    """The cotangents of the flagged c, x and y from those of the flagged x, the flagged y and the totals of a sweep."""
    _, fx, fy = flags
    avals = [*tangents(sweep.avals[1], fx), *tangents(sweep.avals[2], fy), *tangents(sweep.avals[3])]
    found = [subjaxprs.zeros(a) if ct is None else ct for ct, a in zip(cotangents, avals, strict=True)]
    ct_x, ct_y, ct_totals = _cut(found, sum(fx), sum(fy))
    back, kept = run or (sweep.vjp(flags), [])
    y = y if sweep.needs_y(flags) else []
    outputs = sweep_p.bind(*c, *ct_totals, *x, *ct_y, *y, *ct_x, *kept, sweep=back, is_kept=run is not None)
    _, ct_y, _, ct_x, ct_c = _cut(outputs, 0 if run else len(x), sum(fy), len(y), sum(fx))
    weak = [*tangents(sweep.avals[0], flags[0]), *avals[: sum(fx)]]
    return [*(_jax.cast(ct, a) if a.weak_type else ct for ct, a in zip([*ct_c, *ct_x], weak, strict=True)), *ct_y]


def _tangent_batch(axis, values, dims, *, sweep, flags, back):
    # Without what the forward run kept: lanes that share a constant would each have its cotangent.
    sizes = sweep.sizes[:3]
    n, counts = sum(sizes), [sum(f) for f in flags]
    linear = len(values) - sum(counts)
    on = [d is not None for d in dims]
    primal, beside = _cut(on[:n], *sizes[:2]), _cut(on[linear:], *counts[:2])
    joint = tuple(
        tuple(map(operator.or_, p, merged([False] * len(p), f, t)))
        for p, f, t in zip(primal, flags, beside, strict=True)
    )
    wide, found, _, totals = sweep.batched(axis, joint, (False,) * len(sweep.residuals))
    to = [*itertools.chain(*found), *itertools.chain(*map(chosen, found, flags))]
    lanes = _lanes(axis, [*values[:n], *values[linear:]], [*dims[:n], *dims[linear:]], to)
    outputs = tangent_p.bind(*lanes, sweep=wide, flags=flags, back=None)
    return outputs, _axes([*chosen(found[1], flags[1]), *chosen(found[2], flags[2]), *totals])


# ------------------------------------------------------------------------------------------------ lists of values


def _cut(values: Sequence[Any], *sizes: int) -> list[list[Any]]:
    """Lists of these sizes, and the rest."""
    bounds = [0, *itertools.accumulate(sizes), len(values)]
    return [list(values[a:b]) for a, b in itertools.pairwise(bounds)]


def _instantiated(flags: Flags, primals: Sequence[Any], given: Sequence[Any]) -> list[Any]:
    """The tangents of flagged values, zeros among them."""
    every = tuple(f for part in flags for f in part)
    zero = lambda x: subjaxprs.zeros(jax.typeof(x).to_tangent_aval())
    return [zero(x) if t is None else t for x, t in zip(chosen(primals, every), chosen(given, every), strict=True)]


def _axes(flags: Sequence[bool]) -> list[int | None]:
    return [0 if f else None for f in flags]


def _lanes(axis: Any, values: Sequence[Any], dims: Sequence[int | None], flags: Sequence[bool]) -> list[Any]:
    """Values with their lanes in front, also those that are the same in all where flagged."""
    return [_moved(axis, x, d, 0 if f else None) for x, d, f in zip(values, dims, flags, strict=True)]


def _moved(axis: Any, x: Any, d: int | None, to: int | None) -> Any:
    if d is None and to is not None:
        return jnp.broadcast_to(jnp.expand_dims(x, to), (*jnp.shape(x)[:to], axis.size, *jnp.shape(x)[to:]))
    return x if d is None or to is None else jnp.moveaxis(x, d, to)


def _kept_tree(sweep: Sweep) -> Any:
    return tree_structure(Kept.avals(sweep))


def _kept_axes(sweep: Sweep, wide: Sweep, x: Flag, residuals: Flag) -> Kept:
    """Where the lanes are in what a batched sweep keeps: behind the checkpoints, or steps."""
    second = lambda flags: [1 if f else None for f in flags]
    running, tape = [wide.prefix != sweep.prefix], residuals
    if sweep.loops.residual_steps == 1:
        running, tape = [], ()
    return Kept(None, None, None, None, second(x), second(running), second(tape), _axes(x))


def _kept_lanes(axis: Any, values: Sequence[Any], dims: Sequence[int | None], to: Sequence[int | None]) -> list[Any]:
    """What was kept, as a batched sweep takes it. Where lanes hold what they share, some may hold zeros in its place."""
    steps = values[0]
    lane = None if dims[0] is None else jnp.argmax(steps)
    shared = lambda x, d: lax.dynamic_index_in_dim(x, 0 if lane is None else lane, d, keepdims=False)
    return [
        shared(x, d) if t is None and d is not None else _moved(axis, x, d, t)
        for x, d, t in zip(values, dims, to, strict=True)
    ]


def _compiled(impl: Any) -> Any:
    """`impl` for values at hand: compiled once for a sweep."""

    @functools.wraps(impl)
    def run(*values, sweep, **params):
        key = ("compiled", impl, *params.values())
        if key not in sweep.memo:
            sweep.memo[key] = jax.jit(functools.partial(impl, sweep=sweep, **params))
        return sweep.memo[key](*values)

    return run


def _refused(cotangents, *values, **params):
    raise NotImplementedError("a loop is no linear function: differentiate it before it is transposed")


loop_p = _jax.primitive("loop", _loop, _loop, _loop_types, _loop_jvp, _loop_batch, _refused)
_jax.split_by(_loop_split, loop_p)
forward_p = _jax.primitive(
    "forward", _forward, _compiled(_forward), _forward_types, _forward_jvp, _forward_batch, _refused
)
sweep_p = _jax.primitive("sweep", _sweep, _compiled(_sweep), _sweep_types, _sweep_jvp, _sweep_batch, _sweep_transpose)
tangent_p = _jax.primitive(
    "tangent", _tangent, _compiled(_tangent), _tangent_types, _tangent_jvp, _tangent_batch, _tangent_transpose
)
