"""`tape`: the eager graph, recorded as it runs.

While a tape is open, what is computed goes through a `Trace` of ours that computes it at once and keeps it: values stay plain
arrays, so Python branches, loops, `float(x)` and NumPy see what they would see without. What is jitted is run operation by
operation.

This is the Wengert list of define-by-run systems. Source: R. E. Wengert, A simple automatic derivative evaluation program,
1964, doi:10.1145/355586.364791.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.tree_util import keystr, tree_flatten, tree_flatten_with_path, tree_leaves, tree_unflatten

from ..transforms.core import _jax, subjaxprs
from ..transforms.core.errors import ArgumentError, NotScalarError
from ..transforms.core.graph import Graph, trace
from ..transforms.core.pass_trace import Bound, bind, driven, functions_of
from ..transforms.core.passes import Pass
from ..transforms.core.report import Report, Result, Table
from .pullbacks import Operation, is_float, pulled_back, varying


class Node(NamedTuple):
    """An operation that ran.

    Attributes:
      index: its place on the tape.
      primitive, params: the operation; control flow of `jax.lax` is one, and so is a function with its own derivative.
      inputs, outputs: its values: arrays, and inputs that are Python numbers.
      parents: for each input, which node made it, as (index, output); None for what was there before, and for numbers.
      elapsed_s: wall time until its outputs were there, in seconds.
      sources: tracebacks and scopes, as equations have them: its own, then those of the calls around it.
      again: computes the outputs, a list, from values for the inputs, under any transform.
    """

    index: int  # type: ignore[assignment]
    primitive: Any
    params: dict[str, Any]
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    parents: tuple[tuple[int, int] | None, ...]
    elapsed_s: float
    sources: tuple[Any, ...]
    again: Callable[..., list[Any]]

    @property
    def scope(self) -> str:
        """The named scopes around it, joined by slashes; '' at the top."""
        return "/".join(_jax.scopes(self.sources[0].name_stack.stack))

    @property
    def line(self) -> str | None:
        """The user's line that ran it, as "file.py:41 (function)"."""
        lines = (_jax.line_of(Bound(self.primitive, self.params, source)) for source in self.sources)
        return next(filter(None, lines), None)  # what jax.numpy jits has none of its own

    def __str__(self) -> str:
        given = " ".join(
            f"{jax.typeof(x).str_short(short_dtypes=True)}" if parent is None else _name(*parent)
            for x, parent in zip(self.inputs, self.parents, strict=True)
        )
        made = ", ".join(
            f"{_name(self.index, k)}:{jax.typeof(x).str_short(short_dtypes=True)}" for k, x in enumerate(self.outputs)
        )
        return f"{made or f'%{self.index}'} = {self.primitive} {given}"


