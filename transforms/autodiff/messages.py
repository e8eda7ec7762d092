"""Error messages of derivatives: arguments, outputs and loops that cannot be differentiated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.tree_util import all_leaves, keystr, tree_leaves, tree_leaves_with_path

from ..core import _jax
from ..core.errors import ArgumentError, GraphError, NotScalarError, OptionError, location
from ..core.signatures import argument_names, name_of


def explained(verb: str, fun: Callable, derived: Callable, options: dict) -> Callable:
    """`derived`, a derivative of `fun`, with errors that name the arguments and the line of `fun`."""

    @functools.wraps(derived)
    @_jax.api_boundary
    def call(*args, **kwargs):
        try:
            return derived(*args, **kwargs)
        except (TypeError, ValueError) as e:
            # JAX checks the arguments before it runs the function: if they are wrong, they are the cause.
            problem = wrong_arguments(verb, fun, args, options)
            if problem is None and "while_loop" in str(e) and "Reverse-mode" in str(e):
                problem = GraphError(
                    f"{verb} of {name_of(fun)} reaches a while loop that cannot run again, or a call of jax.grad around one.",
                    at=location(fun),
                    hint="take io_callback, ordered effects and references out of the loop; inside the function use fg.grad",
                )
            if problem is None:
                raise
        raise problem

    return call


def returning_scalar(verb: str, fun: Callable, body: Callable, options: dict) -> Callable:
    """`body`, which computes `fun`; it raises a NotScalarError if it does not return a float scalar."""

    @functools.wraps(fun, updated=())
    def checked(*args, **kwargs):
        out = body(*args, **kwargs)
        if options["has_aux"] and not (isinstance(out, tuple) and len(out) == 2):
            return out  # JAX has a message for that
        value = out[0] if options["has_aux"] else out
        aval = jax.typeof(value) if all_leaves([value]) and hasattr(value, "dtype") else None
        is_scalar = aval is not None and aval.shape == () and jax.dtypes.issubdtype(aval.dtype, jax.numpy.inexact)
        if is_scalar or isinstance(value, float | complex):
            return out  # JAX has the message for a complex scalar, which names `holomorphic`
        raise NotScalarError(
            f"{verb} needs a float scalar of shape (), and {name_of(fun)} returned {_summary(value)}.",
            at=location(fun),
            hint=f"reduce it, as in jnp.mean({name_of(fun)}(...)), or take fg.jacrev({name_of(fun)})",
        )

    return checked


def wrong_arguments(verb: str, fun: Callable, args: tuple, options: dict) -> Exception | None:
    """The error for the arguments of a call that cannot be differentiated; None if all can."""
    argnums = options["argnums"]
    names = argument_names(_jax.signature_of(fun), len(args))
    for k in argnums if isinstance(argnums, tuple | list) else (argnums,):
        if not isinstance(k, int):
            return None
        if not -len(args) <= k < len(args):
            error = ArgumentError if k >= 0 else OptionError  # JAX's types: TypeError and ValueError
            return error(
                f"{verb} with argnums={argnums} needs {k + 1 if k >= 0 else -k} positional arguments, "
                f"and {name_of(fun)} was called with {len(args)}.",
                at=location(fun),
                hint=f"pass what is to be differentiated by position, or change argnums: {name_of(fun)}{_jax.signature_of(fun)}",
            )
        for path, leaf in tree_leaves_with_path(args[k]):
            where = names[k] + keystr(path)
            clause = f"{verb} differentiates {name_of(fun)} with respect to {where}, which"
            try:
                dtype = jax.typeof(leaf).dtype
            except TypeError:
                what, inputs = f"{clause} is not an array but {type(leaf).__name__}.", f"{where} = {leaf!r:.60}"
                return ArgumentError(what, at=location(fun), inputs=inputs, hint="leave it out of argnums")
            is_inexact = jax.dtypes.issubdtype(dtype, jax.numpy.inexact)
            if not (is_inexact or options["holomorphic"] or options.get("allow_int")):
                cast = f"{where}.astype(float)" if hasattr(leaf, "astype") else f"float({where})"
                hint = f"leave it out of argnums, or cast it: {cast}"
                hint += ", or set allow_int=True" if "allow_int" in options else ""
                return ArgumentError(f"{clause} holds {dtype}.", at=location(fun), hint=hint)
    return None


def _summary(value: Any) -> str:
    leaves = tree_leaves(value)
    if len(leaves) != 1 or leaves[0] is not value:
        return f"a {type(value).__name__} of {len(leaves)} leaves"
    try:
        return jax.typeof(value).str_short()
    except TypeError:
        return type(value).__name__
