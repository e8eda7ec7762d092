"""The only door to non-public JAX: `Trace`, and the layouts of equations that hold sub-graphs.

Everything that JAX may move lies here, in three parts: staging a function into a jaxpr, binding equations, and where each
primitive keeps its sub-graphs. `tests/test_jax_contracts.py` pins what is used, per version.

Since JAX 0.11 a `ClosedJaxpr` *is* a `Jaxpr`. Here a "closed" jaxpr is one with `.consts`; on 0.10 that is a `ClosedJaxpr`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from jax import Array, lax
from jax._src import api_util, config, core, dtypes, source_info_util, traceback_util
from jax._src import linear_util as lu
from jax._src.interpreters import partial_eval as pe
from jax._src.lax.lax import _convert_element_type
from jax._src.sharding_impls import UNSPECIFIED
from jax._src.util import weakref_lru_cache
from jax.sharding import get_abstract_mesh, use_abstract_mesh

# Not from jax.extend, whose import costs 17 ms on JAX 0.10.
Jaxpr = core.Jaxpr
if TYPE_CHECKING:
    ClosedJaxpr: TypeAlias = Any
else:
    ClosedJaxpr = getattr(core, "ClosedJaxpr", core.Jaxpr)
JaxprEqn = core.JaxprEqn
Literal = core.Literal
Primitive = core.Primitive
Var = core.Var
Trace = core.Trace
jaxpr_as_fun = core.jaxpr_as_fun
api_boundary = traceback_util.api_boundary
pvary_p = core.pvary_p
set_current_trace = core.set_current_trace
take_current_trace = core.take_current_trace
signature_of = api_util.fun_signature
last_used = core.last_used
short_dtype = dtypes.short_dtype_name
trace_context = config.trace_context  # the configuration that a trace depends on, as a hashable value


# ------------------------------------------------------------------------------------------------ frames and source lines


def hide(folder: str) -> None:
    """Leave the frames of this folder out of tracebacks and out of equations' source lines, as JAX does with its own."""
    prefix = os.path.join(os.path.abspath(folder), "")
    traceback_util.register_exclusion(prefix)
    source_info_util.register_exclusion(prefix)


def source_lines(eqn: Any, frames: int = 1) -> list[tuple[str, int, str]]:
    """The user's frames that made `eqn`, innermost first, as (file, line, function)."""
    found = []
    for frame in source_info_util.user_frames(eqn.source_info.traceback):
        found.append((frame.file_name, frame.start_line, frame.function_name))
        if len(found) == frames:
            break
    return found


def line_of(eqn: Any) -> str | None:
    """The user's line that made `eqn`, as "file.py:41 (function)"."""
    return next((f"{file}:{line} ({function})" for file, line, function in source_lines(eqn)), None)


def scope_of(eqn: Any) -> str:
    """The named scopes of `eqn` within its own graph, joined by slashes; '' at the top."""
    return str(eqn.source_info.name_stack)


def current_source() -> Any:
    """Source information (traceback and name stack) of what is bound now."""
    return source_info_util.current()


def name_stack(eqn: Any = None) -> tuple[Any, ...]:
    """The scopes and transforms around `eqn` within its own graph, or around what is bound now, from the outside in."""
    return (eqn.source_info.name_stack if eqn else source_info_util.current_name_stack()).stack


def scopes(stack: Sequence[Any]) -> tuple[str, ...]:
    """The names on a name stack, 'transpose' where the backward pass begins; other transforms are left out."""
    kinds = source_info_util.Scope, source_info_util.Transform
    named = (s.name for s in stack if isinstance(s, kinds[0]) or s.name == "transpose")
    return tuple(name for names in named for name in names.split("/"))


def without_scopes(source_info: Any) -> Any:
    """Source information with an empty name stack."""
    return source_info.replace(name_stack=source_info_util.NameStack())


# ------------------------------------------------------------------------------------------------ staging


def stage(f: Callable, args: tuple, kwargs: dict, leaves: Sequence[Any], flat: Callable) -> ClosedJaxpr:
    """Trace `flat`, which takes the leaves of (args, kwargs), with the names that `f` gives its arguments."""
    names = api_util.debug_info("funcgrad.trace", f, args, kwargs)
    if names.arg_names is not None and len(names.arg_names) != len(leaves):
        names = names._replace(arg_names=None)
    return stage_flat(flat, [core.shaped_abstractify(leaf) for leaf in leaves], names)


