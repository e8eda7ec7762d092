"""Sub-jaxprs: where each primitive keeps them, and how an equation is bound with new ones.

`tests/test_jax_contracts.py` pins each layout, per version of JAX.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import lax

from . import _jax, manual_axes


class Body(NamedTuple):
    """A sub-jaxpr of an equation: its label (the parameter, with an index where there are several) and closed jaxpr."""

    label: str
    jaxpr: _jax.ClosedJaxpr


# primitive -> the parameters that hold its sub-jaxprs. All others are operations, also reductions with combiners and kernels.
_BODIES = {
    "jit": ("jaxpr",),
    "scan": ("jaxpr",),
    "while": ("cond_jaxpr", "body_jaxpr"),
    "loop": ("cond_jaxpr", "body_jaxpr"),  # funcgrad's reversible while
    "cond": ("branches",),
    "remat2": ("jaxpr",),
    "closed_call": ("call_jaxpr",),
    "call": ("call_jaxpr",),
    "eval_jaxpr": ("call_jaxpr", "jaxpr"),  # the same since JAX 0.11, where it was `jaxpr` before
    "composite": ("call_jaxpr", "jaxpr"),
    "custom_vmap_call": ("call",),
    "custom_linear_solve": ("jaxprs",),
    "custom_jvp_call": ("call_jaxpr",),
    "custom_vjp_call": ("call_jaxpr",),
    "shard_map": ("jaxpr",),
    "compute_on": ("jaxpr",),
}

# Their parameters also hold Python functions (derivative rules, specs that tracing computes), bound by `process_*` methods.
FUNCTIONAL = frozenset({"custom_jvp_call", "custom_vjp_call", "shard_map"})
# Calls that give a body a name or a batching rule, which a new body may not fit: it is evaluated in place of the call.
INLINED = frozenset({"composite", "custom_vmap_call"})
WITH_DERIVATIVES = frozenset({"custom_jvp_call", "custom_vjp_call"})
# Calls run their one sub-jaxpr once, with their own operands; plain calls do nothing else.
PLAIN_CALLS = frozenset({"closed_call", "call", "eval_jaxpr"})
CALLS = PLAIN_CALLS | INLINED | WITH_DERIVATIVES | {"jit", "remat2", "compute_on"}
LOOPS = frozenset({"while", "loop"})
SWEEPS = frozenset({"forward", "sweep", "tangent"})  # funcgrad's differentiated loops: forward, backward, both


def has_bodies(primitive: _jax.Primitive) -> bool:
    """Whether equations of this primitive may have sub-jaxprs."""
    return primitive.name in _BODIES


def bodies(eqn: Any) -> list[Body]:
    """The sub-jaxprs of an equation, in a fixed order; empty for an operation."""
    sub_jaxprs = []
    for key in _BODIES.get(eqn.primitive.name, ()):
        value = eqn.params.get(key)
        if value is None:
            continue
        if isinstance(value, tuple):  # branches; custom_linear_solve leaves out what was not given
            labels = getattr(value, "_fields", range(len(value)))
            sub_jaxprs += [
                Body(f"{key}[{k}]", _jax.close(j)) for k, j in zip(labels, value, strict=True) if j is not None
            ]
        else:
            sub_jaxprs.append(Body(key, _jax.close(value)))
    return sub_jaxprs


class Lifted(NamedTuple):
    """A jaxpr with its constants as leading inputs, and their values."""

    jaxpr: _jax.ClosedJaxpr
    consts: list[Any]
    n_extras: int = 0  # outputs behind those of the jaxpr that it replaces


def lifted(j: _jax.ClosedJaxpr) -> Lifted:
    """Turn the constants of a jaxpr into leading inputs."""
    return Lifted(_jax.close(_jax.convert_constvars_jaxpr(j.jaxpr)), list(j.consts)) if j.consts else Lifted(j, [])


def rebind(primitive: _jax.Primitive, params: dict, values: Sequence[Any], new: Sequence[Lifted]) -> list[Any]:
    """Bind an equation with new sub-jaxprs of the same input types, whose constants become operands.

    A sub-jaxpr may not hold values of an enclosing trace, so each layout has a place for constants among the operands.
    Additional outputs of a sub-jaxpr follow the equation's own: stacked by a scan; those of the last iteration of a while, or
    zeros; those of all branches of a cond, zeros for the branches that did not run.
    """
    params, values = _LAYOUTS.get(primitive.name, _call)(dict(params), list(values), new)
    return _jax.bind(primitive, params, values)


def has_room(eqn: Any, k: int = -1) -> bool:
    """Whether `rebind` can return additional outputs of the equation's k-th sub-jaxpr: not of the predicate of a while."""
    if eqn.primitive.name in LOOPS:
        return k != 0 and bodies(eqn)[0].jaxpr.jaxpr.outvars[0].aval.shape == ()
    return eqn.primitive.name not in ("custom_linear_solve", "shard_map")


