"""A running function under a pass: `driven`, the context, and `PassTrace`, its trace."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax

from . import _jax


@dataclass(slots=True, eq=False)
class Bound:
    """An equation of a running function: a primitive that is being bound.

    Attributes:
      functions: what it calls (a function with derivative rules: itself and these; a shard_map: its body); else empty.
      process: `process(trace, functions, values)` binds it, with such functions.
      returned: the last result of `process`, in JAX's own form.
    """

    primitive: Any
    params: dict[str, Any]
    source_info: Any = None
    functions: Sequence[Any] = ()
    process: Callable | None = None
    returned: Any = None

    def call(self, functions: Sequence[Any], values: Sequence[Any]) -> list[Any]:
        """Bind it with these functions, under the current trace."""
        assert self.process is not None
        for f in self.functions:
            _jax.forget(f)
        with _jax.take_current_trace() as trace:
            self.returned = self.process(trace, functions, values)
        return list(self.returned)


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """The outputs of an equation as it is, under the current trace."""
    functions = functions_of(eqn)
    return eqn.call(functions, values) if functions else _jax.bind(eqn.primitive, eqn.params, values)


def functions_of(eqn: Any) -> Sequence[Any]:
    """The Python functions of an equation of a running function; an equation of a jaxpr has none."""
    return getattr(eqn, "functions", ())


@contextmanager
def driven(p: Any) -> Iterator[None]:
    """A context, or decorator, in which each primitive that is bound goes to the pass `p`."""
    with _jax.take_current_trace() as parent, _jax.set_current_trace(PassTrace(parent, p)):
        yield


def _calling(method: str, count: int) -> Callable:
    """The method of a trace for a primitive with functions: the one that is called, then its derivative rules."""

    def process(self, primitive, *args, **options):
        functions, values, params = args[:count], args[count], args[count + 1 :]
        bound = lambda trace, functions, values: getattr(trace, method)(
            primitive, *functions, values, *params, **options
        )
        return self._process(bound, primitive, functions, values, *params or (options,))

    return process


@functools.cache
def _look_through() -> None:
    _jax.look_through(PassTrace)


class PassTrace(_jax.Trace):
    """The trace of a running function under a pass. It has no tracers: values are those of its parent.

    Attributes:
      parent: the trace that was current, under which the pass computes.
      evaluated: the function that takes the place of the first one of the next call that has functions.
      eqn: that call.
    """

    __slots__ = ("eqn", "evaluated", "p", "parent")

    def __init__(self, parent: _jax.Trace, p: Any, evaluated: Callable | None = None, eqn: Any = None):
        super().__init__()
        _look_through()
        self.parent, self.p, self.evaluated, self.eqn = parent, p, evaluated, eqn
        self.requires_low = parent.requires_low

    def stage_value(self, value):
        """A value as the parent has it."""
        return self.parent.stage_value(value)

    def process_primitive(self, primitive, values, params, /):
        """A primitive is being bound."""
        if self.p.ignores(primitive, params):
            return primitive.bind_with_trace(self.parent, values, tuple(map(jax.typeof, values)), params)
        with _jax.set_current_trace(self.parent):
            outputs = self.p.visit(Bound(primitive, params, _jax.current_source()), values)
        return outputs if primitive.multiple_results else outputs[0]

    def _process(self, process, primitive, functions, values, options):
        """A primitive with functions is being bound: itself, then its derivative rules."""
        if self.eqn is not None:
            return process(self.parent, self._with_evaluated(functions, values), values)
        eqn = Bound(primitive, options, _jax.current_source(), functions, process)
        with _jax.set_current_trace(self.parent):
            outputs = self.p.visit(eqn, values)
        returned, eqn.returned = eqn.returned, None
        return in_form_of(returned, outputs)

    def _with_evaluated(self, functions, values):
        """The functions of an equation of a jaxpr, the first replaced by the evaluation of its body."""
        fun, *rules = functions
        rules = [self.p._function(self.eqn, values, k, f) for k, f in enumerate(rules, 1)]
        evaluated = self.evaluated
        if evaluated is not None and rules:
            fun = _jax.transformed(fun, lambda _: evaluated)
        elif evaluated is not None:  # a shard_map's own function also fits the outputs to its mesh
            fun = _jax.transformed(fun, lambda finish: lambda *xs: finish(*evaluated(*xs)))
        return [fun, *rules]

    process_custom_jvp_call = _calling("process_custom_jvp_call", 2)
    process_custom_vjp_call = _calling("process_custom_vjp_call", 3)
    process_shard_map = _calling("process_shard_map", 1)
    process_call = _calling("process_call", 1)  # JAX 0.10 only


def in_form_of(outputs: Any, values: Sequence[Any]) -> Any:
    """`values` in the form that the outputs of a sub-function have: a list, or a flat tree of JAX's own."""
    return outputs.update(values) if hasattr(outputs, "update") else list(values)


def is_eager() -> bool:
    """Whether equations are computed at once: no trace of JAX's lies below the passes."""
    trace = _jax.current_trace()
    while isinstance(trace, PassTrace):
        trace = trace.parent
    return _jax.is_eager(trace)
