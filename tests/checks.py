"""What it means for a transform to be right: the same program as JAX's own, to the bit.

Each of `TRANSFORMS` applies a transform of a namespace `m`, JAX's or funcgrad's, to a function or to its Graph.
`assert_same_program` compares two functions as compiled, `assert_same_values` results, `assert_same_graph` graphs.
`identity_rewrite` and `identity_live` are the two drivers of the engine with a rule that changes nothing.
"""

from __future__ import annotations

import collections
import contextlib
import difflib
import functools
import itertools
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from funcgrad.transforms.core import _jax

import funcgrad as fg

from .corpus import Program

LIBRARIES = tuple(os.path.join(os.path.dirname(p), "") for p in (jax.__file__, _jax.__file__))
STEPS = 3  # the size of a batch


# Comparison of values


def assert_same_values(got: Any, want: Any) -> None:
    """Equal trees of equal leaves: type, dtype, shape, weak type and every bit (any NaN equals any other)."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        where = jax.tree_util.keystr(path) or "the output"
        assert _kind(a) == _kind(b), f"{where}: {_kind(a)} is not {_kind(b)}"
        if isinstance(b, jax.Array) and jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        if isinstance(b, jax.Array | np.ndarray | np.generic) and b.dtype != jax.dtypes.float0:
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=where)
        elif not isinstance(b, jax.Array | np.ndarray):
            assert a == b or a is b or a != a, f"{where}: {a!r} is not {b!r}"


def assert_close_values(got: Any, want: Any) -> None:
    """Equal trees of equal types, and nearly equal values: for programs that JAX compiled in different pieces."""
    got, want = (jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, int | float) else x, t) for t in (got, want))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    kinds = lambda tree: [_kind(x)[:3] for x in jax.tree.leaves(tree)]  # weak types depend on the pieces too
    assert kinds(got) == kinds(want)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        if jnp.issubdtype(b.dtype, jnp.inexact):
            kind = np.complex128 if jnp.iscomplexobj(b) else np.float64
            atol = 64 * float(jnp.finfo(b.dtype).eps) * max(1.0, float(jnp.max(jnp.abs(b), initial=0)))
            where = jax.tree_util.keystr(path)
            np.testing.assert_allclose(np.asarray(a, kind), np.asarray(b, kind), rtol=0, atol=atol, err_msg=where)
        else:
            assert_same_values(a, b)


def assert_near(got: Any, want: Any, tolerance: float = 0.0, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Equal trees of equal shapes and dtypes, whose values differ by at most the sum of three bounds.

    Args:
      tolerance: relative to the largest magnitude of each leaf of `want`, or to 1 if that is larger.
      rtol: relative to each element of `want`.
      atol: absolute.
    """
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        where = jax.tree_util.keystr(path)
        assert (jnp.shape(a), jnp.result_type(a)) == (jnp.shape(b), jnp.result_type(b)), where
        if jnp.issubdtype(jnp.result_type(b), jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        bound = atol + (tolerance * max(1.0, float(jnp.max(jnp.abs(b), initial=0))) if tolerance else 0.0)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=bound, err_msg=where)


def _kind(x: Any) -> tuple:
    base = jax.Array if isinstance(x, jax.Array) else type(x)
    return base, getattr(x, "shape", None), getattr(x, "dtype", None), getattr(x, "weak_type", None)


# Comparison of programs


def assert_same_program(got: Callable, want: Callable, args: tuple, is_graph: bool = False) -> None:
    """Two functions that compile to the same: output types and trees, then instructions, then values.

    Programs of the same StableHLO text, constants included, give the same values; only others are compiled and run.

    Args:
      is_graph: whether `got` comes from a Graph. Then values may differ as the order of additions makes them: a
        traced program is differentiated in its own order, by JAX too.
    """
    _assert_same_lowered(_lower(got, args), _lower(want, args), args, is_graph)


def _lower(f: Callable, args: tuple) -> tuple[Any, Any]:
    traced = jax.jit(f).trace(*args)
    return traced.out_info, traced.lower()


def _assert_same_lowered(got: tuple, want: tuple, args: tuple, is_graph: bool) -> None:
    (got_info, got), (want_info, want) = got, want
    assert jax.tree.structure(got_info) == jax.tree.structure(want_info)
    for a, b in zip(jax.tree.leaves(got_info), jax.tree.leaves(want_info), strict=True):
        assert _type(a) == _type(b), f"{_type(a)} is not {_type(b)}"
    if _body(got) != _body(want):
        assert_same_opcodes(got, want)
        compare = assert_close_values if is_graph else assert_same_values
        compare(got.compile()(*args), want.compile()(*args))


