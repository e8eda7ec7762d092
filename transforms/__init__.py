"""The engine: graphs and their transforms. It knows nothing of models, data, files or terminals."""

from . import _jax

_jax.hide(__path__[0])

from .batching import vmap  # noqa: E402
from .compilation import jit  # noqa: E402
from .errors import (  # noqa: E402
    ArgumentError,
    DataError,
    DuplicateRule,
    FuncgradError,
    GraphError,
    MissingExtra,
    MissingRule,
    NotFiniteError,
    NotScalarError,
    OptionError,
    RetraceError,
)
from .gradient import differentiable, grad, hessian, jacfwd, jacrev, jvp, linearize, value_and_grad, vjp  # noqa: E402
from .graph import Graph, trace, walk  # noqa: E402
from .interpreter import interpret, rewrite, verify  # noqa: E402
from .living import live  # noqa: E402
from .rules import Rules  # noqa: E402

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
    "rewrite",
    "trace",
    "value_and_grad",
    "verify",
    "vjp",
    "vmap",
    "walk",
]
