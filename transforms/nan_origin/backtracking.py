"""From an element that is not finite back to its origin.

A program runs under the pass `Level`, which notes each equation whose results are not all finite, with its operands. From an
element of a result `backtrack` goes back, element by element, to the elements of operands that are not finite either, until there
are none, or it reaches an argument or a constant. Only then is an equation with sub-jaxprs entered: its sub-jaxpr runs equation
by equation on the same operands; of a loop, the iteration that computed the element.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np

from ..core import _jax, subjaxprs
from ..core.pass_trace import Bound, bind, functions_of
from ..core.passes import Pass, run
from ..core.scope_paths import Path, joined
from ..while_loops.unrolling import unrolled
from .dependencies import Element, is_inexact, reads
from .iterations import Iterations


class Note(NamedTuple):
    """An equation with results that are not finite, and the level it ran in."""

    eqn: Any
    values: Sequence[Any]
    outputs: Sequence[Any]
    level: Level


@dataclass(frozen=True, eq=False)
class ComputedElement:
    """An element that an equation computed: the one at `index` of its k-th result."""

    note: Note
    k: int
    index: tuple[int, ...]

    @property
    def value(self) -> Any:
        """Its array."""
        return self.note.outputs[self.k]

    def reads(self) -> list[tuple[Any, Any]]:
        """The operands that the equation read for it, and the part of each."""
        eqn, values = self.note.eqn, self.note.values
        read = reads(Element(eqn, values, self.k, np.shape(self.value), self.index))
        is_read = lambda x, part: part is not None and _jax.is_array(jax.typeof(x))
        return [(x, part) for x, part in zip(values, read, strict=True) if is_read(x, part)]


@dataclass(frozen=True, eq=False)
class Position:
    """An element of a value that is not finite, on the way back from a result.

    Attributes:
      reader: the element that was computed from it. nan: the first element that is NaN, where infinities led to it.
    """

    level: Level
    value: Any
    index: tuple[int, ...]
    reader: ComputedElement | None = None
    nan: ComputedElement | None = None


_numbers = itertools.count()


class Level(Pass):
    """One run of a function or of a sub-jaxpr, which notes its equations with results that are not finite.

    Attributes:
      number: unique, also after this level is gone.
      call: the note of the equation whose sub-jaxpr this is.
      iterations: those of the loops around it. loop: what a scan in it is called.
      noted: by the identity of a value, the equation that computed it, and which of its results that is.
      entered: by the identity of a note, the run of its sub-jaxpr.
    """

    def __init__(self, call: Note | None = None, iterations: tuple[tuple[str, int], ...] = (), loop: str | None = None):
        self.number = next(_numbers)
        self.call, self.iterations, self.loop = call, iterations, loop
        self.around: Path = call.level.path_of(call.eqn) if call else ()
        self.base = 0 if call else len(_jax.name_stack())
        self.equations: list[Any] = []
        self.noted: dict[int, tuple[Note, int]] = {}
        self.entered: dict[int, Any] = {}
        self.inputs: list[Any] = []
        self.outside: Callable[[int, tuple[int, ...]], Position] | None = None

    def path_of(self, eqn: Any) -> Path:
        """The scopes that an equation of this level lies in."""
        return joined(self.around, _jax.scopes(_jax.name_stack(eqn)[self.base :]))

    def enters(self, eqn: Any, values: Sequence[Any]) -> bool:
        """A function with derivative rules that is called now; the rest runs whole, and is entered on the way back."""
        return len(functions_of(eqn)) > 1

    def inlines(self, eqn: Any, values: Sequence[Any]) -> bool:
        """Its equations belong to this level."""
        return True

    def body(self, eqn: Any, k: int) -> Level:
        """This level."""
        return self

    def equation(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        """The outputs of an equation, which is noted if they are not finite."""
        bound = eqn
        if any(eqn.params.get("donated_invars", ())):  # operands may be needed again
            bound = Bound(eqn.primitive, {**eqn.params, "donated_invars": (False,) * len(values)})
        outputs = bind(bound, values)
        if self.call and subjaxprs.is_inlined(self.call.eqn):
            eqn = called_from(eqn, self.call.eqn)
        if functions_of(eqn):  # they hold what they close over
            eqn = Bound(eqn.primitive, eqn.params, eqn.source_info)
        self.equations.append(eqn)
        if not all(map(is_finite, outputs)):
            note = Note(eqn, values, list(outputs), self)
            operands = set(map(id, values))
            self.noted.update((id(x), (note, k)) for k, x in enumerate(outputs) if id(x) not in operands)
        return outputs

    def ran(self, jaxpr: Any, values: Sequence[Any]) -> list[Any]:
        """The outputs of a sub-jaxpr for these values of its inputs."""
        self.inputs = list(values)
        return run(self, jaxpr, values)

    def entry(self, value: Any, index: tuple[int, ...]) -> Position | None:
        """The position outside of an input of this level; None for constants, literals, and at the outermost level."""
        place = next((k for k, x in enumerate(self.inputs) if x is value), None)
        return self.outside(place, index) if self.outside and place is not None else None


def called_from(eqn: Any, call: Any) -> Any:
    """An equation of a call that JAX inlines, with the line of the call; its own line is that of the first caller."""
    return eqn.replace(source_info=eqn.source_info.replace(traceback=call.source_info.traceback))


# ------------------------------------------------------------------------------------------------ the way back


def backtrack(start: Position) -> tuple[Position, ComputedElement | None]:
    """The end of the way back: an element that an equation computed from finite ones, else one of an argument or a constant."""
    pending, seen, ends = [start], set(), []
    while pending:
        position = pending.pop()
        key = position.level.number, id(position.value), position.index
        if key in seen:
            continue
        seen.add(key)
        note, k = position.level.noted.get(id(position.value), (None, 0))
        if note is None:
            entry = position.level.entry(position.value, position.index)
            if entry is None:
                ends.append(position)
                if np.isnan(at(position.value, position.index)):  # never intended
                    return position, None
            else:
                pending.append(replace(entry, reader=position.reader, nan=position.nan))
            continue
        inside = entered(note, k, position.index)
        if inside is not None and not np.isfinite(at(inside.value, inside.index)):
            pending.append(replace(inside, reader=position.reader, nan=position.nan))
            continue
        element = ComputedElement(note, k, position.index)
        bad = [(x, index) for x, part in element.reads() if (index := first_bad(x, part)) is not None]
        if not bad:
            return position, element
        nans = [(x, index) for x, index in bad if np.isnan(at(x, index))]
        nan = position.nan or (element if np.isnan(at(position.value, position.index)) and not nans else None)
        pending += [Position(note.level, x, index, element, nan) for x, index in reversed(nans or bad)]
    return ends[0], None


def entered(note: Note, k: int, index: tuple[int, ...]) -> Position | None:
    """The position of the element in the sub-jaxpr that computes it; None for operations and other equations without entry."""
    eqn, values = note.eqn, note.values
    name, bodies = eqn.primitive.name, [body.jaxpr for body in subjaxprs.bodies(eqn)]
    if name in subjaxprs.CALLS and bodies:
        return _inside(note, bodies[0], values, k, index)
    if name == "cond":
        return _inside(note, bodies[min(max(int(values[0]), 0), len(bodies) - 1)], values[1:], k, index)
    if name in subjaxprs.SWEEPS:
        return _inside(note, unrolled(eqn, values), values, k, index, "while")
    if name == "scan" or name in subjaxprs.LOOPS:
        return _in_loop(note, k, index)
    return None


def _inside(
    note: Note, jaxpr: Any, values: Sequence[Any], k: int, index: tuple[int, ...], loop: str | None = None
) -> Position | None:
    """The position in the run of a call or a branch."""
    outside_level = note.level
    if id(note) not in outside_level.entered:
        level = Level(note, outside_level.iterations, loop or outside_level.loop)
        outside_level.entered[id(note)] = level, level.ran(jaxpr, values)
        level.outside = lambda i, index: Position(outside_level, values[i], index)
    level, outputs = outside_level.entered[id(note)]
    return Position(level, outputs[k], index) if k < len(outputs) else None


def _in_loop(note: Note, k: int, index: tuple[int, ...]) -> Position:
    """The position in the iteration that computed the element, or before the loop, if it is part of an initial state."""
    if id(note) not in note.level.entered:
        note.level.entered[id(note)] = Iterations(note.eqn, note.values)
    loop = note.level.entered[id(note)]
    outside_level, label = note.level, note.level.loop or note.eqn.primitive.name.replace("loop", "while")

    def of_state(j, index, stop):
        """The element of the j-th state before iteration `stop`."""
        since = loop.since(j, index, stop)
        return Position(outside_level, loop.states[j], index) if since < 0 else at_step(since, j, index)

    def at_step(step, k, index):
        level = Level(note, (*outside_level.iterations, (label, loop.position(step))))
        inputs = loop.inputs(step)
        outputs = level.ran(loop.body, inputs)

        def outside(i, index):
            i -= len(loop.consts)
            if i < 0:
                return Position(outside_level, loop.consts[i], index)
            if i < len(loop.states):
                return of_state(i, index, step)
            return Position(outside_level, loop.slices[i - len(loop.states)], (loop.position(step), *index))

        level.outside = outside
        return Position(level, outputs[k], index)

    if k < len(loop.states):
        return of_state(k, index, loop.length)
    return at_step(loop.position(index[0]), k, index[1:])


# ------------------------------------------------------------------------------------------------ elements


def is_finite(value: Any) -> bool:
    """Whether all elements are finite; integers, keys and references are."""
    if not is_inexact(value) or not np.size(value):
        return True
    if isinstance(value, jax.Array) and any(device.platform != "cpu" for device in value.devices()):
        return bool(_all_finite(value))
    return bool(np.isfinite(np.asarray(value)).all())


_all_finite = jax.jit(lambda x: jax.numpy.isfinite(x).all())


def at(value: Any, index: Any) -> Any:
    """A part of a value, as a NumPy array."""
    return np.asarray(value)[index]


def first_bad(value: Any, part: Any = (Ellipsis,)) -> tuple[int, ...] | None:
    """The index of the first NaN in a part of a value, or else of the first infinity; None where all is finite."""
    if not is_inexact(value):
        return None
    value = np.asarray(value)
    inside = np.zeros(value.shape, bool)
    inside[part] = True
    for is_bad in (np.isnan, np.isinf):
        places = np.argwhere(inside & is_bad(value))
        if len(places):
            return tuple(map(int, places[0]))
    return None
