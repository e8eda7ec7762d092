"""funcgrad: JAX's computational graph as a value. `import funcgrad as fg`."""

import pathlib as _pathlib

# In a checkout the engine lies beside this folder, as `transforms/`; installed, it lies inside it.
_here = _pathlib.Path(__file__).parent
if not (_here / "transforms").exists() and (_here.parent / "transforms" / "__init__.py").exists():
    __path__.append(str(_here.parent))

from .transforms._jax import hide as _hide  # isort: skip

_hide(str(_here))

from . import nn
from .feeding import prefetch
from .training import step, train
from .transforms import (
    ArgumentError,
    DataError,
    DuplicateRule,
    FuncgradError,
    Graph,
    GraphError,
    MissingExtra,
    MissingRule,
    NotFiniteError,
    NotScalarError,
    OptionError,
    RetraceError,
    Rules,
    differentiable,
    grad,
    hessian,
    interpret,
    jacfwd,
    jacrev,
    jit,
    jvp,
    linearize,
    live,
    rewrite,
    trace,
    value_and_grad,
    verify,
    vjp,
    vmap,
    walk,
)

__version__ = "0.1.0"
__all__ = [
    "ArgumentError",
    "DataError",
    "DuplicateRule",
    "FuncgradError",
    "Graph",
    "GraphError",
    "MissingExtra",
    "MissingRule",
    "NotFiniteError",
    "NotScalarError",
    "OptionError",
    "RetraceError",
    "Rules",
    "differentiable",
    "grad",
    "hessian",
    "interpret",
    "jacfwd",
    "jacrev",
    "jit",
    "jvp",
    "linearize",
    "live",
    "nn",
    "prefetch",
    "rewrite",
    "step",
    "trace",
    "train",
    "value_and_grad",
    "verify",
    "vjp",
    "vmap",
    "walk",
]