def _call(params: dict, values: list, new: Sequence[Lifted]) -> tuple[dict, list]:
    ((body, consts, _),) = new
    key = next(k for k in ("jaxpr", "call_jaxpr") if k in params)
    is_closed = hasattr(params[key], "consts")
    return {**params, key: body if is_closed else body.jaxpr}, [*consts, *values]


def _jit(params: dict, values: list, new: Sequence[Lifted]) -> tuple[dict, list]:
    _, consts, extras = new[0]
    for key, default in (("in_shardings", _jax.UNSPECIFIED), ("in_layouts", None), ("donated_invars", False)):
        params[key] = (default,) * len(consts) + tuple(params[key])
    for key, default in (("out_shardings", _jax.UNSPECIFIED), ("out_layouts", None)):
        params[key] = tuple(params[key]) + (default,) * extras
    return _call(params, values, new)


def _compute_on(params: dict, values: list, new: Sequence[Lifted]) -> tuple[dict, list]:
    types = _out_types(new[0].jaxpr)
    spaces = tuple(aval.memory_space for aval in types[len(types) - new[0].n_extras :])
    params["out_memory_spaces"] = tuple(params["out_memory_spaces"]) + spaces
    return _call(params, values, new)


def _scan(params: dict, values: list, new: Sequence[Lifted]) -> tuple[dict, list]:
    n, extras = len(new[0].consts), new[0].n_extras
    if "num_consts" in params:
        params["num_consts"] += n
    elif n or extras:  # since JAX 0.11
        consts, carry, xs = params["ft_in"].unpack()
        params["ft_in"] = _jax.flattree.pack((_jax.flattree.nones(n + len(consts)), carry, xs))
        carry, ys = params["ft_out"].unpack()
        params["ft_out"] = _jax.flattree.pack((carry, _jax.flattree.nones(len(ys) + extras)))
    return _call(params, values, new)


def _while(params: dict, values: list, new: Sequence[Lifted]) -> tuple[dict, list]:
    cond, body = new
    n = params["cond_nconsts"]
    extras = tuple(_out_types(body.jaxpr)[len(body.jaxpr.jaxpr.outvars) - body.n_extras :])
    params.update(cond_jaxpr=_ignoring(cond.jaxpr, extras), body_jaxpr=_ignoring(body.jaxpr, extras))
    params["cond_nconsts"] += len(cond.consts)
    params["body_nconsts"] += len(body.consts)
    return params, [*cond.consts, *values[:n], *body.consts, *values[n:], *map(zeros, extras)]


def _cond(params: dict, values: list, new: Sequence[Lifted]) -> tuple[dict, list]:
    index, *operands = values
    branches, consts, extras = zip(*new, strict=True)
    counts = tuple(map(len, consts))
    branches = _padded(branches[0], branches[1:], extras) if any(extras) else branches
    branches = _widened(branches[0], branches[1:], counts) if any(counts) else branches
    return {**params, "branches": branches}, [index, *(c for cs in consts for c in cs), *operands]


def has_effects(eqn: Any, values: Sequence[Any]) -> bool:
    """Whether an equation with these operands has effects or takes references."""
    if not all(_jax.is_array(jax.typeof(x)) for x in values):
        return True
    body_effects = [body.jaxpr.jaxpr.effects for body in bodies(eqn)]
    sets = body_effects if body_effects else [eqn.primitive.abstract_eval(*map(jax.typeof, values), **eqn.params)[1]]
    return any(not isinstance(effect, _jax.NamedAxisEffect) for effects in sets for effect in effects)


