"""JAX's semantics as a table: each row is run with `jax` and with funcgrad as `m`; results, text and errors are equal.

A row returns whatever shows what happened: values, types, counts, text. What funcgrad raises must also be of the type
that JAX raises. Rows are run a third time with `live` under a rule that changes nothing, which must not be noticed.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import inspect
import io
import threading
import traceback
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import funcgrad as fg

from .checks import LIVE, assert_same_error, assert_same_values

# `live` gives another function, so these rows, on how JAX tells functions apart, are not for it.
NOT_LIVE = {"unhashable_callables", "jit_compares_functions_by_identity"}
ROWS = {}
SLOW = {"caught_leaks"}  # JAX searches all objects alive for who holds the tracer


def row(program):
    """Enter a row that needs statements."""
    assert program.__name__ not in ROWS
    ROWS[program.__name__] = program


def rows(**programs):
    """Enter rows that are one expression."""
    assert not ROWS.keys() & programs
    ROWS.update(programs)


def outcome(program, m):
    """What a row returns, prints and raises."""
    printed, result, error = io.StringIO(), None, None
    with contextlib.redirect_stdout(printed):
        try:
            result = program(m)
        except Exception as e:
            error = e
        jax.effects_barrier()
    return printed.getvalue(), result, error


def error_of(f, *args, **kwargs):
    """The type of what a call raises, of funcgrad's errors the built-in one; for rows with several calls."""
    try:
        return f"returned {f(*args, **kwargs)!r}"
    except Exception as e:
        return next(c.__name__ for c in type(e).__mro__ if not c.__module__.startswith("funcgrad"))


XS = jnp.arange(3.0)
square = lambda x: x**2
norm = lambda x: jnp.sum(jnp.asarray(x) ** 2)


# ------------------------------------------------------------------------------------------------ Python and values

rows(
    branch_on_a_concrete_value=lambda m: [m.grad(lambda x: x * 2.0 if x > 0 else x**2)(v) for v in (3.0, -3.0)],
    branch_in_value_and_grad=lambda m: m.value_and_grad(lambda x: x if x < 1 else x * x)(2.0),
    branch_in_jvp=lambda m: m.jvp(lambda x: x * 2.0 if x > 0 else x**2, (3.0,), (1.0,)),
    branch_in_vjp=lambda m: m.vjp(lambda x: x * 2.0 if x > 0 else x**2, -3.0)[1](1.0),
    branch_in_jit=lambda m: m.jit(lambda x: x * 2.0 if x > 0 else x**2)(3.0),
    branch_in_vmap=lambda m: m.vmap(lambda x: x * 2.0 if x > 0 else x**2)(XS),
    branch_in_grad_in_vmap=lambda m: m.vmap(m.grad(lambda x: x * 2.0 if x > 0 else x**2))(XS),
    branch_on_another_argument=lambda m: m.grad(lambda x, n: x * 2.0 if n > 0 else x**2)(3.0, 1),
    float_of_x=lambda m: m.grad(lambda x: x * float(x))(3.0),
    int_of_x=lambda m: m.grad(lambda x: x * int(x))(3.0),
    item_of_x=lambda m: m.grad(lambda x: x * x.item())(3.0),
    asarray_of_x=lambda m: m.grad(lambda x: x * np.asarray(x))(3.0),
    asarray_of_x_in_jit=lambda m: m.jit(lambda x: x * np.asarray(x))(3.0),
    format_of_x=lambda m: m.grad(lambda x: print(f"{x:.2f}") or x)(3.0),
    repr_of_x_in_grad=lambda m: m.grad(lambda x: print(x, type(x).__name__) or x)(3.0),
    repr_of_x_in_vmap=lambda m: m.vmap(lambda x: print(x, type(x).__name__) or x)(XS),
    repr_of_x_in_jit=lambda m: m.jit(lambda x: print(type(x).__name__, x.aval) or x)(3.0),
    hash_of_x=lambda m: m.grad(lambda x: {x: x}[x])(3.0),
    iteration_over_x=lambda m: m.grad(lambda x: sum(y * k for k, y in enumerate(x)))(XS),
    unpacking_of_x=lambda m: m.jit(lambda x: (lambda a, *b: (a, b))(*x))(XS),
    length_and_shape_of_x=lambda m: m.jit(lambda x: (len(x), x.shape, x.ndim, x.size))(XS),
    index_by_x=lambda m: m.grad(lambda x, i: [10.0, 20.0][i] * x)(1.0, 1),
    range_of_x_in_jit=lambda m: m.jit(lambda n: list(range(n)))(3),
    isinstance_of_x=lambda m: m.grad(lambda x: x * isinstance(x, jax.Array) * isinstance(x, jax.core.Tracer))(3.0),
    numpy_function_of_x=lambda m: m.grad(lambda x: np.sin(x))(3.0),
    numpy_arrays=lambda m: m.grad(lambda x, y: jnp.sum(x * y))(np.ones(3, np.float32), np.ones(3, np.float32)),
    numpy_scalars=lambda m: m.grad(lambda x: x**2)(np.float32(3)),
    numpy_doubles=lambda m: m.grad(lambda x: x**2)(np.float64(3)),
    python_complex=lambda m: m.grad(lambda z: (z * z).real)(2.0 + 1j),
    weak_types=lambda m: [m.grad(square)(x) for x in (2.0, jnp.float32(2), jnp.asarray(2.0), jnp.bfloat16(2))],
    weak_types_of_vmap=lambda m: m.vmap(lambda x, y: x * y, (0, None))(XS, 2.0),
    constants_are_concrete=lambda m: m.grad(lambda x: x * 2 if jnp.ones(3).sum() > 2 else x)(1.0),
    constants_are_traced_in_jit=lambda m: m.jit(lambda x: x * 2 if jnp.ones(3).sum() > 2 else x)(1.0),
    pow_of_python_numbers=lambda m: m.grad(lambda x: x**3 + 2**x + x**0.5)(2.0),
    dtype_promotion=lambda m: m.grad(lambda x: x * jnp.arange(3))(1.0),
    tuple_results_keep_their_type=lambda m: type(m.jit(lambda x: collections.OrderedDict(b=x, a=x))(1.0)).__name__,
    result_is_an_array=lambda m: [isinstance(x, jax.Array) and not x.weak_type for x in m.value_and_grad(norm)(XS)],
)


