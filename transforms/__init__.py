"""The engine: graphs and their transforms. It knows nothing of models, data, files or terminals."""

from . import _jax

_jax.hide(__path__[0])

from .batching import vmap
from .compilation import jit
from .errors import (
    ArgumentError,
    DataError,
    DuplicateRule,
    FuncgradError,
    GraphError,
    MissingExtra,
    NotFiniteError,
    NotScalarError,
    OptionError,
    RetraceError,
)
from .gradient import differentiable, grad, hessian, jacfwd, jacobian, jacrev, jvp, linearize, value_and_grad, vjp
from .graph import Graph, trace, walk
from .interpreter import interpret, rewrite, verify
from .living import live
from .rules import Rules

__all__ = [
    "ArgumentError",
    "DataError",
    "DuplicateRule",
    "FuncgradError",
    "Graph",
    "GraphError",
    "MissingExtra",
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
    "jacobian",
    "jacrev",
    "jit",
    "jvp",
    "linearize",
    "live",
    "rewrite",
    "trace",
    "value_and_grad",
    "verify",
    "vjp",
    "vmap",
    "walk",
]
