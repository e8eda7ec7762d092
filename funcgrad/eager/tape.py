"""`tape`: the operations of an eager run, recorded as they run, and their gradient.

While a tape is open, a pass (`Recording`) computes each operation at once and records it. Values stay plain arrays, so Python
branches, loops, `float(x)` and NumPy behave as without a tape. Jitted functions run operation by operation.

The tape is the Wengert list of define-by-run systems. Source: R. E. Wengert, A simple automatic derivative evaluation program,
1964, doi:10.1145/355586.364791.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from ..transforms.core.text import short
from .pullbacks import Operation, activity, is_float, pull_back


class Node(NamedTuple):
    """An operation that ran.

    Attributes:
      index: its place on the tape.
      primitive, params: the operation; control flow of `jax.lax` is one, and so is a function with its own derivative.
      inputs, outputs: its values: arrays, and inputs that are Python numbers.
      parents: for each input, the node that computed it, as (index, output); None for values from before, and for numbers.
      elapsed_s: wall time until its outputs were computed, in seconds.
      sources: source infos, as equations have them: its own, then those of the enclosing calls.
      again: recomputes the list of outputs from values for the inputs, under any transform.
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
        return next(filter(None, lines), None)  # operations in the jitted functions of jax.numpy have no user line

    def __str__(self) -> str:
        pairs = zip(self.inputs, self.parents, strict=True)
        inputs = " ".join(short(jax.typeof(x)) if parent is None else _name(*parent) for x, parent in pairs)
        outputs = ", ".join(f"{_name(self.index, k)}:{short(jax.typeof(x))}" for k, x in enumerate(self.outputs))
        return f"{outputs or f'%{self.index}'} = {self.primitive} {inputs}"


