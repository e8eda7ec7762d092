"""funcgrad: JAX's computational graph as a value. `import funcgrad as fg`."""

import pathlib as _pathlib

# In a checkout the engine lies beside this folder, as `transforms/`; installed, it lies inside it.
_here = _pathlib.Path(__file__).parent
if not (_here / "transforms").exists() and (_here.parent / "transforms" / "__init__.py").exists():
    __path__.append(str(_here.parent))

from .transforms import *  # noqa: E402, F403
from .transforms import __all__ as _engine  # noqa: E402
from .transforms._jax import hide as _hide  # noqa: E402

_hide(str(_here))

__version__ = "0.1.0"
__all__ = [*_engine]