def _type(x: Any) -> tuple:
    return x.shape, x.dtype, getattr(x, "weak_type", False)


def _body(lowered: Any) -> str:
    return lowered.as_text().partition("\n")[2]  # the first line names the module


def opcode_counts(program: Any) -> collections.Counter:
    """How often each operation occurs in a lowered (StableHLO) or compiled (HLO) program."""
    text = program.as_text()
    if text.startswith("HloModule"):
        return collections.Counter(
            re.findall(r"^\s+(?:ROOT )?%\S+ = (?:\(.*?\)|\S+) ([a-z][\w-]*)\(", text, re.MULTILINE)
        )
    return collections.Counter(re.findall(r"\b(?:stablehlo|chlo|sdy)\.[a-z_]+", text))


def assert_same_opcodes(got: Any, want: Any) -> None:
    """Two lowered programs with equally many of each operation, before and after XLA's own passes.

    Compiled counts decide: jax may outline a function twice that the other program outlines once.
    """
    if opcode_counts(got) != opcode_counts(want):
        got, want = opcode_counts(got.compile()), opcode_counts(want.compile())
        assert got == want, f"more: {dict(got - want)}, fewer: {dict(want - got)}"


# What XLA compiles


@contextlib.contextmanager
def counted_compilations() -> Iterator[list[str]]:
    """A list that grows by one event with each program that XLA compiles within the `with` block."""
    events = []
    listen = lambda event, *_, **__: events.append(event) if "backend_compile" in event else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def temp_bytes(f: Callable, *args: Any) -> int:
    """The bytes of temporaries of `jax.jit(f)`, as XLA allocates them; arguments may be shapes."""
    return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes


# Comparison of graphs


def assert_same_graph(got: Any, want: Any) -> None:
    """Two Graphs or closed jaxprs equal up to the names of variables.

    Equal are: primitives and their order, parameters, types, effects, constants, scopes, the user's source lines.
    """
    got, want = (list(_lines(getattr(g, "jaxpr", g), {}, "")) for g in (got, want))
    assert got == want, "\n".join(difflib.unified_diff(want, got, "want", "got", lineterm="", n=2))


def _lines(jaxpr: Any, names: dict, indent: str) -> Iterator[str]:
    consts = getattr(jaxpr, "consts", ())
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)

    def name(v):
        if hasattr(v, "val"):
            return f"{v.val!r}:{_aval(v.aval)}"
        if type(v).__name__ == "DropVar":
            return f"_:{_aval(v.aval)}"
        return f"{names.setdefault(v, f'v{len(names)}')}:{_aval(v.aval)}"

    listed = lambda vs: " ".join(map(name, vs))
    yield f"{indent}in {listed(jaxpr.invars)} consts {listed(jaxpr.constvars)} {[_digest(c) for c in consts]}"
    for eqn in jaxpr.eqns:
        inner = list(_inner(eqn.params))
        params = {k: _param(v) for k, v in eqn.params.items()}
        yield (
            f"{indent}{listed(eqn.outvars)} = {eqn.primitive} {listed(eqn.invars)} {params} {_effects(eqn)}"
            f"  scope {eqn.source_info.name_stack}  at {_line(eqn)}"
        )
        for sub in inner:
            yield from _lines(sub, {}, indent + "  ")
    yield f"{indent}out {listed(jaxpr.outvars)} {_effects(jaxpr)}"


def _digest(const: Any) -> Any:
    try:
        return hash(np.asarray(const).tobytes())
    except TypeError:  # keys and references
        return type(const).__name__


def _aval(aval: Any) -> str:
    return f"{aval.str_short()}{'*' if getattr(aval, 'weak_type', False) else ''}"


def _effects(x: Any) -> str:
    return " ".join(sorted(type(e).__name__ for e in x.effects))


def _is_jaxpr(x: Any) -> bool:
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")


def _inner(params: Any) -> Iterator[Any]:
    leaves = params.values() if isinstance(params, dict) else params
    for leaf in leaves:
        if _is_jaxpr(leaf):
            yield leaf
        elif isinstance(leaf, tuple | list):
            yield from _inner(leaf)