@row
def python_loop_on_a_concrete_value(m):
    def f(x):
        while x < 100:
            x = x * x
        return x

    return m.grad(f)(3.0), m.hessian(f)(3.0)


@row
def concrete_value_through_jit(m):
    step = jax.jit(lambda x: x * 2)
    return m.grad(lambda x: step(x) if step(x) > 1 else x)(3.0)


@row
def compile_time_evaluation(m):
    def f(x):
        with jax.ensure_compile_time_eval():
            large = jnp.sum(XS * 2) > 1
        return x * 2 if large else x

    return m.jit(f)(1.0), m.grad(f)(1.0)


@row
def an_object_as_argument(m):
    model = SimpleNamespace(scale=3.0, call=lambda x: x**2)
    return m.grad(lambda x, model: model.scale * model.call(x))(2.0, model)


# ------------------------------------------------------------------------------------------------ arguments

rows(
    text_argument=lambda m: m.grad(lambda x, mode: x * 2 if mode == "a" else x**2)(3.0, "b"),
    none_argument=lambda m: m.grad(lambda x, y: x * 2 if y is None else x * y)(3.0, None),
    function_argument=lambda m: m.grad(lambda x, f: f(x))(3.0, jnp.sin),
    text_among_the_leaves=lambda m: m.grad(lambda p: p["w"] ** 2)({"w": 2.0, "name": "layer"}),
    text_argument_of_vmap=lambda m: m.vmap(lambda x, mode: x, (0, None))(XS, "a"),
    text_argument_of_jit=lambda m: m.jit(lambda x, mode: x)(1.0, "a"),
    keyword_arguments=lambda m: m.grad(lambda x, *, y, z=2.0: x * y * z)(3.0, y=5.0),
    text_as_keyword=lambda m: m.grad(lambda x, mode="a": x if mode == "a" else 2 * x)(3.0, mode="b"),
    keyword_instead_of_position=lambda m: m.grad(lambda x: x**2)(x=3.0),
    keyword_for_another_argument=lambda m: m.grad(lambda x, y: x * y)(3.0, y=4.0),
    variadic=lambda m: m.grad(lambda *xs, **ys: xs[0] * xs[1] + sum(ys.values()), (0, 1))(2.0, 3.0, y=1.0),
    positional_only=lambda m: m.grad(lambda x, /, y=2.0: x * y)(3.0),
    defaults=lambda m: [m.grad(lambda x, y=3.0: x * y)(2.0), m.vmap(lambda x, y=3.0: x * y)(XS)],
    missing_argument=lambda m: m.grad(lambda x, y: x * y)(1.0),
    too_many_arguments=lambda m: m.grad(lambda x: x)(1.0, 2.0),
    no_arguments=lambda m: m.grad(lambda: 1.0)(),
    second_argument=lambda m: m.grad(lambda x, y: x * y**2, 1)(2.0, 3.0),
    several_arguments=lambda m: m.grad(lambda x, y, z: x * y * z, (2, 0))(2.0, 3.0, 4.0),
    list_of_argnums=lambda m: m.grad(lambda x, y: x * y, [0, 1])(2.0, 3.0),
    one_argnum_in_a_tuple=lambda m: m.grad(square, argnums=(0,))(2.0),
    no_argnums=lambda m: m.grad(square, argnums=())(2.0),
    negative_argnums=lambda m: m.grad(lambda x, y: x * y**2, argnums=-1)(2.0, 3.0),
    repeated_argnums=lambda m: m.grad(lambda x, y: x * y, argnums=(0, 0))(2.0, 3.0),
    argnums_out_of_range=lambda m: m.grad(square, argnums=1)(2.0),
    argnums_far_below=lambda m: m.grad(square, argnums=-2)(2.0),
    argnums_of_text=lambda m: m.grad(square, argnums="x")(2.0),
    argnums_of_float=lambda m: m.grad(square, argnums=0.0)(2.0),
    argnums_of_numpy_integer=lambda m: m.grad(lambda x, y: x * y, argnums=np.int64(1))(2.0, 3.0),
    positional_has_aux=lambda m: m.grad(lambda x: (x * 2, "aux"), 0, True)(1.0),
    positional_of_jacobians=lambda m: [d(lambda x, y: x * y, 1)(XS, XS) for d in (m.jacfwd, m.jacrev)],
    positional_of_hessian=lambda m: m.hessian(lambda x, y: x * y**2, 1)(2.0, 3.0),
    positional_axes=lambda m: m.vmap(lambda x, y: x * y, (None, 0), 1)(XS, XS),
    options_by_name=lambda m: m.grad(fun=square, argnums=0, has_aux=False, holomorphic=False, allow_int=False)(2.0),
    unknown_option=lambda m: m.grad(square, wrt=0)(2.0),
    no_reduce_axes=lambda m: m.grad(square, reduce_axes=())(2.0),
    some_reduce_axes=lambda m: m.grad(square, reduce_axes=("i",))(2.0),
    shape_instead_of_array=lambda m: m.grad(norm)(jax.ShapeDtypeStruct((3,), jnp.float32)),
    trees=lambda m: m.grad(lambda p: p["a"][0] * p["a"][1] + p["b"], 0)({"a": (2.0, 3.0), "b": 1.0, "n": None}),
    list_argument=lambda m: m.grad(lambda xs: xs[0] * xs[1])([2.0, 3.0]),
    wrong_list_argument=lambda m: m.grad(lambda xs: jnp.sum(xs))([2.0, 3.0]),
    ordered_dict=lambda m: m.grad(lambda p: p["b"] * p["a"])(collections.OrderedDict(b=2.0, a=3.0)),
    integer_argument=lambda m: m.grad(lambda x: x * 2.0)(3),
    boolean_argument=lambda m: m.grad(lambda x: x * 2.0)(True),
    text_to_differentiate=lambda m: m.grad(lambda x: 1.0)("text"),
    none_to_differentiate=lambda m: m.grad(lambda x: 1.0)(None),
    key_to_differentiate=lambda m: m.grad(lambda k: jax.random.uniform(k))(jax.random.key(0)),
    key_to_differentiate_allow_int=lambda m: m.grad(jax.random.uniform, allow_int=True)(jax.random.key(0)),
    keys_beside=lambda m: m.grad(lambda x, k: jnp.sum(x * jax.random.normal(k, (3,))))(XS, jax.random.key(1)),
    keys_mapped=lambda m: m.vmap(lambda k: jax.random.uniform(k))(jax.random.split(jax.random.key(0), 3)),
    keys_returned=lambda m: m.jit(jax.random.split)(jax.random.key(0)),
    integers_allowed=lambda m: m.grad(lambda p: p["x"] * p["n"], allow_int=True)({"x": 2.0, "n": 3}),
    integers_allowed_in_vjp=lambda m: m.vjp(lambda x, n: x * n, 2.0, 3)[1](1.0),
    integers_allowed_in_jacrev=lambda m: m.jacrev(lambda n: jnp.sin(n * 1.0), allow_int=True)(3),
    integers_in_jacfwd=lambda m: m.jacfwd(lambda n: n * 1.0)(3),
    integers_in_jacrev=lambda m: m.jacrev(lambda n: n * 1.0)(3),
    integer_primal_in_jvp=lambda m: m.jvp(lambda n: n * 2.0, (3,), (np.zeros((), jax.dtypes.float0),)),
)


