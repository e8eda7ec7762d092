"""`Tap`, the pass of `tap` and `patch`: it finds the selected values of a program, and replaces them.

Each level of the program (the function, the body of a scan, a branch) has a `Tap` of its own, which sees every equation and every
use of a value. Values found in a sub-jaxpr leave it as additional outputs.

A value leaves a scope when an equation outside of it uses the value, or the function returns it. A running function holds plain
arrays, so the pass knows the outputs of a scope by the identity of arrays (weakly: it keeps none of them alive).
"""

from __future__ import annotations

import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import jax
from jax.tree_util import register_dataclass

from ..core import _jax, subjaxprs
from ..core.pass_trace import Bound, bind, driven, functions_of, is_eager
from ..core.passes import Pass, of_width, run
from ..core.rules import checked
from ..core.scope_paths import Path, Site, Where, entered, is_within, joined, maker


class Selection:
    """What `where` selects, and the replacement: a function of the values, or None, which leaves them as they are."""

    def __init__(self, where: Where, replacement: Callable | None = None):
        self.where, self.replacement = where, replacement
        self.memo: WeakKeyDictionary[_jax.Jaxpr, dict[Any, Any]] = (
            WeakKeyDictionary()
        )  # which sub-jaxprs hold selected values
        self.bodies: WeakKeyDictionary[_jax.Jaxpr, dict[Any, Any]] = WeakKeyDictionary()  # sub-jaxprs under the pass

    def scope(self, path: Path, around: Path) -> Path | None:
        """The selected scope around `path`, unless it also lies around all of `around`."""
        scope = entered(self.where, path) if isinstance(self.where, str) else None
        return scope if scope and not is_within(around, scope) else None

    def selects(self, eqn: Any, path: Path, in_avals: Iterable[Any], out_avals: Iterable[Any]) -> bool:
        """Whether the predicate selects this equation; one that returns no arrays has nothing to show."""
        if isinstance(self.where, str) or subjaxprs.is_inlined(eqn):
            return False
        site = Site(eqn.primitive, eqn.params, "/".join(path), tuple(in_avals), tuple(out_avals))
        return bool(site.out_avals) and all(map(_jax.is_array, site.out_avals)) and bool(self.where(site))

    def holds(self, jaxpr: _jax.Jaxpr, around: Path) -> bool:
        """Whether something is selected in a sub-jaxpr at `around`, at any depth."""

        def is_selected(eqn):
            path = joined(around, _jax.scopes(_jax.name_stack(eqn)))
            avals = [v.aval for v in eqn.invars], [v.aval for v in eqn.outvars]
            is_inside = any(self.holds(body.jaxpr.jaxpr, path) for body in subjaxprs.bodies(eqn))
            return is_inside or self.scope(path, around) or self.selects(eqn, path, *avals)

        memo = self.memo.setdefault(jaxpr, {})
        if around not in memo:
            memo[around] = any(map(is_selected, jaxpr.eqns))
        return memo[around]


@partial(register_dataclass, data_fields=["value", "ran"], meta_fields=["name"])
@dataclass(frozen=True)
class TappedValue:
    """A selected value: "scope/primitive", the value (None if it was replaced), and whether it was computed."""

    name: str
    value: Any
    ran: Any = None


class ScopeOutput(NamedTuple):
    """A value that an equation of a selected scope computed, and its place in program order."""

    value: weakref.ref
    scope: Path
    name: str
    place: int


class Effect(BaseException):
    """A shadow evaluation meets an effect, which may not happen twice."""


