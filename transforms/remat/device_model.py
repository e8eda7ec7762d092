"""Device models: the fixed rates that weigh recomputation against memory, so that a plan depends on no measurement."""

from __future__ import annotations

from typing import NamedTuple

from ..cost.operations import Work


class DeviceModel(NamedTuple):
    """The rates of a device, per second.

    Attributes:
      flops, transcendentals: operations.
      bytes: bytes read or written; `cached_bytes` is the rate for data of at most `cache` bytes.
      new_bytes: allocated bytes of temporaries, from `mmap_bytes` on. On CPU, XLA allocates all temporaries in one block at
        each call. From 32 MiB on, glibc gets the block from the system (mallopt(3), M_MMAP_THRESHOLD), which clears it page by
        page: this is slower than any other access to it. On GPU, memory is allocated once.
      stack_transfers: transfers of a value that a scan stacks. It is written and read; on GPU it is also copied into and out
        of the stack.
      is_fusing: whether a barrier in the body of a loop costs time, because it splits a kernel. On CPU this is not measurable.
      loop_s: the seconds to enter a loop.
    """

    flops: float
    transcendentals: float
    bytes: float
    cached_bytes: float
    cache: int
    new_bytes: float
    mmap_bytes: int
    stack_transfers: int
    is_fusing: bool
    loop_s: float

    def seconds(self, work: Work) -> float:
        """The time by the roofline model (Williams et al. 2009, doi:10.1145/1498765.1498785), with transcendentals."""
        compute = work.flops / self.flops + work.transcendentals / self.transcendentals
        return max(compute, self.transfer_s(work.bytes, work.bytes))

    def allocation_s(self, size: float) -> float:
        """The seconds to allocate `size` bytes of temporaries for a call."""
        return size / self.new_bytes if size >= self.mmap_bytes else 0.0

    def transfer_s(self, size: float, in_use: float) -> float:
        """The seconds to read or write `size` bytes, while `in_use` bytes are accessed together."""
        return size / (self.cached_bytes if in_use <= self.cache else self.bytes)


DEVICE_MODELS = {
    "cpu": DeviceModel(6e10, 6e9, 1e10, 1e11, 2**20, 2e9, 2**25, 2, False, 2e-5),
    # An H200, with float32 products at the default precision.
    "gpu": DeviceModel(4e14, 3e12, 3.5e12, 7e12, 2**24, float("inf"), 0, 4, True, 2e-5),
}