# ------------------------------------------------------------------------------------------------ results

rows(
    vector_result=lambda m: m.grad(square)(XS),
    one_element_result=lambda m: m.grad(lambda x: jnp.reshape(x, (1,)))(2.0),
    tuple_result=lambda m: m.grad(lambda x: (x, x))(2.0),
    one_tuple_result=lambda m: m.grad(lambda x: (x,))(2.0),
    none_result=lambda m: m.grad(lambda x: None)(2.0),
    text_result=lambda m: m.grad(lambda x: "text")(2.0),
    object_result=lambda m: m.grad(lambda x: object())(2.0),
    integer_result=lambda m: m.grad(lambda x: x.astype(jnp.int32))(XS[1]),
    python_integer_result=lambda m: m.grad(lambda x: 3)(2.0),
    boolean_result=lambda m: m.grad(lambda x: x > 1)(2.0),
    constant_result=lambda m: m.grad(lambda x: 3.0)(2.0),
    numpy_result=lambda m: m.grad(lambda x: np.float32(3.0))(2.0),
    complex_result=lambda m: m.grad(lambda x: x * 1j)(2.0),
    complex_argument=lambda m: m.grad(lambda z: jnp.abs(z) ** 2)(jnp.complex64(1 + 2j)),
    holomorphic=lambda m: m.grad(lambda z: z**2, holomorphic=True)(jnp.complex64(1 + 2j)),
    holomorphic_of_real=lambda m: m.grad(square, holomorphic=True)(2.0),
    holomorphic_to_real=lambda m: m.grad(lambda z: jnp.abs(z), holomorphic=True)(1 + 2j),
    holomorphic_jacobians=lambda m: [d(square, holomorphic=True)(XS + 1j * XS) for d in (m.jacfwd, m.jacrev)],
    holomorphic_jacfwd_of_real=lambda m: m.jacfwd(square, holomorphic=True)(XS),
    complex_jacrev=lambda m: m.jacrev(lambda z: z.real)(jnp.complex64(1 + 2j)),
    complex_jacfwd=lambda m: m.jacfwd(lambda z: z.real)(jnp.complex64(1 + 2j)),
    half_precision=lambda m: m.value_and_grad(lambda x: jnp.sum(jnp.sin(x)))(XS.astype(jnp.bfloat16)),
    aux_of_objects=lambda m: m.grad(lambda x: (x * 2, {"o": "text", "n": None, "f": jnp.sin}), has_aux=True)(3.0),
    aux_of_arrays=lambda m: m.value_and_grad(lambda x: (x * 2, {"y": x + 1, "n": 3}), has_aux=True)(3.0),
    aux_is_concrete=lambda m: print(float(m.grad(lambda x: (x * 2, x + 1), has_aux=True)(3.0)[1])),
    aux_of_none=lambda m: m.value_and_grad(lambda x: (x, None), has_aux=True)(3.0),
    aux_is_missing=lambda m: m.grad(lambda x: x * 2, has_aux=True)(3.0),
    aux_in_a_list=lambda m: m.grad(lambda x: [x * 2, 1], has_aux=True)(3.0),
    aux_of_three=lambda m: m.grad(lambda x: (x, 1, 2), has_aux=True)(3.0),
    aux_of_a_vector=lambda m: m.grad(lambda x: (x * 2, 1), has_aux=True)(XS),
    aux_of_jacfwd=lambda m: m.jacfwd(lambda x: (x**2, {"y": x}), has_aux=True)(XS),
    aux_of_jacrev=lambda m: m.jacrev(lambda x: (x**2, {"y": x, "n": 2}), has_aux=True)(XS),
    aux_of_hessian=lambda m: m.hessian(lambda x: (norm(x), x), has_aux=True)(XS),
    aux_of_vjp=lambda m: (lambda out, pull, aux: (out, pull(1.0), aux))(
        *m.vjp(lambda x: (x * 2, x + 1), 3.0, has_aux=True)
    ),
    aux_of_jvp=lambda m: m.jvp(lambda x: (x * 2, x + 1), (3.0,), (1.0,), has_aux=True),
    aux_of_linearize=lambda m: m.linearize(lambda x: (x * 2, x + 1), 3.0, has_aux=True)[2],
    aux_of_vjp_is_missing=lambda m: m.vjp(lambda x: x * 2, 3.0, has_aux=True),
)