class Tap(Pass):
    """One level of a tapped or patched program.

    Attributes:
      outer: the level around, if its scope outputs are closed over here.
      is_loop: whether each value found comes with a flag that says that it was computed.
      tapped: the values found, with their places in program order.
      outputs_of_scopes: by the identity of the value. replaced: by the place of a scope output, the value outside of its scope.
      is_shadow: whether the equation that is visited is computed beside the program, to be seen.
      path: the scopes around that equation. replaces_consts: whether its sub-jaxprs close over replaced values. is_inside:
        whether they do, or hold selected values.
    """

    def __init__(self, selection: Selection, around: Path = (), outer: Tap | None = None, is_loop: bool = False):
        self.selection, self.around, self.outer, self.is_loop = selection, around, outer, is_loop
        self.base = len(_jax.name_stack())
        self.memo = None if outer else selection.bodies
        self.key = is_loop
        self.tapped: list[tuple[int, TappedValue]] = []
        self.outputs_of_scopes: dict[int, ScopeOutput] = {}
        self.replaced: dict[int, Any] = {}
        self.places = 0
        self.is_shadow = False
        self.path: Path = around
        self.replaces_consts = self.is_inside = False

    def in_order(self) -> list[TappedValue]:
        """The values found, in program order."""
        return [value for _, value in sorted(self.tapped, key=lambda x: x[0])]

    def seen(self) -> OrderedDict[str, Any]:
        """The values found, by numbered names. JAX keeps the order of an OrderedDict, not that of a dict."""
        seen: OrderedDict[str, Any] = OrderedDict()
        counts: Counter[str] = Counter()
        for tapped in self.in_order():
            name = f"{tapped.name}#{counts[tapped.name]}"
            seen[name] = tapped.value if tapped.ran is None else (tapped.value, tapped.ran)
            counts[tapped.name] += 1
        return seen

    # One value

    def returned(self, value: Any) -> Any:
        """A value that this level returns: it leaves every scope that does not lie around the level."""
        return self.used(value, self.around)

    def used(self, value: Any, path: Path) -> Any:
        """A value as its reader at `path` gets it: if it leaves its scope there, it is found."""
        output = self.scope_output(value)
        if output is None:
            return self.outer.used(value, path) if self.outer else value
        if is_within(path, output.scope):
            return value
        if output.place not in self.replaced:
            (self.replaced[output.place],) = self.select(output.name, output.place, [value])
        return self.replaced[output.place]

    def scope_output(self, value: Any) -> ScopeOutput | None:
        """Where in a selected scope a value was computed."""
        output = self.outputs_of_scopes.get(id(value))
        return output if output and output.value() is value else None

    def select(self, name: str, place: int, values: list[Any]) -> list[Any]:
        """Selected values: as they are, or their replacements."""
        if self.selection.replacement is None:
            self.tapped.append((place, TappedValue(name, values[0] if len(values) == 1 else tuple(values))))
            return values
        self.tapped.append((place, TappedValue(name, None)))
        avals, line = list(map(jax.typeof, values)), Bound(None, {}, _jax.current_source())
        with of_width(avals):
            new = self.selection.replacement(*values)
            return checked(f"replace= for {name}", line, avals, new if len(values) > 1 else [new])

    def place(self) -> int:
        """A new place in program order."""
        self.places += 1
        return self.places

    # One equation

    def visit(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        """As any pass, with operands as used here and outputs as selected. A near inlined jit is its body, as in its Graph."""
        if self.is_shadow and not functions_of(eqn) and subjaxprs.has_effects(eqn, values):
            raise Effect
        path = self.scope()
        if self._is_near_inlined(eqn, path, values):
            return run(self, subjaxprs.bodies(eqn)[0].jaxpr, values, is_inlined=True)
        values = [self.used(x, path) for x in values]
        self.path, self.replaces_consts = path, self._replaces_consts(eqn, path)
        self.is_inside = self.replaces_consts or self._holds(eqn, path)
        return self._selected(eqn, path, values, super().visit(eqn, values))

    def _is_near_inlined(self, eqn: Any, path: Path, values: Sequence[Any]) -> bool:
        is_near = self.selection.scope(path, self.around) or any(id(x) in self.outputs_of_scopes for x in values)
        return bool(is_near) and subjaxprs.is_inlined(eqn)

    def enters(self, eqn: Any, values: Sequence[Any]) -> bool:
        """Whether something inside is selected or replaced, and can leave. Derivative rules stay as they are."""
        is_patch, name = self.selection.replacement is not None, eqn.primitive.name
        if functions := functions_of(eqn):
            return is_eager() if len(functions) > 1 else is_patch
        if name == "shard_map":
            return is_patch
        is_shadowed = name in subjaxprs.INLINED | subjaxprs.WITH_DERIVATIVES
        return self.is_inside and not is_shadowed and (is_patch or subjaxprs.has_room(eqn) or subjaxprs.is_inlined(eqn))

    def inlines(self, eqn: Any, values: Sequence[Any]) -> bool:
        """Whether tracing leaves out the call."""
        return subjaxprs.is_inlined(eqn)

    def equation(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        """The equation as it is, or beside a shadow evaluation of its body."""
        functions, name = functions_of(eqn), eqn.primitive.name
        if len(functions) > 1:
            body = driven(self)(lambda: _jax.called(functions[0], values))
        elif name in subjaxprs.INLINED | subjaxprs.WITH_DERIVATIVES and self.is_inside:
            closed = subjaxprs.bodies(eqn)[0].jaxpr
            consts = [self.used(x, self.path) for x in closed.consts]
            body = lambda: run(self, _jax.close(closed.jaxpr, consts), values)
        else:
            return bind(eqn, values)
        return self._shadowed(body, lambda: bind(eqn, values))

    def body(self, eqn: Any, k: int) -> Tap | None:
        """The pass for a sub-jaxpr; a function with derivative rules, and an inlined call, belong to this level."""
        functions = functions_of(eqn)
        if len(functions) > 1 or subjaxprs.is_inlined(eqn):
            return None if k else self
        is_tapped_loop = eqn.primitive.name in subjaxprs.LOOPS and self.selection.replacement is None
        if is_tapped_loop and k == 0:  # the predicate: `_last_test` evaluates it
            return None
        return Tap(self.selection, self.path, self if self.replaces_consts else None, is_tapped_loop)

    def consts(self, body: _jax.ClosedJaxpr) -> Sequence[Any]:
        """The constants of a sub-jaxpr as used here."""
        return [self.used(x, self.path) for x in body.consts]

    def leave(self, outputs: list[Any]) -> tuple[list[Any], list[TappedValue]]:
        """The outputs as returned, and the values found."""
        outputs = [self.returned(x) for x in outputs]
        tapped = self.in_order()
        self.tapped, self.outputs_of_scopes, self.replaced = [], {}, {}  # tracers do not outlive their trace
        if self.is_loop:
            tapped = [replace(x, ran=jax.numpy.bool_(True)) if x.ran is None else x for x in tapped]
        return outputs, tapped

    def receive(self, eqn: Any, values: Sequence[Any], k: int, extras: list[TappedValue]) -> None:
        """The values found in a sub-jaxpr; those of a branch with whether it ran."""
        is_branch = eqn.primitive.name == "cond" and self.selection.replacement is None
        place = self.place()
        for x in extras:
            self.tapped.append((place, replace(x, ran=values[0] == k) if is_branch and x.ran is None else x))

    def _selected(self, eqn: Any, path: Path, values: Sequence[Any], outputs: list[Any]) -> list[Any]:
        """The outputs of an equation at `path`: selected, or computed in a selected scope."""
        if subjaxprs.is_elided(eqn, values, outputs):
            if output := self.scope_output(values[0]):
                self.outputs_of_scopes.update((id(x), output._replace(value=weakref.ref(x))) for x in outputs)
            return outputs
        if eqn.primitive.name in subjaxprs.LOOPS and self.selection.replacement is None:
            self._last_test(eqn, path, values, outputs)
        scope = self.selection.scope(path, self.around)
        if scope and not subjaxprs.is_inlined(eqn):
            for k, value in enumerate(outputs):
                if isinstance(value, jax.Array):
                    if any(value is x for x in values):  # an equation that returns its input also makes a value
                        outputs[k] = value = value.copy()
                    calls, scopes = maker(eqn, k, path)
                    name = "/".join((*scopes, calls[-1].primitive.name))
                    self.outputs_of_scopes[id(value)] = ScopeOutput(weakref.ref(value), scope, name, self.place())
        if self.selection.selects(eqn, path, map(jax.typeof, values), map(jax.typeof, outputs)):
            return self.select("/".join((*path, eqn.primitive.name)), self.place(), outputs)
        return outputs

    def _last_test(self, eqn: Any, path: Path, values: Sequence[Any], carry: Sequence[Any]) -> None:
        """The predicate of a while on its final carry, if it holds something selected."""
        cond = subjaxprs.bodies(eqn)[0].jaxpr
        if subjaxprs.has_room(eqn) and self.selection.holds(cond.jaxpr, path) and not cond.effects:
            run(self, cond, [*values[: eqn.params["cond_nconsts"]], *carry])

    def _holds(self, eqn: Any, path: Path) -> bool:
        """Whether sub-jaxprs hold something selected."""
        return any(self.selection.holds(body.jaxpr.jaxpr, path) for body in subjaxprs.bodies(eqn))

    def _replaces_consts(self, eqn: Any, path: Path) -> bool:
        """Whether sub-jaxprs close over something replaced."""
        if not (self.outputs_of_scopes or self.outer):
            return False
        consts = [(x, self.used(x, path)) for x in _closed_over([body.jaxpr for body in subjaxprs.bodies(eqn)])]
        return any(used is not x for x, used in consts)

    def _shadowed(self, body: Callable[[], list], original: Callable[[], list]) -> list[Any]:
        """A function with its own derivative or batching rule: its body, if something is replaced there, else the original.

        A tap evaluates the body beside the original, and sees nothing in one that has effects.
        """
        path, n_before, was_shadow = self.path, len(self.tapped), self.is_shadow
        self.is_shadow = was_shadow or self.selection.replacement is None
        try:
            outputs = [self.used(x, path) for x in body()]
        except Effect:
            if was_shadow:
                raise
            del self.tapped[n_before:]
        finally:
            self.is_shadow = was_shadow
        return outputs if self.selection.replacement and len(self.tapped) > n_before else original()


def _closed_over(jaxprs: Sequence[_jax.ClosedJaxpr]) -> Iterator[Any]:
    """The constants of sub-jaxprs, at any depth."""
    for jaxpr in jaxprs:
        yield from jaxpr.consts
        for eqn in jaxpr.jaxpr.eqns:
            yield from _closed_over([body.jaxpr for body in subjaxprs.bodies(eqn)])
