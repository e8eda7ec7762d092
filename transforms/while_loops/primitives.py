"""The primitives of a differentiable loop, and what each transform makes of them.

    loop      a `while` with a reverse mode; its parameters are those of `while`, and it lowers to one
    forward   the forward sweep, which returns its checkpoints beside the last x
    sweep     a sweep: forward and back, or back alone from the checkpoints of `forward`
    tangent   the linear part of a sweep: the tangents of its outputs from those of its inputs

The JVP of a loop is `forward` and `tangent`; the transpose of `tangent` is the sweep that is the VJP. Checkpoints have no
tangents: where c or x have tangents, the checkpoints are computed again, as a function of c and x.
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
from .adjoint import Flag, Flags, Sweep, chosen, cut, merged, tangents
from .checkpointed import Checkpoints
from .schedule import Loops

# ------------------------------------------------------------------------------------------------ loop


def _loop(*values, loops, **params):
    return _jax.bind(lax.while_p, params, values)


def _loop_types(*avals, loops, cond_jaxpr, body_jaxpr, **counts):
    return body_jaxpr.out_avals, {*cond_jaxpr.effects, *body_jaxpr.effects}


def _loop_jvp(primals, in_tangents, *, loops, **params):
    base = _sweep_of(loops, params)
    n, (n_c, n_x, _, _) = params["cond_nconsts"], base.sizes
    c, x = _present([*[None] * n, *in_tangents[n:]], n_c)
    flags = base.active((c, x, ()))
    if not any(flags[1]):
        return _jax.bind(lax.while_p, params, primals), [None] * n_x
    sweep = base.vjp(flags)
    outputs = forward_p.bind(*primals, sweep=sweep, base=base)
    return outputs[:n_x], _tangents_of_x(base, flags, sweep, primals, outputs[n_x:], in_tangents)


def _tangents_of_x(base, flags, sweep, primals, checkpoints, in_tangents):
    """The tangents of the last x of a loop, None where it has none."""
    linear = _instantiated(flags, primals, in_tangents)
    out_tangents = tangent_p.bind(*primals, *checkpoints, *linear, sweep=base, flags=flags, back=sweep)
    return merged([None] * base.sizes[1], flags[1], out_tangents)


def _loop_split(values, later, *, loops, **params):
    """Partial evaluation of a loop that carries tangents beside primals, which alone are known: the rest is linear."""
    base = _sweep_of(loops, params)
    n_c, n_x = base.sizes[:2]
    is_unknown = tuple(x is None for x in values)
    flags = base.active((is_unknown[:n_c], is_unknown[n_c:], ()))
    sweep = base.vjp(flags)
    primals = _or_zeros(values, base.step.in_avals)
    outputs = forward_p.bind(*primals, sweep=sweep, base=base)
    linear = [
        None if value is None else subjaxprs.zeros(jax.typeof(value).to_tangent_aval())
        for value in chosen(values, (*flags[0], *flags[1]))
    ]
    unknown = later(tangent_p, [*primals, *outputs[n_x:], *linear], dict(sweep=base, flags=flags, back=sweep))
    return merged(outputs[:n_x], flags[1], unknown)


def _loop_batch(axis, values, dims, *, loops, **params):
    return live(functools.partial(_jax.batch_while, axis, values, dims, **params), rules(loops))()


def _sweep_of(loops: Loops, params: dict) -> Sweep:
    """A `while` as a sweep without y; the loops in its body are differentiable too."""
    cond_jaxpr, body_jaxpr, n, m = (params[k] for k in ("cond_jaxpr", "body_jaxpr", "cond_nconsts", "body_nconsts"))
    memo = _SWEEPS.setdefault(body_jaxpr.jaxpr, {})
    key = cond_jaxpr.jaxpr, loops, n, m, _jax.trace_context()
    if key not in memo:
        c, x = [*cond_jaxpr.in_avals[:n], *body_jaxpr.in_avals[:m]], list(body_jaxpr.in_avals[m:])
        cond = lambda c, x: run(rules(loops), cond_jaxpr, [*c[:n], *x])[0]
        step = lambda c, x: run(rules(loops), body_jaxpr, [*c[n:], *x])
        memo[key] = Sweep.of(cond, step, lambda c, x, y: (step(c, x), [], []), (c, x, []), 0, loops)
    return memo[key]


_SWEEPS: WeakKeyDictionary[Any, dict[Any, Sweep]] = WeakKeyDictionary()  # by body


@functools.lru_cache(maxsize=256)
def rules(loops: Loops) -> Rules:
    """The table that gives each `while` a reverse mode within `loops`."""

    def rule(eqn, *values):
        effects = {*eqn.params["cond_jaxpr"].effects, *eqn.params["body_jaxpr"].effects}
        has_derivative = any(jnp.issubdtype(jax.typeof(x).dtype, jnp.inexact) for x in values)
        if not (has_derivative and _jax.are_repeatable(effects)):
            return _jax.bind(lax.while_p, eqn.params, values)
        params, values = _varying(eqn.params, values)
        return loop_p.bind(*values, loops=loops, **params)

    return Rules("differentiable", {lax.while_p: rule})


def _varying(params: dict, values: Sequence[Any]) -> tuple[dict, Sequence[Any]]:
    """A `while` whose values all vary along the mesh axes of its predicate.

    Where shards take different numbers of steps, a sum over the shards in a step would wait for the finished ones.
    """
    axes = manual_axes.axes_of(params["cond_jaxpr"].out_avals[0])
    if not axes:
        return params, values
    jaxprs = {}
    for key in ("cond_jaxpr", "body_jaxpr"):
        retyped = lambda *values, j=params[key]: [manual_axes.vary(x, axes) for x in run(RETYPING, j, values)]
        jaxprs[key] = _jax.stage_flat(retyped, [manual_axes.vary(a, axes) for a in params[key].in_avals], _jax.no_names)
    return {**params, **jaxprs}, [manual_axes.vary(x, axes) for x in values]


# ------------------------------------------------------------------------------------------------ forward


def _forward(*values, sweep, base):
    return tree_leaves(checkpointed.forward(sweep, *cut(values, sweep.sizes[0])))


def _forward_types(*avals, sweep, base):
    return [*sweep.avals[1], *tree_leaves(Checkpoints.avals(sweep))], set(sweep.fwd.effects)


def _forward_jvp(primals, in_tangents, *, sweep, base):
    n_c, n_x = base.sizes[:2]
    outputs = forward_p.bind(*primals, sweep=sweep, base=base)
    flags = base.active((*_present(in_tangents, n_c), ()))
    vjp = base.vjp(flags)
    checkpoints = (outputs if vjp is sweep else forward_p.bind(*primals, sweep=vjp, base=base))[n_x:]
    out_tangents = _tangents_of_x(base, flags, vjp, primals, checkpoints, in_tangents)
    return outputs, [*out_tangents, *[None] * (len(outputs) - n_x)]


def _forward_batch(axis, values, dims, *, sweep, base):
    n_c, _, n_y, _ = sweep.sizes
    c, x = _present(dims, n_c)
    batched_base, *_ = base.batched(axis, (c, x, ()), ())
    batched, (c, x, _), residuals, _ = sweep.batched(axis, (c, x, (False,) * n_y), (False,) * len(sweep.residuals))
    outputs = forward_p.bind(*_batched(axis, values, dims, [*c, *x]), sweep=batched, base=batched_base)
    return outputs, [*_dims(x), *_checkpoint_dims(sweep, batched, x, residuals)]


# ------------------------------------------------------------------------------------------------ sweep


def _sweep(*values, sweep, has_checkpoints):
    n_c, n_x, n_y, _ = sweep.sizes
    c, x, y, checkpoints = cut(values, n_c, n_x, n_y)
    if has_checkpoints:
        y, totals = checkpointed.backward(sweep, c, x, tree_unflatten(_checkpoint_tree(sweep), checkpoints), y)
        return [*y, *totals]
    if not n_y:
        return checkpointed.plain(sweep, c, x)[1]
    last, checkpoints = checkpointed.forward(sweep, c, x)
    y, totals = checkpointed.backward(sweep, c, x, checkpoints, y)
    return [*last, *y, *totals]


def _sweep_types(*avals, sweep, has_checkpoints):
    _, x, y, totals = sweep.avals
    return [*([] if has_checkpoints else x), *y, *totals], {*sweep.fwd.effects, *sweep.bwd.effects}


def _sweep_jvp(primals, in_tangents, *, sweep, has_checkpoints):
    n_c, n_x, n_y, _ = sweep.sizes
    outputs = sweep_p.bind(*primals, sweep=sweep, has_checkpoints=has_checkpoints)
    n = 0 if has_checkpoints else n_x  # of x among the outputs
    c, x, y, checkpoints = cut(primals, n_c, n_x, n_y)
    c_flags, x_flags, y_flags, _ = _present(in_tangents, n_c, n_x, n_y)
    if not any((*c_flags, *x_flags)):  # linear in y
        ty = _or_zeros(cut(in_tangents, n_c, n_x, n_y)[2], tangents(sweep.avals[2]))
        linear = sweep_p.bind(*c, *x, *ty, *checkpoints, sweep=sweep, has_checkpoints=has_checkpoints)
        return outputs, [*[None] * n, *linear[n:]]
    flags = sweep.active((c_flags, x_flags, y_flags))
    linear = _instantiated(flags, [*c, *x, *y], in_tangents[: n_c + n_x + n_y])
    out_tangents = tangent_p.bind(*c, *x, *y, *linear, sweep=sweep, flags=flags, back=None)
    tx, ty, tt = cut(out_tangents, sum(flags[1]), sum(flags[2]))
    return outputs, [*merged([None] * n_x, flags[1], tx)[:n], *merged([None] * n_y, flags[2], ty), *tt]


def _sweep_transpose(cotangents, *values, sweep, has_checkpoints):
    n_c, n_x, n_y, _ = sweep.sizes
    c, x, _, checkpoints = cut(values, n_c, n_x, n_y)
    flags = (False,) * n_c, (False,) * n_x, (True,) * n_y
    ct_y = _pulled_back(sweep, flags, c, x, [None] * n_y, None, cotangents[0 if has_checkpoints else n_x :])
    return [*[None] * (n_c + n_x), *ct_y, *[None] * len(checkpoints)]


def _sweep_batch(axis, values, dims, *, sweep, has_checkpoints):
    n_c, n_x, n_y, _ = sweep.sizes
    n = n_c + n_x + n_y
    c, x, y, checkpoints = _present(dims, n_c, n_x, n_y)
    residuals = (False,) * len(sweep.residuals)
    if has_checkpoints:
        flags = tree_unflatten(_checkpoint_tree(sweep), checkpoints)
        x = tuple(map(operator.or_, x, flags.states))
        residuals = tuple(flags.tape) or residuals
    batched, (c, x, y), residuals, totals = sweep.batched(axis, (c, x, y), residuals)
    operands = _batched(axis, values[:n], dims[:n], [*c, *x, *y])
    if has_checkpoints:
        to = _checkpoint_dims(sweep, batched, x, residuals)
        operands += _batched_checkpoints(axis, values[n:], dims[n:], to)
    outputs = sweep_p.bind(*operands, sweep=batched, has_checkpoints=has_checkpoints)
    return outputs, _dims([*(() if has_checkpoints else x), *y, *totals])


# ------------------------------------------------------------------------------------------------ tangent


def _tangent(*values, sweep, flags, back):
    """The tangents of the JVP's outputs, bound or computed."""
    (n_c, n_x, n_y, n_t), counts = sweep.sizes, [sum(f) for f in flags]
    n_checkpoints = len(values) - n_c - n_x - n_y - sum(counts)
    c, x, y, _, tc, tx, ty = cut(values, n_c, n_x, n_y, n_checkpoints, *counts[:2])
    outputs = sweep_p.bind(*c, *tc, *x, *tx, *y, *ty, sweep=sweep.jvp(flags), has_checkpoints=False)
    _, tx, _, ty, _, tt = cut(outputs, n_x, counts[1], n_y, counts[2], n_t)
    return [*tx, *ty, *tt]


