"""The only door to non-public JAX: `Trace`, staging, binding, and primitives of our own.

Everything private lies here. `tests/test_jax_contracts.py` pins what is used, per version.

Since JAX 0.11 a `ClosedJaxpr` *is* a `Jaxpr`. Here a "closed" jaxpr is one with `.consts`; on 0.10 that is a `ClosedJaxpr`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
from jax import Array, lax
from jax._src import api_util, config, core, debugging, dtypes, effects, pjit, source_info_util, traceback_util
from jax._src import linear_util as lu
from jax._src.interpreters import ad, batching, mlir
from jax._src.interpreters import partial_eval as pe
from jax._src.lax.lax import _convert_element_type
from jax._src.sharding_impls import UNSPECIFIED as UNSPECIFIED
from jax._src.util import weakref_lru_cache as weakref_lru_cache
from jax.sharding import get_abstract_mesh

try:
    from jax._src import flattree as flattree  # type: ignore[attr-defined]
except ImportError:  # before JAX 0.11
    flattree = None

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
NamedAxisEffect = core.NamedAxisEffect
jaxpr_as_fun = core.jaxpr_as_fun
forwarding_rules = pe.forwarding_rules
constants_of = pe.try_constant_folding
ManualAxisType = core.ManualAxisType
current_context = core.current_jaxpr_eqn_context  # the configuration at an equation, as an interned value
dce_jaxpr = pe.dce_jaxpr
StagingTrace = pe.DynamicJaxprTrace
StagedValue = pe.DynamicJaxprTracer
LinearizeTrace = ad.LinearizeTrace
BatchTrace, BatchTracer = batching.BatchTrace, batching.BatchTracer
is_user_file = source_info_util.is_user_filename
convert_constvars_jaxpr = pe.convert_constvars_jaxpr
api_boundary = traceback_util.api_boundary
pvary_p = core.pvary_p
set_current_trace = core.set_current_trace
take_current_trace = core.take_current_trace
signature_of = api_util.fun_signature
last_used = core.last_used
batch_while = batching.fancy_primitive_batchers[lax.while_p]
type_of = core.shaped_abstractify  # of an argument, as `jax.jit` sees it
no_names = core.DebugInfo("funcgrad", "part", None, None)
short_dtype = dtypes.short_dtype_name
trace_context = config.trace_context  # the configuration that a trace depends on, as a hashable value


# ------------------------------------------------------------------------------------------------ frames and source lines


def hide(folder: str) -> None:
    """Leave the frames of this folder out of tracebacks and source lines, as JAX does with its own."""
    prefix = os.path.join(os.path.abspath(folder), "")
    traceback_util.register_exclusion(prefix)
    source_info_util.register_exclusion(prefix)


def source_lines(eqn: Any, frames: int = 1) -> list[tuple[str, int, str]]:
    """The user's frames that made `eqn`, innermost first, as (file, line, function)."""
    user_frames = itertools.islice(source_info_util.user_frames(eqn.source_info.traceback), frames)
    return [(frame.file_name, frame.start_line, frame.function_name) for frame in user_frames]


def line_of(eqn: Any) -> str | None:
    """The user's line that made `eqn`, as "file.py:41 (function)"."""
    return next((f"{file}:{line} ({function})" for file, line, function in source_lines(eqn)), None)


def line_now() -> str | None:
    """The user's line that runs now, in the same form."""
    running = ((frame.f_code, line) for frame, line in traceback.walk_stack(None))
    return next((f"{c.co_filename}:{n} ({c.co_qualname})" for c, n in running if is_user_file(c.co_filename)), None)


def scope_of(eqn: Any) -> str:
    """The named scopes of `eqn` within its own graph, joined by slashes; '' at the top."""
    return str(eqn.source_info.name_stack)


def current_source() -> Any:
    """Source information (traceback and name stack) of an equation that is bound now."""
    return source_info_util.current()


def name_stack(eqn: Any = None) -> tuple[Any, ...]:
    """The scopes and transforms around `eqn` within its own jaxpr, or around an equation that is bound now, outermost first."""
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
    """The names of a jaxpr's function and inputs, constants included, in JAX's messages."""
    names = jaxpr.debug_info
    if jaxpr.constvars and names.arg_names is not None:
        names = names._replace(arg_names=("",) * len(jaxpr.constvars) + tuple(names.arg_names))
    return names


