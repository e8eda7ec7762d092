"""funcgrad: JAX's computational graph as a value. `import funcgrad as fg`."""

import importlib.util as _util
import pathlib as _pathlib
import sys as _sys

_here = _pathlib.Path(__file__).parent
if not (_here / "transforms").exists():  # a checkout: the engine lies beside this folder; installed, it lies inside it
    _engine = _here.parent / "transforms"
    _spec = _util.spec_from_file_location(f"{__name__}.transforms", _engine / "__init__.py")
    assert _spec is not None
    assert _spec.loader is not None
    _sys.modules[_spec.name] = transforms = _util.module_from_spec(_spec)
    _spec.loader.exec_module(transforms)

from .transforms._jax import hide as _hide  # isort: skip

_hide(str(_here))

from . import nn, transforms
from .comparison import Comparison, Study, compare, study
from .feeding import prefetch
from .recording import Node, Tape, tape
from .training import step, train
from .transforms import *  # noqa: F403 - what its page lists

__version__ = "0.1.0"
__all__ = ["Comparison", "Node", "Study", "Tape", "compare", "nn", "prefetch", "step", "study", "tape", "train"]
__all__ += transforms.__all__