def _tangent_types(*avals, sweep, flags, back):
    _, x, y, totals = sweep.avals
    return [*tangents(x, flags[1]), *tangents(y, flags[2]), *tangents(totals)], set(sweep.fwd.effects)


def _tangent_jvp(primals, in_tangents, *, sweep, flags, back):
    n = len(primals) - sum(map(sum, flags))
    params = dict(sweep=sweep, flags=flags, back=back)
    if not any(t is not None for t in in_tangents[:n]):
        linear = _or_zeros(in_tangents[n:], map(jax.typeof, primals[n:]))
        return tangent_p.bind(*primals, **params), tangent_p.bind(*primals[:n], *linear, **params)
    (is_active,) = _present(in_tangents)
    f = lambda *active: _tangent(*merged(primals, is_active, active), **params)
    return jax.jvp(f, chosen(primals, is_active), chosen(in_tangents, is_active))


def _tangent_transpose(cotangents, *values, sweep, flags, back):
    c, x, y, rest = cut(values, *sweep.sizes[:3])
    checkpoints = rest[: len(rest) - sum(map(sum, flags))]
    cts = _pulled_back(sweep, flags, c, x, y, (back, checkpoints) if back else None, cotangents)
    return [*[None] * (len(values) - len(cts)), *cts]


def _pulled_back(sweep, flags, c, x, y, run, cotangents):
    """The cotangents of the flagged c, x and y from those of the flagged x, the flagged y and the totals of a sweep."""
    _, fx, fy = flags
    avals = [*tangents(sweep.avals[1], fx), *tangents(sweep.avals[2], fy), *tangents(sweep.avals[3])]
    ct_x, ct_y, ct_totals = cut(_or_zeros(cotangents, avals), sum(fx), sum(fy))
    vjp, checkpoints = run or (sweep.vjp(flags), [])
    y = y if sweep.needs_y(flags) else []
    operands = [*c, *ct_totals, *x, *ct_y, *y, *ct_x, *checkpoints]
    outputs = sweep_p.bind(*operands, sweep=vjp, has_checkpoints=run is not None)
    _, ct_y, _, ct_x, ct_c = cut(outputs, 0 if run else len(x), sum(fy), len(y), sum(fx))
    out_avals = [*tangents(sweep.avals[0], flags[0]), *avals[: sum(fx)]]
    cast = lambda ct, a: _jax.cast(ct, a) if a.weak_type else ct
    return [*map(cast, [*ct_c, *ct_x], out_avals), *ct_y]


