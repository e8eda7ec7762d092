"""Arguments of a function: their names, their canonical order in a call, and static ones."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from jax.tree_util import keystr, tree_flatten_with_path

from . import _jax
from .errors import ArgumentError, OptionError, location


def name_of(f: Callable) -> str:
    """The name of a function; the type of a callable that has none."""
    return getattr(f, "__name__", None) or type(getattr(f, "func", f)).__name__


def argument_names(signature: inspect.Signature | None, count: int) -> list[str]:
    """The names of the first `count` positional arguments; `rest[0]` and so on for those of `*rest`."""
    parameters = signature.parameters.values() if signature else ()
    fixed = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "args")
    return [fixed[k] if k < len(fixed) else f"{rest}[{k - len(fixed)}]" for k in range(count)]


def without_static(f, args, kwargs, static_argnums, static_argnames):
    """`f` with its static arguments filled in; its other arguments; its signature without the static ones."""
    signature = _jax.signature_of(f)
    numbers = {static_argnums} if isinstance(static_argnums, int) else set(static_argnums)
    names = {static_argnames} if isinstance(static_argnames, str) else set(static_argnames)
    if not numbers and not names:
        return f, args, kwargs, signature
    if signature is None:
        raise OptionError(
            f"{name_of(f)} has no signature, so its static arguments are not known.", hint="wrap it in a def"
        )
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as e:
        raise ArgumentError(f"{name_of(f)} cannot be called so: {e}.", at=location(f)) from None
    count = len(args)
    absent = [k for k in numbers if not -count <= k < count] + [n for n in names if n not in signature.parameters]
    if absent:
        raise OptionError(
            f"{name_of(f)} has no argument {', '.join(map(repr, absent))} to be static.",
            inputs=f"{name_of(f)}{signature}",
        )
    positional = argument_names(signature, len(bound.args))
    names |= {positional[k % count] for k in numbers}
    static = {n: v for n, v in [*zip(positional, bound.args, strict=True), *bound.kwargs.items()] if n in names}
    for name, value in static.items():
        if not isinstance(value, Hashable):
            raise ArgumentError(
                f"the static argument {name} of {name_of(f)} is not hashable: {type(value).__name__}.",
                hint="pass a tuple or a frozen dataclass",
            )
    rest = signature.replace(parameters=[p for n, p in signature.parameters.items() if n not in names])
    variadic = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_POSITIONAL), None)

    def filled(*args, **kwargs):
        arguments = {**rest.bind(*args, **kwargs).arguments, **static}
        if variadic:  # insert static values of `*rest` at their places
            values = list(arguments.get(variadic, ()))
            for name in [n for n in positional if n in static and n.startswith(f"{variadic}[")]:
                values.insert(int(name[len(variadic) + 1 : -1]), arguments.pop(name))
            arguments |= {variadic: tuple(values)} if values else {}
        ordered = OrderedDict((n, arguments[n]) for n in signature.parameters if n in arguments)
        full = inspect.BoundArguments(signature, ordered)
        return f(*full.args, **full.kwargs)

    filled.__name__ = filled.__qualname__ = name_of(f)
    filled.__signature__ = rest  # type: ignore[attr-defined]
    dynamic = tuple(v for n, v in zip(positional, bound.args, strict=True) if n not in names)
    return filled, dynamic, {n: v for n, v in bound.kwargs.items() if n not in names}, rest


def canonical_arguments(signature, args, kwargs):
    """The arguments in the order of the signature, equal for keyword and positional calls; unchanged if they do not fit."""
    try:
        bound = signature.bind(*args, **kwargs)
    except (AttributeError, TypeError):
        return args, kwargs
    return bound.args, bound.kwargs


def named_leaves(args, kwargs, signature) -> tuple[list[str], list[Any]]:
    """The path of each leaf of the arguments, as "params['w']", and its value."""
    names = argument_names(signature, len(args))
    paths, leaves = [], []
    for name, value in [*zip(names, args, strict=True), *sorted(kwargs.items())]:
        for path, leaf in tree_flatten_with_path(value)[0]:
            paths.append(name + keystr(path))
            leaves.append(leaf)
    return paths, leaves