def stage_flat(flat: Callable, avals: Sequence[Any], names: Any) -> ClosedJaxpr:
    """Trace a function of flat values of types `avals` that returns a list; never cached, closed-over tracers become consts.

    Args:
      names: a jaxpr's `debug_info`: what the function and its arguments are called in JAX's messages.
    """
    jaxpr, _, consts = pe.trace_to_jaxpr_dynamic(lu.wrap_init(flat, debug_info=names), tuple(avals))
    return close(jaxpr, consts)


def close(jaxpr: Jaxpr, consts: Sequence[Any] = ()) -> ClosedJaxpr:
    """Attach values to the constant variables of an open jaxpr."""
    return jaxpr if hasattr(jaxpr, "consts") and not consts else ClosedJaxpr(jaxpr, list(consts))


def names_of(jaxpr: Jaxpr) -> Any:
    """What a jaxpr's function and inputs, constants among them, are called in JAX's messages."""
    names = jaxpr.debug_info
    if jaxpr.constvars and names.arg_names is not None:
        names = names._replace(arg_names=("",) * len(jaxpr.constvars) + tuple(names.arg_names))
    return names


def without_results(jaxpr: Jaxpr) -> Any:
    """As `names_of` without constants, for a new graph of the same inputs: its results are named anew."""
    return jaxpr.debug_info._replace(result_paths=None)


def part_of(jaxpr: Jaxpr, invars: Sequence[Var], outvars: Sequence[Var], eqns: Sequence[JaxprEqn]) -> ClosedJaxpr:
    """Some neighbouring equations of a jaxpr, as a jaxpr of their own."""
    effects = pe.make_jaxpr_effects([], invars, outvars, eqns)
    names = jaxpr.debug_info._replace(arg_names=None, result_paths=None)
    inner = jaxpr.replace(
        constvars=[], invars=list(invars), outvars=list(outvars), eqns=list(eqns), effects=effects, debug_info=names
    )
    return close(inner)


def check_jaxpr(jaxpr: ClosedJaxpr) -> None:
    """Type-check every equation; raises JAX's `JaxprTypeError`."""
    core.check_jaxpr(jaxpr.jaxpr)