def _tangent_batch(axis, values, dims, *, sweep, flags, back):
    # Without the checkpoints: lanes that share a constant would each have its cotangent.
    sizes = sweep.sizes[:3]
    n, counts = sum(sizes), [sum(f) for f in flags]
    linear = len(values) - sum(counts)
    of_tangents = _present(dims[linear:], *counts[:2])
    joint = tuple(
        tuple(map(operator.or_, of_primals, merged([False] * len(f), f, of_linear)))
        for of_primals, f, of_linear in zip(_present(dims[:n], *sizes[:2]), flags, of_tangents, strict=True)
    )
    batched, joint, _, totals = sweep.batched(axis, joint, (False,) * len(sweep.residuals))
    to = [*itertools.chain(*joint), *itertools.chain(*map(chosen, joint, flags))]
    operands = _batched(axis, [*values[:n], *values[linear:]], [*dims[:n], *dims[linear:]], to)
    outputs = tangent_p.bind(*operands, sweep=batched, flags=flags, back=None)
    return outputs, _dims([*chosen(joint[1], flags[1]), *chosen(joint[2], flags[2]), *totals])


# ------------------------------------------------------------------------------------------------ lists of values


def _present(values: Sequence[Any], *sizes: int) -> list[Flag]:
    """Which values are not None, cut as by `cut`."""
    return [tuple(x is not None for x in part) for part in cut(values, *sizes)]


