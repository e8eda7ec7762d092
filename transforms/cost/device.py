"""`machine`: the measured FLOP/s and bytes/s of a device, and the roofline. `cache_bytes`: the size of a CPU's fast caches."""

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
    """The least seconds that work takes on a machine, and the resource that takes them."""

    seconds: float
    by: Literal["compute", "bandwidth"]


@dataclass(frozen=True)
class Machine:
    """The speed of a device.

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
    # Sizes that keep the device busy, and exceed the caches of a CPU.
    n, size = (1024, 2**25) if device.platform == "cpu" else (8192, 2**28)
    with jax.default_device(device):
        a = jnp.full((n, n), 1 / n, dtype)
        x = jnp.zeros(size, jnp.float32)
        product_s = _least_s(jax.jit(lambda b: a @ b), a, 5, 0.3)
        copy_s = _least_s(jax.jit(jnp.negative, donate_argnums=0), x, 5, 0.3)  # in place: new memory costs more
    return Machine(device.device_kind, 2 * n**3 / product_s, 2 * x.nbytes / copy_s)


@functools.cache
def cache_bytes() -> int:
    """The largest of 4, 8, 16 and 32 MiB that the CPU rewrites at over 60 % of the best speed. Once per process, 0.05 s.

    It is measured, since the sizes that a system reports include caches of other cores, and of other virtual machines.
    """
    speeds = {size: size / _rewriting_s(size) for size in (2**k for k in (22, 23, 24, 25))}
    return max(size for size, speed in speeds.items() if speed > 0.6 * max(speeds.values()))


def _rewriting_s(size: int) -> float:
    """Seconds to negate so many bytes in place, by NumPy, which compiles nothing."""
    return _least_s(lambda x: np.negative(x, out=x), np.ones(size // 4, np.float32), 3, 0.01)


def _least_s(f: Callable, x: Any, runs: int, total_s: float) -> float:
    """The least time of `x = f(x)`, of at least `runs` runs in `total_s` seconds: other processes only add to it."""
    x = jax.block_until_ready(f(x))
    times: list[float] = []
    while len(times) < runs or (sum(times) < total_s and len(times) < 100):
        start = time.perf_counter()
        x = jax.block_until_ready(f(x))
        times.append(time.perf_counter() - start)
    return min(times)
