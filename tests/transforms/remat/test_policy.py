"""What the simulation of a choice counts, beside the same counted one equation after the other."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from funcgrad.transforms.remat import saved_set
from funcgrad.transforms.remat.device_model import DEVICE_MODELS
from funcgrad.transforms.remat.policy import Policy, Simulation

from ... import trainings
from .test_saved_set import searched


def programs(draw, program, count):
    nodes = range(len(program.nodes))
    for k in range(count):
        saved, some = (frozenset(n for n in nodes if draw.random() < p) for p in draw.random(2))
        yield Policy(saved | saved_set.pinned(program), (None, frozenset(), some)[k % 3], draw.random() < 0.8)


@pytest.mark.parametrize("make", [trainings.resnet, trainings.mlp], ids=["resnet", "mlp"])
def test_simulations_beside_plain_ones(make):
    sizes = {"depth": 4, "channels": 8, "size": 8, "batch": 4} if make is trainings.resnet else {"depth": 6, "width": 8}
    loss, args = make(lambda layer: layer, **sizes)
    program = searched(loss, *args)[1].joint
    program.device = DEVICE_MODELS["cpu"]
    fast = Simulation(program, is_allocating=False)
    for choice in programs(np.random.default_rng(0), program, 60):
        outcome = fast(choice, 0)
        peak, seconds = plain(program, fast.sizes_with(choice.saved).tolist(), choice)
        assert outcome.peak == peak
        assert outcome.seconds == pytest.approx(seconds)


def plain(program, sizes, choice):
    """The peak and the seconds of a choice: what is alive at each equation of the two parts."""
    nodes = program.nodes
    alive = program.forward_bytes.astype(int).tolist()
    for n in choice.saved:
        for at in range(program.last_forward[n] + 1, len(nodes)):
            alive[at] += sizes[n]
    peak, seconds, computed = max(alive), 0.0, set()
    there, last, parts = dict.fromkeys(choice.saved, 0), {}, []
    for start, stop, reads in choice.stages(program):
        values_now, todo = set(), [n for n in reads if n not in there]
        while todo:
            n = todo.pop()
            if n in there:
                last[n] = start
            elif n not in values_now:
                values_now.add(n)
                todo += nodes[n].sources
        seconds += sum(nodes[n].seconds for n in values_now if nodes[n].is_run or n in computed)
        computed |= values_now
        held = values_now if choice.retained is None else values_now & choice.retained
        there |= dict.fromkeys(held, start)
        last |= dict.fromkeys(held, start) | reads
        parts.append((start, stop, reads, values_now, held))
    through = {n for start, _, reads, values_now, held in parts for n in held - reads.keys() if last[n] == start}
    alive = program.backward_bytes.astype(int).tolist()
    for n, start in there.items():
        for at in range(start, last.get(n, -1) + 1):
            alive[at] += sizes[n] * (n not in through)
    for start, _, reads, values_now, held in parts:
        for n in (values_now - held) & reads.keys():
            for at in range(start, reads[n] + 1):
                alive[at] += sizes[n]
        # While it is computed: what is read by others of it alone dies with the last of these.
        waiting = Counter(s for n in values_now for s in nodes[n].sources)
        passing = {n for n in values_now - reads.keys() if n not in held or n in through}
        live = most = 0
        for n in sorted(values_now):
            live += nodes[n].bytes
            most = max(most, live)
            for s in nodes[n].sources:
                waiting[s] -= 1
                live -= nodes[s].bytes if not waiting[s] and s in passing else 0
        alive[start] += most - live if passing else 0
    return max(peak, *alive), seconds


def test_memoised_recomputations_change_nothing():
    loss, args = trainings.resnet(lambda layer: layer, depth=4, channels=8, size=8, batch=4)
    program = searched(loss, *args)[1].joint
    one = Simulation(program, is_allocating=True)
    for choice in programs(np.random.default_rng(0), program, 50):
        assert one(choice, 0) == Simulation(program, is_allocating=True)(choice, 0)
    assert len(one.recomputations) < 50 * len(program.stages)
