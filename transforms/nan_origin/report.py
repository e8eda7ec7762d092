"""`nan_origin`: which equation first made the NaN, or the infinity, that a function returns."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from ..core import _jax, subjaxprs
from ..core.errors import ArgumentError
from ..core.passes import driven
from ..core.report import Report, Result, Table
from ..core.scope_paths import BACKWARD
from ..core.signatures import name_of, named_leaves
from .backtracking import Level, Made, Note, Spot, at, called_from, first_bad, walk
from .dependencies import is_inexact
from .lane_tracing import told_by_tracing
from .remedies import remedy

SHOWN = 4  # elements of an operand


@dataclass(frozen=True)
class Elements:
    """Elements of an array that took part.

    Attributes:
      shape, dtype: of the whole array.
      indices, values: the elements, those that are not finite first, and at most four of them. count: how many took part.
      name: the path of the argument that the array is; "constant" where a constant is the fault; None for others.
    """

    shape: tuple[int, ...]
    dtype: Any
    indices: tuple[tuple[int, ...], ...]
    values: tuple[Any, ...]
    count: int
    name: str | None = None

    @classmethod
    def of(cls, value: Any, part: Any, name: str | None) -> Elements:
        """The elements in a part of an array, given by an index of NumPy's."""
        is_key = jax.dtypes.issubdtype(jax.typeof(value).dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(value) if is_key else value)
        inside = np.zeros(array.shape, bool)
        inside[part] = True
        places = np.argwhere(inside)
        if is_inexact(array):
            places = places[np.argsort(np.isfinite(array[inside]), kind="stable")]
        indices = tuple(tuple(map(int, p)) for p in places[:SHOWN])
        return cls(
            array.shape, jax.typeof(value).dtype, indices, tuple(array[i].item() for i in indices), len(places), name
        )

    def __str__(self) -> str:
        """As "inf at [2, 0], and 7 more of x: f32[4,8]"."""
        kind = f"{_jax.short_dtype(self.dtype)}[{','.join(map(str, self.shape))}]"
        pairs = zip(self.indices, self.values, strict=True)
        shown = ", ".join(_short(v) + (f" at {list(i)}" if i else "") for i, v in pairs) or "nothing"
        more = f", and {self.count - len(self.values)} more" if self.count > len(self.values) else ""
        return f"{shown}{more} of {self.name + ': ' if self.name else ''}{kind}"


@dataclass(frozen=True, repr=False)
class NanOrigin(Result):
    """What first made an element of a result NaN, or infinite.

    Attributes:
      kind: "nan" or "inf", what was made.
      primitive: the operation that made it, or that first computed with what came in so; None where none did.
      operands: what it computed from, one for each operand. result: the element that it made.
      line: the user's line, as "model.py:41 (attention)"; in a derivative that of the forward operation.
      phase: "forward", or "backward" for all that belongs to a derivative.
      derivative_of: the forward operation that it belongs to the derivative of; None where that is not known.
      scope: the named scopes around it, joined by slashes.
      iterations: of the loops around it, from the outside in, as (("scan", 3), ("while", 12)). In a scan that runs backward
        they count as its slices do, so the step back of a step has its number.
      lanes: of the `vmap`s around it, from the outside in; None where they are not known.
      argument: the path of the argument that came in so; None if it was computed, or is a constant.
      then: where NaN was made of the infinity, on the way to the result; None if it was not.
      function, output, output_kind: what was called, which element of its result is not finite, "nan" or "inf".
      remedy: what to write instead, where that is well known.
    """

    kind: str
    primitive: str | None
    operands: tuple[Elements, ...]
    result: Elements
    line: str | None
    phase: str
    derivative_of: str | None
    scope: str
    iterations: tuple[tuple[str, int], ...]
    lanes: tuple[int, ...] | None
    argument: str | None
    then: str | None
    function: str
    output: str
    output_kind: str
    remedy: str | None

    @property
    def index(self) -> tuple[int, ...]:
        """Of the element in the operation's result."""
        return self.result.indices[0]

    def report(self) -> Report:
        """A headline, and a row for each thing that is known."""
        derivative = f", in the derivative of {self.derivative_of}" if self.derivative_of else ""
        is_held = self.argument or not self.primitive
        cause = (
            f"{self.argument or 'a constant'} holds {self.kind}" if is_held else f"{self.primitive} made {self.kind}"
        )
        rows = [
            ("at", f"{self.line or 'an unknown line'}{derivative}" if self.primitive else None),
            ("pass", self.phase if self.primitive else None),
            ("scope", self.scope),
            ("iteration", ", ".join(f"{loop} {k}" for loop, k in self.iterations)),
            ("lane", ", ".join(map(str, self.lanes or ()))),
            *(("operand", str(x)) for x in self.operands),
            ("result", str(self.result)),
            ("then", self.then),
            ("try", self.remedy),
        ]
        head = f"{self.function} returned {self.output_kind} at {self.output}: {cause}"
        return Report((head, Table([(label, text) for label, text in rows if text])))

    def __repr__(self) -> str:
        made = f"{self.primitive} at {self.line}" if self.primitive else "a constant"
        where = [self.argument or made, *(f"{loop} {k}" for loop, k in self.iterations)]
        return f"NanOrigin({self.kind}: {', '.join(where)})"


