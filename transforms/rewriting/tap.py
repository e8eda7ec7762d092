"""`tap` and `patch`: read and replace intermediate values, in running functions and in Graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from jax.tree_util import tree_map, tree_unflatten

from ..core import _jax
from ..core.errors import ArgumentError, OptionError, location
from ..core.graph import Graph
from ..core.pass_trace import driven
from ..core.passes import run
from ..core.scope_paths import Where, check_where
from ..core.signatures import name_of
from .tap_pass import Selection, Tap


def tap(f: Callable | None = None, *, where: Where) -> Any:
    """`f`, returning `(out, seen)`: its result, and the intermediate values that `where` selects.

    Args:
      f: function or Graph.
      where: a scope pattern, which means the values that leave the scope; or a predicate on equations, such as
        `fg.op("tanh")`, which means their outputs.
    Returns:
      A function as `f`, or a Graph. `seen` maps "scope/primitive#k" (the k-th of that name) to values in program order: an
      array; a tuple where the equation has several outputs; an array with a leading axis of iterations inside a scan;
      `(value, ran)` inside a cond, and for the last iteration of a while, where `ran` is a bool and value is zeros if it is
      False. What `shard_map`, custom_linear_solve, a while with a batched predicate, a traced function with effects and its
      own derivative rule, and since JAX 0.12 a traced custom_root hold inside is not seen. A running function sees what its
      Graph would; except that a Python number of which JAX makes an array before it is used, as in `x.at[0].multiply(2.0)`,
      is no constant to it. Without `f`, a decorator.
    Raises:
      ArgumentError: `where` is neither, or `f`. Also a TypeError.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> def model(x):
    ...     with jax.named_scope("layer"):
    ...         x = jnp.sin(2 * x)
    ...     return x + 1
    >>> out, seen = tap(model, where="layer")(0.0)
    >>> print(out, {name: float(value) for name, value in seen.items()})
    1.0 {'layer/sin#0': 0.0}
    """
    check_where("tap", where)
    if f is None:
        return functools.partial(tap, where=where)
    return _tapped("tap", f, Selection(where), lambda out, level: (out, level.seen()))


def patch(f: Callable | None = None, *, where: Where, replace: Any) -> Any:
    """`f`, with the intermediate values that `where` selects replaced.

    Args:
      f: function or Graph.
      where: as in `tap`. Inside a scope its own values stay: what leaves it is replaced.
      replace: pure function of the selected value (of all outputs, where an equation has several) that returns as many, of
        the same shapes and dtypes; or such a value. Derivatives are those of the patched program: a function with a custom
        derivative rule in which something was replaced is differentiated as it then stands.
    Returns:
      A function as `f`, or a Graph. Without `f`, a decorator.
    Raises:
      OptionError: at a call, nothing was selected. Also a ValueError.
      GraphError: at a call, `replace` returned values of other shapes, dtypes or number.
    Source: Geiger et al. 2021, Causal Abstractions of Neural Networks, arXiv:2106.02997.

    >>> import jax.numpy as jnp
    >>> from funcgrad.transforms import op
    >>> patch(lambda x: 1 + jnp.tanh(x), where=op("tanh"), replace=lambda y: 10 * y)(100.0)
    Array(11., dtype=float32, weak_type=True)
    """
    check_where("patch", where)
    if f is None:
        return functools.partial(patch, where=where, replace=replace)

    def finish(out, level):
        if not level.tapped:
            raise OptionError(
                f"patch found nothing in {name_of(f)} that where={where!r:.60} selects.",
                at=location(f),
                hint="print(fg.trace(f, ...)) shows its scopes and primitives",
            )
        return out

    values = replace if callable(replace) else lambda *_: replace
    return _tapped("patch", f, Selection(where, values), finish)


def _tapped(verb: str, f: Callable, selection: Selection, finish: Callable[[Any, Tap], Any]) -> Any:
    if not callable(f):
        raise ArgumentError(f"{verb} takes a function or a Graph, and got {type(f).__name__}.", inputs=f"{f!r:.60}")

    @functools.wraps(f, updated=())
    @_jax.api_boundary
    def tapped(*args, **kwargs):
        level = Tap(selection)
        if isinstance(f, Graph):
            out = tree_unflatten(f.out_tree, run(level, f.jaxpr, f.leaves(*args, **kwargs)))
        else:
            with driven(level):
                out = f(*args, **kwargs)
        return finish(tree_map(level.returned, out), level)

    return f.derive(tapped, f"{verb}({name_of(f)})") if isinstance(f, Graph) else tapped
