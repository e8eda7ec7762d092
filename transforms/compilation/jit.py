"""`jit`: `jax.jit`, with a list of its retraces and their reasons.

JAX dispatches a call from a C++ cache, and calls Python only on a cache miss. `jit` replaces this Python function: a hit costs
what it costs in JAX, and a miss is recorded with its arguments, their placement and the form of the call. Its reason is the
difference from the nearest earlier miss.
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
from contextvars import ContextVar
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
    """Compile a function with XLA, as `jax.jit`; its `.retraces` list its traces and compilations, with their reasons.

    Args:
      fun: function or Graph.
      max_retraces: how often `fun` may be traced after the first time; None for any number.
      options: those of `jax.jit`: static_argnums, static_argnames, donate_argnums, in_shardings, ...
    Returns:
      What `jax.jit` returns, with an attribute `retraces`: a `Retraces`, replaced by a new one at each miss. It includes
      earlier functions of the same code, as a lambda in a loop, but no traces by `lower`, `trace` and `eval_shape`. Without
      `fun`, a decorator.
    Raises:
      RetraceError: a call exceeds `max_retraces`; raised before any buffer is donated. Also a RuntimeError.

    >>> double = jit(lambda x: 2 * x)
    >>> double(1.5), double(3)
    (Array(3., dtype=float32, weak_type=True), Array(6, dtype=int32, weak_type=True))
    >>> print(*double.retraces[1].changes)
    x  dtype float32 -> int32
    """
    if fun is None:
        return functools.partial(jit, max_retraces=max_retraces, **options)
    if callable(fun):
        weakref.ref(fun)  # the TypeError that jax.jit raises at the first call; a second wrapper of `fun` would crash
    jitted = jax.jit(fun, **options)
    recorder = _MissRecorder(fun, _jax.dispatch_of(jitted), max_retraces)
    recorded = _jax.with_miss(jitted, recorder)
    recorded.retraces = Retraces(recorder.name)
    recorder.owner = weakref.ref(recorded)
    return recorded


@dataclass
class _History:
    """The misses of a function, and of the functions of the same code before it.

    Attributes:
      function: a weak reference to the latest function.
      origin: the fact that tells the first function of the code from later ones.
      entries: signature -> its misses.
      facts: (program, facts) of the latest misses, newest first.
    """

    function: Callable[[], Callable | None] = lambda: None
    origin: str = "made once"
    entries: dict[int, Retrace] = field(default_factory=dict)
    facts: deque[tuple[int, Facts]] = field(default_factory=lambda: deque(maxlen=32))

    def explain(self, program: int, facts: Facts, level: str) -> tuple[Change, ...]:
        """The changes from the nearest of the latest misses; of those with the same program, where nothing was traced."""
        candidates = [old for old_program, old in self.facts if old_program == program and level != "trace"]
        return explain(facts, candidates or [old for _, old in self.facts], level)


_histories: weakref.WeakKeyDictionary[CodeType, dict[tuple, _History]] = weakref.WeakKeyDictionary()
_lock = threading.RLock()


def _history_of(fun: Callable) -> _History:
    """The history of a function of the same code that was deleted; otherwise a new one."""
    layers = [fun]  # with the functions that it wraps: all results of jax.grad have one code
    while wrapped := getattr(layers[-1], "func" if isinstance(layers[-1], functools.partial) else "__wrapped__", None):
        layers.append(wrapped)
    code, kinds = getattr(layers[-1], "__code__", None), tuple(map(type, layers))
    histories = _histories.setdefault(code, {}) if code else {}
    history = histories.get(kinds)
    if history is None or history.function() is not None:
        history = histories[kinds] = _History()
    else:
        history.origin = "made again"
    history.function = weakref.ref(fun)
    return history


class _MissRecorder:
    """The function that JAX calls on a miss of the C++ cache of a jitted function."""

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
        with _timed(self.name) as timing:
            result = self.miss(*args, **kwargs)
        size = _jax.cache_size(self.owner())
        is_cached = size == self.size and not _jax.is_tracing()  # programs with effects miss at every call
        if timing.trace_s or timing.compile_s or not is_cached:
            with _lock:
                self.size = size
                self.record(self.call(args, kwargs), timing, time.perf_counter() - start)
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
        return {("function", function, ""): self.history.origin, **call.facts()}

    def check(self, args: tuple, kwargs: dict) -> None:
        """Raise if a call needs another trace."""
        try:
            self.signature.bind(*args, **kwargs)
            call = self.call(args, kwargs)
        except (TypeError, OverflowError):
            return  # JAX raises the error
        if call.program in self.seen:
            return
        changes = self.history.explain(call.program, self.facts(call), "trace")
        raise RetraceError(
            f"{self.name} was traced {times(self.traced)}, and max_retraces={self.max_retraces} allows no more.",
            at=_caller(),
            inputs="\n          ".join(listed(changes)),
            hint=changes[0].hint if changes else None,
        )

    def record(self, call: Call, timing: _Timing, elapsed_s: float) -> None:
        """Add a miss to the history: as an entry, or to the entry of its signature."""
        is_new = call.program not in self.seen
        if is_new and call.is_nested:  # JAX reports no time of nested traces
            timing.trace_s = elapsed_s - timing.compile_s
        level = "trace" if is_new or timing.trace_s else "compile" if timing.compile_s else "dispatch"
        if level == "dispatch" and (call.is_nested or call.dispatch in self.seen):
            return
        self.seen |= {call.program, call.dispatch}
        self.traced += level == "trace"
        history, signature = self.history, hash((call.dispatch, self.history.origin))
        entry = history.entries.get(signature)
        if entry is None:
            facts = self.facts(call)
            changes = history.explain(call.program, facts, level)
            history.facts.appendleft((call.program, facts))
            entry = Retrace(len(history.entries) + 1, level, changes, 0.0, 0.0, _caller(), 0)
        trace_s, compile_s = entry.trace_s + timing.trace_s, entry.compile_s + timing.compile_s
        history.entries[signature] = replace(entry, trace_s=trace_s, compile_s=compile_s, count=entry.count + 1)
        if owner := self.owner():  # None if a copy is called
            owner.retraces = Retraces(self.name, tuple(history.entries.values()))


def _caller() -> str:
    """The user's line that is running, as file:line."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("jax", "jaxlib", "funcgrad"):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


# ------------------------------------------------------------------------------------------------ JAX's own timings


@dataclass
class _Timing:
    """Seconds of tracing the function of this name, and of lowering and compiling it."""

    name: str
    trace_s: float = 0.0
    compile_s: float = 0.0


_timing: ContextVar[_Timing] = ContextVar("timing")  # of the innermost call in this thread


@contextlib.contextmanager
def _timed(name: str) -> Iterator[_Timing]:
    """The timings that JAX reports inside of the context of the function of this name, in this thread."""
    token = _timing.set(timing := _Timing(name))
    try:
        yield timing
    finally:
        _timing.reset(token)


def _listen(event: str, seconds: float, *, fun_name: str = "", **_: Any) -> None:
    timing = _timing.get(None)
    if timing and event == "/jax/core/compile/jaxpr_trace_duration" and fun_name == timing.name:
        timing.trace_s += seconds
    elif timing and event.startswith("/jax/core/compile/") and fun_name == f"jit({timing.name})":
        timing.compile_s += seconds


jax.monitoring.register_event_duration_secs_listener(_listen)  # type: ignore[arg-type]
