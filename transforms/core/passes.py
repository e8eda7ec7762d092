"""`Pass`: what one transformation does with the equations of a program. `run`: a jaxpr evaluated under a pass.

A pass never builds equations: it computes outputs from values under the current trace, and JAX traces that again. The drivers
call each other: a running function (`pass_trace`) binds sub-jaxprs, and a jaxpr holds derivative rules, which are functions.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Hashable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import jax
import numpy as np
from jax.tree_util import tree_flatten, tree_leaves, tree_unflatten

from . import _jax, manual_axes, subjaxprs
from .errors import GraphError
from .pass_trace import PassTrace, bind, driven, functions_of, in_form_of
from .scope_paths import Path, joined

Self = TypeVar("Self", bound="Pass")


class Pass:
    """One transformation of programs: override what differs from "every equation stays as it is".

    `fg.live(f, p)`, `fg.interpret(graph, p, *values)` and `fg.rewrite(graph, p)` apply it, at any depth of sub-jaxprs. What it
    computes is not seen by it again. A pass may keep state: what its copies for sub-jaxprs share belongs in a mutable attribute.
    The derivative of a `while` loop is one equation to a pass: apply the pass before `fg.grad`.

    Attributes:
      around: the named scopes around the current level, which is a function or a sub-jaxpr.

    >>> import jax, jax.numpy as jnp
    >>> from funcgrad.transforms import live
    >>> class Print(Pass):
    ...     def equation(self, eqn, values):
    ...         print("/".join((*self.scope(), eqn.primitive.name)))
    ...         return super().equation(eqn, values)
    >>> with jax.named_scope("layer"):
    ...     y = live(lambda x: -jax.jit(jax.named_scope("act")(jnp.sin))(x), Print())(1.0)
    act/sin
    neg
    """

    around: Path = ()
    base = 0  # how many entries of the name stack belong to the caller
    memo: MutableMapping[Any, dict[Any, Any]] | None = None  # transformed sub-jaxprs, where they can be kept
    key: Hashable = ()  # what distinguishes passes that share a memo

    # What a pass decides

    def enters(self, eqn: Any, values: Sequence[Any]) -> bool:
        """Whether the sub-jaxprs of `eqn`, and its derivative rules, are transformed; else `equation` computes it whole."""
        return True

    def inlines(self, eqn: Any, values: Sequence[Any]) -> bool:
        """Whether the body of an entered call is evaluated in place of the call; loops, branches and shard_map stay."""
        return eqn.primitive.name in subjaxprs.INLINED

    def equation(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        """A list of the outputs of an equation that is not entered, of its shapes and dtypes; by default it is bound as it is."""
        return bind(eqn, values)

    def body(self, eqn: Any, k: int) -> Pass | None:
        """The pass for the k-th sub-jaxpr or function of `eqn`: a copy with its scopes by default; None leaves it as it is."""
        return self.within(self.scope())

    def leave(self, outputs: list[Any]) -> tuple[list[Any], Any]:
        """The outputs of a sub-jaxpr that this pass ran through, and a tree of additional arrays that it returns.

        Loops, branches and calls have room for these arrays; the predicate of a while, a while with one predicate per lane,
        custom_linear_solve, shard_map and functions with derivative rules do not: from there no arrays are received.
        """
        return outputs, ()

    def receive(self, eqn: Any, values: Sequence[Any], k: int, extras: Any) -> None:
        """Outside, the tree that the k-th sub-jaxpr of `eqn` returned: stacked by a scan, zeros where a branch did not run."""

    def level(self, jaxpr: _jax.Jaxpr, values: Sequence[Any]) -> Any:
        """The equations that are evaluated for a jaxpr whose constants and inputs are `values`, in the form of a jaxpr."""
        return jaxpr

    # What a pass knows

    def scope(self) -> Path:
        """The named scopes around the equation that is visited, from the outside in."""
        return joined(self.around, _jax.scopes(_jax.name_stack()[self.base :]))

    def within(self: Self, around: Path) -> Self:
        """A copy for a level in these scopes that starts here."""
        child = copy.copy(self)
        child.around, child.base = around, len(_jax.name_stack())
        return child

    # How JAX's parts are handled, which few passes override

    def ignores(self, primitive: _jax.Primitive, params: dict[str, Any]) -> bool:
        """Whether a primitive of a running function goes to JAX at once, because this pass leaves it as it is."""
        return False

    def has_work(self, jaxpr: _jax.Jaxpr) -> bool:
        """Whether a jaxpr may change under this pass."""
        return True

    def consts(self, body: _jax.ClosedJaxpr) -> Sequence[Any]:
        """The constants of a sub-jaxpr, which become operands."""
        return body.consts

    def axes(self, eqn: Any, values: Sequence[Any]) -> frozenset[str]:
        """The mesh axes along which operands vary, where the graph does not know it: all operands then vary along them."""
        return manual_axes.unforeseen(values) if isinstance(eqn, _jax.JaxprEqn) else frozenset()

    def visit(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        """The outputs of an equation. A pass that does something around all equations overrides this and calls it."""
        axes = self.axes(eqn, values)
        if not axes:
            return self._decide(eqn, values, axes)
        with manual_axes.mesh_of(values):
            return self._decide(eqn, [manual_axes.vary(v, axes) for v in values], axes)

    def _decide(self, eqn: Any, values: Sequence[Any], axes: frozenset[str]) -> list[Any]:
        functions = functions_of(eqn)
        bodies = [body.jaxpr for body in subjaxprs.bodies(eqn)] if subjaxprs.has_bodies(eqn.primitive) else []
        if not (functions or bodies) or not self.enters(eqn, values):
            return self._checked(eqn, self.equation(eqn, values))
        if eqn.primitive.name in subjaxprs.CALLS and self.inlines(eqn, values):
            return self._inlined(eqn, bodies, values)
        if functions:
            return eqn.call([self._function(eqn, values, k, f) for k, f in enumerate(functions)], values)
        if eqn.primitive.name in subjaxprs.FUNCTIONAL:
            return self._substituted(eqn, bodies[0], values)
        is_inlined = subjaxprs.is_inlined(eqn)
        lifted, trees = zip(
            *(self._transformed(eqn, k, j, axes, is_inlined) for k, j in enumerate(bodies)), strict=True
        )
        outputs = subjaxprs.rebind(eqn.primitive, eqn.params, values, lifted)
        end = len(outputs) - sum(j.n_extras for j in lifted)
        extras = iter(outputs[end:])
        for k, (j, tree) in enumerate(zip(lifted, trees, strict=True)):
            if tree is not None:
                self.receive(eqn, values, k, tree_unflatten(tree, [next(extras) for _ in range(j.n_extras)]))
        return outputs[:end]

    def _checked(self, eqn: Any, outputs: Any) -> list[Any]:
        """The outputs of `equation`, if they are as many as the equation has, and arrays have its types as far as known."""
        primitive, is_list = eqn.primitive, isinstance(outputs, list | tuple)
        if isinstance(eqn, _jax.JaxprEqn):
            if is_list and len(outputs) == len(eqn.outvars) and all(map(_has_type, outputs, eqn.outvars)):
                return outputs
            expected = ", ".join(v.aval.str_short() for v in eqn.outvars)
        else:
            if is_list and (primitive.multiple_results or len(outputs) == 1):
                return outputs
            expected = "a list" if primitive.multiple_results else "one output"
        returned = jax.tree.map(
            lambda x: jax.typeof(x).str_short() if hasattr(x, "aval") else type(x).__name__, outputs
        )
        raise GraphError(
            f"{type(self).__name__}.equation returned {returned} for '{primitive}', which has {expected}.",
            at=_jax.line_of(eqn) or _jax.line_now(),
            hint="return a list with one value for each output, of its shape and dtype, as super().equation(eqn, values) does",
        )

    def _inlined(self, eqn: Any, bodies: Sequence[Any], values: Sequence[Any]) -> list[Any]:
        """The body of a call in its place."""
        child = self.body(eqn, 0)
        assert child is not None
        if functions := functions_of(eqn):
            with driven(child):
                return _jax.called(functions[0], values)
        return run(child, bodies[0], values, is_inlined=subjaxprs.is_inlined(eqn))

    def _transformed(
        self, eqn: Any, k: int, closed: _jax.ClosedJaxpr, axes: frozenset[str], is_inlined: bool
    ) -> tuple[subjaxprs.Lifted, Any]:
        """The k-th sub-jaxpr under its pass, traced again, and the tree of what it returns besides its outputs.

        Constants, also tracers that the pass closes over, are leading inputs. In a shard_map that the graph does not know
        all values vary along `axes`. A pass with a memo keeps the result, so that JAX finds what it compiled for it; not if it
        closes over tracers, which must not outlive their trace.
        """
        child, jaxpr = self.body(eqn, k), closed.jaxpr
        if child is None:
            return subjaxprs.lifted(closed), None
        memo: Any = {} if child.memo is None else child.memo.setdefault(jaxpr, {})
        key = type(child), child.around, k, child.key, axes, is_inlined, _jax.trace_context()
        if key not in memo:
            trees: list[Any] = []

            def staged(*values):
                if child is not self:
                    child.base = len(_jax.name_stack())
                outputs, extras = child.leave(_run(child, jaxpr, values, is_inlined))
                leaves, tree = tree_flatten(extras)
                has_room = not leaves or subjaxprs.has_room(eqn, k)
                leaves = leaves if has_room else []
                trees.append((tree if has_room else None, len(leaves)))
                return [manual_axes.vary(x, axes) for x in (*outputs, *leaves)]

            names = _jax.names_of(jaxpr)
            names = names if type(child).leave is Pass.leave else names._replace(result_paths=None)
            avals = [manual_axes.vary(v.aval, axes) for v in (*jaxpr.constvars, *jaxpr.invars)]
            result = subjaxprs.lifted(_jax.stage_flat(staged, avals, names)), *trees[-1]
            if any(isinstance(c, jax.core.Tracer) for c in result[0].consts):
                memo = {}
            memo[key] = result
        lifted, tree, count = memo[key]
        consts = [manual_axes.vary(c, axes) for c in (*lifted.consts, *self.consts(closed))]
        return subjaxprs.Lifted(lifted.jaxpr, consts, count), tree

    def _function(self, eqn: Any, values: Sequence[Any], k: int, f: Any) -> Any:
        """The k-th function of a call under its pass."""
        child = self.body(eqn, k)
        if child is None:
            return f
        if k or child is self:  # derivative rules outlive this trace: they hold nothing of it
            return _jax.transformed(f, functools.partial(_started, child, child is not self))
        return _jax.transformed(f, lambda g: self._leaving(eqn, values, child, driven(child)(g)))

    def _substituted(self, eqn: Any, body: _jax.ClosedJaxpr, values: Sequence[Any]) -> list[Any]:
        """Bind an equation of a jaxpr that has functions: its body is evaluated as a jaxpr, its derivative rules run live."""
        child, params, evaluated = self.body(eqn, 0), eqn.params, None
        if child is not None:
            evaluated = self._leaving(eqn, values, child, lambda *xs: run(child, body, xs))
            params = subjaxprs.emptied(params) if eqn.primitive.name == "shard_map" else params
        with _jax.take_current_trace() as parent, _jax.set_current_trace(PassTrace(parent, self, evaluated, eqn)):
            return _jax.bind(eqn.primitive, params, values)

    def _leaving(self, eqn: Any, values: Sequence[Any], child: Pass, f: Callable) -> Callable:
        """`f`, which runs under `child`, with what leaves it: without arrays, for which such a call has no room."""
        if child is self:
            return f

        def leaving(*args):
            child.base = len(_jax.name_stack())
            outputs = f(*args)
            results, extras = child.leave(list(outputs))
            if not tree_leaves(extras):
                self.receive(eqn, values, 0, extras)
            return in_form_of(outputs, results)

        return leaving


def _has_type(value: Any, var: Any) -> bool:
    """Whether a value, if it is an array, has the shape and dtype of a variable."""
    aval, expected = getattr(value, "aval", None), var.aval
    if aval is None or aval is expected or not (_jax.is_array(aval) and _jax.is_array(expected)):
        return True
    return aval.shape == expected.shape and aval.dtype == expected.dtype


def _started(child: Pass, is_new: bool, f: Callable) -> Callable:
    """`f` under `child`, whose level starts there if it is new."""

    def started(*args):
        if is_new:
            child.base = len(_jax.name_stack())
        with driven(child):
            return f(*args)

    return started


# ------------------------------------------------------------------------------------------------ jaxprs


def run(p: Pass, closed: _jax.ClosedJaxpr, values: Sequence[Any], *, is_inlined: bool = False) -> list[Any]:
    """Evaluate a jaxpr under the current trace, each equation as `p` decides.

    Args:
      is_inlined: whether it is the body of a call that JAX inlines: its equations then have the source line of the call.
    """
    return _run(p, closed.jaxpr, [*closed.consts, *values], is_inlined)


def _run(p: Pass, jaxpr: _jax.Jaxpr, values: Sequence[Any], is_inlined: bool) -> list[Any]:
    """As `run`, with the constants among the values."""
    level = p.level(jaxpr, values)
    env: dict[Any, Any] = dict(zip([*level.constvars, *level.invars], values, strict=True))
    last = _jax.last_used(level)
    for eqn in level.eqns:
        outputs = step(p, eqn, env, is_inlined)
        env.update((v, x) for v, x in zip(eqn.outvars, outputs, strict=True) if v in last)
        for var in {v for v in eqn.invars if not isinstance(v, _jax.Literal) and last[v] is eqn}:
            del env[var]  # frees the memory of an eager run as it goes
    return [read(env, v) for v in level.outvars]


def step(p: Pass, eqn: Any, env: Mapping[Any, Any], is_inlined: bool = False) -> list[Any]:
    """The outputs of one equation of a jaxpr, whose operands are in `env`; in its scopes and configuration."""
    bound = _jax.inlined(eqn) if is_inlined and isinstance(eqn, _jax.JaxprEqn) else eqn
    with _jax.context_of(bound), of_width(v.aval for v in (*eqn.invars, *eqn.outvars)):
        return p.visit(bound, [read(env, v) for v in eqn.invars])


def read(env: Mapping[Any, Any], atom: Any) -> Any:
    """The value of a variable or literal."""
    return atom.val if isinstance(atom, _jax.Literal) else env[atom]


def of_width(avals: Iterable[Any]) -> AbstractContextManager:
    """A context with 64-bit types where values have them: a graph keeps those that `jax.enable_x64` gave when it was traced."""
    return jax.enable_x64(True) if any(getattr(a, "dtype", None) in _WIDE for a in avals) else nullcontext()


_WIDE = frozenset(map(np.dtype, ("int64", "uint64", "float64", "complex128")))
