"""The engine: graphs and their transforms. It knows nothing of models, data, files or terminals.

`compilation.kernels`, `nan_origin` and `rewriting.replace` are imported on first use.
"""

from .core import _jax

_jax.hide(__path__[0])

from .autodiff.grad import (
    differentiable,
    grad,
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
from .autodiff.halves import Halves, Residual, halves
from .batching.vmap import vmap
from .compilation.jit import jit
from .core.errors import (
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
from .core.graph import Graph, trace, walk
from .core.passes import Pass
from .core.rewrite import interpret, rewrite, verify
from .core.rules import Rules, live
from .core.scope_paths import Site, op
from .cost.device import Machine, machine
from .cost.live_memory import Timeline
from .cost.table import Cost, cost
from .remat.plan import Plan
from .rewriting.tap import patch, tap
from .while_loops.schedule import Loops

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
    "Pass",
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