def nan_origin(f: Callable, /, *args: Any, **kwargs: Any) -> NanOrigin | None:
    """What first made the NaN, or the infinity, that `f(*args, **kwargs)` returns; None if all that it returns is finite.

    The way goes back from the first result that is NaN, else infinite, element by element, to an equation whose operands are
    finite. So infinities that never reach a result, as those of a mask, are no faults. Infinities that `f` was given, or
    holds as constants, count as meant until NaN is made of them.

    `f` runs once as it is, as in `fg.tap`; what is jitted in it as one program, which is entered only where it made what is
    not finite. Then its operations run again one by one (callbacks and prints too), and of a loop one iteration. Where the
    compiled program alone made it, by rounding in another way, the call of that program is named.

    Args:
      f: any function: jitted, a gradient, a `vmap`, a Graph; `jax.`'s or `fg.`'s.
      *args, **kwargs: what it is called with; donated arrays stay.
    Returns:
      NanOrigin, whose text says what, where, of which values, and what to write instead; or None. Kept while it is looked
      for are the values that are not finite, and the operands of what made them.
    Raises:
      ArgumentError: `f` cannot be called; or the call is itself traced, so that there are no values. Also a TypeError.

    >>> import jax, jax.numpy as jnp
    >>> safe = lambda x: jnp.where(x > 0, jnp.sqrt(x), 0.0).sum()
    >>> origin = nan_origin(jax.grad(safe), jnp.array([4.0, 0.0]))
    >>> origin.primitive, origin.derivative_of, origin.index
    ('div', 'sqrt', (1,))
    >>> nan_origin(jax.grad(safe), jnp.array([4.0, 1.0]))
    """
    if not callable(f):
        raise ArgumentError(f"nan_origin takes a function, and got {type(f).__name__}.", inputs=f"{f!r:.60}")
    if _jax.is_tracing():
        raise ArgumentError(
            f"nan_origin of {name_of(f)} is called while something is traced, and there are no values yet.",
            hint="call it outside of jit, grad and vmap, with the function that they make",
        )
    with jax.debug_nans(False), jax.debug_infs(False):
        return _found(f, args, kwargs)


def _found(f: Callable, args: tuple, kwargs: dict) -> NanOrigin | None:
    """The origin, by a run of `f` and the way back from what it returned."""
    level = Level()
    with driven(level):
        out = f(*args, **kwargs)
    leaves = tree_flatten_with_path(out)[0]
    numbers = [(path, x) for path, x in leaves if hasattr(x, "dtype") or isinstance(x, float | complex)]
    bad = [(path, x, index) for path, x in numbers if (index := first_bad(x)) is not None]
    if not bad:
        return None
    path, value, index = min(bad, key=lambda found: _kind(at(*found[1:])) != "nan")
    arguments = list(zip(*named_leaves(args, kwargs, _jax.signature_of(f)), strict=True))
    spot, made = walk(Spot(level, value, index))
    output = f"result{keystr(path)}{list(index) if index else ''}"
    origin = _described(spot, made, arguments, name_of(f), output, _kind(at(value, index)))
    fault = made or spot.nan or spot.reader
    is_rule = origin.phase == "backward" and origin.derivative_of is None
    told = told_by_tracing(f, args, kwargs, fault, origin.line, is_rule) if fault else {}
    return dataclasses.replace(origin, **told)


# ------------------------------------------------------------------------------------------------ in words


