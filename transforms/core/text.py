"""The lines of a Graph's text: one equation a line, scopes as headings, sub-jaxprs indented."""

from __future__ import annotations

import itertools
import os
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from . import _jax, subjaxprs

# Parameters that tell a reader nothing, or that the text shows in another way.
_HIDDEN = frozenset(
    """
    jaxpr call_jaxpr branches cond_jaxpr body_jaxpr jaxprs const_lengths jvp_jaxpr_fun fwd_jaxpr_thunk bwd out_trees
    symbolic_zeros num_consts num_carry ft_in ft_out cond_nconsts body_nconsts in_shardings out_shardings in_layouts
    out_layouts ctx_mesh keep_unused inline compiler_options_kvs differentiated sharding accuracy prevent_cse in_specs
    out_specs linear mesh check_vma newly_manual_axes manual_axes out_sharding weak_type unroll preferred_element_type
    """.split()  # noqa: SIM905
)
_WIDTH = 56  # characters of parameters per equation


def graph_lines(graph: Any, names: Names, source: bool = False) -> tuple[list[str], list[str]]:
    """The lines of a Graph's head and of its equations; see `Graph.text`."""
    jaxpr = graph.jaxpr.jaxpr
    inputs = ", ".join(f"{path}: {short(v.aval)}" for path, v in zip(graph.paths, jaxpr.invars, strict=True))
    head = [f"{graph.name}({inputs})"]
    if jaxpr.constvars:
        head.append(f"  closed over {_typed(jaxpr.constvars, names)}")
    return head, list(_lines(jaxpr, names, source, "  "))


class Names:
    """Names for the variables of a Graph: inputs by their paths, others in order of appearance: a, b, …, z, aa, ab, …

    Args:
      by_variable: names that some variables have already.
      reserved: names that no other variable may get.
    """

    def __init__(self, graph: Any, by_variable: Mapping[Any, str] | None = None, reserved: Iterable[str] = ()):
        inputs = dict(zip(graph.jaxpr.jaxpr.invars, graph.paths, strict=True))
        self.by_variable: dict[Any, str] = {**(by_variable or {}), **inputs}
        used = {*reserved, *self.by_variable.values()}
        words = ("".join(w) for n in itertools.count(1) for w in itertools.product(string.ascii_lowercase, repeat=n))
        self.unused = (word for word in words if word not in used)

    def __call__(self, atom) -> str:
        """The name of a variable, the same at every call; the number of a scalar literal, the type of others."""
        if isinstance(atom, _jax.Literal):
            return f"{atom.val}" if getattr(atom.val, "ndim", 0) == 0 else short(atom.aval)
        if _jax.dropped(atom):
            return "_"
        if atom not in self.by_variable:
            self.by_variable[atom] = next(self.unused)
        return self.by_variable[atom]


def _typed(variables: Iterable[Any], names: Callable[[Any], str]) -> str:
    return ", ".join(f"{names(v)}:{short(v.aval)}" for v in variables)


def _lines(jaxpr: _jax.Jaxpr, names: Names, source: bool, indent: str) -> Iterator[str]:
    open_scopes: list[str] = []
    for eqn in jaxpr.eqns:
        scopes = _split(_jax.scope_of(eqn))
        shared = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(open_scopes, scopes, strict=False))))
        for depth in range(shared, len(scopes)):
            yield f"{indent}{'  ' * depth}{scopes[depth]}:"
        open_scopes = scopes
        margin = indent + "  " * len(scopes)
        yield margin + equation(eqn, names) + (_source(eqn) if source else "")
        for body in subjaxprs.bodies(eqn):
            sub = body.jaxpr.jaxpr
            yield f"{margin}  {body.label}({_typed([*sub.constvars, *sub.invars], names)})"
            yield from _lines(sub, names, source, margin + "    ")
    yield f"{indent}return {', '.join(map(names, jaxpr.outvars)) or 'nothing'}"


def equation(eqn, names: Callable[[Any], str]) -> str:
    """An equation in one line, as "a:f32[8] = mul x 2.0"."""
    inputs = " ".join(map(names, eqn.invars))
    outputs = " ".join(f"{names(v)}:{short(v.aval)}" for v in eqn.outvars)
    params = ", ".join(f"{k}={_value(v)}" for k, v in eqn.params.items() if k not in _HIDDEN and _is_shown(v))
    params = params if len(params) <= _WIDTH else params[: _WIDTH - 1] + "…"
    return (
        f"{outputs + ' = ' if outputs else ''}{eqn.primitive.name}{f'[{params}]' if params else ''} {inputs}".rstrip()
    )


def _is_shown(value) -> bool:
    is_default = value is None or value is False or (isinstance(value, tuple) and all(v is False for v in value))
    return not is_default and not callable(value)


def _value(value) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_value, value))}{',' if len(value) == 1 else ''})"
    return " ".join(str(value).split())


def short(aval) -> str:
    """A type, as "f32[8,3]"."""
    return aval.str_short(short_dtypes=True)


def _source(eqn) -> str:
    return "".join(
        f"  # {os.path.basename(file)}:{line} ({function})" for file, line, function in _jax.source_lines(eqn)
    )


def _split(scope: str) -> list[str]:
    """Split at the slashes that are not inside the parentheses of a transform, as in `transpose(jvp(a/b))/c`."""
    parts, depth = [""], 0
    for c in scope:
        depth += (c == "(") - (c == ")")
        if c == "/" and not depth:
            parts.append("")
        else:
            parts[-1] += c
    return [p for p in parts if p]