# ------------------------------------------------------------------------------------------------ other derivatives

rows(
    vjp=lambda m: m.vjp(lambda x, y: {"s": x * y, "d": x - y}, 2.0, 3.0)[1]({"s": 1.0, "d": 2.0}),
    vjp_without_arguments=lambda m: m.vjp(lambda: 1.0)[1](1.0),
    vjp_of_wrong_tree=lambda m: m.vjp(lambda x: (x, x), 2.0)[1](1.0),
    vjp_of_wrong_shape=lambda m: m.vjp(square, XS)[1](jnp.ones(2)),
    vjp_of_wrong_dtype=lambda m: m.vjp(square, XS)[1](jnp.ones(3, jnp.int32)),
    vjp_of_two_cotangents=lambda m: m.vjp(square, 2.0)[1](1.0, 1.0),
    vjp_of_text=lambda m: m.vjp(lambda s: s, "text"),
    vjp_pulled_in_vmap=lambda m: jax.vmap(m.vjp(lambda x: jnp.sin(x) * XS, XS)[1])(jnp.eye(3)),
    jvp=lambda m: m.jvp(lambda x, y: (x * y, {"n": None, "s": x + y}), (2.0, 3.0), (1.0, 0.5)),
    jvp_of_trees=lambda m: m.jvp(lambda p: p["a"] * p["b"], ({"a": 2.0, "b": XS},), ({"a": 1.0, "b": XS},)),
    jvp_of_lists=lambda m: m.jvp(lambda x, y: x * y, [2.0, 3.0], [1.0, 1.0]),
    jvp_of_no_tuple=lambda m: m.jvp(square, 2.0, 1.0),
    jvp_of_tuple_and_list=lambda m: m.jvp(square, (2.0,), [1.0]),
    jvp_of_wrong_tree=lambda m: m.jvp(lambda p: p["a"], ({"a": 2.0},), ({"b": 1.0},)),
    jvp_of_wrong_count=lambda m: m.jvp(lambda x, y: x * y, (2.0, 3.0), (1.0,)),
    jvp_of_wrong_shape=lambda m: m.jvp(square, (XS,), (1.0,)),
    jvp_of_wrong_dtype=lambda m: m.jvp(square, (2.0,), (jnp.int32(1),)),
    jvp_of_half_tangent=lambda m: m.jvp(square, (XS,), (XS.astype(jnp.float16),)),
    jvp_of_text_result=lambda m: m.jvp(lambda x: "text", (2.0,), (1.0,)),
    linearize=lambda m: (lambda y, push: (y, push(1.0, 2.0), push(0.0, 1.0)))(
        *m.linearize(lambda x, y: jnp.sin(x) * y, 2.0, 3.0)
    ),
    linearize_of_wrong_shape=lambda m: m.linearize(square, XS)[1](jnp.ones(2)),
    linearize_of_wrong_count=lambda m: m.linearize(square, XS)[1](XS, XS),
    linearize_of_trees=lambda m: m.linearize(lambda p: {"y": p["a"] * 2}, {"a": XS})[1]({"a": XS}),
    linearize_on_branches=lambda m: m.linearize(lambda x: x * 2 if x > 0 else x, 2.0)[1](1.0),
    jacobians_of_trees=lambda m: [
        d(lambda p: {"y": p["a"] * p["b"]})({"a": XS, "b": 2.0}) for d in (m.jacfwd, m.jacrev)
    ],
    jacobians_of_several=lambda m: [d(lambda x, y: x * y, argnums=(0, 1))(XS, 2.0) for d in (m.jacfwd, m.jacrev)],
    jacobians_of_integers_out=lambda m: [error_of(d(lambda x: x.astype(int)), XS) for d in (m.jacfwd, m.jacrev)],
    jacobians_on_branches=lambda m: [d(lambda x: x**2 if x[0] == 0 else x)(XS) for d in (m.jacfwd, m.jacrev)],
    jacobians_with_text=lambda m: [d(lambda x, s: x * len(s))(XS, "text") for d in (m.jacfwd, m.jacrev)],
    hessian_of_trees=lambda m: m.hessian(lambda p: p["a"] * p["b"] ** 2)({"a": 1.0, "b": 2.0}),
    hessian_of_vectors=lambda m: m.hessian(lambda x: jnp.sin(x) * x[0])(XS),
    hessian_of_several=lambda m: m.hessian(lambda x, y: x * y**2, argnums=(0, 1))(2.0, 3.0),
)