def is_elided(eqn: Any, values: Sequence[Any], outputs: Sequence[Any]) -> bool:
    """Whether tracing leaves out the equation: a conversion of a number, or of a value to its own type."""
    constant = getattr(values[0], "get_const", lambda: values[0])() if values else None
    if eqn.primitive is lax.convert_element_type_p and constant is not None and not isinstance(constant, jax.Array):
        return jax.typeof(constant).shape == ()
    is_forwarding = eqn.primitive in _jax.forwarding_rules and not bodies(eqn)
    return is_forwarding and jax.typeof(values[0]) == jax.typeof(outputs[0])


def zeros(aval: Any) -> jax.Array:
    """Zeros of a type, keys among them, sharded as it is."""
    sharding = getattr(aval, "sharding", None)
    explicit = sharding if sharding is not None and any(sharding.spec) else None
    return manual_axes.vary(lax.full(aval.shape, 0, aval.dtype, sharding=explicit), manual_axes.axes_of(aval))


def _out_types(jaxpr: _jax.ClosedJaxpr) -> list[Any]:
    return [v.aval for v in jaxpr.jaxpr.outvars]


@_jax.weakref_lru_cache
def _ignoring(jaxpr: _jax.ClosedJaxpr, avals: tuple[Any, ...]) -> _jax.ClosedJaxpr:
    """The jaxpr with additional inputs of these types, which it ignores."""
    open_jaxpr = jaxpr.jaxpr
    invars = [*open_jaxpr.invars, *map(_jax.Var, avals)]
    return _jax.close(open_jaxpr.replace(invars=invars, debug_info=_jax.unnamed(open_jaxpr))) if avals else jaxpr


@_jax.weakref_lru_cache
def _padded(
    first: _jax.ClosedJaxpr, rest: tuple[_jax.ClosedJaxpr, ...], extras: tuple[int, ...]
) -> tuple[_jax.ClosedJaxpr, ...]:
    """Branches that each return the additional outputs of all branches: zeros for those of other branches."""
    jaxprs = (first, *rest)
    types = [_out_types(j)[len(j.jaxpr.outvars) - n :] for j, n in zip(jaxprs, extras, strict=True)]

    def branch(k, *values):
        outputs = _jax.jaxpr_as_fun(jaxprs[k])(*values)
        own = len(outputs) - extras[k]
        filled = (outputs[own:] if i == k else map(zeros, avals) for i, avals in enumerate(types))
        return [*outputs[:own], *(x for part in filled for x in part)]

    return tuple(
        _jax.stage_flat(partial(branch, k), [v.aval for v in j.jaxpr.invars], _jax.unnamed(j.jaxpr))
        for k, j in enumerate(jaxprs)
    )


@_jax.weakref_lru_cache
def _widened(
    first: _jax.ClosedJaxpr, rest: tuple[_jax.ClosedJaxpr, ...], counts: tuple[int, ...]
) -> tuple[_jax.ClosedJaxpr, ...]:
    """Branches that each take the constants of all branches, and read their own."""
    jaxprs = [j.jaxpr for j in (first, *rest)]
    variables = [[_jax.Var(v.aval) for v in j.invars[:n]] for j, n in zip(jaxprs, counts, strict=True)]
    branches = []
    for k, (j, n) in enumerate(zip(jaxprs, counts, strict=True)):
        consts = [v for i, own in enumerate(variables) for v in (j.invars[:n] if i == k else own)]
        branches.append(_jax.close(j.replace(invars=[*consts, *j.invars[n:]], debug_info=_jax.unnamed(j))))
    return tuple(branches)


def _linear_solve(params: dict, values: list, new: Sequence[Lifted]) -> tuple[dict, list]:
    lengths, jaxprs = params["const_lengths"], params["jaxprs"]
    lifted = iter(new)
    at, operands, counts, rebuilt = 0, [], [], []
    for length, jaxpr in zip(lengths, jaxprs, strict=True):
        body, consts, _ = next(lifted) if jaxpr is not None else Lifted(None, [])
        operands += [*consts, *values[at : at + length]]
        at += length
        counts.append(length + len(consts))
        rebuilt.append(body)
    params.update(const_lengths=type(lengths)(*counts), jaxprs=type(jaxprs)(*rebuilt))
    return params, [*operands, *values[at:]]


