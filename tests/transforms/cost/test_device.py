"""The speed of the device: measured once, and the roofline that follows."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from funcgrad.transforms.cost import device

import funcgrad as fg


def test_a_machine_is_measured_once():
    machine = fg.machine()
    assert fg.machine() is machine
    a = jnp.ones((64, 64))
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


def test_caches_are_measured_once():
    device.cache_bytes.cache_clear()
    assert device.cache_bytes() == device.cache_bytes()
    assert device.cache_bytes() in {2**k for k in range(22, 26)}
    assert device.cache_bytes.cache_info().misses == 1