def unnamed(jaxpr: Jaxpr) -> Any:
    """As `names_of`, without names for inputs."""
    return jaxpr.debug_info.with_unknown_names()


def without_results(jaxpr: Jaxpr) -> Any:
    """As `names_of`, for a new jaxpr of the same inputs without constants, whose results have new names."""
    return jaxpr.debug_info._replace(result_paths=None)


def part_of(
    jaxpr: Jaxpr, invars: Sequence[Var], outvars: Sequence[Var], eqns: Sequence[JaxprEqn], consts: Sequence[Any] = ()
) -> ClosedJaxpr:
    """Some equations of a jaxpr as a separate jaxpr, with the values of its constant variables."""
    constvars = jaxpr.constvars if consts else []
    effects = pe.make_jaxpr_effects(constvars, invars, outvars, eqns)
    names = jaxpr.debug_info._replace(arg_names=None, result_paths=None)
    variables = dict(constvars=constvars, invars=list(invars), outvars=list(outvars))
    return close(jaxpr.replace(**variables, eqns=list(eqns), effects=effects, debug_info=names), consts)


def check_jaxpr(jaxpr: ClosedJaxpr) -> None:
    """Type-check every equation; raises JAX's `JaxprTypeError`."""
    core.check_jaxpr(jaxpr.jaxpr)


def fitted(value: Any, aval: Any) -> Any:
    """`value` as an array of type `aval`; None if its shape or dtype differs, or it is no array at all."""
    try:
        value_aval = core.typeof(value)
    except TypeError:
        return None
    if not isinstance(aval, core.ShapedArray):
        return value
    if (value_aval.shape, value_aval.dtype) != (aval.shape, aval.dtype):
        return None
    return value if value_aval.weak_type == aval.weak_type and isinstance(value, Array) else cast(value, aval)


def are_repeatable(effects: Any) -> bool:
    """Whether an equation with these effects may be recomputed: they are unordered debug callbacks or axis names."""
    kinds = debugging.DebugEffect, core.NamedAxisEffect
    return all(isinstance(effect, kinds) for effect in effects)


def is_ordered(effect: Any) -> bool:
    """Whether equations with this effect run in program order."""
    return effects.ordered_effects.contains(effect)


def is_array(aval: Any) -> bool:
    """Whether values of this type are arrays, keys among them; not references or tokens."""
    return isinstance(aval, core.ShapedArray)


def cast(value: Any, aval: Any) -> Any:
    """`value` with the weak type of `aval`, whose shape and dtype it has."""
    return _convert_element_type(value, aval.dtype, aval.weak_type)


def dropped(var: Any) -> bool:
    """Whether no equation reads this output variable."""
    return isinstance(var, core.DropVar)


# ------------------------------------------------------------------------------------------------ binding


def sourced(source_info: Any) -> Any:
    """A context with this source line and these scopes, inside the current ones."""
    scopes = source_info_util.current_name_stack() + source_info.name_stack
    return source_info_util.user_context(source_info.traceback, name_stack=scopes)


@contextlib.contextmanager
def context_of(eqn: JaxprEqn) -> Iterator[None]:
    """The scopes, source line and configuration that `eqn` was traced under."""
    with sourced(eqn.source_info), eqn.ctx.manager:
        yield


def inlined(eqn: JaxprEqn) -> JaxprEqn:
    """An equation of a call that JAX inlines, with the line of the call, as in JAX; its own line is that of the first caller."""
    return eqn.replace(source_info=eqn.source_info.replace(traceback=current_source().traceback))


def staged(value: Any) -> Any:
    """A literal of a graph as a value of the current trace."""
    with core.take_current_trace() as trace:
        return trace.stage_value(value)


