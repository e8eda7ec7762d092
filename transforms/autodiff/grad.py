"""Derivatives: `fg.grad(f)` is `jax.grad(differentiable(f))`, and all of JAX's semantics stay.

Each verb has JAX's own signature, positional options included. A function gives a function; a Graph gives a Graph from `grad`,
`value_and_grad`, `jacfwd`, `jacrev` and `hessian`, and is a callable like any other to `vjp`, `jvp` and `linearize`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from ..core import _jax
from ..core.errors import ArgumentError, OptionError, location
from ..core.graph import Graph
from ..core.rules import Rule, Rules, as_pass, live
from ..core.signatures import name_of
from ..remat.plan import Plan, budgeted, planned
from ..rewriting.scope_rules import scoped
from ..while_loops.primitives import rules as reversible
from ..while_loops.schedule import Loops
from .jacobians import jacobian as jacobian_in_chunks
from .messages import explained, returning_scalar

UserRules = Rules | Mapping[_jax.Primitive | str, Rule]


def differentiable(f: Callable, *, rules: UserRules | None = None, loops: Loops | None = None) -> Callable:
    """`f` with the same values, a reverse mode for its `while` loops, and the gradients of `rules`; for plain `jax.grad` too.

    Args:
      f: function or Graph.
      rules: primitive -> `rule(eqn, *values)`, which returns the equation's outputs by another, differentiable computation
        of the same values, at any depth of `f` (a straight-through estimator, a `jax.custom_vjp` function). Or scope pattern
        ("block_*/attention") -> `rule(region, *values)`; the Graph `region` holds all equations of a scope, and the rule returns
        what `region(*values)` does. Its `region.paths` say where the values come from, as "params['w']" or "encoder/tanh". Two
        calls of a scope with nothing in between are one. For scopes `f` is traced at every call, with respect to its arrays,
        NumPy's too; its other arguments stay as they are. A mapping, or a `Rules`, which keeps compiled programs from call to
        call of `vjp`, `jvp` and `linearize` too.
      loops: the memory for the gradient of each `while` loop (`lax.while_loop`, `lax.fori_loop` with traced bounds), for any
        number of steps: see `Loops`, whose defaults are the default. Loops with ordered effects or references stay JAX's own.
    Returns:
      A function as `f`.
    Raises:
      OptionError: `loops` is not a `Loops`; at a call, a pattern names no scope. Also a ValueError.
      GraphError: at a call, a rule returned values of other shapes, dtypes or number.

    >>> from jax import lax
    >>> straight_through = lambda eqn, x: x + lax.stop_gradient(lax.round(x) - x)
    >>> jax.grad(differentiable(lambda x: 3 * lax.round(x), rules={lax.round_p: straight_through}))(0.7)
    Array(3., dtype=float32, weak_type=True)
    """
    _check_loops(f, loops)
    return live(_overridden(f, rules), reversible(loops or Loops()))


def _check_loops(f: Callable, loops: Any) -> None:
    if loops is not None and not isinstance(loops, Loops):
        raise OptionError(f"loops= takes fg.Loops(...), and got {loops!r:.60}.", at=location(f))


def _overridden(f: Callable, rules: UserRules | None) -> Callable:
    """`f` with the user's rules alone."""
    if rules is None:
        return f
    if not isinstance(rules, Mapping):
        return live(f, as_pass(rules, "rules="))
    scopes = {key: rule for key, rule in rules.items() if isinstance(key, str)}
    table: Any = {key: rule for key, rule in rules.items() if key not in scopes}
    return live(scoped(f, scopes) if scopes else f, as_pass(table, "rules="))