def _or_zeros(values: Sequence[Any], avals: Any) -> list[Any]:
    """The values, with zeros for None."""
    return [subjaxprs.zeros(a) if x is None else x for x, a in zip(values, avals, strict=True)]


def _instantiated(flags: Flags, primals: Sequence[Any], in_tangents: Sequence[Any]) -> list[Any]:
    """The tangents of flagged values, zeros among them."""
    every = tuple(itertools.chain(*flags))
    avals = [jax.typeof(x).to_tangent_aval() for x in chosen(primals, every)]
    return _or_zeros(chosen(in_tangents, every), avals)


def _dims(flags: Sequence[bool]) -> list[int | None]:
    return [0 if f else None for f in flags]


def _batched(axis: Any, values: Sequence[Any], dims: Sequence[int | None], flags: Sequence[bool]) -> list[Any]:
    """Values with their batch axis in front; the flagged ones get one."""
    return [_moved(axis, x, d, to) for x, d, to in zip(values, dims, _dims(flags), strict=True)]


def _moved(axis: Any, x: Any, d: int | None, to: int | None) -> Any:
    if d is None and to is not None:
        return jnp.broadcast_to(jnp.expand_dims(x, to), (*jnp.shape(x)[:to], axis.size, *jnp.shape(x)[to:]))
    return x if d is None or to is None else jnp.moveaxis(x, d, to)


