"""funcgrad: JAX's computational graph as a value. `import funcgrad as fg`."""

import importlib as _importlib
import importlib.util as _util
import pathlib as _pathlib
import sys as _sys
import typing as _typing

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
from .feeding import prefetch
from .notebooks import attach as _attach
from .recording import Node, Tape, tape
from .training import step, train
from .transforms import *  # noqa: F403 - what its page lists

_attach(transforms.Cost, transforms.Graph, transforms.Halves, transforms.Plan, transforms.Timeline)
_attach(transforms.compilation.Retraces, Tape)

if _typing.TYPE_CHECKING:
    from .comparison import Comparison, Study, compare, study  # noqa: F401
    from .transforms.faults import NanOrigin, nan_origin  # noqa: F401
    from .transforms.kernels import Compiled, Kernel, compiled  # noqa: F401
    from .transforms.patterns import Replaced, replace  # noqa: F401
    from .viewing import Diff, diff, show  # noqa: F401

_LATER = {  # what is rarely used is imported when it is asked for, so that importing funcgrad is quick
    "comparison": ("Comparison", "Study", "compare", "study"),
    "transforms.faults": ("NanOrigin", "nan_origin"),
    "transforms.kernels": ("Compiled", "Kernel", "compiled"),
    "transforms.patterns": ("Replaced", "replace"),
    "viewing": ("Diff", "diff", "show"),
}


def __getattr__(name: str) -> _typing.Any:
    for module, names in _LATER.items():
        if name in names:
            found = [getattr(_importlib.import_module(f"{__name__}.{module}"), each) for each in names]
            _attach(*(each for each in found if isinstance(each, type)))
            globals().update(zip(names, found, strict=True))
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__version__ = "0.1.0"
__all__ = ["Node", "Tape", "nn", "prefetch", "step", "tape", "train"]
__all__ += [*transforms.__all__, *(name for names in _LATER.values() for name in names)]