def _param(x: Any) -> Any:
    if _is_jaxpr(x):
        return "jaxpr"
    if isinstance(x, tuple | list):
        return [_param(y) for y in x]
    is_function = callable(x) or type(x).__name__ == "WrappedFun"
    return type(x).__name__ if is_function else re.sub(r"0x[0-9a-f]+", "", repr(x))


def _line(eqn: Any) -> str:
    frames = eqn.source_info.traceback.frames if eqn.source_info.traceback else ()
    return next((f"{f.file_name}:{f.line_num}" for f in frames if not f.file_name.startswith(LIBRARIES)), "?")


# The identity, by both drivers


@functools.cache
def identity() -> fg.Rules:
    """A table whose one rule binds every operation as it was."""

    def same(eqn, *values):
        outputs = _jax.bind(eqn.primitive, eqn.params, values)
        return outputs if eqn.primitive.multiple_results else outputs[0]

    return fg.Rules("identity", default=same)


def identity_rewrite(graph: fg.Graph) -> fg.Graph:
    """A Graph built again, equation by equation, by a rule that changes nothing."""
    return fg.rewrite(graph, identity())


def identity_live(f: Callable) -> Callable:
    """A function run live under a rule that changes nothing."""
    return fg.live(f, identity())


def _run_live(verb: str) -> Callable:
    transform = getattr(jax, verb)
    return lambda f=None, *args, **kwargs: transform(identity_live(f), *args, **kwargs) if f else transform(**kwargs)


VERBS = ("grad", "value_and_grad", "vjp", "jvp", "linearize", "jacfwd", "jacrev", "hessian", "vmap", "jit")
LIVE = SimpleNamespace(**{verb: _run_live(verb) for verb in VERBS})  # JAX's transforms of functions that run live


# Wrappers that give a program the outputs which a transform needs


def inexact_leaves(tree: Any) -> list[Any]:
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]


def inexact(f: Callable) -> Callable:
    """`f` with a list of its real and complex outputs, complex ones split."""

    def inexact_f(*args):
        leaves = inexact_leaves(f(*args))
        return [part for x in leaves for part in ((x.real, x.imag) if jnp.iscomplexobj(x) else (x,))]

    return inexact_f


def summed(f: Callable) -> Callable:
    """`f` reduced to a scalar to which each element of its real and complex outputs contributes differently."""

    def summed_f(*args):
        return sum((jnp.sum(jnp.sin(jnp.asarray(x, jnp.float32))) for x in inexact(f)(*args)), start=jnp.float32(0))

    return summed_f


# The transforms


@dataclass(frozen=True)
class Transform:
    """`apply(m, f, p)` gives a function of `arguments(p)`; `f` is the wrapped program, a function or its Graph."""

    name: str
    apply: Callable[[Any, Callable, Program], Callable]
    wrap: Callable[[Callable], Callable] = lambda f: f
    batched: bool = False

    def __str__(self) -> str:
        return self.name

    def arguments(self, p: Program) -> tuple:
        return batch(p) if self.batched else p.args

    def of(self, m: Any, p: Program, form: str = "function") -> Callable:
        """The program under this transform of the namespace `m`."""
        return self.apply(m, m.trace(self.wrap(p.f), *p.args) if form == "graph" else self.wrap(p.f), p)


def axes(p: Program) -> Any:
    """`in_axes` that map each float array among the arguments to differentiate."""
    is_mapped = lambda x: isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact)
    diff = (p.diff,) if isinstance(p.diff, int) else p.diff
    per_leaf = lambda arg: jax.tree.map(lambda x: 0 if is_mapped(x) else None, arg)
    return tuple(per_leaf(arg) if i in diff else None for i, arg in enumerate(p.args))


def batch(p: Program) -> tuple:
    """The arguments, with those that `axes` maps stacked: the same values, then smaller and smaller."""
    stack = lambda axis, tree: jax.tree.map(lambda x: x if axis is None else jnp.stack([x, x / 2, x / 4]), tree)
    is_leaf = lambda x: x is None
    return tuple(jax.tree.map(stack, a, x, is_leaf=is_leaf) for a, x in zip(axes(p), p.args, strict=True))


def options(p: Program) -> dict:
    """Arguments of `grad` and its kin."""
    diff = [p.args[i] for i in ((p.diff,) if isinstance(p.diff, int) else p.diff)]
    return {"argnums": p.diff} | ({"allow_int": True} if len(inexact_leaves(diff)) < len(jax.tree.leaves(diff)) else {})