@row
def vjp_pulled_twice(m):
    out, pull = m.vjp(lambda x: jnp.sin(x) * x, 3.0)
    return out, pull(1.0), pull(2.0)


@row
def vjp_runs_f_once(m):
    pull = m.vjp(lambda x: print("run") or jnp.sin(x), 3.0)[1]
    return pull(1.0), pull(1.0)


# ------------------------------------------------------------------------------------------------ vmap

rows(
    axes_none=lambda m: m.vmap(lambda w, x: w @ x, (None, 0))(jnp.ones((2, 3)), jnp.ones((5, 3))),
    axes_negative=lambda m: m.vmap(norm, -1)(jnp.ones((2, 3))),
    axes_of_trees=lambda m: m.vmap(lambda p, x: p["w"] * x + p["b"], ({"w": 0, "b": None}, 0))({"w": XS, "b": 1.0}, XS),
    axes_prefix=lambda m: m.vmap(lambda p, x: p["w"][0] * x, (0, None))({"w": (XS, XS)}, 2.0),
    axes_list=lambda m: m.vmap(lambda x, y: x * y, [0, None])(XS, 2.0),
    axes_of_wrong_length=lambda m: m.vmap(lambda x, y: x, (0,))(XS, XS),
    axes_of_wrong_tree=lambda m: m.vmap(lambda p: p["a"], ({"b": 0},))({"a": XS}),
    axes_of_wrong_type=lambda m: m.vmap(square, "0")(XS),
    axes_out_of_range=lambda m: m.vmap(square, 1)(XS),
    axes_all_none=lambda m: m.vmap(square, None)(XS),
    axes_all_none_with_size=lambda m: m.vmap(square, None, axis_size=2)(XS),
    sizes_differ=lambda m: m.vmap(lambda x, y: x)(XS, jnp.ones(2)),
    sizes_differ_in_a_tree=lambda m: m.vmap(lambda p: p["a"])({"a": XS, "b": jnp.ones((2, 2))}),
    size_differs_from_option=lambda m: m.vmap(square, axis_size=2)(XS),
    scalar_to_map=lambda m: m.vmap(square)(2.0),
    nothing_to_map=lambda m: m.vmap(lambda: 1.0)(),
    nothing_to_map_with_size=lambda m: m.vmap(lambda: 1.0, axis_size=3)(),
    empty_axis=lambda m: m.vmap(square)(jnp.zeros((0, 2))),
    keywords_are_mapped=lambda m: m.vmap(lambda x, y: x * y)(XS, y=XS),
    out_axes=lambda m: m.vmap(lambda x: (x, x * 2), out_axes=(0, 1))(jnp.ones((2, 3))),
    out_axes_none=lambda m: m.vmap(lambda x: (x, 2.0), out_axes=(0, None))(XS),
    out_axes_none_of_mapped=lambda m: m.vmap(square, out_axes=None)(XS),
    out_axes_of_wrong_tree=lambda m: m.vmap(square, out_axes=(0, 0))(XS),
    out_axes_out_of_range=lambda m: m.vmap(square, out_axes=1)(XS),
    result_is_text=lambda m: m.vmap(lambda x: "text")(XS),
    axis_name=lambda m: m.vmap(lambda x: (lax.psum(x, "b"), lax.axis_index("b")), axis_name="b")(XS),
    axis_name_unknown=lambda m: m.vmap(lambda x: lax.psum(x, "c"), axis_name="b")(XS),
    axis_names_nested=lambda m: m.vmap(m.vmap(lambda x: lax.psum(x, ("a", "b")), axis_name="a"), axis_name="b")(
        jnp.ones((2, 3))
    ),
    axis_name_differentiated=lambda m: m.vmap(m.grad(lambda x: lax.pmean(x**2, "b")), axis_name="b")(XS),
    mapped_print=lambda m: m.vmap(lambda x: jax.debug.print("{}", x) or x)(XS),
    mapped_in_jit=lambda m: m.jit(m.vmap(lambda x, y: x * y, (0, None)))(XS, 2.0),
    mapped_gradient=lambda m: m.vmap(m.grad(lambda w, x: jnp.sum(jnp.sin(w * x))), (None, 0))(XS, jnp.ones((2, 3))),
    gradient_of_mapped=lambda m: m.grad(lambda x: jnp.sum(m.vmap(jnp.sin)(x)))(XS),
)


# ------------------------------------------------------------------------------------------------ functions