_LAYOUTS = {
    "jit": _jit,
    "scan": _scan,
    "while": _while,
    "loop": _while,
    "cond": _cond,
    "compute_on": _compute_on,
    "custom_linear_solve": _linear_solve,
}


def emptied(params: dict) -> dict:
    """The parameters of a `shard_map` with the identity on the outputs of its body as its body."""
    outputs = [_jax.Var(v.aval) for v in params["jaxpr"].outvars]
    names = _jax.unnamed(params["jaxpr"])
    body = params["jaxpr"].replace(
        constvars=[], invars=outputs, outvars=outputs, eqns=[], effects=set(), debug_info=names
    )
    return {**params, "jaxpr": body}


def is_plain(eqn: Any) -> bool:
    """Whether `eqn` is a jit without placement or donation: its body may be inlined."""
    return eqn.primitive.name == "jit" and not any(eqn.params["donated_invars"]) and is_placed_freely(eqn.params)


def is_inlined(eqn: Any) -> bool:
    """Whether `eqn` is a jit that tracing inlines: a Graph has its body in its place."""
    early = getattr(jax, "Inline", None)  # since JAX 0.11 `inline` is one of several times
    is_early = eqn.params.get("inline") is (early.JAX_EARLY if early else True)
    return is_early and eqn.primitive.name == "jit" and is_placed_freely(eqn.params)


def is_placed_freely(params: dict) -> bool:
    """Whether a jit with these parameters constrains neither shardings nor layouts."""
    keys = ("in_shardings", "out_shardings", "in_layouts", "out_layouts")
    return all(x is None or x is _jax.UNSPECIFIED for key in keys for x in params[key])


def scan_sizes(eqn: Any) -> tuple[int, int, int]:
    """How many inputs of a scan's body are constants, carry and slices."""
    p = eqn.params
    if "num_consts" in p:
        consts, carry = p["num_consts"], p["num_carry"]
    else:  # since JAX 0.11
        consts, carry = map(len, p["ft_in"].unpack()[:2])
    return consts, carry, len(bodies(eqn)[0].jaxpr.jaxpr.invars) - consts - carry


def operands(eqn: Any, values: Sequence[Any]) -> list[list[Any]]:
    """For each sub-jaxpr of `eqn`, the operand that each input is at first, or is a slice of; None for other inputs."""
    name, p, values = eqn.primitive.name, eqn.params, list(values)
    if name in LOOPS:
        n = p["cond_nconsts"]
        return [values[:n] + values[n + p["body_nconsts"] :], values[n:]]
    if name == "cond":
        return [values[1:]] * len(p["branches"])
    if name == "custom_linear_solve":
        return [[None] * len(body.jaxpr.jaxpr.invars) for body in bodies(eqn)]
    return [values]


def results(eqn: Any) -> list[list[int | None]]:
    """For each sub-jaxpr of `eqn`, the output of the equation that each output is, or is a slice of; None for other outputs."""
    name = eqn.primitive.name
    returned = [len(body.jaxpr.jaxpr.outvars) for body in bodies(eqn)]
    if name in LOOPS:
        return [[None], list(range(returned[1]))]
    if name == "custom_linear_solve":
        return [[None] * n for n in returned]
    return [list(range(n)) for n in returned]


def invariant_operands(eqn: Any, values: Sequence[Any]) -> list[list[Any]]:
    """As `operands`, with None also for inputs that change from iteration to iteration."""
    name, p, inputs = eqn.primitive.name, eqn.params, operands(eqn, values)
    counts = list(map(len, inputs))
    if name == "scan":
        counts = [scan_sizes(eqn)[0]]
    elif name in LOOPS:
        counts = [p["cond_nconsts"], p["body_nconsts"]]
    elif name == "shard_map":
        counts = [0]
    return [[*xs[:n], *[None] * (len(xs) - n)] for xs, n in zip(inputs, counts, strict=True)]