def tangents(tree: Any) -> Any:
    """Some tangents, or cotangents, for values of the types in `tree`; float0 for integers and keys."""
    count = itertools.count(1)

    def tangent(x):
        dtype, shape = getattr(x, "dtype", None) or jnp.result_type(x), jnp.shape(x)
        if not jnp.issubdtype(dtype, jnp.inexact):
            return np.zeros(shape, jax.dtypes.float0)
        if getattr(x, "weak_type", True) and shape == ():
            return math.sin(next(count))
        return jnp.asarray(np.sin(next(count) + np.arange(np.prod(shape, dtype=int)).reshape(shape)), dtype)

    return jax.tree.map(tangent, tree)


def _vjp(m, f, p):
    def pulled(*args):
        out, pull = m.vjp(f, *args)
        return out, pull(tangents(out))

    return pulled


def _linearize(m, f, p):
    def linearized(*args):
        out, push = m.linearize(f, *args)
        return out, push(*tangents(args))

    return linearized


def _vmap(m, f, p):
    return m.vmap(f, in_axes=axes(p), axis_size=STEPS)


def _grad_of_vmap(m, f, p):
    mapped = summed(_vmap(m, f, p))
    return m.grad(m.trace(mapped, *batch(p)) if hasattr(f, "jaxpr") else mapped, **options(p))


TRANSFORMS = [
    Transform("call", lambda m, f, p: f),
    Transform("jit", lambda m, f, p: m.jit(f)),
    Transform("grad", lambda m, f, p: m.grad(f, **options(p)), summed),
    Transform("value_and_grad", lambda m, f, p: m.value_and_grad(f, **options(p)), summed),
    Transform("vjp", _vjp),
    Transform("jvp", lambda m, f, p: lambda *args: m.jvp(f, args, tangents(args))),
    Transform("linearize", _linearize),
    Transform("jacfwd", lambda m, f, p: m.jacfwd(f, argnums=p.diff), inexact),
    Transform("jacrev", lambda m, f, p: m.jacrev(f, **options(p)), inexact),
    Transform("hessian", lambda m, f, p: m.hessian(f, argnums=p.diff), summed),
    Transform("vmap", _vmap, batched=True),
    Transform("grad_of_vmap", _grad_of_vmap, batched=True),
    Transform("vmap_of_grad", lambda m, f, p: _vmap(m, m.grad(f, **options(p)), p), summed, batched=True),
]


@functools.lru_cache(maxsize=4)  # for the other form of the same program, which is next
def _reference(transform: Transform, p: Program) -> tuple[Any, Any]:
    return _lower(transform.of(jax, p), transform.arguments(p))


@functools.lru_cache(maxsize=4)
def _refusal(transform: Transform, p: Program) -> Exception:
    return raised_by(transform.of(jax, p), transform.arguments(p))


def check_transform(m: Any, transform: Transform, p: Program, form: str = "function") -> None:
    """The transform of `m` gives JAX's own program; where JAX refuses it, `m` refuses it with the same error."""
    args = transform.arguments(p)
    if transform.name not in p.lacks:
        _assert_same_lowered(_lower(transform.of(m, p, form), args), _reference(transform, p), args, form == "graph")
    else:
        assert_same_error(raised_by(lambda *args: transform.of(m, p, form)(*args), args), _refusal(transform, p))


def check_eager(m: Any, transform: Transform, p: Program, form: str = "function") -> None:
    """As `check_transform`, for values computed operation by operation: to the bit as a function, closely as a Graph.

    A Graph does not keep what JAX compiles as one operation: `jit(..., inline=True)`, as in `jnp.true_divide`.
    """
    args = transform.arguments(p)
    got, want = transform.of(m, p, form)(*args), transform.of(jax, p)(*args)
    if form == "function":
        assert_same_values(got, want)
    else:
        assert_close_values(got, want)


def raised_by(f: Callable, args: tuple = ()) -> Exception:
    """What a call raises; an AssertionError if it does not."""
    try:
        out = f(*args)
    except Exception as e:
        return e
    raise AssertionError(f"nothing raised; the output is {out!r:.100}")


def assert_same_error(got: Exception, want: Exception) -> None:
    """What `got` is, is also of the type of `want`."""
    assert isinstance(got, type(want)), f"{got!r:.300} is not a {type(want).__name__}"