rows(
    gradient_of_jnp=lambda m: m.grad(jnp.sin)(1.0),
    gradient_of_jitted=lambda m: m.grad(jax.jit(lambda x, n: x**n, static_argnums=1))(2.0, 3),
    gradient_of_partial=lambda m: m.grad(functools.partial(lambda a, x: a * x**2, 3.0))(2.0),
    gradient_of_tree_partial=lambda m: m.grad(jax.tree_util.Partial(lambda a, x: a * x**2, 3.0))(2.0),
    gradient_of_custom_jvp=lambda m: m.grad(jax.nn.silu)(1.0),
    gradient_of_method_of_array=lambda m: m.grad(jnp.mean)(XS),
    gradient_of_python_builtin=lambda m: m.grad(sum)([1.0, 2.0]),
    gradient_of_no_function=lambda m: m.grad(3.0)(1.0),
    gradient_of_generator=lambda m: m.grad(lambda x: (y for y in [x]))(1.0),
    vmap_of_no_function=lambda m: m.vmap("f")(XS),
    jit_of_no_function=lambda m: m.jit("f")(XS),
    recursion=lambda m: m.grad(lambda x: (lambda f, n: f(f, n))(lambda f, n: x if n == 0 else x * f(f, n - 1), 3))(2.0),
    gradient_of_gradient=lambda m: m.grad(m.grad(lambda x: x**3))(2.0),
    third_derivative=lambda m: m.grad(m.grad(m.grad(jnp.sin)))(1.0),
    forward_over_reverse=lambda m: m.jvp(m.grad(jnp.sin), (1.0,), (1.0,)),
    reverse_over_forward=lambda m: m.grad(lambda x: m.jvp(jnp.sin, (x,), (1.0,))[1])(1.0),
    jacobian_of_jacobian=lambda m: m.jacfwd(m.jacrev(lambda x: jnp.sum(x**3)))(XS),
    no_perturbation_confusion=lambda m: m.grad(lambda x: x * m.grad(lambda y: x + y)(1.0))(1.0),
    no_confusion_of_modes=lambda m: m.jvp(lambda x: m.grad(lambda y: x * y**2)(x), (3.0,), (1.0,)),
    closed_over_tracer_of_vmap=lambda m: m.vmap(lambda w: m.grad(lambda x: jnp.sin(w * x))(2.0))(XS),
    closed_over_tracer_of_jit=lambda m: m.jit(lambda w: m.grad(lambda x: jnp.sin(w * x))(2.0))(3.0),
    closed_over_tracer_in_jit=lambda m: m.grad(lambda w: m.jit(lambda x: jnp.sin(w * x))(2.0))(3.0),
    closed_over_tracer_in_scan=lambda m: m.grad(lambda w: lax.scan(lambda c, _: (c * w, c), 1.0, None, 3)[0])(2.0),
    gradient_in_scan=lambda m: lax.scan(lambda c, x: (c + m.grad(lambda y: jnp.sin(y * c))(x), c), 1.0, XS),
    gradient_in_cond=lambda m: lax.cond(XS[1] > 0, m.grad(jnp.sin), lambda x: x, XS[2]),
    gradient_in_jit=lambda m: jax.jit(m.grad(lambda p: p["w"] ** 2))({"w": 2.0}),
    gradient_in_checkpoint=lambda m: jax.grad(jax.checkpoint(lambda x: m.grad(jnp.sin)(x) ** 2))(1.0),
    checkpointed=lambda m: m.grad(jax.checkpoint(lambda x: print("run") or jnp.sin(jnp.sin(x))))(1.0),
    name_and_module=lambda m: [
        (d(norm).__name__, d(norm).__module__) for d in (m.grad, m.vmap, m.jit, m.jacfwd, m.hessian)
    ],
    signatures=lambda m: [
        str(inspect.signature(d(lambda x, *, y=2: x))) for d in (m.grad, m.value_and_grad, m.vmap, m.jit)
    ],
    unwrapped=lambda m: m.jit(norm).__wrapped__ is not None,
)


@row
def documented(m):
    def f(x):
        """The text of f."""

    return [bool(d(f).__doc__) and "f" in d(f).__doc__ for d in (m.grad, m.vmap, m.jit)]


@row
def bound_methods(m):
    class Model:
        def __init__(self):
            self.w = 3.0

        def loss(self, x):
            return self.w * x**2

    model = Model()
    gradient, before = m.grad(model.loss), m.grad(model.loss)(2.0)
    model.w = 5.0
    return before, gradient(2.0), m.vmap(model.loss)(XS), m.grad(Model.loss, 1)(model, 1.0)


@row
def unhashable_callables(m):
    class F:
        __hash__ = None

        def __call__(self, x):
            return x**2

    return m.grad(F())(2.0), m.vmap(F())(XS), m.jvp(F(), (2.0,), (1.0,)), error_of(lambda: m.jit(F())(2.0))


@row
def callables_that_are_equal(m):
    class F:
        def __init__(self, k):
            self.k = k

        def __eq__(self, other):
            return True

        def __hash__(self):
            return 0

        def __call__(self, x):
            return self.k * x

    return m.grad(F(2.0))(1.0), m.grad(F(3.0))(1.0)


@row
def static_and_class_methods(m):
    class F:
        @staticmethod
        def s(x):
            return x**2

        @classmethod
        def c(cls, x):
            return x**3

    return m.grad(F.s)(2.0), m.grad(F.c)(2.0), m.jit(F().c)(2.0)


@row
def decorators(m):
    @m.jit
    @m.grad
    def f(x):
        return jnp.sin(x)

    return f(1.0), f.__name__


@row
def jaxprs_are_equal(m):
    f = lambda x: lax.scan(lambda c, _: (jax.nn.relu(c) * jnp.sin(c), c), x, None, 2)[0]
    return str(jax.make_jaxpr(m.grad(f))(1.0)), str(jax.make_jaxpr(m.vmap(f))(XS)), jax.eval_shape(m.grad(f), 1.0)


# ------------------------------------------------------------------------------------------------ effects and state

