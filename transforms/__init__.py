"""The engine: graphs and their transforms. It knows nothing of models, data, files or terminals.

`kernels` and `faults` are imported apart.
"""

from . import _jax

_jax.hide(__path__[0])

from .batching import vmap
from .budgets import Plan
from .compilation import jit
from .costs import Cost, Machine, Timeline, cost, machine
from .errors import (
    ArgumentError,
    BudgetError,
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
from .gradient import (
    differentiable,
    grad,
    halves,
    hessian,
    jacfwd,
    jacobian,
    jacrev,
    jvp,
    linearize,
    plan,
    value_and_grad,
    vjp,
)
from .graph import Graph, trace, walk
from .interpreter import interpret, rewrite, verify
from .living import live
from .loops import Loops
from .probes import patch, tap
from .residuals import Halves, Residual
from .rules import Rules
from .selecting import Site, op

__all__ = [
    "ArgumentError",
    "BudgetError",
    "Cost",
    "DataError",
    "DuplicateRule",
    "FuncgradError",
    "Graph",
    "GraphError",
    "Halves",
    "Loops",
    "Machine",
    "MissingExtra",
    "NotFiniteError",
    "NotScalarError",
    "OptionError",
    "Plan",
    "Residual",
    "RetraceError",
    "Rules",
    "Site",
    "Timeline",
    "cost",
    "differentiable",
    "grad",
    "halves",
    "hessian",
    "interpret",
    "jacfwd",
    "jacobian",
    "jacrev",
    "jit",
    "jvp",
    "linearize",
    "live",
    "machine",
    "op",
    "patch",
    "plan",
    "rewrite",
    "tap",
    "trace",
    "value_and_grad",
    "verify",
    "vjp",
    "vmap",
    "walk",
]