def grad(
    fun=None,
    argnums=0,
    has_aux=False,
    holomorphic=False,
    allow_int=False,
    reduce_axes=(),
    *,
    rules: UserRules | None = None,
    loops: Loops | None = None,
    memory: int | str | None = None,
):
    """Reverse-mode gradient of a scalar function, as `jax.grad`.

    Args:
      fun: function or Graph that returns a float scalar, shape (); with `has_aux`, a pair of it and anything.
      argnums: which positional arguments to differentiate with respect to.
      rules, loops: gradients of primitives and of scopes that override JAX's; memory for `while` loops. See `differentiable`.
      memory: a budget for the temporaries of the gradient: bytes, as 2**30 or "1GiB", or a part of the bytes without a
        budget, as "50%". Arguments and results come on top. The backward pass computes values of the forward pass again,
        as few as the budget allows. The function is traced once per types of its arguments, as by `jax.jit`, and up to
        four programs are compiled and measured, one or two more where these do not fit, also inside an outer `jax.jit`;
        strings, bools and other arguments that are not arrays or numbers are static. Under an outer `vmap` the budget is
        that of one lane; of sharded arguments, that of one device. `fg.plan` says what a budget does.
      has_aux, holomorphic, allow_int, reduce_axes: as in `jax.grad`.
    Returns:
      A function as `fun`, or a Graph; the output has the argument's tree, shapes and dtypes. Without `fun`, a decorator.
    Raises:
      NotScalarError: the output is not a real scalar. Also a TypeError, as in jax.grad.
      ArgumentError: an argument in `argnums` holds integers or is not an array. Also a TypeError.
      BudgetError: no program fits `memory`; the message says the bytes of the smallest. Also a ValueError.
    Source: Griewank & Walther 2008, Evaluating Derivatives, doi:10.1137/1.9780898717761.

    >>> grad(lambda x: x**3)(2.0)
    Array(12., dtype=float32, weak_type=True)
    """
    options = dict(
        argnums=argnums, has_aux=has_aux, holomorphic=holomorphic, allow_int=allow_int, reduce_axes=reduce_axes
    )
    return _derive(jax.grad, fun, options, rules, loops, memory=memory)


def value_and_grad(
    fun=None,
    argnums=0,
    has_aux=False,
    holomorphic=False,
    allow_int=False,
    reduce_axes=(),
    *,
    rules: UserRules | None = None,
    loops: Loops | None = None,
    memory: int | str | None = None,
):
    """Value and gradient of a scalar function in one run, as `jax.value_and_grad`; arguments and errors as in `grad`.

    >>> value_and_grad(lambda x: x**3)(2.0)
    (Array(8., dtype=float32, weak_type=True), Array(12., dtype=float32, weak_type=True))
    """
    options = dict(
        argnums=argnums, has_aux=has_aux, holomorphic=holomorphic, allow_int=allow_int, reduce_axes=reduce_axes
    )
    return _derive(jax.value_and_grad, fun, options, rules, loops, memory=memory)


def jacfwd(
    fun=None,
    argnums=0,
    has_aux=False,
    holomorphic=False,
    *,
    rules: UserRules | None = None,
    memory: int | str | None = None,
    chunk: int | None = None,
):
    """Jacobian by forward mode, one tangent per input element, as `jax.jacfwd`.

    Args:
      rules: as in `grad`.
      memory, chunk: as in `vmap`, here of the vmap over tangents: bytes of temporaries, or how many tangents at a time.
        With either, the jacobian is compiled, as by `jax.jit`.
    Returns:
      A function as `fun`, or a Graph; each output leaf becomes the tree of arguments, of shape output.shape + input.shape.

    >>> jacfwd(lambda x: x * x[0])(jax.numpy.array([1.0, 2.0]))
    Array([[2., 0.],
           [2., 1.]], dtype=float32)
    """
    options = dict(argnums=argnums, has_aux=has_aux, holomorphic=holomorphic)
    return _derive(jax.jacfwd, fun, options, rules, memory=memory, chunk=chunk)


def jacrev(
    fun=None,
    argnums=0,
    has_aux=False,
    holomorphic=False,
    allow_int=False,
    *,
    rules: UserRules | None = None,
    loops: Loops | None = None,
    memory: int | str | None = None,
    chunk: int | None = None,
):
    """Jacobian by reverse mode, one cotangent per output element, as `jax.jacrev`; shapes, `memory`, `chunk` as in `jacfwd`."""
    options = dict(argnums=argnums, has_aux=has_aux, holomorphic=holomorphic, allow_int=allow_int)
    return _derive(jax.jacrev, fun, options, rules, loops, memory=memory, chunk=chunk)


jacobian = jacrev  # as in JAX


def hessian(
    fun=None,
    argnums=0,
    has_aux=False,
    holomorphic=False,
    *,
    rules: UserRules | None = None,
    loops: Loops | None = None,
    memory: int | str | None = None,
    chunk: int | None = None,
):
    """Second derivatives, forward over reverse, as `jax.hessian`; `memory` and `chunk` as in `jacfwd`, of its forward mode.

    Returns:
      A function as `fun`, or a Graph; each output leaf becomes a tree of trees, of shape output.shape + input.shape twice.
    """
    options = dict(argnums=argnums, has_aux=has_aux, holomorphic=holomorphic)
    return _derive(jax.hessian, fun, options, rules, loops, memory=memory, chunk=chunk)