class Tape(Result):
    """What ran while it was open: its nodes, in the order in which they ran.

    It keeps every value that it saw.
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.makers: dict[int, tuple[int, int]] = {}  # by the identity of a value, which some node keeps alive

    def record(self, eqn: Any, values: Sequence[Any], run: Callable[..., list[Any]], sources: tuple) -> list[Any]:
        """Run an operation and keep it; its outputs."""
        start_s = time.perf_counter()
        outputs = run(*values)
        for x in outputs:
            if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
                x.block_until_ready()
        elapsed_s = time.perf_counter() - start_s
        index, makers = len(self.nodes), self.makers
        parents = tuple([makers.get(id(x)) for x in values])
        for k, x in enumerate(outputs):
            # A value of its own: what is passed on may have another derivative, and a function may return what it closes over.
            if isinstance(x, jax.Array) and (not isinstance(run, Operation) or any(x is y for y in values)):
                outputs[k] = x = x.copy()
            makers[id(x)] = index, k
        self.nodes.append(
            Node(index, eqn.primitive, eqn.params, tuple(values), tuple(outputs), parents, elapsed_s, sources, run)
        )
        return outputs

    def grad(self, loss: Any, wrt: Any) -> Any:
        """The gradient of a recorded scalar, define-by-run: by the operations that ran, on the values that they had.

        So branches and loops of Python differentiate. It may be taken again, of other scalars or with respect to other values.
        A function with its own derivative (`jax.custom_jvp`, `jax.custom_vjp`) is called once more for it.

        Args:
          loss: a scalar that was computed while the tape was open, real, of shape ().
          wrt: a pytree of arrays, the very ones that the computation used: what it was given, or computed itself.
        Returns:
          The gradient, a tree of arrays as `wrt`; zeros with respect to what `loss` does not depend on.
        Raises:
          NotScalarError: `loss` is not of shape (), or not real. Also a TypeError, as in jax.grad.
          ArgumentError: `loss` was not computed on this tape, a leaf of `wrt` is not an array of floats, or what lies between
            goes through references. Also a TypeError.

        >>> x = jax.numpy.float32(3)
        >>> with tape() as t:
        ...     y = x * x if float(x) > 0 else -x
        >>> t.grad(y, x)
        Array(6., dtype=float32)
        """
        goal, aval = self.makers.get(id(loss)), jax.typeof(loss) if hasattr(loss, "dtype") else None
        if aval is None:
            raise NotScalarError(f"tape.grad needs a float scalar of shape (), and got {type(loss).__name__}.")
        if aval.shape != () or not jax.dtypes.issubdtype(aval.dtype, jax.numpy.floating):
            what = f"tape.grad needs a float scalar of shape (), and got {aval.str_short()}."
            raise NotScalarError(what, hint="reduce it while the tape is open, as in loss = jnp.mean(losses)")
        if goal is None and not any(x is loss for x in tree_leaves(wrt)):
            what = "tape.grad needs a scalar that was computed while the tape was open, and got another array."
            raise ArgumentError(what, hint="with fg.tape() as t: loss = f(x); then t.grad(loss, x)")
        paths, tree = tree_flatten_with_path(wrt)
        for path, leaf in paths:
            if not isinstance(leaf, jax.Array) or not is_float(leaf):
                kind = leaf.dtype if isinstance(leaf, jax.Array) else type(leaf).__name__
                what = f"tape.grad differentiates with respect to wrt{keystr(path)}, which holds {kind}."
                raise ArgumentError(what, hint="pass arrays of floats, the very ones that were computed with")
        cotangents: dict[Any, Any] = {goal or id(loss): lax.full_like(loss, 1)}
        keys = [self.makers.get(id(leaf)) or id(leaf) for _, leaf in paths]
        for node, varied in reversed(self._between(keys, goal)):
            given = [cotangents.get((node.index, k)) for k in range(len(node.outputs))]
            if all(c is None for c in given):
                continue
            for k, cotangent in zip(varied, pulled_back(node.again, node.inputs, varied, given), strict=True):
                key = node.parents[k] or id(node.inputs[k])
                cotangents[key] = cotangent if key not in cotangents else lax.add(cotangents[key], cotangent)
        found = (cotangents.get(key) for key in keys)
        leaves = [lax.full_like(x, 0) if c is None else c for c, (_, x) in zip(found, paths, strict=True)]
        return tree_unflatten(tree, leaves)

    def _between(self, keys: Sequence[Any], goal: tuple[int, int] | None) -> list[tuple[Node, tuple[int, ...]]]:
        """The nodes up to the goal that vary with these values, each with the inputs through which it does.

        Where a derivative is zero whatever the values are, as that of floor, nothing varies: zeros would meet infinities.
        """
        reached, found = set(keys), []
        for node in self.nodes[: goal[0] + 1 if goal else 0]:
            varied = tuple(
                k for k, (x, p) in enumerate(zip(node.inputs, node.parents, strict=True)) if (p or id(x)) in reached
            )
            if varied:
                if not all(_jax.is_array(jax.typeof(x)) for x in (*node.inputs, *node.outputs)):
                    what = (
                        f"tape.grad goes through '{node.primitive}' of a reference, which other operations may change."
                    )
                    raise ArgumentError(what, at=node.line, hint="fg.grad of the function differentiates references")
                varied, outputs = varying(node.again, node.inputs, varied)
                found += [(node, varied)] if varied else []
                reached |= {(node.index, k) for k in outputs}
        return found

    def graph(self, inputs: Mapping[str, Any] | None = None, outputs: Any = None) -> Graph:
        """This run as a Graph: the operations that ran, without the Python between them.

        Args:
          inputs: name -> pytree of arrays that the run was given; the others are constants. None: all of them, in the order of
            their use, called x0, x1, ….
          outputs: a pytree of values that were computed; None: a tuple of those that no other operation used.
        Returns:
          A Graph of keyword arguments, with the lines and scopes of the run.

        >>> x = jax.numpy.asarray(3.0)
        >>> with tape() as t:
        ...     y = lax.sin(x) if float(x) > 0 else -x
        >>> print(t.graph({"x": x}))
        run(x: f32[])
          a:f32[] = sin x
          return a
        """
        used = {p for node in self.nodes for p in node.parents}
        given = self.given()
        if inputs is not None and not isinstance(inputs, Mapping):
            raise ArgumentError(
                f"tape.graph needs inputs by name, and got {type(inputs).__name__}.", hint="inputs={'x': x}"
            )
        if inputs is None:
            inputs = {f"x{k}": x for k, x in enumerate(given)}
        if outputs is None:
            every = ((n.index, k, x) for n in self.nodes for k, x in enumerate(n.outputs))
            outputs = tuple(x for i, k, x in every if (i, k) not in used)
        unknown = [
            keystr(path)
            for path, x in tree_flatten_with_path(inputs)[0]
            if not any(x is y for y in [*given, *tree_leaves(outputs)])
        ]
        if unknown:
            what = f"tape.graph found no use of {', '.join(f'inputs{path}' for path in unknown)} in this run."
            raise ArgumentError(what, hint="pass the very arrays that were computed with, and no results")
        leaves, tree = tree_flatten(outputs)
        if not all(id(x) in self.makers or any(x is y for y in tree_leaves(inputs)) for x in leaves):
            what = "tape.graph needs outputs that were computed while the tape was open, and got another array."
            raise ArgumentError(what, hint="with fg.tape() as t: y = f(x); then t.graph({'x': x}, y)")
        arrays = tree_leaves(inputs)

        def run(**named):
            env: dict[Any, Any] = dict(zip(map(id, arrays), tree_leaves(named), strict=True))
            for node in self.nodes:
                read = [env.get(p or id(x), x) for x, p in zip(node.inputs, node.parents, strict=True)]
                with _jax.sourced(node.sources[0]):
                    made = node.again(*read)
                env.update(((node.index, k), x) for k, x in enumerate(made))
            return tree_unflatten(tree, [env.get(self.makers.get(id(x), id(x)), x) for x in leaves])

        return trace(run, **inputs)

    def given(self) -> list[jax.Array]:
        """The arrays that no node made, in the order of their use."""
        every = (x for n in self.nodes for x, p in zip(n.inputs, n.parents, strict=True) if p is None)
        return list({id(x): x for x in every if isinstance(x, jax.Array)}.values())

    def __len__(self) -> int:
        return len(self.nodes)

    def __repr__(self) -> str:
        return f"Tape({len(self.nodes)} operations, {1e3 * sum(n.elapsed_s for n in self.nodes):.3g} ms)"

    def report(self) -> Report:
        """A row for each operation: what it computed, its time, scope and line."""
        rows = [(str(n), f"{1e6 * n.elapsed_s:.0f} µs", n.scope, n.line or "") for n in self.nodes]
        return Report((repr(self), Table(rows, align="<>")))


@contextmanager
def tape() -> Iterator[Tape]:
    """Record each operation that runs in this thread, with its values.

    What is jitted runs operation by operation, so inside of jax.numpy, flax, equinox and optax too; control flow of `jax.lax`
    is one operation, and so is a function with its own derivative.

    Returns:
      A context; entering it gives the `Tape`, which may be used while it is open and afterwards.

    >>> with tape() as t:
    ...     y = lax.sqrt(lax.exp(2.0))
    >>> print([str(node.primitive) for node in t.nodes])
    ['exp', 'sqrt']
    """
    t = Tape()
    with driven(Recording(t)):
        yield t


class Recording(Pass):
    """Records each operation on a tape; calls are what they call.

    Attributes:
      calls: the sources of the calls around the current level, the innermost first.
    """

    def __init__(self, tape: Tape, calls: tuple[Any, ...] = ()):
        self.tape, self.calls = tape, calls

    def enters(self, eqn: Any, values: Sequence[Any]) -> bool:
        """Calls, unless they place their operands; a function with its own derivative, or a mapped one, is one operation."""
        name = eqn.primitive.name
        return name in _CALLS and (name != "jit" or subjaxprs.is_placed_freely(eqn.params))

    def inlines(self, eqn: Any, values: Sequence[Any]) -> bool:
        """All that is entered."""
        return True

    def body(self, eqn: Any, k: int) -> Recording:
        """The body of a call from the current line."""
        return Recording(self.tape, (_jax.current_source(), *self.calls))

    def equation(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        """An operation runs, and is kept."""
        is_operation = not functions_of(eqn) and eqn.primitive.name not in subjaxprs.FUNCTIONAL
        run: Any = Operation(eqn.primitive, eqn.params) if is_operation else lambda *values: bind(eqn, values)
        return self.tape.record(eqn, values, run, (_jax.current_source(), *self.calls))


_CALLS = subjaxprs.PLAIN_CALLS | {"jit", "remat2"}


def _name(index: int, k: int) -> str:
    return f"%{index}.{k}" if k else f"%{index}"
