"""Nominal machines: by what a plan weighs computing again against keeping, so that it does not depend on a measurement."""

from __future__ import annotations

from typing import NamedTuple

from ..cost.operations import Work


class Nominal(NamedTuple):
    """What a machine does in a second.

    Attributes:
      flops, transcendentals: operations.
      bytes: read or written; `cached_bytes` of what is no larger than `cache`.
      new_bytes: of the temporaries of a call, from `held` bytes on. On CPU, XLA asks for all of them at once and at each call;
        from 32 MiB on glibc takes them from the system (mallopt(3), M_MMAP_THRESHOLD), which clears them page by page: this is
        slower than all else that is done with them. On GPU they are taken once.
      stacked: how often what a step of a scan keeps is moved. It is written and read; on GPU it is copied into and out of the
        stack, too.
      is_fusing: whether what a barrier in the body of a loop hands on costs time, as it keeps apart what else were one kernel. On
        CPU it does not show.
      loop_s: the seconds to enter a loop.
    """

    flops: float
    transcendentals: float
    bytes: float
    cached_bytes: float
    cache: int
    new_bytes: float
    held: int
    stacked: int
    is_fusing: bool
    loop_s: float

    def seconds(self, work: Work) -> float:
        """The roofline, transcendentals counted."""
        compute = work.flops / self.flops + work.transcendentals / self.transcendentals
        return max(compute, self.moved(work.bytes, work.bytes))

    def taken(self, count: float) -> float:
        """The seconds to have so many bytes of temporaries for a call."""
        return count / self.new_bytes if count >= self.held else 0.0

    def moved(self, count: float, together: float) -> float:
        """The seconds to read or write `count` bytes, where so many are in use together."""
        return count / (self.cached_bytes if together <= self.cache else self.bytes)


NOMINAL = {
    "cpu": Nominal(6e10, 6e9, 1e10, 1e11, 2**20, 2e9, 2**25, 2, False, 2e-5),
    # Of an H200, with products of float32 as precise as they are by default there.
    "gpu": Nominal(4e14, 3e12, 3.5e12, 7e12, 2**24, float("inf"), 0, 4, True, 2e-5),
}
