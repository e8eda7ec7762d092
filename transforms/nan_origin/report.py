"""`nan_origin`: the equation that made the NaN, or the infinity, that a function returns."""

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
from ..core.pass_trace import driven
from ..core.report import Report, Result, Table
from ..core.scope_paths import BACKWARD
from ..core.signatures import name_of, named_leaves
from .backtracking import ComputedElement, Level, Note, Position, at, backtrack, called_from, first_bad
from .dependencies import is_inexact
from .lane_tracing import traced_details
from .remedies import remedy

MAX_SHOWN = 4  # elements of an operand


@dataclass(frozen=True)
class Elements:
    """Elements of an array that an equation reads or computes.

    Attributes:
      shape, dtype: of the whole array.
      indices, values: of at most four of the elements, those that are not finite first. count: the number of elements.
      name: the path of the argument that the array is; "constant" for a constant that is the origin; None for others.
    """

    shape: tuple[int, ...]
    dtype: Any
    indices: tuple[tuple[int, ...], ...]
    values: tuple[Any, ...]
    count: int
    name: str | None = None

    @classmethod
    def of(cls, value: Any, part: Any, name: str | None) -> Elements:
        """The elements in a part of an array, which is a NumPy index."""
        is_key = jax.dtypes.issubdtype(jax.typeof(value).dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(value) if is_key else value)
        mask = np.zeros(array.shape, bool)
        mask[part] = True
        places = np.argwhere(mask)
        if is_inexact(array):
            places = places[np.argsort(np.isfinite(array[mask]), kind="stable")]
        indices = tuple(tuple(map(int, p)) for p in places[:MAX_SHOWN])
        values = tuple(array[i].item() for i in indices)
        return cls(array.shape, jax.typeof(value).dtype, indices, values, len(places), name)

    def __str__(self) -> str:
        """As "inf at [2, 0], and 7 more of x: f32[4,8]"."""
        kind = f"{_jax.short_dtype(self.dtype)}[{','.join(map(str, self.shape))}]"
        pairs = zip(self.indices, self.values, strict=True)
        shown = ", ".join(_short(v) + (f" at {list(i)}" if i else "") for i, v in pairs) or "nothing"
        more = f", and {self.count - len(self.values)} more" if self.count > len(self.values) else ""
        return f"{shown}{more} of {self.name + ': ' if self.name else ''}{kind}"


@dataclass(frozen=True, repr=False)
class NanOrigin(Result):
    """The origin of an element of a result that is NaN, or infinite.

    Attributes:
      kind: "nan" or "inf", the kind of the origin.
      primitive: the operation that computed it, or that first read it from an argument or a constant; None where none did.
      operands: the elements that the operation read, one entry for each operand. result: the element that it computed.
      line: the user's line, as "model.py:41 (attention)"; in a derivative that of the forward operation.
      phase: "forward", or "backward" for all operations of a derivative.
      derivative_of: the forward operation whose derivative it belongs to; None where that is not known.
      scope: the named scopes around it, joined by slashes.
      iterations: of the loops around it, from the outside in, as (("scan", 3), ("while", 12)). A scan that runs backward
        counts as its slices do, so a step and its step back have the same number.
      lanes: of the `vmap`s around it, from the outside in; None where they are not known.
      argument: the path of the argument that holds it; None if it was computed, or is a constant.
      then: the operation that made NaN of the infinity, on the way to the result; None if none did.
      function, output, output_kind: the function, the element of its result that is not finite, and "nan" or "inf".
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
        """A headline, and a row for each known attribute."""
        derivative = f", in the derivative of {self.derivative_of}" if self.derivative_of else ""
        is_computed = self.primitive and not self.argument
        cause = f"{self.primitive} made" if is_computed else f"{self.argument or 'a constant'} holds"
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
        head = f"{self.function} returned {self.output_kind} at {self.output}: {cause} {self.kind}"
        return Report((head, Table([(label, text) for label, text in rows if text])))

    def __repr__(self) -> str:
        source = f"{self.primitive} at {self.line}" if self.primitive else "a constant"
        where = [self.argument or source, *(f"{loop} {k}" for loop, k in self.iterations)]
        return f"NanOrigin({self.kind}: {', '.join(where)})"


def nan_origin(f: Callable, /, *args: Any, **kwargs: Any) -> NanOrigin | None:
    """The origin of the NaN, or the infinity, that `f(*args, **kwargs)` returns; None if all results are finite.

    The way goes back from the first result that is NaN, else infinite, element by element, to an equation whose operands are
    finite. So infinities that never reach a result, as those of a mask, are not origins. Infinities in arguments and
    constants count as intended, unless an operation makes NaN of them.

    `f` runs once, as in `fg.tap`, with each jitted function as one program. A program is entered only where its result is not
    finite: its operations run again one by one (callbacks and prints too), and one iteration of a loop. If they give finite
    values, since the compiled program rounds in another way, the origin is the call of that program.

    Args:
      f: any function: jitted, a gradient, a `vmap`, a Graph; `jax.`'s or `fg.`'s.
      *args, **kwargs: its arguments; donated arrays stay.
    Returns:
      NanOrigin, whose text says what, where, of which values, and what to write instead; or None. The search keeps the values
      that are not finite, and the operands of the equations that computed them.
    Raises:
      ArgumentError: `f` is not callable; or the call is itself traced, so that there are no values. Also a TypeError.

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
            f"nan_origin of {name_of(f)} is called while JAX traces, and there are no values yet.",
            hint="call it outside of jit, grad and vmap, with the function that they make",
        )
    level = Level()
    with jax.debug_nans(False), jax.debug_infs(False):
        with driven(level):
            out = f(*args, **kwargs)
        leaves = tree_flatten_with_path(out)[0]
        numbers = [(path, x) for path, x in leaves if hasattr(x, "dtype") or isinstance(x, float | complex)]
        bad = [(path, x, index) for path, x in numbers if (index := first_bad(x)) is not None]
        if not bad:
            return None
        path, value, index = min(bad, key=lambda entry: _kind(at(*entry[1:])) != "nan")
        arguments = list(zip(*named_leaves(args, kwargs, _jax.signature_of(f)), strict=True))
        position, computed = backtrack(Position(level, value, index))
        output = f"result{keystr(path)}{list(index) if index else ''}"
        origin = _described(position, computed, arguments, name_of(f), output, _kind(at(value, index)))
        element = computed or position.nan or position.reader
        is_rule = origin.phase == "backward" and origin.derivative_of is None
        traced = traced_details(f, args, kwargs, element, origin.line, is_rule) if element else {}
        return dataclasses.replace(origin, **traced)


