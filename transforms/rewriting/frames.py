"""What a tapped or patched program does, level by level: what it made in selected scopes, and what was found there.

The program runs under a `Trace` of ours, as in `living`. Each level of it (the function, the body of a scan, a branch) is a
`Frame`, which sees every equation and every use of a value. Sub-graphs that hold something selected are traced again in a frame
of their own: what is found there leaves them as outputs that they have more.

A value leaves a scope when an equation outside of it uses the value, or the function returns it. A running function holds plain
arrays, so a frame knows what was made in a scope by the identity of arrays (weakly: it keeps none of them alive).
"""

from __future__ import annotations

import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.tree_util import tree_flatten, tree_unflatten

from ..core import _jax, subjaxprs
from ..core.passes import Bound, Watch, checked, of_width, refilled, run, under
from ..core.scope_paths import Path, Probe, is_within, joined, maker


class Found(NamedTuple):
    """What was selected: "scope/primitive", the value (None if it was replaced), and whether it was computed."""

    name: str
    value: Any
    ran: Any = None


class Made(NamedTuple):
    """A value that a selected scope made."""

    value: weakref.ref
    scope: Path
    name: str
    place: int


class Effect(BaseException):
    """What is computed beside the program has an effect, and may not have it twice."""


class Frame:
    """One level of a program as it runs: what it made in selected scopes, and what was found."""

    def __init__(self, probe: Probe, around: Path = (), base: int = 0, outer: Frame | None = None):
        self.probe = probe
        self.around = around  # the scopes around this level
        self.base = base  # how many entries of the name stack are the caller's
        self.outer = outer  # the level around, if what it made is closed over here
        self.found: list[tuple[int, Found]] = []  # with their places in program order
        self.made: dict[int, Made] = {}  # by the identity of the value
        self.left: dict[int, Any] = {}  # what uses a made value gets outside of its scope, by its place
        self.places = 0
        self.is_beside = False  # whether what is bound now is computed beside the program, to be seen

    def in_order(self) -> list[Found]:
        """What was found, in program order."""
        return [found for _, found in sorted(self.found, key=lambda x: x[0])]

    def seen(self) -> OrderedDict[str, Any]:
        """What was found, by names that are numbered. JAX keeps the order of an OrderedDict, not that of a dict."""
        seen: OrderedDict[str, Any] = OrderedDict()
        counts: Counter[str] = Counter()
        for name, value, ran in self.in_order():
            seen[f"{name}#{counts[name]}"] = value if ran is None else (value, ran)
            counts[name] += 1
        return seen

    # What happens to one value

    def returned(self, value: Any) -> Any:
        """A value that this level returns: it leaves every scope that does not lie around the level."""
        return self.used(value, self.around)

    def used(self, value: Any, path: Path) -> Any:
        """A value as what uses it at `path` gets it: if it leaves its scope there, it is found."""
        made = self.made_as(value)
        if made is None:
            return self.outer.used(value, path) if self.outer else value
        if is_within(path, made.scope):
            return value
        if made.place not in self.left:
            (self.left[made.place],) = self.noted(made.name, made.place, [value])
        return self.left[made.place]

    def made_as(self, value: Any) -> Made | None:
        """What is known of a value that a selected scope made."""
        made = self.made.get(id(value))
        return made if made and made.value() is value else None

    def noted(self, name: str, place: int, values: list[Any]) -> list[Any]:
        """Values that are found: as they are, or what replaces them."""
        if self.probe.replace is None:
            self.found.append((place, Found(name, values[0] if len(values) == 1 else tuple(values))))
            return values
        self.found.append((place, Found(name, None)))
        avals, here = list(map(jax.typeof, values)), Bound(None, {}, _jax.current_source())
        with of_width(avals):
            new = self.probe.replace(*values)
            return checked(f"replace= for {name}", here, avals, new if len(values) > 1 else [new])

    # What happens to one equation

    def here(self) -> Path:
        """The scopes around what is bound now."""
        return joined(self.around, _jax.scopes(_jax.name_stack()[self.base :]))

    def apply(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        """The outputs of an equation, which is being bound now."""
        if self.is_beside and subjaxprs.has_effects(eqn, values):
            raise Effect
        if isinstance(eqn, _jax.JaxprEqn) and eqn.primitive.name == "shard_map" and self.probe.replace:
            return watched(_jax.bind, self)(eqn.primitive, eqn.params, values)
        path = self.here()
        is_near = self.probe.scope(path, self.around) or any(id(x) in self.made for x in values)
        if is_near and subjaxprs.is_inlined(eqn):  # a traced function has what it computes in its place
            body = subjaxprs.bodies(eqn)[0].jaxpr
            return run(body.jaxpr, [*body.consts, *values], self.apply, is_inlined=True)
        values = [self.used(x, path) for x in values]
        return self.outputs(eqn, path, values, self.bound(eqn, path, values))

    def outputs(self, eqn: Any, path: Path, values: Sequence[Any], outputs: list[Any]) -> list[Any]:
        """The outputs of an equation at `path`: selected, or made in a scope that is."""
        if subjaxprs.is_elided(eqn, values, outputs):
            made = self.made_as(values[0])
            self.made.update({id(x): made._replace(value=weakref.ref(x)) for x in outputs} if made else {})
            return outputs
        scope = self.probe.scope(path, self.around)
        if scope and not subjaxprs.is_inlined(eqn):
            for k, value in enumerate(outputs):
                if isinstance(value, jax.Array):
                    if any(value is x for x in values):  # what returns its input makes a value too
                        outputs[k] = value = value.copy()
                    calls, lies = maker(eqn, k, path)
                    name = "/".join((*lies, calls[-1].primitive.name))
                    self.made[id(value)] = Made(weakref.ref(value), scope, name, self.place())
        if self.probe.selects(eqn, path, map(jax.typeof, values), map(jax.typeof, outputs)):
            return self.noted("/".join((*path, eqn.primitive.name)), self.place(), outputs)
        return outputs

    def place(self) -> int:
        """A place in program order."""
        self.places += 1
        return self.places

    def bound(self, eqn: Any, path: Path, values: Sequence[Any]) -> list[Any]:
        """Bind an equation; sub-graphs that hold something selected are entered."""
        kind, bodies = eqn.primitive.name, [body.jaxpr for body in subjaxprs.bodies(eqn)]
        consts = _closed_over(bodies) if self.made or self.outer else ()
        moved = [x for x in consts if self.used(x, path) is not x]
        same = lambda: _jax.bind(eqn.primitive, eqn.params, values)
        is_inlined = subjaxprs.is_inlined(eqn)
        inputs = lambda: [*(self.used(x, path) for x in bodies[0].consts), *values]
        first = lambda: run(bodies[0].jaxpr, inputs(), self.apply, is_inlined)
        if not moved and not any(self.probe.holds(body.jaxpr, path) for body in bodies):
            return same()
        if is_inlined:
            return first()
        if kind in subjaxprs.INLINED | subjaxprs.WITH_DERIVATIVES:
            return self.beside(path, first, same)
        if self.probe.replace is None and not subjaxprs.has_room(eqn):
            return same()
        if kind in subjaxprs.LOOPS and self.probe.replace is None:
            return self.while_loop(eqn, path, values)
        outer = self if moved else None
        new, reads = zip(*(self.entered(body, path, outer=outer) for body in bodies), strict=True)
        outputs = subjaxprs.rebind(eqn.primitive, eqn.params, values, new)
        for k, (opened, read) in enumerate(zip(new, reads, strict=True)):
            own = len(outputs) - sum(n.extras for n in new[k:])
            found = read(outputs[own : own + opened.extras])
            is_branch = kind == "cond" and self.probe.replace is None
            self.add(x._replace(ran=values[0] == k) if is_branch and x.ran is None else x for x in found)
        return outputs[: len(outputs) - sum(n.extras for n in new)]

    def entered(
        self, jaxpr: _jax.ClosedJaxpr, around: Path, is_loop: bool = False, outer: Frame | None = None
    ) -> tuple[subjaxprs.Opened, Callable]:
        """A sub-graph that returns what is found in it too, and how to read that off its extra outputs.

        Args:
          is_loop: whether each value comes with a flag that says that it was computed.
          outer: this level, if the sub-graph closes over what is replaced here: then it is traced at every call.
        """
        inner, context = jaxpr.jaxpr, (around, is_loop, _jax.trace_context())
        memo: dict[Any, Any] = {} if outer else self.probe.memo.setdefault(inner, {})
        if context not in memo:
            extras: list[Any] = []

            def again(*values):
                frame = Frame(self.probe, around, outer=outer)
                outputs = [frame.returned(x) for x in run(inner, values, frame.apply)]
                found = frame.in_order()
                if is_loop:
                    found = [x._replace(ran=jax.numpy.bool_(True)) if x.ran is None else x for x in found]
                flat, tree = tree_flatten([x[1:] for x in found])
                extras.extend(([x.name for x in found], len(flat), tree))
                return [*outputs, *flat]

            avals = [v.aval for v in (*inner.constvars, *inner.invars)]
            names = _jax.names_of(inner)._replace(result_paths=None)
            opened = subjaxprs.opened(_jax.stage_flat(again, avals, names))
            kept = (opened, *extras)
            if any(isinstance(c, jax.core.Tracer) for c in opened.consts):
                memo = {}
            memo[context] = kept
        opened, names, count, tree = memo[context]
        read = lambda flat: [Found(n, *rest) for n, rest in zip(names, tree_unflatten(tree, flat), strict=True)]
        consts = [self.used(c, around) for c in jaxpr.consts]
        return subjaxprs.Opened(opened.jaxpr, [*opened.consts, *consts], count), read

    def add(self, found: Iterable[Found]) -> None:
        """What was found in a sub-graph of the equation that is bound now."""
        place = self.place()
        self.found.extend((place, x) for x in found)

    def while_loop(self, eqn: Any, path: Path, values: Sequence[Any]) -> list[Any]:
        """Bind a while whose body or predicate holds something to see: the last iteration's, and the last test's."""
        cond, body = (b.jaxpr for b in subjaxprs.bodies(eqn))
        opened, read = self.entered(body, path, is_loop=True)
        outputs = subjaxprs.rebind(eqn.primitive, eqn.params, values, [subjaxprs.opened(cond), opened])
        carry = outputs[: len(outputs) - opened.extras]
        self.add(read(outputs[len(carry) :]))
        if self.probe.holds(cond.jaxpr, path) and not cond.effects:
            run(cond.jaxpr, [*cond.consts, *values[: eqn.params["cond_nconsts"]], *carry], self.apply)
        return carry

    def beside(self, path: Path, inside: Callable[[], list], original: Callable[[], list]) -> list[Any]:
        """A function with its own derivative or batching rule: its body, if something is replaced there. Else the original.

        What is to be seen in the body is computed beside it, and nothing is seen in one that has effects.
        """
        before, was_beside = len(self.found), self.is_beside
        self.is_beside = was_beside or self.probe.replace is None
        try:
            outputs = [self.used(x, path) for x in inside()]
        except Effect:
            if was_beside:
                raise
            del self.found[before:]
        finally:
            self.is_beside = was_beside
        return outputs if self.probe.replace and len(self.found) > before else original()

    def living(self, f: Callable, path: Path) -> Callable:
        """A function that JAX calls while it binds what lies at `path`, patched."""

        def alive(*values):
            frame = Frame(self.probe, path, len(_jax.name_stack()))
            outputs = watched(f, frame)(*values)
            returned = [frame.returned(x) for x in outputs]
            self.add(frame.in_order())
            return refilled(outputs, returned)

        return alive


def _closed_over(jaxprs: Sequence[_jax.ClosedJaxpr]) -> Iterator[Any]:
    """The constants of sub-graphs, at any depth."""
    for jaxpr in jaxprs:
        yield from jaxpr.consts
        for eqn in jaxpr.jaxpr.eqns:
            yield from _closed_over([body.jaxpr for body in subjaxprs.bodies(eqn)])


def watched(f: Callable, frame: Frame) -> Callable:
    """`f`, with each equation that it binds going to the frame."""
    return under(lambda parent: Probing(parent, frame), f)


class Probing(Watch):
    """The trace that a tapped or patched function runs under: each equation goes to the frame."""

    __slots__ = ("frame",)

    def __init__(self, parent: _jax.Trace, frame: Frame):
        super().__init__(parent)
        self.frame = frame

    def bind(self, primitive, params, values):
        """As the frame does."""
        return self.frame.apply(Bound(primitive, params, None), values)

    def is_eager(self) -> bool:
        """Whether what is bound is computed at once."""
        trace = self.parent
        while isinstance(trace, Watch):
            trace = trace.parent
        return _jax.is_eager(trace)

    def call(self, process, primitive, functions, values, options):
        """What it holds is watched too; derivative rules are left as they are."""
        frame, (fun, *rules) = self.frame, functions
        path = frame.here()

        def bind(f):
            _jax.forget(fun)
            return process(self.parent, [f, *rules], values)

        with _jax.set_current_trace(self.parent):
            values = [frame.used(x, path) for x in values]
            alive = _jax.transformed(fun, lambda f: watched(f, frame) if rules else frame.living(f, path))
            if rules and not self.is_eager():
                outputs = frame.beside(path, lambda: _jax.called(alive, values), lambda: bind(fun))
            else:
                outputs = bind(alive if rules or frame.probe.replace else fun)
            return refilled(outputs, frame.outputs(Bound(primitive, options, None), path, values, list(outputs)))
