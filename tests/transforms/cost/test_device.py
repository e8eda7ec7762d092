"""The speed of the device: measured once, and the roofline that follows."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import pytest
from funcgrad.transforms.cost import device

import funcgrad as fg


def test_a_machine_is_measured_once():
    machine = fg.machine()
    assert fg.machine() is machine
    a = jnp.ones((1024, 1024))
    product = jax.jit(jnp.dot).lower(a, a).compile()
    start = time.perf_counter()
    product(a, a).block_until_ready()
    assert machine.flops_per_s > 0.2 * 2 * 1024**3 / (time.perf_counter() - start)
    work = fg.cost(jnp.dot, a, a).work
    assert machine.bound(work) == (
        max(work.flops / machine.flops_per_s, work.bytes / machine.bytes_per_s),
        machine.bound(work).by,
    )
    assert fg.Machine("fast memory", 1.0, 1e30).bound(work).by == "compute"
    assert fg.Machine("slow memory", 1e30, 1.0).bound(work).by == "bandwidth"


@pytest.mark.parametrize(
    ("speeds", "near"),
    [((9, 9, 8, 8), 32), ((9, 8, 3, 2), 8), ((9, 3, 2, 2), 4), ((5, 6, 6, 2), 16), ((2, 2, 2, 2), 32)],
)
def test_caches_are_as_large_as_what_is_rewritten_fast(speeds, near, monkeypatch):
    took_s = {2 ** (22 + k): 2 ** (22 + k) / speed for k, speed in enumerate(speeds)}
    monkeypatch.setattr(device, "_rewriting_s", took_s.__getitem__)
    device.cache_bytes.cache_clear()
    assert device.cache_bytes() == near * 2**20
    device.cache_bytes.cache_clear()


@pytest.mark.usefixtures("fresh_heap")
def test_caches_are_measured_once_and_fast():
    start = time.perf_counter()
    assert device.cache_bytes() in {2**k for k in range(22, 26)}
    assert time.perf_counter() - start < 1
    assert device.cache_bytes.cache_info().misses == 1