def bind_inlined(jaxpr: ClosedJaxpr, name: str, values: Sequence[Any]) -> list[Any]:
    """Call a jaxpr as a jitted function that JAX inlines when it stages: JAX caches its derivatives."""
    n, m, early = len(jaxpr.in_avals), len(jaxpr.out_avals), getattr(jax, "Inline", None)
    places: dict[str, Any] = dict(in_shardings=(UNSPECIFIED,) * n, out_shardings=(UNSPECIFIED,) * m)
    places.update(
        donated_invars=(False,) * n, in_layouts=(None,) * n, out_layouts=(None,) * m, ctx_mesh=get_abstract_mesh()
    )
    options = dict(keep_unused=False, inline=early.JAX_EARLY if early else True, compiler_options_kvs=())
    return pjit.jit_p.bind(*values, jaxpr=jaxpr, name=name, **places, **options)


def is_linearized_by_jvp(primitive: Primitive) -> bool:
    """Whether JAX linearizes each equation of a primitive by tracing its JVP."""
    return primitive in ad.primitive_jvps and primitive not in ad.primitive_linearizations


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


def forget(f: Any) -> None:
    """Make a sub-function callable once more: clear the output trees that its last call stored."""
    for store in getattr(f, "stores", ()):
        if store is not None:
            store.reset()


# ------------------------------------------------------------------------------------------------ dispatch of compiled functions


class Dispatch(NamedTuple):
    """How a jitted function dispatches: its name, the function for cache misses, its static arguments."""

    name: str
    miss: Callable
    static_argnums: list[int]
    static_argnames: list[str]


def dispatch_of(jitted: Any) -> Dispatch:
    """The dispatch behind the C++ cache of a jitted function."""
    state = jitted.__getstate__()
    return Dispatch(state["function_name"], state["cache_miss"], state["static_argnums"], state["static_argnames"])


def with_miss(jitted: Any, miss: Callable) -> Any:
    """The same jitted function with the same C++ cache, which calls `miss(*args, **kwargs)` for a cache miss."""
    kind: Any = type(jitted)
    copy = kind.__new__(kind)
    copy.__setstate__({**jitted.__getstate__(), "cache_miss": miss})
    copy.__dict__.update(jitted.__dict__)
    return copy


def cache_size(jitted: Any) -> int | None:
    """The number of entries of the C++ cache; JAX adds the entry of a call before it calls Python."""
    return jitted and jitted._cache_size()


def current_trace() -> Trace:
    """The current trace."""
    return core.trace_ctx.trace


def is_eager(trace: Trace) -> bool:
    """Whether this trace computes at once."""
    return isinstance(trace, core.EvalTrace)


def look_through(kind: Any) -> None:
    """Let `jax.extend.core.get_opaque_trace_state` return the trace below those of this kind, which have no tracers.

    flax.nnx compares it before it changes a variable. JAX has no hook for this; other traces are reported as before.
    """
    import jax.extend.core as public

    def below(trace: Any) -> Any:
        return below(trace.parent) if isinstance(trace, kind) else core.OpaqueTraceState(trace._weakref)

    public.get_opaque_trace_state = lambda convention=None: below(core.trace_ctx.trace)


@contextlib.contextmanager
def observing(kind: Any, observe: Callable[[Primitive, Sequence[Any]], Any]) -> Iterator[None]:
    """A context in which `observe(primitive, outputs)` sees each primitive that traces of this kind process in this thread.

    JAX has no hook for this: the method of the class is replaced while there are observers.
    """
    observer = threading.get_ident(), observe
    with _LOCK:
        if not _OBSERVERS.setdefault(kind, []):
            _ORIGINALS[kind] = kind.process_primitive
            kind.process_primitive = _observed(kind, kind.process_primitive)
        _OBSERVERS[kind].append(observer)
    try:
        yield
    finally:
        with _LOCK:
            _OBSERVERS[kind].remove(observer)
            if not _OBSERVERS[kind]:
                kind.process_primitive = _ORIGINALS.pop(kind)


def _observed(kind: Any, process: Callable) -> Callable:
    def process_primitive(self, primitive, values, params, /):
        outputs = process(self, primitive, values, params)
        for thread, observe in tuple(_OBSERVERS[kind]):
            if threading.get_ident() == thread:
                observe(primitive, outputs if primitive.multiple_results else [outputs])
        return outputs

    return process_primitive


_LOCK = threading.Lock()
_OBSERVERS: dict[Any, list[tuple[int, Callable]]] = {}
_ORIGINALS: dict[Any, Callable] = {}