# ------------------------------------------------------------------------------------------------ in words


def _described(
    position: Position,
    computed: ComputedElement | None,
    arguments: Sequence[tuple[str, Any]],
    function: str,
    output: str,
    output_kind: str,
) -> NanOrigin:
    """The origin in words.

    Of an argument or a constant, the operation is the one that made NaN of it, or else the one that first read it.
    """
    argument = None if computed else _name(position.value, arguments)
    kind = _kind(at(position.value, position.index))
    names = {id(x): path for path, x in arguments} | ({} if computed else {id(position.value): argument or "constant"})
    named = lambda value, part: Elements.of(value, part, names.get(id(value)))
    element = computed or position.nan or position.reader
    call: dict[str, Any] = dict(argument=argument, function=function, output=output, output_kind=output_kind)
    if element is None:
        result = named(position.value, position.index)
        nothing: dict[str, Any] = dict.fromkeys(("primitive", "line", "derivative_of", "lanes", "then", "remedy"))
        return NanOrigin(
            kind=kind, operands=(), result=result, phase="forward", scope="", iterations=(), **nothing, **call
        )
    note = element.note
    primitive, level = note.eqn.primitive.name, note.level
    path, forward = level.path_of(note.eqn), _forward_of(note)
    operands, result = tuple(named(*x) for x in element.reads()), named(element.value, element.index)
    of = forward.primitive.name if forward else None
    nan = position.nan if computed else None  # the operation that made NaN of the infinity
    return NanOrigin(
        kind=kind if argument else _kind(at(element.value, element.index)),
        primitive=primitive,
        operands=operands,
        result=result,
        line=_line(note),
        phase="backward" if forward or BACKWARD in path else "forward",
        derivative_of=of,
        scope="/".join(name for name in path if name != BACKWARD),
        iterations=level.iterations,
        lanes=None,
        then=f"{nan.note.eqn.primitive.name} made nan of it at {_line(nan.note)}" if nan else None,
        remedy=remedy(primitive, of, operands, result),
        **call,
    )


def _kind(x: Any) -> str:
    return "nan" if np.isnan(x) else "inf"


def _short(x: Any) -> str:
    return f"{x:.6g}" if isinstance(x, float | complex) else str(x)


def _name(value: Any, arguments: Sequence[tuple[str, Any]]) -> str | None:
    """The path of the argument that a value is, or is JAX's copy of (of Python's and NumPy's values)."""
    array = np.asarray(value)

    def is_copied(x):
        is_foreign = isinstance(x, float | complex | np.ndarray) and np.shape(x) == array.shape
        return is_foreign and np.array_equal(np.asarray(x, array.dtype), array, equal_nan=True)

    paths = [path for path, x in arguments if x is value] or [path for path, x in arguments if is_copied(x)]
    return paths[0] if paths else None


def _line(note: Note) -> str | None:
    """The user's line of an equation, or of the call around it: equations of JAX's own functions have no line."""
    line = _jax.line_of(note.eqn)
    return _line(note.level.call) if line is None and note.level.call else line


def _forward_of(note: Note) -> Any:
    """The forward equation whose derivative `note` belongs to; None outside of derivatives, and where it is not known.

    JAX binds the derivative of an operation where it binds, or finds, the operation itself. So it is the first equation of the
    same line with the longest common Python stack, by preference one whose name is in the stack.
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
    highest = 0, False
    for eqn in (e for level in levels for e in _forward(level.equations)):
        if _jax.line_of(eqn) == line:
            pairs = zip(frames, _frames(eqn), strict=False)
            common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            if (score := (common, eqn.primitive.name in functions)) > highest:
                best, highest = eqn, score
    is_same = best is note.eqn or (hasattr(best, "outvars") and getattr(note.eqn, "outvars", None) == best.outvars)
    return None if is_same else best


def _frames(eqn: Any) -> list[tuple[Any, int]]:
    """The Python stack of an equation with JAX's frames, outermost first: code objects and positions in these."""
    traceback = eqn.source_info.traceback
    return list(zip(*traceback.raw_frames(), strict=True))[::-1] if traceback else []


def _forward(eqns: Sequence[Any]) -> Iterator[Any]:
    """The equations outside of backward passes, at any depth, instead of the calls that hold them."""
    for eqn in eqns:
        if not any(getattr(s, "name", None) == BACKWARD for s in _jax.name_stack(eqn)):
            bodies = subjaxprs.bodies(eqn)
            yield from [] if bodies else [eqn]
            for e in (e for body in bodies for e in _forward(body.jaxpr.jaxpr.eqns)):
                yield called_from(e, eqn) if subjaxprs.is_inlined(eqn) else e
