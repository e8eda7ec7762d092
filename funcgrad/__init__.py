"""funcgrad: JAX's computational graph as a value. `import funcgrad as fg`."""

import importlib as _importlib
import importlib.util as _util
import pathlib as _pathlib
import sys as _sys
import typing as _typing

_folder = _pathlib.Path(__file__).parent
if not (_folder / "transforms").exists():  # a checkout: the engine is beside this folder; an install has it inside
    _engine = _folder.parent / "transforms"
    _spec = _util.spec_from_file_location(f"{__name__}.transforms", _engine / "__init__.py")
    assert _spec is not None
    assert _spec.loader is not None
    _sys.modules[_spec.name] = transforms = _util.module_from_spec(_spec)
    _spec.loader.exec_module(transforms)

from .transforms.core._jax import hide as _hide  # isort: skip

_hide(str(_folder))

from . import nn, notebooks, transforms  # noqa: F401 - notebooks adds methods to results
from .data.prefetch import prefetch
from .eager.tape import Node, Tape, tape
from .training.loop import train
from .training.update import step
from .transforms import *  # noqa: F403 - its __all__

if _typing.TYPE_CHECKING:
    from .eager.report import Comparison, Study  # noqa: F401
    from .eager.study import compare, study  # noqa: F401
    from .transforms.compilation.kernels.instructions import Kernel  # noqa: F401
    from .transforms.compilation.kernels.table import Compiled, compiled  # noqa: F401
    from .transforms.nan_origin.report import NanOrigin, nan_origin  # noqa: F401
    from .transforms.rewriting.replace import Replaced, replace  # noqa: F401
    from .viewing.diff import Diff, diff  # noqa: F401
    from .viewing.graphviz import to_dot  # noqa: F401
    from .viewing.page import show  # noqa: F401
    from .viewing.schema import to_json  # noqa: F401

_LAZY = {  # imported on first use, so that importing funcgrad is quick
    "eager.report": ("Comparison", "Study"),
    "eager.study": ("compare", "study"),
    "transforms.compilation.kernels.instructions": ("Kernel",),
    "transforms.compilation.kernels.table": ("Compiled", "compiled"),
    "transforms.nan_origin.report": ("NanOrigin", "nan_origin"),
    "transforms.rewriting.replace": ("Replaced", "replace"),
    "viewing.diff": ("Diff", "diff"),
    "viewing.graphviz": ("to_dot",),
    "viewing.page": ("show",),
    "viewing.schema": ("to_json",),
}


def __getattr__(name: str) -> _typing.Any:
    for module, names in _LAZY.items():
        if name in names:
            exports = {export: getattr(_importlib.import_module(f"{__name__}.{module}"), export) for export in names}
            globals().update(exports)
            return exports[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__version__ = "0.1.0"
__all__ = ["Node", "Tape", "nn", "prefetch", "step", "tape", "train"]
__all__ += [*transforms.__all__, *(name for names in _LAZY.values() for name in names)]