def _described(
    spot: Spot, made: Made | None, arguments: Sequence[tuple[str, Any]], function: str, output: str, output_kind: str
) -> NanOrigin:
    """The origin in words. What came in so is the fault of what made NaN of it, or else of what read it first."""
    argument = None if made else _name(spot.value, arguments)
    kind = _kind(at(spot.value, spot.index))
    names = {id(x): path for path, x in arguments} | ({} if made else {id(spot.value): argument or "constant"})
    named = lambda value, part: Elements.of(value, part, names.get(id(value)))
    fault = made or spot.nan or spot.reader
    ends = dict(function=function, output=output, output_kind=output_kind)
    if fault is None:
        result = named(spot.value, spot.index)
        return NanOrigin(
            kind, None, (), result, None, "forward", None, "", (), None, argument, None, remedy=None, **ends
        )
    note = fault.note
    eqn, level = note.eqn, note.level
    path, forward = level.path_of(eqn), _forward_of(note)
    operands, result = tuple(named(*x) for x in fault.reads()), named(fault.value, fault.index)
    of = forward.primitive.name if forward else None
    nan = spot.nan if made else None  # what made NaN of the infinity
    return NanOrigin(
        kind=kind if argument else _kind(at(fault.value, fault.index)),
        primitive=eqn.primitive.name,
        operands=operands,
        result=result,
        line=_line(note),
        phase="backward" if forward or BACKWARD in path else "forward",
        derivative_of=of,
        scope="/".join(name for name in path if name != BACKWARD),
        iterations=level.iterations,
        lanes=None,
        argument=argument,
        then=f"{nan.note.eqn.primitive.name} made nan of it at {_line(nan.note)}" if nan else None,
        remedy=remedy(eqn.primitive.name, of, operands, result),
        **ends,
    )


def _kind(x: Any) -> str:
    return "nan" if np.isnan(x) else "inf"


def _short(x: Any) -> str:
    return f"{x:.6g}" if isinstance(x, float | complex) else str(x)


def _name(value: Any, arguments: Sequence[tuple[str, Any]]) -> str | None:
    """The path of the argument that a value is; or is a copy of, as JAX makes them of Python's and NumPy's values."""

    array = np.asarray(value)
    others = [
        (p, x) for p, x in arguments if isinstance(x, float | complex | np.ndarray) and np.shape(x) == array.shape
    ]
    same = [path for path, x in arguments if x is value]
    same += [path for path, x in others if np.array_equal(np.asarray(x, array.dtype), array, equal_nan=True)]
    return same[0] if same else None


def _line(note: Note) -> str | None:
    """The user's line of an equation; what JAX's own functions hold has none but that of the call."""
    line = _jax.line_of(note.eqn)
    return _line(note.level.call) if line is None and note.level.call else line


def _forward_of(note: Note) -> Any:
    """The equation that `note` is a part of the derivative of; None for what belongs to no derivative, and where it is not known.

    JAX binds the derivative of an operation where it binds, or finds, the operation itself. So of all equations of the same
    line it is the first that has the most of their Python stack in common, by preference one that is named in it.
    """
    levels = [note.level]
    while levels[0].call:
        levels.insert(0, levels[0].call.level)
    stacks = [_jax.name_stack(x.eqn) for x in (note, *(level.call for level in levels if level.call))]
    if not any(getattr(s, "name", None) in ("jvp", BACKWARD) for stack in stacks for s in stack):
        return None
    line, frames = _jax.line_of(note.eqn), _frames(note.eqn)
    functions = {code.co_name for code, _ in frames}
    best: Any = None
    most = 0, False
    for eqn in (e for level in levels for e in _forward(level.equations)):
        if _jax.line_of(eqn) == line:
            pairs = zip(frames, _frames(eqn), strict=False)
            common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            if (found := (common, eqn.primitive.name in functions)) > most:
                best, most = eqn, found
    is_same = best is note.eqn or (hasattr(best, "outvars") and getattr(note.eqn, "outvars", None) == best.outvars)
    return None if is_same else best


def _frames(eqn: Any) -> list[tuple[Any, int]]:
    """The Python stack that made an equation, JAX's frames among it, outermost first: code objects, and where in these."""
    found = eqn.source_info.traceback
    return list(zip(*found.raw_frames(), strict=True))[::-1] if found else []


def _forward(eqns: Sequence[Any]) -> Iterator[Any]:
    """Those that no backward pass holds, at any depth; of what only calls, what it calls."""
    for eqn in eqns:
        if not any(getattr(s, "name", None) == BACKWARD for s in _jax.name_stack(eqn)):
            bodies = subjaxprs.bodies(eqn)
            yield from [] if bodies else [eqn]
            for inner in (e for body in bodies for e in _forward(body.jaxpr.jaxpr.eqns)):
                yield called_from(inner, eqn) if subjaxprs.is_inlined(eqn) else inner