def out_avals(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """The types of an equation's outputs, also of one that is just being bound to these values."""
    if isinstance(eqn, JaxprEqn):
        return [v.aval for v in eqn.outvars]
    out, _ = eqn.primitive.abstract_eval(*map(core.typeof, values), **eqn.params)
    return list(out) if eqn.primitive.multiple_results else [out]


def fitted(value: Any, aval: Any) -> Any:
    """`value` as an array of type `aval`; None if its shape or dtype differs, or it is no array at all."""
    try:
        given = core.typeof(value)
    except TypeError:
        return None
    if not isinstance(aval, core.ShapedArray):
        return value
    if (given.shape, given.dtype) != (aval.shape, aval.dtype):
        return None
    return value if given.weak_type == aval.weak_type and isinstance(value, Array) else cast(value, aval)


def unforeseen(values: Sequence[Any]) -> frozenset[str]:
    """The mesh axes along which some of these values differ, where what is bound was traced outside of the `shard_map`."""
    return varying(values) if get_abstract_mesh().empty else frozenset()


def varying(values: Sequence[Any]) -> frozenset[str]:
    """The mesh axes along which some of these values differ, inside a `shard_map` that keeps account of them."""
    found = (getattr(core.typeof(v), "manual_axis_type", None) for v in values)
    return frozenset().union(*(m.varying for m in found if m))


def mesh_of(values: Sequence[Any]) -> Any:
    """A context in the mesh that varying values lie on, which an equation traced outside of it does not know."""
    return use_abstract_mesh(next(core.typeof(v).sharding.mesh for v in values if varying([v])))


def vary(value: Any, axes: frozenset[str]) -> Any:
    """`value`, or a type, as one that differs along all of `axes`."""
    if isinstance(value, core.ShapedArray) and axes:
        sharding = value.sharding.update(mesh=get_abstract_mesh())
        return value.update(sharding=sharding, manual_axis_type=core.ManualAxisType(varying=value.mat.varying | axes))
    if isinstance(value, core.AbstractValue):
        return value
    missing = axes - varying([value])
    return lax.pcast(value, tuple(sorted(missing)), to="varying") if missing else value


def cast(value: Any, aval: Any) -> Any:
    """`value` with the weak type of `aval`; shape and dtype are right already."""
    return _convert_element_type(value, aval.dtype, aval.weak_type)


def dropped(var: Any) -> bool:
    """Whether nothing reads this output variable."""
    return isinstance(var, core.DropVar)


# ------------------------------------------------------------------------------------------------ binding


@contextlib.contextmanager
def context_of(eqn: JaxprEqn) -> Iterator[None]:
    """The scopes, source line and configuration that `eqn` was traced under."""
    scopes = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with source_info_util.user_context(eqn.source_info.traceback, name_stack=scopes), eqn.ctx.manager:
        yield


def bind(primitive: Primitive, params: dict, values: Sequence[Any]) -> list[Any]:
    """Bind an equation's primitive under the current trace. The outputs are a list, also of a primitive with one output."""
    options = primitive.get_bind_params(params)
    functions: Sequence[Any] = ()
    if isinstance(options, tuple):  # JAX 0.10 hands the sub-functions apart
        functions, options = options
    outputs = primitive.bind(*functions, *values, **options)
    return list(outputs) if primitive.multiple_results else [outputs]


@lu.transformation2
def _transformed(f, transform, *args, **kwargs):
    return transform(f)(*args, **kwargs)


def transformed(f: Any, transform: Callable[[Callable], Callable]) -> Any:
    """`transform` of a sub-function as JAX hands it to a trace: a `WrappedFun`, or a plain function."""
    return _transformed(f, transform) if isinstance(f, lu.WrappedFun) else transform(f)


def called(f: Any, values: Sequence[Any]) -> list[Any]:
    """Call a sub-function as JAX hands it to a trace."""
    return list(getattr(f, "call_wrapped", f)(*values))


def refilled(outputs: Any, values: Sequence[Any]) -> Any:
    """`values` in the form that the outputs of a sub-function have: a list, or a flat tree of JAX's own."""
    return outputs.update(values) if hasattr(outputs, "update") else list(values)


def forget(f: Any) -> None:
    """Make a sub-function that was called callable once more: what it noted of its outputs is forgotten."""
    for store in getattr(f, "stores", ()):
        if store is not None:
            store.reset()


# ------------------------------------------------------------------------------------------------ layouts of sub-graphs


class Body(NamedTuple):
    """A sub-graph of an equation: its label (the parameter, with an index where there are several) and closed jaxpr."""

    label: str
    jaxpr: ClosedJaxpr


# primitive -> the parameter that holds its sub-graphs. What is not here is one operation (a reduction's combiner, a kernel).
_BODIES = {
    "jit": ("jaxpr",),
    "scan": ("jaxpr",),
    "while": ("cond_jaxpr", "body_jaxpr"),
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
}

# Their parameters hold Python functions too (rules not yet traced, specs computed by tracing), so these are entered as
# running functions: the trace's own `process_*` methods.
FUNCTIONAL = frozenset({"custom_jvp_call", "custom_vjp_call", "shard_map"})
# A name, or a batching rule, given to a body: what has another body does not deserve it, and is that body in place.
INLINED = frozenset({"composite", "custom_vmap_call"})
WITH_DERIVATIVES = frozenset({"custom_jvp_call", "custom_vjp_call"})


def bodies(eqn: Any) -> list[Body]:
    """The sub-graphs of an equation, in a fixed order; empty for a plain operation."""
    found = []
    for key in _BODIES.get(eqn.primitive.name, ()):
        value = eqn.params.get(key)
        if value is None:
            continue
        if isinstance(value, tuple):  # branches; custom_linear_solve leaves out what was not given
            labels = getattr(value, "_fields", range(len(value)))
            found += [Body(f"{key}[{k}]", close(j)) for k, j in zip(labels, value, strict=True) if j is not None]
        else:
            found.append(Body(key, close(value)))
    return found


class Opened(NamedTuple):
    """A jaxpr with its constants as leading inputs, and their values."""

    jaxpr: ClosedJaxpr
    consts: list[Any]
    extras: int = 0  # how many outputs it has more than the one that it replaces, behind those


def opened(j: ClosedJaxpr) -> Opened:
    """Turn the constants of a jaxpr into leading inputs."""
    return Opened(close(pe.convert_constvars_jaxpr(j.jaxpr)), list(j.consts)) if j.consts else Opened(j, [])


def rebind(primitive: Primitive, params: dict, values: Sequence[Any], new: Sequence[Opened]) -> list[Any]:
    """Bind an equation with other sub-graphs of the same input types, whose constants become operands.

    Sub-graphs may not hold values of an enclosing trace, so each layout says where its operands for constants stand. Outputs
    that a sub-graph has more than before follow the equation's own: stacked out of a scan; out of a while those of the last
    iteration, or zeros; out of a cond those of all branches, zeros for the branches that did not run.
    """
    params, values = _LAYOUTS.get(primitive.name, _call)(dict(params), list(values), new)
    return bind(primitive, params, values)


def has_room(eqn: Any) -> bool:
    """Whether `rebind` can return more outputs of an equation's sub-graphs than it had."""
    if eqn.primitive.name == "while":
        return bodies(eqn)[0].jaxpr.jaxpr.outvars[0].aval.shape == ()
    return eqn.primitive.name not in ("custom_linear_solve", "shard_map")


def _call(params: dict, values: list, new: Sequence[Opened]) -> tuple[dict, list]:
    ((body, consts, _),) = new
    key = next(k for k in ("jaxpr", "call_jaxpr") if k in params)
    is_closed = hasattr(params[key], "consts")
    return {**params, key: body if is_closed else body.jaxpr}, [*consts, *values]


def _jit(params: dict, values: list, new: Sequence[Opened]) -> tuple[dict, list]:
    _, consts, extras = new[0]
    for key, default in (("in_shardings", UNSPECIFIED), ("in_layouts", None), ("donated_invars", False)):
        params[key] = (default,) * len(consts) + tuple(params[key])
    for key, default in (("out_shardings", UNSPECIFIED), ("out_layouts", None)):
        params[key] = tuple(params[key]) + (default,) * extras
    return _call(params, values, new)


def _scan(params: dict, values: list, new: Sequence[Opened]) -> tuple[dict, list]:
    n, extras = len(new[0].consts), new[0].extras
    if "num_consts" in params:
        params["num_consts"] += n
    elif n or extras:  # since JAX 0.11
        from jax._src import flattree as ft  # type: ignore[attr-defined]

        consts, carry, xs = params["ft_in"].unpack()
        params["ft_in"] = ft.pack((ft.nones(n + len(consts)), carry, xs))
        carry, ys = params["ft_out"].unpack()
        params["ft_out"] = ft.pack((carry, ft.nones(len(ys) + extras)))
    return _call(params, values, new)


def _while(params: dict, values: list, new: Sequence[Opened]) -> tuple[dict, list]:
    cond, body = new
    n = params["cond_nconsts"]
    extras = tuple(_out_types(body.jaxpr)[len(body.jaxpr.jaxpr.outvars) - body.extras :])
    params.update(cond_jaxpr=_ignoring(cond.jaxpr, extras), body_jaxpr=_ignoring(body.jaxpr, extras))
    params["cond_nconsts"] += len(cond.consts)
    params["body_nconsts"] += len(body.consts)
    return params, [*cond.consts, *values[:n], *body.consts, *values[n:], *map(zeros, extras)]


def _cond(params: dict, values: list, new: Sequence[Opened]) -> tuple[dict, list]:
    index, *operands = values
    branches, consts, extras = zip(*new, strict=True)
    counts = tuple(map(len, consts))
    branches = _padded(branches[0], branches[1:], extras) if any(extras) else branches
    branches = _widened(branches[0], branches[1:], counts) if any(counts) else branches
    return {**params, "branches": branches}, [index, *(c for cs in consts for c in cs), *operands]


def has_effects(eqn: Any, values: Sequence[Any]) -> bool:
    """Whether an equation, also one that is just being bound to these values, does more than to return arrays."""
    if not all(is_array(core.typeof(x)) for x in values):
        return True
    inner = [body.jaxpr.jaxpr.effects for body in bodies(eqn)]
    found = inner if inner else [eqn.primitive.abstract_eval(*map(core.typeof, values), **eqn.params)[1]]
    return any(not isinstance(effect, core.NamedAxisEffect) for effects in found for effect in effects)


def is_array(aval: Any) -> bool:
    """Whether values of this type are arrays, keys among them; not references or tokens."""
    return isinstance(aval, core.ShapedArray)


def is_elided(eqn: Any, values: Sequence[Any], outputs: Sequence[Any]) -> bool:
    """Whether tracing leaves out what was just bound: conversion of a number, or of a value to the type that it has."""
    known = getattr(values[0], "get_const", lambda: values[0])() if values else None
    if eqn.primitive is lax.convert_element_type_p and known is not None and not isinstance(known, Array):
        return core.typeof(known).shape == ()
    is_forwarding = eqn.primitive in pe.forwarding_rules and not bodies(eqn)
    return is_forwarding and core.typeof(values[0]) == core.typeof(outputs[0])


def zeros(aval: Any) -> Array:
    """Zeros of a type, keys among them."""
    axes = getattr(aval, "manual_axis_type", None)
    return vary(lax.full(aval.shape, 0, aval.dtype), axes.varying if axes else frozenset())


def _out_types(jaxpr: ClosedJaxpr) -> list[Any]:
    return [v.aval for v in jaxpr.jaxpr.outvars]


@weakref_lru_cache
def _ignoring(jaxpr: ClosedJaxpr, avals: tuple[Any, ...]) -> ClosedJaxpr:
    """The same with inputs of these types behind its own, which it does not read."""
    inner = jaxpr.jaxpr
    names = inner.debug_info.with_unknown_names()
    return close(inner.replace(invars=[*inner.invars, *map(Var, avals)], debug_info=names)) if avals else jaxpr


@weakref_lru_cache
def _padded(first: ClosedJaxpr, others: tuple[ClosedJaxpr, ...], extras: tuple[int, ...]) -> tuple[ClosedJaxpr, ...]:
    """Branches that each return the extra outputs of all, zeros for those of the others."""
    jaxprs = (first, *others)
    types = [_out_types(j)[len(j.jaxpr.outvars) - n :] for j, n in zip(jaxprs, extras, strict=True)]

    def branch(k, *values):
        outputs = jaxpr_as_fun(jaxprs[k])(*values)
        own = len(outputs) - extras[k]
        filled = (outputs[own:] if i == k else map(zeros, avals) for i, avals in enumerate(types))
        return [*outputs[:own], *(x for part in filled for x in part)]

    return tuple(
        stage_flat(partial(branch, k), [v.aval for v in j.jaxpr.invars], j.jaxpr.debug_info.with_unknown_names())
        for k, j in enumerate(jaxprs)
    )


@weakref_lru_cache
def _widened(first: ClosedJaxpr, others: tuple[ClosedJaxpr, ...], counts: tuple[int, ...]) -> tuple[ClosedJaxpr, ...]:
    """Branches that each take the constants of all, and read their own."""
    jaxprs = [j.jaxpr for j in (first, *others)]
    variables = [[Var(v.aval) for v in j.invars[:n]] for j, n in zip(jaxprs, counts, strict=True)]
    branches = []
    for k, (j, n) in enumerate(zip(jaxprs, counts, strict=True)):
        consts = [v for i, others in enumerate(variables) for v in (j.invars[:n] if i == k else others)]
        names = j.debug_info.with_unknown_names()
        branches.append(close(j.replace(invars=[*consts, *j.invars[n:]], debug_info=names)))
    return tuple(branches)


def _linear_solve(params: dict, values: list, new: Sequence[Opened]) -> tuple[dict, list]:
    lengths, jaxprs = params["const_lengths"], params["jaxprs"]
    opened = iter(new)
    at, operands, counts, rebuilt = 0, [], [], []
    for length, jaxpr in zip(lengths, jaxprs, strict=True):
        body, consts, _ = next(opened) if jaxpr is not None else Opened(None, [])
        operands += [*consts, *values[at : at + length]]
        at += length
        counts.append(length + len(consts))
        rebuilt.append(body)
    params.update(const_lengths=type(lengths)(*counts), jaxprs=type(jaxprs)(*rebuilt))
    return params, [*operands, *values[at:]]


_LAYOUTS = {"jit": _jit, "scan": _scan, "while": _while, "cond": _cond, "custom_linear_solve": _linear_solve}


# ------------------------------------------------------------------------------------------------ dispatch of compiled functions


class Dispatch(NamedTuple):
    """How a jitted function dispatches: its name, what runs where its C++ cache has no entry, its static arguments."""

    name: str
    miss: Callable
    static_argnums: list[int]
    static_argnames: list[str]


def dispatch_of(jitted: Any) -> Dispatch:
    """What stands behind the C++ cache of a jitted function."""
    state = jitted.__getstate__()
    return Dispatch(state["function_name"], state["cache_miss"], state["static_argnums"], state["static_argnames"])


def with_miss(jitted: Any, miss: Callable) -> Any:
    """The same jitted function, C++ cache shared, that calls `miss(*args, **kwargs)` where the cache has no entry."""
    kind: Any = type(jitted)
    copy = kind.__new__(kind)
    copy.__setstate__({**jitted.__getstate__(), "cache_miss": miss})
    copy.__dict__.update(jitted.__dict__)
    return copy


def cache_size(jitted: Any) -> int | None:
    """How many entries the C++ cache has; one is made for a call before Python is asked."""
    return jitted and jitted._cache_size()


def type_of(x: Any) -> Any:
    """The type of an argument, as `jax.jit` sees it."""
    return core.shaped_abstractify(x)


def is_eager(trace: Trace) -> bool:
    """Whether what is bound under this trace is computed at once."""
    return isinstance(trace, core.EvalTrace)


def is_tracing() -> bool:
    """Whether some transformation is running: what is called now becomes a part of it."""
    return not core.trace_state_clean()


def named_context(context: tuple) -> dict[str, str]:
    """A `trace_context` as text: option -> value."""
    values = (dict(value.axis_sizes) if isinstance(value, core.AxisEnv) else value for value in context)
    return dict(zip(config.trace_context_names(), map(str, values), strict=True))


# ------------------------------------------------------------------------------------------------ comparing equations


class Unknown(core.Tracer):
    """A value of unknown type: asking for the type raises `question`."""

    __slots__ = ("question",)
    aval = property(lambda self: self._raise())  # type: ignore[assignment]

    def __init__(self, question: BaseException):
        self.question = question

    def _raise(self):
        raise self.question


def unnamed(jaxpr: Jaxpr) -> Any:
    """As `names_of`, for a graph that has no names for its inputs."""
    return jaxpr.debug_info.with_unknown_names()


def staged(value: Any) -> Any:
    """A literal of a graph as a value of the current trace."""
    with core.take_current_trace() as trace:
        return trace.stage_value(value)


def varied(value: Any, aval: Any) -> Any:
    """`value` as one that differs along the mesh axes that `aval` does."""
    axes = getattr(aval, "manual_axis_type", None)
    return vary(value, axes.varying) if axes else value


def emptied(params: dict) -> dict:
    """Parameters of a `shard_map` whose body returns what it is given, which is what the body of `params` returns."""
    outputs = [Var(v.aval) for v in params["jaxpr"].outvars]
    names = unnamed(params["jaxpr"])
    body = params["jaxpr"].replace(
        constvars=[], invars=outputs, outvars=outputs, eqns=[], effects=set(), debug_info=names
    )
    return {**params, "jaxpr": body}


def is_plain(eqn: Any) -> bool:
    """Whether `eqn` is a jit that means nothing but its body."""
    p, free = eqn.params, (UNSPECIFIED, None, False)
    keys = ("in_shardings", "out_shardings", "in_layouts", "out_layouts", "donated_invars")
    return eqn.primitive.name == "jit" and all(any(x is y for y in free) for key in keys for x in p[key])


def fed(eqn: Any, operands: Sequence[Any]) -> list[list[Any]]:
    """For each body of `eqn`, the operand that each of its inputs always is; None where it changes from run to run."""
    name, p, given = eqn.primitive.name, eqn.params, [list(operands)]
    if name == "scan":
        given = [given[0][: p["num_consts"] if "num_consts" in p else len(p["ft_in"].unpack()[0])]]
    elif name == "while":
        n = p["cond_nconsts"]
        given = [given[0][:n], given[0][n : n + p["body_nconsts"]]]
    elif name == "cond":
        given = [given[0][1:]] * len(p["branches"])
    elif name in ("shard_map", "custom_linear_solve"):
        given = [[]] * len(bodies(eqn))
    counts = [len(body.jaxpr.jaxpr.invars) for body in bodies(eqn)]
    return [[*found[:n], *[None] * (n - len(found))] for found, n in zip(given, counts, strict=True)]
