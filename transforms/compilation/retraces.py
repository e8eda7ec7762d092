"""`Retraces`: the traces and compilations of a jitted function, and the change in its arguments that caused each."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path, tree_structure

from ..core import _jax
from ..core.report import Report, Result, Table

# kind of change -> hint, in the order in which changes are listed.
_HINTS = {
    "function": "make the function once, outside the loop that calls it",
    "shape": "pad {where} to one shape, or drop the last, smaller batch",
    "dtype": "cast {where} to {before} before the call",
    "weak type": "pass {where} as an array of its dtype each time, never as a Python number",
    "static": "give {where} fewer values, or pass it as an array",
    "tree": "give {where} the same structure in every call",
    "context": "set {where} once, before the first call",
    "call form": "pass {where} the same way in every call",
    "sharding": "place {where} with jax.device_put before the call",
    "leaf": "pass {where} as a jax.Array in every call",
    "caller": "call it in one place: inside a larger program, or on its own",
}
_SELDOM_TRACED = ("sharding", "leaf", "caller")  # not the reason for a trace if anything else changed
_SHOWN = 4  # changes printed per entry
_LISTED, _ENDS = 20, 5  # entries printed; of more entries, the first and the last 5
_WIDTH = 48  # characters printed of a value


@dataclass(frozen=True)
class Change:
    """One difference between two calls: its kind, the argument, the values before and now."""

    kind: str
    where: str
    before: Any
    now: Any

    def __str__(self):
        before, now = str(self.before), str(self.now)
        start = 0
        if max(len(before), len(now)) > _WIDTH:  # leave out most of the common prefix
            prefix = next((k for k, (b, n) in enumerate(zip(before, now, strict=False)) if b != n), 0)
            start = max(0, prefix - _WIDTH // 4)
        cut = lambda text: "…" * (start > 0) + text[start : start + _WIDTH] + "…" * (len(text) > start + _WIDTH)
        return f"{self.where}  {self.kind} {cut(before)} -> {cut(now)}".strip()

    @property
    def hint(self) -> str:
        """How to avoid the change."""
        return _HINTS[self.kind].format(**vars(self))


@dataclass(frozen=True)
class Retrace:
    """The cache misses of one signature.

    Attributes:
      index: 1 for the first.
      level: "trace"; "compile", if JAX had the trace; or "dispatch", if it had the compiled program too.
      changes: from the nearest earlier call; none for the first.
      trace_s, compile_s: seconds in Python, and in lowering and XLA.
      caller: the user's line of the call, as file:line.
      count: how many calls.
    """

    index: int
    level: str
    changes: tuple[Change, ...]
    trace_s: float
    compile_s: float
    caller: str
    count: int = 1

    def __str__(self):
        number, level, changes, caller = _cells(self)
        return "  ".join((number, level, "; ".join(changes), caller))


@dataclass(frozen=True)
class Retraces(Result, Sequence):
    """The cache misses of a jitted function: a sequence of `Retrace`, one per signature."""

    name: str
    entries: tuple[Retrace, ...] = ()

    def __getitem__(self, index):
        return self.entries[index]

    def __len__(self):
        return len(self.entries)

    @property
    def traced(self) -> int:
        """How often the function was traced."""
        return sum(entry.count for entry in self.entries if entry.level == "trace")

    @property
    def compiled(self) -> int:
        """How often it was compiled as a program of its own."""
        return sum(entry.count for entry in self.entries if entry.compile_s)

    def report(self) -> Report:
        """The totals, and a row for each entry; of more than 20, the first and the last 5."""
        traced = f"traced {times(self.traced)} ({sum(entry.trace_s for entry in self.entries):.2f} s)"
        compiled = f"compiled {times(self.compiled)} ({sum(entry.compile_s for entry in self.entries):.2f} s)"
        head = f"{self.name}: {traced}, {compiled}"
        if len(self) <= _LISTED:
            return Report((head, _table(self.entries)))
        hidden = f"  … {len(self) - 2 * _ENDS} more{_most_varied(self.entries)}"
        return Report((head, _table(self.entries[:_ENDS]), hidden, _table(self.entries[-_ENDS:])))


def _cells(entry: Retrace) -> tuple[str, str, list[str], str]:
    """Number, level, lines of changes and caller."""
    level = entry.level + (f" ×{entry.count}" if entry.count > 1 else "")
    changes = listed(entry.changes) or ["no visible change" if entry.index > 1 else "first call"]
    return f"#{entry.index}", level, changes, os.path.basename(entry.caller)


def _table(entries: Sequence[Retrace]) -> Table:
    rows = []
    for entry in entries:
        number, level, (first, *more), caller = _cells(entry)
        rows += [(number, level, first, caller), *(("", "", line, "") for line in more)]
    return Table(rows)


def _most_varied(entries: Sequence[Retrace]) -> str:
    """The property with the most values in all of these, and how many."""
    values: dict[str, set[str]] = {}
    for change in (change for entry in entries for change in entry.changes):
        values.setdefault(f"{change.where}  {change.kind}".strip(), set()).update((str(change.before), str(change.now)))
    name = max(values, key=lambda name: len(values[name]), default="")
    return f"; {name} took {len(values[name])} values" if name else ""


def times(n: int) -> str:
    """As "once" or "3 times"."""
    return "once" if n == 1 else f"{n} times"


def listed(changes: Sequence[Change]) -> list[str]:
    """One line for each of the first changes."""
    hidden = len(changes) - _SHOWN
    return [*map(str, changes[:_SHOWN]), *([f"and {hidden} more"] if hidden > 0 else [])]


# ------------------------------------------------------------------------------------------------ cache keys

Facts = dict[tuple[str, str, str], Any]  # (kind, argument, path in it) -> value


class Call:
    """The keys of JAX's caches for a call.

    Calls with the same `program` share a trace; calls with the same `dispatch` share an entry of the C++ cache. Both are hashes,
    which keep no arguments alive.
    """

    def __init__(self, arguments: dict[str, Any], keywords: set[str], static: set[str]):
        self.form = {name: "by keyword" if name in keywords else "by position" for name in arguments}
        self.static = {name: value for name, value in arguments.items() if name in static}
        self.dynamic = {name: value for name, value in arguments.items() if name not in static}
        self.context = _jax.trace_context()
        self.is_nested = _jax.is_tracing()
        leaves, tree = jax.tree.flatten(self.dynamic)
        self.types = [_jax.type_of(x) for x in leaves]
        self.places = [_place(x) for x in leaves]
        fixed = tuple((name, type(value), value) for name, value in self.static.items())
        self.program = hash((tree, *self.types, *self.form.items(), fixed, self.context))
        self.dispatch = hash((self.program, self.is_nested, *self.places))

    def facts(self) -> Facts:
        """The parts of the keys. The "tree" of a leaf is its presence, a "container" the tree structure of an argument."""
        context = _jax.named_context(self.context)
        facts: Facts = {("caller", "", ""): "inside another trace" if self.is_nested else "on its own"}
        facts |= {("context", option, ""): value for option, value in context.items()}
        facts |= {("call form", name, ""): how for name, how in self.form.items()}
        facts |= {("static", name, ""): _Text(repr(value), hash(value)) for name, value in self.static.items()}
        trees = {name: tree_structure(value) for name, value in self.dynamic.items()}
        facts |= {("container", name, ""): _Text(str(tree), hash(tree)) for name, tree in trees.items()}
        paths = [path for path, _ in tree_flatten_with_path(self.dynamic)[0]]
        for (name, *path), t, (leaf, sharding) in zip(paths, self.types, self.places, strict=True):
            values = {
                "tree": str(t),
                "shape": getattr(t, "shape", ()),
                "dtype": str(getattr(t, "dtype", t)),
                "weak type": getattr(t, "weak_type", False),
                "sharding": str(sharding or "uncommitted"),
                "leaf": leaf,
            }
            facts |= {(kind, name.key, keystr(tuple(path))): value for kind, value in values.items()}
        return facts


class _Text(NamedTuple):
    """The text and the hash of a value, which do not keep it alive."""

    text: str
    key: int


def _place(x: Any) -> tuple[str, Any]:
    """The kind of array that a leaf is, and the sharding that it is committed to."""
    if isinstance(x, (np.ndarray, np.generic)):
        return "numpy", None
    if isinstance(x, (bool, int, float, complex)):
        return "Python number", None
    if isinstance(x, jax.core.Tracer):
        sharding = getattr(jax.typeof(x), "sharding", None)  # a part of the type, under an explicit mesh
        return "jax.Array", sharding if sharding is not None and not sharding.mesh.empty else None
    return "jax.Array", x.sharding if isinstance(x, jax.Array) and x.committed else None


def explain(facts: Facts, earlier: Iterable[Facts], level: str) -> tuple[Change, ...]:
    """The changes from the earlier call with the fewest of them; among equals the first call."""
    nearest = min((_changes(old, facts) for old in earlier), key=len, default=[])
    reasons = [change for change in nearest if level != "trace" or change.kind not in _SELDOM_TRACED]
    return tuple(reasons or nearest)


def _changes(old: Facts, new: Facts) -> list[Change]:
    changed = {key for key in old.keys() & new.keys() if old[key] != new[key] and key[0] != "tree"}
    moved = {key for key in old.keys() ^ new.keys() if key[0] in ("tree", "static")}
    explained = {("container", name, "") for _, name, _ in moved}
    changes = []
    for key in (changed | moved) - explained:
        kind, name, path = key
        values = (facts.get(key, "absent") for facts in (old, new))
        before, now = (value.text if isinstance(value, _Text) else value for value in values)
        changes.append(Change("tree" if kind == "container" else kind, name + path, before, now))
    return sorted(changes, key=lambda change: ([*_HINTS].index(change.kind), change.where))
