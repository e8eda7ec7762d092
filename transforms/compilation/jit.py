"""`jit`: `jax.jit`, with an account of what was traced and compiled again, and why.

JAX dispatches a call from a C++ cache, and asks Python only where that has no entry. `jit` puts a watch at this place:
a hit costs what it costs in JAX, and a miss is seen with its real arguments, where they lie and how they were passed.
It is explained by its difference from the nearest earlier one.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import CodeType
from typing import Any

import jax

from ..core import _jax
from ..core.errors import RetraceError, location
from ..core.signatures import argument_names
from .retraces import Call, Change, Facts, Retrace, Retraces, explain, listed, times


@_jax.api_boundary
def jit(fun=None, /, *, max_retraces: int | None = None, **options):
    """Compile a function with XLA, as `jax.jit`; its `.retraces` say what was traced and compiled again, and why.

    Args:
      fun: function or Graph.
      max_retraces: how often `fun` may be traced after the first time; None for any number.
      options: those of `jax.jit`: static_argnums, static_argnames, donate_argnums, in_shardings, ...
    Returns:
      What `jax.jit` returns, with an attribute `retraces`: a `Retraces`, replaced by a new one at each miss. It tells
      also of earlier functions that the same code made, as a lambda in a loop, but not of what `lower`, `trace` and
      `eval_shape` trace. Without `fun`, a decorator.
    Raises:
      RetraceError: a call needs one trace too many; raised before any buffer is donated. Also a RuntimeError.

    >>> double = jit(lambda x: 2 * x)
    >>> double(1.5), double(3)
    (Array(3., dtype=float32, weak_type=True), Array(6, dtype=int32, weak_type=True))
    >>> print(*double.retraces[1].changes)
    x  dtype float32 -> int32
    """
    if fun is None:
        return functools.partial(jit, max_retraces=max_retraces, **options)
    if callable(fun):
        weakref.ref(fun)  # the TypeError that jax.jit raises at the first call; its second wrapper of `fun` would crash
    jitted = jax.jit(fun, **options)
    watch = _Watch(fun, _jax.dispatch_of(jitted), max_retraces)
    watched = _jax.with_miss(jitted, watch)
    watched.retraces = Retraces(watch.name)
    watch.owner = weakref.ref(watched)
    return watched


@dataclass
class _History:
    """What became of a function, and of those that the same code made before it."""

    function: Callable[[], Callable | None] = lambda: None
    made: str = "made once"
    entries: list[Retrace] = field(default_factory=list)
    index: dict[int, int] = field(default_factory=dict)  # signature -> entry
    facts: deque[tuple[int, Facts]] = field(default_factory=lambda: deque(maxlen=32))  # by program, newest first

    def explain(self, program: int, facts: Facts, level: str) -> tuple[Change, ...]:
        """The changes from the nearest of the latest calls; where nothing was traced, of those with the same program."""
        same = [old for known, old in self.facts if known == program and level != "trace"]
        return explain(facts, same or [old for _, old in self.facts], level)


_histories: weakref.WeakKeyDictionary[CodeType, dict[tuple, _History]] = weakref.WeakKeyDictionary()
_lock = threading.RLock()


def _history_of(fun: Callable) -> _History:
    """A new history, or that of a function which the same code made, and which is gone."""
    layers = [fun]  # and what it wraps: all that jax.grad returns has one code
    while inner := getattr(layers[-1], "func" if isinstance(layers[-1], functools.partial) else "__wrapped__", None):
        layers.append(inner)
    code, kinds = getattr(layers[-1], "__code__", None), tuple(map(type, layers))
    histories = _histories.setdefault(code, {}) if code else {}
    history = histories.get(kinds)
    if history is None or history.function() is not None:
        history = histories[kinds] = _History()
    else:
        history.made = "made again"
    history.function = weakref.ref(fun)
    return history


class _Watch:
    """What JAX calls where the C++ cache of a jitted function has no entry."""

    owner: weakref.ref
    size = 0  # of that cache
    traced = 0

    def __init__(self, fun: Callable, dispatch: _jax.Dispatch, max_retraces: int | None):
        self.fun, self.max_retraces = fun, max_retraces
        self.seen: set[int] = set()
        self.name, self.miss, self.static_argnums, self.static_argnames = dispatch
        self.signature = _jax.signature_of(fun) or inspect.signature(lambda *args, **kwargs: None)

    def __reduce__(self):
        return functools.partial, (self.miss,)  # pickled, the function is jax.jit's

    @_jax.api_boundary
    def __call__(self, *args, **kwargs):
        if self.max_retraces is not None and self.traced > self.max_retraces:
            self.check(args, kwargs)
        start = time.perf_counter()
        with _measured(self.name) as cost:
            result = self.miss(*args, **kwargs)
        size = _jax.cache_size(self.owner())
        is_known = size == self.size and not _jax.is_tracing()  # JAX asks each time of what has effects
        if cost.trace_s or cost.compile_s or not is_known:
            with _lock:
                self.size = size
                self.record(self.call(args, kwargs), cost, time.perf_counter() - start)
        return result

    @functools.cached_property
    def history(self) -> _History:
        return _history_of(self.fun)

    def call(self, args: tuple, kwargs: dict) -> Call:
        names = argument_names(self.signature, len(args))
        static = {names[i] for i in self.static_argnums if -len(args) <= i < len(args)} | {*self.static_argnames}
        return Call({**dict(zip(names, args, strict=True)), **kwargs}, {*kwargs}, static)

    def facts(self, call: Call) -> Facts:
        line = location(self.fun) or self.name
        function = line if inspect.isfunction(self.fun) else f"{type(self.fun).__name__} of {line}"
        return {("function", function, ""): self.history.made, **call.facts()}

    def check(self, args: tuple, kwargs: dict) -> None:
        try:
            self.signature.bind(*args, **kwargs)
            call = self.call(args, kwargs)
        except (TypeError, OverflowError):
            return  # JAX says what is wrong with the arguments
        if call.program in self.seen:
            return
        changes = self.history.explain(call.program, self.facts(call), "trace")
        raise RetraceError(
            f"{self.name} was traced {times(self.traced)}, and max_retraces={self.max_retraces} allows no more.",
            at=_caller(),
            inputs="\n          ".join(listed(changes)),
            hint=changes[0].hint if changes else None,
        )

    def record(self, call: Call, cost: _Cost, elapsed_s: float) -> None:
        is_new = call.program not in self.seen
        if is_new and call.is_nested:  # of which JAX reports no time
            cost.trace_s = elapsed_s - cost.compile_s
        level = "trace" if is_new or cost.trace_s else "compile" if cost.compile_s else "dispatch"
        if level == "dispatch" and (call.is_nested or call.dispatch in self.seen):
            return
        self.seen |= {call.program, call.dispatch}
        self.traced += level == "trace"
        history, key = self.history, hash((call.dispatch, self.history.made))
        at = history.index.setdefault(key, len(history.entries))
        if at < len(history.entries):
            old = history.entries[at]
            trace_s, compile_s = old.trace_s + cost.trace_s, old.compile_s + cost.compile_s
            history.entries[at] = replace(old, trace_s=trace_s, compile_s=compile_s, count=old.count + 1)
        else:
            facts = self.facts(call)
            changes = history.explain(call.program, facts, level)
            history.entries.append(Retrace(at + 1, level, changes, cost.trace_s, cost.compile_s, _caller()))
            history.facts.appendleft((call.program, facts))
        if owner := self.owner():  # None where a copy of it is called
            owner.retraces = Retraces(self.name, tuple(history.entries))


def _caller() -> str:
    """The user's line that is running, as file:line."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("jax", "jaxlib", "funcgrad"):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


# ------------------------------------------------------------------------------------------------ what JAX reports


@dataclass
class _Cost:
    """Seconds of tracing the function of this name, and of lowering and compiling it."""

    name: str
    trace_s: float = 0.0
    compile_s: float = 0.0


class _Running(threading.local):
    def __init__(self):
        self.costs: list[_Cost] = []  # innermost last


_running = _Running()


@contextlib.contextmanager
def _measured(name: str) -> Iterator[_Cost]:
    """What JAX reports, while this lasts, of tracing and compiling the function of this name in this thread."""
    _running.costs.append(cost := _Cost(name))
    try:
        yield cost
    finally:
        _running.costs.pop()


def _listen(event: str, seconds: float, *, fun_name: str = "", **_: Any) -> None:
    cost = _running.costs[-1] if _running.costs else _Cost("")
    if event == "/jax/core/compile/jaxpr_trace_duration" and fun_name == cost.name:
        cost.trace_s += seconds
    elif event.startswith("/jax/core/compile/") and fun_name == f"jit({cost.name})":
        cost.compile_s += seconds


jax.monitoring.register_event_duration_secs_listener(_listen)  # type: ignore[arg-type]