def _checkpoint_tree(sweep: Sweep) -> Any:
    return tree_structure(Checkpoints.avals(sweep))


def _checkpoint_dims(sweep: Sweep, batched: Sweep, x: Flag, residuals: Flag) -> list[int | None]:
    """The batch axes of the checkpoints of a batched sweep: behind the axis of slots, or of steps."""
    second = lambda flags: [1 if f else None for f in flags]
    recorded = [batched.lanes != sweep.lanes, *residuals] if sweep.loops.residual_steps > 1 else []
    return [None] * 4 + second(x) + second(recorded) + _dims(x)


def _batched_checkpoints(
    axis: Any, values: Sequence[Any], dims: Sequence[int | None], to: Sequence[int | None]
) -> list[Any]:
    """Checkpoints as a batched sweep takes them: what lanes share is read from the lane with the most steps."""
    n_steps = values[0]
    lane = 0 if dims[0] is None else jnp.argmax(n_steps)
    shared = lambda x, d: lax.dynamic_index_in_dim(x, lane, d, keepdims=False)
    return [
        shared(x, d) if t is None and d is not None else _moved(axis, x, d, t)
        for x, d, t in zip(values, dims, to, strict=True)
    ]


def _compiled(impl: Any) -> Any:
    """`impl` for concrete values: compiled once per sweep."""

    @functools.wraps(impl)
    def run(*values, sweep, **params):
        key = ("compiled", impl, *params.values())
        if key not in sweep.memo:
            sweep.memo[key] = jax.jit(functools.partial(impl, sweep=sweep, **params))
        return sweep.memo[key](*values)

    return run


def _no_transpose(cotangents, *values, **params):
    raise NotImplementedError("a while loop is not linear in its inputs: differentiate it before you transpose it")


loop_p = _jax.primitive("loop", _loop, _loop, _loop_types, _loop_jvp, _loop_batch, _no_transpose)
_jax.split_by(_loop_split, loop_p)
forward_p = _jax.primitive(
    "forward", _forward, _compiled(_forward), _forward_types, _forward_jvp, _forward_batch, _no_transpose
)
sweep_p = _jax.primitive("sweep", _sweep, _compiled(_sweep), _sweep_types, _sweep_jvp, _sweep_batch, _sweep_transpose)
tangent_p = _jax.primitive(
    "tangent", _tangent, _compiled(_tangent), _tangent_types, _tangent_jvp, _tangent_batch, _tangent_transpose
)