class Tape(Result):
    """The operations that ran while it was open, as nodes in the order of execution.

    A tape keeps all values of its nodes alive.
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.makers: dict[int, tuple[int, int]] = {}  # by the id of a value, which a node keeps alive

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
        """The gradient of a recorded scalar, define-by-run: from the recorded operations and their values.

        So it differentiates through Python branches and loops. A tape gives any number of gradients, of several scalars and
        with respect to several values. Functions with their own derivative (`jax.custom_jvp`, `jax.custom_vjp`) run once more.

        Args:
          loss: a real scalar of shape () that was computed while the tape was open.
          wrt: a pytree of arrays: the same objects that the computation used or computed.
        Returns:
          The gradient, a tree of arrays as `wrt`; zeros for values that `loss` does not depend on.
        Raises:
          NotScalarError: `loss` is not of shape (), or not real. Also a TypeError, as in jax.grad.
          ArgumentError: `loss` was not computed on this tape, a leaf of `wrt` is not an array of floats, or an operation
            between them uses references. Also a TypeError.

        >>> x = jax.numpy.float32(3)
        >>> with tape() as t:
        ...     y = x * x if float(x) > 0 else -x
        >>> t.grad(y, x)
        Array(6., dtype=float32)
        """
        maker, aval = self.makers.get(id(loss)), jax.typeof(loss) if hasattr(loss, "dtype") else None
        if aval is None or aval.shape != () or not jax.dtypes.issubdtype(aval.dtype, jax.numpy.floating):
            kind = type(loss).__name__ if aval is None else aval.str_short()
            what = f"tape.grad needs a float scalar of shape (), and got {kind}."
            raise NotScalarError(what, hint="reduce it while the tape is open, as in loss = jnp.mean(losses)")
        if maker is None and not any(x is loss for x in tree_leaves(wrt)):
            what = "tape.grad needs a scalar that was computed while the tape was open, and got another array."
            raise ArgumentError(what, hint="with fg.tape() as t: loss = f(x); then t.grad(loss, x)")
        leaves, tree = tree_flatten_with_path(wrt)
        for path, x in leaves:
            if not isinstance(x, jax.Array) or not is_float(x):
                kind = x.dtype if isinstance(x, jax.Array) else type(x).__name__
                what = f"tape.grad differentiates with respect to wrt{keystr(path)}, which holds {kind}."
                raise ArgumentError(what, hint="pass arrays of floats, the very ones that were computed with")
        keys = [self.makers.get(id(x)) or id(x) for _, x in leaves]
        cotangents: dict[Any, Any] = {maker or id(loss): lax.full_like(loss, 1)}
        # Invariant: the cotangents of a node's outputs are complete, since all nodes that use them come after it.
        for node, active in reversed(self._active_nodes(keys, maker)):
            output_cotangents = [cotangents.get((node.index, k)) for k in range(len(node.outputs))]
            if all(c is None for c in output_cotangents):
                continue
            input_cotangents = pull_back(node.again, node.inputs, active, output_cotangents)
            for k, cotangent in zip(active, input_cotangents, strict=True):
                key = node.parents[k] or id(node.inputs[k])
                cotangents[key] = cotangent if key not in cotangents else lax.add(cotangents[key], cotangent)
        pairs = zip(keys, leaves, strict=True)
        return tree_unflatten(tree, [cotangents[k] if k in cotangents else lax.full_like(x, 0) for k, (_, x) in pairs])

    def _active_nodes(self, keys: Iterable[Any], maker: tuple[int, int] | None) -> list[tuple[Node, tuple[int, ...]]]:
        """The nodes up to the maker of the loss that depend on these values, each with its active inputs.

        Operations whose derivative is always zero, as floor, are left out: zero times infinity would be NaN.
        """
        active_keys, active_nodes = set(keys), []
        for node in self.nodes[: maker[0] + 1 if maker else 0]:
            pairs = enumerate(zip(node.inputs, node.parents, strict=True))
            active = tuple(k for k, (x, parent) in pairs if (parent or id(x)) in active_keys)
            if not active:
                continue
            if not all(_jax.is_array(jax.typeof(x)) for x in (*node.inputs, *node.outputs)):
                what = f"tape.grad goes through '{node.primitive}' of a reference, which other operations may change."
                raise ArgumentError(what, at=node.line, hint="fg.grad of the function differentiates references")
            active, outputs = activity(node.again, node.inputs, active)
            active_nodes += [(node, active)] if active else []
            active_keys |= {(node.index, k) for k in outputs}
        return active_nodes

    def graph(self, inputs: Mapping[str, Any] | None = None, outputs: Any = None) -> Graph:
        """This run as a Graph of the recorded operations.

        Args:
          inputs: name -> pytree of arrays that the run did not compute; the others of these are constants. None: all of them,
            in the order of their use, named x0, x1, ….
          outputs: a pytree of computed values; None: a tuple of those that no operation used.
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
        if inputs is not None and not isinstance(inputs, Mapping):
            what = f"tape.graph needs inputs by name, and got {type(inputs).__name__}."
            raise ArgumentError(what, hint="inputs={'x': x}")
        if inputs is None:
            inputs = {f"x{k}": x for k, x in enumerate(self.given())}
        if outputs is None:
            used = {parent for node in self.nodes for parent in node.parents}
            outputs = tuple(x for n in self.nodes for k, x in enumerate(n.outputs) if (n.index, k) not in used)
        leaves, tree = tree_flatten(outputs)
        arrays = tree_leaves(inputs)
        usable = {id(x) for x in [*self.given(), *leaves]}
        if unused := [f"inputs{keystr(path)}" for path, x in tree_flatten_with_path(inputs)[0] if id(x) not in usable]:
            what = f"tape.graph found no use of {', '.join(unused)} in this run."
            raise ArgumentError(what, hint="pass the very arrays that were computed with, and no results")
        if not {id(x) for x in leaves} <= self.makers.keys() | set(map(id, arrays)):
            what = "tape.graph needs outputs that were computed while the tape was open, and got another array."
            raise ArgumentError(what, hint="with fg.tape() as t: y = f(x); then t.graph({'x': x}, y)")

        def run(**named):
            env: dict[Any, Any] = dict(zip(map(id, arrays), tree_leaves(named), strict=True))
            for node in self.nodes:
                operands = [env.get(p or id(x), x) for x, p in zip(node.inputs, node.parents, strict=True)]
                with _jax.sourced(node.sources[0]):
                    results = node.again(*operands)
                env.update(((node.index, k), x) for k, x in enumerate(results))
            return tree_unflatten(tree, [env.get(self.makers.get(id(x), id(x)), x) for x in leaves])

        return trace(run, **inputs)

    def given(self) -> list[jax.Array]:
        """The input arrays of the run: those that no node computed, in the order of their use."""
        inputs = (x for n in self.nodes for x, p in zip(n.inputs, n.parents, strict=True) if p is None)
        return list({id(x): x for x in inputs if isinstance(x, jax.Array)}.values())

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

    Jitted functions run operation by operation, also inside jax.numpy, flax, equinox and optax. Control flow of `jax.lax` is
    one operation, and so is a function with its own derivative.

    Returns:
      A context manager that gives the `Tape`, which is usable while it is open and afterwards.

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
        return name in _CALLS and not functions_of(eqn) and (name != "jit" or subjaxprs.is_placed_freely(eqn.params))

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