rows(
    prints_on_every_call=lambda m: [g(1.0) for g in [m.grad(lambda x: print("call") or x)] for _ in range(2)],
    prints_on_every_mapped_call=lambda m: [g(XS) for g in [m.vmap(lambda x: print("call") or x)] for _ in range(2)],
    prints_once_in_jit=lambda m: [g(1.0) for g in [m.jit(lambda x: print("call") or x)] for _ in range(2)],
    debug_print=lambda m: m.grad(lambda x: jax.debug.print("x = {}", x) or x**2)(3.0),
    debug_print_in_jit=lambda m: m.grad(jax.jit(lambda x: jax.debug.print("x = {}", x) or x**2))(3.0),
    exception=lambda m: m.grad(lambda x: {}["missing"])(1.0),
    exception_in_vmap=lambda m: m.vmap(lambda x: 1 / 0)(XS),
    exception_in_jit=lambda m: m.jit(lambda x: [].pop())(1.0),
    exception_in_scan=lambda m: m.grad(lambda x: lax.scan(lambda c, _: {}[1], x, None, 2)[0])(1.0),
    exception_of_shapes=lambda m: m.grad(lambda x: jnp.sum(x @ jnp.ones(4)))(XS),
    stop_iteration=lambda m: m.grad(lambda x: next(iter([])))(1.0),
    while_in_forward_mode=lambda m: m.jvp(
        lambda x: lax.while_loop(lambda c: c < 9, lambda c: c * c, x), (2.0,), (1.0,)
    ),
    debug_callback_order=lambda m: m.grad(lambda x: [jax.debug.print("{}", k, ordered=True) for k in range(3)] and x)(
        1.0
    ),
)


@row
def mutated_closure(m):
    scale = [2.0]
    g = m.grad(lambda x: x * scale[0])
    before = g(1.0)
    scale[0] = 5.0
    return before, g(1.0)


@row
def mutated_array(m):
    scale = np.ones(3, np.float32)
    g = m.grad(lambda x: jnp.sum(x * scale))
    before = g(XS)
    scale[:] = 5.0
    return before, g(XS)


@row
def mutation_by_the_function(m):
    seen = []
    f = lambda x: seen.append("call") or x**2
    m.grad(f)(1.0), m.vmap(f)(XS), m.jit(f)(1.0), m.hessian(f)(1.0), m.linearize(f, 1.0)
    return seen


@row
def random_state(m):
    generator = np.random.default_rng(0)
    g = m.grad(lambda x: x * generator.random())
    return g(1.0), g(1.0)


@row
def custom_exceptions(m):
    class Mine(Exception):
        pass

    def f(x):
        raise Mine("text", 3)

    try:
        m.grad(f)(1.0)
    except Mine as e:
        return e.args, type(e).__name__, e.__cause__ is None


@row
def exceptions_are_caught_inside(m):
    def f(x):
        try:
            return x * float(jax.jit(lambda y: float(y))(x))
        except jax.errors.ConcretizationTypeError:
            return x * 7

    return m.grad(f)(1.0)


@row
def frames_of_the_user(m):
    def inner(x):
        raise ValueError

    try:
        m.grad(lambda x: inner(x))(1.0)
    except ValueError as e:
        return [frame.name for frame in traceback.extract_tb(e.__traceback__)][-2:]


@row
def references(m):
    log = jax.new_ref(jnp.zeros(2))

    def f(x):
        log[0] = log[0] + 1
        log[1] = lax.stop_gradient(x)
        return x**2

    return m.grad(f)(3.0), m.jit(f)(4.0), log[...]


@row
def custom_rules_run_on_every_call(m):
    @jax.custom_vjp
    def f(x):
        print("f")
        return x

    f.defvjp(lambda x: print("fwd") or (x, x), lambda x, ct: print("bwd") or (ct * 2,))
    return m.grad(f)(1.0), f(1.0), m.grad(f)(1.0)


@row
def custom_jvp_runs_on_every_call(m):
    @jax.custom_jvp
    def f(x):
        print("f")
        return x

    f.defjvp(lambda p, t: print("jvp") or (p[0], 2 * t[0]))
    return m.grad(f)(1.0), m.jvp(f, (1.0,), (1.0,)), m.vmap(f)(XS)


@row
def inner_jit_is_traced_once(m):
    inner = jax.jit(lambda x: print("trace") or jnp.sin(x))
    return [m.grad(lambda x: inner(x) * inner(x))(v) for v in (1.0, 2.0)]


@row
def scan_body_is_traced_as_often(m):
    f = lambda x: lax.scan(lambda c, _: (print("trace") or c * x, None), x, None, 3)[0]
    return [m.grad(f)(v) for v in (1.0, 2.0)]


@row
def leaked_tracer(m):
    seen = []
    m.grad(lambda x: seen.append(x) or x**2)(2.0)
    return seen[0] * 2


@row
def leaked_tracer_of_jit(m):
    seen = []
    m.jit(lambda x: seen.append(x) or x**2)(2.0)
    return seen[0] * 2


# ------------------------------------------------------------------------------------------------ JAX's contexts


