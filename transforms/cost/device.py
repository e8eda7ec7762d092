"""`machine`: how fast this machine multiplies matrices and copies memory; what bounds a piece of work by these.

`cache_bytes`: how much of it a CPU holds near.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .formatting import format_bytes, format_count
from .operations import Work


class Bound(NamedTuple):
    """The least time that work takes on a machine, and what it is bound by."""

    seconds: float
    by: Literal["compute", "bandwidth"]


@dataclass(frozen=True)
class Machine:
    """What a device can do.

    Attributes:
      name: the kind of the device.
      flops_per_s: of a large matrix product.
      bytes_per_s: read and written, of a large copy.
    """

    name: str
    flops_per_s: float
    bytes_per_s: float

    def bound(self, work: Work) -> Bound:
        """The roofline: the longer of the times for its FLOPs and for its bytes; transcendentals are not in it.

        Source: Williams, Waterman & Patterson 2009, Roofline, doi:10.1145/1498765.1498785.
        """
        compute, bandwidth = work.flops / self.flops_per_s, work.bytes / self.bytes_per_s
        return Bound(compute, "compute") if compute > bandwidth else Bound(bandwidth, "bandwidth")

    def __str__(self) -> str:
        return f"{self.name}: {format_count(self.flops_per_s, 'FLOP/s')}, {format_bytes(self.bytes_per_s)}/s"


def machine(dtype: Any = "float32", device: jax.Device | None = None) -> Machine:
    """Measure a device: the FLOP/s of a matrix product in `dtype`, the bytes/s of a copy. Once per process, about a second.

    Args:
      dtype: of the matrices; products of float32 are as precise as `jax.default_matmul_precision` says.
      device: the default device if None.

    >>> here = machine()
    >>> here.flops_per_s > 1e8 and here.bytes_per_s > 1e8
    True
    """
    config: Any = jax.config
    return _measured(jnp.dtype(dtype), device or jnp.zeros(()).device, config.jax_default_matmul_precision)


@functools.cache
def _measured(dtype: Any, device: Any, precision: Any) -> Machine:
    # Of a size that keeps the device busy, and beyond the caches of a CPU.
    n, size = (1024, 2**25) if device.platform == "cpu" else (8192, 2**28)
    with jax.default_device(device):
        a = jnp.full((n, n), 1 / n, dtype)
        x = jnp.zeros(size, jnp.float32)
        product = _seconds(jax.jit(lambda b: a @ b), a)
        copy = _seconds(jax.jit(jnp.negative, donate_argnums=0), x)  # in place: memory that is new costs more
    return Machine(device.device_kind, 2 * n**3 / product, 2 * x.nbytes / copy)


@functools.cache
def cache_bytes() -> int:
    """How much the CPU rewrites about as fast as it does 4 MiB: that, or 8, 16 or 32 MiB. Once per process, .05 s.

    It is measured: what a machine says of its caches includes what belongs to other cores, or other machines on it.
    """
    speeds = {size: size / _rewriting_s(size) for size in (2**k for k in (22, 23, 24, 25))}
    return max(size for size, speed in speeds.items() if speed > 0.6 * max(speeds.values()))


def _rewriting_s(size: int) -> float:
    """The least time of several runs within 10 ms, of numpy, which needs no compiling."""
    x = np.ones(size // 4, np.float32)
    times: list[float] = []
    while len(times) < 3 or sum(times) < 0.01:
        start = time.perf_counter()
        np.negative(x, out=x)
        times.append(time.perf_counter() - start)
    return min(times)


def _seconds(f: Callable, x: Any) -> float:
    """The least time of several runs in a row: what else the machine does only adds."""
    x = jax.block_until_ready(f(x))
    times: list[float] = []
    while len(times) < 5 or (sum(times) < 0.3 and len(times) < 100):
        start = time.perf_counter()
        x = jax.block_until_ready(f(x))
        times.append(time.perf_counter() - start)
    return min(times)
