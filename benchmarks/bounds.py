"""Every bound that `python -m benchmarks --check` holds, in one table.

Microseconds, and seconds of a rewrite, are CPU time; other seconds are wall time. All else is a ratio, which says beside
what, or a count.
"""

from __future__ import annotations

import math

from .interleaving import Figure

ANY = -math.inf
BOUNDS: dict[str, tuple[float, float]] = {  # least, most
    # gradients: beside JAX's own, the geometric mean over the corpus
    "function: run, geomean": (0.98, 1.02),
    "function: cold trace, geomean": (ANY, 1.1),
    "function: warm trace, geomean": (ANY, 1.1),
    "function: programs with different StableHLO": (0, 0),
    "function: programs with different HLO": (0, 0),
    "function: programs with different temporaries": (0, 0),
    "graph: run, geomean": (0.98, 1.02),
    "graph: cold trace, geomean": (ANY, 1.4),
    "graph: warm trace, geomean": (ANY, 1.4),
    "graph: programs with different StableHLO": (0, 0),
    "graph: programs with different HLO": (0, 0),
    "graph: programs with different temporaries": (0, 0),
    # dispatch
    "hit with 2 leaves: extra time over jax.jit, us": (ANY, 1.0),
    "hit with 200 leaves: extra time over jax.jit, us": (ANY, 1.0),
    # rewriting, of 10,000 equations
    "flat, cold: CPU seconds of a rewrite": (ANY, 2.0),
    "flat, warm: CPU seconds of a rewrite": (ANY, 2.0),
    "nested, cold: CPU seconds of a rewrite": (ANY, 2.0),
    "nested, warm: CPU seconds of a rewrite": (ANY, 2.0),
    # recording
    "lax.sin: extra time per operation, us": (ANY, 25.0),
    "lax.mul: extra time per operation, us": (ANY, 25.0),
    "lax.sin: gradient / jax.grad": (ANY, 0.5),
    "lax.mul: gradient / jax.grad": (ANY, 0.5),
    "jnp.tanh: gradient / jax.grad": (ANY, 0.5),
    "x @ W: gradient / jax.grad": (ANY, 0.5),
    # analyses of large graphs, beside JAX's trace of the same program
    "replace 5,000 matches in 10,000 equations / a trace": (ANY, 25.0),
    "replace the attention of 12 layers / a trace": (ANY, 50.0),
    "cost of 10,000 equations with text and timeline / a trace": (ANY, 4.5),
    "temporaries of 10,000 equations / a trace": (ANY, 4.0),
    "nan_origin in 1,000 equations / a trace": (ANY, 60.0),
    "gradient of a loop of 480 lines / one of 80 lines": (ANY, 12.0),
    # what is measured on the device
    "fg.machine: FLOP/s / those of a product": (0.2, math.inf),
    "the size of the caches: seconds to measure it": (ANY, 1.0),
    "compiled: time of a loop's product / that of the program": (ANY, 2.0),
    "compiled: part of the time in kernels with equations": (0.95, 1.0),
    "study: first call / a compiled call": (5.0, math.inf),
    # in processes of their own
    "import of funcgrad / that of jax": (ANY, 0.060 / 0.514),
    "examples/digits.py: seconds": (ANY, 60.0),
    "examples/adaptive_ode.py: seconds": (ANY, 60.0),
    "examples/charlm.py: seconds": (ANY, 180.0),
    "examples/budget.py: seconds": (ANY, 400.0),
    # the page of fg.show in a browser, wall seconds
    "page of 300 equations: seconds to open": (ANY, 1.0),
    "page of 300 equations: seconds to unfold": (ANY, 3.0),
    "page of 10,000 equations: seconds to open": (ANY, 5.0),
    "page of 10,000 equations: seconds to unfold what fits": (ANY, 10.0),
    "page of 10,000 equations: seconds of the slowest action": (ANY, 1.5),
}


def figure(name: str, value: float) -> Figure:
    """A figure with its bound from the table."""
    return Figure(name, value, *BOUNDS[name])