@row
def threads(m):
    results, barrier = {}, threading.Barrier(4)

    def work(k):
        barrier.wait()
        results[k] = m.grad(lambda x: jnp.sin(x) ** k)(1.0), m.vmap(lambda x: x * k)(XS)

    workers = [threading.Thread(target=work, args=(float(k),)) for k in range(1, 5)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    return results


@row
def thread_inside(m):
    def f(x):
        out = []
        worker = threading.Thread(target=lambda: out.append(jnp.sin(2.0)))
        worker.start()
        worker.join()
        return x * out[0]

    return m.grad(f)(1.0)


@row
def without_jit(m):
    with jax.disable_jit():
        return m.grad(jax.jit(lambda x: print("call") or (x * 2 if x > 0 else x)))(3.0), m.jit(lambda x: float(x))(2.0)


@row
def loops_without_jit(m):
    with jax.disable_jit():
        return m.grad(lambda x: lax.fori_loop(0, 3, lambda k, c: print(k) or c * x, x))(2.0)


@row
def checked_for_leaks(m):
    with jax.checking_leaks():
        return m.grad(lambda x: jnp.sin(x) * 2)(1.0), m.jit(m.grad(jnp.sin))(1.0)


@row
def caught_leaks(m):
    seen = []
    with jax.checking_leaks():
        return m.jit(lambda x: seen.append(x) or x)(1.0)


@row
def debugged_nans(m):
    with jax.debug_nans(True):
        return m.grad(lambda x: jnp.sqrt(x) * 0)(0.0)


@row
def debugged_infs_in_jit(m):
    with jax.debug_infs(True):
        return m.jit(lambda x: 1 / x)(0.0)


@row
def double_precision(m):
    with jax.enable_x64(True):
        return m.grad(lambda x: x**3)(2.0), m.vmap(jnp.sin)(np.arange(2.0))


@row
def changed_precision_inside(m):
    def f(x):
        with jax.enable_x64(True):
            return jnp.sum(x.astype(jnp.float64) ** 2)

    return m.grad(f)(XS)


@row
def standard_promotion(m):
    with jax.numpy_dtype_promotion("standard"):
        return m.grad(lambda x: jnp.sum(x * jnp.arange(3)))(XS)


@row
def matmul_precision(m):
    with jax.default_matmul_precision("highest"):
        return str(jax.make_jaxpr(m.grad(lambda x: jnp.sum(x @ x)))(jnp.ones((2, 2))))


@row
def no_tracing(m):
    with jax.no_tracing():
        return m.jit(lambda x: x + 41)(1.0)


@row
def devices(m):
    x = jax.device_put(XS, jax.devices("cpu")[2])
    return [str(y.sharding) for y in (*m.value_and_grad(norm)(x), m.vmap(square)(x), m.jit(square)(x))]


@row
def scopes(m):
    def f(x):
        with jax.named_scope("outer"):
            return jnp.sin(x) * x

    return [str(e.source_info.name_stack) for e in jax.make_jaxpr(m.grad(f))(1.0).eqns]


# ------------------------------------------------------------------------------------------------ jit

rows(
    static_argnums=lambda m: m.jit(lambda x, n: x * range(n)[-1], static_argnums=1)(2.0, 4),
    static_argnames=lambda m: m.jit(lambda x, *, mode: x if mode == "a" else 2 * x, static_argnames="mode")(
        2.0, mode="b"
    ),
    static_by_name_given_by_position=lambda m: m.jit(lambda x, n: x * len(range(n)), static_argnames=("n",))(2.0, 4),
    static_negative=lambda m: m.jit(lambda x, n: x * len(range(n)), static_argnums=-1)(2.0, 4),
    static_unhashable=lambda m: m.jit(lambda x, n: x, static_argnums=1)(2.0, [4]),
    static_out_of_range=lambda m: m.jit(square, static_argnums=3),
    static_unknown_name=lambda m: m.jit(square, static_argnames="nothing"),
    donated_and_static=lambda m: m.jit(lambda x: x, donate_argnums=0, static_argnums=0)(1.0),
    jit_of_text_result=lambda m: m.jit(lambda x: "text")(1.0),
    jit_as_decorator_with_options=lambda m: m.jit(static_argnums=1)(lambda x, n: x * len(range(n)))(2.0, 3),
    jit_of_trees=lambda m: m.jit(lambda p: {"y": p["x"], "none": None, "t": ()})({"x": XS}),
    jit_lowers=lambda m: m.jit(square).lower(2.0).compile()(2.0),
    jit_evaluates_shapes=lambda m: m.jit(square).eval_shape(XS),
    jit_in_jit=lambda m: m.jit(lambda x: m.jit(lambda y: print("trace") or y * x)(x))(2.0),
    gradient_of_jit=lambda m: m.grad(m.jit(lambda x, n: x**n, static_argnums=1))(2.0, 3),
    jit_with_shardings=lambda m: m.jit(square, out_shardings=jax.sharding.SingleDeviceSharding(jax.devices("cpu")[1]))(
        XS
    ),
    jit_with_wrong_option=lambda m: m.jit(square, static=0),
)


@row
def jit_retraces_as_often(m):
    f = m.jit(lambda x, n=1: print("trace") or x * n, static_argnames="n")
    arguments = (XS, XS + 1, jnp.ones(2), XS.astype(jnp.bfloat16), 1.0, 2.0, np.ones(3, np.float32), 1, True)
    for x in arguments:
        f(x)
    f(XS, n=2), f(XS, n=2), f(XS, n=3), f({"x": XS}["x"])


@row
def jit_sees_no_mutation(m):
    scale = [2.0]
    f = m.jit(lambda x: x * scale[0])
    before = f(1.0)
    scale[0] = 5.0
    return before, f(1.0)


@row
def donated_arguments_are_gone(m):
    x = XS + 1
    y = m.jit(lambda x: x * 2, donate_argnums=0)(x)
    return y, x.is_deleted(), error_of(lambda: x + 1)


@row
def jit_compares_functions_by_identity(m):
    f = lambda x: print("trace") or x
    return m.jit(f)(1.0), m.jit(f)(1.0)


# ------------------------------------------------------------------------------------------------ the test of each row


@pytest.mark.sample(1 / 2, ("name",))
@pytest.mark.parametrize("m", [pytest.param(fg, id="funcgrad"), pytest.param(LIVE, id="live")])
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in ROWS])
def test_as_jax(name, m):
    if m is LIVE and name in NOT_LIVE:
        pytest.skip("live gives another function")
    printed, result, error = outcome(ROWS[name], m)
    jax_printed, jax_result, jax_error = outcome(ROWS[name], jax)
    if jax_error is not None:
        assert error is not None, f"JAX raises {jax_error!r}"
        assert_same_error(error, jax_error)
    elif error is not None:
        raise error
    assert printed == jax_printed
    assert_same_values(result, jax_result)