@_jax.api_boundary
def vjp(fun, *primals, rules: UserRules | None = None, loops: Loops | None = None, **options):
    """Outputs of `fun` and the function that pulls their cotangents back, as `jax.vjp` with its options (`has_aux`)."""
    return jax.vjp(differentiable(fun, rules=rules, loops=loops), *primals, **options)


@_jax.api_boundary
def jvp(fun, primals, tangents, has_aux=False, *, rules: UserRules | None = None):
    """Outputs of `fun` and the tangents pushed forward, as `jax.jvp`."""
    return jax.jvp(_overridden(fun, rules), primals, tangents, has_aux)


@_jax.api_boundary
def linearize(fun, *primals, rules: UserRules | None = None, **options):
    """Outputs of `fun` and its linear map at `primals`, as `jax.linearize` with its options (`has_aux`)."""
    return jax.linearize(_overridden(fun, rules), *primals, **options)


def plan(
    fun: Callable,
    /,
    *args: Any,
    memory: int | str,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    rules: UserRules | None = None,
    loops: Loops | None = None,
    **kwargs: Any,
) -> Plan:
    """What `value_and_grad(fun, argnums, has_aux, memory=memory)` does with a budget, without running it.

    Args:
      fun: function or Graph, as in `value_and_grad`.
      *args, **kwargs: its arguments; arrays may be `jax.ShapeDtypeStruct`.
      memory, argnums, has_aux, rules, loops: as in `value_and_grad`.
    Returns:
      Plan. Its text says the bytes and the FLOPs, the saved and the recomputed values.
    Raises:
      BudgetError: no program fits the budget. Also a ValueError.

    >>> import jax.numpy as jnp
    >>> layer = lambda x, w: (jnp.tanh(x @ w), None)
    >>> loss = lambda ws, x: jax.lax.scan(layer, x, ws)[0].sum()
    >>> p = plan(loss, jnp.ones((16, 32, 32)), jnp.ones((512, 32)), memory="50%")
    >>> p.compiled_bytes <= p.default_bytes / 2, p.extra_flops < 0.4
    (True, True)
    """
    if not callable(fun):
        raise ArgumentError(f"plan takes a function or a Graph, and got {type(fun).__name__}.", inputs=f"{fun!r:.60}")
    _check_loops(fun, loops)
    options = dict(argnums=argnums, has_aux=has_aux, holomorphic=False)
    body = returning_scalar("plan", fun, _overridden(fun, rules), options)
    derived = functools.partial(planned, jax.value_and_grad, body, options=options, loops=loops, memory=memory)
    return explained("plan", fun, derived, options)(*args, **kwargs)


def _derive(
    transform: Callable, fun: Any, options: dict, rules: UserRules | None, loops: Loops | None = None, **budget: Any
) -> Any:
    """`transform` of `fun`: a decorator if `fun` is None, a Graph if `fun` is one, else a function."""
    if fun is None:
        return functools.partial(_derive, transform, options=options, rules=rules, loops=loops, **budget)
    verb, is_scalar = transform.__name__, transform in (jax.grad, jax.value_and_grad)
    if not callable(fun):
        raise ArgumentError(f"{verb} takes a function or a Graph, and got {type(fun).__name__}.", inputs=f"{fun!r:.60}")
    has_budget = any(limit is not None for limit in budget.values())
    if transform is jax.jacfwd or (has_budget and is_scalar):  # the plan of a budget decides on loops
        _check_loops(fun, loops)
        body = _overridden(fun, rules)
    else:
        body = differentiable(fun, rules=rules, loops=loops)
    body = returning_scalar(verb, fun, body, options) if is_scalar else body
    if not has_budget:
        derived = transform(body, **options)
    elif is_scalar:
        derived = budgeted(transform, body, options=options, loops=loops, **budget)
        derived = functools.wraps(fun, updated=())(derived)
    else:
        derived = jacobian_in_chunks(transform, body, options, f"{verb} of {name_of(fun)}", **budget)
    derived = explained(verb, fun, derived, options)
    return fun.derive(derived, f"{verb}({fun.name})") if isinstance(fun, Graph) else derived