def is_tracing() -> bool:
    """Whether a transformation traces now."""
    return not core.trace_state_clean()


def named_context(context: tuple) -> dict[str, str]:
    """A `trace_context` as text: option -> value."""
    values = (dict(value.axis_sizes) if isinstance(value, core.AxisEnv) else value for value in context)
    return dict(zip(config.trace_context_names(), map(str, values), strict=True))


# ------------------------------------------------------------------------------------------------ new primitives


def primitive(
    name: str, impl: Callable, eager: Callable, types: Callable, jvp: Callable, batch: Callable, transpose: Callable
) -> Primitive:
    """A primitive of funcgrad with several outputs, which lowers to the operations of `impl`.

    Args:
      impl, eager: `impl(*values, **params) -> values`, and the same at once.
      types: `types(*avals, **params) -> (avals, effects)`.
      jvp: `jvp(primals, tangents, **params) -> (outputs, tangents)`, None for a tangent that is zero.
      batch: `batch(axis, values, dims, **params) -> (outputs, dims)`; `axis` is for `batched`.
      transpose: `transpose(cotangents, *values, **params) -> cotangents`, None for one that is zero, and for a linear value.
    """
    new = Primitive(name)
    new.multiple_results = True
    new.def_impl(eager)
    new.def_effectful_abstract_eval(types)

    def with_zeros(primals, tangents, **params):
        nonzero = [None if type(t) is ad.Zero else t for t in tangents]
        outputs, out_tangents = jvp(primals, nonzero, **params)
        zero = lambda x: ad.Zero(core.typeof(x).to_tangent_aval())
        return outputs, [zero(x) if t is None else t for x, t in zip(outputs, out_tangents, strict=True)]

    def transposed(cotangents, *values, **params):
        cotangents = [None if type(c) is ad.Zero else c for c in cotangents]
        return transpose(cotangents, *(None if ad.is_undefined_primal(x) else x for x in values), **params)

    ad.primitive_jvps[new] = with_zeros
    ad.primitive_transposes[new] = transposed
    batching.fancy_primitive_batchers[new] = batch
    mlir.register_lowering(new, mlir.lower_fun(impl, multiple_results=True))
    return new


def split_by(rule: Callable, new: Primitive) -> None:
    """Enter the partial evaluation rule of a primitive of funcgrad, which JAX needs to linearize.

    Args:
      rule: `rule(values, later, **params) -> outputs`, with None for a value that is not known, and `later(primitive, values,
        params)`, which computes with those: it takes None for one of them, in order.
    """

    def split(trace, *tracers, **params):
        values = [t.pval.get_known() for t in map(trace.to_jaxpr_tracer, tracers)]
        if all(x is None for x in values) or not any(x is None for x in values):
            return trace.default_process_primitive(new, tracers, params)
        unknown_tracers = iter([t for t, x in zip(tracers, values, strict=True) if x is None])
        stage = lambda x: next(unknown_tracers) if x is None else trace.new_const(x)
        later = lambda primitive, values, options: trace.default_process_primitive(
            primitive, list(map(stage, values)), options
        )
        with core.set_current_trace(trace.parent_trace):
            return rule(values, later, **params)

    pe.custom_partial_eval_rules[new] = split


def batched(
    jaxpr: ClosedJaxpr, axis: Any, flags: Sequence[bool], forced: Sequence[bool] | bool
) -> tuple[ClosedJaxpr, list[bool]]:
    """A jaxpr for inputs with a leading axis where flagged, and flags for its outputs, which are True where `forced`."""
    batched_jaxpr, out_flags = batching.batch_jaxpr(
        jaxpr, axis, list(flags), forced if isinstance(forced, bool) else list(forced)
    )
    return batched_jaxpr, list(out_flags)


def jvp_of(jaxpr: ClosedJaxpr, flags: Sequence[bool], forced: Sequence[bool] | bool) -> tuple[ClosedJaxpr, list[bool]]:
    """A jaxpr's JVP with respect to the flagged inputs, tangents behind primals; and flags for outputs with tangents."""
    jvp_jaxpr, out_flags = ad.jvp_jaxpr(jaxpr, list(flags), forced if isinstance(forced, bool) else list(forced))
    return jvp_jaxpr, list(out_flags)
